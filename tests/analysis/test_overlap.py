"""Overlaps against dense projectors and principal angles; adapters of one start are named, others are not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from loraloom.adapters.update import Adapter, Update
from loraloom.analysis.overlap import overlaps
from loraloom.errors import LoraloomError


def adapter(
    seed: int, ranks: tuple[int, ...] = (3, 4), m: int = 20, n: int = 30, A: torch.Tensor | None = None
) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    updates = {
        f"layer.{index}": Update(
            torch.randn(20, r, generator=generator), torch.randn(r, n, generator=generator) if A is None else A[:r]
        )
        for index, r in enumerate(ranks)
    }
    return Adapter(updates, {})


def test_overlaps_are_the_squared_cosines_of_the_principal_angles() -> None:
    members = {"a": adapter(0), "b": adapter(1, (2, 5)), "c": adapter(2, (3, 1))}
    found = overlaps(members)
    for i, one in enumerate(members.values()):
        for j, two in enumerate(members.values()):
            for table, of in ((found.rows, "A"), (found.columns, "B")):
                expected = []
                for module in one.updates:
                    x, y = (member.updates[module] for member in (one, two))
                    sides = (x.A.T, y.A.T) if of == "A" else (x.B, y.B)
                    angles = subspace_angles(*(side.double().numpy() for side in sides))
                    expected.append(np.square(np.cos(angles)).sum() / min(x.rank, y.rank))
                assert float(table[i, j]) == pytest.approx(np.mean(expected), abs=1e-6)
    assert float(found.chance[0, 1]) == pytest.approx((3 / 30 + 5 / 30) / 2)


def test_adapters_of_one_start_are_named() -> None:
    start = torch.randn(4, 30, generator=torch.Generator().manual_seed(9))
    moved = start + 0.3 * torch.randn(4, 30, generator=torch.Generator().manual_seed(8))
    found = overlaps({"a": adapter(0, A=start), "b": adapter(1, A=moved), "c": adapter(2)})
    assert [pair[:2] for pair in found.same_start()] == [("a", "b")]
    assert 0.5 < found.same_start()[0][2] < 1


def test_an_update_of_zero_has_no_space_and_unused_directions_do_not_count() -> None:
    zero = adapter(0)
    for update in zero.updates.values():
        update.B.zero_()
    half = adapter(1, (4, 4))
    for update in half.updates.values():
        update.B[:, 2:] = 0  # two rows of A that the update does not use
    found = overlaps({"zero": zero, "half": half, "same": half})
    assert math.isnan(float(found.rows[0, 1]))
    assert float(found.rows[1, 2]) == pytest.approx(1)
    assert float(found.chance[1, 1]) == pytest.approx(2 / 30)
    assert found.same_start() == [("half", "same", pytest.approx(1))]


def test_other_widths_are_told() -> None:
    with pytest.raises(LoraloomError, match=r"a and b: layer\.0 has two shapes"):
        overlaps({"a": adapter(0), "b": adapter(1, n=31)})
