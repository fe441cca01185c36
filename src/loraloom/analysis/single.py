"""How far a model is from each single model on a few texts, without labels.

A task's own adapter is the teacher. For every text, `merged` are the outputs of the merged model and `own` those of the
task's own; how far they are apart is told in the task's own unit, so that tasks can be averaged (model/distances.py):

    classes:  mean KL(p_own || p_merged) / mean KL(p_own || mean p_own)
    numbers:  mean (own - merged)^2 / variance of own
    answers:  KL(p_own || p_merged) / KL(p_own || p_base), a token of the single models' own greedy answers

0 is the single model itself. 1 is a model that gives every text the mean of the own outputs: it knows the task's
answers, and nothing of the texts; of answers that are written, the base model, which knows nothing of the task.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

from datasets import Dataset
from torch import Tensor

from loraloom.adapters.heads import Head
from loraloom.adapters.update import Adapter
from loraloom.errors import LoraloomError, collecting, raise_problems, raise_together
from loraloom.merging.choice import TextsFacts, unlabelled
from loraloom.model.distances import output_unit, outputs_apart
from loraloom.model.generator import Generator
from loraloom.model.runner import Evaluator
from loraloom.model.vocabulary import writing_problems
from loraloom.model.written import Updates, Written
from loraloom.progress import Reporter
from loraloom.tasks.generate import ANSWER_TOKENS

FARTHEST = 1e12  # what a distance is told as where it is larger, or where outputs are not finite
FEWEST = 2  # texts: a single one has nothing to differ from


class SingleModels:
    """What the single models answer to a few unlabelled texts, run once, to measure any number of merged models by.

    model: the base model: an Evaluator where heads answer, a Generator where answers are written.
    adapters: by name; for an Evaluator each with its task's head as trained.
    texts: by the adapters' names, rows with text_a, and text_b for pairs, or history for prompts; labels are not read.
    answer_tokens: the most that a single model writes.

    Raises LoraloomError that tells all that is wrong: an adapter without texts or without a head, too few texts.
    """

    def __init__(
        self,
        model: Evaluator | Generator,
        adapters: Mapping[str, Adapter],
        texts: Mapping[str, Dataset],
        *,
        answer_tokens: int = ANSWER_TOKENS,
        reporter: Reporter | None = None,
    ) -> None:
        _check(model, adapters, texts)
        self.texts = {name: TextsFacts.of(rows) for name, rows in texts.items()}
        self._single: dict[str, Answers] = {}
        for name, adapter in (reporter or Reporter(quiet=True)).each("single models", adapters.items()):
            if isinstance(model, Evaluator):
                self._single[name] = OfHead(model, adapter, texts[name])
            else:
                rows = texts[name]
                written = Written.by(model, adapter.updates, model.encode(unlabelled(rows)), answer_tokens)
                self._single[name] = OfAnswers(model, written, rows)
        if all(one.alike for one in self._single.values()):
            raise LoraloomError("every adapter answers all its texts alike", "give more texts, and others")

    def distances(self, updates: Mapping[str, Updates]) -> dict[str, float | None]:
        """Return how far the model with `updates` is from each single model, by adapter: see the module.

        updates: what each adapter's task reads of a merged adapter; mostly the same for all.
        """
        return {name: one.distance(updates[name]) for name, one in self._single.items()}


class Answers(Protocol):
    """What a single model answers to its texts."""

    @property
    def alike(self) -> bool:
        """Tell whether it has nothing to lose: it answers every text alike, or as the base does."""

    def distance(self, updates: Updates) -> float | None:
        """Return how far the model with `updates` is from it; None where it has nothing to lose."""


class OfHead:
    """What a single model's head returns for its texts."""

    def __init__(self, evaluator: Evaluator, adapter: Adapter, rows: Dataset) -> None:
        self._evaluator, self._head, self._encoded = evaluator, Head.of(adapter.head), evaluator.encode(rows)
        self._own = self._outputs(adapter.updates)

    @property
    def alike(self) -> bool:
        """Tell whether the head returns the same for every text."""
        return distance(self._own, self._own) is None

    def distance(self, updates: Updates) -> float | None:
        """Return `distance` of what the head returns with `updates` in the model."""
        return distance(self._own, self._outputs(updates))

    def _outputs(self, updates: Updates) -> Tensor:
        return self._head.logits(self._evaluator.features(updates, self._head, self._encoded))


class OfAnswers:
    """What a single model writes to its prompts, greedily; `rows` are those that it was written to."""

    def __init__(self, generator: Generator, written: Written, rows: Dataset) -> None:
        self._generator, self.written = generator, written
        self._asked = written.asked(generator, generator.encode(unlabelled(rows)))

    @property
    def alike(self) -> bool:
        """Tell whether the adapter changes nothing of what the base would write."""
        return self.written.alike

    def distance(self, updates: Updates) -> float | None:
        """Return the divergence a token from the model with `updates`, in units of that from the base."""
        if self.alike:
            return None
        return _told(self.written.distance(self._generator, updates, self._asked))


def distance(own: Tensor, merged: Tensor) -> float | None:
    """Return how far a head's outputs `merged` are from `own` of the same texts, in the unit of `own`: see the module.

    own, merged: (k, classes) logits, or (k, 1) numbers.

    None where `own` are alike for all texts: such a model has nothing to lose. At most FARTHEST.
    """
    unit = output_unit(own)
    return None if unit is None else _told(float(outputs_apart(own.double(), merged.double()).mean()) / unit)


def _told(found: float) -> float:
    # where the two models are one, rounding may leave it below 0
    return min(max(found, 0.0), FARTHEST) if math.isfinite(found) else FARTHEST


def _check(model: Evaluator | Generator, adapters: Mapping[str, Adapter], texts: Mapping[str, Dataset]) -> None:
    """Raise LoraloomError that tells which adapters have no texts, no head, or one where answers are written."""
    errors: list[LoraloomError] = []
    if isinstance(model, Generator):
        with collecting(errors):
            odd = writing_problems(adapters.values(), model.tokenizer)
            raise_problems("these answers cannot be compared", odd, "name adapters of the base model that write")
    else:
        for adapter in adapters.values():
            with collecting(errors):
                Head.of(adapter.head, adapter.name)
    problems = [f"no texts for {name!r}" for name in adapters if name not in texts]
    problems += [
        f"{name}: {len(texts[name])} texts, {FEWEST} are the fewest that can differ"
        for name in adapters
        if name in texts and len(texts[name]) < FEWEST
    ]
    with collecting(errors):
        raise_problems("agreement cannot be measured", problems, "give each adapter texts of its task")
    raise_together(errors)
