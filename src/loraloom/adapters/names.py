"""What the names of tensors say in PEFT's own files, whatever stands around a module's path.

PEFT names a factor `base_model.model.<module>.lora_A.weight`. Around that, tools leave the marks of what wrapped the
model (torch.compile, DDP, FSDP), the adapter's own name, or nothing at all. What remains here is the module's path in
the base model, the one key that means something elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

PREFIX = "base_model.model."
# parts of a path that a wrapper puts in, at any depth; no model calls a module so
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
DDP = "module."  # DistributedDataParallel's; a model may have a module of this name, see `_own_root`
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<part>A|B)(?:\.(?P<adapter>[^.]+))?\.weight")
EMBEDDING = re.compile(r"(?P<module>.+)\.lora_(?P<part>embedding_[AB])(?:\.(?P<adapter>[^.]+))?")
# names of tensors that tell another tool or method, with what it is
_OTHERS = {
    r"\.lora_magnitude_vector|\.dora_scale$": "DoRA's magnitudes, which rescale the base weight",
    r"trainable_tokens": "trained rows of an embedding",
    r"\.lora_([AB](\.[^.]+)?|down|up)\.bias$": "the bias of a LoRA factor (lora_bias)",
    r"\.lora_mid\.": "LyCORIS' third factor of a convolution (Tucker)",
    r"\.(hada_\w|lokr_w|lokr_t|oft_blocks|oft_diag|on_input$|a[12]\.weight$|b[12]\.weight$)": "LyCORIS', and no LoRA",
    r"\.(diff|diff_b|set_weight|w_norm|b_norm)$": "a weight that was trained whole, as a difference",
    r"^(bundle_emb\.|emb_params$|string_to_)|\.string_to_": "the rows of new words (textual inversion)",
    r"\.lora_(down|up)\.weight$|^lora_(unet|te\d?|transformer)_": "kohya-ss's naming",
    r"\.lora\.(down|up)\.weight$|lora_linear_layer|\.processor\.": "diffusers' naming",
    r"\.lora_[ab]$": "MLX's naming",
    r"\.(lora_E|lora_ranknum)": "AdaLoRA's",
    r"\.(vera_|ia3_|oft_|boft_|hra_|loha_|fourierft_)": "another method than LoRA",
}


class Factor(NamedTuple):
    """What a tensor's name says: the module that it is of, whether it is A, B or alpha, and the name of the adapter.

    `module` is as the dialect writes it; `path` as it stands in the file.
    """

    module: str
    part: str
    path: str
    adapter: str = ""


@dataclass
class Names:
    """What the names of an adapter's tensors say.

    `factors` gives each module's tensors by part: A and B, or embedding_A and embedding_B. `whole` are parameters that
    were saved whole, a head, by path in the base model; `copies` those that PEFT copies from the base beside an
    embedding's update. `unread` says why a tensor is left out. In other dialects than PEFT's, `alphas` are the tensors
    that tell a module's alpha, and `paths` what stands in the file for a module.
    """

    factors: dict[str, dict[str, str]] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    alphas: dict[str, str] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_names(keys: Iterable[str], config: Mapping[str, Any]) -> Names:
    """Return what `keys`, the names of an adapter's tensors, say; `config` is its adapter_config.json."""
    names, adapters, heads = Names(), set(), {}
    own_root = _own_root(config)
    for key in sorted(keys):
        path, fault = _path(key, own_root)
        match = FACTOR.fullmatch(path) or EMBEDDING.fullmatch(path)
        if fault or not key.isprintable():
            names.problems.append(fault or f"tensor {key!r}: a name with control characters")
        elif match:
            adapters.add(match["adapter"] or "")
            parts = names.factors.setdefault(match["module"], {})
            names.problems += said_twice(key, parts.get(match["part"]))
            parts[match["part"]] = key
        elif told := told_of(path):
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


def told_of(name: str) -> str:
    """Return which tool or method the name of a tensor tells of, where it is none that is read here, or nothing."""
    return next((what for pattern, what in _OTHERS.items() if re.search(pattern, name)), "")


def _path(key: str, own_root: bool) -> tuple[str, str]:
    """Return the path in the base model that `key` means, and what is wrong with it."""
    path = ".".join(part for part in key.split(".") if part not in WRAPPERS)
    prefixed = False
    while path.startswith((PREFIX, DDP)):
        if own_root and prefixed:  # the rest are the model's own modules
            return path, ""
        prefixed = prefixed or path.startswith(PREFIX)
        path = path.removeprefix(PREFIX if path.startswith(PREFIX) else DDP)
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
            names.problems += said_twice(key, names.whole.get(plain))
            names.whole[plain] = key


def said_twice(key: str, other: str | None) -> list[str]:
    """Return what is wrong with `key` where `other` means the same tensor."""
    return [] if other is None else [f"tensors {other} and {key} are the same one of the base model"]
