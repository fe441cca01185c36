"""The commands as a user types them: each stage alone, faults in one line, results on stdout and hints on stderr."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import tiny_study
from commands import call, hints, measured, page, refused, said, said_thrice
from loraloom.cli.study import study_table
from loraloom.cli.terminal import Out
from loraloom.report import SummaryRow, summary_rows
from loraloom.report.aggregate import Merged
from loraloom.results import Score, StudyResult
from loraloom.statistics.file import Statistics
from loraloom.tasks.builtin_text import generic_texts
from tiny_launch import start_loraloom

WEIGHTS = "adapter_model.safetensors"


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_every_command_says_what_it_does() -> None:
    text = call("--help").stdout
    commands = ["demo", "run", "statistics", "atlas", "init", "train", "merge", "align", "compare"]
    for command in [*commands, "evaluate", "inspect", "rules", "report", "study"]:
        assert command in text
        assert call(command, "--help").exit_code == 0
    for command in ("status", "explain", "rm"):
        assert call("study", command, "--help").exit_code == 0
    assert call("--version").stdout.startswith("loraloom 0.")


def test_words_that_no_command_takes_are_told_as_every_fault() -> None:
    assert "no such command 'marge'. Did you mean 'merge'" in refused("marge")
    assert "no such option: --rnk next: did you mean --own or --rank?" in refused("init", "--rnk", "4", "-o", "x")
    assert "`loraloom init --help` tells what it takes" in refused("init", "--rank", "x", "-o", "x")
    assert "missing option '--output'" in refused("atlas", "base", "--target", "q")
    told = refused("statistics", "x", "--base", "b", "--column", "c", "--target", "q", "-o", "x", "--kind", "tokn")
    assert "'tokn' is not one of 'token', 'sample' next: did you mean 'token'?" in told
    for words in ((), ("study",), ("statistics",)):  # the help, which an option after it would not be
        assert call(*words).exit_code == 2
        assert "Usage: loraloom" in call(*words).output


def statistics(folder: Path, task: str, *more: str) -> list[str | Path]:
    base, rows = folder / "base", folder / f"{task}.train.jsonl"
    targets = ["--target", "query", "--target", "value", "--texts", "12", "--max-length", "16"]
    return ["statistics", rows, "--base", str(base), "--column", "text", *targets, *more]


def test_the_stages_one_by_one(finished: Path, tmp_path: Path) -> None:
    recipe = finished / "recipe.yaml"
    for task in ("mood", "tone"):
        told = said(*statistics(finished, task), "-o", tmp_path / f"{task}.safetensors")
        assert (told["file"], told["texts"], told["layers"]) == (str(tmp_path / f"{task}.safetensors"), 12, 4)
    own, other = tmp_path / "mood.safetensors", tmp_path / "tone.safetensors"
    start = tmp_path / "start"
    (told,) = said("init", "--own", own, "--other", other, "--rank", "2", "--keep", "projected", "-o", start)["starts"]
    assert (told["rule"], told["keep"], told["rank"], told["layers"]) == ("apart", "projected", 2, 4)
    assert all(not tensor.any() for name, tensor in load_file(start / WEIGHTS).items() if "lora_B" in name)
    out = tmp_path / "mood"
    told = said("train", "--recipe", recipe, "--task", "mood", "--init", start, "-o", out)
    assert told["steps"] == 8
    assert 0 <= told["heldout"] <= 1
    score = measured(recipe, out)["mood"]
    assert score["metric"] == "accuracy"
    tone = finished / "study" / "adapters" / "LoRA" / "tone"
    told = said("merge", out, tone, "--rule", "ties", "--density", "0.5", "--scale", "0.7", "-o", tmp_path / "m")
    assert (told["rule"], told["scale"], told["heads"]) == ("ties", 0.7, ["mood", "tone"])
    assert set(measured(recipe, tmp_path / "m")) == {"mood", "tone"}
    told = said("merge", out, tone, "-o", tmp_path / "by-default")
    assert (told["rule"], told["scale"]) == ("tsv", 0.75)
    told = said("align", tmp_path / "by-default", out, tone, "--recipe", recipe)
    assert told["heads"] == {"mood": "heads/mood.safetensors", "tone": "heads/tone.safetensors"}
    told = said_thrice("inspect", out, own, other)
    assert told["adapters"][0]["heads"] == ["mood"]
    assert told["statistics"][0]["texts"] == 12
    assert [len(row) for row in told["responses"]["overall"]] == [2]
    told = said("inspect", out, tone, out)
    assert [len(row) for row in told["overlaps"]["rows_of_a"]] == [2, 2]
    shutil.copytree(out, tmp_path / "twin")
    assert "started from nearly the same A (overlap 1.00)" in hints("inspect", out, tmp_path / "twin")


def test_statistics_to_share(finished: Path, tmp_path: Path) -> None:
    """`--rows 0` hands on sums alone; `show` tells what a file holds and warns of rows."""
    full, sums = tmp_path / "full.safetensors", tmp_path / "sums.safetensors"
    few = statistics(finished, "mood", "--texts", "2")
    said(*few, "-o", full)
    said("statistics", "collect", *few[1:], "--rows", "0", "-o", sums)
    told = said("statistics", "show", full)
    assert (told["texts"], told["inputs"], told["inputs_with_rows"]) == (2, 2, 2)
    assert told["rows"] == 2 * told["tokens"]
    assert "read back" in hints("statistics", "show", full)
    told = said("statistics", "show", sums)
    assert (told["inputs_with_rows"], told["rows"]) == (0, 0)
    assert not any(name.endswith(".rows") for name in load_file(sums))
    assert "read back" not in hints("statistics", "show", sums)
    starts = [tmp_path / file.stem for file in (full, sums)]
    for file, start in zip((full, sums), starts, strict=True):
        said("init", "--own", file, "--other", file, "--rank", "2", "--seed", "1", "-o", start)
    one, two = (load_file(start / WEIGHTS) for start in starts)
    for name, tensor in one.items():  # what is left out changes nothing
        torch.testing.assert_close(tensor, two[name], rtol=1e-4, atol=1e-5)
    assert "no such file" in refused("statistics", "show", tmp_path / "gone")
    assert "collect" in call("statistics", "--help").stdout


def test_statistics_of_four_parts_add_up_to_those_of_the_whole(finished: Path, tmp_path: Path) -> None:
    rows, parts = (finished / "mood.train.jsonl").read_text().splitlines(keepends=True), []
    base = ["--base", finished / "base", "--column", "text", "--target", "all-linear"]
    for part in range(4):
        (tmp_path / f"{part}.jsonl").write_text("".join(rows[part * len(rows) // 4 : (part + 1) * len(rows) // 4]))
        parts.append(tmp_path / f"{part}.safetensors")
        said("statistics", tmp_path / f"{part}.jsonl", *base, "--texts", len(rows) // 4, "-o", parts[-1])
    whole = tmp_path / "whole.safetensors"
    said("statistics", finished / "mood.train.jsonl", *base, "--texts", len(rows), "-o", whole)
    told = said("statistics", "add", *parts, "-o", tmp_path / "sum.safetensors")
    ours, truth = (Statistics.load(tmp_path / f"{name}.safetensors") for name in ("sum", "whole"))
    assert (ours.texts, ours.tokens, ours.layers) == (truth.texts, truth.tokens, truth.layers)
    assert told["texts"] == len(rows)
    for name, moment in truth.moments.items():
        assert ours.moments[name].count == moment.count
        torch.testing.assert_close(ours.moments[name].as_gram(), moment.as_gram(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.moments[name].total, moment.total, rtol=1e-5, atol=1e-5)
    assert "named twice" in refused("statistics", "add", parts[0], parts[0], "-o", tmp_path / "x.safetensors")
    told = said("statistics", "add", *parts, "-o", tmp_path / "few.safetensors", "--directions", "2")
    assert told["directions"] == 2


def test_statistics_with_noise_to_share(finished: Path, tmp_path: Path) -> None:
    """The facts of the noise are in the file, it can be bounded and used; options that do not fit are told together."""
    file = tmp_path / "noised.safetensors"
    few = statistics(finished, "mood", "--texts", "8", "--kind", "sample")
    said(*few, "--noise", "8", "--clip", "4", "--directions", "3", "-o", file)
    told = said("statistics", "show", file)
    assert told["privacy"] == {"clip": 4.0, "epsilon": 8.0, "delta": 1e-6}
    assert (told["texts"], told["tokens"], told["inputs_with_directions"], told["directions"]) == (8, 0, 2, 3)
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    for path in (one, two):
        said(*few, "--noise", "1e6", "--clip", "4", "-o", path)  # eight texts drown in more
    total = "bert.encoder.layer.0.attention.self.query.total"
    assert not torch.equal(load_file(one)[total], load_file(two)[total])  # never the same noise
    said("init", "--other", one, "--rank", "2", "-o", tmp_path / "start")
    faults = refused(*few, "--kind", "token", "--noise", "8", "-o", tmp_path / "no")
    assert "--kind sample" in faults
    assert "--clip" in faults
    assert "delta 2.0" in refused(*few, "--noise", "8", "--clip", "4", "--delta", "2", "-o", tmp_path / "no")
    assert "--noise" in refused(*few, "--clip", "4", "-o", tmp_path / "no")


def test_an_atlas_then_one_adapter_after_another(finished: Path, tmp_path: Path) -> None:
    """No task's statistics at all; the second adapter stays off the rows of the first."""
    rows, atlas, first, second = (tmp_path / name for name in ("rows.jsonl", "atlas.safetensors", "first", "second"))
    rows.write_text("\n".join(json.dumps({"text": text}) for text in generic_texts(20)))
    more = ("--target", "query", "--target", "value", "--texts", "20", "--max-length", "16")
    told = said("atlas", finished / "base", *more, "-o", atlas)
    assert (told["file"], told["texts"], told["layers"]) == (str(atlas), 20, 4)
    call("atlas", finished / "base", *more, "--text-file", rows, "-o", tmp_path / "same.safetensors")
    call("statistics", rows, "--base", finished / "base", *more, "--column", "text", "-o", tmp_path / "too.safetensors")
    for name in ("same", "too"):
        mine, theirs = load_file(atlas), load_file(tmp_path / f"{name}.safetensors")
        assert mine.keys() == theirs.keys()
        assert all(bool((mine[key] == theirs[key]).all()) for key in mine)
    words = ("init", "--atlas", atlas, "--rank", "2", "--rule", "apart", "--keep", "projected", "--scale", "unit")
    (told,) = said(*words, "-o", first)["starts"]
    assert (told["folder"], told["rule"], told["keep"]) == (str(first), "apart", "projected")
    noted = json.loads((first / "loraloom.json").read_text())
    assert (noted["own"], noted["after"]) == (None, [])
    assert noted["others"] == {
        "atlas.safetensors": {"texts": 20, "tokens": noted["others"]["atlas.safetensors"]["tokens"], "kind": "token"}
    }
    said(*words, "--seed", "1", "--after", first, "-o", second)
    assert json.loads((second / "loraloom.json").read_text())["after"] == [first.name]
    one, two, avoid = (load_file(path) for path in (first / WEIGHTS, second / WEIGHTS, second / "avoid.safetensors"))
    assert one.keys() == two.keys()
    assert len(avoid) == 4
    for name in (name for name in one if "lora_A" in name):
        assert float((two[name] @ one[name].T).abs().max()) < 1e-6
    assert not any(bool(tensor.any()) for name, tensor in two.items() if "lora_B" in name)
    # teams that share an atlas and give no seed do not start at the same A
    team, other = (
        said("init", "--atlas", atlas, "--rank", "2", "-o", tmp_path / name)["starts"][0] for name in ("team", "other")
    )
    assert (team["rule"], team["keep"], team["scale"]) == ("apart", "free", "response")
    assert team["seed"] != other["seed"]


