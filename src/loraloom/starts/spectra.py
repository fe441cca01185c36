"""Eigenvalues and directions of second moments, and of all tasks but one: the smallest problem that gives them.

While the rows H (N, n) of all tasks are fewer than n, everything is read off K = H H^T (N, N), and one factorisation of
it serves all tasks: with D = K^-1 H, D H^T = I, so the rows D_i of task i span what its inputs have off all other
tasks'. Above that, Lanczos finds the top eigenvectors of an n x n Gram matrix, and a Cholesky factorisation proves that
none was missed (Sylvester's law of inertia); the quietest come from LAPACK's dsyevr by index. Small, singular and flat
spectra go to `torch.linalg.eigh`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.linalg import eigh
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch import Tensor

from loraloom.statistics.moments import Moment, pooled

PARTIAL = 512  # width from which a partial solver beats `eigh`
_FEW = 8  # a partial solver is asked for at most an eighth of all eigenvectors
_USUAL = 48  # half the energy of what layers read lies in 20 to 47 directions (MiniLM)
_WELL = 1e10  # condition of K up to which directions from K^-1 see less than 1e-21 of the others' energy
_EPS = torch.finfo(torch.float64).eps


def spectrum(moment: Moment) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (p,) descending and eigenvectors (n, p) of H^T H, float64.

    Of rows fewer than n those above rounding, from an eigenproblem of their number; of a Gram matrix all n.
    """
    if moment.thin is None:
        return _descending(moment.as_gram())
    rows = moment.as_rows()
    values, vectors = _above_rounding(rows @ rows.T)
    return values, _columns(rows, vectors / values.sqrt())


