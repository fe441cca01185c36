"""What a study leaves for others to read: it tells of nobody's disk, and of given adapters only what is known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import tiny_study
from loraloom.adapters.peft import PROVENANCE
from loraloom.adapters.stored import WEIGHTS
from loraloom.errors import LoraloomError
from loraloom.results import StudyResult
from loraloom.study.export import run_study
from loraloom.study.recipe import Recipe


def texts(folder: Path) -> dict[Path, str]:
    """Return every text file of what a study publishes."""
    files = [path for path in folder.rglob("*") if path.is_file() and "stages" not in path.relative_to(folder).parts]
    return {path: path.read_text(encoding="utf-8") for path in files if path.suffix in (".json", ".md", ".html")}


def test_nothing_published_holds_a_place_on_this_disk(finished: Path, tmp_path: Path) -> None:
    command = f"loraloom run {finished}/recipe.yaml --base={finished}/base -o {finished}/study"
    shutil.copytree(finished / "study", tmp_path / "study")
    run_study(Recipe.load(finished / "recipe.yaml"), tmp_path / "study", command=command)
    found = texts(tmp_path / "study")
    assert {path.name for path in found} >= {"results.json", "report.html", "loraloom.json", "adapter_config.json"}
    for path, text in found.items():
        assert str(finished) not in text, path
        assert str(tmp_path) not in text, path
    result = StudyResult.load(tmp_path / "study" / "results.json")
    assert result.command == "loraloom run recipe.yaml --base=base -o study"
    assert result.base == "./base"


def test_a_published_recipe_runs_from_its_folder(finished: Path) -> None:
    recipe = Recipe.load(finished / "recipe.yaml")
    again = Recipe.parse(recipe.published(), "results").resolved(finished)
    assert again.model_dump() == recipe.model_dump()
    assert recipe.published()["tasks"]["mood"]["train"] == "mood.train.jsonl"


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("../shared/rows.jsonl", "../shared/rows.jsonl"),
        ("/home/somebody/rows.jsonl", "rows.jsonl"),
        ("~/rows.jsonl", "rows.jsonl"),
        ("org/name:config#train", "org/name:config#train"),
    ],
)
def test_paths_are_published_as_written_but_never_absolute(tmp_path: Path, written: str, shown: str) -> None:
    raw = tiny_study.recipe(base=written if "#" not in written else "org/name")
    raw["tasks"]["mood"]["train"] = written
    raw["tasks"]["tone"] = {"source": "glue", "path": written}
    recipe = Recipe.parse(raw, "r").resolved(tmp_path)
    tasks = recipe.published()["tasks"]
    assert tasks["mood"]["train"] == tasks["tone"]["path"] == shown
    assert recipe.model_copy(update={"base": "/elsewhere/base"}).published()["base"] == "base"
    given = {name: Path(written) for name in ("mood", "tone")}
    adapters = recipe.model_copy(update={"inits": {}, "adapters": given}).published()["adapters"]
    assert set(adapters.values()) == {shown}


def given_notes(finished: Path, folder: Path, adapters: dict[str, str]) -> list[str]:
    raw = tiny_study.recipe(inits={}, adapters=adapters, merging=[{"rule": "tsv", "scales": [1.0]}])
    return run_study(Recipe.parse(raw, "r").resolved(finished), folder).notes


def test_of_given_adapters_only_what_is_known_is_told(finished: Path, tmp_path: Path) -> None:
    adapters = {name: f"study/adapters/LoRA/{name}" for name in ("mood", "tone")}
    notes = given_notes(finished, tmp_path / "ours", adapters)
    assert "mood, tone: trained on these rows; held-out ones chose the checkpoint (loraloom.json)." in notes
    assert not any("not known" in note or "Scales were chosen" in note for note in notes)
    bare = shutil.copytree(finished / adapters["tone"], tmp_path / "tone")
    facts = json.loads((bare / PROVENANCE).read_text())
    for task in (None, "tone", {**facts["task"], "sha256": "of other rows"}):
        (bare / PROVENANCE).write_text(json.dumps({**facts, "task": task}))
        notes = given_notes(finished, tmp_path / "theirs", {**adapters, "tone": str(bare)})
        told = next(note for note in notes if note.startswith("tone: "))
        assert "not known" in told
        assert "mood: trained on these rows; held-out ones chose the checkpoint (loraloom.json)." in notes
    assert not any("checkpoint" in note for note in notes if not note.startswith(("mood: ", "tone: ")))


def test_given_adapters_come_whole(finished: Path, tmp_path: Path) -> None:
    """Shards are read, a tokenizer comes along, and weights that would be lost are refused before anything runs."""
    adapters = {}
    for name in ("mood", "tone"):
        folder = shutil.copytree(finished / "study" / "adapters" / "LoRA" / name, tmp_path / name)
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        for part in (0, 1):
            shard = dict(list(tensors.items())[part::2])
            save_file(shard, folder / f"adapter_model-{part + 1:05d}-of-00002.safetensors")
        (folder / "tokenizer.json").write_text("{}")
        adapters[name] = str(folder)
    raw = tiny_study.recipe(inits={}, adapters=adapters, merging=[{"rule": "tsv", "scales": [1.0]}])
    result = run_study(Recipe.parse(raw, "r").resolved(finished), tmp_path / "study")
    trained = StudyResult.load(finished / "study" / "results.json")
    assert [one.score for one in result.singles] == [one.score for one in trained.singles if one.init == "LoRA"]
    assert (tmp_path / "study" / "merged" / "given-adapters" / "tsv" / "tokenizer.json").read_text() == "{}"
    for folder in adapters.values():
        (Path(folder) / "non_lora_trainables.bin").write_text("x")
    with pytest.raises(LoraloomError) as told:
        run_study(Recipe.parse(raw, "r").resolved(finished), tmp_path / "again")
    assert str(told.value).count("non_lora_trainables.bin: weights that were trained outside LoRA") == 2
    assert not (tmp_path / "again" / "stages" / "adapter").exists()


def test_a_study_of_its_own_adapters_tells_what_chose_what(finished: Path) -> None:
    notes = StudyResult.load(finished / "study" / "results.json").notes
    assert "Held-out rows chose the checkpoints of the adapters too." in notes
    assert "Scales were chosen on held-out rows, with their labels." in notes