def test_a_column_without_a_file_is_refused(finished: Path, tmp_path: Path) -> None:
    words = ("atlas", finished / "base", "--target", "query", "--column", "text", "-o", tmp_path / "atlas.safetensors")
    assert "give a file too" in refused(*words)


def test_statistics_of_one_file_name_all_count(finished: Path, tmp_path: Path) -> None:
    names = [tmp_path / task / "seen.safetensors" for task in ("mood", "tone")]
    for name in names:
        name.parent.mkdir()
        call(*statistics(finished, name.parent.name), "-o", name)
    call("init", "--other", names[0], "--other", names[1], "--rank", "2", "--rule", "random", "-o", tmp_path / "out")
    noted = json.loads((tmp_path / "out" / "loraloom.json").read_text())
    assert noted["others"].keys() == {"seen.safetensors", "tone/seen.safetensors"}  # told apart, and nobody's disk


def test_train_makes_what_the_study_made(finished: Path, tmp_path: Path) -> None:
    start = next((finished / "study" / "stages" / "init").glob("LoRA.*.mood-*")) / "adapter"
    call("train", "--recipe", finished / "recipe.yaml", "--task", "mood", "--init", start, "-o", tmp_path / "mood")
    ours, theirs = (
        load_file(f / WEIGHTS) for f in (tmp_path / "mood", finished / "study" / "adapters" / "LoRA" / "mood")
    )
    assert ours.keys() == theirs.keys()
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)


