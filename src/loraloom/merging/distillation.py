"""What the rule `distil` asks of whoever can train, and what is known of it afterwards: for the record and the card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from loraloom.adapters.update import Update
from loraloom.merging.choice import TextsFacts

Loss = Literal["output", "features", "both"]
Source = Literal["own texts", "generic text", "kept near its start"]


@dataclass(frozen=True)
class Distilling:
    """How a merged adapter is distilled; None takes what suits the kind of the tasks.

    steps: of the optimiser at most, each on a batch of every task. loss: of outputs, of the features that a head reads,
    or both. batch_size: texts of a task. learning_rate: at the start; it falls to 0.
    """

    steps: int | None = None
    loss: Loss = "output"
    batch_size: int | None = None
    learning_rate: float | None = None


@dataclass(frozen=True)
class LessonFacts:
    """What one task was distilled from, and how far the result is from its teacher on texts that were held out.

    source: the task's own texts; generic text, answered by its adapter; or generic text, answered by the start, which
      the result is kept near. heldout: of the texts. before, after: the distance in the task's own unit, of the start
      and of the result; None where the teacher answers all texts alike, so that the task took no part.
    """

    source: Source
    texts: TextsFacts
    heldout: int
    before: float | None
    after: float | None


@dataclass(frozen=True)
class DistilledFacts:
    """How a merged adapter was distilled without labels: options in force, the step that was best, and every task.

    best_step: 0 where no step came nearer than the start, which was kept. start: the sha256 of a merged adapter that
    was given to start from; None where the rule's own start was taken.
    """

    steps: int
    best_step: int
    loss: Loss
    batch_size: int
    learning_rate: float
    start: str | None
    tasks: dict[str, LessonFacts]


class Distiller(Protocol):
    """A base model, the single adapters and their unlabelled texts: `training.distil.ByTeachers` is one."""

    @property
    def start(self) -> Mapping[str, Update] | None:
        """Return the merged adapter to start from, by module path; None leaves it to the rule."""

    @property
    def facts(self) -> DistilledFacts | None:
        """Return what was done; None before it was."""

    @property
    def warnings(self) -> list[str]:
        """Return what may not be meant."""

    def train(self, start: Mapping[str, Update], asked: Distilling, seed: int) -> dict[str, Update]:
        """Return `start`, by module path and in its ranks, trained to answer as each single adapter does."""
