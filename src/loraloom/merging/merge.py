"""Adapters in, one adapter out: check everything, merge layer by layer, write the result with its provenance."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraloom.adapter import Adapter, Update, adapter_sha256, compatibility_problems, headless_config, write_adapter
from loraloom.errors import LoraloomError, raise_problems
from loraloom.merging.core import truncate, truncate_dense
from loraloom.merging.rules import Rule, get_rule


@dataclass(frozen=True)
class Merged:
    """One merged adapter and how it came about.

    `heads` holds each input's own head, never merged; `options`, `scale` and `weights` (by input) are those in force,
    defaults filled in; `energy_lost` is the share of |dW|_F^2 that truncation took from each layer, 0.0 where the rule
    is exact in factors; `inputs` maps each input's name to its folder.
    """

    adapter: Adapter
    heads: dict[str, dict[str, Tensor]]
    rule: str
    space: str
    options: dict[str, Any]
    scale: float
    weights: dict[str, float]
    seed: int
    energy_lost: dict[str, float]
    inputs: dict[str, Path | None]


def merge(
    adapters: Mapping[str, Adapter] | Sequence[Adapter],
    rule: str,
    *,
    weights: Sequence[float] | None = None,
    scale: float | None = None,
    rank: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Merged:
    """Merge `adapters` by `rule` into one; their order does not matter. No base model is loaded.

    Adapters given as a sequence are named by their folders. `weights` go to each update before the rule, `scale` to
    its result; None takes the rule's own. `rank` truncates the result of any rule. Raises LoraloomError that tells all
    problems at once: adapters that do not fit together, unknown or out-of-range options, weights that do not match.
    """
    names, members = _named(adapters)
    problems = _name_problems(names) + compatibility_problems(members)
    problems += _number_problems(len(members), weights, scale, rank)
    found: Rule | None = None
    chosen: dict[str, Any] = {}
    try:
        found = get_rule(rule)
        chosen, wrong = found.check(options)
        problems += wrong
    except LoraloomError as error:
        problems.append(f"{error.message}: {error.hint}")
    raise_problems(f"cannot merge {', '.join(names) or 'nothing'}", problems, "nothing was merged or written")
    assert found is not None  # get_rule raised otherwise
    if weights is None:
        weights = [1.0 if found.default_weights == "one" else 1.0 / len(members)] * len(members)
    if scale is None:
        scale = found.default_scale
    updates, lost = {}, {}
    for module in sorted(members[0].updates):
        layer = [_times(member.updates[module], w) for member, w in zip(members, weights, strict=True)]
        update, lost[module] = _merge_layer(found, layer, chosen, rank, _layer_seed(seed, module))
        updates[module] = _times(update, scale)
    return Merged(
        adapter=Adapter(updates, _config(members), {}, _dtype(members)),
        heads={name: member.head for name, member in zip(names, members, strict=True) if member.head},
        rule=rule,
        space=chosen.get("space", found.spaces[0]),
        options=chosen,
        scale=scale,
        weights=dict(zip(names, weights, strict=True)),
        seed=seed,
        energy_lost=lost,
        inputs={name: member.path for name, member in zip(names, members, strict=True)},
    )


def write_merged(merged: Merged, folder: str | Path, *, command: str | None = None) -> Path:
    """Write a PEFT folder with heads/<input>.safetensors, a model card and loraloom.json beside it; return it.

    The folder appears whole or not at all.
    """
    sha256 = {name: adapter_sha256(path) if path else None for name, path in merged.inputs.items()}
    provenance = {
        "kind": "merged adapter",
        "command": command,
        "inputs": [
            {"name": name, "path": str(path) if path else None, "sha256": sha256[name], "weight": merged.weights[name]}
            for name, path in merged.inputs.items()
        ],
        "rule": merged.rule,
        "space": merged.space,
        "options": merged.options,
        "scale": merged.scale,
        "seed": merged.seed,
        "heads": sorted(merged.heads),
        "versions": {"loraloom": version("loraloom"), "torch": torch.__version__},
        "layers": {
            module: {"rank": update.rank, "energy_lost": merged.energy_lost[module]}
            for module, update in merged.adapter.updates.items()
        },
    }
    return write_adapter(
        merged.adapter,
        folder,
        provenance=provenance,
        files={"README.md": merged_card(merged.adapter.base, provenance)},
        extra={f"heads/{name}.safetensors": head for name, head in merged.heads.items()},
    )


def _merge_layer(
    rule: Rule, layer: Sequence[Update], options: Mapping[str, Any], rank: int | None, seed: int
) -> tuple[Update, float]:
    """Apply `rule` to one layer and bring the result to its rank; return it with the share of energy lost."""
    ranks = [update.rank for update in layer]
    target = rank or (max(ranks) if rule.output_rank == "max" else sum(ranks))
    result = rule(layer, options, seed)
    return truncate_dense(result, target) if isinstance(result, Tensor) else truncate(result, target)


def _times(update: Update, factor: float) -> Update:
    return Update(factor * update.B, update.A)


def _layer_seed(seed: int, module: str) -> int:
    """Return a seed that depends on the layer's name, not on its place among the layers."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{module}".encode()).digest()[:7], "big")