def test_run_tells_the_summary_in_80_columns(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "study", tmp_path / "study")
    words = ("run", finished / "recipe.yaml", "-o", tmp_path / "study")
    told = said_thrice(*words)
    assert told["report"] == str(tmp_path / "study" / "report.html")
    assert told["verdict"]
    rows = summary_rows(StudyResult.load(tmp_path / "study" / "results.json"))
    assert [one["init"] for one in told["inits"]] == [row.init for row in rows]
    assert [one["single"]["value"] for one in told["inits"]] == [row.single.value for row in rows if row.single]
    plain = call(*words)
    assert "OSRM, kept" in plain.stdout
    assert "ta: task_arithmetic" in plain.stdout
    assert "open the report in a browser" in plain.stderr
    table = plain.stdout.split(told["verdict"][:20])[0]
    assert max(map(len, table.splitlines())) <= 80


def test_a_plan_starts_nothing(finished: Path, tmp_path: Path) -> None:
    told = said_thrice("run", finished / "recipe.yaml", "-o", finished / "study", "--plan")
    assert {one["left"] for one in told["stages"]} == {0}
    assert (told["cpu_hours"], told["not_measured"]) == (0, [])
    plain = call("run", finished / "recipe.yaml", "-o", tmp_path / "study", "--plan")
    assert "at most 4" in plain.stdout
    assert "not measured yet: task, statistics" in plain.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_default_study_folder(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished / "study", tmp_path / "studies" / "tiny")
    assert call("run", finished / "recipe.yaml", "--json").exit_code == 0
    assert entries(tmp_path) == {"studies"}
    assert entries(tmp_path / "studies") == {"tiny"}


