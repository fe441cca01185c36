"""References of the rules that look at activations, and what those with a probe cannot keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def rows_of(moments: Sequence[np.ndarray], shrink: float) -> list[np.ndarray]:
    """Return X_i (k, n) of every task with X_i^T X_i = G_i: its rows, and rows for its diagonal and the ridge."""
    found = []
    for H in moments:
        mean = (H**2).mean(axis=0)
        diagonal = (1 - shrink) * mean + 1e-6 * mean.mean()
        found.append(np.vstack([np.sqrt(shrink / len(H)) * H, np.diag(np.sqrt(diagonal))]))
    return found


def regmean_of(
    deltas: Sequence[np.ndarray], ranks: Sequence[int], options: dict[str, Any], *, moments: Sequence[np.ndarray]
) -> np.ndarray:
    """The regression itself: every task's rows, and what its own update makes of them."""
    inputs = rows_of(moments, options["shrink"])
    outputs = [X @ dW.T for X, dW in zip(inputs, deltas, strict=True)]
    return np.linalg.lstsq(np.vstack(inputs), np.vstack(outputs), rcond=None)[0].T


def optimal_rank_of(
    deltas: Sequence[np.ndarray],
    ranks: Sequence[int],
    options: dict[str, Any],
    *,
    moments: Sequence[np.ndarray],
    rank: int | None,
) -> np.ndarray:
    """Whiten, cut, un-whiten."""
    stacked = np.vstack(rows_of(moments, options["shrink"]))
    values, vectors = np.linalg.eigh(stacked.T @ stacked)
    root = (vectors * np.sqrt(values)) @ vectors.T
    U, S, Vh = np.linalg.svd(regmean_of(deltas, ranks, options, moments=moments) @ root, full_matrices=False)
    q = rank or max(ranks)
    return (U[:, :q] * S[:q]) @ Vh[:q] @ np.linalg.inv(root)


REFERENCES: dict[str, Callable[..., np.ndarray]] = {"regmean": regmean_of, "optimal_rank": optimal_rank_of}
SHRINKS: list[dict[str, Any]] = [{}, {"shrink": 0.3}]
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "regmean": SHRINKS,
    "optimal_rank": SHRINKS,
    "adamerging": [{"steps": 5}],
    "nsc": [{"steps": 5}],
    "soups": [{"steps": 5}],
}
UNMOVED = {"init": 1.0, "steps": 0}  # the scales are learned, from 1
IDENTITY_AT: dict[str, dict[str, Any]] = {"adamerging": UNMOVED, "nsc": UNMOVED}

AS_A_TASK = "a zero adapter brings its own texts, on which the merged model is fitted too"
NOT_LINEAR = "what the model does is not linear in the adapters"
WITH_PROBE = ("regmean_pp", "iteris", "fisher", "adamerging", "nsc", "soups", "lorahub")
EXCEPTIONS: dict[tuple[str, str], str] = {
    **{("zero", rule): AS_A_TASK for rule in ("regmean", "optimal_rank", *WITH_PROBE)},
    **{("equivariance", rule): NOT_LINEAR for rule in WITH_PROBE},
    ("identity", "lorahub"): "the search starts from 0 and takes the best of its trials",
}
