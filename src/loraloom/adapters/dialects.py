"""The key styles of others: what stands around a module's path in the name of a tensor, and who wrote a folder.

PEFT names a factor `base_model.model.<module>.lora_A.weight`. Around that, tools leave the marks of what wrapped the
model (torch.compile, DDP, FSDP), the adapter's own name, or nothing at all. What remains here is the module's path in
the base model, the one key that means something elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraloom.files.tensors import read_header

PREFIX = "base_model.model."
# parts of a path that a wrapper puts in, at any depth; no model calls a module so
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
_DDP = "module."  # DistributedDataParallel's; a model may have a module of this name, see `_own_root`
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<part>A|B)(?:\.(?P<adapter>[^.]+))?\.weight")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_(?P<part>embedding_[AB])(?:\.(?P<adapter>[^.]+))?")
# names of tensors that tell another tool or method, with what it is
_OTHERS = {
    r"\.lora_magnitude_vector": "DoRA's magnitudes, which rescale the base weight",
    r"trainable_tokens": "trained rows of an embedding",
    r"\.lora_[AB](\.[^.]+)?\.bias$": "the bias of a LoRA factor (lora_bias)",
    r"\.lora_(down|up)\.weight$|^lora_(unet|te\d?|transformer)_": "kohya-ss's naming",
    r"\.lora\.(down|up)\.weight$|lora_linear_layer|\.processor\.": "diffusers' naming",
    r"\.lora_[ab]$": "MLX's naming",
    r"\.(hada_w|lokr_w|oft_blocks)": "LyCORIS' naming, and no LoRA",
    r"\.(lora_E|lora_ranknum)": "AdaLoRA's",
    r"\.(vera_|ia3_|oft_|boft_|hra_|loha_|fourierft_)": "another method than LoRA",
}


@dataclass
class Names:
    """What the names of an adapter's tensors say.

    `factors` gives each module's tensors by part: A and B, or embedding_A and embedding_B. `whole` are parameters that
    were saved whole, a head, by path in the base model; `copies` those that PEFT copies from the base beside an
    embedding's update. `unread` says why a tensor is left out.
    """

    factors: dict[str, dict[str, str]] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_names(keys: Iterable[str], config: Mapping[str, Any]) -> Names:
    """Return what `keys`, the names of an adapter's tensors, say; `config` is its adapter_config.json."""
    names, adapters, heads = Names(), set(), {}
    own_root = _own_root(config)
    for key in sorted(keys):
        path, fault = _path(key, own_root)
        match = _FACTOR.fullmatch(path) or _EMBEDDING.fullmatch(path)
        if fault or not key.isprintable():
            names.problems.append(fault or f"tensor {key!r}: a name with control characters")
        elif match:
            adapters.add(match["adapter"] or "")
            parts = names.factors.setdefault(match["module"], {})
            names.problems += _twice(key, parts.get(match["part"]))
            parts[match["part"]] = key
        elif told := next((what for pattern, what in _OTHERS.items() if re.search(pattern, path)), ""):
            names.problems.append(f"tensor {key}: {told}")
        elif "lora_" in path:
            names.problems.append(f"tensor {key} is no factor that PEFT writes for LoRA")
        else:
            heads[path] = key
    _add_heads(names, heads, adapters)
    if len(adapters) > 1:
        shown = ", ".join(sorted(repr(name) if name else "one without a name" for name in adapters))
        names.problems = [f"holds several adapters: {shown}: save one of them alone"]
    return names


def folder_kind(folder: Path, config: Mapping[str, Any] | None) -> str:
    """Return what a folder is that PEFT did not save, where it can be told; else an empty string."""
    if config is not None and ("lora_parameters" in config or "fine_tune_type" in config):
        return "an adapter of MLX (mlx-lm), not saved by PEFT"
    if (folder / "pytorch_lora_weights.safetensors").is_file():
        return "a LoRA of diffusers, not saved by PEFT"
    if (folder / "adapters.safetensors").is_file():
        return "an adapter of MLX (mlx-lm), not saved by PEFT"
    files = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))[:3] if folder.is_dir() else []
    return "a LoRA of kohya-ss (sd-scripts), not saved by PEFT" if any(map(_of_kohya, files)) else ""


def _path(key: str, own_root: bool) -> tuple[str, str]:
    """Return the path in the base model that `key` means, and what is wrong with it."""
    path = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
    prefixed = False
    while path.startswith((PREFIX, _DDP)):
        if own_root and prefixed:  # the rest are the model's own modules
            return path, ""
        prefixed = prefixed or path.startswith(PREFIX)
        path = path.removeprefix(PREFIX if path.startswith(PREFIX) else _DDP)
    outer, found, _ = path.partition(f".{PREFIX}")
    if found and not prefixed:
        return path, f"tensor {key}: {outer!r} stands before {PREFIX!r}: which model it is of cannot be told; rename it"
    return path, ""


def _own_root(config: Mapping[str, Any]) -> bool:
    """Tell whether the base was a class of the trainer's own, in which any name may be a module's.

    PEFT keeps the class where the task type is none: a wrapper's, a model's of transformers, or another.
    """
    mapping = config.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    return isinstance(library, str) and not library.startswith(("transformers", "torch.", "peft", "accelerate"))


def _add_heads(names: Names, heads: Mapping[str, str], adapters: set[str]) -> None:
    """Sort the tensors that are no factors: heads, copies of base weights, PEFT's copy of the head it replaced."""
    for path, key in heads.items():
        if ".original_module." in path:
            names.unread[key] = "the base model's own, which the head replaces"
        elif ".base_layer." in path:
            names.copies[path] = key
        else:
            module, saved, inner = path.partition(".modules_to_save.")
            first, _, rest = inner.partition(".")
            # older files keep the adapter's name here, or `modules_to_save` alone
            inner = rest if rest and first in {*adapters, "default"} else inner
            plain = f"{module}.{inner}" if saved else path
            names.problems += _twice(key, names.whole.get(plain))
            names.whole[plain] = key


def _twice(key: str, other: str | None) -> list[str]:
    return [] if other is None else [f"tensors {other} and {key} are the same one of the base model"]


def _of_kohya(file: Path) -> bool:
    try:
        _, metadata, entries = read_header(file)
    except ValueError:
        return False
    return any(name.startswith("ss_") for name in metadata) or any(key.startswith("lora_unet_") for key in entries)
