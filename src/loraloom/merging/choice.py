"""How a merge's rule and scale were chosen: by agreement with the single models (see analysis/agreement.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraloom.files.hashing import json_sha256

if TYPE_CHECKING:
    from datasets import Dataset

LOST = 1.0  # the distance of a model that knows nothing of the task


@dataclass(frozen=True)
class TextsFacts:
    """Which texts of a task were looked at: how many, and the sha256 of them all; never the texts."""

    count: int
    sha256: str

    @classmethod
    def of(cls, rows: Dataset) -> TextsFacts:
        """Return the facts of the texts in `rows`; labels do not count."""
        return cls(len(rows), json_sha256(unlabelled(rows).to_list()))


def unlabelled(rows: Dataset) -> Dataset:
    """Return `rows` without their labels."""
    return rows.select_columns([name for name in rows.column_names if name != "label"])


@dataclass(frozen=True)
class CandidateFacts:
    """One rule at one scale, and how far its merged model is from each single model.

    options: the rule's own, those that differ from its defaults.
    distances: by adapter, in the task's own unit: 0 is the single model itself, 1 a model that knows nothing of the
      task. None of an adapter that answers every text alike, which takes no part.
    """

    rule: str
    options: dict[str, Any]
    scale: float
    distances: dict[str, float | None]

    @property
    def known(self) -> dict[str, float]:
        """Return the distances of the adapters that take part."""
        return {name: distance for name, distance in self.distances.items() if distance is not None}

    @property
    def mean(self) -> float:
        """Return the mean distance over the adapters."""
        return sum(self.known.values()) / len(self.known)

    @property
    def worst(self) -> str:
        """Return the adapter whose model is farthest."""
        return max(self.known, key=lambda name: self.known[name])

    @property
    def lost(self) -> list[str]:
        """Return the adapters of which the merged model answers no better than one that knows nothing of the task."""
        return [name for name, distance in self.known.items() if distance >= LOST]


@dataclass(frozen=True)
class AgreementFacts:
    """Every candidate's distances from the single models on a few unlabelled texts, and which texts they were.

    texts: by adapter. candidates: in the order in which they were tried.
    """

    texts: dict[str, TextsFacts]
    candidates: list[CandidateFacts]

    @property
    def best(self) -> CandidateFacts:
        """Return the candidate of least mean distance, the first of equals."""
        return min(self.candidates, key=lambda candidate: candidate.mean)

    @property
    def chose_scale(self) -> bool:
        """Return whether any rule was tried at several scales."""
        rules = [(candidate.rule, candidate.options) for candidate in self.candidates]
        return any(rule in rules[:index] for index, rule in enumerate(rules))

    @property
    def warnings(self) -> list[str]:
        """Return what may not be meant: tasks that the best candidate loses, adapters that take no part."""
        lost = [
            f"{name}: the chosen candidate answers it no better than a model that knows nothing of it "
            f"(distance {self.best.known[name]:.2g}): merge without it, or give it more weight"
            for name in self.best.lost
        ]
        alike = "its own model answers every text alike, so it took no part in the choice"
        return lost + [f"{name}: {alike}" for name in self.left_out]

    @property
    def left_out(self) -> list[str]:
        """Return the adapters that answer every text alike, and so take no part."""
        return [name for name, distance in self.candidates[0].distances.items() if distance is None]
