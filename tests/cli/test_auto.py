"""`merge --rule auto --scale auto`: chosen without labels, told on the page, kept in the record."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from commands import call, refused, said
from loraloom.adapters.peft import read_adapter, read_provenance, write_adapter
from loraloom.adapters.update import Adapter, Update
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


def test_files_of_texts_are_enough(finished: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(finished / "recipe.yaml")
    words: list[Any] = []
    for task in tasks_of(recipe, adapters(finished)):
        rows = [{"note": text, "unread": 1} for text in task.sample("train", 9)["text_a"]]
        path = tmp_path / f"{task.name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        words += ["--unlabelled", path]
    words += ["--column", "note", "--base", finished / "base", "--rule", "auto"]
    told = said("merge", *adapters(finished), *words, "-o", tmp_path / "out")
    expected = auto(finished, tmp_path / "recipe", "--rule", "auto")["agreement"]
    assert told["agreement"]["texts"] == expected["texts"]
    for one, two in zip(told["agreement"]["candidates"], expected["candidates"], strict=True):
        assert one["distances"] == pytest.approx(two["distances"], rel=1e-4)


def test_adapters_that_write_are_chosen_for_by_what_they_write(tmp_path: Path) -> None:
    base = tiny.base_folder("llama", tmp_path / "base")
    words: list[Any] = []
    for seed, name in enumerate(("one", "two")):
        generator = torch.Generator().manual_seed(seed)
        path = "model.layers.0.self_attn.q_proj"
        update = Update(torch.randn(16, 2, generator=generator), torch.randn(2, 16, generator=generator))
        config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "target_modules": ["q_proj"]}
        write_adapter(Adapter({path: update}, config), tmp_path / name, provenance={})
        (tmp_path / f"{name}.csv").write_text("text\n" + "\n".join(tiny.task(name, rows=4).train["text_a"]) + "\n")
        words += [tmp_path / name, "--unlabelled", tmp_path / f"{name}.csv"]
    told = said("merge", *words, "--scale", "auto", "--rule", "task_arithmetic", "-o", tmp_path / "out")
    tried = told["agreement"]["candidates"]
    assert told["scale"] == min(tried, key=lambda one: sum(one["distances"].values()))["scale"]
    assert all(one["distances"][name] > 0 for one in tried for name in ("one", "two"))


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
        (("--rule", "auto"), "name a recipe by --recipe, or a file for each by --unlabelled"),
        (("--unlabelled", "texts.jsonl"), "--unlabelled: is read by --rule auto, --scale auto and --rule distil"),
        (("--scale", "auto", "--unlabelled", "texts.jsonl"), "1 files of texts for 2 adapters"),
        (("--scale", "auto", "--unlabelled", "a.jsonl", "--unlabelled", "b.jsonl"), "a.jsonl"),
        (("--scale", "auto", "--density", "0.3", "--rule", "auto"), "density: options of a rule"),
        (("--scale", "half"), "--scale 'half': neither a number nor `auto`"),
        (("--scale", "auto", "--rule", "tvs"), "did you mean 'tsv'"),
        (("--scale", "auto", "--rule", "ties", "--density", "3"), "density"),
    ],
)
def test_what_cannot_be_chosen_is_refused(words: tuple[str, ...], told: str, finished: Path, tmp_path: Path) -> None:
    assert told in refused("merge", *adapters(finished), *words, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rules_are_compared_without_labels(finished: Path, tmp_path: Path) -> None:
    words = ("compare", *adapters(finished), "--recipe", finished / "recipe.yaml", "--no-labels")
    some = ("--rule", "tsv", "--rule", "regmean", "--scale", "0.5", "--scale", "1")
    told = said(*words, *some, "-o", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "agreement.json").read_text())
    tried = [(one["rule"], one["scale"]) for one in written["candidates"]]
    assert tried == [("tsv", 0.5), ("tsv", 1.0), ("regmean", 0.5), ("regmean", 1.0)]
    assert told["candidates"] == written["candidates"]
    page = " ".join(call(*words, *some, "-o", tmp_path / "out").stdout.split())
    assert "Every rule at its nearest scale" in page
    assert "chosen" in page
    assert "rule 'soups' learns from labels" in refused(*words, "--rule", "soups", "-o", tmp_path / "other")


def test_both_choices_stand_beside_the_scores(finished: Path, tmp_path: Path) -> None:
    words = ("compare", *adapters(finished), "--recipe", finished / "recipe.yaml", "--agreement")
    some = ("--rule", "tsv", "--rule", "soups", "--scale", "0.25", "--scale", "1")
    told = said(*words, *some, "-o", tmp_path / "out")
    near = json.loads((tmp_path / "out" / "agreement.json").read_text())["candidates"]
    (choice,) = told["choices"]  # soups learns from labels
    means = {one["scale"]: sum(one["distances"].values()) / 2 for one in near}
    assert choice["agreement"]["scale"] == min(means, key=means.__getitem__)
    assert choice["labels"]["distance"] == pytest.approx(means[choice["labels"]["scale"]])
    assert choice["labels"]["heldout"] >= choice["agreement"]["heldout"]
    row = next(one for one in told["rules"] if one["rule"] == "tsv" and not one["aligned"])
    assert row["scales"] == [choice["labels"]["scale"]]
    page = " ".join(call(*words, *some, "-o", tmp_path / "out").stdout.split())
    assert "Scales chosen with held-out labels and without" in page
