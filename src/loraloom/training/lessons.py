"""One task to distil: its texts, what its single model answers to them, and how far another model's answers are.

Distances are those of model/distances.py, in the task's own unit. Of the texts a slice is held out.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from datasets import Dataset
from torch import Tensor

from loraloom.adapters.heads import Head
from loraloom.merging.choice import unlabelled
from loraloom.merging.distillation import Loss
from loraloom.model.distances import (
    SILENT,
    log_chances,
    output_unit,
    outputs_apart,
    squares,
    variance,
    words_apart,
)
from loraloom.model.generator import ANSWERS, Generator
from loraloom.model.runner import Evaluator
from loraloom.model.tokens import IGNORED, Batch, batches
from loraloom.model.written import Updates, Written, answered, apart
from loraloom.training.teachers import PART, Teacher

_MEASURED = 8  # held-out texts of a batch: they are few, of all lengths, so that much of a large batch is padding
_NUMBERS = 2.0  # times: by one unit of distance a correlation falls far more than an accuracy does; docs/distil.md

Given = Mapping[str, Tensor]  # what a teacher says of a batch, by name


class Lesson(Protocol):
    """What distilling needs of one task, of whatever kind."""

    @property
    def alike(self) -> bool:
        """Tell whether the teacher answers every text alike, or as the base does: there is nothing to learn."""

    @property
    def lengths(self) -> list[int]:
        """Return the tokens of every text."""

    def batch(self, rows: Sequence[int]) -> tuple[Batch, Given]:
        """Return some texts as model inputs, and what the teacher says of them, in one order."""

    def run(self, updates: Updates, batch: Batch) -> Tensor:
        """Return what the model with `updates` makes of a batch, differentiable in them."""

    def loss(self, found: Tensor, batch: Batch, given: Given) -> Tensor:
        """Return how far `found`, of `run`, is from the teacher: a mean over the batch, in the task's unit."""

    def distance(self, updates: Updates) -> float:
        """Return how far the outputs of the model with `updates` are from the teacher's, on the held-out texts."""


class HeadLesson:
    """A task whose head answers: the teacher's outputs (k, classes or 1) and the features (k, d) that it reads."""

    def __init__(
        self, model: Evaluator, head: Head, rows: Dataset, heldout: Sequence[int], loss: Loss, own: Updates, place: Path
    ) -> None:
        self._model, self._head, self._heldout, self._loss = model, head, list(heldout), loss
        self._encoded = model.encode(rows)
        lengths = self.lengths
        longest = sorted(range(len(rows)), key=lambda row: -lengths[row])  # of a part's texts little is padding so
        self._places = {row: place for place, row in enumerate(longest)}

        def make(part: range) -> Given:
            features = model.features(own, head, [self._encoded[longest[place]] for place in part])
            return {"outputs": head.logits(features), "features": features}

        self._teacher = Teacher(place, len(rows), make)
        self._unit = output_unit(self._teacher.whole("outputs"))
        self._spread = variance(self._teacher.whole("features"))

    @property
    def alike(self) -> bool:
        """Tell whether the head returns the same for every text."""
        return self._unit is None or self._spread is None

    @property
    def lengths(self) -> list[int]:
        """Return the tokens of every text."""
        return [len(one["input_ids"]) for one in self._encoded]

    def batch(self, rows: Sequence[int]) -> tuple[Batch, Given]:
        """Return texts, padded, with the outputs and features of the teacher."""
        chosen, batch = next(batches([self._encoded[row] for row in rows], self._model.tokenizer, len(rows)))
        read = ("outputs",) if self._loss == "output" else ("outputs", "features")
        return batch, {name: self._own(name, [rows[place] for place in chosen]) for name in read}

    def run(self, updates: Updates, batch: Batch) -> Tensor:
        """Return the features (k, d) float32 that the head reads, on the CPU."""
        with self._model.running(updates, self._head) as run:
            return run(batch)

    def loss(self, found: Tensor, batch: Batch, given: Given) -> Tensor:
        """Return the distance of outputs, of features, or the sum of both; of numbers, `_NUMBERS` times that."""
        own = {name: tensor.to(found.device) for name, tensor in given.items()}
        far = torch.zeros(len(found))
        assert self._unit
        assert self._spread
        if self._loss != "features":
            far = far + outputs_apart(own["outputs"], self._head.logits(found)) / self._unit
        if self._loss != "output":
            far = far + squares(own["features"], found) / self._spread
        return far.mean() * (_NUMBERS if own["outputs"].shape[1] == 1 else 1.0)

    def distance(self, updates: Updates) -> float:
        """Return the distance of outputs on the held-out texts."""
        encoded = [self._encoded[row] for row in self._heldout]
        found = self._model.features(updates, self._head, encoded, batch_size=_MEASURED)
        own, merged = self._own("outputs", self._heldout).double(), self._head.logits(found).double()
        assert self._unit is not None
        return float(outputs_apart(own, merged).mean()) / self._unit

    def _own(self, name: str, rows: Sequence[int]) -> Tensor:
        """Return what the teacher says of some texts."""
        return self._teacher.rows(name, [self._places[row] for row in rows])


