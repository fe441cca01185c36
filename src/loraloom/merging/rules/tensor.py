"""Tensor rules: the updates of a layer as one p x q x T tensor of core matrices, decomposed as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from loraloom.adapters.lowrank import NOISE, Shared, in_shared_bases, nonzero, norm, svd_factors, zero_like
from loraloom.adapters.update import Update
from loraloom.merging.registry import rule
from loraloom.merging.rules.entrywise import ties

_STEPS = 100  # of either iteration at most
_SETTLED = 1e-6  # they stop where the relative error falls by less, as CtM's code does
_RIDGE = 1e-12  # of least squares on a tensor of norm 1: far below what float32 factors tell
_TINY = 1e-300  # of what a zero is divided by


@rule(
    "cp",
    formula="U diag(Σ cᵢ) Vᵀ of the CP decomposition dWᵢ ≈ U diag(cᵢ) Vᵀ",
    paper="after Tensorized Clustered LoRA Merging (TC-LoRA), 2025, arXiv 2508.03999",
    summary="one CP decomposition of all updates; the merged one takes the mean over the tasks of their coefficients",
    cost="factors; ALS on R x R x T",
    exact=True,
    default_weights="mean",
    output_rank="max",
)
def cp(
    updates: Sequence[Update],
    *,
    rank: int | None,
    per_task: Annotated[bool, Field(description="keep what each task reads of the shared factors")] = False,
) -> Update | Shared:
    """Return U diag(sum_i c_i) V^T from the CP decomposition dW_i ~ U diag(c_i) V^T (after TC-LoRA, arXiv 2508.03999).

    The decomposition is that of the core matrices M_i stacked into a tensor, of rank k = `rank` (default max r_i), by
    TensorLy's alternating least squares; it is exact in the core because both bases are orthonormal. The weights, 1/T
    unless given, are in the updates already: so the sum over tasks is the mean of the coefficients of the updates
    themselves, and one adapter comes back unchanged. Where `per_task` is set, the result also tells what task i reads:
    T U diag(c_i) V^T, which approximates its own update at the default weights.

    The iteration starts from the k strongest singular triples of the updates, each time the strongest in what the
    chosen ones leave of it (pivoted Cholesky): so no triple is taken twice where updates are alike, and neither the
    order of the updates nor their factors matter. The paper stacks the adapters and clusters the training texts before
    it; this is its decomposition alone. It is a local minimum, as that of any CP decomposition.
    """
    QB, QA, small = in_shared_bases(updates)
    U, V, C = _parafac([svd_factors(update) for update in small], rank or max(update.rank for update in updates))
    left, right = QB @ U, (QA @ V).T
    if not per_task:
        return Update((left * C.sum(dim=0)).float(), right.float())
    gates = tuple(torch.diag(len(C) * c) for c in C)
    return Shared(left, torch.eye(len(right), dtype=torch.float64), right, torch.diag(C.sum(dim=0)), gates)


@rule(
    "ctm",
    formula="Uᵀ dWᵢ V in shared rank-q bases (Tucker-2), TIES or DARE there",
    paper="He et al. 2026, Compress then Merge: From Multiple LoRAs into One Low-Rank Adapter, arXiv 2606.03723",
    summary="project all updates into one shared pair of rank-q subspaces, then TIES or DARE on the q x q cores",
    cost="factors; HOOI on R x R x T",
    exact=True,
    default_scale=0.75,
    output_rank="max",
)
def ctm(
    updates: Sequence[Update],
    *,
    generator: torch.Generator,
    rank: int | None,
    beta: Annotated[float, Field(ge=0, le=1, description="0: equal norms choose the subspaces; 1: own norms")] = 0.25,
    merge: Annotated[Literal["ties", "dare", "dare_ties"], Field(description="how the cores are merged")] = "ties",
    density: Annotated[float, Field(gt=0, le=1, description="ties: share of entries kept of each core")] = 0.25,
    drop: Annotated[float, Field(ge=0, lt=1, description="dare: share of entries dropped of each core")] = 0.05,
) -> Update:
    """Return U merge(U^T dW_i V) V^T with shared bases U, V of q = `rank` columns, default max r_i (He et al. 2026).

    U and V come from the Tucker-2 decomposition (HOSVD, then HOOI) of the rescaled dW_i: each norm becomes
    beta |dW_i|_F + (1 - beta) mean_j |dW_j|_F. The cores are those of the updates as they are, not rescaled, as in the
    authors' code. ties: see the rule of that name, where an undecided sign gives 0 (the code takes the sign of the
    whole sum); dare: entries drop out at random, the others are divided by 1 - `drop`, and the cores are added;
    dare_ties: first one, then the other. Defaults are those of the authors' command line for TIES (scale 0.75), and the
    start of their search for `drop`. Zero updates take no part. The tasks draw in descending order of |dW_i|_F.
    """
    tasks = sorted(nonzero(updates), key=norm, reverse=True)
    if not tasks:
        return zero_like(updates[0])
    QB, QA, small = in_shared_bases(tasks)
    M = torch.stack([update.dense() for update in small])
    norms = M.norm(dim=(1, 2), keepdim=True)
    U, V = _tucker(M * (beta + (1 - beta) * norms.mean() / norms), rank or max(update.rank for update in updates))
    cores = U.T @ M @ V
    if merge != "ties":
        kept = torch.rand(cores.shape, generator=generator, dtype=torch.float64) >= drop
        cores = cores * kept / (1 - drop)
    one = torch.eye(cores.shape[2], dtype=torch.float64)
    merged = cores.sum(dim=0) if merge == "dare" else ties([Update(core, one) for core in cores], density=density)
    assert isinstance(merged, Tensor)  # as always in full space
    return Update((QB @ (U @ merged)).float(), (QA @ V).T.float())


def _parafac(triples: Sequence[tuple[Tensor, Tensor, Tensor]], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (p, k), V (q, k) and C (T, k), k <= rank: M_i ~ U diag(c_i) V^T by alternating least squares.

    `triples` are the U (p, r), S (r,), Vh (r, q) of every M_i. U and V have columns of norm 1 unless all is zero.
    """
    import tensorly  # here, because it takes long to import and no other rule needs it
    from tensorly.decomposition import parafac

    U, V = _start(triples, rank)
    X = torch.stack([(u * s) @ vh for u, s, vh in triples])
    C, size = torch.zeros(len(X), U.shape[1], dtype=torch.float64), X.norm()
    if not float(size):
        return U, V, C
    with tensorly.backend_context("numpy", local_threadsafe=True):  # whatever the caller works with
        one = torch.ones(U.shape[1], dtype=torch.float64).numpy()
        start = tensorly.cp_tensor.CPTensor((one, [C.numpy(), U.numpy(), V.numpy()]))  # C is solved for first
        found = parafac((X / size).numpy(), U.shape[1], init=start, n_iter_max=_STEPS, tol=_SETTLED, l2_reg=_RIDGE)
    C, U, V = (torch.from_numpy(factor) for factor in found.factors)
    lengths, others = U.norm(dim=0).clamp_min(_TINY), V.norm(dim=0).clamp_min(_TINY)
    return U / lengths, V / others, C * (size * lengths * others)


