"""The base model with every task's texts and head, as the merging rules look at it: a `merging.registry.Probe`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from loraloom.adapters.heads import Head
from loraloom.adapters.update import Update
from loraloom.errors import raise_problems
from loraloom.model.generator import ANSWERS, Generator
from loraloom.model.layers import LayerReader, linear_layers
from loraloom.model.prompts import Asked
from loraloom.model.runner import Evaluator
from loraloom.model.tokens import IGNORED, Batch, Encoded, batch_sides, batches


class TaskProbe:
    """A Hugging Face base model that runs each task's texts under the task's own head, with any updates inside.

    heads, encoded, labels and regression have one entry a task, in the order of the adapters: the head as trained, the
    token ids of some rows, their labels ((k,) int64 classes, or float32 for regression) or None for all where a rule
    needs none, and whether the head returns a number. Rows are batched in the order given, so that any few batches
    are a fair sample if the rows are. `progress(done, total)` is called after every step of a rule.

    Raises LoraloomError that tells all that does not fit: lengths that differ, or a task without rows.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        heads: Sequence[Head],
        encoded: Sequence[Encoded],
        labels: Sequence[Tensor] | None,
        regression: Sequence[bool],
        batch_size: int = 16,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        raise_problems("cannot probe the base model", _problems(heads, encoded, labels, regression), "give all tasks")
        self.regression = tuple(regression)
        self.batches: list[list[Batch]] = []
        self.labels: list[list[Tensor]] = []
        self._evaluator, self._heads, self._progress = evaluator, tuple(heads), progress
        for task, rows in enumerate(encoded):
            starts = range(0, len(rows), batch_size)
            # each is sorted within by length; as one call it would be sorted as a whole
            cut = [(s, *next(batches(rows[s : s + batch_size], evaluator.tokenizer, batch_size))) for s in starts]
            self.batches.append([batch for _, _, batch in cut])
            if labels is not None:
                self.labels.append([labels[task][[start + row for row in chosen]] for start, chosen, _ in cut])

    def run(
        self,
        task: int,
        batch: Batch,
        updates: Mapping[str, Update],
        see: Callable[[str, Tensor], None] | None = None,
    ) -> Tensor:
        """Return the outputs (k, classes or 1) of the task's head, float32 on the CPU, differentiable in `updates`.

        `see(module, rows)` is called for every updated layer, in the order in which the layers run, with what it
        reads: (tokens, n) float32, padding left out, differentiable too. Raises LoraloomError where an update or the
        head does not fit the base model.
        """
        head = self._heads[task]
        with self._evaluator.running(updates, head, see) as run:
            return head.logits(run(batch))

    def step(self, done: int, total: int) -> None:
        """Tell the user that `done` of `total` steps are behind."""
        if self._progress is not None:
            self._progress(done, total)


class AnswerProbe:
    """A language model that answers each task's prompts, with any updates inside; every token of an answer is a row.

    encoded has one entry a task, in the order of the adapters: prompts with their answers, whose tokens are the labels.
    What a task's "classes" are to a rule are here the words of the vocabulary, and there is no head of the task's own.
    Rows are batched in the order given. `progress(done, total)` is called after every step of a rule.

    Raises LoraloomError where a task has no rows.
    """

    def __init__(
        self,
        generator: Generator,
        encoded: Sequence[Sequence[Asked]],
        batch_size: int = 16,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        empty = [f"task {task} has no texts" for task, rows in enumerate(encoded) if not rows]
        raise_problems("cannot probe the base model", empty, "give all tasks")
        self.regression = (False,) * len(encoded)
        self._generator, self._progress = generator, progress
        cut = [[rows[start : start + batch_size] for start in range(0, len(rows), batch_size)] for rows in encoded]
        self.batches: list[list[Batch]] = [
            [batch for part in parts for _, batch in generator.batches(part)] for parts in cut
        ]
        self.labels = [[batch[ANSWERS][batch[ANSWERS] != IGNORED].cpu() for batch in found] for found in self.batches]

    def run(
        self,
        task: int,
        batch: Batch,
        updates: Mapping[str, Update],
        see: Callable[[str, Tensor], None] | None = None,
    ) -> Tensor:
        """Return the logits (tokens of the answers, words) float32 on the CPU, differentiable in `updates`.

        `see` as for `TaskProbe.run`. Raises LoraloomError where an update does not fit the base model.
        """
        generator = self._generator
        with generator.running(updates):
            run = None if see is None else partial(self._watched, updates, see)
            logits = generator.said(batch, run)
        return logits[batch[ANSWERS].to(logits.device) != IGNORED].cpu()

    def _watched(self, updates: Mapping[str, Update], see: Callable[[str, Tensor], None], **inputs: Any) -> Any:
        """Run the model and show what its updated layers read."""
        generator = self._generator
        layers = linear_layers(generator.model)
        reader = LayerReader(generator.model, {path: layers[path] for path in updates}, headed=True)
        encoder, decoder = batch_sides(inputs, two_sided=generator.two_sided, pad=generator.tokenizer.pad_token_id)

        def hand_over(path: str, x: Tensor) -> None:
            side = encoder if reader.in_encoder(path, x) else decoder
            see(path, side.rows(x, "token").cpu())

        return reader.run(inputs, hand_over, list(updates))

    def step(self, done: int, total: int) -> None:
        """Tell the user that `done` of `total` steps are behind."""
        if self._progress is not None:
            self._progress(done, total)


def _problems(
    heads: Sequence[Head], encoded: Sequence[Encoded], labels: Sequence[Tensor] | None, regression: Sequence[bool]
) -> list[str]:
    problems = [
        f"{len(given)} {name} for {len(heads)} heads"
        for name, given in (("texts", encoded), ("labels", labels), ("regression", regression))
        if given is not None and len(given) != len(heads)
    ]
    problems += [f"task {task} has no texts" for task, rows in enumerate(encoded) if not rows]
    if labels is not None and not problems:
        problems += [
            f"task {task} has {len(rows)} texts and {len(own)} labels"
            for task, (rows, own) in enumerate(zip(encoded, labels, strict=True))
            if len(rows) != len(own)
        ]
    return problems
