"""Adapters written for a server: the same update in one rank, as each server's own loading makes it; or why not."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from commands import call, page, refused, said
from loraloom import LoraloomError, merge, read_adapter, write_adapter, write_merged
from loraloom.adapters.servers import SERVERS
from loraloom.adapters.update import Adapter, Form, Update
from loraloom.merging.serving import export_folder
from tiny_writers import writer_base

CONFIGS: dict[str, dict[str, Any]] = {
    "one": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
    "two": {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "use_rslora": True},
    "three": {"r": 3, "target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"down_proj": 5}},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and three adapters of it that differ in rank, layers and scaling."""
    place = tmp_path_factory.mktemp("serving")
    writer_base(place / "base")
    for seed, (name, config) in enumerate(CONFIGS.items()):
        model = AutoModelForCausalLM.from_pretrained(place / "base")
        model = get_peft_model(model, LoraConfig(lora_alpha=7, task_type="CAUSAL_LM", **config))
        torch.manual_seed(seed)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if "lora_" in path:
                    parameter.normal_(std=0.3)
        model.save_pretrained(place / name)
    return place


@pytest.fixture
def private() -> Iterator[None]:
    """A user who lets nobody read new files."""
    before = os.umask(0o077)
    yield
    os.umask(before)


def as_loaded(folder: Path, server: str) -> dict[str, Tensor]:
    """Return what a server makes of a folder: dW by module path, float64, as its own loading code multiplies it."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    assert not [name for name in tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    found = {}
    for name in tensors:
        if not name.endswith(".lora_A.weight"):
            continue
        A, B = tensors[name].double(), tensors[name.replace("lora_A", "lora_B")].double()
        if server in ("llamacpp", "ollama"):  # get_scale of llama-adapter.h: alpha over the rank of this B
            scaling = config["lora_alpha"] / B.shape[1]
        else:  # LoRAAdapter.scaling of SGLang, PEFTHelper._scaling of vLLM where there are no patterns
            assert not any(config[key] for key in ("rank_pattern", "alpha_pattern", "use_rslora"))
            assert A.shape[0] == config["r"]
            scaling = config["lora_alpha"] / config["r"]
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        found[module] = scaling * B @ A
    return found


def dense(folder: Path) -> dict[str, Tensor]:
    """Return dW by module path, float64, of a folder with its config's own patterns, read apart from loraloom."""
    model = AutoModelForCausalLM.from_pretrained(folder.parent / "base")
    model = PeftModel.from_pretrained(model, str(folder))
    return {
        name.removeprefix("base_model.model."): layer.scaling["default"]
        * (layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double())
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A") and len(layer.lora_A)
    }


def logits(place: Path, folder: Path) -> Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "base"), str(folder))
    with torch.no_grad():
        found: Tensor = model.eval()(torch.arange(1, 13)[None]).logits
    return found


@pytest.mark.parametrize("server", SERVERS)
def test_an_export_is_the_same_update_as_each_server_loads_it(
    place: Path, tmp_path: Path, server: str, private: None
) -> None:
    facts = export_folder(place / "three", server, tmp_path / "out")
    expected, found = dense(place / "three"), as_loaded(tmp_path / "out", server)
    assert found.keys() == expected.keys()
    for module in expected:
        torch.testing.assert_close(found[module], expected[module], rtol=1e-6, atol=1e-7)
    rank = 8 if server == "vllm" else 5
    assert (facts.served.rank, facts.ranks, facts.layers) == (rank, [3, 5], 6)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config.get("modules_to_save")) == (rank, rank, None)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("out/*")}
    assert set(modes.values()) == {0o644}, modes
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755


