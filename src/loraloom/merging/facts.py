"""What a merge is and did: numbers, lists and None, the same in loraloom.json, the model card, --json and on a page."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from loraloom.adapters.dialects import PEFT, last_name
from loraloom.adapters.hub import folder_name, pinned
from loraloom.adapters.peft import PROVENANCE, read_provenance
from loraloom.adapters.servers import ServedFacts
from loraloom.adapters.together import Targets
from loraloom.adapters.update import Adapter
from loraloom.errors import LoraloomError, first_few
from loraloom.files.hashing import seen_sha256
from loraloom.merging.choice import AgreementFacts
from loraloom.merging.distillation import DistilledFacts
from loraloom.merging.fuse import FusedFacts
from loraloom.merging.mends import ScreenFacts
from loraloom.merging.names import public_command
from loraloom.merging.normalise import NormaliseFrom, drowned, silent
from loraloom.merging.options import Normalise
from loraloom.merging.plan import Layer, Plan, ScaleFrom

MERGED = "merged adapter"  # the kind of result
_LOSSY = 0.1  # share of the energy that goes with a warning


@dataclass(frozen=True)
class MemberFacts:
    """One of the adapters that are merged.

    name: what it is called among them, and what is kept of it beside the result.
    task: what it was trained on, or else its name.
    folder: the last part of its folder's path; None where it was in memory.
    sha256: of its config and weights; None in memory, and of a dry run, which reads little.
    rank: the largest of any layer. alpha: as its config has it.
    targets: the last parts of its layers' paths, each once.
    layers, lacks: how many layers of the result it has, and how many it leaves as they are.
    energy: |dW_i|_F^2 over all layers, as it came; None of a dry run that would have to read much.
    factors: f_il by module path l, which make it as loud as the others; empty where nothing was normalised.
    factor: what they do to its whole norm: sqrt(sum_l |f_il dW_il|_F^2 / sum_l |dW_il|_F^2).
    weight: w_i, in force.
    energy_share: of sum_i |w_i f_i dW_i|_F^2, of what the rule is given, its part; None as `energy`.
    hub: its name on the hub with the commit, `org/name@commit`, as a merge takes it; None of another folder.
    files: of one from the hub, the sha256 of config and weights each; empty where `sha256` is None.
    """

    name: str
    task: str
    folder: str | None
    sha256: str | None
    rank: int
    alpha: float | None
    targets: list[str]
    layers: int
    lacks: int
    energy: float | None
    factors: dict[str, float]
    factor: float
    weight: float
    energy_share: float | None
    hub: str | None = None
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerFacts:
    """One merged layer: its rank, |dW|_F^2, and the share of that which truncation took."""

    rank: int
    energy: float
    energy_lost: float


@dataclass(frozen=True)
class MergeFacts:
    """How adapters are merged: all that is known before anything is computed.

    scale_from: who chose the scale. rank: what was asked for. targets: which of the inputs' layers are merged.
    as_it_is: one input takes part, and no option of the rule was asked for: the rule was left out.
    stack: what is known of what each input but the first was trained on, where they are a stack; else None.
    heads: the inputs whose heads are kept beside the result.
    normalise: what was made equal of all inputs, before the weights. normalise_from: who decided that.
    loudness: how many times the energy of the quietest input that of the loudest is, where that decided; else None.
    carried: files that come along from the inputs. left_out: what does not, with why. warnings: what may not be meant.
    agreement: every candidate that was tried where rule or scale were chosen without labels.
    screening: verdicts on the adapters, with reasons, and who was dropped; None where they were not screened.
    clip: the most that an adapter's energy in a layer may be, times the adapters' median there; None where any may be.
    dialect: of the tool in whose files the result is written, or whose names its layers have.
    served: the server that the result is written for, and its rank there.
    distilled: what was done where the result was trained by the single adapters, on which texts.
    """

    kind: str
    command: str | None
    base: str
    base_fingerprint: str
    inputs: list[MemberFacts]
    rule: str
    options: dict[str, Any]
    space: str
    normalise: Normalise
    scale: float
    scale_from: ScaleFrom
    rank: int | None
    seed: int
    targets: Targets
    as_it_is: bool
    stack: list[str] | None
    heads: list[str]
    heads_averaged: bool
    carried: list[str]
    left_out: dict[str, str]
    warnings: list[str]
    versions: dict[str, str]
    agreement: AgreementFacts | None = field(default=None, kw_only=True)
    screening: ScreenFacts | None = field(default=None, kw_only=True)
    clip: float | None = field(default=None, kw_only=True)
    normalise_from: NormaliseFrom = field(default="asked", kw_only=True)
    loudness: float | None = field(default=None, kw_only=True)
    dialect: str = field(default=PEFT.name, kw_only=True)
    served: ServedFacts | None = field(default=None, kw_only=True)
    distilled: DistilledFacts | None = field(default=None, kw_only=True)

    @classmethod
    def of(
        cls,
        plan: Plan,
        kind: str,
        command: str | None = None,
        *,
        energies: bool = True,
        hashes: Mapping[str, str] | None = None,
    ) -> MergeFacts:
        """Return the facts of a plan.

        energies: whether every weight is read, to tell the energies of the inputs. hashes: of the files of inputs, by
            name; see `hashing`.
        """
        in_force = _energies_in_force(plan) if energies else {}
        warnings = plan.warnings + silent({name: one for name, one in in_force.items() if name in plan.used})
        warnings += drowned(in_force) if plan.normalised.way == "none" and not plan.stack else []
        return MergeFacts(
            kind=kind,
            command=public_command(command),
            base=str(plan.config.get("base_model_name_or_path") or ""),
            base_fingerprint=_fingerprint(plan),
            inputs=_members(plan, in_force, hashes or {}),
            rule=plan.rule.name,
            options=plan.options,
            space=plan.space,
            normalise=plan.normalised.way,
            scale=plan.scale,
            scale_from=plan.scale_from,
            rank=plan.rank,
            seed=plan.seed,
            targets=plan.targets,
            as_it_is=plan.as_it_is,
            stack=plan.stack.known if plan.stack else None,
            heads=sorted(plan.task_heads),
            heads_averaged=plan.heads == "average",
            carried=sorted(plan.carried),
            left_out=plan.left_out,
            warnings=warnings,
            versions={"loraloom": version("loraloom"), "torch": torch.__version__},
            agreement=plan.agreement,
            screening=plan.screening,
            clip=plan.clip,
            normalise_from=plan.normalised.who,
            loudness=plan.normalised.loudness,
            dialect=plan.dialect.name,
            served=plan.served,
            distilled=plan.distiller.facts if plan.distiller else None,
        )


@dataclass(frozen=True)
class MergedFacts(MergeFacts):
    """A merged adapter as it was written: loraloom.json holds this.

    output_rank: the largest of any layer. energy_lost: the share of the whole |dW|_F^2 that truncation took.
    layers: by module path. notes: what was done to it since.
    """

    output_rank: int
    energy_lost: float
    layers: dict[str, LayerFacts]
    notes: list[str] = field(default_factory=list)

    @classmethod
    def written(cls, facts: MergeFacts, layers: Mapping[str, LayerFacts]) -> MergedFacts:
        """Return what was merged as `facts` say, into `layers`."""
        lost = _energy_lost(layers.values())
        told = vars(facts)
        if lost > _LOSSY:
            advice = "ask for a larger rank" if facts.rank else "its result has no low rank: fuse it into the base"
            told = {
                **told,
                "warnings": [*facts.warnings, f"truncation took {100 * lost:.0f} % of the energy: {advice}"],
            }
        rank = max(layer.rank for layer in layers.values())
        return cls(**told, output_rank=rank, energy_lost=lost, layers=dict(layers))

    @classmethod
    def read(cls, folder: Path) -> MergedFacts:
        """Return what loraloom.json of a merged adapter tells. Raises LoraloomError where it is none of these."""
        try:
            return TypeAdapter(cls).validate_python(read_provenance(folder))
        except ValidationError as error:
            missing = [str(one["loc"][-1]) for one in error.errors() if one["type"] == "missing"]
            lacks = f", as this version writes it: {first_few(missing)} missing" if missing else ""
            raise LoraloomError(
                f"{folder / PROVENANCE}: does not tell of a merge{lacks}", "merge the adapters again"
            ) from error

    def scaled(self, scale: float, notes: list[str]) -> MergedFacts:
        """Return the facts of the same merge at another scale, with `notes`."""
        factor = (scale / self.scale) ** 2
        layers = {name: dataclasses.replace(layer, energy=factor * layer.energy) for name, layer in self.layers.items()}
        return dataclasses.replace(self, scale=scale, scale_from="asked", layers=layers, notes=notes)


@dataclass(frozen=True)
class FusionFacts(MergeFacts):
    """A checkpoint with a merge in its weights. fused_into: the base's folder, by the last part of its path."""

    fused_into: str
    checkpoint: FusedFacts


