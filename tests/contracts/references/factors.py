"""References of the rules on rank-1 units and on factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def distance(x: np.ndarray, y: np.ndarray) -> float:
    """Return how far two units are apart, which are the same up to sign."""
    return float(min(np.linalg.norm(x - y), np.linalg.norm(x + y)))


def lego(deltas: Sequence[np.ndarray], ranks: Sequence[int], options: dict[str, Any], rank: int | None) -> np.ndarray:
    """k-means on the units themselves, in full space, from the farthest ones."""
    units = []
    for dW in deltas:
        U, S, Vh = np.linalg.svd(dW)
        for u, s, v in zip(U.T, S, Vh, strict=False):
            if s > 1e-9 * S[0]:
                units.append(np.sqrt(s) * np.sign(max(v, key=abs)) * np.concatenate([v, u]))
    centres = [max(units, key=np.linalg.norm)]
    while len(centres) < min(rank or max(ranks), len(units)):
        centres.append(max(units, key=lambda unit: min(distance(unit, centre) for centre in centres)))
    for _ in range(50):
        clusters: list[list[np.ndarray]] = [[] for _ in centres]
        for unit in units:
            nearest = int(np.argmin([distance(unit, centre) for centre in centres]))
            clusters[nearest].append(unit if unit @ centres[nearest] >= -1e-9 * (unit @ unit) else -unit)
        centres = [np.mean(cluster, axis=0) for cluster in clusters]
    n = deltas[0].shape[1]
    merged = np.zeros_like(deltas[0])
    for centre, cluster in zip(centres, clusters, strict=True):
        centre = centre * np.mean([np.abs(unit).max() for unit in cluster]) / np.abs(centre).max()
        merged += np.outer(centre[n:], centre[:n])
    return np.sqrt(len(units) / len(centres)) * merged


def robust(deltas: Sequence[np.ndarray], ranks: Sequence[int], options: dict[str, Any]) -> np.ndarray:
    raise NotImplementedError("it needs the factors: tests/merging/rules/test_factors.py")


REFERENCES: dict[str, Callable[..., np.ndarray]] = {"lego": lego, "robust": robust}
VARIANTS: dict[str, list[dict[str, Any]]] = {"robust": [{}, {"density": 0.7, "free": 1.0}]}
IDENTITY_AT: dict[str, dict[str, Any]] = {"robust": {"density": 1.0}}  # pruning is the point of the rule
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("reference", "robust"): "dW alone does not tell the factors; see tests/merging/rules/test_factors.py",
    ("gauge", "robust"): "it prunes the factors themselves",
}
