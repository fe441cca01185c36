"""The low-rank toolbox: shared coordinates, sums and truncation, from the factors alone and in float64 inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraloom.adapter import Update

# Factors are float32, so directions weaker than this share of the strongest one are rounding, not signal.
NOISE = 1e-5


@dataclass(frozen=True)
class Core:
    """Updates in shared coordinates: dW_i = QB M_i QA^T.

    QB (m, p) and QA (n, q) have orthonormal columns, `cores` holds the M_i (p, q); all float64.
    """

    QB: Tensor
    QA: Tensor
    cores: tuple[Tensor, ...]


def concatenate(updates: Sequence[Update]) -> Update:
    """Return sum_i dW_i, exactly, as [B_1 ... B_T] [A_1; ...; A_T] of rank sum r_i."""
    return Update(torch.cat([u.B for u in updates], dim=1), torch.cat([u.A for u in updates], dim=0))


def shared_core(updates: Sequence[Update]) -> Core:
    """Return all updates in one pair of bases, losslessly, by thin QR of [B_1 ... B_T] and [A_1; ...; A_T]^T.

    The bases depend on the order of the updates and on how each is split into B and A; see `canonical`.
    """
    whole = concatenate(updates)
    QB, SB = torch.linalg.qr(whole.B.double())
    QA, SA = torch.linalg.qr(whole.A.double().T)
    ranks = [u.rank for u in updates]
    cores = tuple(left @ right.T for left, right in zip(SB.split(ranks, dim=1), SA.split(ranks, dim=1), strict=True))
    return Core(QB, QA, cores)


def canonical(core: Core) -> Core:
    """Return the same updates in bases that depend on the dW_i alone, up to signs.

    QB becomes the left singular vectors of [dW_1 ... dW_T], QA the right ones of [dW_1; ...; dW_T], without the
    directions that no update uses: so the coordinates know neither the order of the updates nor their factors.
    """
    U, left, _ = torch.linalg.svd(torch.cat(core.cores, dim=1), full_matrices=False)
    _, right, Vh = torch.linalg.svd(torch.cat(core.cores, dim=0), full_matrices=False)
    U, Vh = U[:, _signal(left)], Vh[_signal(right)]
    return Core(core.QB @ U, core.QA @ Vh.T, tuple(U.T @ M @ Vh.T for M in core.cores))


def from_core(core: Core, M: Tensor) -> Update:
    """Return QB M QA^T as an Update for M (p, q)."""
    return Update((core.QB @ M).float(), core.QA.T.float().contiguous())


def svd_factors(update: Update) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (m, k), S (k,), Vh (k, n), float64, of B A = U diag(S) Vh: two thin QR and an SVD of size k <= r."""
    QB, SB = torch.linalg.qr(update.B.double())
    QA, SA = torch.linalg.qr(update.A.double().T)
    U, S, Vh = torch.linalg.svd(SB @ SA.T, full_matrices=False)
    return QB @ U, S, Vh @ QA.T


def truncate(update: Update, rank: int) -> tuple[Update, float]:
    """Return the best rank-`rank` approximation (Eckart-Young) and the share of |dW|_F^2 it loses.

    An update of no larger rank comes back as it is.
    """
    if update.rank <= rank:
        return update, 0.0
    U, S, Vh = svd_factors(update)
    root = S[:rank].sqrt()
    return Update((U[:, :rank] * root).float(), (root[:, None] * Vh[:rank]).float()), _share(S.square(), rank)


def truncate_dense(dW: Tensor, rank: int) -> tuple[Update, float]:
    """Return the best rank-`rank` approximation of a dense (m, n) `dW` and the share of |dW|_F^2 it loses.

    By the eigenvectors of the smaller Gram matrix in float64, which is far cheaper than an SVD of dW and accurate
    beyond the float32 of the result.
    """
    if dW.shape[0] > dW.shape[1]:
        turned, lost = truncate_dense(dW.T, rank)
        return Update(turned.A.T.contiguous(), turned.B.T.contiguous()), lost
    wide = dW.double()
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    U = vectors.flip(1)[:, :rank]
    return Update(U.float().contiguous(), (U.T @ wide).float()), _share(values.flip(0).clamp_min(0), rank)


def polar(X: Tensor) -> Tensor:
    """Return the partial isometry of the polar decomposition of X (m, k): P Q^T from X = P diag(s) Q^T, s > 0.

    Where X lacks full rank the missing directions stay missing: filling them up would be arbitrary.
    """
    P, s, Qh = torch.linalg.svd(X, full_matrices=False)
    kept = _signal(s)
    isometry: Tensor = P[:, kept] @ Qh[kept]
    return isometry


def _signal(singular: Tensor) -> Tensor:
    return singular >= NOISE * singular.max()  # ">=": of nothing but zeros all are kept


def _share(energies: Tensor, rank: int) -> float:
    total = float(energies.sum())
    return float(energies[rank:].sum()) / total if total > 0 else 0.0