@dataclass(frozen=True)
class ForecastFacts(MergeFacts):
    """What a merge would do.

    output_rank: of the largest layer, at most. size: of what is written, bytes, at most. dtype: of the weights.
    seconds: that the rule will take; None where they depend on texts or statistics.
    """

    output_rank: int
    size: int
    dtype: str
    seconds: float | None


@contextmanager
def hashing(plan: Plan) -> Iterator[Callable[[], dict[str, str]]]:
    """Hash the inputs' files while the caller works; yield what waits for that and returns them by the inputs' names.

    It raises LoraloomError where a file is not what it was when it was read.
    """
    with ThreadPoolExecutor(os.cpu_count()) as cores:
        found = {
            name: cores.submit(seen_sha256, member.sources) for name, member in plan.members.items() if member.sources
        }
        try:
            yield lambda: {name: one.result() for name, one in found.items()}
        finally:
            cores.shutdown(cancel_futures=True)


def layer_facts(layer: Layer) -> LayerFacts:
    """Return the facts of one merged layer."""
    return LayerFacts(layer.update.rank, layer.update.energy(), layer.energy_lost)


def _energy_lost(layers: Iterable[LayerFacts]) -> float:
    """Return the share of the whole adapter's |dW|_F^2 that truncation took."""
    found = [layer for layer in layers if layer.energy_lost < 1]
    kept = sum(layer.energy for layer in found)
    whole = sum(layer.energy / (1 - layer.energy_lost) for layer in found)
    return 1 - kept / whole if whole else 0.0


