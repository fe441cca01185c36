"""The low-rank toolbox: shared coordinates, sums and truncation, from the factors alone and in float64 inside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraloom.adapters.update import Shape, Update

# Factors are float32, so directions weaker than this share of the strongest one are rounding, not signal.
NOISE = 1e-5
_EXACT = 512  # up to this smaller side a dense matrix is decomposed exactly
_CONVERGED = 1e-6  # relative gain of captured energy at which a Krylov space has converged


@dataclass(frozen=True)
class Core:
    """Updates in shared coordinates: dW_i = QB M_i QA^T.

    QB (m, p) and QA (n, q) have orthonormal columns, `cores` holds the M_i (p, q); all float64.
    """

    QB: Tensor
    QA: Tensor
    cores: tuple[Tensor, ...]


@dataclass(frozen=True)
class Shared:
    """One merged update that also tells what each task reads of it: dW = L (M * g) R, dW_i = L (M * g_i) R.

    left L (m, k), core M (k, k), right R (k, n); `gate` g and the `gates` g_i, one a task in the order of the updates,
    are (k, k) and multiply M entry by entry. All float64. The task must be known at inference to read a dW_i.
    """

    left: Tensor
    core: Tensor
    right: Tensor
    gate: Tensor
    gates: tuple[Tensor, ...]

    def update(self) -> Update:
        """Return the merged dW."""
        return self._read(self.gate)

    def readouts(self) -> tuple[Update, ...]:
        """Return every task's own dW_i."""
        return tuple(self._read(gate) for gate in self.gates)

    def _read(self, gate: Tensor) -> Update:
        return Update((self.left @ (self.core * gate)).float(), self.right.float())


def concatenate(updates: Sequence[Update]) -> Update:
    """Return sum_i dW_i, exactly, as [B_1 ... B_T] [A_1; ...; A_T] of rank sum r_i."""
    return Update(torch.cat([u.B for u in updates], dim=1), torch.cat([u.A for u in updates], dim=0))


def norm(update: Update) -> float:
    """Return |dW|_F from the factors, in float64: exact enough to tell a zero update by it."""
    return math.sqrt(max(0.0, Update(update.B.double(), update.A.double()).energy()))


def nonzero(updates: Sequence[Update]) -> list[Update]:
    """Return the updates that are not zero within the rounding of their own factors."""
    return [u for u in updates if norm(u) > NOISE * float(u.B.norm()) * float(u.A.norm())]


def zero_like(update: Update) -> Update:
    """Return dW = 0 of the same shape, of rank 1."""
    m, n, _ = update.shape
    return Update(update.B.new_zeros(m, 1), update.A.new_zeros(1, n))


def no_update(shape: Shape) -> Update:
    """Return dW = 0 of rank 0: that of an adapter that lacks the layer, which costs nothing."""
    return Update(torch.zeros(shape.m, 0), torch.zeros(0, shape.n))


def in_shared_bases(updates: Sequence[Update]) -> tuple[Tensor, Tensor, tuple[Update, ...]]:
    """Return QB (m, p), QA (n, q) with orthonormal columns and small factors: dW_i = QB (B_i A_i) QA^T, all float64.

    By thin QR of [B_1 ... B_T] and [A_1; ...; A_T]^T, lossless: B_i is (p, r_i), A_i is (r_i, q).
    """
    whole = concatenate(updates)
    QB, SB = torch.linalg.qr(whole.B.double())
    QA, SA = torch.linalg.qr(whole.A.double().T)
    ranks = [u.rank for u in updates]
    pairs = zip(SB.split(ranks, dim=1), SA.split(ranks, dim=1), strict=True)
    return QB, QA, tuple(Update(B, A.T) for B, A in pairs)


def shared_core(updates: Sequence[Update]) -> Core:
    """Return all updates in one pair of bases, losslessly; see `in_shared_bases`.

    The bases depend on the order of the updates and on how each is split into B and A; see `canonical`.
    """
    QB, QA, small = in_shared_bases(updates)
    return Core(QB, QA, tuple(update.dense() for update in small))


def canonical(core: Core) -> Core:
    """Return the same updates in bases that depend on the dW_i alone, up to signs.

    QB becomes the left singular vectors of [dW_1 ... dW_T], QA the right ones of [dW_1; ...; dW_T], without the
    directions that no update uses: so the coordinates know neither the order of the updates nor their factors.
    """
    U, left, _ = torch.linalg.svd(torch.cat(core.cores, dim=1), full_matrices=False)
    _, right, Vh = torch.linalg.svd(torch.cat(core.cores, dim=0), full_matrices=False)
    U, Vh = U[:, signal(left)], Vh[signal(right)]
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


def update_bases(update: Update) -> tuple[Tensor, Tensor]:
    """Return orthonormal bases of dW's row space (n, p) and column space (m, p), float64: what it reads and writes.

    Where A's rows depend on each other B's columns reach more than dW does, and the other way round.
    """
    U, S, Vh = svd_factors(update)
    kept = int((NOISE * S[:1] < S).sum())  # none of an update that is zero
    return Vh[:kept].T, U[:, :kept]


