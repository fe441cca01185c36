"""Dense float64 references of the entrywise rules, by other routes than the code: sorting, loops, whole matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

Deltas = list[np.ndarray]
Options = dict[str, Any]


def somewhere(rule: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Let a reference for full space work in the space of its options, by dense SVDs of the stacked updates."""

    def reference(deltas: Deltas, ranks: Sequence[int], options: Options, **extra: Any) -> np.ndarray:
        space = options.get("space", "knots")
        used = [dW for dW in deltas if np.any(dW)]  # an update of zeros tells nothing
        by_size = sorted(used, key=lambda dW: -np.linalg.norm(dW))
        if space == "full":
            return rule(by_size, options, **extra)
        U, S, Vh = np.linalg.svd(np.hstack(deltas), full_matrices=False)
        U = U[:, 1e-5 * S[0] < S]
        if space == "knots":  # as published: the blocks of S V^T
            parts = [U.T @ dW for dW in by_size]
            return U @ rule(parts, options, **extra)
        S, Vh = np.linalg.svd(np.vstack(deltas), full_matrices=False)[1:]
        V = Vh[1e-5 * S[0] < S].T
        return U @ rule([U.T @ dW @ V for dW in by_size], options, **extra) @ V.T

    return reference


def ranked(dW: np.ndarray, first: int, last: int) -> np.ndarray:
    """Return `dW` with only the entries from place `first` (from 0) to before `last` by falling magnitude."""
    order = np.argsort(-np.abs(dW), axis=None)[first:last]
    kept = np.zeros(dW.size)
    kept[order] = dW.flatten()[order]
    return kept.reshape(dW.shape)


def agreeing_mean(deltas: Deltas, weights: Sequence[float] | None = None) -> np.ndarray:
    weights = weights or [1.0] * len(deltas)
    merged = np.zeros_like(deltas[0])
    for place in np.ndindex(merged.shape):
        values = [dW[place] for dW in deltas]
        agreeing = [(w, value) for w, value in zip(weights, values, strict=True) if value * sum(values) > 0]
        if agreeing:
            merged[place] = sum(w * value for w, value in agreeing) / sum(w for w, _ in agreeing)
    return merged


def ties_of(deltas: Deltas, options: Options) -> np.ndarray:
    return agreeing_mean([ranked(dW, 0, round(options["density"] * dW.size)) for dW in deltas])


def draws(deltas: Deltas, generator: torch.Generator) -> Deltas:
    """Return uniform numbers like each of `deltas`, as the rules draw them: a seed a task, by falling size."""
    seeds = [int(torch.randint(2**62, (), generator=generator)) for _ in deltas]
    return [
        torch.rand(dW.shape, generator=torch.Generator().manual_seed(seed)).double().numpy()
        for seed, dW in zip(seeds, deltas, strict=True)
    ]


def dropped(deltas: Deltas, options: Options, generator: torch.Generator) -> Deltas:
    p = 1 - options["density"]
    return [dW * (u < 1 - np.float32(p)) / (1 - p) for dW, u in zip(deltas, draws(deltas, generator), strict=True)]


def dare_of(deltas: Deltas, options: Options, generator: torch.Generator) -> np.ndarray:
    return np.sum(dropped(deltas, options, generator), axis=0)


def dare_ties_of(deltas: Deltas, options: Options, generator: torch.Generator) -> np.ndarray:
    return agreeing_mean(dropped(deltas, options, generator))


def della_of(deltas: Deltas, options: Options, generator: torch.Generator) -> np.ndarray:
    low, width = options["density"] - options["eps"], 2 * options["eps"]
    kept = []
    for dW, u in zip(deltas, draws(deltas, generator), strict=True):
        thinned = np.zeros_like(dW)
        for i, row in enumerate(dW):
            for j, value in enumerate(row):
                smaller = sum(abs(other) < abs(value) for other in row)
                p = low + width * smaller / max(1, len(row) - 1)
                thinned[i, j] = value / p if u[i, j] < p else 0.0
        kept.append(thinned)
    return agreeing_mean(kept)


