"""A study does each thing once, goes on after a kill, and finds what is wrong with its inputs before it trains."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import tiny_study
from loraloom.adapters.peft import read_adapter, read_provenance
from loraloom.errors import LoraloomError
from loraloom.files.outputs import RECORD
from loraloom.progress import Reporter
from loraloom.results import StudyResult
from loraloom.study.by_hand import evaluate_folder
from loraloom.study.engine import Here
from loraloom.study.export import run_study
from loraloom.study.recipe import Recipe
from loraloom.study.store import Store
from loraloom.study.study import Study
from tiny_launch import start, start_loraloom


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished study that a test may change; the base model and rows stay where they are."""
    shutil.copytree(finished / "study", tmp_path / "study")
    return tmp_path / "study"


def changed(finished: Path, **changes: Any) -> Recipe:
    return Recipe.parse(tiny_study.recipe(**changes), "r").resolved(finished)


def computed(recipe: Recipe, folder: Path) -> tuple[Study, Counter[str]]:
    """Run every stage; return the study and how many stages of each kind it had to compute."""
    before = records(folder)
    study = Study(recipe, folder, Reporter(quiet=True))
    list(study.evaluations())
    list(study.interference())
    made = [path for path, when in records(folder).items() if before.get(path) != when]
    return study, Counter(path.parent.parent.name for path in made)