def _start(triples: Sequence[tuple[Tensor, Tensor, Tensor]], rank: int) -> tuple[Tensor, Tensor]:
    """Return left (p, k) and right (q, k) vectors of the triples that span the most, k <= rank, by pivoted Cholesky."""
    U = torch.cat([u for u, _, _ in triples], dim=1)
    S = torch.cat([s for _, s, _ in triples])
    V = torch.cat([vh for _, _, vh in triples]).T
    gram = S * _gram(U) * _gram(V) * S[:, None]
    left, chosen = gram.diagonal().clone(), [int(gram.diagonal().argmax())]  # left: energy not spanned yet
    rows = torch.zeros(0, len(S), dtype=torch.float64)
    while True:
        best = chosen[-1]
        row = (gram[best] - rows[:, best] @ rows) / left[best].clamp_min(_TINY).sqrt()
        rows, left = torch.cat([rows, row[None]]), left - row.square()
        if len(chosen) == rank or float(left.max()) <= NOISE**2 * float(gram.diagonal().max()):
            return U[:, chosen], V[:, chosen]
        chosen.append(int(left.argmax()))


def _tucker(X: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return U (p, k), V (q, l) with orthonormal columns, k, l <= rank, that keep the most of X (T, p, q): Tucker-2.

    HOSVD, then HOOI (De Lathauwer et al. 2000). Directions that X does not use are left out.
    """
    V, before, total = _leading(X, rank), 1.0, X.square().sum()
    for _ in range(_STEPS):
        U = _leading((X @ V).mT, rank)
        V = _leading(U.T @ X, rank)
        error = float((1 - (U.T @ X @ V).square().sum() / total).clamp_min(0).sqrt())
        if before - error < _SETTLED:
            break
        before = error
    return U, V


def _leading(X: Tensor, rank: int) -> Tensor:
    """Return the top right singular vectors (n, k) of the rows of X (T, rows, n), k <= rank, without zero ones."""
    values, vectors = torch.linalg.eigh((X.mT @ X).sum(dim=0))
    used: Tensor = vectors[:, values > NOISE**2 * values[-1]]
    return used[:, -rank:].flip(1)


def _gram(X: Tensor) -> Tensor:
    return X.T @ X
