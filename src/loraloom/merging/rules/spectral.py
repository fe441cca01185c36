"""Spectral rules: they act on the singular vectors of the updates, exactly in the factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from loraloom.adapters.lowrank import (
    NOISE,
    concatenate,
    in_shared_bases,
    nonzero,
    norm,
    polar,
    signal,
    svd_factors,
    zero_like,
)
from loraloom.adapters.update import Update
from loraloom.merging.registry import rule


@rule(
    "tsv",
    formula="polar(U) S polar(V)ᵀ over the tasks' singular triples",
    paper="Gargiulo et al. 2025, Task Singular Vectors (TSV-M), arXiv 2412.00081",
    summary="concatenate the tasks' singular triples and make their singular vectors orthogonal",
    cost="factors; polar of m x R",
    exact=True,
    default_scale=0.75,
)
def tsv(
    updates: Sequence[Update],
    *,
    k: Annotated[int | None, Field(gt=0, description="singular triples kept per task; default: its rank")] = None,
) -> Update:
    """Return polar(U) S polar(V)^T, U = [U_1 ... U_T] and so on (Gargiulo et al. 2025, TSV-M, arXiv 2412.00081).

    Published scale 1; 0.75 was better on held-out rows of four and of eight GLUE tasks (docs/study-subspaces.md).
    dW_i = U_i S_i V_i^T keeps its top `k` triples and never more than its rank: the vectors of zero singular values,
    which full-space code pulls in, are arbitrary. `polar` is the nearest matrix with orthonormal columns. Where all
    triples together are more than the m or n directions that there are, each of the T tasks keeps 1/T of these at most,
    as TSV-M does always.
    """
    tasks = [(update.rank, *svd_factors(update)) for update in nonzero(updates)]
    room = min(updates[0].B.shape[0], updates[0].A.shape[1])
    if sum(min(k or rank, rank) for rank, _, _, _ in tasks) > room:
        k = min(k or room, max(1, room // len(tasks)))
    triples = []
    for rank, U, S, Vh in tasks:
        kept = min(k or rank, _count(S, float(S[0])))
        triples.append((U[:, :kept], S[:kept], Vh[:kept]))
    if not triples:
        return zero_like(updates[0])
    strengths = torch.cat([S for _, S, _ in triples])
    left = polar(torch.cat([U for U, _, _ in triples], dim=1))
    right = polar(torch.cat([Vh for _, _, Vh in triples]).T).T
    root = strengths.sqrt()
    return Update((left * root).float(), (root[:, None] * right).float())


@rule(
    "iso_c",
    formula="mean(S) U Vᵀ of Σ dWᵢ = U S Vᵀ",
    paper="Marczak et al. 2025, No Task Left Behind: Isotropic Model Merging (Iso-C), arXiv 2502.04959",
    summary="the sum of the updates with all its singular values made equal to their mean",
    cost="factors",
    exact=True,
)
def iso_c(updates: Sequence[Update], *, rank: int | None) -> Update:
    """Return mean(S) U V^T of sum_i dW_i = U S V^T (Marczak et al. 2025, Iso-C, arXiv 2502.04959).

    Only the R non-zero singular values are flattened, R <= sum r_i. The published full-space code flattens all
    min(m, n): it gives arbitrary vectors to the zero ones and its mean is smaller by R / min(m, n). So a scale tuned
    there is worth R / min(m, n) of it here. An asked `rank` keeps that many of the strongest triples of the sum before
    they are flattened, because a flat spectrum has no best truncation. A direction weaker than 1e-5 of the strongest
    update counts as rounding and stays zero, where full-space code would lift it to the mean.
    """
    U, S, Vh = svd_factors(concatenate(updates))
    kept = min(rank or len(S), _count(S, max(norm(update) for update in updates)))
    return _flat(U[:, :kept], S[:kept], Vh[:kept]) if kept else zero_like(updates[0])


@rule(
    "iso_cts",
    formula="as Iso-C on common triples and each task's own outside of them",
    paper="Marczak et al. 2025, No Task Left Behind: Isotropic Model Merging (Iso-CTS), arXiv 2502.04959",
    summary="top directions of the sum and each task's own outside of them, orthogonalised, at equal strength",
    cost="factors",
    exact=True,
)
def iso_cts(
    updates: Sequence[Update],
    *,
    rank: int | None,
    common: Annotated[float, Field(ge=0, le=1, description="share of directions taken from the sum")] = 0.8,
) -> Update:
    """Return mean(S) polar(U) polar(V)^T of common and task-specific triples (Iso-CTS, arXiv 2502.04959).

    Of R directions the top `common` share are triples of sum_i dW_i, U_c their left vectors; the others are shared out
    equally: the top triples of (I - U_c U_c^T) dW_i of every task. As in the published code what cannot be shared out
    equally goes to the common part. R is the rank of the sum (or the asked `rank`, if smaller), where full-space code
    takes min(m, n), with the same difference of scale as in `iso_c`. Zero updates count for no task, and a task with
    fewer directions left outside U_c than its share adds those alone.
    """
    QB, QA, small = in_shared_bases(updates)
    tasks = nonzero(small)
    U, S, Vh = svd_factors(concatenate(small))
    budget = min(rank or len(S), _count(S, max(norm(update) for update in small)))
    if not budget:
        return zero_like(updates[0])
    own = min(round((budget - int(budget * common)) / len(tasks)), budget // len(tasks))
    top = budget - own * len(tasks)
    triples = [(U[:, :top], S[:top], Vh[:top])]
    for task in tasks:
        outside = Update(task.B - U[:, :top] @ (U[:, :top].T @ task.B), task.A)
        u, s, vh = svd_factors(outside)
        kept = min(own, _count(s, norm(task)))
        triples.append((u[:, :kept], s[:kept], vh[:kept]))
    left = QB @ polar(torch.cat([u for u, _, _ in triples], dim=1))
    right = polar(torch.cat([vh for _, _, vh in triples]).T).T @ QA.T
    return _flat(left, torch.cat([s for _, s, _ in triples]), right)


@rule(
    "wudi",
    formula="(Σ dWᵢ Kᵢ)(Σ Kᵢ + ε I)⁻¹, Kᵢ = dWᵢᵀ dWᵢ / ‖dWᵢ‖²",
    paper="Cheng et al. 2025, Whoever Started the Interference Should End It (WUDI-Merging), arXiv 2503.08099",
    summary="the update that differs least from each task's on the inputs which that task's update reads",
    cost="factors; R x R solve",
    exact=True,
)
def wudi(
    updates: Sequence[Update],
    *,
    ridge: Annotated[float, Field(ge=0, description="added to the energy of every direction; 0: none")] = 1e-3,
) -> Update:
    """Return argmin_M sum_i |(M - dW_i) dW_i^T|_F^2 / |dW_i|_F^2 + ridge |M|_F^2 (WUDI, arXiv 2503.08099), closed form.

    M = (sum_i dW_i K_i) (sum_i K_i + ridge I)^-1 with K_i = dW_i^T dW_i / |dW_i|_F^2, in the core. K_i has trace 1, so
    `ridge` compares with the share of energy that a task has in one direction. The published code takes 300 steps of
    Adam from sum_i dW_i instead and stops long before the minimum, which is what keeps it from large values where rows
    of different tasks are nearly collinear; here the ridge does that. With `ridge` 0 the minimum of least norm is
    returned, directions below rounding left out, and one adapter comes back unchanged.
    """
    QB, QA, small = in_shared_bases(updates)
    triples = [svd_factors(update) for update in nonzero(small)]
    if not triples:
        return zero_like(updates[0])
    # K_i = F_i F_i^T and dW_i K_i = G_i F_i^T: solving with F has the condition number of dW_i, not its square
    F = torch.cat([Vh.T * (S / S.norm()) for _, S, Vh in triples], dim=1)
    G = torch.cat([U * (S.square() / S.norm()) for U, S, _ in triples], dim=1)
    P, s, Qh = torch.linalg.svd(F, full_matrices=False)
    P, s, Qh = P[:, signal(s)], s[signal(s)], Qh[signal(s)]
    return Update((QB @ (G @ Qh.T * (s / (s.square() + ridge)))).float(), (P.T @ QA.T).float())


def _count(singular: Tensor, strength: float) -> int:
    """Return how many singular values stand above the rounding of updates of norm `strength`."""
    return int((singular > NOISE * strength).sum())


def _flat(left: Tensor, strengths: Tensor, right: Tensor) -> Update:
    """Return left (m, k) right (k, n) times the mean of `strengths`, its root in each factor."""
    root = strengths.mean().sqrt()
    return Update((left * root).float(), (right * root).float())
