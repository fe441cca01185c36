"""The adapters below a folder: grouped by base and layers, with energies as dense float64 has them, and quickly."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from commands import call, page, refused, said_thrice
from loraloom.adapters.listing import list_adapters, read_verdicts
from loraloom.adapters.peft import CONFIG, read_adapter, write_adapter
from tiny_files import LAYERS, adapter
from tiny_screen import amplified, honest


def put(folder: Path, seed: int, base: str, layers: dict[str, tuple[int, int]] = LAYERS) -> None:
    one = adapter(seed, layers)
    write_adapter(replace(one, config={**one.config, "base_model_name_or_path": base}), folder, provenance={})


def test_groups_are_of_one_base_and_the_same_layers(tmp_path: Path) -> None:
    put(tmp_path / "a", 0, "org/one")
    put(tmp_path / "deep" / "b", 1, "org/one/")  # another name of it
    put(tmp_path / "c", 2, "org/two")
    put(tmp_path / "d", 3, "org/one", {"encoder.0.value": (6, 8)})
    put(tmp_path / "e", 4, "org/one", dict.fromkeys(LAYERS, (7, 8)))
    found = list_adapters(tmp_path)
    assert [(group.base, [one.name for one in group.adapters]) for group in found.groups] == [
        ("org/one", ["a", "deep/b"]),
        ("org/one", ["e"]),
        ("org/one", ["d"]),
        ("org/two", ["c"]),
    ]
    assert found.groups[0].shapes == {(6, 8): 2}
    assert found.groups[2].targets == ["value"]


def test_energy_rank_and_alpha_are_those_that_are_merged(tmp_path: Path) -> None:
    write_adapter(adapter(7), tmp_path / "a", provenance={})
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    alphas = {"lora_alpha": 4, "alpha_pattern": {"0.query": 16}}
    (tmp_path / "a" / CONFIG).write_text(json.dumps({**config, **alphas}))
    dense = sum(float(one.dense().double().square().sum()) for one in read_adapter(tmp_path / "a").updates.values())
    (listed,) = list_adapters(tmp_path).groups[0].adapters
    assert listed.energy == pytest.approx(dense, rel=1e-6)
    assert (listed.rank, listed.alpha, listed.verdict) == ((2, 2), (4, 16), None)


def test_what_cannot_be_read_is_told_and_the_rest_is_listed(tmp_path: Path) -> None:
    put(tmp_path / "a", 0, "org/one")
    put(tmp_path / "cut", 1, "org/one")
    weights = tmp_path / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    told = said_thrice("list", tmp_path)
    assert [one["name"] for one in told["unread"]] == ["cut"]
    assert "cut cannot be read" in " ".join(call("list", tmp_path).stderr.split())
    assert "no adapter is below it" in refused("list", tmp_path / "a" / "none")


def test_a_verdict_is_of_the_very_files_that_were_screened(tmp_path: Path) -> None:
    for name, one in {**honest(4), "odd": amplified(50)}.items():
        write_adapter(one, tmp_path / name, provenance={})
    record = tmp_path / "screening.json"
    paths = sorted(path for path in tmp_path.iterdir())
    assert call("screen", *paths, "--record", record).exit_code == 3
    assert set(read_verdicts(record).values()) >= {"pass", "refuse"}
    assert "is there already" in refused("screen", *paths, "--record", record)
    shown = {one.name: one.verdict for one in list_adapters(tmp_path).groups[0].adapters}
    assert shown["odd"] == "refuse"
    write_adapter(honest(5)["h4"], tmp_path / "h0", provenance={}, overwrite=True)
    shown = {one.name: one.verdict for one in list_adapters(tmp_path).groups[0].adapters}
    assert shown["h0"] is None
    assert shown["h1"] == "pass"
    assert "odd" in page("list", tmp_path)
    record.write_text("[]")
    assert "screening.json" in refused("list", tmp_path)


def test_two_hundred_adapters_of_five_bases_take_little(tmp_path: Path) -> None:
    layers = {f"encoder.{index}.query": (64, 64) for index in range(12)}
    for index in range(40):
        for base in range(5):
            place = tmp_path / f"{base}" / f"{index}"
            if index == 0:
                put(place, base, f"org/{base}", layers)
            else:
                shutil.copytree(tmp_path / f"{base}" / "0", place, copy_function=os.link)
    began = time.process_time()
    found = list_adapters(tmp_path)
    assert time.process_time() - began < 3
    assert [len(group.adapters) for group in found.groups] == [40] * 5


def test_files_of_image_tools_are_listed_and_a_model_s_are_not(tmp_path: Path) -> None:
    A, B = torch.arange(6.0).reshape(2, 3), torch.arange(8.0).reshape(4, 2) - 3
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    kohya = {f"{stem}.lora_down.weight": A, f"{stem}.lora_up.weight": B, f"{stem}.alpha": torch.tensor(1.0)}
    put(tmp_path / "texts", 0, "org/one")
    save_file({"other": A}, tmp_path / "texts" / "avoid.safetensors")
    (tmp_path / "images").mkdir()
    save_file(kohya, tmp_path / "images" / "style.safetensors", {"ss_base_model_version": "sd_v1"})
    save_file({"model.weight": A}, tmp_path / "images" / "model.safetensors")
    (tmp_path / "images" / "cut.safetensors").write_bytes(b"{")
    found = list_adapters(tmp_path)
    assert [(group.base, [one.name for one in group.adapters]) for group in found.groups] == [
        ("org/one", ["texts"]),
        ("sd_v1", ["images/style.safetensors"]),
    ]
    assert found.groups[1].adapters[0].energy == pytest.approx(float((B @ A / 2).square().sum()))
    assert list(found.unread) == ["images/cut.safetensors"]
