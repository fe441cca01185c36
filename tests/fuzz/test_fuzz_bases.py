"""Base models and heads that are malformed: fused into, loaded, and read beside a merged adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import as_json, judge, many, spoiled, torn
from hypothesis import given, strategies as st
from safetensors.torch import load_file, save

import tiny
from loraloom import Adapter, Changes, Head, Update, fuse, heads_by_task, merge, write_adapter, write_merged
from loraloom.adapters.peft import read_adapter
from loraloom.model.load import load_backbone

MODULE = "model.layers.0.self_attn.q_proj"
HEAD = {"score.weight": torch.ones(2, 16), "score.bias": torch.zeros(2)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and a merged adapter with heads beside it."""
    place = tmp_path_factory.mktemp("bases")
    tiny.base_folder("llama", place / "base")
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "target_modules": ["q_proj"]}
    for name in ("mood", "tone"):
        update = Update(torch.ones(16, 1), torch.ones(1, 16))
        write_adapter(Adapter({MODULE: update}, config, dict(HEAD)), place / name, provenance={"task": name})
    write_merged(merge([read_adapter(place / name) for name in ("mood", "tone")], "weighted"), place / "merged")
    return place


def odd(place: Path, **files: bytes) -> Path:
    """Return a copy of the base with these files in place of its own."""
    shutil.rmtree(place / "odd", ignore_errors=True)
    shutil.copytree(place / "base", place / "odd")
    for name, content in files.items():
        (place / "odd" / name.replace("__", ".")).write_bytes(content)
    return place / "odd"


def fused(base: Path) -> Path:
    """Fuse an update of one layer into a base."""
    out = base.parent / "fused"
    shutil.rmtree(out, ignore_errors=True)
    update = Update(torch.ones(16, 1), torch.ones(1, 16))
    return fuse(base, out, Changes({MODULE: (16, 16)}), lambda _: update).folder


def right(folder: Path) -> str:
    """Tell what is wrong with a fused checkpoint: its layer must be finite and its config.json JSON."""
    json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = [load_file(path) for path in folder.glob("*.safetensors")]
    weight = next((one[f"{MODULE}.weight"] for one in tensors if f"{MODULE}.weight" in one), None)
    return "" if weight is not None and weight.isfinite().all() else "the layer is not in it, or not finite"


CONFIG: dict[str, Any] = json.loads(tiny.CONFIGS["llama"]().to_json_string(use_diff=False))


@many
@given(config=spoiled({**CONFIG, "architectures": ["LlamaForCausalLM"]}, times=1))
def test_configs_of_bases_to_fuse_into(place: Path, config: Any) -> None:
    judge("base", lambda: fused(odd(place, config__json=as_json(config))), check=right)


@many
@given(index=spoiled({"metadata": {"total_size": 9}, "weight_map": {f"{MODULE}.weight": "model.safetensors"}}))
def test_indexes_of_bases_to_fuse_into(place: Path, index: Any) -> None:
    files = {"model.safetensors.index__json": as_json(index)}
    judge("base", lambda: fused(odd(place, **files)), check=right)


@many
@given(data=st.data())
def test_torn_weights_of_bases(place: Path, data: st.DataObject) -> None:
    weights = (place / "base" / "model.safetensors").read_bytes()
    content = data.draw(torn(weights[:4000])) + weights[4000:]
    base = odd(place, model__safetensors=content)
    judge("base", lambda: fused(base))
    judge("base", lambda: load_backbone(str(base)))


@many
@given(
    content=st.one_of(torn(save(HEAD)), spoiled({"score.weight": [2, 16], "score.bias": [2]})),
    value=st.sampled_from([1.0, float("nan"), float("inf"), 1e38]),
)
def test_heads_beside_a_merged_adapter(place: Path, content: Any, value: float) -> None:
    if not isinstance(content, bytes):
        shapes = content.items() if isinstance(content, dict) else ()
        sizes = {str(name): shape for name, shape in shapes if _is_shape(shape)}
        content = save({name: torch.full(shape, value) for name, shape in sizes.items() if name.isprintable()})
    (place / "merged" / "heads" / "mood.safetensors").write_bytes(content)

    def usable(heads: dict[str, Any]) -> str:
        found: Head = heads["mood"].head
        found.logits(torch.ones(1, found.weight.shape[1]))
        return "" if all(tensor.isfinite().all() for tensor in found.tensors.values()) else "values that are not finite"

    judge("head", lambda: heads_by_task(place / "merged"), check=usable)


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and len(shape) < 4 and all(type(size) is int and 0 <= size < 20 for size in shape)
