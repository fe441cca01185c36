"""Rules on rank-1 units and on the factors themselves: they mix single ranks of different updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from loraloom.adapters.lowrank import NOISE, nonzero, svd_factors, zero_like
from loraloom.adapters.update import Update
from loraloom.merging.registry import rule

_STEPS = 100  # of k-means at most


@rule(
    "lego",
    formula="k-means of rank-1 units up to sign; centres at the members' strength",
    paper="Zhao et al. 2025, Merging LoRAs like Playing LEGO (LoRA-LEGO), arXiv 2409.16167",
    summary="cluster the rank-1 units of all updates and keep one unit a cluster, at the mean strength of its members",
    cost="factors; R x R",
    exact=True,
    output_rank="max",
)
def lego(updates: Sequence[Update], *, rank: int | None) -> Update:
    """Return sqrt(R / k) sum_c b_c a_c over k cluster centres (Zhao et al. 2025, LoRA-LEGO, arXiv 2409.16167).

    The R units [a; b] of all updates are grouped by k-means, k = `rank` (default max r_i). The centre is the mean of
    its members times (mean of their largest |entry|) / (its own largest |entry|): parameter reweighting. The factor
    sqrt(R / k) is the output reweighting; some re-implementations take sqrt(r / k) instead. k-means starts from the
    strongest unit, then each time from the one farthest from all starts: no draw, while published code restarts it
    from ten random ones.

    Differs from published code in what a unit is. There it is a row of A with its column of B, which depends on the
    split into factors (B R, R^-1 A), and mostly on the larger of the two. Here it is a triple of dW_i's own SVD,
    a = sqrt(s) v and b = sqrt(s) u, and as (u, v) and (-u, -v) are the same unit, k-means compares units up to sign. A
    unit orthogonal to its whole cluster (as two of one update are) has the sign that makes the largest entry of v
    positive. Zero singular values are no units, so R counts the ranks that are really used.
    """
    tasks = nonzero(updates)
    if not tasks:
        return zero_like(updates[0])
    units, n = torch.cat([_units(task) for task in tasks]), tasks[0].A.shape[1]
    means = _cluster(units @ units.T, min(rank or max(update.rank for update in updates), len(units)))
    centres = means @ units
    centres *= (means.abs() @ _largest(units) / _largest(centres))[:, None]
    root = (len(units) / len(centres)) ** 0.25  # sqrt(R / k), its root in each factor
    return Update((root * centres[:, n:].T).float(), (root * centres[:, :n]).float())


@rule(
    "robust",
    formula="(Σ B̃ᵢ diag(sᵢ) / Σ sᵢ)(Σ Ãᵢ), pruned factors",
    paper="Zeng et al. 2025, RobustMerge, arXiv 2502.17159",
    summary="prune A and B, rescale each rank by what A lost, add the As and average the Bs",
    cost="factors",
    exact=True,
    default_scale=4.0,
    output_rank="max",
)
def robust(
    updates: Sequence[Update],
    *,
    density: Annotated[float, Field(gt=0, le=1, description="share of entries kept in each A and B")] = 0.2,
    free: Annotated[
        float, Field(gt=0, le=1, description="share of ranks with a scale of their own; lesser scales are raised to it")
    ] = 0.2,
) -> Update:
    """Return (sum_i B~_i diag(s_i) / sum_i s_i) (sum_i A~_i) (Zeng et al. 2025, RobustMerge, arXiv 2502.17159).

    A~ and B~ keep their `density` share of largest |entries|; s_i = (row sums of |A_i|) / (row sums of |A~_i|), the
    smaller ones raised to the least of the top `free` share, as the authors' code does (1: none is raised). Factor by
    factor: the product holds cross terms B_i A_j and depends on the split of each update into B and A; it assumes that
    the k-th ranks of all tasks belong together. The default scale 4 is the code's fuse weight 2 on either factor.

    Beyond the code: a task of lower rank takes no part in the ranks it lacks, nor does a rank of which nothing is kept
    in A (the code divides by 0), nor an update that is zero.
    """
    tasks = nonzero(updates)
    if not tasks:
        return zero_like(updates[0])
    rank = max(task.rank for task in tasks)
    A = torch.zeros(rank, tasks[0].A.shape[1], dtype=torch.float64)
    B = torch.zeros(tasks[0].B.shape[0], rank, dtype=torch.float64)
    total = torch.zeros(rank, dtype=torch.float64)
    for task in tasks:
        a, b, r = _prune(task.A.double(), density), _prune(task.B.double(), density), task.rank
        left = a.abs().sum(dim=1)
        scales = torch.where(left > 0, task.A.double().abs().sum(dim=1) / left, 0.0)
        floor = scales.sort().values[min(int(r * (1 - free)), r - 1)]
        scales = torch.where(left > 0, scales.clamp_min(floor), 0.0)
        A[:r] += a
        B[:, :r] += b * scales
        total[:r] += scales
    return Update(torch.where(total > 0, B / total, 0.0).float(), A.float())


def _units(update: Update) -> Tensor:
    """Return the units [sqrt(s) v, sqrt(s) u] of an update as rows (R, n + m), float64."""
    U, S, Vh = svd_factors(update)
    kept = NOISE * S[0] < S
    U, V = U[:, kept], Vh[kept].T
    signs = V.gather(0, V.abs().argmax(dim=0, keepdim=True)).sign()
    return ((torch.cat([V, U]) * signs) * S[kept].sqrt()).T


def _largest(rows: Tensor) -> Tensor:
    return rows.abs().amax(dim=1)


def _cluster(gram: Tensor, most: int) -> Tensor:
    """Return at most `most` cluster means (k, R) of R vectors with the Gram matrix `gram`, as weights of the vectors.

    Lloyd's algorithm for vectors up to sign: a mean is that of its members, each with the sign by which it agrees.
    """
    norms = gram.diagonal()
    starts = [int(norms.argmax())]
    nearest = norms + norms[starts[0]] - 2 * gram[starts[0]].abs()
    while len(starts) < most and float(nearest.max()) > NOISE**2 * float(norms.max()):
        starts.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, norms + norms[starts[-1]] - 2 * gram[starts[-1]].abs())
    means, everyone = torch.eye(len(gram), dtype=gram.dtype)[starts], torch.arange(len(gram))
    for _ in range(_STEPS):
        inner = means @ gram
        labels = ((inner * means).sum(dim=1)[:, None] - 2 * inner.abs()).argmin(dim=0)
        members = torch.zeros_like(means)
        agreement = inner[labels, everyone]
        members[labels, everyone] = torch.where(agreement < -NOISE * norms, -1.0, 1.0).to(gram.dtype)
        members = members[members.any(dim=1)]
        found = members / members.abs().sum(dim=1, keepdim=True)
        if torch.equal(found, means):
            break
        means = found
    return means


def _prune(X: Tensor, density: float) -> Tensor:
    """Return X with its `density` share of largest |entries|, at least one, and zeros elsewhere."""
    size, kept = X.abs(), max(1, round(density * X.numel()))
    return torch.where(size >= size.flatten().kthvalue(X.numel() - kept + 1).values, X, 0.0)
