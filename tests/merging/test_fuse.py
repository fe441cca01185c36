"""Fusing against PEFT's merge and against float64 sums; bytes that stay; refusals, and nothing left behind."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import loraloom.merging.fuse
import loraloom.merging.shards
import tiny
from loraloom.adapters.peft import read_adapter
from loraloom.adapters.update import Adapter, Update
from loraloom.errors import LoraloomError
from loraloom.files.outputs import RECORD
from loraloom.merging.fuse import FusedFacts, fuse
from loraloom.merging.placement import Changes

CAUSAL = ("llama", "gpt2")
TARGETS = {
    "bert": ["query", "dense"],
    "llama": ["q_proj", "down_proj", "lm_head"],
    "gpt2": ["c_attn", "c_proj"],
    "t5": ["q", "wo"],
}


def base_of(kind: str, folder: Path, *, dtype: torch.dtype = torch.float32, shard: str = "1GB", **config: Any) -> Path:
    """Write a tiny base model of `kind`, in shards of at most `shard`."""
    torch.manual_seed(0)
    of = AutoModelForCausalLM if kind in CAUSAL else AutoModel
    settings = tiny.CONFIGS[kind]()
    for key, value in config.items():
        setattr(settings, key, value)
    model = of.from_config(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    tiny.tokenizer(kind).save_pretrained(folder)
    return folder


def adapter_of(kind: str, base: Path, folder: Path, *targets: str, keep: list[str] | None = None) -> Adapter:
    """Write a random PEFT adapter of `base` and read it; on the classifier for encoders, whose paths have a prefix."""
    torch.manual_seed(1)
    of = AutoModelForCausalLM if kind in CAUSAL else AutoModelForSequenceClassification
    model = of.from_pretrained(base, dtype=torch.float32)
    chosen = list(targets) or TARGETS[kind]
    config = LoraConfig(r=3, lora_alpha=5, target_modules=chosen, init_lora_weights=False, modules_to_save=keep)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
    adapted.save_pretrained(folder)
    return read_adapter(folder)


def fuse_adapter(base: Path, output: Path, adapter: Adapter, head: Any = None, **options: Any) -> FusedFacts:
    """Fuse `adapter` as the command does."""
    shapes = {name: (shape.m, shape.n) for name, shape in adapter.shapes.items()}
    changes = Changes(shapes, bool(adapter.config.get("fan_in_fan_out")), adapter.forms, head or {})
    return fuse(base, output, changes, adapter.updates.__getitem__, **options)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a folder's shards."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def outputs(model: Any) -> torch.Tensor:
    """Return the logits or hidden states of a fixed batch, float32."""
    ids = torch.arange(5, 25).reshape(2, 10)
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=ids, **more)[0].float()


@pytest.mark.parametrize("shard", ["6KB", "1GB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", list(TARGETS))
def test_equals_the_merge_of_peft(kind: str, dtype: torch.dtype, shard: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(loraloom.merging.shards, "_BLOCK", 200)  # several blocks a tensor, the last one shorter
    base = base_of(kind, tmp_path / "base", dtype=dtype, shard=shard)
    adapter = adapter_of(kind, base, tmp_path / "adapter")
    facts = fuse_adapter(base, tmp_path / "out", adapter)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (shard == "6KB")

    before, after = stored(base), stored(tmp_path / "out")
    assert list(before) == list(after)
    merged = dict(before)
    for module, update in adapter.updates.items():
        dense = update.B.double() @ update.A.double()
        name = facts.tensors[module]
        merged[name] = before[name].double() + (dense.T if kind == "gpt2" else dense)
    for name, tensor in after.items():
        assert tensor.dtype == dtype
        if name in facts.tensors.values():
            step = 2e-7 if dtype == torch.float32 else 2**-8
            assert ((tensor.double() - merged[name]).abs() <= step * merged[name].abs() + 1e-7).all()
            assert not torch.equal(tensor, before[name])
        else:
            assert torch.equal(tensor, before[name])
    # PEFT merges in the model that the adapter was made on; its backbone is what the checkpoint holds
    of = AutoModelForCausalLM if kind in CAUSAL else AutoModelForSequenceClassification
    theirs: Any = of.from_pretrained(base, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "adapter").merge_and_unload()
    theirs = theirs if kind in CAUSAL else theirs.base_model
    # a classifier of T5 holds the whole T5Model
    mine: Any = (AutoModelForCausalLM if kind in CAUSAL else AutoModel).from_pretrained(tmp_path / "out")
    assert mine.dtype == dtype
    want, have = outputs(theirs), outputs(mine.float())
    assert (want - have).norm() / want.norm() < (1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("kind", list(TARGETS))
def test_what_no_update_touches_keeps_its_bytes(kind: str, tmp_path: Path) -> None:
    base = base_of(kind, tmp_path / "base", dtype=torch.bfloat16, shard="6KB")
    adapter = adapter_of(kind, base, tmp_path / "adapter")
    facts = fuse_adapter(base, tmp_path / "out", adapter, files={"README.md": "card\n"})
    adapted = set(facts.tensors.values())
    for path in base.glob("*.safetensors"):
        old, new = path.read_bytes(), (tmp_path / "out" / path.name).read_bytes()
        start = 8 + int.from_bytes(old[:8], "little")
        assert old[:start] == new[:start]
        header = json.loads(old[8:start])
        assert header.pop("__metadata__") == {"format": "pt"}
        for name, entry in header.items():
            here = slice(*(start + offset for offset in entry["data_offsets"]))
            assert (old[here] == new[here]) == (name not in adapted)
    for name in ("config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"):
        assert (base / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert not facts.untied
    assert facts.left_out == []
    assert facts.size == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())


def test_the_sums_pass_and_catch_a_changed_byte(tmp_path: Path) -> None:
    tool = shutil.which("sha256sum")
    if not tool:
        pytest.skip("no sha256sum on this machine")
    base = base_of("llama", tmp_path / "base", shard="6KB")
    adapter = adapter_of("llama", base, tmp_path / "adapter")
    told: list[tuple[int, int]] = []
    facts = fuse_adapter(
        base, tmp_path / "out", adapter, files={"loraloom.json": "{}"}, progress=lambda *a: told.append(a)
    )
    check = [tool, "--strict", "-c", "SHA256SUMS"]
    done = subprocess.run(check, cwd=facts.folder, capture_output=True, text=True)
    assert done.returncode == 0
    there = {path.name for path in facts.folder.iterdir()} - {"SHA256SUMS", RECORD}
    assert len(done.stdout.splitlines()) == len(there) == len(facts.sha256)
    size = sum(tensor.nbytes for tensor in stored(base).values())
    assert told[-1] == (size, size)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    (facts.folder / "tokenizer.json").write_bytes(b"{}")
    assert subprocess.run(check, cwd=facts.folder, capture_output=True).returncode != 0


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("shard", ["6KB", "1GB"])
def test_a_tied_output_becomes_a_tensor_of_its_own(kind: str, shard: str, tmp_path: Path) -> None:
    base = base_of(kind, tmp_path / "base", shard=shard, tie_word_embeddings=True)
    assert "lm_head.weight" not in stored(base)
    adapter = adapter_of(kind, base, tmp_path / "adapter", *TARGETS[kind], "lm_head")
    assert "lm_head.base_layer.weight" in adapter.copies  # PEFT keeps copies of the base's own
    facts = fuse_adapter(base, tmp_path / "out", adapter, head=adapter.head)
    assert facts.untied
    assert facts.added == []
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    words = model.get_input_embeddings().weight.clone()
    # merged, PEFT would change the embedding too: what the adapter was trained as is its forward pass
    want = outputs(PeftModel.from_pretrained(model, tmp_path / "adapter"))
    mine: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(outputs(mine), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(mine.get_input_embeddings().weight, words)
    if shard == "6KB":
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored(tmp_path / "out").values())
        holder = load_file(tmp_path / "out" / index["weight_map"]["lm_head.weight"])
        assert "lm_head.weight" in holder


@pytest.mark.parametrize("flag", [True, False])
def test_square_conv1d_weights_are_transposed(flag: bool, tmp_path: Path) -> None:
    base = base_of("gpt2", tmp_path / "base")
    targets = ["attn.c_proj"] if flag else ["c_attn", "attn.c_proj"]  # without the flag, c_attn's shape tells
    adapter = adapter_of("gpt2", base, tmp_path / "adapter", *targets)
    shapes = {name: (shape.m, shape.n) for name, shape in adapter.shapes.items()}
    facts = fuse(base, tmp_path / "out", Changes(shapes, transposed=flag), adapter.updates.__getitem__)
    name = "transformer.h.0.attn.c_proj"
    want = stored(base)[f"{name}.weight"] + adapter.updates[name].dense().T
    torch.testing.assert_close(stored(facts.folder)[f"{name}.weight"], want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_dense_updates_beside_other_dtypes(dtype: torch.dtype, transposed: bool, tmp_path: Path) -> None:
    """A float64 dW onto every dtype, with bytes and a scalar beside it, and a head that must stay aligned."""
    torch.manual_seed(0)
    base, shape = tmp_path / "base", (6, 4)
    base.mkdir()
    tensors = {
        "a.weight": torch.randn(shape[::-1] if transposed else shape).to(dtype),
        "mask": torch.ones(3, dtype=torch.uint8),
        "steps": torch.tensor(7),
        "bias": torch.randn(5).bfloat16(),
    }
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt", "made": "by hand"})
    (base / "config.json").write_text("{}")
    added = torch.randn(3, 5)
    dense = torch.randn(shape, dtype=torch.float64)
    facts = fuse(
        base, tmp_path / "out", Changes({"a": shape}, transposed=transposed, head={"head.w": added}), lambda _: dense
    )
    after = stored(facts.folder)
    want = tensors["a.weight"].double() + (dense.T if transposed else dense)
    torch.testing.assert_close(
        after["a.weight"], want.to(dtype), rtol=torch.finfo(dtype).eps, atol=3e-7 * (dtype != torch.float64)
    )
    assert after["a.weight"].dtype == dtype
    assert all(torch.equal(after[name], tensors[name]) for name in ("mask", "steps", "bias"))
    torch.testing.assert_close(after["head.w"].double(), added.double(), rtol=2**-8, atol=0)
    assert facts.added == ["head.w"]
    content = (facts.folder / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header.pop("__metadata__") == {"format": "pt", "made": "by hand"}
    # every tensor starts at a multiple of its own width, as readers that map the file need it
    assert all(entry["data_offsets"][0] % after[name].itemsize == 0 for name, entry in header.items())


def test_the_head_takes_its_place_under_the_names_of_the_checkpoint(tmp_path: Path) -> None:
    base = base_of("bert", tmp_path / "base", shard="6KB")
    adapter = adapter_of("bert", base, tmp_path / "adapter", "query", keep=["classifier", "pooler"])
    facts = fuse_adapter(base, tmp_path / "out", adapter, head=adapter.head)
    assert facts.tensors["bert.encoder.layer.0.attention.self.query"] == "encoder.layer.0.attention.self.query.weight"
    assert sorted(facts.replaced) == ["pooler.dense.bias", "pooler.dense.weight"]
    assert sorted(facts.added) == ["classifier.bias", "classifier.weight"]
    whole: Any = AutoModelForSequenceClassification.from_pretrained(base)
    want = outputs(PeftModel.from_pretrained(whole, tmp_path / "adapter"))
    mine = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(outputs(mine), want, rtol=1e-5, atol=1e-5)


def test_a_prefix_may_be_put_on(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base")
    update = Update(torch.ones(16, 1), torch.ones(1, 16))
    modules = [f"layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    facts = fuse(base, tmp_path / "out", Changes(dict.fromkeys(modules, (16, 16))), lambda _: update)
    assert facts.tensors == {module: f"model.{module}.weight" for module in modules}


def test_updates_are_asked_for_once_in_the_order_of_the_shards(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base", shard="6KB")
    adapter = adapter_of("llama", base, tmp_path / "adapter")
    asked: list[str] = []

    def delta(module: str) -> Update:
        asked.append(module)
        return adapter.updates[module]

    shapes = {name: (shape.m, shape.n) for name, shape in adapter.shapes.items()}
    torch.set_num_threads(2)
    try:
        facts = fuse(base, tmp_path / "out", Changes(shapes), delta)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert sorted(asked) == sorted(shapes)
    home = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    files = [home[facts.tensors[module]] for module in asked]
    assert files == sorted(files)


def test_a_stale_copy_in_another_shard_is_no_tensor_of_the_model(llama: Path) -> None:
    home = json.loads((llama / "model.safetensors.index.json").read_text())["weight_map"][f"{QUERY}.weight"]
    last = max(llama.glob("*.safetensors"))
    assert last.name != home
    stale = torch.full((16, 16), 9.0)
    save_file({**load_file(last), f"{QUERY}.weight": stale}, last, metadata={"format": "pt"})
    update = Update(torch.ones(16, 1), torch.ones(1, 16))
    facts = fuse(llama, llama.parent / "out", Changes({QUERY: (16, 16)}), lambda _: update)
    before, after = (load_file(folder / home)[f"{QUERY}.weight"] for folder in (llama, facts.folder))
    torch.testing.assert_close(after, before + 1)
    assert torch.equal(load_file(facts.folder / last.name)[f"{QUERY}.weight"], stale)


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A llama in shards, with a tied output."""
    return base_of("llama", tmp_path / "base", shard="6KB", tie_word_embeddings=True)