def records(folder: Path) -> dict[Path, int]:
    """Return when each stage output was made."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("stages/*/*/stage.json")}


def train_section(**changes: Any) -> dict[str, Any]:
    return {**tiny_study.recipe()["training"], **changes}


def test_a_second_run_does_nothing(finished: Path, copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file() and "stages" in path.parts}
    started = time.monotonic()
    study, counts = computed(changed(finished), copy)
    assert time.monotonic() - started < 5
    assert not counts
    assert isinstance(study.engine.runner, Here)
    assert study.engine.runner.worker.loaded is None
    result = run_study(changed(finished), copy, command="again")
    after = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file() and "stages" in path.parts}
    assert {path for path in before if path.suffix != ".lock"} == {path for path in after if path.suffix != ".lock"}
    assert all(after[path] == when for path, when in before.items() if path.suffix != ".lock")
    assert result.command == "again"
    assert tiny_study.figures(copy / "results.json") == tiny_study.figures(finished / "study" / "results.json")


RULES = tiny_study.recipe()["merging"]


AFTER_TRAINING = {"single", "own", "merge", "heldout", "agreement", "test", "interference"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"merging": [{**RULES[0], "scales": [0.5, 1.0, 0.7]}, RULES[1]]}, {"heldout", "agreement", "test"}),
        ({"merging": [*RULES, {"rule": "svd", "scales": [1.0]}]}, {"merge", "heldout", "agreement", "test"}),
        ({"alignment": {"texts": 10, "ridge": 0.5}}, {"heldout", "agreement", "test"}),
        (
            {"training": train_section(learning_rate=0.02)},
            {"train", *AFTER_TRAINING},
        ),
        ({"training": train_section(epochs=1)}, {"train", *AFTER_TRAINING}),
        ({"inits": {"renamed": {"rule": "default", "description": "in other words"}}}, set()),
        ({"name": "another"}, set()),
    ],
    ids=["scale", "rule", "ridge", "rate", "epochs", "renamed", "name"],
)
def test_a_change_computes_what_depends_on_it(
    finished: Path, copy: Path, changes: dict[str, Any], expected: set[str]
) -> None:
    one_init = {"inits": {"LoRA": {"rule": "default"}}}
    _, counts = computed(changed(finished, **{**one_init, **changes}), copy)
    assert set(counts) | {"test"} == expected | {"test"}  # at a scale that is the best already


def test_epochs_of_one_task_retrain_that_task_alone(finished: Path, copy: Path) -> None:
    tasks = tiny_study.recipe()["tasks"]
    tasks["mood"]["epochs"] = 1
    _, counts = computed(changed(finished, tasks=tasks, inits={"LoRA": {"rule": "default"}}), copy)
    assert counts["train"] == counts["single"] == 1
    assert not {"task", "statistics", "init"} & set(counts)


def test_a_task_named_atlas_does_not_hide_the_atlas(finished: Path, tmp_path: Path) -> None:
    tasks = tiny_study.recipe()["tasks"]
    tasks = {"atlas": tasks["mood"], "tone": tasks["tone"]}
    statistics = tiny_study.recipe()["statistics"]
    common = {"tasks": tasks, "inits": {"apart": {"rule": "apart"}}, "training": train_section(epochs=1)}
    starts = []
    for count in (20, 30):
        recipe = changed(finished, **common, statistics={**statistics, "atlas_texts": count})
        starts.append(Study(recipe, tmp_path, Reporter(quiet=True)).trained[0].starts["atlas"])
    assert starts[0].stage.key != starts[1].stage.key


def test_an_adapter_stage_that_was_harmed_is_made_again(finished: Path, copy: Path) -> None:
    folders = sorted((copy / "stages" / "train").iterdir())
    shutil.rmtree(folders[0])
    weights = folders[1] / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    _, counts = computed(changed(finished), copy)
    assert counts == {"train": 2}
    for folder in folders[:2]:
        name = "adapter/adapter_model.safetensors"
        made, first = load_file(folder / name), load_file(finished / "study" / "stages" / "train" / folder.name / name)
        assert all(bool((made[key] == first[key]).all()) for key in first)


def test_an_adapter_stage_changed_in_place_is_made_again(finished: Path, copy: Path) -> None:
    weights = next((copy / "stages" / "train").glob("LoRA.*.mood-*/adapter/adapter_model.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(b"\xff" * len(whole))
    shutil.rmtree(copy / "stages" / "merge")
    _, counts = computed(changed(finished), copy)
    assert (counts["train"], counts["merge"]) == (1, 4)
    assert weights.read_bytes() == whole


def test_the_exports_are_what_the_results_say(finished: Path) -> None:
    """PEFT loads every folder, and `evaluate` finds the scores of results.json with the heads beside it."""
    recipe, study = changed(finished), finished / "study"
    result = json.loads((study / "results.json").read_text())
    for single in result["singles"]:
        if single["task"] == "mood":
            folder = study / "adapters" / single["init"].replace(", ", "-") / "mood"
            assert evaluate_folder(recipe, folder, [], "test")["mood"][1].model_dump() == single["score"]
    tested = [merge for merge in result["merges"] if merge["split"] == "test" and merge["aligned"]]
    assert len(tested) == 4
    assert {merge["scale"] for merge in tested} == {0.5, 1.0}
    for merge in tested:
        folder = study / "merged" / merge["init"].replace(", ", "-") / merge["rule"]
        found = evaluate_folder(recipe, folder, [], "test")
        assert {name: score.model_dump() for name, (_, score) in found.items()} == merge["scores"]
        model = AutoModelForSequenceClassification.from_pretrained(recipe.base)
        loaded = PeftModel.from_pretrained(model, str(folder))
        assert any("lora_A" in name for name, _ in loaded.named_parameters())
        slug = merge["init"].replace(", ", "-")
        unscaled = next((study / "stages" / "merge").glob(f"{slug}.s0.{merge['rule']}-*")) / "adapter"
        for module, update in read_adapter(unscaled).updates.items():
            assert (read_adapter(folder).updates[module].dense() - merge["scale"] * update.dense()).abs().max() < 1e-6
        facts, card = read_provenance(folder), (folder / "README.md").read_text()
        assert facts["scale"] == merge["scale"]
        assert f"\n- scale: {merge['scale']:g}, as asked for\n" in card
        assert "aligned to the merged features" in card


def test_one_rule_with_two_sets_of_options_is_two_folders(finished: Path, copy: Path) -> None:
    merging = [{"rule": "ties", "scales": [1.0], "options": {"density": density}} for density in (0.3, 0.6)]
    run_study(changed(finished, merging=merging), copy)
    folders = sorted(path for path in (copy / "merged" / "LoRA").iterdir() if path.name.startswith("ties"))
    assert [read_provenance(folder)["options"]["density"] for folder in folders] == [0.3, 0.6]


def test_another_alignment_changes_the_exported_heads(finished: Path, copy: Path) -> None:
    heads = copy / "merged" / "LoRA" / "tsv" / "heads" / "mood.safetensors"
    before = load_file(heads)
    run_study(changed(finished, alignment={"texts": 10, "ridge": 5.0}), copy)
    assert any(bool((load_file(heads)[key] != before[key]).any()) for key in before)


# What is wrong with the inputs is found before training, all of it at once.


def refused(folder: Path, **changes: Any) -> str:
    with pytest.raises(LoraloomError) as told:
        run_study(Recipe.load(tiny_study.write_recipe(folder, **changes)), folder / "study")
    assert not list(folder.glob("study/stages/train/*"))
    assert not list(folder.glob("study/stages/*/.*"))
    assert not (folder / "study" / "results.json").exists()
    return str(told.value)


def test_faults_of_all_tasks_are_told_together(tmp_path: Path) -> None:
    tiny_study.write_study(tmp_path)
    rows = [{"text": "good", "mood": "good"}, {"text": "", "mood": "bad"}, {"text": "bad", "mood": float("nan")}]
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, rows * 20)))
    (tmp_path / "one.jsonl").write_text("\n".join(json.dumps({"text": f"a {i}", "mood": "good"}) for i in range(40)))
    good = tiny_study.recipe()["tasks"]["mood"]
    tasks = {
        "mood": good,
        "unlabelled": {**good, "label": "moood"},
        "one": {**good, "train": "one.jsonl"},
        "bad": {**good, "train": "bad.jsonl"},
        "short": {**good, "train_rows": 1000},
        "gone": {**good, "train": "gone.jsonl"},
        "few": {**good, "train_rows": 11},
    }
    told = refused(tmp_path, tasks=tasks)
    for part in (
        "mood.train.jsonl: no column 'moood': did you mean 'mood'",
        "one.jsonl: mood: one class alone (good)",
        "bad.jsonl: text: empty text: row 2",
        "bad.jsonl: mood: null label: row 3",
        "mood.train.jsonl: train_rows: 1000 asked for",
        "gone.jsonl: no such file",
        "task 'few': statistics.texts asks for 12 texts, 11 training rows are left",
    ):
        assert part in told, told
    assert "task 'mood'" not in told
    failures = Store(tmp_path / "study" / "stages").failures()
    assert {name.split("-")[0] for name in failures} == {f"task/{name}" for name in tasks.keys() - {"mood", "few"}}


def test_what_does_not_fit_the_base_is_told_before_training(tmp_path: Path) -> None:
    tiny_study.write_study(tmp_path)
    lora = tiny_study.recipe()["lora"]
    told = refused(tmp_path, lora={**lora, "targets": ["quary", "valu"]})
    assert "quary" in told
    assert "query" in told
    assert "rank 17 is larger than the layer (16 x 16)" in refused(tmp_path, lora={**lora, "rank": 17})
    assert "base model's folder does not exist" in refused(tmp_path, base="./gone")
    shutil.copytree(tmp_path / "base", tmp_path / "bare")
    for path in tmp_path.glob("bare/tokenizer*"):
        path.unlink()
    assert re.search(r"bare: .*tokenizer", refused(tmp_path, base="./bare"))


def test_an_output_that_cannot_be_written(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(LoraloomError, match="file is a file, no folder"):
        run_study(changed(finished), tmp_path / "file" / "study")


def test_a_disk_that_is_full_is_told_and_a_larger_one_goes_on(finished: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here")
    refusals = []
    try:
        for size in (64, 100, 150, 200, 300, 500, 700, 900, 1200, 20_000):
            subprocess.run(["mount", "-o", f"remount,size={size}k", str(disk)], check=True)
            try:
                run_study(changed(finished), disk / "study")
            except LoraloomError as error:
                refusals.append(error.message)
                assert list(disk.rglob("*.part")) == []
        assert tiny_study.figures(disk / "study" / "results.json") == tiny_study.figures(
            finished / "study" / "results.json"
        )
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert len(refusals) > 3
    assert all("cannot be written: " in refusal for refusal in refusals), refusals


# Kills, of the command line in a process of its own.


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study long enough to be hit, with dropout so that the state of the random numbers matters, and its end."""
    folder = tmp_path_factory.mktemp("long")
    lora = {**tiny_study.recipe()["lora"], "dropout": 0.2}
    recipe = tiny_study.write_study(
        folder, training=train_section(epochs=4), lora=lora, inits={"kept": {"rule": "apart", "keep": "projected"}}
    )
    run_study(Recipe.load(recipe), folder / "undisturbed")
    return folder


