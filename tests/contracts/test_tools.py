"""Adapters in other tools' files: read as those tools apply them, merged by every rule, written and read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from loraloom.adapters.images import diffusers_module
from loraloom.adapters.peft import CONFIG, adapter_sha256, read_adapter
from loraloom.analysis.checking import folder_facts
from loraloom.errors import LoraloomError
from loraloom.merging import get_rule, merge, rule_names, write_merged
from loraloom.merging.facts import MergeFacts

RULES = [name for name in rule_names() if get_rule(name).needs in ((), ("seed",))]
LINEAR, CONV, POINT = "unet.mid_block.attentions.0.proj_in", "unet.conv_in", "unet.up_blocks.0.resnets.1.conv_shortcut"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
KERNELS: dict[str, tuple[int, ...]] = {LINEAR: (), TEXT: (), CONV: (3, 3), POINT: (1, 1)}
KOHYA = {name: "lora_" + name.replace("text_encoder", "te").replace(".", "_") for name in KERNELS}


def factors(seed: int) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A (r, 5, kernel), B (7, r, 1s) and alpha of each layer; ranks and alphas differ between layers."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for rank, (name, kernel) in enumerate(KERNELS.items(), start=2):
        A = torch.randn(rank, 5, *kernel, generator=generator)
        found[name] = (A, torch.randn(7, rank, *(1 for _ in kernel), generator=generator), rank / 2 + seed)
    return found


def dense(seed: int) -> dict[str, Tensor]:
    return {
        name: alpha / len(A) * B.double().flatten(1) @ A.double().flatten(1)
        for name, (A, B, alpha) in factors(seed).items()
    }


def kohya(seed: int) -> dict[str, Tensor]:
    tensors = {}
    for name, (A, B, alpha) in factors(seed).items():
        stem = KOHYA[name]
        tensors |= {f"{stem}.lora_down.weight": A, f"{stem}.lora_up.weight": B, f"{stem}.alpha": torch.tensor(alpha)}
    return tensors


def diffusers(seed: int) -> dict[str, Tensor]:
    tensors = {}
    for name, (A, B, alpha) in factors(seed).items():
        tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B * (alpha / len(A))}
    return tensors


def old_diffusers(seed: int) -> dict[str, Tensor]:
    tensors = {}
    for name, (A, B, alpha) in factors(seed).items():
        part = "lora_linear_layer" if name == TEXT else "lora"
        tensors |= {f"{name}.{part}.down.weight": A, f"{name}.{part}.up.weight": B}
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def mlx(folder: Path, seed: int) -> Path:
    folder.mkdir()
    found = factors(seed)
    tensors = {}
    for index, name in enumerate((LINEAR, TEXT)):
        A, B, _ = found[name]
        tensors[f"model.layers.{index}.q_proj.lora_a"] = A.T.contiguous()
        tensors[f"model.layers.{index}.q_proj.lora_b"] = B.T.contiguous()
    save_file(tensors, folder / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "num_layers": 2, "model": "o/b", "lora_parameters": {"rank": 2, "scale": 20.0}}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


STYLES = {"kohya": kohya, "diffusers": diffusers, "old": old_diffusers}


def written(folder: Path) -> dict[str, Tensor]:
    adapter = read_adapter(folder)
    return {name: adapter.updates[name].dense().double() for name in adapter.shapes}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        float((found[name] - one).norm()) < 1e-5 * float(one.norm()) for name, one in expected.items()
    )


@pytest.mark.parametrize("to", [None, "diffusers", "kohya"])
@pytest.mark.parametrize("style", STYLES)
def test_a_weighted_sum_of_image_loras_is_the_dense_sum(style: str, to: str | None, tmp_path: Path) -> None:
    for seed in range(2):
        save_file(STYLES[style](seed), tmp_path / f"{seed}.safetensors")
    members = [read_adapter(tmp_path / f"{seed}.safetensors") for seed in range(2)]
    merged = merge(members, "task_arithmetic", weights=[0.5, -2.0], scale=1.0, to=to)
    folder = write_merged(merged, tmp_path / "out")
    expected = {name: 0.5 * one - 2.0 * dense(1)[name] for name, one in dense(0).items()}
    kind = to or ("kohya" if style == "kohya" else "diffusers")
    assert same(written(folder), {KOHYA[name] if kind == "kohya" else name: one for name, one in expected.items()})
    assert not (folder / CONFIG).exists()
    assert len(adapter_sha256(folder)) == 64


@pytest.mark.parametrize("rule", RULES)
def test_image_loras_of_two_tools_merge_by_every_rule(rule: str, tmp_path: Path) -> None:
    save_file(kohya(0), tmp_path / "a.safetensors")
    save_file(diffusers(1), tmp_path / "b.safetensors")
    members = [read_adapter(tmp_path / f"{name}.safetensors") for name in "ab"]
    with pytest.raises(LoraloomError, match="say by --to"):
        merge(members, rule)
    merged = merge(members, rule, to="kohya")
    folder = write_merged(merged, tmp_path / "out")
    assert same(written(folder), {name: one.update.dense().double() for name, one in merged.merged.items()})
    assert set(merged.merged) == set(KOHYA.values())


def test_what_is_said_of_image_loras_is_short_and_true(tmp_path: Path) -> None:
    for seed in range(2):
        save_file(kohya(seed), tmp_path / f"{seed}.safetensors")
    members = [read_adapter(tmp_path / f"{seed}.safetensors") for seed in range(2)]
    merged = merge(members, "task_arithmetic", to="diffusers")
    facts = folder_facts(read_adapter(write_merged(merged, tmp_path / "out")))
    assert facts.zeros == 0  # of what was added to have one rank nothing is told
    told = MergeFacts.of(merge(members, "task_arithmetic").plan, "merged adapter")
    assert told.inputs[0].targets == ["conv_in", "conv_shortcut", "proj_in", "q_proj"]
    with pytest.raises(
        LoraloomError, match="text_encoder and unet, where PEFT has one model a folder; merge it as kohya"
    ):
        merge(members[:1], to="peft")


def test_mlx_is_read_and_written_with_its_scale_in_one_rank(tmp_path: Path) -> None:
    expected = {
        f"model.layers.{index}.q_proj": 20 * B.double() @ A.double()
        for index, (A, B, _) in enumerate(factors(0)[name] for name in (LINEAR, TEXT))
    }
    one = read_adapter(mlx(tmp_path / "one", 0))
    folders = [write_merged(merge([one], to=to), tmp_path / str(to)) for to in (None, "peft", "mlx")]
    for folder in folders:
        assert same(written(folder), expected)
    config = json.loads((folders[0] / CONFIG).read_text())
    assert config["lora_parameters"] == {"rank": 3, "scale": 1.0, "dropout": 0.0, "keys": ["q_proj"]}
    shapes = {tensor.shape for tensor in load_file(folders[0] / "adapters.safetensors").values()}
    assert shapes == {(5, 3), (3, 7)}
    assert json.loads((folders[1] / CONFIG).read_text())["peft_type"] == "LORA"


FIRST = "lora_unet_conv_in"


def changed(**changes: Tensor | None) -> dict[str, Tensor]:
    tensors: dict[str, Any] = {**kohya(0), **{name.replace("__", "."): one for name, one in changes.items()}}
    return {name: one for name, one in tensors.items() if one is not None}


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        (changed(lora_unet_conv_in__lora_up__weight=None), "has lora_down alone"),
        (changed(lora_unet_conv_in__alpha=torch.ones(2)), "an alpha is one number"),
        (changed(lora_unet_conv_in__alpha=torch.tensor(float("nan"))), "not finite"),
        (changed(lora_unet_conv_in__alpha=torch.tensor(0.0)), "reads as the rank"),
        (changed(lora_unet_other__alpha=torch.tensor(1.0)), "an alpha without factors"),
        (changed(lora_unet_conv_in__lora_up__weight=torch.ones(7, 4, 1, 1, dtype=torch.int32)), "is of I32"),
        (changed(lora_unet_conv_in__lora_down__weight=torch.zeros(0, 5, 3, 3)), "is empty: of rank 0"),
        (changed(lora_unet_conv_in__lora_up__weight=torch.full((7, 4, 1, 1), torch.inf)), "not finite"),
        (changed(lora_unet_conv_in__lora_up__weight=torch.ones(7, 9, 1, 1)), "do not multiply"),
        (changed(lora_unet_conv_in__dora_scale=torch.ones(7)), "DoRA"),
        (changed(lora_unet_conv_in__lora_mid__weight=torch.ones(4, 4, 3, 3)), "Tucker"),
        (changed(lora_unet_conv_in__lora_A__weight=torch.ones(4, 5, 3, 3)), "are the same one"),
        ({**kohya(0), "unet.conv_in.lora_A.weight": torch.ones(2, 5)}, "named as diffusers does"),
        ({**kohya(0), "anything": torch.ones(1)}, "a name of no LoRA that is known"),
        ({**kohya(0), f"_orig_mod.{FIRST}.alpha": torch.ones(())}, "are the same one"),
        ({"weight": torch.ones(2, 2)}, "holds no LoRA"),
        ({"q.lora_a": torch.ones(5, 2), "q.lora_b": torch.ones(2, 5)}, "adapter_config.json is missing"),
    ],
)
def test_a_spoilt_file_is_refused_by_name(tensors: dict[str, Tensor], told: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "one.safetensors")
    with pytest.raises(LoraloomError, match=told):
        read_adapter(tmp_path / "one.safetensors")


@pytest.mark.parametrize(
    ("flat", "path"),
    [
        ("input_blocks_0_0", "conv_in"),
        ("input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("input_blocks_4_1_transformer_blocks_0_ff_net_2", "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2"),
        ("middle_block_2_emb_layers_1", "mid_block.resnets.1.time_emb_proj"),
        ("output_blocks_5_2_conv", "up_blocks.1.upsamplers.0.conv"),
        ("output_blocks_1_0_skip_connection", "up_blocks.0.resnets.1.conv_shortcut"),
        ("label_emb_0_2", "add_embedding.linear_2"),
    ],
)  # fmt: skip
def test_names_of_the_original_unet_are_those_of_sd_scripts_map(flat: str, path: str) -> None:
    assert diffusers_module(f"lora_unet_{flat}") == f"unet.{path}"


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """A tiny random pipeline of diffusers: a UNet with every kind of layer, and a text encoder."""
    tool = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8, 8), "layers_per_block": 2, "norm_num_groups": 4, "cross_attention_dim": 8}
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D",) * 2}
    unet = tool.UNet2DConditionModel(**sizes, **blocks, attention_head_dim=2, sample_size=8)
    widths = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = CLIPTextModel(CLIPTextConfig(**widths, vocab_size=20, bos_token_id=0, eos_token_id=1))
    parts: dict[str, Any] = {"unet": unet, "text_encoder": text, "scheduler": tool.DDIMScheduler()}
    absent = dict.fromkeys(("vae", "tokenizer", "safety_checker", "feature_extractor"))
    return tool.StableDiffusionPipeline(**parts, **absent, requires_safety_checker=False)


def plain_layers(pipeline: Any) -> dict[str, torch.nn.Module]:
    """Return the linear layers and convolutions by diffusers' names, with CLIP's outer name as files have it."""
    return {
        f"{part}.{'text_model.' * (part != 'unet' and not name.startswith('text_model.'))}{name}": module
        for part in ("unet", "text_encoder")
        for name, module in getattr(pipeline, part).named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
        and (part == "unet" or name.endswith(("proj", "fc1", "fc2")))
    }


def image_lora(layers: dict[str, torch.nn.Module], seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return kohya-ss' tensors for a LoRA of all layers, and each layer's dense update: with a seed, of several ranks.

    Several ranks and alphas diffusers itself reads wrongly.
    """
    generator, tensors, expected = torch.Generator().manual_seed(seed), {}, {}
    for index, (name, module) in enumerate(layers.items()):
        weight = cast("Tensor", module.weight)
        (out, inputs, *kernel), rank, alpha = weight.shape, 3, 2.0
        if seed:
            rank, alpha = 2 + index % 2, 1.0 + index % 3
        A = torch.randn(rank, inputs, *kernel, generator=generator)
        B = torch.randn(out, rank, *(1 for _ in kernel), generator=generator)
        stem = "lora_" + name.replace("text_encoder", "te").replace(".", "_")
        tensors |= {f"{stem}.lora_down.weight": A, f"{stem}.lora_up.weight": B, f"{stem}.alpha": torch.tensor(alpha)}
        expected[name] = alpha / rank * (B.double().flatten(1) @ A.double().flatten(1)).reshape(weight.shape)
    return tensors, expected