QUERY = "model.layers.0.self_attn.q_proj"


def refused(base: Path, *words: str, out: str = "out", shapes: Mapping[str, Any] | None = None, **options: Any) -> str:
    """Fuse and be refused, with `words` in the message and nothing left or changed; return the message."""
    before = sorted(base.parent.rglob("*"))
    wanted = {QUERY: (16, 16)} if shapes is None else shapes

    def delta(module: str) -> Update:
        raise AssertionError(f"asked for {module} though something is wrong")

    with pytest.raises(LoraloomError) as caught:
        fuse(base, base.parent / out, Changes(wanted, **options), delta)
    for word in words:
        assert word in str(caught.value)
    assert sorted(base.parent.rglob("*")) == before
    return str(caught.value)


def test_modules_that_do_not_fit_are_told_together(llama: Path) -> None:
    shapes = {
        "model.layers.0.self_attn.q_prj": (16, 16),
        "model.layers.0.self_attn.k_proj": (16, 24),
        "model.norm": (16, 16),
    }
    told = refused(llama, "no module model.layers.0.self_attn.q_prj", "did you mean", "q_proj", shapes=shapes)
    assert "k_proj.weight: is 8 x 16, its update is 16 x 24" in told
    assert "model.norm.weight: is 16, its update is 16 x 16" in told


