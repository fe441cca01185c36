"""The second moment of one layer input: its rows while they are few, then their Gram matrix or a bounded factor."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

_ROUNDING = 1e-9  # of the trace: far above float64's rounding and that of a difference, far below what a forgery needs


@dataclass(frozen=True)
class Moment:
    """The uncentred second moment G = H^T H of rows H (k x n), and their sum.

    Exactly one of three is set: `rows` (k, n) float32, the rows as they were; `gram` (n, n) float64; or `factor` (p, n)
    float32, F with F^T F <= G <= F^T F + lost I, as a bound on memory or on what is shared leaves it. `lost` is 0 where
    nothing was left out. `total` (n,) float64 is the sum of the rows, `count` is k.
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

    def gram_only(self) -> Moment:
        """Return the same moment without its rows: what is shared then are sums, 8 n^2 bytes of them."""
        return replace(self, rows=None, factor=None, gram=self.as_gram())

    def faults(self) -> list[str]:
        """Tell what no rows could have given: for moments that come from someone else.

        A Gram matrix must be symmetric and, less the part of the mean, positive semi-definite within 1e-9 of its trace;
        with rows at hand, they must sum to `total`.
        """
        if self.rows is not None:
            wide = self.as_rows()
            off = (wide.sum(dim=0) - self.total).abs()
            return (
                [] if bool((off <= _ROUNDING * (1 + wide.abs().sum(dim=0))).all()) else ["total is not the rows' sum"]
            )
        gram = self.as_gram()
        slack = _ROUNDING * float(gram.diagonal().abs().sum()) + torch.finfo(torch.float64).tiny
        if float((gram - gram.T).abs().max()) > slack:
            return ["gram is not symmetric"]
        shift = slack * torch.eye(self.width, dtype=torch.float64)
        if torch.linalg.cholesky_ex(gram + shift).info:
            return ["gram is not positive semi-definite"]
        centred = gram - torch.outer(self.total, self.total) / max(self.count, 1)
        return ["total is larger than gram allows"] if torch.linalg.cholesky_ex(centred + shift).info else []

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

    def mean(self) -> Tensor:
        """Return the mean row, (n,) float64."""
        mean: Tensor = self.total / max(self.count, 1)
        return mean

    def __add__(self, other: Moment) -> Moment:
        """Return the moment of both sets of rows together: rows or a factor while they are fewer than n."""
        count, total, lost = self.count + other.count, self.total + other.total, self.lost + other.lost
        if self.thin is None or other.thin is None or len(self.thin) + len(other.thin) >= self.width:
            return Moment(count, total, gram=self.as_gram() + other.as_gram(), lost=lost)
        both = torch.cat([self.thin, other.thin])
        if self.rows is None or other.rows is None:
            return Moment(count, total, factor=both, lost=lost)
        return Moment(count, total, rows=both)

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