def _fingerprint(plan: Plan) -> str:
    """Return the fingerprint of the base where the inputs know one: of other layers they have others."""
    members = list(plan.members.values())[: 1 if plan.stack else None]  # of a stack, others are on what is made of it
    known = {one.fingerprint for one in members if one.fingerprint}
    return known.pop() if len(known) == 1 else ""


def _energies_in_force(plan: Plan) -> dict[str, float]:
    """Return sum_l |w_i f_il dW_il|_F^2 of each input i over the merged layers: 0 of one of weight 0."""
    return {
        name: sum(plan.times(name, at) ** 2 * energy for at, energy in layers.items() if at in plan.shapes)
        for name, layers in plan.energies.items()
    }


def _members(plan: Plan, energies: Mapping[str, float], hashes: Mapping[str, str]) -> list[MemberFacts]:
    total = sum(energies.values()) or 1.0
    return [
        MemberFacts(
            name=name,
            task=member.task or name,
            folder=folder_name(member.path) if member.path else None,
            sha256=hashes.get(name),
            rank=member.rank,
            alpha=_alpha(member),
            targets=sorted(set(map(last_name, member.shapes))),
            layers=sum(module in member.shapes for module in plan.modules),
            lacks=sum(module not in member.shapes for module in plan.modules),
            energy=sum(plan.energies[name].values()) if energies else None,
            factors=dict(plan.factors.get(name, {})),
            factor=_factor(plan, name),
            weight=plan.weights[name],
            energy_share=energies[name] / total if energies else None,
            hub=pinned(member.path) if member.path else None,
            files=_hashes(member) if name in hashes else {},
        )
        for name, member in plan.members.items()
    ]


def _hashes(member: Adapter) -> dict[str, str]:
    """Return the sha256 of each file that was read of an adapter from the hub; of another the one over all will do."""
    of_hub = member.path is not None and pinned(member.path) is not None
    return {seen.path.name: seen_sha256([seen]) for seen in member.sources} if of_hub else {}


def _factor(plan: Plan, name: str) -> float:
    """Return what normalising does to the whole norm of an input."""
    if name not in plan.factors:
        return 1.0
    energies, factors = plan.energies[name], plan.factors[name]
    after = sum(factors.get(module, 1.0) ** 2 * energy for module, energy in energies.items())
    return math.sqrt(after / sum(energies.values()))


def _alpha(member: Adapter) -> float | None:
    alpha = member.config.get("lora_alpha")
    return float(alpha) if alpha is not None else None