def test_an_ambiguous_prefix_is_refused(tmp_path: Path) -> None:
    base = base_of("t5", tmp_path / "base")
    module = "block.0.layer.0.SelfAttention.q"
    refused(base, f"could be decoder.{module} or encoder.{module}", shapes={module: (16, 16)})


def test_quantised_weights_are_refused(llama: Path) -> None:
    path = next(path for path in sorted(llama.glob("*.safetensors")) if f"{QUERY}.weight" in load_file(path))
    whole = load_file(path)
    weight = whole[f"{QUERY}.weight"]
    save_file({**whole, f"{QUERY}.weight": weight.to(torch.float8_e4m3fn)}, path)
    refused(llama, f"{QUERY}.weight: is F8_E4M3, quantised", "dequantize")
    index = json.loads((llama / "model.safetensors.index.json").read_text())
    del whole[f"{QUERY}.weight"], index["weight_map"][f"{QUERY}.weight"]
    save_file({**whole, f"{QUERY}.qweight": weight.to(torch.int32)}, path)
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(llama, f"{QUERY}.weight: not in the checkpoint, which has qweight: quantised")


def test_outputs_that_are_not_wanted_are_refused(llama: Path, monkeypatch: Any) -> None:
    refused(llama, "is an input", out="base")
    refused(llama, "lies inside the input", out="base/out")
    refused(llama, "holds the input", out=".")
    (llama.parent / "out").mkdir()
    (llama.parent / "out" / "mine.txt").write_text("")
    refused(llama, "mine.txt is not ours", "no module gone", "2 problems", shapes={"gone": (16, 16)})
    shutil.rmtree(llama.parent / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))  # type: ignore[attr-defined]
    refused(llama, "are free")


