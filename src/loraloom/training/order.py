"""Which texts of every task are held out, and which are trained on at which step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset

from loraloom.files.hashing import task_seed
from loraloom.model.processes import started
from loraloom.training.lessons import Lesson

_HELDOUT, _MOST_HELDOUT = 8, 64  # a share of one in so many, and the most
_ALIKE = 8  # batches whose texts are sorted by length


class Order(torch.utils.data.Dataset[dict[str, Any]]):
    """The batches of all steps, one an item: of each task in turn, and of each process its share of the batch."""

    def __init__(
        self,
        lessons: Mapping[str, Lesson],
        rows: Mapping[str, Sequence[int]],
        steps: int,
        accumulate: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self._lessons, self._share, self._shares = list(lessons.values()), batch_size // started(), started()
        count = steps * accumulate
        self._drawn = [
            _drawn(rows[name], one.lengths, count, batch_size, task_seed(seed, name)) for name, one in lessons.items()
        ]
        self._length = steps * accumulate * len(self._lessons) * self._shares

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, item: int) -> dict[str, Any]:
        """Return a batch: the number of its task, the model's inputs, and what the teacher says of them."""
        turn, share = divmod(item, self._shares)
        number, task = divmod(turn, len(self._lessons))
        start = (number * self._shares + share) * self._share
        batch, given = self._lessons[task].batch(self._drawn[task][start : start + self._share])
        return {"task": task, "batch": dict(batch), "given": dict(given)}


def used(rows: Dataset, drawn: int, seed: int) -> Dataset:
    """Return the rows that are trained on, `drawn` at most, or held out: a teacher need not answer others."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    count = drawn + _heldout(len(rows))
    return rows.select(sorted(order[:count])) if count < len(rows) else rows


def parted(count: int, seed: int) -> tuple[list[int], list[int]]:
    """Return which texts are trained on, and which are held out."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    held = _heldout(count)
    return order[held:], order[:held]


def _heldout(count: int) -> int:
    return min(max(2, count // _HELDOUT), _MOST_HELDOUT)


def _drawn(rows: Sequence[int], lengths: Sequence[int], count: int, size: int, seed: int) -> list[int]:
    """Return `count` batches of `size` of `rows`, one after the other: all of them again and again, in another order.

    Texts of a batch are of like length, so that few tokens are padding. lengths: of all texts.
    """
    generator, found = torch.Generator().manual_seed(seed), list[int]()
    while len(found) < count * size:
        found += [rows[place] for place in torch.randperm(len(rows), generator=generator).tolist()]
    drawn, together = list[int](), max(1, min(_ALIKE, len(rows) // size)) * size
    for start in range(0, count * size, together):
        near = sorted(found[start : min(start + together, count * size)], key=lambda row: -lengths[row])
        order = torch.randperm(len(near) // size, generator=generator).tolist()
        drawn += [row for place in order for row in near[place * size : (place + 1) * size]]
    return drawn
