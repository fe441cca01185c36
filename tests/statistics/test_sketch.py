"""Bounded sums against dense float64 ones: 0 <= G - F^T F <= lost I, and lost within what theory allows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from loraloom.model.tokens import Side
from loraloom.statistics.collect import RowSum
from loraloom.statistics.moments import Moment, pooled, sketched

ROUNDING = 1e-6  # of the largest eigenvalue: a factor is rounded to float32 at each step
shapes = st.tuples(st.integers(0, 90), st.integers(2, 14), st.integers(1, 13), st.integers(0, 2**31 - 1))


def draw(count: int, width: int, seed: int) -> torch.Tensor:
    """Rows whose spectrum falls by a drawn power of ten, about a mean that is not zero for every other seed."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=generator) * torch.logspace(0, -(seed % 7), width)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    return rows @ turn + (seed % 2) * torch.randn(width, generator=generator)


def bounded(rows: torch.Tensor, most: int, step: int = 7) -> Moment:
    found = RowSum(rows.shape[1], most)
    for part in rows.split(step):
        found.add(part)
    return found.moment()


def check_bound(moment: Moment, rows: torch.Tensor) -> torch.Tensor:
    """Return the eigenvalues of G, descending, after a check of what `moment` says of it."""
    wide = rows.double()
    values = torch.linalg.eigvalsh(wide.T @ wide).flip(0)
    error = torch.linalg.eigvalsh(wide.T @ wide - moment.as_gram())
    slack = ROUNDING * float(values[0])
    assert float(error[0]) >= -slack
    assert float(error[-1]) <= moment.lost + slack
    assert moment.count == len(rows)
    assert (moment.total - wide.sum(0)).norm() <= 1e-6 * (1 + wide.norm())
    assert moment.faults() == []
    return values


@given(shapes)
@settings(max_examples=80, deadline=None)
def test_frequent_directions_keep_their_bound(shape: tuple[int, int, int, int]) -> None:
    count, width, most, seed = shape
    rows = draw(count, width, seed)
    moment = bounded(rows, most)
    values = check_bound(moment, rows)
    if most >= width or count <= most:  # exact, bit for bit
        exact = bounded(rows, width)
        assert moment.lost == 0
        for part in ("rows", "gram", "total"):
            mine, theirs = getattr(moment, part), getattr(exact, part)
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.equal(mine, theirs)
        return
    assert moment.factor is not None
    assert moment.factor.shape == (most, width)
    assert moment.factor.dtype == torch.float32
    slack = (most + 1) * ROUNDING * float(values.sum())
    assert (most + 1) * moment.lost <= float(values.sum()) - moment.trace() + slack
    for q in range(most + 1):
        assert (most + 1 - q) * moment.lost <= float(values[q:].sum()) + slack


@given(shapes)
@settings(max_examples=30, deadline=None)
def test_how_rows_are_split_does_not_matter(shape: tuple[int, int, int, int]) -> None:
    count, width, most, seed = shape
    rows = draw(count, width, seed)
    one, two = bounded(rows, most, 1), bounded(rows, most, 1000)
    assert one.lost == pytest.approx(two.lost)
    assert (one.as_gram() - two.as_gram()).norm() <= 1e-6 * (1 + two.as_gram().norm())


@given(shapes, st.integers(0, 90))
@settings(max_examples=60, deadline=None)
def test_sums_of_bounded_moments(shape: tuple[int, int, int, int], cut: int) -> None:
    """Added, or sketched again within the same rank."""
    count, width, most, seed = shape
    rows = draw(count, width, seed)
    first, second = bounded(rows[:cut], most), bounded(rows[cut:], most)
    both = first + second
    check_bound(both, rows)
    assert both.lost == first.lost + second.lost
    if most < width:
        again = sketched([first, second], most)
        values = check_bound(again, rows)
        assert again.thin is not None
        assert len(again.thin) <= max(most, 0)
        slack = (most + 1) * ROUNDING * float(values.sum())
        assert (most + 1) * again.lost <= float(values.sum()) - again.trace() + slack


def test_no_row_goes_into_a_factor_as_it_was() -> None:
    few, many = Moment.of_rows(draw(3, 20, 14)), bounded(draw(60, 20, 4), 5)
    both = few + many
    assert both.factor is not None
    assert both.factor.shape == (8, 20)
    rows = few.as_rows()
    alike = torch.nn.functional.normalize(both.as_rows()) @ torch.nn.functional.normalize(rows).T
    assert float(alike.abs().max()) < 0.99
    dense = rows.T @ rows + many.as_gram()
    assert (both.as_gram() - dense).norm() <= ROUNDING * dense.norm()