def test_ties_that_cannot_be_parted_are_refused(llama: Path, tmp_path: Path) -> None:
    words = torch.zeros(27, 16)
    refused(llama, "embed_tokens.weight: may be tied", head={"model.embed_tokens.weight": words})
    path = llama / "config.json"
    config = json.loads(path.read_text())
    output = {QUERY: (16, 16), "lm_head": (27, 16)}
    path.write_text(json.dumps({**config, "text_config": {"model_type": "llama"}}))
    refused(llama, "lm_head.weight: may be tied", shapes=output)
    path.write_text(json.dumps({**config, "tie_word_embeddings": False}))
    refused(llama, "config.json says that it is not tied", shapes=output)
    path.write_text(json.dumps(config))
    refused(llama, "no embedding of its shape", shapes={"lm_head": (28, 16)})
    t5 = base_of("t5", tmp_path / "t5" / "base")
    refused(t5, "lm_head.weight: may be tied", shapes={"lm_head": (27, 16)})


def test_heads_that_do_not_fit_are_refused(llama: Path) -> None:
    head = {"model.norm.weight": torch.zeros(3), f"{QUERY}.weight": torch.full((16, 16), torch.inf)}
    refused(
        llama,
        "model.norm.weight: is 16, the adapter's is 3",
        f"{QUERY}.weight: the adapter's values overflow F32",
        f"{QUERY}.weight: both adapted and in the head",
        "3 problems",
        head=head,
    )