def test_demo_runs_its_recipe(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import loraloom.study.demo
    from loraloom.study.recipe import Recipe

    asked = []

    def recipe(*, fast: bool) -> Recipe:
        asked.append(fast)
        return Recipe.load(finished / "recipe.yaml")

    monkeypatch.setattr(loraloom.study.demo, "demo_recipe", recipe)
    shutil.copytree(finished / "study", tmp_path / "demo")
    assert "verdict" in json.loads(call("demo", "--fast", "--json", "-o", tmp_path / "demo").stdout)
    assert asked == [True]


def test_what_a_command_prints_is_a_page(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Facts in words that fit 80 columns, and the command to type next; no Python value shows through."""
    monkeypatch.chdir(tmp_path)
    recipe, mood, merged = finished / "recipe.yaml", tmp_path / "mood", tmp_path / "merged"
    shutil.copytree(finished / "study" / "adapters" / "LoRA" / "mood", mood)
    shutil.copytree(finished / "study" / "merged" / "LoRA" / "tsv", merged)
    record = json.loads((merged / "loraloom.json").read_text())
    (merged / "loraloom.json").write_text(json.dumps({**record, "notes": []}))  # as one whose heads are not aligned
    map_words = ("--target", "query", "--target", "value", "--texts", "9", "--max-length", "16")
    pages = {
        "loraloom init --other": page(*statistics(finished, "mood"), "-o", "mood.safetensors"),
        "loraloom init --atlas": page("atlas", finished / "base", *map_words, "-o", "atlas"),
        "loraloom init": page("statistics", "show", "mood.safetensors"),
        "loraloom train": page("init", "--other", "mood.safetensors", "--rank", "2", "-o", "start"),
        "--init starts/": page("init", "mood.safetensors", "atlas", "--target", "query", "--rank", "2", "-o", "starts"),
        "loraloom merge": page("train", "--recipe", recipe, "--task", "mood", "--init", "start", "-o", "trained"),
        "merged": page("evaluate", "mood", "--recipe", recipe),
        "loraloom align": page("evaluate", merged, "--recipe", recipe),
        "loraloom study explain": page("study", "status", finished / "study"),
        "loraloom study rm": page("study", "explain", finished / "study", entry(finished / "study", "merge")),
    }
    for command, shown in pages.items():
        assert f"{command}" in " ".join(shown.split()), shown
        assert not re.search(r"\bNone\b|(?<!=)\bTrue\b|\bFalse\b|\['|\{'|\d\.\d{5}", shown), shown
    assert "accuracy" in pages["merged"]


def entry(study: Path, kind: str) -> str:
    """Return the name of one of a study's outputs."""
    return f"{kind}/{sorted(path.name for path in (study / 'stages' / kind).iterdir())[0]}"


def test_report_and_rules(finished: Path, tmp_path: Path) -> None:
    results = finished / "study" / "results.json"
    assert said("report", results, "-o", tmp_path / "r.html") == {"report": str(tmp_path / "r.html")}
    assert (tmp_path / "r.html").read_bytes() == (finished / "study" / "report.html").read_bytes()
    assert json.loads(call("rules", "--json").stdout)["ties"]["spaces"] == ["full", "core", "knots"]
    (tmp_path / "bad.json").write_text(results.read_text()[:500])
    assert f"{tmp_path / 'bad.json'}: not valid JSON" in refused("report", tmp_path / "bad.json", "-o", tmp_path / "x")
    assert "is a folder, where a file is to be written" in refused("report", results, "-o", tmp_path)
    assert call("report", results.parent, "-o", tmp_path / "of-the-folder.html").exit_code == 0


def test_study_status_explain_and_rm(finished: Path, tmp_path: Path) -> None:
    study = tmp_path / "study"
    shutil.copytree(finished / "study", study)
    told = said_thrice("study", "status", study)
    names = [one["name"] for one in told["outputs"]]
    assert told["failures"] == []
    init = next(name for name in names if name.startswith("init/LoRA.s0.mood"))
    train = next(name for name in names if name.startswith("train/LoRA.s0.mood"))
    merge = next(name for name in names if name.startswith("merge/LoRA.s0.tsv"))
    mood = next(one for one in said("study", "explain", study, merge)["inputs"] if one["output"] == train)
    assert init in [one["output"] for one in mood["inputs"]]
    assert json.loads(call("study", "rm", study, train, "--json").stdout) == {"removed": [train]}
    assert f"{train} MISSING" in " ".join(page("study", "explain", study, merge).split())
    assert f"no whole output '{train}'" in refused("study", "rm", study, train)
    assert "did you mean" in refused("study", "explain", study, merge[:-1])
    assert "not a study folder" in refused("study", "status", tmp_path)


def test_merge_tells_all_that_is_wrong(finished: Path, tmp_path: Path) -> None:
    whole = finished / "study" / "adapters" / "LoRA" / "mood"
    half, empty = tmp_path / "half", tmp_path / "empty"
    shutil.copytree(whole, half)
    (half / WEIGHTS).write_bytes((half / WEIGHTS).read_bytes()[:100])
    empty.mkdir()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    told = refused("merge", whole, half, empty, "--rule", "ties", "--densty=1", "-o", mine)
    for part in (
        "half: adapter_model.safetensors cannot be read",
        "empty: not an adapter folder",
        "'densty'",
        "mine: thesis.tex is not ours",
    ):
        assert part in told
    assert "no merging rule is called 'tiess': did you mean 'ties'" in refused(
        "merge", whole, "--rule", "tiess", "-o", tmp_path / "x"
    )
    assert "--density has no value" in refused("merge", whole, "--rule", "ties", "-o", tmp_path / "x", "--density")
    assert "3 weights for 1 adapters" in refused(
        *("merge", whole, "--rule", "ties", "-o", tmp_path / "x"), *3 * ("--weight", "1")
    )
    assert entries(tmp_path) == {"half", "empty", "mine"}
    assert entries(mine) == {"thesis.tex"}


def test_bad_input_of_every_command(finished: Path, tmp_path: Path) -> None:
    recipe, study = finished / "recipe.yaml", finished / "study"
    mood, out = study / "adapters" / "LoRA" / "mood", tmp_path / "out"
    assert "has no task 'mod'" in refused("train", "--recipe", recipe, "--task", "mod", "-o", out)
    assert "gone: not an adapter folder" in refused(
        "train", "--recipe", recipe, "--task", "mood", "--init", tmp_path / "gone", "-o", out
    )
    assert "no head for task tone" in refused("evaluate", mood, "--recipe", recipe, "--task", "tone")
    assert "'dev' is not one of 'test', 'heldout'" in refused("evaluate", mood, "--recipe", recipe, "--split", "dev")
    assert "gone: the base model's folder" in refused("evaluate", mood, "--recipe", recipe, "--base", "./gone")
    told = refused(*statistics(finished, "mood", "--column", "txt", "--texts", "5000"), "-o", out)
    assert "no column 'txt'" in told
    assert "5000 texts were asked for, it holds 40" in told
    assert "'tokn' is not one of 'token', 'sample'" in refused(
        *statistics(finished, "mood", "--kind", "tokn"), "-o", out
    )
    assert "mood.train.jsonl: no such file" in refused(*statistics(finished / "gone", "mood"), "-o", out)
    seen = next((study / "stages" / "statistics").glob("mood.train-*")) / "statistics.safetensors"
    half = tmp_path / "half.safetensors"
    half.write_bytes(seen.read_bytes()[:-8])
    assert "half.safetensors" in refused("init", "--own", half, "--other", seen, "-o", out)
    assert "half.safetensors" in refused("inspect", half)
    assert "gone" in refused("inspect", tmp_path / "gone")
    words = ("init", "--own", seen, "--other", seen, "-o", out)
    assert "rank 99 is larger than the layer" in refused(*words, "--rank", "99")
    assert "'quary'" in refused(*words, "--target", "quary")
    assert "did you mean 'osrm'" in refused(*words, "--rule", "osmr")
    assert "'fre' is not one of 'free'" in refused(*words, "--keep", "fre")
    assert "gone: not an adapter folder" in refused(*words, "--after", tmp_path / "gone")
    assert "neither of other tasks nor an atlas" in refused("init", "-o", out)
    assert "neither of other tasks nor an atlas" in refused("init", "--own", seen, "-o", out)
    assert "gone: no such file" in refused("init", "--atlas", tmp_path / "gone", "-o", out)
    maps = ("atlas", finished / "base", "--target", "query", "-o", out)
    assert "1000000 texts were asked for" in refused(*maps, "--texts", "1000000")
    assert "no column 'txt'" in refused(*maps, "--text-file", finished / "mood.train.jsonl", "--column", "txt")
    assert entries(tmp_path) == {"half.safetensors"}


def test_a_bad_recipe_in_a_process_of_its_own(tmp_path: Path) -> None:
    tiny_study.write_recipe(tmp_path, sedes=[1], training={"epocs": 1})
    done = tiny_study.run("run", "recipe.yaml", "--json", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "error: recipe.yaml: 2 problems",
        "  - training.epocs: unknown option; did you mean 'epochs'?",
        "  - sedes: unknown option; did you mean 'seeds'?",
    ]


def test_ctrl_c_in_training(finished: Path, tmp_path: Path) -> None:
    for number in range(3):  # an interrupt that meets a destructor is dropped by Python: then the run ends well
        folder = tmp_path / str(number)
        folder.mkdir()
        code, noise = interrupted_in_training(finished, folder)
        if code != 0:
            break
    assert (code, noise) == (130, "")
    assert list(folder.rglob("*.part")) == []


def interrupted_in_training(finished: Path, folder: Path) -> tuple[int | None, str]:
    """Return the exit code of a run that gets Ctrl-C while it trains, and what it printed."""
    noise = folder / "noise.txt"
    process = start_loraloom(["run", finished / "recipe.yaml", "-o", "study", "--quiet"], folder, noise)
    assert process.pid is not None
    train = folder / "study" / "stages" / "train"
    deadline = time.monotonic() + 120
    while not (train.is_dir() and any(name.endswith(".part") for name in os.listdir(train))):
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(0.5)  # past the tokenizer's patterns, whose destructors are many
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    return process.exitcode, noise.read_text()


def test_the_summary_fits_whatever_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    score = Score(value=1.0, stderr=0.0)
    merged = Merged(
        init="x",
        label="x",
        rule="task_arithmetic",
        space="full",
        aligned=False,
        output_ranks=(8,),
        scales=(0.25, 1.5),
        chosen_by="labels",
        rule_chosen=False,
        scores={},
        average=score,
        kept=1.234,
        heldout=None,
        by_seed={},
        resamples=(),
        shares={},
    )
    long = "an init with a name of many words that says all of it"
    rows = [SummaryRow(long, score, merged, merged, 1.0, 10.55), SummaryRow("b", None, None, None, None, None)]
    title, columns, cells = study_table(rows)
    console = Console(width=80)
    out = Out(as_json=False, quiet=False)
    out._out = console
    out.table(title, columns, cells)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any("100.0 ta 0.25-1.5" in line and "123%" in line for line in lines)
    assert any("1.00 → 10.55" in line for line in lines)
    assert cells[1] == ("b", "-", "-", "-", "-", "-", "- → -")


def test_the_summary_holds_the_results_figures(finished: Path) -> None:
    result = StudyResult.load(finished / "study" / "results.json")
    _, _, cells = study_table(summary_rows(result))
    singles = [one.score.value for one in result.singles if one.init == "LoRA"]
    assert cells[0][:2] == ("LoRA", f"{100 * sum(singles) / 2:.1f}")
    best: dict[bool, Any] = {}
    for merge in result.merges:
        if merge.init == "LoRA" and merge.split == "heldout":
            now = best.get(merge.aligned)
            if now is None or merge.average.value > now.average.value:
                best[merge.aligned] = merge
    for aligned, cell in ((False, 2), (True, 4)):
        chosen = best[aligned]
        test = next(
            one
            for one in result.merges
            if one.split == "test"
            and (one.init, one.rule, one.scale, one.aligned) == (chosen.init, chosen.rule, chosen.scale, aligned)
        )
        assert cells[0][cell].startswith(f"{100 * test.average.value:.1f} ")