def top_directions(moment: Moment, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues of a second moment, descending, and their eigenvectors (n, count), float64.

    moment: of the rows that a layer reads.
    count: of eigenvalues; all come back where fewer are.
    """
    found = _top(moment.as_gram(), count) if moment.thin is None else None
    if found is None or not found.complete():
        values, vectors = spectrum(moment)
        return values[:count], vectors[:, :count]
    return found.values, found.vectors


def rounding(values: Tensor) -> float:
    """Return how well the eigenvalues (descending) of a Gram matrix are known: some eps times the largest."""
    return _floor(float(values[0]), len(values)) if len(values) else 0.0


def share_seen(moment: Moment, basis: Tensor) -> float:
    """Return the share of a moment's energy that a subspace sees.

    moment: of the rows that a layer reads.
    basis: (r, n), orthonormal rows.
    """
    trace = moment.trace()
    return moment.energy(basis) / trace if trace > 0 else 0.0


def orthonormal(rows: Tensor) -> Tensor:
    """Return rows (r, n) that are orthonormal and span the same space, by QR."""
    Q: Tensor = torch.linalg.qr(rows.T).Q
    return Q.T


class Pool:
    """The moments of one layer input, one for each task, and what is factored of them once for all tasks."""

    def __init__(self, moments: Sequence[Moment]) -> None:
        self.moments = moments
        self.stack = _Stack.of(moments)

    def without(self, index: int) -> Others:
        """Return what the tasks other than `index` hold together."""
        others = [moment for i, moment in enumerate(self.moments) if i != index]
        if self.stack is None:
            return Others(others, self.moments[index], _Stack.of(others), None)
        return Others(others, self.moments[index], self.stack, index)


class Others:
    """The moments of the other tasks of one layer input, together; `own` is that of the task itself, if known.

    `stack` holds the rows of the others and, where `index` is given, the task's own as those of that index.
    """

    def __init__(
        self, moments: Sequence[Moment], own: Moment | None, stack: _Stack | None, index: int | None = None
    ) -> None:
        self.moments, self.own, self._stack, self._index = moments, own, stack, index
        self._louds: dict[float, Tensor] = {}
        self._quiets: dict[int, Quiet | None] = {}

    @classmethod
    def of(cls, moments: Sequence[Moment], own: Moment | None) -> Others:
        """Return the others of one task alone."""
        if own is not None:
            return Pool([*moments, own]).without(len(moments))
        return cls(moments, own, _Stack.of(moments))

    @property
    def width(self) -> int:
        """Return n."""
        return self.moments[0].width

    @property
    def count(self) -> int:
        """Return the number of rows seen."""
        return sum(moment.count for moment in self.moments)

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Return `spectrum` of the pooled moment."""
        if self._stack is None:
            return spectrum(self._pooled)
        values, vectors = _above_rounding(self._block)
        return values, self._columns(vectors / values.sqrt())

    def loud(self, share: float) -> Tensor:
        """Return (n, p): the fewest top eigenvectors of sum_i G_i / tr(G_i) that hold `share` of its energy."""
        if share not in self._louds:
            self._louds[share] = self._find_loud(share)
        return self._louds[share]

    def quiet(self, count: int) -> Quiet | None:
        """Return the `count` quietest directions of a Gram matrix of full rank; None where only `spectrum` tells."""
        if count not in self._quiets:
            self._quiets[count] = None if self._stack is not None else _quiet(self._pooled.as_gram(), count)
        return self._quiets[count]

    def dual(self, count: int) -> Tensor | None:
        """Return (count, n), orthonormal: the directions of most own energy among those the others leave untouched.

        With M = (K^-1)_ii = D_i D_i^T, the own energies off all others are the eigenvalues of M^-1. None where that
        is not exact: rows (nearly) dependent, too few own ones, or too many of the others.
        """
        stack = self._stack
        if stack is None or self._index is None or stack.inverse is None:
            return None
        own = ~self._rows
        if int(own.sum()) < count or int(self._rows.sum()) > self.width - count:
            return None
        inverse = stack.inverse[own]
        values, vectors = torch.linalg.eigh(inverse[:, own])
        if float(values[count - 1]) * float(stack.gram.diagonal()[own].sum()) * 1e-12 >= 1:
            return None
        return orthonormal((vectors[:, :count] / values[:count].sqrt()).T @ inverse @ stack.rows)

    def ends(self, rank: int) -> tuple[int, float]:
        """Return the numerical rank, and (l_(n-r) - l_(n-r+1)) / l_1: how far the r quietest lie below the rest.

        By the cheapest of three ways, which the moments choose and nothing that was asked before: few rows, independent
        of each other, are as many as the rank; of a Gram matrix of full rank the quiet end tells all; else all
        eigenvalues do.
        """
        n = self.width
        if self._stack is not None and self._stack.inverse is not None:
            count = int(self._rows.sum())
            if count < n - rank:
                return count, 0.0
        quiet = self.quiet(rank + 1)
        if quiet is not None:
            return n, float(quiet.values[rank] - quiet.values[rank - 1]) / quiet.largest
        values = self._values
        padded = torch.cat([values, values.new_zeros(n - len(values))])
        gap = float(padded[n - rank - 1] - padded[n - rank]) / float(padded[0]) if rank < n and padded[0] > 0 else 0.0
        return int((values > rounding(values)).sum()), max(gap, 0.0)

    def share_seen(self, basis: Tensor) -> float:
        """Return the share of the others' energy that orthonormal rows `basis` (r, n) see."""
        if self._stack is None:
            return share_seen(self._pooled, basis)
        trace = float(self._stack.gram.diagonal()[self._rows].sum())
        energy = float((basis @ self._stack.rows.T)[:, self._rows].square().sum())
        return energy / trace if trace > 0 else 0.0

    @cached_property
    def _pooled(self) -> Moment:
        return pooled(self.moments)

    @cached_property
    def _rows(self) -> Tensor:
        """Which rows of the stack are the others' (N,)."""
        assert self._stack is not None
        others: Tensor = self._stack.owner != (-1 if self._index is None else self._index)
        return others

    @cached_property
    def _block(self) -> Tensor:
        assert self._stack is not None
        block: Tensor = self._stack.gram[self._rows][:, self._rows]
        return block

    @cached_property
    def _values(self) -> Tensor:
        """All eigenvalues of the pooled moment that may not be 0, descending: a third of the work of `spectrum`."""
        values: Tensor = torch.linalg.eigvalsh(self._pooled.as_gram() if self._stack is None else self._block)
        return values.flip(0).clamp_min(0)

    def _find_loud(self, share: float) -> Tensor:
        if self._stack is None:
            gram = torch.zeros(self.width, self.width, dtype=torch.float64)
            for moment in self.moments:
                gram += moment.as_gram() / (moment.trace() or 1)
            return _loud(gram, share)[1]
        energies, owner = self._stack.gram.diagonal(), self._stack.owner
        traces = energies.new_zeros(len(self.moments) + 1).index_add_(0, owner, energies)
        weight = torch.where(traces > 0, traces, 1).rsqrt()[owner][self._rows, None]
        values, vectors = _loud(weight * self._block * weight.T, share)
        return self._columns(weight * vectors / values.sqrt())

    def _columns(self, coefficients: Tensor) -> Tensor:
        """Return H^T coefficients (n, p) for the others' H (N, n), made orthonormal."""
        assert self._stack is not None
        every = coefficients.new_zeros(len(self._stack.rows), coefficients.shape[1])
        every[self._rows] = coefficients
        return _columns(self._stack.rows, every)


@dataclass(frozen=True)
class Quiet:
    """The smallest eigenvalues, ascending (p,), their vectors (n, p), and the largest eigenvalue of a Gram matrix."""

    values: Tensor
    vectors: Tensor
    largest: float

    @property
    def floor(self) -> float:
        """Return how well the eigenvalues are known."""
        return _floor(self.largest, len(self.vectors))


@dataclass(frozen=True)
class _Stack:
    """All tasks' rows (N, n) float64 with N < n, K = rows rows^T (N, N), and the index of the task of each row (N,)."""

    rows: Tensor
    gram: Tensor
    owner: Tensor

    @classmethod
    def of(cls, moments: Sequence[Moment]) -> _Stack | None:
        """Return the stack, None where there is a Gram matrix or the rows are n or more."""
        thin = [moment.thin for moment in moments]
        known = [rows for rows in thin if rows is not None]
        if len(known) < len(thin) or sum(len(rows) for rows in known) >= moments[0].width:
            return None
        rows = torch.cat([moment.as_rows() for moment in moments])
        owner = torch.cat([torch.full((len(h),), index) for index, h in enumerate(known)])
        return cls(rows, rows @ rows.T, owner)

    @cached_property
    def inverse(self) -> Tensor | None:
        """Return K^-1, None where rows are dependent or nearly so."""
        factor, info = torch.linalg.cholesky_ex(self.gram)
        if info:
            return None
        inverse = torch.cholesky_inverse(factor)
        condition = float(self.gram.trace() * torch.linalg.matrix_norm(inverse))
        return inverse if condition < _WELL else None


@dataclass(frozen=True)
class _Top:
    """Large eigenvalues of a Gram matrix, descending, and their vectors (n, p), as Lanczos found them."""

    gram: Tensor
    values: Tensor
    vectors: Tensor

    def complete(self) -> bool:
        """Tell whether no eigenvalue above the smallest found was missed: the rest must lie below it."""
        rest = (self.vectors * self.values) @ self.vectors.T - self.gram
        rest.diagonal().add_(float(self.values[-1]) + _floor(float(self.values[0]), len(self.gram)))
        return not torch.linalg.cholesky_ex(rest).info


def _descending(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return all eigenvalues of a Gram matrix, descending, none below 0, and their vectors."""
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _above_rounding(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of rows rows^T that are not rounding, descending, and their vectors."""
    values, vectors = _descending(gram)
    kept = values > rounding(values)
    return values[kept], vectors[:, kept]


def _columns(rows: Tensor, coefficients: Tensor) -> Tensor:
    """Return rows^T coefficients (n, p), made orthonormal: small eigenvalues leave it so to half the digits only."""
    Q: Tensor = torch.linalg.qr((coefficients.T @ rows).T).Q
    return Q


def _loud(gram: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return the fewest largest eigenvalues, descending, that hold `share` of the trace, and their vectors (n, p)."""
    wanted = share * float(gram.trace())
    if wanted == 0:
        return gram.new_zeros(0), gram[:, :0]
    count = min(_USUAL, len(gram) // _FEW)
    while (found := _top(gram, count)) is not None:
        held = torch.cumsum(found.values, 0)
        if held[-1] >= wanted:
            if not found.complete():
                break
            count = int((held < wanted).sum()) + 1
            return found.values[:count], found.vectors[:, :count]
        # no later eigenvalue is larger than the last one found
        least = (wanted - float(held[-1])) / max(float(found.values[-1]), 1e-300)
        count = max(3 * count, count + int(min(least, len(gram))) + 1)
    values, vectors = _descending(gram)
    count = int((torch.cumsum(values, 0) < share * values.sum()).sum()) + 1
    return values[:count], vectors[:, :count]


def _top(gram: Tensor, count: int) -> _Top | None:
    """Return the `count` largest eigenvalues and their vectors, None where `eigh` is the better way."""
    if len(gram) < PARTIAL or count > len(gram) // _FEW:
        return None
    found = _lanczos(gram, count)
    return None if found is None else _Top(gram, *found)


def _quiet(gram: Tensor, count: int) -> Quiet | None:
    """Return the `count` smallest eigenvalues of a Gram matrix whose eigenvalues all lie above rounding, else None."""
    n = len(gram)
    loudest = _top(gram, 1) if count <= n // _FEW else None
    if loudest is None:
        return None
    largest = float(loudest.values[0])
    shifted = gram.clone()
    shifted.diagonal().sub_(_floor(largest, n))
    if torch.linalg.cholesky_ex(shifted).info:
        return None
    values, vectors = eigh(shifted.copy_(gram).numpy(), subset_by_index=(0, count - 1), driver="evr", overwrite_a=True)
    return Quiet(torch.from_numpy(values), torch.from_numpy(vectors), largest)


def _lanczos(gram: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """Return the `count` largest eigenvalues, descending, and vectors of a Gram matrix; None if unconverged."""
    n = len(gram)
    start = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()

    def product(x: np.ndarray) -> np.ndarray:
        return (gram @ torch.from_numpy(np.ascontiguousarray(x).reshape(n))).numpy()

    operator = LinearOperator((n, n), matvec=product, dtype=np.float64)
    try:
        values, vectors = eigsh(operator, k=count, which="LA", v0=start, ncv=min(n, max(2 * count + 1, 32)))
    except ArpackError:
        return None
    order = np.argsort(-values)
    return torch.from_numpy(values[order].copy()), torch.from_numpy(vectors[:, order].copy())


def _floor(largest: float, n: int) -> float:
    return largest * n * 10 * _EPS