class WrittenLesson:
    """A task whose answers are written: the teacher's own greedy answers, and how likely it finds each token there.

    Kept of a token are its likeliest words, int32, and the logs of their chances and of the rest's, float16.
    """

    def __init__(
        self,
        model: Generator,
        rows: Dataset,
        heldout: Sequence[int],
        own: Updates,
        place: Path,
        answer_tokens: int,
    ) -> None:
        self._model, self._heldout = model, list(heldout)
        prompts = model.encode(unlabelled(rows))

        def make(part: range) -> Given:
            written = Written.by(model, own, [prompts[row] for row in part], answer_tokens)
            return {
                "lengths": written.lengths,
                "answers": written.answers.int(),
                "words": written.words.int(),
                "chances": written.own.half(),
                "base": written.base.float(),
            }

        self._teacher = Teacher(place, len(rows), make)
        lengths = self._teacher.whole("lengths").tolist()
        answers = torch.split(self._teacher.whole("answers").long(), lengths)
        self._encoded = answered(model, prompts, [ids.tolist() for ids in answers])
        self._starts = _starts(lengths)
        self._unit = float(self._teacher.whole("base").double().mean())

    @property
    def alike(self) -> bool:
        """Tell whether the adapter changes nothing of what the base would write."""
        return self._unit <= SILENT

    @property
    def lengths(self) -> list[int]:
        """Return the tokens of every prompt with its answer."""
        return [len(one.prompt) + len(one.answer) for one in self._encoded]

    def batch(self, rows: Sequence[int]) -> tuple[Batch, Given]:
        """Return prompts with the teacher's answers, with its words and their chances for every token of these."""
        chosen, batch = next(self._model.batches([self._encoded[row] for row in rows]))
        return batch, self._given([rows[place] for place in chosen])

    def run(self, updates: Updates, batch: Batch) -> Tensor:
        """Return the logits (b, L, V) float32 of the answers' tokens."""
        with self._model.running(updates):
            return self._model.said(batch)

    def loss(self, found: Tensor, batch: Batch, given: Given) -> Tensor:
        """Return the divergence a token."""
        said = found[batch[ANSWERS].to(found.device) != IGNORED]
        words, own = given["words"].to(said.device).long(), given["chances"].to(said.device).float().log_softmax(dim=-1)
        return words_apart(own, log_chances(said, words)).mean() / self._unit

    def distance(self, updates: Updates) -> float:
        """Return the divergence a token on the held-out prompts."""
        given, asked = self._given(self._heldout), [self._encoded[row] for row in self._heldout]
        own = given["chances"].double().log_softmax(dim=-1)
        return float(apart(self._model, updates, asked, given["words"].long(), own).mean()) / self._unit

    def _given(self, rows: Sequence[int]) -> Given:
        spans = [self._starts[row] for row in rows]
        return {name: torch.cat([self._teacher.span(name, *span) for span in spans]) for name in ("words", "chances")}


def _starts(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return of every answer the number of its part, and where its tokens start and end there."""
    found = []
    for number, start in enumerate(range(0, len(lengths), PART)):
        ends = list(itertools.accumulate(lengths[start : start + PART], initial=0))
        found += [(number, *pair) for pair in itertools.pairwise(ends)]
    return found
