"""Adapter folders that are malformed in every file: config, weights, provenance, heads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import as_json, judge, many, spoiled, torn
from hypothesis import given, strategies as st
from safetensors.torch import save

from loraloom import merge, read_adapter, write_merged

MODULES = ("encoder.layer.0.attention.self.query", "encoder.layer.0.attention.self.value")
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "SEQ_CLS",
    "base_model_name_or_path": "org/base",
    "r": 2,
    "lora_alpha": 4,
    "lora_dropout": 0.0,
    "target_modules": ["query", "value"],
    "modules_to_save": ["classifier"],
    "bias": "none",
    "rank_pattern": {"query": 2},
    "alpha_pattern": {"value": 8},
    "use_rslora": False,
    "use_dora": False,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "inference_mode": True,
    "layers_to_transform": None,
    "exclude_modules": None,
}
PROVENANCE: dict[str, Any] = {
    "made_by": "loraloom train",
    "task": "mood",
    "base_fingerprint": "ab" * 32,
    "init": {"rule": "apart", "keep": "free", "scale": "response", "seed": 3},
    "inputs": [{"name": "mood", "task": "mood", "path": None, "sha256": "cd" * 32, "weight": 1.0}],
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.bool, torch.int64]
DTYPES += [torch.float8_e4m3fn, torch.complex64]


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for module in MODULES:
        found[f"base_model.model.{module}.lora_A.weight"] = torch.randn(2, 5, generator=generator)
        found[f"base_model.model.{module}.lora_B.weight"] = torch.randn(6, 2, generator=generator)
    found["base_model.model.classifier.weight"] = torch.randn(3, 6, generator=generator)
    found["base_model.model.classifier.bias"] = torch.randn(3, generator=generator)
    return found


def written(folder: Path, *, config: bytes = b"", weights: bytes = b"", record: bytes = b"") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_bytes(config or as_json(CONFIG))
    (folder / "adapter_model.safetensors").write_bytes(weights or save(tensors()))
    (folder / "loraloom.json").write_bytes(record or as_json(PROVENANCE))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one good adapter, `good`."""
    place = tmp_path_factory.mktemp("adapters")
    written(place / "good", weights=save(tensors(1)))
    return place


def merged_with_a_good_one(place: Path) -> Path:
    """Merge the odd adapter with a good one and write the result, as `loraloom merge` does."""
    adapters = {name: read_adapter(place / name) for name in ("odd", "good")}
    shutil.rmtree(place / "out", ignore_errors=True)
    return write_merged(merge(adapters, "task_arithmetic"), place / "out")


def right(folder: Path) -> str:
    """Tell what is wrong with a merged folder: it must be read again, hold finite numbers, and JSON that is JSON."""
    constants: list[str] = []
    for file in ("adapter_config.json", "loraloom.json"):
        json.loads((folder / file).read_text(encoding="utf-8"), parse_constant=constants.append)
    if constants:
        return f"{constants} in JSON"
    factors = [factor for update in read_adapter(folder).updates.values() for factor in (update.A, update.B)]
    return "" if all(factor.isfinite().all() for factor in factors) else "values that are not finite"


def test_what_is_spoiled_is_good_before(place: Path) -> None:
    written(place / "odd")
    assert right(merged_with_a_good_one(place)) == ""


@many
@given(config=spoiled(CONFIG))
def test_configs(place: Path, config: Any) -> None:
    written(place / "odd", config=as_json(config))
    judge("config", lambda: merged_with_a_good_one(place), check=right)


@many
@given(config=torn(as_json(CONFIG)))
def test_torn_configs(place: Path, config: bytes) -> None:
    written(place / "odd", config=config or b" ")
    judge("config", lambda: merged_with_a_good_one(place), check=right)


@many
@given(record=st.one_of(spoiled(PROVENANCE), torn(as_json(PROVENANCE))))
def test_provenance(place: Path, record: Any) -> None:
    written(place / "odd", record=record or b" " if isinstance(record, bytes) else as_json(record))
    judge("loraloom.json", lambda: merged_with_a_good_one(place), check=right)


@st.composite
def odd_tensors(draw: st.DrawFn) -> bytes:
    """Weights of which some have another name, dtype, shape or value, or are missing."""
    found = tensors()
    for name in draw(st.lists(st.sampled_from(sorted(found)), min_size=1, max_size=4)):
        tensor = found.pop(name, None)
        if tensor is None:
            continue
        what = draw(st.sampled_from(["name", "dtype", "shape", "value", "none", "empty"]))
        if what == "name":
            found[
                draw(st.one_of(st.text(min_size=1, max_size=20), st.just(f"module.{name}"), st.just(f"{name}.x")))
            ] = tensor
        elif what == "dtype":
            found[name] = tensor.to(draw(st.sampled_from(DTYPES)))
        elif what == "shape":
            found[name] = torch.ones(draw(st.lists(st.integers(0, 4), max_size=4)))
        elif what == "value":
            found[name] = tensor.float() * draw(st.sampled_from([float("nan"), float("inf"), 1e38, 1e-45, 0.0]))
        elif what == "empty":
            found[name] = torch.empty(0)
    return save(found)


@many
@given(weights=st.one_of(odd_tensors(), torn(save(tensors()))))
def test_weights(place: Path, weights: bytes) -> None:
    written(place / "odd", weights=weights or b" ")
    judge("weights", lambda: merged_with_a_good_one(place), check=right)
