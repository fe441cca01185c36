"""Adapters in, one adapter out: in memory, or layer by layer into a folder with its provenance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraloom.adapters.peft import adapter_sha256, adapter_writer
from loraloom.adapters.update import Adapter
from loraloom.merging.card import merged_card
from loraloom.merging.names import public_command
from loraloom.merging.options import Heads, MergeOptions
from loraloom.merging.plan import Layer, Plan, make_plan
from loraloom.merging.readout import READOUTS, readout_tensors
from loraloom.merging.registry import Probe
from loraloom.statistics.file import Statistics


@dataclass(frozen=True)
class Merged:
    """One merged adapter in memory: the plan it follows, and every layer by module path."""

    plan: Plan
    merged: dict[str, Layer]

    @property
    def adapter(self) -> Adapter:
        """Return the merged adapter."""
        updates = {module: layer.update for module, layer in self.merged.items()}
        plan = self.plan
        return Adapter(updates, plan.config, plan.head, plan.dtype, forms=plan.forms, copies=plan.copies)

    @property
    def energy_lost(self) -> dict[str, float]:
        """Return the share of |dW|_F^2 that truncation took, by module path; 0.0 where nothing was cut off."""
        return {module: layer.energy_lost for module, layer in self.merged.items()}

    def readout(self, task: str) -> Adapter:
        """Return what one input's task reads of a rule that tells tasks apart (see `Shared`), as an adapter.

        Raises KeyError for another rule or an input that took no part.
        """
        index = self.plan.used.index(task)
        updates = {module: layer.shared.readouts()[index] for module, layer in self.merged.items() if layer.shared}
        plan = self.plan
        return Adapter(updates, plan.config, {}, plan.dtype, forms=plan.forms, copies=plan.copies)

    def layers(self) -> Iterable[Layer]:
        """Return the merged layers."""
        return self.merged.values()


def merge(
    adapters: Mapping[str, Adapter] | Sequence[Adapter],
    rule: str = "tsv",
    *,
    weights: Sequence[float] | None = None,
    scale: float | None = None,
    rank: int | None = None,
    seed: int = 0,
    heads: Heads = "keep",
    base: str | None = None,
    statistics: Mapping[str, Statistics] | Sequence[Statistics] = (),
    probe: Probe | None = None,
    **options: Any,
) -> Merged:
    """Merge `adapters` by `rule` into one, in memory; their order does not matter. No base model is loaded.

    adapters: by name; those of a sequence are named by their folders.
    rule: name of the merging rule; `rule_names()` has all.
    weights: one for each adapter, in their order, on its update before the rule; None takes the rule's own.
    scale: factor on the rule's result; None takes the rule's own.
    rank: the largest rank of the result, for any rule; None leaves it to the rule.
    seed: for rules that draw at random; each layer draws its own from it.
    heads: "keep" leaves each adapter's head to itself; "average" puts their weighted mean into the merged adapter.
    base: the name of the base model of all, where their configs spell it in ways that are not known to be one.
    statistics: of each adapter's inputs, by name or in the adapters' order, for rules that need them.
    probe: base model and texts of each task, for rules that need them.
    options: the rule's own, as `density=0.3`; `loraloom rules NAME` tells a rule's.

    Raises LoraloomError that tells all problems at once; see `make_plan`.
    """
    asked = MergeOptions(rule, options, weights, scale, rank, seed, heads, base)
    plan = make_plan(adapters, asked, statistics=statistics, probe=probe)
    return Merged(plan, {layer.module: layer for layer in plan.layers()})


def write_merged(
    merged: Merged | Plan,
    folder: str | Path,
    *,
    command: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a PEFT folder with heads/<input>.safetensors, a model card and loraloom.json; return the folder.

    A Plan is computed while it is written, so that no more than one layer is in memory. `progress` is called after
    each layer with the layers done and all. The folder appears whole or not at all.
    """
    plan = merged if isinstance(merged, Plan) else merged.plan
    head, layers, copies = plan.head, {}, plan.copies
    readouts: dict[str, dict[str, Tensor]] = {}
    with adapter_writer(folder, plan.config, plan.dtype, plan.modules, [*head, *copies], plan.forms) as out:
        out.add_head(head)
        out.add_head(copies)
        for layer in merged.layers():
            out.add(layer.module, layer.update)
            layers[layer.module] = _layer_facts(layer)
            if layer.shared:
                for file, tensors in readout_tensors(layer.module, layer.shared, plan.used).items():
                    readouts.setdefault(file, {}).update(tensors)
            if progress:
                progress(len(layers), len(plan.modules))
        provenance = {**plan_facts(plan), "command": public_command(command), "layers": layers}
        extra = {f"heads/{name}.safetensors": tensors for name, tensors in plan.task_heads.items()}
        extra |= {f"{READOUTS}/{file}.safetensors": tensors for file, tensors in readouts.items()}
        base = str(plan.config.get("base_model_name_or_path") or "")
        out.finish(provenance, {"README.md": merged_card(base, provenance)}, extra, plan.carried)
    return Path(folder)


def plan_facts(plan: Plan) -> dict[str, Any]:
    """Return inputs with their tasks and hashes, rule, options, scale, weights, seed and versions."""
    return {
        "kind": "merged adapter",
        "inputs": [
            {
                "name": name,
                "task": member.task or name,
                "folder": member.path.resolve().name if member.path else None,
                "sha256": adapter_sha256(member.path) if member.path else None,
                "weight": plan.weights[name],
            }
            for name, member in plan.members.items()
        ],
        "rule": plan.rule.name,
        "space": plan.space,
        "options": plan.options,
        "scale": plan.scale,
        "rank": plan.rank,
        "seed": plan.seed,
        "heads": sorted(plan.task_heads),
        "carried": sorted(plan.carried),
        "left_out": plan.left_out,
        "warnings": plan.warnings,
        "base_fingerprint": next((a.fingerprint for a in plan.members.values() if a.fingerprint), ""),
        "versions": {"loraloom": version("loraloom"), "torch": torch.__version__},
    }


def energy_lost(layers: Mapping[str, Mapping[str, float]]) -> float:
    """Return the share of the whole adapter's |dW|_F^2 that truncation took, of the layers of a loraloom.json."""
    kept = sum(layer["energy"] for layer in layers.values())
    whole = sum(layer["energy"] / (1 - layer["energy_lost"]) for layer in layers.values() if layer["energy_lost"] < 1)
    return 1 - kept / whole if whole else 0.0


def _layer_facts(layer: Layer) -> dict[str, Any]:
    update = layer.update
    return {"rank": update.rank, "energy": update.energy(), "energy_lost": layer.energy_lost}
