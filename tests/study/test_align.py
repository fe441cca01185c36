"""Heads aligned by hand are those of a study, and what does not fit is told before a model is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loraloom.adapters.peft import PROVENANCE, read_adapter, read_provenance
from loraloom.errors import LoraloomError
from loraloom.merging import merge, write_merged
from loraloom.progress import Reporter
from loraloom.study.align import align_folder
from loraloom.study.by_hand import evaluate_folder
from loraloom.study.recipe import Recipe


def test_aligned_heads_are_those_of_the_study(finished: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(finished / "recipe.yaml")
    theirs = finished / "study" / "merged" / "LoRA" / "task_arithmetic"
    folders = [finished / "study" / "adapters" / "LoRA" / name for name in ("mood", "tone")]
    named = {folder.name: read_adapter(folder) for folder in folders}
    out = tmp_path / "merged"
    write_merged(merge(named, "task_arithmetic", scale=read_provenance(theirs)["scale"]), out)
    before = {name: load_file(out / "heads" / f"{name}.safetensors") for name in named}
    with Reporter(quiet=True) as reporter:
        told = align_folder(recipe, out, folders, reporter)
    assert told == {name: f"heads/{name}.safetensors" for name in named}
    for name, head in before.items():
        mine, study = (load_file(folder / "heads" / f"{name}.safetensors") for folder in (out, theirs))
        assert mine.keys() == study.keys()
        for key in mine:
            torch.testing.assert_close(mine[key], study[key], rtol=1e-4, atol=1e-5)
        assert any(not torch.equal(mine[key], head[key]) for key in head if key in mine)
    assert "unlabelled" in read_provenance(out)["notes"][0]
    kept = {**read_provenance(out), "notes": ["scale: chosen elsewhere", *read_provenance(out)["notes"]]}
    (out / PROVENANCE).write_text(json.dumps(kept))
    with Reporter(quiet=True) as reporter:
        align_folder(recipe, out, folders, reporter)
    assert read_provenance(out)["notes"] == kept["notes"]
    scores = json.loads((finished / "study" / "results.json").read_text())["merges"]
    found = evaluate_folder(recipe, out, [], "test")
    expected = next(
        one["scores"]
        for one in scores
        if (one["init"], one["rule"], one["split"], one["aligned"]) == ("LoRA", "task_arithmetic", "test", True)
    )
    assert {name: score.value for name, (_, score) in found.items()} == {
        name: score["value"] for name, score in expected.items()
    }


def test_all_that_does_not_fit_is_told(finished: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(finished / "recipe.yaml")
    adapters = finished / "study" / "adapters" / "LoRA"
    strange = tmp_path / "moody"
    shutil.copytree(adapters / "mood", strange)
    (strange / "loraloom.json").unlink()
    with pytest.raises(LoraloomError) as told, Reporter(quiet=True) as reporter:
        align_folder(recipe, adapters / "mood", [strange, tmp_path / "absent"], reporter)
    assert "the recipe has no task 'moody'" in str(told.value)
    assert "did you mean 'mood'" in str(told.value)
    assert "absent" in str(told.value)


def test_a_record_of_an_older_version_is_told_before_anything_is_written(finished: Path, tmp_path: Path) -> None:
    folders = [finished / "study" / "adapters" / "LoRA" / name for name in ("mood", "tone")]
    out = write_merged(merge([read_adapter(folder) for folder in folders], "task_arithmetic"), tmp_path / "out")
    told = read_provenance(out)
    old = {name: value for name, value in told.items() if name not in ("targets", "left_out", "scale_from")}
    (out / PROVENANCE).write_text(json.dumps(old))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    wrong = r"loraloom.json: does not tell of a merge, as this version writes it: scale_from, targets, left_out missing"
    with pytest.raises(LoraloomError, match=wrong), Reporter(quiet=True) as reporter:
        align_folder(Recipe.load(finished / "recipe.yaml"), out, folders, reporter)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
