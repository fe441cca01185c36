"""Tasks whose rows are each of one class: the head returns a logit a class."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from loraloom.errors import first_few
from loraloom.tasks.sources import check_unicode, is_null

_LONGEST = 200  # characters of a label
ClassMetric = Literal["accuracy", "matthews", "accuracy_f1"]


@dataclass(frozen=True)
class Classify:
    """What training, measuring and reading rows need to know of a task of classes.

    `labels` are the names in order. Where they are `numbered`, the numbers 0, 1, ... stand for their places in rows.
    """

    labels: tuple[str, ...]
    numbered: bool = False

    metrics: ClassVar[tuple[ClassMetric, ...]] = ("accuracy", "matthews", "accuracy_f1")  # the default first
    generates: ClassVar[bool] = False
    regression: ClassVar[bool] = False
    dtype: ClassVar[torch.dtype] = torch.int64  # of labels as a tensor
    column: ClassVar[str] = "int64"  # of labels in a data set
    words: ClassVar[str] = "classes"

    @classmethod
    def of_rows(cls, values: Iterable[Any], listed: Sequence[str] | None) -> tuple[Classify, list[str]]:
        """Return the classes of training rows with these label `values`, and what is wrong with them.

        They are those `listed`, or all that occur in natural order, 2 before 10. Where no name listed is a number, the
        numbers 0, 1, ... stand for places.
        """
        found = _names(values)
        if listed is not None:
            names = [label_name(name) for name in listed]
            kind = cls(tuple(names), numbered=not any(name.isdecimal() for name in names))
            occurring = {kind._places.get(name) for name in found}
            absent = [name for place, name in enumerate(names) if place not in occurring]
            return kind, [f"no training row has the label {first_few(absent)}"] if absent else []
        kind = cls(tuple(sorted(found, key=_natural)))
        scores = [name for name in kind.labels if re.fullmatch(r"-?\d*\.\d+", name)]
        if scores:
            return kind, [f"{first_few(scores)} are scores, not classes: set regression, or list the labels"]
        if len(kind.labels) < 2:
            return kind, [f"one class alone ({first_few(kind.labels) or 'none'}): a task needs two or more"]
        return kind, []

    @property
    def outputs(self) -> int:
        """Return the width of the head."""
        return len(self.labels)

    def read(self, value: Any) -> int:
        """Return the place of what a row has for its label. Raises ValueError where it is no name of a class."""
        name = _name(value)
        if name not in self._places:
            raise ValueError(f"unknown label (known: {first_few(self.labels, 20)})")
        return self._places[name]

    def metric_problems(self, metric: str) -> list[str]:
        """Return why `metric` cannot measure these classes."""
        if metric == "accuracy_f1" and len(self.labels) != 2:
            return [f"metric: accuracy_f1 is for two labels, not {len(self.labels)}"]
        return []

    def head_bias(self, labels: Sequence[int]) -> float | None:
        """Return where the fresh head's bias starts: None leaves it as it was drawn."""
        return None

    def constant(self, train: Tensor, rows: int) -> Tensor | None:
        """Return logits (rows, classes) that always name the commonest of the `train` labels."""
        commonest = train.mode().values
        return torch.nn.functional.one_hot(commonest.expand(rows), len(self.labels)).float()

    @cached_property
    def _places(self) -> dict[str, int]:
        """The place of everything that a row may write for a label."""
        numbers = {str(place): place for place in range(len(self.labels))} if self.numbered else {}
        return numbers | {name: place for place, name in enumerate(self.labels)}


def label_name(value: Any) -> str:
    """Return a label as a string; whole floats as integers, since a column with a gap turns 1 into 1.0."""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", str(value).strip())


def _name(value: Any) -> str:
    if is_null(value):
        raise ValueError("null label")
    if not isinstance(value, (str, int, float)):
        raise ValueError("neither a string nor a number")
    name = label_name(value)
    if len(name) > _LONGEST:
        raise ValueError(f"longer than {_LONGEST} characters, which no label is")
    check_unicode(name)
    return name


def _names(values: Iterable[Any]) -> set[str]:
    """Return the names that occur; what is none is told of its row, by `Classify.read`."""
    found = set()
    for value in values:
        with suppress(ValueError):
            found.add(_name(value))
    return found


def _natural(name: str) -> tuple[Any, ...]:
    if re.fullmatch(r"-?\d+(\.\d+)?", name):
        return (0, float(name), name)
    return (1, [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)], name)
