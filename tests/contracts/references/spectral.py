"""References of the spectral rules: numpy SVDs of the full matrices, as the papers write them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

ROUNDING = 1e-9


def orthogonal(X: np.ndarray) -> np.ndarray:
    """Return X (X^T X)^(-1/2), without the directions that X lacks: another route than an SVD of X."""
    values, vectors = np.linalg.eigh(X.T @ X)
    kept = values > ROUNDING * values.max(initial=0.0)
    return X @ (vectors[:, kept] / np.sqrt(values[kept])) @ vectors[:, kept].T


def rank_of(dW: np.ndarray) -> int:
    S = np.linalg.svd(dW, compute_uv=False)
    return int((ROUNDING * S.max() < S).sum())


def tsv(deltas: Sequence[np.ndarray], ranks: Sequence[int], options: dict[str, Any]) -> np.ndarray:
    used = [(dW, rank) for dW, rank in zip(deltas, ranks, strict=True) if dW.any()]
    asked = [min(options["k"] or rank, rank) for _, rank in used]
    if sum(asked) > min(deltas[0].shape):
        asked = [min(k, max(1, min(deltas[0].shape) // len(used))) for k in asked]
    kept = [min(k, rank_of(dW)) for k, (dW, _) in zip(asked, used, strict=True)]
    parts = [np.linalg.svd(dW, full_matrices=False) for dW in deltas if dW.any()]
    U = np.hstack([part[0][:, :k] for part, k in zip(parts, kept, strict=True)])
    S = np.concatenate([part[1][:k] for part, k in zip(parts, kept, strict=True)])
    V = np.vstack([part[2][:k] for part, k in zip(parts, kept, strict=True)]).T
    return orthogonal(U) @ np.diag(S) @ orthogonal(V).T


def iso_c(deltas: Sequence[np.ndarray], ranks: Sequence[int], options: dict[str, Any], rank: int | None) -> np.ndarray:
    """By the Gram matrix: U V^T = dW (dW^T dW)^(+1/2)."""
    dW = np.sum(deltas, axis=0)
    U, S, Vh = np.linalg.svd(dW)
    top = min(rank_of(dW), rank or len(S))
    dW = U[:, :top] * S[:top] @ Vh[:top]
    values, vectors = np.linalg.eigh(dW.T @ dW)
    values, vectors = values[-top:], vectors[:, -top:]
    return np.sqrt(values).mean() * dW @ (vectors / np.sqrt(values)) @ vectors.T


def iso_cts(
    deltas: Sequence[np.ndarray], ranks: Sequence[int], options: dict[str, Any], rank: int | None
) -> np.ndarray:
    """The steps of the authors' code (danielm1405/iso-merging, src/utils/iso.py), min(m, n) replaced by the rank."""
    total = np.sum(deltas, axis=0)
    tasks = [dW for dW in deltas if dW.any()]
    size = min(rank_of(total), rank or min(total.shape))
    common = int(size * options["common"])
    specific = round((size - common) / len(tasks)) * len(tasks)
    if specific > size:
        specific -= len(tasks)
    common, each = size - specific, specific // len(tasks)
    U, S, Vh = np.linalg.svd(total)
    U, S, Vh = U[:, :common], S[:common], Vh[:common]
    lefts, strengths, rights = [U], [S], [Vh]
    for dW in tasks:
        u, s, vh = np.linalg.svd(dW - U @ U.T @ dW)
        kept = min(each, int((s > ROUNDING * np.linalg.norm(dW)).sum()))
        lefts.append(u[:, :kept])
        strengths.append(s[:kept])
        rights.append(vh[:kept])
    mean = np.concatenate(strengths).mean()
    return mean * orthogonal(np.hstack(lefts)) @ orthogonal(np.vstack(rights).T).T


def wudi(deltas: Sequence[np.ndarray], ranks: Sequence[int], options: dict[str, Any]) -> np.ndarray:
    """Ridge regression row by row: each target dW_i dW_i^T on dW_i^T, and on zeros for the ridge."""
    tasks = [dW for dW in deltas if dW.any()]
    n, m = tasks[0].shape[1], tasks[0].shape[0]
    rows = [dW / np.linalg.norm(dW) for dW in tasks]
    targets = [row @ dW.T for row, dW in zip(rows, tasks, strict=True)]
    inputs = np.vstack([*rows, np.sqrt(options["ridge"]) * np.eye(n)])
    wanted = np.vstack([*targets, np.zeros((n, m))])
    return np.linalg.lstsq(inputs, wanted, rcond=1e-9)[0].T


REFERENCES: dict[str, Callable[..., np.ndarray]] = {"tsv": tsv, "iso_c": iso_c, "iso_cts": iso_cts, "wudi": wudi}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "tsv": [{}, {"k": 2}],
    "iso_cts": [{}, {"common": 0.5}, {"common": 0.0}],
    "wudi": [{}, {"ridge": 0.0}, {"ridge": 0.1}],
}
IDENTITY_AT: dict[str, dict[str, Any]] = {"tsv": {"k": None}, "wudi": {"ridge": 0.0}}
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("identity", "iso_c"): "it makes the spectrum flat, that of one adapter too",
    ("identity", "iso_cts"): "it makes the spectrum flat, that of one adapter too",
}
