"""Merges of layers that are not linear, in the weights of a checkpoint: as PEFT's own merge_and_unload."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from loraloom.adapters.peft import WEIGHTS, read_adapter
from loraloom.errors import LoraloomError
from loraloom.merging import MergeOptions, merge, write_merged
from loraloom.merging.folders import fuse_folders, merge_folders, plan_folders
from loraloom.progress import Reporter

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
TOKENS = torch.arange(24).reshape(2, 12)
PIXELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def llama(*, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, vocab_size=40, num_key_value_heads=2, tie_word_embeddings=tied)
    return LlamaForCausalLM(config).eval()


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**SIZES, image_size=8, patch_size=4)).eval()


def trained(base: nn.Module, folder: Path, seed: int, targets: list[str], **settings: Any) -> PeftModel:
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, lora_alpha=4, target_modules=targets, **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model


def summed(base: nn.Module, models: list[PeftModel], weight: float) -> nn.Module:
    """Return the base with what PEFT's own merge adds to it, summed."""
    whole, plain = copy.deepcopy(base).double(), base.state_dict()
    for model in models:
        merged = copy.deepcopy(model).double().merge_and_unload().state_dict()
        for name, parameter in whole.named_parameters():
            parameter.data += weight * (merged[name] - plain[name].double())
    return whole


MODELS: dict[str, tuple[Any, list[str], dict[str, Any]]] = {
    # q_proj is square: nothing but the form tells that the embedding alone stands transposed
    "embedding": (llama, ["embed_tokens", "q_proj", "v_proj"], {"input_ids": TOKENS}),
    "convolution": (vit, ["projection", "q_proj"], {"pixel_values": PIXELS}),
}


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("kind", MODELS)
def test_a_merge_of_other_forms_goes_into_the_weights(kind: str, rank: int | None, tmp_path: Path) -> None:
    make, targets, inputs = MODELS[kind]
    base = make()
    base.save_pretrained(tmp_path / "base")
    models = [trained(base, tmp_path / f"{i}", i, targets) for i in range(2)]
    folders = [tmp_path / f"{i}" for i in range(2)]
    plan = plan_folders(folders, MergeOptions("weighted", rank=rank), tmp_path / "out")
    facts = fuse_folders(plan, tmp_path / "base", tmp_path / "out", "loraloom merge", Reporter(quiet=True))
    fused = type(base).from_pretrained(tmp_path / "out").eval()
    merge_folders(plan, tmp_path / "adapter", "loraloom merge", Reporter(quiet=True))
    with torch.no_grad():
        found = fused(**inputs).logits
        inputs = {name: one.double() if one.is_floating_point() else one for name, one in inputs.items()}
        expected = summed(base, models, 0.5)(**inputs).logits
        merged = PeftModel.from_pretrained(copy.deepcopy(base).double(), str(tmp_path / "adapter"))(**inputs).logits
        moved = float((copy.deepcopy(base).double()(**inputs).logits - expected).norm() / expected.norm())
    assert moved > 1e-2
    assert float((found - merged).norm() / merged.norm()) < 1e-5
    if rank is None:
        assert float((merged - expected).norm() / expected.norm()) < 1e-6
    if kind == "embedding":
        told = facts.left_out
        assert told["model.embed_tokens.base_layer.weight"] == "the checkpoint's own is taken"


def test_an_embedding_that_is_tied_is_not_fused_in_half(tmp_path: Path) -> None:
    base = llama(tied=True)
    base.save_pretrained(tmp_path / "base")
    trained(base, tmp_path / "0", 0, ["embed_tokens"])
    plan = plan_folders([tmp_path / "0"], MergeOptions("weighted"), tmp_path / "out")
    with pytest.raises(LoraloomError, match="may be tied"):
        fuse_folders(plan, tmp_path / "base", tmp_path / "out", "loraloom merge", Reporter(quiet=True))


def test_copies_of_the_base_go_along_where_all_have_the_same(tmp_path: Path) -> None:
    """PEFT saves the base's embedding beside its update: where it was resized, the update is of no use without it."""
    base = llama()
    for i in range(2):
        trained(base, tmp_path / f"{i}", i, ["embed_tokens"])
    pair = [read_adapter(tmp_path / f"{i}") for i in range(2)]
    written = load_file(write_merged(merge(pair, "weighted"), tmp_path / "out") / WEIGHTS)
    copied = written["base_model.model.model.embed_tokens.base_layer.weight"]
    assert torch.equal(copied, base.get_input_embeddings().weight)
    with torch.no_grad():
        base.get_input_embeddings().weight[3] += 1
    trained(base, tmp_path / "2", 2, ["embed_tokens"])
    with pytest.raises(LoraloomError, match=r"embed_tokens\.base_layer\.weight: that of '2' differs"):
        merge([*pair, read_adapter(tmp_path / "2")], "weighted")


def test_the_adapters_tokenizer_takes_the_place_of_the_bases(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "special_tokens_map.json", "preprocessor_config.json", "chat_template.jinja"):
        (tmp_path / "base" / name).write_text('{"of": "base"}')
    trained(base, tmp_path / "0", 0, ["q_proj"])
    for files in ({"tokenizer.json": "{}", "tokenizer_config.json": "{}"}, {"chat_template.jinja": "{}"}):
        for name, content in files.items():
            (tmp_path / "0" / name).write_text(content)
        out = tmp_path / f"out{len(files)}"
        plan = plan_folders([tmp_path / "0"], MergeOptions("weighted"), out)
        facts = fuse_folders(plan, tmp_path / "base", out, "loraloom merge", Reporter(quiet=True))
        assert ("special_tokens_map.json" in facts.checkpoint.left_out) == ("tokenizer.json" in files)
        for name in files:
            assert (out / name).read_text() == "{}"
            (tmp_path / "0" / name).unlink()
        assert (out / "preprocessor_config.json").read_text() == '{"of": "base"}'
        assert (out / "special_tokens_map.json").exists() == ("tokenizer.json" not in files)
        assert "tokenizer.json" in (out / "SHA256SUMS").read_text()


def test_experts_that_two_adapters_name_in_two_ways_are_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = MixtralForCausalLM(MixtralConfig(**SIZES, vocab_size=40, num_key_value_heads=2, num_local_experts=2)).eval()
    models = [
        trained(base, tmp_path / str(at), at, ["q_proj"], target_parameters=[f"{place}.{one}" for one in names])
        for at, (place, *names) in enumerate(
            [("experts", "down_proj", "gate_up_proj"), ("mlp.experts", "gate_up_proj", "down_proj")]
        )
    ]
    merged = merge([read_adapter(tmp_path / name) for name in "01"], "task_arithmetic", scale=0.5)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), write_merged(merged, tmp_path / "merged"))
    expected, found = summed(base, models, 0.5).state_dict(), loaded.double().merge_and_unload().state_dict()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)
