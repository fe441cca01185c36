"""References of the tensor rules, on the dense T x m x n tensor itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.linalg
import torch

ROUNDING = 1e-9


def khatri_rao(X: np.ndarray, Y: np.ndarray) -> np.ndarray:
    """Return the columns x_k (x) y_k, in the order in which reshape runs through the entries of x_k y_k^T."""
    return np.einsum("ik,jk->ijk", X, Y).reshape(-1, X.shape[1])


def fitted(design: np.ndarray, unfolded: np.ndarray) -> np.ndarray:
    """Return the F of least |design F^T - unfolded^T|."""
    return np.linalg.lstsq(design, unfolded.T, rcond=1e-6)[0].T


def parafac(tensor: np.ndarray, rank: int, steps: int = 100, settled: float = 1e-6) -> tuple[np.ndarray, ...]:
    """Return C (T, k), U (m, k), V (n, k): alternating least squares on the unfoldings, from pivoted SVD triples."""
    triples = [np.linalg.svd(dW, full_matrices=False) for dW in tensor]
    units = [(U[:, j] * S[j], Vh[j]) for U, S, Vh in triples for j in range(len(S)) if S[j] > 0]
    flat = np.stack([np.outer(u, v).ravel() for u, v in units], axis=1)
    R, order = scipy.linalg.qr(flat, mode="r", pivoting=True)
    spread = np.abs(R.diagonal())
    chosen = order[: min(rank, int((spread > 1e-5 * spread[0]).sum()))]
    U, V = (np.stack([units[i][side] for i in chosen], axis=1) for side in (0, 1))
    T, m, n = tensor.shape
    size, before = np.linalg.norm(tensor), 1.0
    for _ in range(steps):
        C = fitted(khatri_rao(U, V), tensor.reshape(T, -1))
        U = fitted(khatri_rao(C, V), tensor.transpose(1, 0, 2).reshape(m, -1))
        V = fitted(khatri_rao(C, U), tensor.transpose(2, 0, 1).reshape(n, -1))
        error = np.linalg.norm(tensor - np.einsum("tk,mk,nk->tmn", C, U, V)) / size
        if before - error < settled:
            break
        before = error
    return C, U, V


def cp(deltas: Sequence[np.ndarray], ranks: Sequence[int], options: dict[str, Any], rank: int | None) -> np.ndarray:
    C, U, V = parafac(np.stack(deltas), rank or max(ranks))
    return U @ np.diag(C.sum(axis=0)) @ V.T


def leading(unfolded: np.ndarray, rank: int) -> np.ndarray:
    U, S, _ = np.linalg.svd(unfolded, full_matrices=False)
    return U[:, : min(rank, int((1e-5 * S[0] < S).sum()))]


def tucker(tensor: np.ndarray, rank: int, steps: int = 100, settled: float = 1e-6) -> tuple[np.ndarray, np.ndarray]:
    """Return U (m, k), V (n, k): HOOI on the unfoldings of the dense tensor, from its HOSVD."""
    V, before = leading(np.hstack([dW.T for dW in tensor]), rank), 1.0
    for _ in range(steps):
        U = leading(np.hstack([dW @ V for dW in tensor]), rank)
        V = leading(np.hstack([dW.T @ U for dW in tensor]), rank)
        lost = np.linalg.norm(tensor - U @ U.T @ tensor @ V @ V.T) / np.linalg.norm(tensor)
        if before - lost < settled:
            break
        before = lost
    return U, V


def ties(cores: Sequence[np.ndarray], density: float) -> np.ndarray:
    trimmed = []
    for core in cores:
        kept = max(1, round(density * core.size))
        trimmed.append(np.where(np.abs(core) >= np.sort(np.abs(core), axis=None)[-kept], core, 0.0))
    merged = np.zeros_like(cores[0])
    for place in np.ndindex(merged.shape):
        values = [core[place] for core in trimmed]
        agreeing = [value for value in values if value * sum(values) > 0]
        merged[place] = np.mean(agreeing) if agreeing else 0.0
    return merged


def ctm(
    deltas: Sequence[np.ndarray],
    ranks: Sequence[int],
    options: dict[str, Any],
    rank: int | None,
    generator: torch.Generator,
) -> np.ndarray:
    """The steps of the authors' code (ZhengbaoHe/compress-then-merge, task_merger.py), in full space."""
    tasks = sorted((dW for dW in deltas if dW.any()), key=np.linalg.norm, reverse=True)
    norms, beta = [np.linalg.norm(dW) for dW in tasks], options["beta"]
    targets = [dW / size * (beta * size + (1 - beta) * np.mean(norms)) for dW, size in zip(tasks, norms, strict=True)]
    U, V = tucker(np.stack(targets), rank or max(ranks))
    cores = [U.T @ dW @ V for dW in tasks]
    if options["merge"] != "ties":
        drawn = torch.rand(len(cores), *cores[0].shape, generator=generator, dtype=torch.float64).numpy()
        cores = [
            core * (draw >= options["drop"]) / (1 - options["drop"]) for core, draw in zip(cores, drawn, strict=True)
        ]
    return U @ (np.sum(cores, axis=0) if options["merge"] == "dare" else ties(cores, options["density"])) @ V.T


REFERENCES: dict[str, Callable[..., np.ndarray]] = {"cp": cp, "ctm": ctm}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "cp": [{}, {"per_task": True}],
    "ctm": [{}, {"beta": 1.0, "density": 0.7}, {"merge": "dare", "drop": 0.1}, {"merge": "dare_ties", "beta": 0.0}],
}
IDENTITY_AT: dict[str, dict[str, Any]] = {"ctm": {"density": 1.0, "drop": 0.0}}  # pruning is the point of the rule
EXCEPTIONS: dict[tuple[str, str], str] = {}
