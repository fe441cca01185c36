"""One machinery for all entrywise rules: the entries of every update in full, core or KnOTS space, in blocks of rows.

full: dW_i itself (m, n); the merged matrix is dense. core: the M_i of dW_i = QB M_i QA^T (Core Space Merging,
Panariello et al. 2025, arXiv 2509.17786). knots: S V_i^T of [dW_1 ... dW_T] = U S [V_1^T ... V_T^T] (KnOTS, Stoica et
al. 2024, arXiv 2410.19735), which is U^T dW_i and so comes from the factors alone; multiplied back by U.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from loraloom.adapters.lowrank import canonical, from_core, norm, shared_core, zero_like
from loraloom.adapters.update import Update

SPACES: tuple[Literal["full", "core", "knots"], ...] = ("full", "core", "knots")
SpaceOption = Annotated[Literal["full", "core", "knots"], Field(description="where entries are compared")]

_BLOCK = 1 << 22  # entries of one row block over all tasks: 16 MB in float32
_SMALL = 1 << 20  # entries of a layer up to which full space affords float64
_TIES = {torch.float64: 1e-9, torch.float32: 1e-6}


@dataclass(frozen=True)
class Entries:
    """The entries of T updates in one space: X_i = left_i right_i, (rows, columns), never all whole at once.

    Updates that are zero are left out: they tell nothing. The others are sorted by falling energy |dW_i|_F^2, so that
    nothing hangs on the order in which they were given; `order` tells which was given where. Blocks depend on the
    shapes alone.
    """

    left: tuple[Tensor, ...]
    right: tuple[Tensor, ...]
    back: Callable[[Tensor], Update | Tensor]
    order: tuple[int, ...]

    @property
    def tie(self) -> float:
        """Return the share below which entries are equal: rounding must not decide a sign or a threshold."""
        return _TIES[self.left[0].dtype]

    @property
    def shape(self) -> tuple[int, int]:
        """Return (rows, columns) of every X_i."""
        return self.left[0].shape[0], self.right[0].shape[1]

    @property
    def size(self) -> int:
        """Return the number of entries of one X_i."""
        rows, columns = self.shape
        return rows * columns

    def blocks(self) -> Iterator[slice]:
        """Yield slices of rows, from the top."""
        rows, columns = self.shape
        step = max(1, _BLOCK // (len(self.left) * columns))
        return (slice(start, min(start + step, rows)) for start in range(0, rows, step))

    def block(self, rows: slice) -> Tensor:
        """Return the `rows` of all X_i, (T, rows, columns)."""
        return torch.stack([B[rows] @ A for B, A in zip(self.left, self.right, strict=True)])

    def task(self, i: int) -> Tensor:
        """Return the whole X_i, (rows, columns), computed block by block as `block` does."""
        return torch.cat([self.left[i][rows] @ self.right[i] for rows in self.blocks()])

    def dense(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Return `function` of every block (T, rows, columns), as one matrix (rows, columns)."""
        whole = self.left[0].new_empty(self.shape)
        for rows in self.blocks():
            whole[rows] = function(self.block(rows))
        return whole

    def merge(self, function: Callable[[Tensor], Tensor]) -> Update | Tensor:
        """Return the merged update, given what `function` makes of a block (T, rows, columns): (rows, columns)."""
        return self.back(self.dense(function))

    def largest(self, *counts: int) -> Tensor:
        """Return the magnitude of the last of so many largest entries of each X_i, (counts, T)."""
        found = [kth_largest(self.task(i).abs_(), *counts) for i in range(len(self.left))]
        return torch.tensor(found, dtype=self.left[0].dtype).T


def entries(updates: Sequence[Update], space: str) -> Entries:
    """Return the entries of `updates` in `space`; float64, but for large layers in full space: float32."""
    norms = [norm(update) for update in updates]
    order = tuple(sorted(range(len(updates)), key=lambda i: -norms[i]))
    order = tuple(i for i in order if norms[i] > 0)
    used = [updates[i] for i in order] or [zero_like(updates[0])]
    order = order or (0,)
    if space == "full":
        small = used[0].B.shape[0] * used[0].A.shape[1] <= _SMALL
        dtype = torch.float64 if small else torch.float32
        return Entries(tuple(u.B.to(dtype) for u in used), tuple(u.A.to(dtype) for u in used), lambda X: X, order)
    core = canonical(shared_core(used))
    right = core.QA.T
    if space == "knots":
        return Entries(core.cores, (right,) * len(used), lambda X: Update(core.QB.float(), X.float()), order)
    one = torch.eye(right.shape[0], dtype=right.dtype)
    return Entries(core.cores, (one,) * len(used), lambda M: from_core(core, M), order)


def generators(generator: torch.Generator, tasks: int) -> list[torch.Generator]:
    """Return a generator for each of the tasks of an `Entries`; one task more leaves those before it as they are."""
    seeds = [int(torch.randint(2**62, (), generator=generator)) for _ in range(tasks)]
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def count(share: float, size: int) -> int:
    """Return how many of `size` entries a `share` is: at least one."""
    return max(1, round(share * size))


def kth_largest(values: Tensor, *counts: int) -> list[float]:
    """Return the k-th largest of `values` for each k of `counts`, from 1. It sorts `values` in part, in place."""
    array = values.flatten().numpy()  # numpy selects in place, and three times faster than torch's kthvalue
    places = [array.size - k for k in counts]
    array.partition(places)
    return [float(array[place]) for place in places]


def elect(X: Tensor, tie: float) -> Tensor:
    """Return the sign of sum_i X_i, (rows, columns); 0 where the sum of `X` (T, rows, columns) is but rounding."""
    total = X.sum(dim=0)
    return torch.where(total.abs() > tie * X.abs().sum(dim=0), total.sign(), 0.0)


def agree(X: Tensor, tie: float, shares: Tensor | None = None) -> Tensor:
    """Return the mean of the entries of `X` (T, rows, columns) that have the elected sign: TIES but for trimming.

    shares: what each task counts in the divisor (T,), 1 without it; where they sum to 0 nothing is divided.
    """
    agreeing = X * elect(X, tie) > 0
    counted = agreeing if shares is None else agreeing * shares[:, None, None]
    divisor = counted.sum(dim=0)
    return (X * agreeing).sum(dim=0) / torch.where(divisor == 0, 1, divisor)
