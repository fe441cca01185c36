"""`loraloom screen`, and what `merge` does with a screening: warn, refuse, drop, clip, and tell of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tiny
from commands import call, refused, said
from loraloom.adapters.peft import read_adapter, read_provenance, write_adapter
from loraloom.adapters.update import Adapter, Update
from loraloom.analysis import screening_texts
from tiny_screen import amplified, honest
from tiny_study import write_study


@pytest.fixture(scope="module")
def stall(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stall")
    for name, one in {**honest(4), "odd": amplified(50)}.items():
        write_adapter(one, folder / name, provenance={})
    return folder


def test_screen_tells_verdicts_with_reasons_and_writes_a_page(stall: Path, tmp_path: Path) -> None:
    paths = sorted(stall.iterdir())
    done = call("screen", *paths, "-o", tmp_path / "page.html")
    assert done.exit_code == 3
    words = " ".join(done.stdout.split())
    assert "odd: refuse" in words
    assert "no protection" in words
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "odd: refuse" in html
    assert "no protection" in html
    told = json.loads(call("screen", *paths, "--json").stdout)
    odd = next(one for one in told["adapters"] if one["name"] == "odd")
    assert odd["verdict"] == "refuse"
    energy = next(one for one in odd["findings"] if one["detector"] == "energy")
    assert energy["value"] > 10 * energy["compared"]
    assert "is there already" in refused("screen", *paths, "-o", tmp_path / "page.html")


def test_honest_adapters_of_a_folder_are_compared_with(stall: Path, tmp_path: Path) -> None:
    good = tmp_path / "good"
    for name, one in honest(5).items():
        write_adapter(one, good / name, provenance={})
    found = said("screen", stall / "h0", stall / "h1", "--reference", good)
    assert (found["compared"], len(found["reference"])) == (6, 5)
    assert "no adapter is below it" in refused("screen", stall / "h0", "--reference", stall / "h1" / "none")


def test_merge_warns_refuses_drops_and_records_it(stall: Path, tmp_path: Path) -> None:
    paths = sorted(stall.iterdir())
    told = said("merge", *paths, "-o", tmp_path / "warned")
    assert told["screening"]["verdicts"]["odd"] == "refuse"
    assert any("odd is suspicious" in warning for warning in told["warnings"])
    assert "odd" in refused("merge", *paths, "--screen", "refuse", "-o", tmp_path / "no")
    assert not (tmp_path / "no").exists()
    weights = [word for _ in paths for word in ("--weight", "1")]
    told = said("merge", *paths, "--drop-refused", *weights, "-o", tmp_path / "dropped")
    assert [one["name"] for one in told["inputs"]] == ["h0", "h1", "h2", "h3"]
    record = read_provenance(tmp_path / "dropped")
    assert record["screening"]["dropped"] == ["odd"]
    assert "refused by the screening" in (tmp_path / "dropped" / "README.md").read_text(encoding="utf-8")
    assert said("merge", *paths, "--screen", "off", "-o", tmp_path / "off")["screening"] is None
    assert "did you mean" in refused("merge", *paths, "--screen", "warm", "-o", tmp_path / "no")


def test_clip_brings_each_layer_to_the_median_times_a_factor_and_is_told(stall: Path, tmp_path: Path) -> None:
    paths = sorted(stall.iterdir())
    told = said("merge", *paths, "--rule", "task_arithmetic", "--clip", "2", "--scale", "1", "-o", tmp_path / "clipped")
    members = [read_adapter(path) for path in paths]
    at = members[0].config["target_modules"] and next(iter(members[0].shapes))
    energies = sorted(one.updates[at].energy() for one in members)
    limit = 2 * energies[2]
    dense = sum(
        min(1.0, (limit / one.updates[at].energy()) ** 0.5) * one.updates[at].dense().double() for one in members
    )
    found = read_adapter(tmp_path / "clipped").updates[at].dense().double()
    assert float((found - dense).norm() / dense.norm()) < 1e-5
    assert told["clip"] == 2
    card = (tmp_path / "clipped" / "README.md").read_text(encoding="utf-8")
    assert "times the adapters' median" in card
    words = refused("merge", *paths, "--clip", "2", "--normalise", "norm", "-o", tmp_path / "no")
    assert "choose one" in words


def test_texts_of_a_recipe_or_of_files_let_the_model_run_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screening_texts, "generic_rows", lambda count: tiny.task("generic", rows=count).train)
    recipe, chance = write_study(tmp_path / "study"), torch.Generator().manual_seed(0)
    layers = [f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)]
    for name in ("mood", "tone"):
        updates = {
            at: Update(torch.randn(16, 2, generator=chance), torch.randn(2, 16, generator=chance)) for at in layers
        }
        head = {"classifier.weight": torch.randn(2, 16, generator=chance), "classifier.bias": torch.zeros(2)}
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["query"], "task_type": "SEQ_CLS"}
        config |= {"base_model_name_or_path": str(tmp_path / "study" / "base"), "modules_to_save": ["classifier"]}
        write_adapter(Adapter(updates, config, head=head), tmp_path / name, provenance={})
    folders = [tmp_path / "mood", tmp_path / "tone"]
    told = json.loads(call("screen", *folders, "--recipe", recipe, "--word", "blue", "--json").stdout)
    seen = {finding["detector"] for one in told["adapters"] for finding in one["findings"]}
    assert {"own task", "response", "search light"} <= seen
    files = [tmp_path / "study" / f"{name}.test.jsonl" for name in ("mood", "tone")]
    texts = ["--unlabelled", files[0], "--unlabelled", files[1], "--column", "text"]
    told = json.loads(call("screen", *folders, *texts, "--json").stdout)
    assert "own task" in told["adapters"][0]["silent"]  # it takes labels
    assert "one of the two" in refused("screen", *folders, "--recipe", recipe, *texts)
    assert "--word is put into texts" in refused("screen", *folders, "--word", "blue")
    assert "texts of each task" in refused("screen", *folders, "--unlabelled", files[0], "--unlabelled", "generic")


def test_adapters_of_several_tools_are_screened_together(tmp_path: Path) -> None:
    chance, paths = torch.Generator().manual_seed(0), []
    for name in ("one", "two", "three", "four"):
        A, B = torch.randn(2, 8, generator=chance), torch.randn(6, 2, generator=chance)
        if name == "one":
            stem = "lora_unet_mid_block_attentions_0_proj_in"
            tensors = {f"{stem}.lora_down.weight": A, f"{stem}.lora_up.weight": B, f"{stem}.alpha": torch.tensor(2.0)}
        else:
            stem = "unet.mid_block.attentions.0.proj_in"
            tensors = {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B}
        paths.append(tmp_path / f"{name}.safetensors")
        save_file(tensors, paths[-1])
    told = json.loads(call("screen", *paths, "--json").stdout)
    assert told["compared"] == 3
    for one in told["adapters"]:  # all of one layer by one name, or they had nothing in common
        assert "same directions" in [finding["detector"] for finding in one["findings"]]
