"""What a merged folder keeps of its inputs is found by task, whatever their folders are called."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import measured, refused, said
from loraloom.adapters.heads import heads_by_task
from loraloom.adapters.peft import PROVENANCE, read_provenance
from loraloom.errors import LoraloomError
from loraloom.merging import read_readout
from loraloom.study.compare import compare
from loraloom.study.recipe import Recipe


def folders(finished: Path, place: Path, **tasks: str) -> list[Path]:
    """Copy adapters of the study by folder name."""
    for name, task in tasks.items():
        shutil.copytree(finished / "study" / "adapters" / "LoRA" / task, place / name)
    return [place / name for name in tasks]


def merged(place: Path, adapters: list[Path]) -> Path:
    said("merge", *adapters, "--rule", "emr", "--overwrite", "-o", place / "out")
    return place / "out"


def forget_tasks(folder: Path) -> None:
    """Write loraloom.json as it was before it told the inputs' tasks."""
    facts = read_provenance(folder)
    inputs = [{key: value for key, value in one.items() if key != "task"} for one in facts["inputs"]]
    (folder / PROVENANCE).write_text(json.dumps({**facts, "inputs": inputs}))


def test_folders_named_other_than_their_tasks(finished: Path, tmp_path: Path) -> None:
    recipe, plain = finished / "recipe.yaml", tmp_path / "plain"
    plain.mkdir()
    alike = merged(plain, folders(finished, plain, mood="mood", tone="tone"))
    adapters = folders(finished, tmp_path, **{"support-v2": "mood", "legal": "tone"})
    out = merged(tmp_path, adapters)
    assert {path.stem for path in (out / "heads").iterdir()} == {"support-v2", "legal"}
    told = [(one["name"], one["task"]) for one in read_provenance(out)["inputs"]]
    assert told == [("support-v2", "mood"), ("legal", "tone")]
    assert measured(recipe, out) == measured(recipe, alike)
    assert measured(recipe, out, "--task", "tone").keys() == {"tone"}
    assert said("inspect", out)["adapters"][0]["heads"] == ["mood", "tone"]
    for task in ("mood", "tone"):
        one, two = read_readout(out, task).updates, read_readout(alike, task).updates
        assert all(torch.equal(one[module].dense(), two[module].dense()) for module in two)
    found = said("align", out, *adapters, "--recipe", recipe)["heads"]
    assert found == {"mood": "heads/support-v2.safetensors", "tone": "heads/legal.safetensors"}
    said("align", alike, plain / "mood", plain / "tone", "--recipe", recipe)
    assert measured(recipe, out) == measured(recipe, alike)
    adapters[0].rename(tmp_path / "renamed")  # since the merge: its task finds its file
    assert said("align", out, tmp_path / "renamed", adapters[1], "--recipe", recipe)["heads"] == found
    assert {path.stem for path in (out / "heads").iterdir()} == {"support-v2", "legal"}


def test_a_folder_named_for_another_ones_task(finished: Path, tmp_path: Path) -> None:
    adapters = folders(finished, tmp_path, tone="mood", other="tone")
    out = merged(tmp_path, adapters)
    assert all(
        torch.equal(tensor, load_file(out / "heads" / "other.safetensors")[path])
        for path, tensor in heads_by_task(out)["tone"].head.tensors.items()
    )


def test_inputs_of_one_task_go_by_name(finished: Path, tmp_path: Path) -> None:
    recipe = finished / "recipe.yaml"
    adapters = folders(finished, tmp_path, old="mood", new="mood", tone="tone")
    out = merged(tmp_path, adapters)
    assert list(measured(recipe, out)) == ["old", "new", "tone"]
    assert measured(recipe, out, "--task", "new").keys() == {"new"}
    assert "old (task mood), new (task mood), tone" in refused("evaluate", out, "--recipe", recipe, "--task", "mood")
    with pytest.raises(LoraloomError, match=r"nothing is read for task 'mood'") as caught:
        read_readout(out, "mood")
    assert "new" in caught.value.hint
    read_readout(out, "new")
    found = said("align", out, *adapters, "--recipe", recipe)["heads"]
    assert found == {name: f"heads/{name}.safetensors" for name in ("old", "new", "tone")}


def test_folders_of_before_tasks_were_told(finished: Path, tmp_path: Path) -> None:
    recipe = finished / "recipe.yaml"
    adapters = folders(finished, tmp_path, mood="mood", tone="tone")
    out = merged(tmp_path, adapters)
    now = measured(recipe, out)
    forget_tasks(out)
    assert measured(recipe, out) == now
    (out / PROVENANCE).unlink()
    assert measured(recipe, out) == now
    read_readout(out, "tone")
    assert said("align", out, *adapters, "--recipe", recipe)["heads"]["tone"] == "heads/tone.safetensors"


def test_what_was_not_merged_is_not_aligned(finished: Path, tmp_path: Path) -> None:
    adapters = folders(finished, tmp_path, mood="mood", tone="tone", copy="tone")
    out = merged(tmp_path, adapters[:1])
    told = refused("align", out, *adapters, "--recipe", finished / "recipe.yaml")
    assert f"{tmp_path / 'tone'}: was not merged into it" in told
    assert "these were: mood" in told
    out = merged(tmp_path, adapters[:2])
    told = refused("align", out, *adapters, "--recipe", finished / "recipe.yaml")
    assert f"{adapters[1]} and {adapters[2]} are both 'tone'" in told


@pytest.mark.parametrize("fault", ["cut", "empty", "bias"])
def test_a_malformed_head_is_named(fault: str, finished: Path, tmp_path: Path) -> None:
    out = merged(tmp_path, folders(finished, tmp_path, **{"support-v2": "mood", "legal": "tone"}))
    path = out / "heads" / "legal.safetensors"
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    elif fault == "empty":
        save_file({"classifier.bias": torch.zeros(2)}, path)
    else:
        save_file({**load_file(path), "classifier.bias": torch.zeros(3)}, path)
    assert str(path) in refused("evaluate", out, "--recipe", finished / "recipe.yaml")


def test_a_study_of_given_adapters_names_the_tasks_itself(finished: Path, tmp_path: Path) -> None:
    one, two = folders(finished, tmp_path, one="tone", two="mood")
    (two / PROVENANCE).unlink()
    recipe = Recipe.load(finished / "recipe.yaml")
    compare({"mood": one, "tone": two}, recipe, tmp_path / "out", rules=["weighted"], scales=[1.0])
    (out,) = (tmp_path / "out" / "merged").glob("*/weighted")
    assert [(one["name"], one["task"]) for one in read_provenance(out)["inputs"]] == [("mood",) * 2, ("tone",) * 2]


def test_an_input_may_have_the_name_of_a_task_that_it_shares(finished: Path, tmp_path: Path) -> None:
    recipe = finished / "recipe.yaml"
    adapters = folders(finished, tmp_path, **{"mood": "mood", "mood-v2": "mood"})
    out = merged(tmp_path, adapters)
    assert list(measured(recipe, out)) == ["mood", "mood-v2"]
    found = said("align", out, *adapters, "--recipe", recipe)["heads"]
    assert found == {name: f"heads/{name}.safetensors" for name in ("mood", "mood-v2")}
