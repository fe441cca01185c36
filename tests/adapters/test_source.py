"""What lies at a path: folders and single files, whole or in shards, of PEFT and of other tools."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loraloom.adapters.peft import adapter_sha256, read_adapter
from loraloom.errors import LoraloomError

UNET = "unet.mid_block.attentions.0.proj_in"
A, B = torch.arange(6.0).reshape(2, 3), torch.arange(8.0).reshape(4, 2) - 3
PLAIN = {f"{UNET}.lora_A.weight": A, f"{UNET}.lora_B.weight": B}
KOHYA = {
    "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": A,
    "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": B,
    "lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(1.0),
}
PEFT = {f"base_model.model.model.q.{part}.weight": one for part, one in (("lora_A", A), ("lora_B", B))}
PEFT_CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


def sharded(folder: Path, tensors: dict[str, Tensor], stem: str, *, index: bool = True) -> None:
    places = {}
    for part, (name, tensor) in enumerate(sorted(tensors.items()), start=1):
        places[name] = f"{stem}-{part:05d}-of-{len(tensors):05d}.safetensors"
        save_file({name: tensor}, folder / places[name])
    if index:
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def one_file(folder: Path) -> Path:
    save_file(PLAIN, folder / "one.safetensors")
    return folder / "one.safetensors"


def one_folder(folder: Path) -> Path:
    return one_file(folder).parent


def diffusers_folder(folder: Path) -> Path:
    save_file(PLAIN, folder / "pytorch_lora_weights.safetensors")
    save_file({"other": A}, folder / "other.safetensors")
    return folder


def shards(folder: Path) -> Path:
    sharded(folder, PLAIN, "one")
    return folder


def index_file(folder: Path) -> Path:
    return shards(folder) / "one.safetensors.index.json"


def first_shard(folder: Path) -> Path:
    sharded(folder, PLAIN, "one", index=False)
    return folder / "one-00001-of-00002.safetensors"


@pytest.mark.parametrize("place", [one_file, one_folder, diffusers_folder, shards, index_file, first_shard])
def test_a_file_of_diffusers_is_found_wherever_it_is_named(place: Callable[[Path], Path], tmp_path: Path) -> None:
    path = place(tmp_path)
    adapter = read_adapter(path)
    assert adapter.dialect == "diffusers"
    assert torch.equal(adapter.updates[UNET].dense(), B @ A)
    assert len(adapter_sha256(path)) == 64


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.safetensors.index.json"])
def test_a_file_of_peft_stands_for_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(PEFT_CONFIG))
    if name.endswith("json"):
        sharded(tmp_path, PEFT, "adapter_model")
    else:
        save_file(PEFT, tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        adapter = read_adapter(path)
        assert adapter.path == tmp_path
        assert torch.equal(adapter.updates["model.q"].dense(), 2 * B @ A)
    assert adapter_sha256(tmp_path) == adapter_sha256(tmp_path / name)


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
@pytest.mark.parametrize(
    "change",
    [
        lambda key: f"_orig_mod.{key}",
        lambda key: f"module.{key}",
        lambda key: f"_fsdp_wrapped_module.{key}",
        lambda key: key.replace("mid_block_", "_orig_mod_mid_block_").replace("unet.", "unet._orig_mod."),
        lambda key: re.sub(r"lora_([AB])\.", r"lora_\1.default.", key),
    ],
)
def test_marks_of_wrappers_are_taken_off_an_image_lora(
    change: Callable[[str], str], dialect: str, tmp_path: Path
) -> None:
    tensors = {change(key): one for key, one in (PLAIN if dialect == "diffusers" else KOHYA).items()}
    save_file(tensors, tmp_path / "one.safetensors")
    adapter = read_adapter(tmp_path / "one.safetensors")
    module = UNET if dialect == "diffusers" else f"lora_{UNET.replace('.', '_')}"
    assert adapter.dialect == dialect
    assert torch.equal(adapter.updates[module].dense(), B @ A * (1.0 if dialect == "diffusers" else 0.5))


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        ({"r": 2, "lora_alpha": 6}, 3.0),
        ({"r": 2, "lora_alpha": 6, "use_rslora": True}, 6 / 2**0.5),
        ({"r": 8, "lora_alpha": 6, "alpha_pattern": {"proj_in": 5}, "rank_pattern": {"proj_in": 2}}, 2.5),
    ],
)
def test_the_metadata_of_diffusers_tell_the_scale(settings: dict[str, object], scaling: float, tmp_path: Path) -> None:
    told = {f"unet.{key}": value for key, value in settings.items()}
    for name, config in (("part", told), ("alone", settings)):
        save_file(PLAIN, tmp_path / f"{name}.safetensors", {"lora_adapter_metadata": json.dumps(config)})
        update = read_adapter(tmp_path / f"{name}.safetensors").updates[UNET]
        torch.testing.assert_close(update.dense(), scaling * B @ A)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "is no JSON object"),
        ('{"unet.r": "two"}', "r: Input should be a valid integer"),
        ('{"unet.r": 2, "unet.use_dora": true}', "DoRA rescales the base weight"),
        ('{"text_encoder.r": 2}', "unet: nothing is told of this part"),
    ],
)
def test_metadata_that_tell_no_scale_are_refused(told: str, message: str, tmp_path: Path) -> None:
    save_file(PLAIN, tmp_path / "one.safetensors", {"lora_adapter_metadata": told})
    with pytest.raises(LoraloomError, match=re.escape(message)):
        read_adapter(tmp_path / "one.safetensors")


def test_alphas_told_twice_are_refused(tmp_path: Path) -> None:
    told = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 4})}
    save_file({**PLAIN, f"{UNET}.alpha": torch.tensor(1.0)}, tmp_path / "one.safetensors", told)
    with pytest.raises(LoraloomError, match="diffusers refuses both in one file"):
        read_adapter(tmp_path / "one.safetensors")


def test_what_cannot_be_read_is_told_with_what_to_do(tmp_path: Path) -> None:
    for name in "ab":
        save_file(PLAIN, tmp_path / f"{name}.safetensors")
    (tmp_path / "pickle.bin").write_bytes(b"x")
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    sharded(tmp_path, PLAIN, "lost")
    (tmp_path / "lost-00002-of-00002.safetensors").unlink()
    (tmp_path / "foreign.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    for name, told in {
        ".": "holds several safetensors files",
        "pickle.bin": "a pickle, which may run code",
        "broken.safetensors": "cannot be read",
        "lost.safetensors.index.json": "lost-00002-of-00002.safetensors is missing",
        "lost-00001-of-00002.safetensors": "lost-00002-of-00002.safetensors is missing",
        "foreign.safetensors.index.json": "no safetensors file beside it",
        "none.safetensors": "there is no such file",
    }.items():
        with pytest.raises(LoraloomError, match=re.escape(told)):
            read_adapter(tmp_path / name)
