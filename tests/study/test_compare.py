"""Every rule on finished adapters: the figures of the study that trained them, once, and from tasks and base alone."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tiny_study
from loraloom.adapters.peft import CONFIG, WEIGHTS, read_adapter, read_provenance
from loraloom.cli.main import app
from loraloom.errors import LoraloomError
from loraloom.merging.readout import read_readout
from loraloom.progress import Reporter
from loraloom.results import MergeScore, StudyResult
from loraloom.study.by_hand import evaluate_folder
from loraloom.study.compare import by_task, compare
from loraloom.study.engine import Here
from loraloom.study.parts import GIVEN
from loraloom.study.recipe import Recipe
from loraloom.study.stages import merged_adapters
from loraloom.study.study import Study

RULES, SCALES = ("task_arithmetic", "tsv", "emr"), (0.5, 1.0)


@pytest.fixture(autouse=True)
def _loud_again() -> Iterator[None]:
    """Commands silence every library in this process; other tests want to hear them."""
    yield
    logging.disable(logging.NOTSET)


def adapters(finished: Path) -> dict[str, Path]:
    return {name: finished / "study" / "adapters" / "LoRA" / name for name in ("mood", "tone")}


@pytest.fixture(scope="module")
def compared(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison by RULES at SCALES; read it, change nothing."""
    folder = tmp_path_factory.mktemp("compared") / "out"
    recipe = Recipe.load(finished / "recipe.yaml")
    compare(
        adapters(finished), recipe, folder, rules=RULES, scales=SCALES, normalise="none", command="loraloom compare"
    )
    return folder


