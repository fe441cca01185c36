"""What a run would do is told before it, by what is there; nothing is started and nothing written."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from loraloom.study.plan import Planned, plan_study
from loraloom.study.recipe import Recipe
from loraloom.study.store import Store

UNKNOWN_BEFORE_SCORES = {"test"}


def planned(recipe: Path, folder: Path) -> dict[str, Planned]:
    return {one.kind: one for one in plan_study(Recipe.load(recipe), folder)}


def outputs(study: Path) -> Counter[str]:
    return Counter(record["kind"] for record in Store(study / "stages").outputs().values())


def state(folder: Path) -> dict[str, int]:
    return {path: os.stat(path).st_mtime_ns for path in map(str, folder.rglob("*"))}


def test_of_a_finished_study_nothing_is_left(finished: Path) -> None:
    before = state(finished)
    found = planned(finished / "recipe.yaml", finished / "study")
    assert {kind: one.done for kind, one in found.items()} == outputs(finished / "study")
    assert not any(one.left or one.at_most for one in found.values())
    assert state(finished) == before


def test_of_a_new_study_all_is_left(finished: Path, tmp_path: Path) -> None:
    found = planned(finished / "recipe.yaml", tmp_path / "study")
    made = outputs(finished / "study")
    assert {kind: one.left for kind, one in found.items() if kind not in UNKNOWN_BEFORE_SCORES} == {
        kind: count for kind, count in made.items() if kind not in UNKNOWN_BEFORE_SCORES
    }
    assert found["test"].left >= made["test"]
    assert all(one.at_most and one.cpu_seconds is None for kind, one in found.items() if kind != "task")
    assert list(tmp_path.iterdir()) == []


def test_what_another_seed_adds_is_told_by_what_the_first_one_took(finished: Path) -> None:
    chosen = Recipe.load(finished / "recipe.yaml").model_copy(update={"seeds": [0, 1]})
    made, found = outputs(finished / "study"), {one.kind: one for one in plan_study(chosen, finished / "study")}
    for kind in ("task", "statistics"):
        assert (found[kind].done, found[kind].left) == (made[kind], 0)
    for kind in ("init", "train", "single", "merge", "heldout", "interference"):
        assert (found[kind].done, found[kind].left, found[kind].at_most) == (made[kind], made[kind], False)
    assert found["test"].at_most
    records = [one for one in Store(finished / "study" / "stages").outputs().values() if one["kind"] == "train"]
    assert found["train"].cpu_seconds == sum(one["cpu_seconds"] for one in records) / len(records) > 0
    sizes = [file["bytes"] for one in records for file in one["files"].values()]
    assert found["train"].bytes == sum(sizes) / len(records)


def test_of_tasks_of_answers_too(written: Path, tmp_path: Path) -> None:
    made = outputs(written / "study")
    assert {one.kind: one.done for one in plan_study(Recipe.load(written / "recipe.yaml"), written / "study")} == made
    new = {one.kind: one.left for one in plan_study(Recipe.load(written / "recipe.yaml"), tmp_path / "study")}
    assert new == made