def truncate(update: Update, rank: int) -> tuple[Update, float]:
    """Return the best approximation of a rank (Eckart-Young) and the share of |dW|_F^2 it loses.

    update: B (m, r) and A (r, n), float32.
    rank: of the result, at most; an update of no larger rank comes back as it is.
    """
    if update.rank <= rank:
        return update, 0.0
    B, A = update.B.double(), update.A.double()
    SB, SA = torch.linalg.qr(B, mode="r").R, torch.linalg.qr(A.T, mode="r").R
    U, S, Vh = torch.linalg.svd(SB @ SA.T, full_matrices=False)
    # B SA^T Vh^T = QB U S and U^T SB A = S Vh QA^T: the top triples without the bases QB and QA
    top = S[:rank]
    inverse = torch.where(signal(top) & (top > 0), top.rsqrt(), 0.0)
    left, right = B @ (SA.T @ Vh[:rank].T * inverse), (inverse[:, None] * U[:, :rank].T @ SB) @ A
    return Update(left.float(), right.float()), _share(S.square(), rank)


def truncate_dense(dW: Tensor, rank: int) -> tuple[Update, float]:
    """Return the best approximation of a rank of a dense update, and the share of |dW|_F^2 it loses.

    dW: (m, n), float32.
    rank: of the result, at most.

    Small matrices, and ranks close to the smaller side: by the eigenvectors of the smaller Gram matrix in float64,
    accurate beyond the float32 of the result. Others: by a block Krylov subspace (Musco and Musco 2015, arXiv
    1504.05477) from a fixed random start, grown until the energy it captures has converged; the loss is that of the
    approximation returned.
    """
    if dW.shape[0] > dW.shape[1]:
        turned, lost = truncate_dense(dW.T, rank)
        return Update(turned.A.T.contiguous(), turned.B.T.contiguous()), lost
    rows = dW.shape[0]
    U = _leading(dW, rank) if rows > _EXACT and 4 * rank <= rows else None
    if U is None:
        dW = dW.double()
        U = torch.linalg.eigh(dW @ dW.T).eigenvectors.flip(1)[:, :rank]
    A = U.to(dW.dtype).T @ dW
    total = sum(_energy(dW[start : start + _EXACT]) for start in range(0, rows, _EXACT))
    return Update(U.float().contiguous(), A.float()), max(0.0, 1 - _energy(A) / total) if total > 0 else 0.0


def _leading(dW: Tensor, rank: int) -> Tensor | None:
    """Return the left singular vectors (m, rank), float64, of the largest singular values of a wide dW (m, n).

    They span the best subspace of a Krylov space that grows by (rank + 1) / 2 directions a step until the captured
    energy gains less than _CONVERGED. None where the space would exceed half of all directions: then it saves nothing.
    """
    block = max(16, (rank + 1) // 2)
    start = torch.randn(dW.shape[1], block, generator=torch.Generator().manual_seed(0)).to(dW.dtype)
    Z, Q, C = dW @ start, dW[:, :0], dW[:0]
    before = 0.0
    while Q.shape[1] + block <= dW.shape[0] // 2:
        for _ in range(3):  # a block without full rank needs the third
            Z = torch.linalg.qr(Z - Q @ (Q.T @ Z)).Q
        Q, C = torch.cat([Q, Z], dim=1), torch.cat([C, Z.T @ dW])
        wide = C.double()
        values, vectors = torch.linalg.eigh(wide @ wide.T)
        captured = float(values[-rank:].sum())
        if Q.shape[1] >= rank and captured - before <= _CONVERGED * captured:
            best: Tensor = torch.linalg.qr(Q.double() @ vectors.flip(1)[:, :rank]).Q
            return best
        before = captured
        Z = dW @ C[-block:].T
    return None


def polar(X: Tensor) -> Tensor:
    """Return the partial isometry of the polar decomposition of X (m, k), float64: P Q^T of X = P diag(s) Q^T, s > 0.

    By X (X^T X)^(-1/2): a direction is orthonormal to within 1e-16 (s_1 / s)^2, so to 1e-6 at worst.
    Where X lacks full rank the missing directions stay missing: filling them up would be arbitrary.
    """
    energies, Q = torch.linalg.eigh(X.T @ X)  # s^2: the square of NOISE is still far above float64's rounding
    kept = energies >= NOISE**2 * energies[-1]
    isometry: Tensor = X @ (Q[:, kept] * energies[kept].rsqrt() @ Q[:, kept].T)
    return isometry


def signal(singular: Tensor) -> Tensor:
    """Tell which singular values stand above the rounding of float32 factors; of nothing but zeros, all."""
    return singular >= NOISE * singular.max()


def _energy(X: Tensor) -> float:
    return float(X.double().square().sum())


def _share(energies: Tensor, rank: int) -> float:
    total = float(energies.sum())
    return float(energies[rank:].sum()) / total if total > 0 else 0.0