def by_case(merges: list[MergeScore], init: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return figures by rule, scale, heads and rows."""
    own = {"init", "chosen_by"}
    return {
        (one.rule, one.scale, one.aligned, one.split): one.model_dump(exclude=own) for one in merges if one.init == init
    }


def test_the_figures_are_those_of_the_study(finished: Path, compared: Path) -> None:
    study, ours = (StudyResult.load(folder / "results.json") for folder in (finished / "study", compared))
    theirs, found = by_case(study.merges, "LoRA"), by_case(ours.merges, GIVEN)
    heldout = {case for case in theirs if case[-1] == "heldout"}
    assert len(heldout) == 6  # task arithmetic at two scales and tsv at one, with and without alignment
    both = set(theirs) & set(found)
    assert heldout <= both
    assert ("test",) in {case[3:] for case in both}
    for case in both:
        assert found[case] == theirs[case], case
    singles = {one.task: one.score for one in study.singles if one.init == "LoRA"}
    assert {one.task: one.score for one in ours.singles} == singles
    after = [one for one in study.interference if (one.init, one.when) == ("LoRA", "after")]
    assert [one.model_copy(update={"init": "LoRA"}) for one in ours.interference] == after
    assert (ours.content_sha256, ours.base_sha256) == (study.content_sha256, study.base_sha256)


def test_every_rule_at_every_scale_and_one_test_score_each(compared: Path) -> None:
    result = StudyResult.load(compared / "results.json")
    heldout = [one for one in result.merges if one.split == "heldout"]
    cases = {(one.rule, one.scale, one.aligned) for one in heldout}
    assert cases == {(rule, scale, aligned) for rule in RULES for scale in SCALES for aligned in (False, True)}
    assert len(heldout) == len(cases)
    for rule in RULES:
        for aligned in (False, True):
            rows = [one for one in result.merges if (one.rule, one.aligned) == (rule, aligned)]
            (test,) = [one for one in rows if one.split == "test"]
            assert test.chosen_by == "labels"
            best = max(one.average.value for one in rows if one.split == "heldout")
            chosen = next(one for one in rows if one.split == "heldout" and one.scale == test.scale)
            assert chosen.average.value == best
    assert result.command == "loraloom compare"
    assert [one.name for one in result.inits] == [GIVEN]
    assert set(result.inits[0].options["sha256"]) == {"mood", "tone"}


def test_what_is_written(finished: Path, compared: Path) -> None:
    assert {path.name for path in compared.iterdir()} == {"merged", "report.html", "results.json", "stages"}
    page = (compared / "report.html").read_text(encoding="utf-8")
    assert all(rule in page for rule in RULES)
    (init,) = (compared / "merged").iterdir()
    assert {path.name for path in init.iterdir()} == set(RULES)
    for rule in RULES:
        merged = read_adapter(init / rule)
        assert set(merged.shapes) == set(read_adapter(adapters(finished)["mood"]).shapes)
        assert {path.stem for path in (init / rule / "heads").iterdir()} == {"mood", "tone"}
    assert (init / "emr" / "readouts").is_dir()


def test_every_reported_score_is_that_of_the_folder_written(finished: Path, compared: Path) -> None:
    """For emr by what each task reads; the folders hold the aligned heads and the chosen scale."""
    result = StudyResult.load(compared / "results.json")
    (init,) = (compared / "merged").iterdir()
    for rule in RULES:
        (reported,) = [one for one in result.merges if (one.rule, one.aligned, one.split) == (rule, True, "test")]
        found = evaluate_folder(Recipe.load(finished / "recipe.yaml"), init / rule, [], "test")
        assert {task: score for task, (_, score) in found.items()} == reported.scores
        assert read_provenance(init / rule)["scale"] == reported.scale


def test_what_each_task_reads_is_scaled(compared: Path) -> None:
    (unscaled,) = (compared / "stages" / "merge").glob("*emr*/adapter")
    (init,) = (compared / "merged").iterdir()
    chosen = read_provenance(init / "emr")["scale"]
    for task, half in merged_adapters(unscaled, 0.5, ["mood", "tone"]).items():
        whole, written = read_readout(unscaled, task), read_readout(init / "emr", task)
        for module in half.shapes:
            expected = whole.updates[module].dense()
            torch.testing.assert_close(half.updates[module].dense(), 0.5 * expected)
            torch.testing.assert_close(written.updates[module].dense(), chosen * expected)


def test_a_second_run_does_nothing_new(finished: Path, compared: Path, tmp_path: Path) -> None:
    shutil.copytree(compared, tmp_path / "out")
    stages = tmp_path / "out" / "stages"
    before = {path: path.stat().st_mtime_ns for path in stages.rglob("*") if path.is_file()}
    recipe = Recipe.load(finished / "recipe.yaml")
    result = compare(adapters(finished), recipe, tmp_path / "out", rules=RULES, scales=SCALES, normalise="none")
    assert {path: path.stat().st_mtime_ns for path in stages.rglob("*") if path.is_file()} == before
    first = tiny_study.figures(compared / "results.json")
    assert tiny_study.figures(tmp_path / "out" / "results.json") == first
    assert result == StudyResult.load(tmp_path / "out" / "results.json")


def test_other_rows_are_evaluated_anew(finished: Path, tmp_path: Path) -> None:
    """Nothing was trained on rows here, and yet every figure is of them."""
    for path in finished.glob("*.jsonl"):
        shutil.copy2(path, tmp_path)
    recipe = Recipe.parse(tiny_study.recipe(base=str(finished / "base")), "r").resolved(tmp_path)
    first = on_test_rows(compare(adapters(finished), recipe, tmp_path / "out", rules=["tsv"], scales=[1.0]))
    rows = [json.loads(line) for line in (tmp_path / "mood.test.jsonl").read_text().splitlines()]
    turned = [{**row, "mood": {"good": "bad", "bad": "good"}[row["mood"]]} for row in rows]
    (tmp_path / "mood.test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turned))
    again = on_test_rows(compare(adapters(finished), recipe, tmp_path / "out", rules=["tsv"], scales=[1.0]))
    assert again == {case: pytest.approx(1 - score if case[0] == "mood" else score) for case, score in first.items()}


def on_test_rows(result: StudyResult) -> dict[tuple[str, str], float]:
    """Return accuracies on test rows by task and way."""
    found = {(one.task, "alone"): one.score.value for one in result.singles}
    for one in result.merges:
        if one.split == "test":
            found |= {(task, f"aligned {one.aligned}"): score.value for task, score in one.scores.items()}
    return found


def test_a_further_rule_merges_alone(finished: Path, compared: Path, tmp_path: Path) -> None:
    shutil.copytree(compared, tmp_path / "out")
    recipe = Recipe.load(finished / "recipe.yaml")
    before = {path.name for path in (tmp_path / "out" / "stages").glob("*/*") if path.is_dir()}
    compare(adapters(finished), recipe, tmp_path / "out", rules=[*RULES, "weighted"], scales=SCALES, normalise="none")
    new = {path.name for path in (tmp_path / "out" / "stages").glob("*/*") if path.is_dir()} - before
    assert new
    assert all("weighted" in name for name in new)


def test_base_and_tasks_are_enough(finished: Path, tmp_path: Path) -> None:
    """By a rule that looks at texts too: its layers are those of the adapters, whatever the recipe's targets."""
    tasks = tiny_study.recipe()["tasks"]
    for name in tasks:
        for split, count in {"train": 220, "test": 16}.items():
            tiny_study.write_rows(tmp_path / f"{name}.{split}.jsonl", f"{name}.{split}", count)
    recipe = {"name": "few words", "base": str(finished / "base"), "tasks": tasks}
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(recipe))
    words = [*adapters(finished).values(), "--recipe", tmp_path / "tasks.yaml", "-o", tmp_path / "out"]
    words += ["--rule", "regmean", "--rule", "weighted", "--scale", "1", "--json"]
    done = CliRunner().invoke(app, ["compare", *map(str, words)], catch_exceptions=False)
    assert (done.exit_code, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert told["results"] == str(tmp_path / "out" / "results.json")
    rows = {(one["rule"], one["aligned"]): one for one in told["rules"]}
    assert set(rows) == {(name, aligned) for name in ("regmean", "weighted") for aligned in (False, True)}
    assert rows["weighted", False]["scales"] == [1.0]
    assert rows["weighted", False]["chosen_by"] is None
    result = StudyResult.load(tmp_path / "out" / "results.json")
    assert {(one.rule, one.scale) for one in result.merges} == {("regmean", 1.0), ("weighted", 1.0)}
    assert not any(one.chosen_by for one in result.merges)
    assert {len(table.layers) for table in result.interference} == {4}


# refusals


def headless(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    tensors = {name: one for name, one in load_file(folder / WEIGHTS).items() if "lora_" in name}
    save_file(tensors, folder / WEIGHTS)
    return folder


def test_all_that_is_wrong_is_told_at_once(finished: Path, tmp_path: Path) -> None:
    mood = adapters(finished)["mood"]
    bare = headless(mood, tmp_path / "bare")
    odd = headless(mood, tmp_path / "odd")
    config = json.loads((odd / CONFIG).read_text())
    (odd / CONFIG).write_text(json.dumps({**config, "use_dora": True}))
    given = {"mood": bare, "ton": mood, "gone": tmp_path / "gone", "odd": odd}
    with pytest.raises(LoraloomError) as caught:
        compare(given, Recipe.load(finished / "recipe.yaml"), tmp_path / "out")
    for part in (
        "the recipe has no task 'ton': did you mean 'tone'",
        "the recipe has no task 'gone'",
        f"{tmp_path / 'gone'}: not an adapter folder",
        "use_dora",
        f"{bare}: has no head",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "out").exists()


def without(adapter: Path, folder: Path, part: str) -> Path:
    """Copy an adapter, but for its layers whose path holds `part`."""
    shutil.copytree(adapter, folder)
    tensors = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if part not in name}
    save_file(tensors, folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    targets = sorted(read_adapter(folder).shapes)
    (folder / CONFIG).write_text(json.dumps({**config, "target_modules": targets, "rank_pattern": {}}))
    return folder


def test_adapters_of_different_layers_compare(finished: Path, tmp_path: Path) -> None:
    given = {
        name: without(path, tmp_path / name, part)
        for (name, path), part in zip(adapters(finished).items(), ("value", "layer.0."), strict=True)
    }
    rules, out = ("task_arithmetic", "regmean", "emr"), tmp_path / "out"
    recipe = Recipe.load(finished / "recipe.yaml")
    result = compare(given, recipe, out, rules=rules, scales=(1.0,))
    assert {one.rule for one in result.merges} == set(rules)
    members = {name: read_adapter(path) for name, path in given.items()}
    layers = set().union(*(member.shapes for member in members.values()))
    assert [len(member.shapes) for member in members.values()] == [2, 2]
    assert len(layers) == 3
    (folder,) = (out / "stages" / "merge").glob("*task_arithmetic*/adapter")
    merged = read_adapter(folder)
    assert set(merged.shapes) == layers
    for layer in layers:
        parts = [member.updates[layer].dense() for member in members.values() if layer in member.shapes]
        torch.testing.assert_close(merged.updates[layer].dense(), sum(parts))
    (table,) = [one for one in result.interference if one.quantity == "BA"]
    for index, layer in enumerate(table.layers):
        for values, member in zip(table.values[index], members.values(), strict=True):
            assert all(value == 0 for value in values) == (layer not in member.shapes)
    assert 0 < table.ratio < float("inf")
    assert "nan" not in (out / "report.html").read_text().lower().split("<script")[0]


def test_one_adapter_is_nothing_to_compare(finished: Path, tmp_path: Path) -> None:
    one = {"mood": headless(adapters(finished)["mood"], tmp_path / "bare")}
    with pytest.raises(LoraloomError, match="2 problems") as caught:
        compare(one, Recipe.load(finished / "recipe.yaml"), tmp_path / "out")
    assert "1 adapters: there is nothing to merge" in str(caught.value)
    assert "has no head" in str(caught.value)


def test_every_unknown_rule_is_told(finished: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(finished / "recipe.yaml")
    with pytest.raises(LoraloomError, match="2 problems") as caught:
        compare(adapters(finished), recipe, tmp_path / "out", rules=["tis", "ties", "emrr"])
    assert "no merging rule is called 'tis'; did you mean 'ties'" in str(caught.value)
    assert "no merging rule is called 'emrr'; did you mean 'emr'" in str(caught.value)


def test_an_unknown_rule_is_told_with_the_rest(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(LoraloomError, match="'tis'") as caught:
        compare({}, Recipe.load(finished / "recipe.yaml"), tmp_path / "out", rules=["tis"])
    assert "0 adapters" in str(caught.value)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--scale 1 --scale inf --rule ties", "scale inf is not finite"),
        ("--scale nan --rule ties", "scale nan is not finite"),
        ("--rule ties --rule ties", "rule 'ties' is given twice"),
        ("--rule ties,tsv", "did you mean --rule ties --rule tsv?"),
        ("--scale 0.5,1", "did you mean --scale 0.5 --scale 1?"),
        ("--scale much", "'much' is not a number"),
        ("--rules ties", "no such option: --rules"),
    ],
)
def test_odd_words_are_refused_without_a_traceback(words: str, told: str, finished: Path, tmp_path: Path) -> None:
    given = [*adapters(finished).values(), "--recipe", finished / "recipe.yaml", "-o", tmp_path / "out", *words.split()]
    done = CliRunner().invoke(app, ["compare", *map(str, given)])
    assert done.exit_code == 2, done.exception
    assert told in " ".join(done.stderr.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_two_adapters_of_one_task(finished: Path, tmp_path: Path) -> None:
    mood = adapters(finished)["mood"]
    shutil.copytree(mood, tmp_path / "other")
    with pytest.raises(LoraloomError, match="are both of task 'mood'"):
        by_task([mood, tmp_path / "other"])
    assert by_task(list(adapters(finished).values())) == adapters(finished)


def test_no_base_is_loaded_and_nothing_trained(finished: Path, compared: Path) -> None:
    stages = {path.name for path in (compared / "stages").iterdir() if path.is_dir()}
    assert {"adapter", "merge", "heldout", "test"} <= stages
    assert not {"init", "train"} & stages
    merging = Recipe.parse(json.loads((compared / "results.json").read_text())["recipe"], "results").merging
    changes = {"inits": {}, "adapters": adapters(finished), "merging": merging}
    recipe = Recipe.load(finished / "recipe.yaml").model_copy(update=changes)
    study = Study(recipe, compared, Reporter(quiet=True))
    assert len(list(study.evaluations())) == 1
    assert isinstance(study.engine.runner, Here)
    assert study.engine.runner.worker.loaded is None
