"""What merge, align and rules print: a page of 80 columns for people, numbers and lists for --json."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from commands import hints, refused
from loraloom.adapters.peft import read_adapter, write_adapter
from loraloom.adapters.update import Adapter, Update
from loraloom.cli.main import app

NAMES = {"an-adapter-with-a-name-of-many-words-that-says-all-of-it": 8, "legal": 3, "sales": 1}
LAYERS = [f"model.layers.{i}.self_attn.{part}_proj" for i in range(5) for part in "qkvo"]


@pytest.fixture(autouse=True)
def _loud_again() -> Iterator[None]:
    """Commands silence every library in this process; other tests want to hear them."""
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with adapters of three ranks: with heads in heads/, without in plain/."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, rank) in enumerate(NAMES.items()):
        generator = torch.Generator().manual_seed(seed)
        updates = {
            layer: Update(torch.randn(20, rank, generator=generator), torch.randn(rank, 16, generator=generator))
            for layer in LAYERS
        }
        config = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "target_modules": ["q_proj"]}
        head = {"score.weight": torch.randn(2, 10, generator=generator)}
        write_adapter(Adapter(updates, config, head), folder / "heads" / name, provenance={})
        write_adapter(Adapter(updates, config), folder / "plain" / name, provenance={})
    return folder


def call(*words: str | Path) -> Any:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False, env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.stderr
    return done


def adapters(place: Path, kind: str) -> list[Path]:
    return [place / kind / name for name in NAMES]


def words_of(text: str) -> str:
    return " ".join(text.split())


def test_a_merge_ends_with_a_page(place: Path, tmp_path: Path) -> None:
    words = ("merge", *adapters(place, "heads"), "--rank", "2", "--weight", "1", "--weight", "0.5", "--weight", "2")
    done = call(*words, "-o", tmp_path / "out")
    folded = [line for line in done.stdout.splitlines() if not line.startswith(str(tmp_path))]
    assert max(map(len, folded)) <= 80
    told = json.loads(call(*words, "-o", tmp_path / "out", "--overwrite", "--json").stdout)
    page = words_of(done.stdout)
    shares = [f"{100 * one['energy_share']:.1f} %" for one in told["inputs"]]
    assert sum(one["energy_share"] for one in told["inputs"]) == pytest.approx(1)
    assert f"legal 3 3 k_proj, o_proj +2 {told['inputs'][1]['energy']:,.0f} 0.5 {shares[1]}" in page
    assert "scale 0.75, the rule's own" in page
    assert "output rank 2, 2 asked for, in 20 layers" in page
    worst = sorted(told["layers"], key=lambda name: -told["layers"][name]["energy_lost"])[:3]
    assert f"{100 * told['energy_lost']:.1f} % in total, by truncation; most in {worst[0]}" in page
    assert all(f"{layer} {100 * told['layers'][layer]['energy_lost']:.1f} %" in page for layer in worst)
    assert not any(f" {layer} " in page for layer in set(LAYERS) - set(worst))
    assert "warning: truncation took" in done.stderr
    assert "next: fit the heads to it, without labels:" in done.stderr
    typed = words_of(done.stderr.replace("\\\n", " "))
    assert typed.endswith(
        words_of(f"loraloom align {tmp_path / 'out'} {' '.join(map(str, words[1:4]))} --recipe RECIPE")
    )


def test_the_json_of_a_merge_is_numbers_lists_and_null(place: Path, tmp_path: Path) -> None:
    told = json.loads(call("merge", *adapters(place, "plain"), "-o", tmp_path / "out", "--json").stdout)
    noted = json.loads((tmp_path / "out" / "loraloom.json").read_text())
    assert told == {"folder": str(tmp_path / "out"), **noted}
    assert (told["scale"], told["scale_from"], told["rank"], told["output_rank"]) == (0.75, "rule", None, 12)
    assert (told["energy_lost"], told["heads"], told["heads_averaged"]) == (pytest.approx(0, abs=1e-6), [], False)
    assert [one["rank"] for one in told["inputs"]] == list(NAMES.values())
    assert set(told["layers"]) == set(LAYERS)
    assert told["options"] == {"k": None}


def test_what_to_do_next_without_heads_is_to_serve_it(place: Path, tmp_path: Path) -> None:
    done = call("merge", *adapters(place, "plain"), "-o", tmp_path / "out")
    assert "vllm serve org/base --enable-lora --lora-modules" in words_of(done.stderr)
    assert "--max-lora-rank 16" in words_of(done.stderr)


def test_the_page_shows_options_as_they_are_typed(place: Path, tmp_path: Path) -> None:
    done = call("merge", *adapters(place, "plain"), "--rule", "cp", "--per-task", "-o", tmp_path / "out")
    assert "rule cp --per-task" in words_of(done.stdout)
    done = call(
        "merge", *adapters(place, "plain"), "--rule", "dare", "--seed", "3", "--overwrite", "-o", tmp_path / "out"
    )
    assert "rule dare --density 0.2 --space full --seed 3" in words_of(done.stdout)
    assert "rule: dare --density 0.2 --space full --seed 3" in (tmp_path / "out" / "README.md").read_text()


def test_a_merge_for_another_tool_says_how_it_is_loaded(place: Path, tmp_path: Path) -> None:
    words = ("merge", *adapters(place, "plain"), "--to", "mlx", "-o", tmp_path / "out")
    done = call(*words)
    assert "written as MLX (mlx-lm) has it: adapters.safetensors" in words_of(done.stdout)
    assert "mlx_lm.load(base_model, adapter_path=" in words_of(done.stderr)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: mlx" in card
    assert "An ordinary adapter of MLX (mlx-lm)" in card
    assert json.loads((tmp_path / "out" / "loraloom.json").read_text())["dialect"] == "mlx"
    call("export", tmp_path / "out", "--for", "vllm", "-o", tmp_path / "served")
    theirs, ours = read_adapter(tmp_path / "served"), read_adapter(tmp_path / "out")
    assert (theirs.dialect, ours.dialect) == ("peft", "mlx")
    assert theirs.config["target_modules"] == sorted(LAYERS)
    for module in LAYERS:
        torch.testing.assert_close(theirs.updates[module].dense(), ours.updates[module].dense())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ("--to", "kohya"),
            "and 17 more is not known; merge it as PEFT writes it: leave --to out next: nothing was merged",
        ),
        (("--to", "diffuser"), "dialect 'diffuser' is unknown"),
        (("--to", "mlx", "--for", "vllm"), "vLLM reads no adapters of MLX"),
        (("--to", "mlx", "--fuse-into", "base"), "--to writes an adapter, --fuse-into a whole checkpoint"),
        (("--to", "mlx", "--heads", "average"), "heads cannot be averaged"),
    ],
)
def test_what_no_tool_takes_is_refused(words: tuple[str, ...], told: str, place: Path, tmp_path: Path) -> None:
    assert told in refused("merge", *adapters(place, "heads"), *words, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_adapter_says_why_its_scale_is_one(place: Path, tmp_path: Path) -> None:
    done = call("merge", place / "plain" / "legal", "-o", tmp_path / "out")
    assert "scale 1, a single adapter stays what it is" in words_of(done.stdout)
    assert "warning: one adapter takes part: there is nothing to merge" in done.stderr


def test_a_dry_run_is_a_page_too(place: Path, tmp_path: Path) -> None:
    words = ("merge", *adapters(place, "heads"), "--rule", "ties", "--dry-run", "-o", tmp_path / "out")
    done = call(*words)
    page = words_of(done.stdout)
    assert max(len(line) for line in done.stdout.splitlines() if not line.startswith(str(tmp_path))) <= 80
    assert f"{tmp_path / 'out'}, not written" in page
    assert "output rank at most 12" in page
    assert "size at most 34.6 kB, in float32" in page
    assert "time about 1 s" in page
    assert "next: write it:" in done.stderr
    told = json.loads(call(*words, "--json").stdout)
    assert (told["kind"], told["output_rank"], told["size"]) == ("dry run", 12, 20 * 12 * 36 * 4)
    assert 0 < told["seconds"] < 5
    assert not (tmp_path / "out").exists()


def test_a_fusion_is_a_page_too(finished: Path, tmp_path: Path) -> None:
    trained = [finished / "study" / "adapters" / "LoRA" / task for task in ("mood", "tone")]
    words = ("merge", *trained, "--rule", "ties", "--fuse-into", finished / "base", "-o", tmp_path / "out")
    done = call(*words)
    page = words_of(done.stdout)
    assert max(len(line) for line in done.stdout.splitlines() if not line.startswith(str(tmp_path))) <= 80
    told = json.loads(call(*words, "--overwrite", "--json").stdout)
    made = told["checkpoint"]
    assert (told["kind"], told["fused_into"], told["heads"]) == ("fused checkpoint", "base", ["mood", "tone"])
    assert made["size"] == sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert len(made["tensors"]) == 4
    assert "4 weights changed" in page
    assert "its head the base's own" in page
    assert "heads mood, tone: one a task, in heads/" in page
    assert f"vllm serve {tmp_path / 'out'}" in words_of(done.stderr.replace("\\\n", ""))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- rule: ties --density 0.2 --divisor count --space full" in card


def test_aligning_is_told_and_noted_in_the_card(finished: Path, tmp_path: Path) -> None:
    trained = [finished / "study" / "adapters" / "LoRA" / task for task in ("mood", "tone")]
    out = tmp_path / "out"
    call("merge", *trained, "-o", out)
    assert "- note:" not in (out / "README.md").read_text()
    done = call("align", out, *trained, "--recipe", finished / "recipe.yaml")
    assert f"{out}: heads aligned, without labels" in words_of(done.stdout)
    assert "mood heads/mood.safetensors" in words_of(done.stdout)
    typed = words_of(done.stderr.replace("\\\n", " "))
    assert typed.endswith(f"loraloom evaluate {out} --recipe {finished / 'recipe.yaml'}")
    note = json.loads((out / "loraloom.json").read_text())["notes"][0]
    assert f"- note: {note}" in (out / "README.md").read_text()
    assert "fit its heads" not in hints("evaluate", out, "--recipe", finished / "recipe.yaml")


def test_an_adapter_with_its_own_head_is_not_taken_for_a_merged_one(finished: Path, tmp_path: Path) -> None:
    trained = [finished / "study" / "adapters" / "LoRA" / task for task in ("mood", "tone")]
    shutil.copytree(trained[0], tmp_path / "mood")
    told = refused("align", tmp_path / "mood", trained[1], "--recipe", finished / "recipe.yaml")
    assert "mood: is no merged adapter: it holds a head of its own" in told
    assert not (tmp_path / "mood" / "heads").exists()


def test_rules_as_json_is_their_schema() -> None:
    every = json.loads(call("rules", "--json").stdout)
    one = json.loads(call("rules", "tsv", "--json").stdout)
    assert every["tsv"] == one
    assert (one["default_scale"], one["needs"], one["output_rank"]) == (0.75, [], "sum")
    assert one["options"]["k"]["default"] is None
    assert every["ties"]["options"]["density"] == {
        "type": "number",
        "exclusiveMinimum": 0,
        "maximum": 1,
        "default": 0.2,
        "description": "share of entries kept per task and layer",
    }


def test_rules_print_pages() -> None:
    assert "polar(U) S polar(V)ᵀ" in call("rules", "tsv").stdout
    assert max(map(len, call("rules").stdout.splitlines())) <= 80
    done = CliRunner().invoke(app, ["rules", "tvs"])
    assert (done.exit_code, "did you mean 'tsv'" in done.stderr) == (2, True)