def test_a_merge_for_a_server_is_the_merge_in_one_rank(place: Path, tmp_path: Path) -> None:
    words = ("merge", *(place / name for name in CONFIGS), "-o")
    plain = said(*words, tmp_path / "plain")
    told = said(*words, tmp_path / "served", "--for", "vllm")
    assert told["served"] == {"server": "vllm", "rank": 16}
    assert plain["served"] is None
    assert plain["output_rank"] == told["output_rank"] == 9  # of down_proj 5, of q_proj 9
    forecast = said(*words, tmp_path / "dry", "--for", "vllm", "--dry-run")
    tensors = load_file(tmp_path / "served" / "adapter_model.safetensors").values()
    assert forecast["size"] == sum(tensor.nbytes for tensor in tensors)
    before, after = (read_adapter(tmp_path / name).updates for name in ("plain", "served"))
    assert {update.rank for update in after.values()} == {16}
    for module, update in before.items():  # zeros alone are added
        kept, wide = update.rank, after[module]
        assert torch.equal(wide.A[:kept], update.A)
        assert torch.equal(wide.B[:, :kept], update.B)
        assert not wide.A[kept:].any()
        assert not wide.B[:, kept:].any()
    for name in ("plain", "served"):
        (tmp_path / name).rename(place / name)
    torch.testing.assert_close(logits(place, place / "served"), logits(place, place / "plain"))
    record = json.loads((place / "served" / "loraloom.json").read_text())
    assert record["served"] == told["served"]
    assert "written for: vLLM: rank and alpha 16 in every layer" in (place / "served" / "README.md").read_text()


def test_an_exported_merge_keeps_its_record_and_says_for_whom_it_was_written(place: Path, tmp_path: Path) -> None:
    write_merged(merge([read_adapter(place / name) for name in CONFIGS], scale=0.5), tmp_path / "merged")
    shown = page("export", tmp_path / "merged", "--for", "llamacpp", "-o", tmp_path / "out")
    assert "llama.cpp: rank and alpha 9 in every layer" in shown
    assert "convert_lora_to_gguf.py" in shown
    before, after = (json.loads((tmp_path / name / "loraloom.json").read_text()) for name in ("merged", "out"))
    assert after["inputs"] == before["inputs"]
    assert after["served"] == {"server": "llamacpp", "rank": 9}
    assert len(after["exported"]["of"]) == 64
    assert "written for: llama.cpp" in (tmp_path / "out" / "README.md").read_text()
    done = call("merge", tmp_path / "out", "-o", tmp_path / "again")  # what was written is an adapter like any other
    assert done.exit_code == 0, done.output


def test_a_head_is_laid_beside(tmp_path: Path) -> None:
    torch.manual_seed(0)
    head = {"classifier.weight": torch.randn(2, 6)}
    config = {"peft_type": "LORA", "task_type": "SEQ_CLS", "modules_to_save": ["classifier"], "target_modules": ["q"]}
    updates = {"layers.0.q": Update(torch.randn(6, 2), torch.randn(2, 6))}
    write_adapter(Adapter(updates, config, head), tmp_path / "mood", provenance={})
    told = said("export", tmp_path / "mood", "--for", "vllm", "-o", tmp_path / "out")
    assert told["heads"] == ["mood"]
    assert torch.equal(
        load_file(tmp_path / "out" / "heads" / "mood.safetensors")["classifier.weight"], head["classifier.weight"]
    )
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert "modules_to_save" not in written
    assert written["task_type"] is None


def odd(folder: Path, **shapes: tuple[int, str]) -> Path:
    """Write an adapter with a layer of each name, of a rank and a form."""
    updates, forms = {}, {}
    for name, (rank, form) in shapes.items():
        module = name.replace("__", ".")
        updates[module] = Update(torch.ones(8, rank), torch.ones(rank, 4))
        if form == "convolution":
            forms[module] = Form("convolution", (1, 2, 2))
        elif form:
            forms[module] = Form("embedding")
    targets = sorted({module.rpartition(".")[2] for module in updates})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": targets}
    return write_adapter(Adapter(updates, config, forms=forms), folder, provenance={})


