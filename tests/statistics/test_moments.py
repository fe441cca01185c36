"""Moments against dense float64 sums, over many shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from loraloom.statistics.moments import Moment

FACTOR = 1e-6  # a factor is rounded to float32
shapes = st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(1, 8), st.integers(0, 2**31 - 1))


def draw(count: int, width: int, seed: int) -> torch.Tensor:
    # columns over six powers of ten, as real activations have them
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return rows * torch.logspace(-3, 3, width)


def close(mine: torch.Tensor, truth: torch.Tensor, scale: torch.Tensor, within: float = 1e-10) -> None:
    assert mine.dtype == torch.float64
    assert (mine - truth).norm() <= within * scale.norm()


@given(shapes)
@settings(max_examples=60, deadline=None)
def test_true_moments_have_no_faults(shape: tuple[int, int, int, int]) -> None:
    """Sums, and what a difference leaves, pass the checks of files from others; a mirrored Gram matrix does not."""
    first, second, width, seed = shape
    whole, part = (
        Moment.of_rows(draw(first + second, width, seed)),
        Moment.of_rows(draw(first + second, width, seed)[:first]),
    )
    for moment in (whole, part, whole + part, whole - part, whole.turned()):
        assert moment.faults() == []
    assert whole.turned().rows is None
    close(whole.turned().as_gram(), whole.as_gram(), whole.as_gram(), FACTOR)
    if whole.count:
        assert Moment(whole.count, whole.total, gram=-whole.as_gram()).faults() == [
            "gram is not positive semi-definite"
        ]


@given(shapes)
@settings(max_examples=60, deadline=None)
def test_of_rows_is_the_dense_gram(shape: tuple[int, int, int, int]) -> None:
    count, _, width, seed = shape
    rows = draw(count, width, seed)
    moment, dense = Moment.of_rows(rows), rows.double()
    assert (moment.count, moment.width) == (count, width)
    assert (moment.rows is not None) == (count < width)
    close(moment.as_gram(), dense.T @ dense, dense.T @ dense)
    close(moment.total, dense.sum(0), dense)
    close(moment.mean(), dense.sum(0) / max(count, 1), dense)
    assert moment.trace() == pytest.approx(float((dense**2).sum()), rel=1e-10)
    A = torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
    assert moment.energy(A) == pytest.approx(float((A.double() @ dense.T).norm() ** 2), rel=1e-9)


@given(shapes)
@settings(max_examples=60, deadline=None)
def test_add_and_subtract(shape: tuple[int, int, int, int]) -> None:
    one, two, width, seed = shape
    first, second = draw(one, width, seed), draw(two, width, seed + 1)
    both = Moment.of_rows(first) + Moment.of_rows(second)
    dense = torch.cat([first, second]).double()
    assert both.count == one + two
    assert (both.rows is not None) == (one + two < width)
    close(both.as_gram(), dense.T @ dense, dense.T @ dense)
    back = both - Moment.of_rows(second)
    assert back.count == one
    close(back.as_gram(), first.double().T @ first.double(), dense.T @ dense)
    close(back.total, first.double().sum(0), dense)


@given(shapes)
@settings(max_examples=30, deadline=None)
def test_as_rows_is_a_root(shape: tuple[int, int, int, int]) -> None:
    count, _, width, seed = shape
    rows = draw(count, width, seed)
    factor, gram = Moment.of_rows(rows).as_rows(), rows.double().T @ rows.double()
    close(factor.T @ factor, gram, gram)


def test_refusals() -> None:
    few, many = Moment.of_rows(torch.ones(1, 3)), Moment.of_rows(torch.ones(4, 3))
    with pytest.raises(ValueError, match="4 rows away from 1"):
        few - many
    with pytest.raises(ValueError, match="one of rows, a Gram matrix"):
        Moment(1, torch.zeros(3))