@given(shapes)
@settings(max_examples=60, deadline=None)
def test_limit_rank_is_the_best_factor(shape: tuple[int, int, int, int]) -> None:
    count, width, most, seed = shape
    rows = draw(count, width, seed)
    whole = Moment.of_rows(rows)
    for moment in (whole, whole.turned(), Moment(whole.count, whole.total, gram=whole.as_gram())):
        limited = moment.limit_rank(most)
        values = check_bound(limited, rows)
        if limited is moment:
            assert most >= (width if moment.thin is None else len(moment.thin))
            continue
        assert limited.factor is not None
        assert len(limited.factor) == most
        assert limited.lost == pytest.approx(float(values[most]), rel=1e-4, abs=1e-6 * float(values[0]))
        assert limited.largest() == pytest.approx(float(values[0]), rel=1e-5, abs=1e-30)


@given(shapes)
@settings(max_examples=30, deadline=None)
def test_turned_says_what_the_gram_matrix_says(shape: tuple[int, int, int, int]) -> None:
    """Another set of rows with the same Gram matrix comes out the same."""
    count, width, _, seed = shape
    rows = draw(min(count, width - 1), width, seed)
    turn = torch.linalg.qr(torch.randn(len(rows), len(rows), generator=torch.Generator().manual_seed(seed))).Q
    one, two = (Moment.of_rows(found).turned() for found in (rows, turn @ rows))
    assert one.rows is None
    assert two.rows is None
    check_bound(one, rows)
    assert one.factor is not None
    assert two.factor is not None
    if len(rows) and seed % 7 < 2:  # directions of float32 rounding are anybody's
        torch.testing.assert_close(one.factor, two.factor, rtol=0, atol=1e-3 * float(rows.norm()))


def test_a_sketch_of_text_like_rows_loses_little() -> None:
    """Where the spectrum falls as 1 / q^2, R = 32 of 200 directions lose some thousandth of the loudest."""
    rows = torch.randn(3000, 200, generator=torch.Generator().manual_seed(0)) / torch.arange(1, 201)
    moment = bounded(rows, 32, 100)
    check_bound(moment, rows)
    assert moment.lost < 5e-3 * moment.largest()


def test_faults_of_a_factor() -> None:
    rows = draw(60, 10, 3)
    moment = bounded(rows, 4)
    assert moment.factor is not None
    forged = Moment(moment.count, moment.total * 9, factor=moment.factor, lost=moment.lost)
    assert forged.faults() == ["total is larger than factor allows"]
    forged = Moment(moment.count, moment.total, factor=moment.factor * 0.5, lost=0.0)
    assert forged.faults() == ["total is larger than factor allows"]
    alike = torch.ones(50, 10)  # the total takes up all of the factor
    assert bounded(alike, 3).faults() == []
    assert Moment.of_rows(torch.zeros(3, 10)).turned().faults() == []


def test_a_gram_matrix_is_no_sketch() -> None:
    with pytest.raises(ValueError, match="no rows"):
        sketched([Moment.of_rows(torch.ones(9, 3)), Moment.of_rows(torch.ones(1, 3))], 2)
    assert pooled([Moment.of_rows(torch.ones(1, 3))]).rows is not None


class NoWaiting(TorchDispatchMode):
    """Fails where a value is read back from the device, which would wait for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        assert not any(word in name for word in ("_local_scalar_dense", "nonzero", "is_nonzero", "unique")), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bound", [None, 4])
@pytest.mark.parametrize("kind", ["token", "sample"])
def test_adding_a_batch_reads_nothing_back(bound: int | None, kind: Any) -> None:
    side = Side.of(torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]).bool())
    total, pooler = RowSum(6, bound), RowSum(6, bound)
    with NoWaiting():
        for batch in range(1, 6):
            x = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(batch), dtype=torch.bfloat16)
            total.add(side.rows(x, kind), batch)
            pooler.add(side.rows(x[:, 0], kind), batch)
    assert total.count == 5 * (5 if kind == "token" else 2)
    assert pooler.count == 10
    with pytest.raises(AssertionError, match="scalar"), NoWaiting():
        total.bad_batch()


@pytest.mark.parametrize("bound", [None, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_first_bad_batch_is_known(bound: int | None, value: float) -> None:
    total = RowSum(5, bound)
    assert total.bad_batch() == 0
    for batch in range(1, 9):
        rows = torch.randn(2, 5)
        total.add(rows.masked_fill(torch.eye(2, 5).bool(), value) if batch in (4, 6) else rows, batch)
        assert total.bad_batch() == (4 if batch >= 4 else 0)