def _named(adapters: Mapping[str, Adapter] | Sequence[Adapter]) -> tuple[list[str], list[Adapter]]:
    if isinstance(adapters, Mapping):
        return list(adapters), list(adapters.values())
    names = [a.path.resolve().name if a.path else f"adapter{i}" for i, a in enumerate(adapters, start=1)]
    return names, list(adapters)


def _name_problems(names: Sequence[str]) -> list[str]:
    if not names:
        return ["no adapters: give at least one"]
    problems = [f"input name {name!r} cannot name a file" for name in names if not re.fullmatch(r"\w[\w.+ -]*", name)]
    folded = [name.casefold() for name in names]
    twice = sorted({name for name in folded if folded.count(name) > 1})
    return problems + [f"several inputs are called {name!r}: pass a mapping with a name for each" for name in twice]


def _number_problems(count: int, weights: Sequence[float] | None, scale: float | None, rank: int | None) -> list[str]:
    problems = []
    if weights is not None and len(weights) != count:
        problems.append(f"{len(weights)} weights for {count} adapters: give one for each")
    for weight in weights or ():
        if not math.isfinite(weight):
            problems.append(f"weight {weight} is not finite")
    if scale is not None and not math.isfinite(scale):
        problems.append(f"scale {scale} is not finite")
    if rank is not None and rank < 1:
        problems.append(f"rank {rank} is below 1")
    return problems


def _config(members: Sequence[Adapter]) -> dict[str, Any]:
    """Return the first member's config without its head, and with target modules that hold for all members."""
    config = headless_config(members[0].config)
    if any(_targets(member) != _targets(members[0]) for member in members):
        config["target_modules"] = sorted(members[0].updates)
        for key in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            config.pop(key, None)
    return config


def _targets(member: Adapter) -> str | frozenset[str]:
    targets = member.config.get("target_modules") or ""
    return targets if isinstance(targets, str) else frozenset(targets)


def _dtype(members: Sequence[Adapter]) -> torch.dtype:
    dtype = members[0].dtype
    for member in members:
        dtype = torch.promote_types(dtype, member.dtype)
    return dtype


def merged_card(base: str, provenance: Mapping[str, Any]) -> str:
    """Return the model card that `provenance` (a merged adapter's loraloom.json) tells: of what, how, how to load it.

    `provenance["notes"]`, where present, is a list of further lines.
    """
    front = ["library_name: peft", "tags:", "- lora", "- merge", "- loraloom"]
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) and not base.startswith("."):
        front.insert(0, f"base_model: {base}")  # a name on the Hub; the Hub refuses a folder here
    options = ", ".join(f"{key} {value}" for key, value in provenance["options"].items()) or "none"
    layers = provenance["layers"].values()
    rows = [f"| {one['name']} | {one['weight']:g} | {one['sha256'] or 'unknown'} |" for one in provenance["inputs"]]
    heads = "; ".join(f"`heads/{name}.safetensors`" for name in provenance["heads"]) or "none"
    return "\n".join(
        [
            *("---", *front, "---", "", "# Merged LoRA adapter", ""),
            f"{len(rows)} adapters merged by the rule `{provenance['rule']}` of loraloom.",
            *("", "| input | weight | sha256 |", "|---|---|---|", *rows, ""),
            f"- space {provenance['space']}",
            f"- options {options}",
            f"- scale {provenance['scale']:g}",
            f"- output rank {max(layer['rank'] for layer in layers)}",
            f"- energy lost by truncation in the worst layer {max(layer['energy_lost'] for layer in layers):.3g}",
            f"- task heads, kept apart and never merged {heads}",
            *(f"- {note}" for note in provenance.get("notes", ())),
            *("", "An ordinary PEFT adapter, with the scaling folded in:", ""),
            *("```python", "model = PeftModel.from_pretrained(base_model, folder)", "```", ""),
            "Everything needed to make it again is in `loraloom.json`.",
            "",
        ]
    )