def in_diffusers(pipeline: Any, file: Path) -> dict[str, Tensor]:
    """Return what diffusers' own loading of a LoRA file adds to each layer."""
    pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name="one")
    found = {}
    for part in ("unet", "text_encoder"):
        for name, module in getattr(pipeline, part).named_modules():
            if isinstance(module, LoraLayer):
                outer = "text_model." * (part != "unet" and not name.startswith("text_model."))
                found[f"{part}.{outer}{name}"] = module.get_delta_weight("one").detach().double()
    pipeline.unload_lora_weights()
    return found


def test_what_is_read_and_written_does_in_diffusers_what_the_dense_sum_does(pipeline: Any, tmp_path: Path) -> None:
    layers, expected = plain_layers(pipeline), []
    for seed in range(2):
        tensors, wanted = image_lora(layers, seed)
        save_file(tensors, tmp_path / f"{seed}.safetensors")
        read = read_adapter(tmp_path / f"{seed}.safetensors")
        assert seed or same(in_diffusers(pipeline, tmp_path / f"{seed}.safetensors"), wanted)
        ours = {str(diffusers_module(name)): read.updates[name].dense().double() for name in read.shapes}
        assert same({name: one.reshape(wanted[name].shape) for name, one in ours.items()}, wanted)
        expected.append(wanted)
    dense_sum = {name: 0.5 * one - 2.0 * expected[1][name] for name, one in expected[0].items()}
    members = [read_adapter(tmp_path / f"{seed}.safetensors") for seed in range(2)]
    for to, name in (("kohya", "lora.safetensors"), ("diffusers", "pytorch_lora_weights.safetensors")):
        merged = merge(members, "task_arithmetic", weights=[0.5, -2.0], scale=1.0, to=to)
        assert same(in_diffusers(pipeline, write_merged(merged, tmp_path / to) / name), dense_sum)
    save_file(load_file(tmp_path / "diffusers" / name), tmp_path / "as diffusers reads.safetensors")
    again = merge([read_adapter(tmp_path / "as diffusers reads.safetensors")], to="kohya")
    assert same(in_diffusers(pipeline, write_merged(again, tmp_path / "again") / "lora.safetensors"), dense_sum)


def test_what_diffusers_saves_of_peft_layers_is_read_with_its_scale(pipeline: Any, tmp_path: Path) -> None:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "conv1"], rank_pattern={"conv1": 2})
    pipeline.unet.add_adapter(config, "mine")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in pipeline.unet.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    layers = {name: one for name, one in pipeline.unet.named_modules() if isinstance(one, LoraLayer)}
    expected = {f"unet.{name}": one.get_delta_weight("mine").detach().double() for name, one in layers.items()}
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet, adapter_name="mine"))
    pipeline.save_lora_weights(tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=config.to_dict())
    pipeline.unload_lora_weights()
    found = written(tmp_path)
    assert same({name: one.reshape(expected[name].shape) for name, one in found.items()}, expected)
