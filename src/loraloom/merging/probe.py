"""What a merging rule may look at beside the adapters: the base model run on each task's texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from loraloom.adapters.update import Update

Batch = Mapping[str, Tensor]


class Probe(Protocol):
    """A frozen base model with each task's texts, heads and, where they are at hand, labels.

    Tasks are numbered as the adapters are. `loraloom.model.probe.TaskProbe` is one for Hugging Face models.
    """

    @property
    def batches(self) -> Sequence[Sequence[Batch]]:
        """Return the texts of every task as model inputs, batch by batch."""

    @property
    def labels(self) -> Sequence[Sequence[Tensor]]:
        """Return the labels of every task, batch by batch as `batches`: int64 classes, or float32 for regression.

        Empty where there are none.
        """

    @property
    def regression(self) -> Sequence[bool]:
        """Tell of every task whether its head returns a number, not the logits of classes."""

    def run(
        self,
        task: int,
        batch: Batch,
        updates: Mapping[str, Update],
        see: Callable[[str, Tensor], None] | None = None,
    ) -> Tensor:
        """Return the outputs (k, classes or 1) of the task's head for one batch, with `updates` in the base model.

        Differentiable in the updates. `see(module, rows)` is called for every updated layer, in the order in which the
        layers run, with what it reads: (tokens, n), padding left out, differentiable too. Take gradients before another
        task runs: the heads may share their place in the model.
        """

    def step(self, done: int, total: int) -> None:
        """Tell the user that `done` of `total` steps are behind."""
