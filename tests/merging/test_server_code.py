"""Adapters written for a server, read by that server's own loading code on a CPU, where its sources are at hand.

LORALOOM_SERVER_CODE names a folder with `vllm` and `sglang`, the packages of these names, and `llama.cpp`, a checkout;
what is not there is skipped. docs/compatibility.md tells where the sources come from and what was found.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from logging import Logger
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from commands import said
from loraloom import Update, read_adapter
from loraloom.adapters.servers import VLLM
from tiny_writers import writer_adapter, writer_base

SOURCES = Path(os.environ.get("LORALOOM_SERVER_CODE", "/nowhere"))
STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}


def sources(name: str) -> Path:
    if not (SOURCES / name).is_dir():
        pytest.skip(f"LORALOOM_SERVER_CODE names no folder with {name}")
    return SOURCES / name


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny Llama with two adapters of ranks 2 and 3 beside it."""
    writer_base(tmp_path / "base")
    for name, rank in (("one", 2), ("two", 3)):
        writer_adapter(tmp_path / "base", tmp_path / name, rank=rank, seed=rank)
    return tmp_path / "base"


def served(base: Path, server: str) -> tuple[Path, dict[str, Update]]:
    """Merge the adapters for `server`; return the folder and the updates in it."""
    place = base.parent
    said("merge", place / "one", place / "two", "--for", server, "-o", place / "merged")
    return place / "merged", dict(read_adapter(place / "merged").updates)


class Stub(ModuleType):
    """A module of which everything can be imported, and nothing is used."""

    __path__ = ()  # a package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class Loader:
    """Loads single files of a package; whatever else of it they import is a stub."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.monkeypatch = monkeypatch

    def stub(self, name: str, **content: Any) -> None:
        """Have a stub of this module and of all around it."""
        for part in (name.rsplit(".", count)[0] for count in range(name.count("."), 0, -1)):
            if part not in sys.modules:
                self.monkeypatch.setitem(sys.modules, part, Stub(part))
        module = Stub(name)
        vars(module).update(content)
        self.monkeypatch.setitem(sys.modules, name, module)

    def load(self, path: str) -> Any:
        """Run a file, and return it as the module that it is."""
        name = f"{self.folder.name}.{path.removesuffix('.py').replace('/', '.')}"
        for used in re.findall(rf"^ *from ({self.folder.name}\.\S+) import", (self.folder / path).read_text(), re.M):
            if used not in sys.modules:
                self.stub(used)
        spec = importlib.util.spec_from_file_location(name, self.folder / path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        self.monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module


def check(found: dict[str, Tensor], updates: dict[str, Update]) -> None:
    assert found.keys() == updates.keys()
    for module, dW in found.items():
        torch.testing.assert_close(dW, updates[module].B.double() @ updates[module].A.double())


def test_vllm_reads_it(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = Loader(sources("vllm"), monkeypatch)
    logger = type("Quiet", (Logger,), {"info_once": lambda *_: None})
    loader.stub("vllm.logger", init_logger=logger)
    loader.stub("vllm.utils.torch_utils", PIN_MEMORY=False)
    loader.stub("vllm.config.lora", LoRAConfig=object)
    loader.stub("vllm", envs=None)
    helper = loader.load("lora/peft_helper.py").PEFTHelper
    weights = loader.load("lora/lora_weights.py")
    loader.load("lora/utils.py")
    model = loader.load("lora/lora_model.py").LoRAModel
    folder, updates = served(base, "vllm")
    told = helper.from_local_dir(str(folder), None)
    told.validate_legal(SimpleNamespace(max_lora_rank=8))
    loras = model.from_local_checkpoint(
        str(folder), {"q_proj", "k_proj", "v_proj"}, told, lora_model_id=1, device="cpu"
    )
    found = {}
    for block in sorted({module.rpartition(".")[0] for module in updates}):
        parts = [loras.loras.get(f"{block}.{last}") for last in STACKED["qkv_proj"]]
        packed = weights.PackedLoRALayerWeights.pack(parts).optimize()
        for last, A, B in zip(STACKED["qkv_proj"], packed.lora_a, packed.lora_b, strict=True):
            if A is not None:
                found[f"{block}.{last}"] = B.double() @ A.double()
    check(found, updates)
    ranks = re.search(r"MaxLoRARanks = Literal\[(.*)\]", (sources("vllm") / "config/lora.py").read_text())
    assert ranks is not None
    assert tuple(map(int, ranks[1].split(","))) == VLLM.ranks


def test_sglang_reads_it(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = Loader(sources("sglang"), monkeypatch)
    number = re.compile(r"layers\.(\d+)\.")
    layer_id = lambda name: int(found[1]) if (found := number.search(name)) else None  # noqa: E731
    loader.stub("sglang.srt.layers.utils", get_layer_id=layer_id)
    config = loader.load("srt/lora/lora_config.py").LoRAConfig
    names = loader.load("srt/lora/utils.py")
    adapter = loader.load("srt/lora/lora.py").LoRAAdapter
    folder, updates = served(base, "sglang")
    told = config(str(folder))
    read = adapter("merged", told, AutoConfig.from_pretrained(base), None, None)
    read.initialize_weights_from_tensors(load_file(folder / "adapter_model.safetensors"))
    assert names.get_normalized_target_modules(told.target_modules) == {"qkv_proj"}
    found = {}
    for index, layer in enumerate(read.layers):
        key = f"base_model.model.model.layers.{index}.self_attn.qkv_proj"
        As = layer.weights[f"{key}.lora_A.weight"].double().split(told.r)
        heights = [16, 8, 8]  # of q, k and v, which has one head
        Bs = layer.weights[f"{key}.lora_B.weight"].double().split(heights)
        for last, A, B in zip(STACKED["qkv_proj"], As, Bs, strict=True):
            found[f"model.layers.{index}.self_attn.{last}"] = read.scaling * B @ A
    silent = {module: found.pop(module) for module in found.keys() - updates.keys()}
    assert all(module.endswith("k_proj") and not dW.any() for module, dW in silent.items())
    check(found, updates)


def test_llamacpp_converts_it(base: Path) -> None:
    gguf = pytest.importorskip("gguf")
    script = sources("llama.cpp") / "convert_lora_to_gguf.py"
    folder, updates = served(base, "llamacpp")
    file = base.parent / "merged.gguf"
    words = [sys.executable, script, folder, "--base", base, "--outfile", file]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    read = gguf.GGUFReader(file)
    alpha = read.get_field("adapter.lora.alpha").contents()
    tensors = {one.name: torch.tensor(one.data).double() for one in read.tensors}
    found = {}
    for index in range(2):
        for part, last, heads in (("attn_q", "q_proj", 2), ("attn_v", "v_proj", 0)):
            A, B = (tensors[f"blk.{index}.{part}.weight.lora_{factor}"] for factor in "ab")
            dW = alpha / B.shape[1] * B @ A
            if heads:  # llama.cpp keeps the two halves of a head's rotation in turns
                dW = dW.view(heads, -1, 2, dW.shape[1]).transpose(1, 2).reshape(dW.shape)
            found[f"model.layers.{index}.self_attn.{last}"] = dW
    check(found, updates)
