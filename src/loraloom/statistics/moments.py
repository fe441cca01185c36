"""The second moment of one layer input: its rows while they are few, then their Gram matrix or a bounded factor."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from loraloom.statistics.sketch import FrequentDirections, principal

_SUMMED = 1e-9  # of a sum of sizes: far above float64's rounding
_ROUNDED = 1e-5  # of the trace: far above float32's rounding in each step of a sketch, far below what a forgery needs


@dataclass(frozen=True)
class Moment:
    """The uncentred second moment G = H^T H of rows H (k, n), and their sum. One of `rows`, `gram` and `factor` is set.

    count: k.
    total: (n,) float64, the sum of the rows.
    rows: (k, n) float32, H itself.
    gram: (n, n) float64, G itself.
    factor: (p, n) float32, F with F^T F <= G <= F^T F + lost I but for float32's rounding, as a bound on memory or on
        what is shared leaves it.
    lost: 0 where nothing was left out.

    Raises ValueError where none or several are set.
    """

    count: int
    total: Tensor
    rows: Tensor | None = None
    gram: Tensor | None = None
    factor: Tensor | None = None
    lost: float = 0.0

    def __post_init__(self) -> None:
        if sum(part is not None for part in (self.rows, self.gram, self.factor)) != 1:
            raise ValueError("a Moment holds one of rows, a Gram matrix and a factor")

    @classmethod
    def of_rows(cls, rows: Tensor) -> Moment:
        """Return the moment of `rows` (k, n) of any float dtype."""
        rows = rows.detach().to("cpu", torch.float32)
        total = rows.sum(dim=0, dtype=torch.float64)
        if rows.shape[0] < rows.shape[1]:
            return cls(rows.shape[0], total, rows=rows)
        wide = rows.double()
        return cls(rows.shape[0], total, gram=wide.T @ wide)

    @property
    def width(self) -> int:
        """Return n, the number of input features."""
        return self.total.shape[0]

    @property
    def thin(self) -> Tensor | None:
        """Return the rows or the factor, (p, n) float32, None where there is a Gram matrix."""
        return self.factor if self.rows is None else self.rows

    def as_gram(self) -> Tensor:
        """Return H^T H, (n, n) float64."""
        if self.gram is not None:
            return self.gram
        wide = self.as_rows()
        return wide.T @ wide

    def turned(self) -> Moment:
        """Return the same moment without its rows: S V^T in place of U S V^T, which says what the Gram matrix says."""
        if self.rows is None:
            return self
        values, factor = principal(self.rows)
        there = values > values[:1] * len(values) * torch.finfo(torch.float64).eps  # the others are rounding
        return replace(self, rows=None, factor=factor[there].float())

    def limit_rank(self, most: int) -> Moment:
        """Return the best factor of at most `most` rows; `lost` grows by the first eigenvalue left out.

        Rows and factors that are no longer, and a Gram matrix that is no wider, stay as they are.
        """
        if (self.width if self.thin is None else len(self.thin)) <= most:
            return self
        if self.thin is None:
            values, vectors = torch.linalg.eigh(self.as_gram())
            values = values.flip(0).clamp_min(0)
            factor = values[:most].sqrt()[:, None] * vectors.flip(1)[:, :most].T
        else:
            values, factor = principal(self.thin, most)
        return replace(self, rows=None, gram=None, factor=factor.float(), lost=self.lost + float(values[most]))

    def largest(self) -> float:
        """Return the largest eigenvalue of what is held of H^T H."""
        square = self.as_gram() if self.thin is None else self.as_rows() @ self.as_rows().T
        return float(torch.linalg.eigvalsh(square)[-1]) if len(square) else 0.0

    def faults(self) -> list[str]:
        """Tell what no rows could have given: for moments that come from someone else.

        Rows must sum to `total`. A Gram matrix must be symmetric and, with `lost` added and the part of the mean taken
        off, positive semi-definite within 1e-5 of its trace, for it may be a sum of factors. So must that of a factor.
        """
        if self.rows is not None:
            wide = self.as_rows()
            off = (wide.sum(dim=0) - self.total).abs()
            possible = bool((off <= _SUMMED * (1 + wide.abs().sum(dim=0))).all())
            return [] if possible else ["total is not the rows' sum"]
        if self.factor is not None:
            possible = self._reach_of_total() <= self.count * (1 + _ROUNDED)
            return [] if possible else ["total is larger than factor allows"]
        gram = self.as_gram()
        size = float(gram.diagonal().abs().sum()) + torch.finfo(torch.float64).tiny
        if float((gram - gram.T).abs_().max()) > _SUMMED * size:
            return ["gram is not symmetric"]
        centred = gram.addr(self.total, self.total, alpha=-1 / max(self.count, 1))
        centred.diagonal().add_(_ROUNDED * size + self.lost)
        if not torch.linalg.cholesky_ex(centred).info:  # so without the mean's part taken off, too
            return []
        shifted = gram.clone()
        shifted.diagonal().add_(_ROUNDED * size + self.lost)
        possible = not torch.linalg.cholesky_ex(shifted).info
        return ["total is larger than gram allows" if possible else "gram is not positive semi-definite"]

    def _reach_of_total(self) -> float:
        """Return t^T (F^T F + m I)^-1 t for the total t, m = lost + 1e-5 tr: at most k where rows gave both.

        By Woodbury, with a p x p matrix.
        """
        factor = self.as_rows()
        inner = factor @ factor.T
        m = self.lost + _ROUNDED * float(inner.trace()) + torch.finfo(torch.float64).tiny
        inner.diagonal().add_(m)
        along = (factor @ self.total)[:, None]
        inside = float((along * torch.cholesky_solve(along, torch.linalg.cholesky(inner))).sum())
        return (float(self.total.square().sum()) - inside) / m

    def as_rows(self) -> Tensor:
        """Return a float64 factor F (p, n) with F^T F = H^T H: the rows, or a root of the Gram matrix."""
        if self.thin is not None:
            return self.thin.double()
        values, vectors = torch.linalg.eigh(self.as_gram())
        root: Tensor = values.clamp_min(0).sqrt()[:, None] * vectors.T
        return root

    def trace(self) -> float:
        """Return tr(H^T H), the energy of all rows."""
        if self.gram is not None:
            return float(self.gram.diagonal().sum())
        return float(self.as_rows().square().sum())

    def energy(self, A: Tensor) -> float:
        """Return |A H^T|_F^2 = tr(A G A^T) for A (r, n): the energy of the rows that A sees."""
        A = A.detach().to("cpu", torch.float64)
        if self.gram is not None:
            return float(((A @ self.gram) * A).sum())
        return float((self.as_rows() @ A.T).square().sum())

    def seen_by(self, A: Tensor) -> Tensor:
        """Return A H^T H A^T, (r, r) float64, for A (r, n) float64."""
        if self.thin is None:
            return A @ self.as_gram() @ A.T
        through = self.as_rows() @ A.T
        return through.T @ through

    def mean(self) -> Tensor:
        """Return the mean row, (n,) float64."""
        mean: Tensor = self.total / max(self.count, 1)
        return mean

    def __add__(self, other: Moment) -> Moment:
        """Return the moment of both sets of rows together: rows or a factor while they are fewer than n."""
        count, total, lost = self.count + other.count, self.total + other.total, self.lost + other.lost
        if self.thin is None or other.thin is None or len(self.thin) + len(other.thin) >= self.width:
            return Moment(count, total, gram=self.as_gram() + other.as_gram(), lost=lost)
        if self.rows is not None and other.rows is not None:
            return Moment(count, total, rows=torch.cat([self.rows, other.rows]))
        factors = [moment.turned().factor for moment in (self, other)]  # a factor never holds a row as it was
        return Moment(count, total, factor=torch.cat([factor for factor in factors if factor is not None]), lost=lost)

    def __sub__(self, other: Moment) -> Moment:
        """Return the moment of the rows of `self` that are not in `other`, which must be a part of `self`.

        `lost` bounds the error on either side then, for both may have left something out.
        """
        if other.count > self.count:
            raise ValueError(f"cannot take {other.count} rows away from {self.count}")
        return Moment(
            self.count - other.count,
            self.total - other.total,
            gram=self.as_gram() - other.as_gram(),
            lost=max(self.lost, other.lost),
        )


def pooled(moments: Sequence[Moment]) -> Moment:
    """Return the moment of the rows of all `moments`, one at least."""
    return reduce(operator.add, moments)


def sketched(moments: Sequence[Moment], most: int) -> Moment:
    """Return the moment of the rows of all `moments`, one at least, none of them a Gram matrix, within `most` rows.

    Frequent directions of frequent directions keep the bound of one pass over all rows; see `FrequentDirections`.
    """
    thin = [moment.thin for moment in moments if moment.thin is not None]
    if len(thin) < len(moments):
        raise ValueError("a Gram matrix has no rows to go into a sketch")
    if sum(map(len, thin)) <= most:
        return pooled(moments)
    sketch = FrequentDirections(moments[0].width, most)
    for rows in thin:
        sketch.add(rows)
    factor, _ = sketch.result()
    total = torch.stack([moment.total for moment in moments]).sum(dim=0)
    lost = float(sketch.lost) + sum(moment.lost for moment in moments)
    return Moment(sum(moment.count for moment in moments), total, factor=factor, lost=lost)