def same_end(folder: Path) -> None:
    assert tiny_study.figures(folder / "study" / "results.json") == tiny_study.figures(
        folder / "undisturbed" / "results.json"
    )
    for first in (folder / "undisturbed").glob("*/*/*/*.safetensors"):
        if "stages" not in first.parts:
            there, here = load_file(first), load_file(folder / "study" / first.relative_to(folder / "undisturbed"))
            assert there.keys() == here.keys()
            assert all(bool((there[key] == here[key]).all()) for key in there), first
    assert {path.name for path in (folder / "study").rglob(".*")} <= {RECORD}
    assert list((folder / "study" / "stages" / "unfinished").glob("*")) == []


def kill_when(folder: Path, moment: Callable[[Path], bool]) -> bool:
    """Run the study and kill -9 it at `moment`; tell whether it was caught there."""
    noise = folder / "noise.txt"
    noise.unlink(missing_ok=True)
    process = start_loraloom(["run", "recipe.yaml", "-o", "study", "--quiet"], folder, noise)
    assert process.pid is not None
    stages = folder / "study" / "stages"
    while process.is_alive():
        time.sleep(0.0005)
        with contextlib.suppress(FileNotFoundError):
            if moment(stages):
                # stopped first: a look at what a stopped process left is no race
                os.kill(process.pid, signal.SIGSTOP)
                caught = moment(stages)
                process.kill() if caught else os.kill(process.pid, signal.SIGCONT)
                if caught:
                    process.join()
                    assert process.exitcode == -signal.SIGKILL
                    assert noise.read_text() == ""
                    return True
    assert (process.exitcode, noise.read_text()) == (0, "")
    return False


