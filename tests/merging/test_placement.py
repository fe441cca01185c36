"""Names that differ between an adapter and a checkpoint, against PEFT's merge; and what config.json says of a head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import tiny
from loraloom.adapters.peft import read_adapter
from loraloom.adapters.update import Adapter, Form, Update
from loraloom.errors import LoraloomError
from loraloom.merging.fuse import FusedFacts, fuse
from loraloom.merging.placement import Changes
from loraloom.model.architecture import names_in_model
from loraloom.model.load import head_modules

LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**LAYERS, "num_key_value_heads": 2, "vocab_size": 100, "head_dim": 8, "max_position_embeddings": 64}
VISION = {**LAYERS, "image_size": 16, "patch_size": 4}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
QWEN = {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "out_hidden_size": 32, "patch_size": 4}
IDS = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
SIGLIP = {**VISION, "model_type": "siglip_vision_model"}
CONFIGS: dict[str, Any] = {
    "qwen2_5_vl": lambda: transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": ROPE, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={**QWEN, "fullatt_block_indexes": [1], "window_size": 16},
        **IDS,
        tie_word_embeddings=False,
    ),
    "llava": lambda: transformers.LlavaConfig(
        text_config={**TEXT, "model_type": "llama"}, vision_config={**VISION, "model_type": "clip_vision_model"}
    ),
    "paligemma": lambda: transformers.PaliGemmaConfig(
        text_config={**TEXT, "model_type": "gemma"}, vision_config={**SIGLIP, "projection_dim": 32}, projection_dim=32
    ),
    "gemma3": lambda: transformers.Gemma3Config(text_config=TEXT, vision_config=SIGLIP, mm_tokens_per_image=4),
}
# vision and language, by the endings of paths
TARGETS = {"qwen2_5_vl": ["qkv", "q_proj", "down_proj"]}


def randomly(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.2)
    return model


def fuse_adapter(base: Path, output: Path, adapter: Adapter, **options: Any) -> FusedFacts:
    shapes = {name: (shape.m, shape.n) for name, shape in adapter.shapes.items()}
    return fuse(base, output, Changes(shapes, forms=adapter.forms, **options), adapter.updates.__getitem__)


def relative(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).norm() / two.norm())


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [None, ["lm_head"]])
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_a_vision_language_model_keeps_the_names_of_its_checkpoint(kind: str, keep: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = transformers.AutoModelForImageTextToText.from_config(CONFIGS[kind]()).eval()
    base.save_pretrained(tmp_path / "base")
    stored, own = load_file(tmp_path / "base" / "model.safetensors"), base.state_dict()
    assert not stored.keys() <= own.keys()  # else this tests nothing
    tied = (
        "lm_head.weight"
        not in names_in_model(json.loads((tmp_path / "base/config.json").read_text()), stored).names.values()
    )
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=TARGETS.get(kind, ["q_proj", "fc1", "down_proj"]), modules_to_save=keep
    )
    theirs = randomly(get_peft_model(base, config))
    theirs.save_pretrained(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    assert {name.split(".")[1] for name in adapter.shapes} > {"language_model"}
    if keep and tied:
        with pytest.raises(LoraloomError, match="may be tied to another tensor"):
            fuse_adapter(tmp_path / "base", tmp_path / "out", adapter, head=adapter.head)
        return
    facts = fuse_adapter(tmp_path / "base", tmp_path / "out", adapter, head=adapter.head)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert list(after) == list(stored)
    assert len(facts.tensors) == len(adapter.shapes)
    assert [len(facts.replaced), facts.added] == [len(keep or []), []]
    merged = theirs.merge_and_unload().eval()
    mine = type(merged).from_pretrained(tmp_path / "out").eval()
    want, have = merged.state_dict(), mine.state_dict()
    assert want.keys() == have.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(have[name], tensor, rtol=1e-5, atol=1e-6)
    ids = torch.arange(5, 25).reshape(2, 10)
    with torch.no_grad():
        assert relative(mine(input_ids=ids).logits, merged(input_ids=ids).logits) < 1e-5


def test_an_adapter_of_old_names_meets_a_checkpoint_of_new_ones(tmp_path: Path) -> None:
    """And the other way round is the test above."""
    base = transformers.AutoModelForImageTextToText.from_config(CONFIGS["qwen2_5_vl"]())
    base.save_pretrained(tmp_path / "base")
    save_file(base.state_dict(), tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    modules = {"model.layers.0.self_attn.q_proj": (32, 32), "visual.blocks.1.attn.qkv": (96, 32)}
    updates = {name: Update(torch.ones(m, 1), torch.ones(1, n)) for name, (m, n) in modules.items()}
    facts = fuse(tmp_path / "base", tmp_path / "out", Changes(modules), updates.__getitem__)
    assert list(facts.tensors.values()) == [
        "model.language_model.layers.0.self_attn.q_proj.weight",
        "model.visual.blocks.1.attn.qkv.weight",
    ]


# --- layers that are not linear --------------------------------------------------------------------------------------

MOE = {**TEXT, "num_hidden_layers": 1, "hidden_size": 32}
EXPERTS: dict[str, Any] = {
    # gate and up of an expert are tensors apart in the checkpoint, and one parameter of all experts in the model
    "mixtral": lambda: transformers.MixtralConfig(**MOE, num_local_experts=11),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**MOE, num_experts=3, moe_intermediate_size=16),
    # one tensor in both, inputs before outputs; the down projection is square
    "gpt_oss": lambda: transformers.GptOssConfig(**{**MOE, "intermediate_size": 32}, num_local_experts=3),
}


@pytest.mark.parametrize("leaves", [["gate_up_proj", "down_proj"], ["down_proj"]])
@pytest.mark.parametrize("kind", list(EXPERTS))
def test_fused_experts_go_where_the_checkpoint_has_them(kind: str, leaves: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(EXPERTS[kind]()).eval()
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    targets = {"target_modules": ["q_proj"], "target_parameters": [f"mlp.experts.{leaf}" for leaf in leaves]}
    theirs = randomly(get_peft_model(base, LoraConfig(r=2, lora_alpha=4, **targets)))
    theirs.save_pretrained(tmp_path / "adapter")
    facts = fuse_adapter(tmp_path / "base", tmp_path / "out", read_adapter(tmp_path / "adapter"))
    assert len(facts.tensors) > 3
    merged = theirs.merge_and_unload()
    mine = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


def test_experts_of_another_size_are_refused(tmp_path: Path) -> None:
    transformers.AutoModelForCausalLM.from_config(EXPERTS["mixtral"]()).save_pretrained(tmp_path / "base")
    module = "model.layers.0.mlp.experts"
    for count, shape in ((10, (96, 32)), (11, (98, 32)), (11, (96, 31))):
        forms = {f"{module}.{index}": Form("experts", (), module, index, count) for index in range(count)}
        shapes = dict.fromkeys(forms, shape)
        with pytest.raises(LoraloomError, match=rf"no parameter of {count} experts of {shape[0]} x {shape[1]}"):
            fuse(tmp_path / "base", tmp_path / "out", Changes(shapes, forms=forms), lambda _: torch.ones(1))


@pytest.mark.parametrize("square", [True, False])
def test_embeddings_and_convolutions(square: bool, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"tie_word_embeddings": false}')
    words = 4 if square else 7
    weights = {
        "words.weight": torch.randn(words, 4),
        "line.weight": torch.randn(4, 2, 2),
        "picture.weight": torch.randn(3, 1, 2, 5),
    }
    save_file(weights, tmp_path / "base" / "model.safetensors")
    forms = {"words": Form("embedding"), "line": Form("convolution", (2, 2)), "picture": Form("convolution", (1, 2, 5))}
    deltas = {"words": torch.randn(4, words), "line": torch.randn(4, 4), "picture": torch.randn(3, 10)}
    shapes = {name: tuple(delta.shape) for name, delta in deltas.items()}
    facts = fuse(tmp_path / "base", tmp_path / "out", Changes(shapes, forms=forms), deltas.__getitem__)  # type: ignore[arg-type]
    after = load_file(facts.folder / "model.safetensors")
    torch.testing.assert_close(after["words.weight"], weights["words.weight"] + deltas["words"].T)
    for name in ("line", "picture"):
        whole = weights[f"{name}.weight"]
        torch.testing.assert_close(after[f"{name}.weight"], whole + deltas[name].view(whole.shape))


def test_an_embedding_that_may_be_tied_is_refused(tmp_path: Path) -> None:
    base = tiny.base_folder("llama", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    shapes, forms = {"model.embed_tokens": (16, 27)}, {"model.embed_tokens": Form("embedding")}
    stored = load_file(base / "model.safetensors")
    save_file({name: stored[name] for name in stored if name != "lm_head.weight"}, base / "model.safetensors")
    with pytest.raises(LoraloomError, match="may be tied to another tensor"):
        fuse(base, tmp_path / "out", Changes(shapes, forms=forms), lambda _: torch.ones(16, 27))


# --- heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [1, 5, 16])  # 16 is the width of the model too
@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "llama", "gpt2", "t5"])
def test_a_head_that_is_added_makes_a_classifier(kind: str, outputs: int, tmp_path: Path) -> None:
    base = tiny.base_folder(kind, tmp_path / "base")
    labels = [f"label {index}" for index in range(outputs)]
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(base, num_labels=outputs)
    model.config.pad_token_id = 0
    before = set(load_file(base / "model.safetensors"))
    config = LoraConfig(r=2, target_modules=tiny.TARGETS[kind], modules_to_save=head_modules(model))
    theirs = randomly(get_peft_model(model, config))
    theirs.save_pretrained(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    facts = fuse_adapter(
        base, tmp_path / "out", adapter, head=adapter.head, task_type="SEQ_CLS" if outputs == 5 else None, labels=labels
    )
    assert facts.classified
    assert set(facts.added) == set(load_file(tmp_path / "out" / "model.safetensors")) - before
    mine = auto.from_pretrained(tmp_path / "out").eval()
    assert mine.config.architectures == [type(mine).__name__] == [type(model).__name__]
    assert mine.config.id2label == dict(enumerate(labels))
    assert mine.config.label2id == {name: index for index, name in enumerate(labels)}
    mine.config.pad_token_id = 0
    ids = torch.tensor([[5, 6, 7, 2], [8, 9, 2, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    with torch.no_grad():
        assert relative(mine(**batch).logits, theirs.eval()(**batch).logits) < 1e-5


def test_labels_that_are_not_known_are_numbered(tmp_path: Path) -> None:
    base = tiny.base_folder("llama", tmp_path / "base")
    update = Update(torch.ones(16, 1), torch.ones(1, 16))
    shapes = {"model.layers.0.self_attn.q_proj": (16, 16)}
    options: Any = {"transposed": False, "head": {"score.weight": torch.ones(3, 16)}, "labels": ["one", "two"]}
    fuse(base, tmp_path / "out", Changes(shapes, task_type="TOKEN_CLS", **options), lambda _: update)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForTokenClassification"]
    assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}


def test_a_head_that_no_class_has_is_told(tmp_path: Path) -> None:
    base = tiny.base_folder("llama", tmp_path / "base")
    update = Update(torch.ones(16, 1), torch.ones(1, 16))
    shapes = {"model.layers.0.self_attn.q_proj": (16, 16)}
    facts = fuse(base, tmp_path / "out", Changes(shapes, head={"v.weight": torch.ones(1, 16)}), lambda _: update)
    assert facts.added == ["v.weight"]
    assert not facts.classified
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
