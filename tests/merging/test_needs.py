"""What a rule needs is made alike wherever it is asked for: by a study, by the commands, by a comparison."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import tiny_study
from loraloom.adapters.peft import WEIGHTS
from loraloom.cli.main import app
from loraloom.study.compare import compare
from loraloom.study.export import run_study
from loraloom.study.recipe import Recipe

# by the rule's need: statistics, and a probe; no number is a default or that of another section
STATISTICS = {"kind": "sample", "texts": 7, "max_length": 5, "batch_size": 3}
RULES = ("regmean", "iteris")
MERGING: list[dict[str, Any]] = [
    {"rule": "regmean", "scales": [1.0]},
    {"rule": "iteris", "scales": [1.0], "texts": 9},
    {"rule": "tsv", "scales": [1.0], "normalise": "response"},
]


@pytest.fixture(autouse=True)
def _loud_again() -> Iterator[None]:
    """Commands silence every library in this process; other tests want to hear them."""
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recipe.yaml and a finished study of it; read it, change nothing."""
    folder = tmp_path_factory.mktemp("needs")
    recipe = tiny_study.write_study(folder, statistics=STATISTICS, merging=MERGING, inits={"LoRA": {"rule": "default"}})
    run_study(Recipe.load(recipe), folder / "study")
    return folder


def adapters(place: Path) -> dict[str, Path]:
    return {name: place / "study" / "adapters" / "LoRA" / name for name in ("mood", "tone")}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def of_stage(study: Path, rule: str) -> dict[str, torch.Tensor]:
    """Return what a study merged by `rule`, at scale 1."""
    (found,) = (study / "stages" / "merge").glob(f"*{rule}*/adapter")
    return weights(found)


def by_command(place: Path, out: Path, *words: str) -> dict[str, torch.Tensor]:
    given = [*adapters(place).values(), "--recipe", place / "recipe.yaml", "--scale", "1", "-o", out, *words]
    done = CliRunner().invoke(app, ["merge", *map(str, given), "--json"], catch_exceptions=False)
    assert (done.exit_code, done.stderr) == (0, "")
    return weights(out)


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("rule", RULES)
def test_a_study_and_the_command_merge_alike_to_the_bit(rule: str, place: Path, tmp_path: Path) -> None:
    assert same(of_stage(place / "study", rule), by_command(place, tmp_path / "out", "--rule", rule))


def test_a_study_and_the_command_normalise_alike_to_the_bit(place: Path, tmp_path: Path) -> None:
    """By the same statistics, though the rule takes none."""
    loud = by_command(place, tmp_path / "loud", "--rule", "tsv", "--normalise", "response")
    assert same(of_stage(place / "study", "tsv"), loud)
    assert not same(loud, by_command(place, tmp_path / "plain", "--rule", "tsv"))


@pytest.mark.parametrize("rule", RULES)
def test_texts_are_those_of_the_probe_alone(rule: str, place: Path, tmp_path: Path) -> None:
    fewer = by_command(place, tmp_path / "out", "--rule", rule, "--probe-texts", "3")
    assert same(of_stage(place / "study", rule), fewer) == (rule == "regmean")


def test_a_comparison_merges_alike_to_the_bit(place: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(place / "recipe.yaml")
    compare(adapters(place), recipe, tmp_path / "out", rules=RULES, scales=[1.0])
    for rule in RULES:
        assert same(of_stage(tmp_path / "out", rule), of_stage(place / "study", rule))
    found = compare(adapters(place), recipe, tmp_path / "loud", rules=["tsv"], scales=[1.0], normalise="response")
    assert same(of_stage(tmp_path / "loud", "tsv"), of_stage(place / "study", "tsv"))
    assert {one.options["normalise"] for one in found.merges} == {"response"}  # a way of its own in every table
