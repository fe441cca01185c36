"""`merge --rule auto --scale auto`: chosen without labels, told on the page, kept in the record."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from commands import call, refused, said
from loraloom.adapters.peft import read_adapter, read_provenance
from loraloom.analysis.agreement import CANDIDATES, agreement
from loraloom.study.by_hand import evaluator_of, tasks_of
from loraloom.study.recipe import Recipe


def adapters(finished: Path) -> list[Path]:
    return [finished / "study" / "adapters" / "LoRA" / name for name in ("mood", "tone")]


def auto(finished: Path, output: Path, *words: str) -> Any:
    recipe = finished / "recipe.yaml"
    return said("merge", *adapters(finished), "--recipe", recipe, "--probe-texts", "9", "-o", output, *words)


def test_rule_and_scale_are_those_that_agree_best(finished: Path, tmp_path: Path) -> None:
    told = auto(finished, tmp_path / "out", "--rule", "auto", "--scale", "auto")
    recipe, folders = Recipe.load(finished / "recipe.yaml"), adapters(finished)
    members = {folder.name: read_adapter(folder) for folder in folders}
    texts = {task.name: task.sample("train", 9) for task in tasks_of(recipe, folders)}
    expected = agreement(members, evaluator_of(recipe), texts)
    assert (told["rule"], told["scale"]) == (expected.best.rule, expected.best.scale)
    assert told["scale_from"] == "agreement"
    record = read_provenance(tmp_path / "out")["agreement"]
    assert record["texts"] == {name: vars(one) for name, one in expected.texts.items()}
    assert record["candidates"] == [vars(one) for one in expected.candidates]
    assert len(record["candidates"]) == sum(len(one.scales) for one in CANDIDATES)


def test_the_scale_of_a_given_rule_and_the_rule_at_a_given_scale(finished: Path, tmp_path: Path) -> None:
    told = auto(finished, tmp_path / "scale", "--rule", "ties", "--scale", "auto", "--density", "0.5")
    tried = told["agreement"]["candidates"]
    assert {(one["rule"], one["options"]["density"]) for one in tried} == {("ties", 0.5)}
    assert len({one["scale"] for one in tried}) == len(tried) > 5
    assert (told["options"]["density"], told["scale_from"]) == (0.5, "agreement")
    told = auto(finished, tmp_path / "rule", "--rule", "auto", "--scale", "0.6")
    assert {one["scale"] for one in told["agreement"]["candidates"]} == {0.6} == {told["scale"]}
    assert told["scale_from"] == "asked"


def test_a_rule_that_needs_statistics_takes_them_from_the_recipe(finished: Path, tmp_path: Path) -> None:
    told = auto(finished, tmp_path / "out", "--rule", "regmean", "--scale", "auto", "--dry-run")
    assert told["rule"] == "regmean"
    assert told["scale"] in [one["scale"] for one in told["agreement"]["candidates"]]


def test_the_page_tells_what_was_seen(finished: Path, tmp_path: Path) -> None:
    words = ("merge", *adapters(finished), "--recipe", finished / "recipe.yaml", "--rule", "auto", "--probe-texts", "9")
    done = call(*words, "-o", tmp_path / "out")
    page = " ".join(done.stdout.split())
    assert "candidate mood tone mean" in page
    assert re.search(r"scale [\d.]+, the nearest to the single models, without labels", page)
    assert re.search(r"chosen (tsv|task_arithmetic) [\d.]+: \d\.\d\d from the single models on average", page)
    assert "looked at 9 texts a task, no labels" in page
    assert max(len(line) for line in done.stdout.splitlines() if str(tmp_path) not in line) <= 80


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--rule", "auto"), "name a recipe by --recipe"),
        (("--scale", "auto", "--density", "0.3", "--rule", "auto"), "density: options of a rule"),
        (("--scale", "half"), "--scale 'half': neither a number nor `auto`"),
        (("--scale", "auto", "--rule", "tvs"), "did you mean 'tsv'"),
        (("--scale", "auto", "--rule", "ties", "--density", "3"), "density"),
    ],
)
def test_what_cannot_be_chosen_is_refused(words: tuple[str, ...], told: str, finished: Path, tmp_path: Path) -> None:
    assert told in refused("merge", *adapters(finished), *words, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()