def breadcrumbs_of(deltas: Deltas, options: Options) -> np.ndarray:
    size = deltas[0].size
    keep = max(1, round(options["density"] * size))
    drop = min(round(options["gamma"] * size), size - keep)
    return np.sum([ranked(dW, drop, drop + keep) for dW in deltas], axis=0)


def sce_of(deltas: Deltas, options: Options) -> np.ndarray:
    stack = np.stack(deltas)
    if len(deltas) > 1:
        spread = np.mean(stack**2, axis=0) - np.mean(stack, axis=0) ** 2
        order = np.argsort(-spread, axis=None)[: max(1, round(options["density"] * spread.size))]
        mask = np.zeros(spread.size)
        mask[order] = 1.0
        stack = stack * mask.reshape(spread.shape)
    return agreeing_mean(list(stack), [float((dW**2).mean()) for dW in stack])


def consensus_of(deltas: Deltas, options: Options) -> np.ndarray:
    total = np.sum(deltas, axis=0)
    votes = np.zeros(total.shape, dtype=int)
    for i in range(len(deltas)):
        others = np.sum([dW for j, dW in enumerate(deltas) if j != i] or [0 * total], axis=0)
        votes += np.abs(deltas[i]) > options["strictness"] * np.abs(others)
    return total * (votes >= min(options["tasks"], len(deltas)))


def pcb_of(deltas: Deltas, options: Options) -> np.ndarray:
    total = np.sum(deltas, axis=0)
    tops, bottoms = np.zeros_like(total), np.zeros_like(total)
    for dW in deltas:
        size = np.abs(dW)
        size = np.clip(size, *np.sort(size, axis=None)[[int(1e-4 * size.size), size.size - 1 - int(1e-4 * size.size)]])
        share = (size - size.min()) / (size.max() - size.min())
        score = np.exp(len(deltas) * share**2) * dW * total
        keep = max(1, round(options["density"] * size.size))
        floor = np.sort(score, axis=None)[::-1][min(keep, size.size - 1)]
        weight = np.maximum(score - floor, 0) / (score.max() - floor)
        tops += weight * np.sign(dW) * size
        bottoms += weight
    return np.where(bottoms > 0, tops / np.maximum(bottoms, 1e-300), 0.0)


def emr_of(deltas: Deltas, options: Options) -> np.ndarray:
    stack = np.stack(deltas)
    sign = np.sign(stack.sum(axis=0))
    return sign * np.max(np.where(np.sign(stack) == sign, np.abs(stack), 0.0), axis=0)


REFERENCES: dict[str, Callable[..., np.ndarray]] = {
    "ties": somewhere(ties_of),
    "knots": somewhere(ties_of),
    "dare": somewhere(dare_of),
    "dare_ties": somewhere(dare_ties_of),
    "della": somewhere(della_of),
    "breadcrumbs": somewhere(breadcrumbs_of),
    "sce": somewhere(sce_of),
    "consensus": somewhere(consensus_of),
    "pcb": somewhere(pcb_of),
    "emr": lambda deltas, ranks, options: somewhere(emr_of)(deltas, ranks, {**options, "space": "core"}),
}

VARIANTS: dict[str, list[Options]] = {
    "ties": [{}, {"density": 0.6}],
    "dare": [{"density": 0.7}],
    "dare_ties": [{"density": 0.7}],
    "della": [{}, {"density": 0.6, "eps": 0.3}],
    "breadcrumbs": [{}, {"density": 0.5, "gamma": 0.05}, {"density": 0.9, "gamma": 0.3}],
    "sce": [{}, {"density": 0.5}],
    "consensus": [{}, {"strictness": 1.0, "tasks": 1}],
    "pcb": [{}, {"density": 0.5}],
}

IDENTITY_AT: dict[str, Options] = {  # dropping entries is the point of these
    "ties": {"density": 1.0},
    "knots": {"density": 1.0},
    "dare": {"density": 1.0},
    "dare_ties": {"density": 1.0},
    "della": {"density": 1.0, "eps": 0.0},
    "breadcrumbs": {"density": 1.0},
    "pcb": {"density": 1.0},
}