# --- nothing half-written ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "told"), [(60000.0, "overflows float16"), (torch.nan, "not finite, before any")])
def test_an_overflow_names_its_tensor_and_leaves_nothing(value: float, told: str, tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base", dtype=torch.float16, shard="6KB")
    path = next(
        path for path in sorted(base.glob("*.safetensors")) if "model.layers.1.mlp.up_proj.weight" in load_file(path)
    )
    whole = load_file(path)
    whole["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(whole, path)
    update = Update(torch.full((24, 1), 100.0), torch.full((1, 16), 100.0))
    shapes = {f"model.layers.{layer}.mlp.up_proj": (24, 16) for layer in (0, 1)}
    with pytest.raises(LoraloomError) as caught:
        fuse(base, tmp_path / "out", Changes(shapes), lambda _: update)
    assert f"{path}: model.layers.1.mlp.up_proj.weight: " in str(caught.value)
    assert told in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_midway_leaves_nothing(error: type[BaseException], llama: Path) -> None:
    asked: list[str] = []

    def delta(module: str) -> Update:
        asked.append(module)
        if len(asked) == 2:
            raise error
        return Update(torch.ones(16, 1), torch.ones(1, 16))

    shapes = {f"model.layers.{layer}.self_attn.q_proj": (16, 16) for layer in (0, 1)}
    with pytest.raises(error):
        fuse(llama, llama.parent / "out", Changes(shapes), delta)
    assert len(asked) == 2
    assert list(llama.parent.iterdir()) == [llama]


def test_a_kill_midway_leaves_nothing_that_looks_whole(llama: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from loraloom.merging.fuse import fuse
from loraloom.merging.placement import Changes
base = Path({str(llama)!r})
changes = Changes({{{QUERY!r}: (16, 16)}})
fuse(base, base.parent / "out", changes, lambda _: os.kill(os.getpid(), signal.SIGKILL))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert not (llama.parent / "out").exists()


def test_a_shard_that_shrinks_while_it_is_read_is_told(llama: Path) -> None:
    last = max(llama.glob("*.safetensors"))

    def delta(module: str) -> Update:
        last.write_bytes(last.read_bytes()[:200])
        return Update(torch.ones(16, 1), torch.ones(1, 16))

    with pytest.raises(LoraloomError, match="it changed while it was used"):
        fuse(llama, llama.parent / "out", Changes({QUERY: (16, 16)}), delta)
    assert list(llama.parent.iterdir()) == [llama]
