"""Adapters in, one adapter out: in memory, or layer by layer into a folder with its provenance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loraloom.adapters.peft import adapter_writer
from loraloom.adapters.together import Targets
from loraloom.adapters.update import Adapter
from loraloom.files.atomic import make_readable
from loraloom.merging.card import merged_card
from loraloom.merging.choice import AgreementFacts
from loraloom.merging.distillation import Distiller
from loraloom.merging.facts import MERGED, MergedFacts, MergeFacts, hashing, layer_facts
from loraloom.merging.mends import ScreenFacts
from loraloom.merging.options import Dtype, Heads, MergeOptions, Normalise
from loraloom.merging.plan import Layer, Plan
from loraloom.merging.planning import make_plan
from loraloom.merging.readout import Readouts
from loraloom.merging.registry import Probe
from loraloom.notebook import facts
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
        adapter = Adapter(updates, plan.config, plan.head, plan.dtype, forms=plan.forms, copies=plan.copies)
        return replace(adapter, dialect=plan.dialect.name)

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
        adapter = Adapter(updates, plan.config, {}, plan.dtype, forms=plan.forms, copies=plan.copies)
        return replace(adapter, dialect=plan.dialect.name)

    def layers(self) -> Iterable[Layer]:
        """Return the merged layers."""
        return self.merged.values()

    def _repr_html_(self) -> str:
        plan, lost = self.plan, self.energy_lost
        worst = max(lost, key=lambda module: lost[module])
        told = {
            "adapters": ", ".join(f"{name} ({plan.weights[name]:g})" for name in plan.members),
            "scale": f"{plan.scale:g}",
            "options": ", ".join(f"{name} {value}" for name, value in plan.options.items() if value is not None),
            "layers": len(self.merged),
            "rank": max(layer.update.rank for layer in self.layers()),
            "energy lost": f"at most {100 * lost[worst]:.2g} % of a layer's, in {worst}" if lost[worst] else "none",
            "heads kept beside": ", ".join(sorted(plan.task_heads)),
        }
        warnings = {f"warning {number}": text for number, text in enumerate(plan.warnings, 1)}
        return facts(f"Merged by {plan.rule.name}", told | warnings)


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
    agreement: AgreementFacts | None = None,
    targets: Targets = "union",
    stack: bool = False,
    normalise: Normalise = "auto",
    to: str | None = None,
    clip: float | None = None,
    server: str | None = None,
    screening: ScreenFacts | None = None,
    dtype: Dtype | None = None,
    statistics: Mapping[str, Statistics] | Sequence[Statistics] = (),
    probe: Probe | None = None,
    distiller: Distiller | None = None,
    **options: Any,
) -> Merged:
    """Merge `adapters` by `rule` into one, in memory; but for a stack their order does not matter. No base is loaded.

    adapters: by name; those of a sequence are named by their folders.
    rule: name of the merging rule; `rule_names()` has all.
    weights: one for each adapter, in their order, on its update before the rule; None takes the rule's own.
    scale: factor on the rule's result; None takes the rule's own.
    rank: the largest rank of the result, for any rule; None leaves it to the rule.
    seed: for rules that draw at random; each layer draws its own from it.
    heads: "keep" leaves each adapter's head to itself; "average" puts their weighted mean into the merged adapter.
    base: the name of the base model of all, where their configs spell it in ways that are not known to be one.
    agreement: what chose the rule or the scale, for the record that `write_merged` keeps; see `agreement`.
    targets: layers of the result: the "union" of the adapters', their "intersection", or the "same" of all.
    stack: whether they were trained one on top of the other, in this order: they are summed whole.
    normalise: what is made equal of all adapters, layer by layer, before the weights: "norm", |dW|_F; "response", what
      each does to its own inputs, which takes statistics; "auto": the former where their energies differ more than
      3-fold and no weights are given, for rules that see updates alone, else nothing ("none").
    to: the tool that the result is written for: "peft", "diffusers", "kohya" or "mlx"; None takes the adapters' own.
    server: for which `write_merged` writes the result: "vllm", "sglang", "llamacpp" or "ollama"; see `SERVERS`.
    clip: the most energy |dW|^2 of an adapter in a layer, times the adapters' median there.
    screening: what a screening found before, for the record; see `screen`.
    dtype: of the result's weights; None takes the widest of the adapters'.
    statistics: of each adapter's inputs, by name or in the adapters' order, for what needs them.
    probe: base model and texts of each task, for rules that need them.
    distiller: what trains a merge by the single adapters; `distil` makes one.
    options: the rule's own, as `density=0.3`; `loraloom rules NAME` tells a rule's.

    Raises LoraloomError that tells all problems at once; see `make_plan`.
    """
    asked = MergeOptions(rule, options, weights, scale, rank, seed, heads, base, agreement, targets, stack, normalise)
    asked = replace(asked, to=to, clip=clip, server=server, screening=screening, dtype=dtype)
    plan = make_plan(adapters, asked, statistics=statistics, probe=probe, distiller=distiller)
    return Merged(plan, {layer.module: layer for layer in plan.layers()})


def write_merged(
    merged: Merged | Plan,
    folder: str | Path,
    *,
    command: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write an adapter's folder with heads/<input>.safetensors, a model card and loraloom.json; return the folder.

    It is PEFT's, or that of the tool in whose files all inputs stand, or for which the merge was asked.

    merged: what `merge` returned; or a plan, which is computed while it is written: few layers at a time in memory.
    folder: appears whole or not at all.
    command: as it was typed, for loraloom.json.
    overwrite: replace a folder that holds an earlier merged adapter.
    progress: is called after each layer with the layers done and all.

    Raises LoraloomError where the folder holds anything else or lies in an input, or a value does not fit the dtype.
    """
    plan = merged if isinstance(merged, Plan) else merged.plan
    head, layers, copies = plan.head, {}, plan.copies
    readouts: Readouts | None = None
    rank = plan.served.rank if plan.served else None
    place: dict[str, Any] = {"kind": MERGED, "overwrite": overwrite, "inputs": plan.folders}
    place |= {"dialect": plan.dialect, "rank": rank}
    with (
        hashing(plan) as hashes,
        adapter_writer(folder, plan.config, plan.dtype, plan.modules, [*head, *copies], plan.forms, **place) as out,
    ):
        out.add_head(head)
        out.add_head(copies)
        for layer in merged.layers():
            out.add(layer.module, layer.update)
            layers[layer.module] = layer_facts(layer)
            if layer.shared:
                readouts = readouts or Readouts(out.staged, plan.modules, plan.used)
                readouts.add(layer.module, layer.shared)
            if progress:
                progress(len(layers), len(plan.modules))
        facts = MergedFacts.written(MergeFacts.of(plan, MERGED, command, hashes=hashes()), layers)
        extra = {f"heads/{name}.safetensors": tensors for name, tensors in plan.task_heads.items()}
        extra |= readouts.finish() if readouts else {}
        out.finish(asdict(facts), {"README.md": merged_card(facts)}, extra, plan.carried)
    if plan.served:
        make_readable(Path(folder))
    return Path(folder)