def test_all_that_a_server_would_not_take_is_told_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    layers = {"h__0__q_proj": (600, ""), "h__0__patch": (2, "convolution"), "h__0__table": (2, "embedding")}
    folder = odd(tmp_path / "odd", **layers, h__1__k_proj=(2, ""), embed_tokens=(2, "embedding"))
    for words in (("export", folder), ("merge", folder)):
        told = refused(*words, "--for", "vllm", "-o", tmp_path / "out")
        assert "3 problems" in told
        assert "rank 600 in h.0.q_proj: vLLM takes 512 at most; use --rank 512" in told
        assert "h.0.patch: vLLM adapts no convolutions" in told
        assert "h.0.table: vLLM adapts no embeddings of this name" in told
        assert "--fuse-into" in told
        assert not (tmp_path / "out").exists()
    told = refused("export", folder, "--for", "sglang", "-o", tmp_path / "out")
    assert "h.0.q_proj: SGLang stacks q_proj with v_proj, which the adapter lacks there" in told
    assert "h.1.k_proj: SGLang stacks k_proj with q_proj and v_proj" in told
    assert "600" not in told.replace(str(folder), "")  # a folder of tests may have that number
    texts = ("--scale", "auto", "--unlabelled", "no.jsonl", "--base", "no/base")  # none of which is looked at before
    assert "rank 600 in h.0.q_proj" in refused("merge", folder, *texts, "--for", "vllm", "-o", tmp_path / "out")
    said(
        "merge", odd(tmp_path / "large", h__0__q_proj=(600, "")), "--for", "vllm", "--rank", "8", "-o", tmp_path / "out"
    )


def test_names_that_a_server_has_no_place_for(tmp_path: Path) -> None:
    folder = odd(tmp_path / "odd", h__0__query=(2, ""), h__0__up_proj=(2, ""))
    told = refused("export", folder, "--for", "sglang", "-o", tmp_path / "out")
    assert "h.0.query: SGLang adapts no layer called query" in told
    assert "stacks up_proj with gate_proj" in told
    assert said("export", folder, "--for", "vllm", "-o", tmp_path / "out")["layers"] == 2


def test_gpt2s_transposed_layers_are_not_for_llamacpps_converter(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "target_modules": ["c_attn"], "fan_in_fan_out": True}
    adapter = Adapter({"h.0.c_attn": Update(torch.ones(8, 2), torch.ones(2, 4))}, config)
    write_adapter(adapter, tmp_path / "one", provenance={})
    assert "transposes" in refused("export", tmp_path / "one", "--for", "ollama", "-o", tmp_path / "out")


def test_an_averaged_head_has_no_place_in_an_adapter_for_a_server() -> None:
    config = {"peft_type": "LORA", "modules_to_save": ["score"], "target_modules": ["q"]}
    update = {"layers.0.q": Update(torch.ones(6, 2), torch.ones(2, 6))}
    members = {name: Adapter(update, config, {"score.weight": torch.ones(2, 6)}) for name in ("one", "two")}
    with pytest.raises(LoraloomError, match=r"score\.weight: vLLM takes no weights that are saved whole"):
        merge(members, heads="average", server="vllm")


def test_weights_that_a_writer_trained_whole_are_in_it_alone_and_no_servers(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "modules_to_save": ["norm"], "target_modules": ["q"]}
    update = {"layers.0.q": Update(torch.ones(6, 2), torch.ones(2, 6))}
    write_adapter(Adapter(update, config, {"norm.weight": 2 * torch.ones(6)}), tmp_path / "one", provenance={})
    page("merge", tmp_path / "one", "-o", tmp_path / "alone")
    alone = read_adapter(tmp_path / "alone")
    torch.testing.assert_close(alone.head["norm.weight"], 2 * torch.ones(6))
    assert alone.config["modules_to_save"] == ["norm"]
    for words in (("merge", tmp_path / "one"), ("export", tmp_path / "one")):
        told = refused(*words, "--for", "vllm", "-o", tmp_path / "out")
        assert "norm.weight: vLLM takes no weights that are saved whole" in told
        assert "--fuse-into BASE" in told


def test_words_that_fit_no_server(place: Path, tmp_path: Path) -> None:
    assert "did you mean 'vllm'" in refused("export", place / "one", "--for", "vlm", "-o", tmp_path / "out")
    assert "--for vllm, --for sglang" in refused("export", place / "one", "-o", tmp_path / "out")
    told = refused("merge", place / "one", "--for", "vllm", "--fuse-into", place / "base", "-o", tmp_path / "out")
    assert "leave out one of them" in told
