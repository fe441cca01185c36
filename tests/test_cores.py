"""Work side by side: in order, whatever the cores, and nothing of torch's settings is left changed or lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from loraloom.adapters.lowrank import Shared
from loraloom.adapters.update import Adapter
from loraloom.cores import side_by_side
from loraloom.merging import merge
from small import update


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


def test_results_come_in_order_and_no_more_are_begun_than_may_be_in_memory(threads: int) -> None:
    begun: list[int] = []

    def work(item: int) -> tuple[int, int]:
        begun.append(item)
        time.sleep(0.002 * (item % 3))
        return item, torch.get_num_threads()

    for expected, (item, inside) in enumerate(side_by_side(work, range(20))):
        assert (item, inside, torch.get_num_threads()) == (expected, 1, 1)
        assert len(begun) <= item + 1 + threads
    assert torch.get_num_threads() == threads


def test_what_is_raised_reaches_the_caller_and_ends_the_work(threads: int) -> None:
    done: list[int] = []

    def work(item: int) -> None:
        if item == 2:
            raise ValueError("two")
        done.append(item)

    with pytest.raises(ValueError, match="two"):
        list(side_by_side(work, range(100)))
    assert len(done) <= 2 + threads + 1
    assert torch.get_num_threads() == threads
    assert not [one for one in threading.enumerate() if "ThreadPool" in one.name]


def test_gradients_are_kept_where_the_caller_keeps_them(threads: int) -> None:
    weight = torch.ones(2, requires_grad=True)
    assert [one.requires_grad for one in side_by_side(lambda k: k * weight, range(3))] == [True] * 3
    with torch.no_grad():
        assert [one.requires_grad for one in side_by_side(lambda k: k * weight, range(3))] == [False] * 3


@pytest.mark.parametrize("rule", ["tsv", "emr", "knots", "ctm"])
def test_a_merge_is_the_same_on_any_number_of_threads(rule: str) -> None:
    adapters = {f"task{k}": Adapter({f"q{i}": update(10 * k + i, 3) for i in range(7)}, {}) for k in range(3)}
    found = []
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            found.append(merge(adapters, rule))
        finally:
            torch.set_num_threads(1)
    one, several = (merged.merged for merged in found)
    assert list(one) == list(several)
    for module in one:
        assert torch.equal(one[module].update.B, several[module].update.B)
        assert torch.equal(one[module].update.A, several[module].update.A)
        assert isinstance(several[module].shared, Shared) == (rule == "emr")