def in_work(kind: str) -> Callable[[Path], bool]:
    def moment(stages: Path) -> bool:
        return any(name.endswith(".part") for name in os.listdir(stages / kind))

    return moment


def has_checkpoint(stages: Path) -> bool:
    return any(True for _ in stages.glob("unfinished/*/checkpoint-*/trainer_state.json"))


def test_a_killed_run_goes_on_where_it_stood_and_ends_the_same(long: Path) -> None:
    study = long / "study"
    shutil.rmtree(study, ignore_errors=True)
    moments = {
        "mid-epoch": in_work("train"),
        "after a checkpoint": lambda stages: in_work("train")(stages) and has_checkpoint(stages),
        "merging": in_work("merge"),
        "evaluation": in_work("heldout"),
    }
    for name, moment in moments.items():
        for _ in range(5):
            if kill_when(long, moment):
                break
            # it slipped through: let it merge and evaluate again
            for kind in ("merge", "heldout", "test"):
                shutil.rmtree(study / "stages" / kind)
        else:
            pytest.fail(f"never caught in {name}")
        assert not (study / "results.json").exists() or name in ("merging", "evaluation")
        if name == "after a checkpoint":
            kept = next(study.glob("stages/unfinished/*/checkpoint-*/trainer_state.json"))
            assert kept.is_file()
    done = tiny_study.run("run", "recipe.yaml", "-o", "study", "--quiet", cwd=long)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    same_end(long)


def _run_logged() -> None:
    make = Store._make

    def logged(self: Store, stage: Any, function: Any) -> Any:
        with open("made.log", "a") as log:
            log.write(stage.name + "\n")
        return make(self, stage, function)

    Store._make = logged  # type: ignore[method-assign]
    run_study(Recipe.load("recipe.yaml"), "study")


def test_two_runs_at_once_both_finish_and_compute_each_stage_once(long: Path) -> None:
    shutil.rmtree(long / "study", ignore_errors=True)
    runs = [start(_run_logged, long, long / f"noise{index}.txt") for index in range(2)]
    for index, run in enumerate(runs):
        run.join(240)
        assert run.exitcode == 0, (long / f"noise{index}.txt").read_text()
    made = (long / "made.log").read_text().splitlines()
    assert len(made) == len(set(made)) == len(Store(long / "study" / "stages").outputs())
    same_end(long)


def test_adapters_name_their_base(finished: Path) -> None:
    assert read_adapter(finished / "study" / "adapters" / "LoRA" / "mood").base == "base"


def test_test_rows_are_resampled_alike_for_every_merge(finished: Path) -> None:
    result = StudyResult.load(finished / "study" / "results.json")
    for merge in result.merges:
        assert len(merge.resamples) == (200 if merge.split == "test" else 0)
        if merge.split == "test":
            spread = statistics.stdev(merge.resamples)
            assert abs(statistics.mean(merge.resamples) - merge.average.value) < 0.5 * spread + 1e-9
            assert spread == pytest.approx(merge.average.stderr, rel=0.5, abs=1e-9)
