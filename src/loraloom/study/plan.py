"""What a run of a recipe would do: its stages, which of them are done, and what the rest takes as far as measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraloom.progress import Reporter
from loraloom.study.engine import Call
from loraloom.study.export import transcript_of
from loraloom.study.recipe import Recipe
from loraloom.study.study import Study


@dataclass(frozen=True)
class Planned:
    """The stages of one kind.

    left: those to do; where `at_most`, no more than these: rows that are not read and scores that are not there decide.
    cpu_seconds, bytes: what one takes and leaves, the mean of those of this kind in the store; None of none.
    """

    kind: str
    done: int
    left: int
    at_most: bool
    cpu_seconds: float | None
    bytes: float | None


def plan_study(recipe: Recipe, folder: str | Path) -> list[Planned]:
    """Return what `run_study` would do in this folder, by kind of stage. Starts nothing and writes nothing.

    recipe: of the study.
    folder: where it is, or is to be.

    Raises LoraloomError for a recipe or a base model that cannot be used.
    """
    study = Study(recipe, folder, Reporter(quiet=True))
    engine = study.engine
    engine.runner = _Nowhere()
    with suppress(_NotMade):
        _ask(study)
    calls = [*engine.waiting, *engine.running.values()]
    found = Counter(engine.store.used[key]["kind"] for key in engine.made)
    left = Counter(call.stage.kind for call in calls)
    records = engine.store.outputs().values()
    return [
        Planned(
            kind,
            found[kind],
            left[kind] if kind in found or kind in left else most,
            at_most=kind not in found and kind not in left,
            cpu_seconds=_mean([record.get("cpu_seconds", record["seconds"]) for record in of_kind]),
            bytes=_mean([sum(file["bytes"] for file in record["files"].values()) for record in of_kind]),
        )
        for kind, most in _at_most(recipe).items()
        for of_kind in [[record for record in records if record["kind"] == kind]]
    ]


def _ask(study: Study) -> None:
    """Ask for all that a run asks for, what needs no scores first."""
    _ = study.merges
    with suppress(_NotMade):
        list(study.interference())
    evaluated = [(one, row) for one, rows in study.evaluations() for row in rows]
    if study.recipe.generates:
        transcript_of(study, evaluated)


class _NotMade(Exception):  # noqa: N818 - it is no error
    """An output was asked for that is not there."""


class _Nowhere:
    """Runs no stage."""

    def submit(self, call: Call) -> None:
        """Leave it."""

    def wait(self, seconds: float) -> list[tuple[str, Exception | None]]:
        """Return that nothing has ended; raise _NotMade for who waits."""
        if seconds:
            raise _NotMade
        return []

    def close(self) -> None:
        """Do nothing."""


def _at_most(recipe: Recipe) -> Mapping[str, int]:
    """Return the most stages of every kind that a recipe asks for, in the order in which they are reached."""
    tasks, runs = len(recipe.tasks), len(recipe.inits or "1") * len(recipe.seeds)
    merges, heldout = runs * len(recipe.ways), runs * sum(len(way.listed) for way in recipe.ways)
    tried = [sum(len(way.listed) for way in entry.tried()) for entry in recipe.merging]
    tests = runs * sum(min(count, 1 if recipe.generates else 2) for count in tried)
    atlas = any(init.off == "atlas" for init in recipe.inits.values())
    first = {"task": tasks, "statistics": 2 * tasks + atlas}
    trained = {"adapter": tasks} if recipe.adapters else {"init": runs * tasks, "train": runs * tasks}
    alone = {"single": runs * tasks, **({"base": tasks} if recipe.generates else {})}
    agreed = {"own": runs * tasks, "agreement": heldout} if recipe.evaluation.agreement else {}
    after = {"merge": merges, "heldout": heldout, **agreed, "test": tests, "interference": runs}
    return {**first, **trained, **alone, **after, **({"transcript": 1} if recipe.generates else {})}


def _mean(values: list[Any]) -> float | None:
    return sum(values) / len(values) if values else None
