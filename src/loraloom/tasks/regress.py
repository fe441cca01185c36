"""Tasks whose rows each have a number: the head returns it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from loraloom.tasks.sources import is_null

NumberMetric = Literal["pearson_spearman"]


@dataclass(frozen=True)
class Regress:
    """What training, measuring and reading rows need to know of a task of numbers."""

    metrics: ClassVar[tuple[NumberMetric, ...]] = ("pearson_spearman",)
    generates: ClassVar[bool] = False
    regression: ClassVar[bool] = True
    dtype: ClassVar[torch.dtype] = torch.float32  # of labels as a tensor
    column: ClassVar[str] = "float64"  # of labels in a data set
    words: ClassVar[str] = "regression"
    outputs: ClassVar[int] = 1

    def read(self, value: Any) -> float:
        """Return the number that a row has for its label. Raises ValueError where it has no finite one."""
        if is_null(value):
            raise ValueError("null label")
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError("not a finite number")
        return number

    def head_bias(self, labels: Sequence[float]) -> float | None:
        """Return where the fresh head's bias starts: at the labels' mean, which few steps do not reach."""
        return sum(labels) / len(labels)

    def constant(self, train: Tensor, rows: int) -> Tensor | None:
        """Return None: what answers alike for every row is correlated with nothing."""
        return None
