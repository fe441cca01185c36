"""A merge that was checked and may begin: what each layer is merged from, by which rule, how."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from loraloom.adapters.beside import carry
from loraloom.adapters.config import CONFIG, merged_config, writes
from loraloom.adapters.dialects import PEFT, Dialect
from loraloom.adapters.lowrank import Shared, no_update, truncate, truncate_dense
from loraloom.adapters.servers import ServedFacts
from loraloom.adapters.together import Targets, common_copies, equal_adapters, layers_of_all
from loraloom.adapters.update import Adapter, Form, Shape, Update, is_expert
from loraloom.cores import side_by_side
from loraloom.files.hashing import layer_seed
from loraloom.merging.choice import AgreementFacts
from loraloom.merging.distillation import Distiller
from loraloom.merging.mends import ScreenFacts
from loraloom.merging.normalise import AS_THEY_ARE, Normalised
from loraloom.merging.options import Heads
from loraloom.merging.problems import dropped_layers, odd_ranks, trained_whole, unseen_layers
from loraloom.merging.registry import Probe, Result, Rule
from loraloom.merging.stack import Stack
from loraloom.statistics.file import Statistics

ScaleFrom = Literal["asked", "agreement", "rule", "single adapter", "stack"]


class Layer(NamedTuple):
    """One merged layer.

    energy_lost: the share of |dW|_F^2 that truncation took.
    shared: what each task reads of it, where the rule tells tasks apart.
    """

    module: str
    update: Update
    energy_lost: float
    shared: Shared | None


@dataclass(frozen=True)
class Plan:
    """A checked merge; `make_plan` makes it. Nothing is computed before a layer is asked for.

    members, statistics: by input name.
    options, weights, scale: those in force, with defaults filled in; weights by input name.
    scale_from: whose the scale is: the caller's, that of the candidate nearest to the single models, the rule's own, or
      that of one adapter that stays as it is.
    rank: what the caller asked for.
    heads: "keep" leaves each input's head to itself, "average" merges them.
    base: the base model's name, where the caller settled it.
    agreement: what chose the rule or the scale, where it was agreement with the single models.
    targets: which of the inputs' layers the result has.
    as_it_is: one input takes part and no option of the rule was asked for: it comes back as it is, without the rule.
    stack: what is known of the inputs' bases, where they are summed as trained one on top of the other.
    normalised: what was made equal before the weights, and who decided it. factors: of that or of clipping; else 1.
    served: the server that the result is written for, and its rank there.
    dialect: of the tool that the result is written for; the members' layers are named as there.
    dtype_asked: of the result; None for the widest of the inputs.
    """

    members: dict[str, Adapter]
    rule: Rule
    options: dict[str, Any]
    weights: dict[str, float]
    scale: float
    scale_from: ScaleFrom
    rank: int | None
    seed: int
    statistics: dict[str, Statistics]
    probe: Probe | None
    heads: Heads
    base: str | None = None
    agreement: AgreementFacts | None = None
    targets: Targets = "union"
    as_it_is: bool = False
    stack: Stack | None = None
    normalised: Normalised = AS_THEY_ARE
    factors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    dialect: Dialect = PEFT
    served: ServedFacts | None = None
    clip: float | None = None
    screening: ScreenFacts | None = None
    distiller: Distiller | None = None
    dtype_asked: torch.dtype | None = None

    @property
    def space(self) -> str:
        """Return the space in which the rule works."""
        return str(self.options.get("space", self.rule.spaces[0]))

    @cached_property
    def _owners(self) -> dict[str, Adapter]:
        """Return every merged layer, in order, with the first input that takes part and has it."""
        return layers_of_all([self.members[name] for name in self.used], self.targets)

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """Return every merged layer's m and n, in which the inputs agree, with one input's rank."""
        return {module: one.shapes[module] for module, one in self._owners.items()}

    @cached_property
    def forms(self) -> Mapping[str, Form]:
        """Return the forms of the merged layers that are not linear, in which the inputs agree."""
        return {module: one.forms[module] for module, one in self._owners.items() if module in one.forms}

    @cached_property
    def modules(self) -> list[str]:
        """The module paths of all merged layers, in order."""
        return list(self._owners)

    @cached_property
    def used(self) -> list[str]:
        """The inputs that take part: those of weight 0 do not, as if they had not been given."""
        return [name for name, weight in self.weights.items() if weight != 0] or list(self.members)

    @property
    def folders(self) -> list[Path]:
        """Return the folders that inputs were read from, which the result must not touch."""
        return [member.path for member in self.members.values() if member.path]

    def layers(self) -> Iterator[Layer]:
        """Yield every merged layer in order: a few at once are computed where they are small."""
        rule = self.rule
        in_factors = set(rule.needs) <= {"seed"} and (rule.exact or self.space != "full")
        return side_by_side(self.layer, self.modules) if in_factors else map(self.layer, self.modules)

    def bound(self, module: str) -> int:
        """Return the rank that a layer's result does not exceed where the caller asks for none."""
        ranks = [self.members[name].shapes[module].r for name in self.having(module)]
        return self.rule.bound(ranks)

    def having(self, module: str) -> list[str]:
        """Return the inputs that take part and have this layer."""
        return [name for name in self.used if module in self.members[name].shapes]

    def layer(self, module: str) -> Layer:
        """Return one merged layer as a low-rank update, truncated where it must be or was asked to be."""
        updates = self.updates(module)
        result = self._merged(module, updates)
        limit = self.rank or self.bound(module)
        if isinstance(result, Tensor):
            update, lost = truncate_dense(result, limit)
        else:
            update, lost = truncate(result.update() if isinstance(result, Shared) else result, limit)
        return Layer(module, update, lost, result if isinstance(result, Shared) else None)

    def result(self, module: str) -> Result:
        """Return what the rule makes of one layer, times the scale: low-rank or dense, nothing truncated."""
        return self._merged(module, self.updates(module))

    @property
    def energies(self) -> dict[str, Mapping[str, float]]:
        """Return |dW|_F^2 by input and module path; the first time this reads every weight."""
        return {name: member.energies for name, member in self.members.items()}

    def times(self, name: str, module: str) -> float:
        """Return what an input's update is multiplied by: its weight and factor."""
        return self.weights[name] * self.factors.get(name, {}).get(module, 1.0)

    def _merged(self, module: str, updates: Sequence[Update]) -> Result:
        result: Result
        if self.as_it_is:
            result = updates[0]
        elif self.rule.whole:
            result = self._all[module]
        else:
            moments, weights = [], [self.weights[name] for name in self.used]
            if "moments" in self.rule.supplied:
                seen = [module in self.statistics[name].layers for name in self.used]
                moments = [self.statistics[name].moment(module) for name in itertools.compress(self.used, seen)]
                updates = list(itertools.compress(updates, seen))
                weights = list(itertools.compress(weights, seen))
            seed = layer_seed(self.seed, module)
            given: dict[str, Any] = {"seed": seed, "rank": self.rank, "moments": moments, "weights": weights}
            result = self.rule.layer(updates, self.options, **given)
        return _times(result, self.scale)

    @cached_property
    def _all(self) -> dict[str, Result]:
        layers = {module: self.updates(module) for module in self.modules}
        model, by = self.rule.model, self.distiller  # make_plan asked for what the rule needs
        return model(layers, self.options, probe=self.probe, distiller=by, seed=self.seed, rank=self.rank)

    def updates(self, module: str) -> list[Update]:
        """Return what the rule is given of one layer: the inputs' updates times their weights and factors.

        That of an input that lacks the layer is zero, of rank 0.
        """
        having, shape = self.having(module), self.shapes[module]
        found = {name: self.members[name].updates[module] for name in having}
        return [
            Update(self.times(name, module) * found[name].B, found[name].A) if name in found else no_update(shape)
            for name in self.used
        ]

    @property
    def writes(self) -> bool:
        """Tell whether the inputs write: no weights that they saved whole are a task's head."""
        return any(writes(member.config) for member in self.members.values())

    @property
    def head(self) -> dict[str, Tensor]:
        """Return the head in the merged adapter: the inputs' weighted mean where `heads` is "average", else none."""
        if self.heads == "keep":
            return {}
        heads = [(self.members[name].head, self.weights[name]) for name in self.used]
        total = sum(weight for _, weight in heads)
        return {
            path: sum((weight / total * head[path].double() for head, weight in heads), torch.zeros(())).to(
                functools.reduce(torch.promote_types, (head[path].dtype for head, _ in heads))
            )
            for path in heads[0][0]
        }

    @property
    def task_heads(self) -> dict[str, dict[str, Tensor]]:
        """Return each input's own head, to be kept beside the merged adapter."""
        if self.heads == "average":
            return {}
        return {name: member.head for name, member in self.members.items() if member.head}

    @cached_property
    def _config(self) -> tuple[dict[str, Any], list[str]]:
        members = [self.members[name] for name in self.used]
        layers = [[module for module in one.shapes if not is_expert(one.forms.get(module))] for one in members]
        return merged_config(
            [member.config for member in members],
            layers,
            [module for module in self.modules if not is_expert(self.forms.get(module))],
            self.base,
            with_head=self.heads == "average",
            with_experts=any(map(is_expert, self.forms.values())),
        )

    @property
    def config(self) -> dict[str, Any]:
        """Return what the members' configs agree on, with target modules that hold for all; see `merged_config`."""
        return self._config[0]

    @property
    def copies(self) -> Mapping[str, Tensor]:
        """Return the base's weights that the inputs bring, in which they agree: an embedding beside its update."""
        members = {name: self.members[name] for name in self.used}
        dropped = {module for one in members.values() for module in one.shapes} - set(self.shapes)
        return common_copies(members, dropped)[0]

    @cached_property
    def _beside(self) -> tuple[dict[str, bytes], dict[str, str]]:
        return carry({name: member.beside for name, member in self.members.items()})

    @property
    def carried(self) -> dict[str, bytes]:
        """Return the files that all inputs agree on and that go into the result: tokenizer and processor."""
        return self._beside[0]

    @property
    def left_out(self) -> dict[str, str]:
        """Return what of the inputs is not in the result, with why: files beside the weights, fields of the configs."""
        why = "the inputs differ in it, or it is none that a merge can keep"
        return {**self._beside[1], **{f"{CONFIG}: {name}": why for name in self._config[1]}}

    @cached_property
    def warnings(self) -> list[str]:
        """What may not be meant: an adapter given twice, or alone, layers that are dropped or were not looked at."""
        found = [f"{one} and {two} hold the same updates" for one, two in equal_adapters(self.members)]
        found += self.agreement.warnings if self.agreement else []
        found += [*(self.stack.warnings if self.stack else []), *(self.screening.warnings if self.screening else [])]
        found += self.distiller.warnings if self.distiller else []
        if self.rule.distils and self.scale != 1:
            found.append(
                f"scale {self.scale:g} undoes what {self.rule.name} trains: leave it out; start_scale is another"
            )
        if len(self.used) == 1:
            found.append("one adapter takes part: there is nothing to merge")
        if self.as_it_is:
            found[-1] += f", and it stays as it is, without rule {self.rule.name!r}"
        for name in self.used:
            member = self.members[name]
            found += odd_ranks(name, member) + dropped_layers(name, member, self.shapes)
            if "moments" in self.rule.supplied and not self.as_it_is:
                found += unseen_layers(name, self.statistics[name], self.shapes)
        found += trained_whole({name: self.members[name] for name in self.used}) if self.heads == "keep" else []
        return found

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the result: the one asked for, or else the widest of the inputs."""
        if self.dtype_asked is not None:
            return self.dtype_asked
        return functools.reduce(torch.promote_types, (member.dtype for member in self.members.values()))


def _times(result: Result, factor: float) -> Result:
    if isinstance(result, Tensor):
        return result * factor
    if isinstance(result, Shared):
        return replace(result, left=factor * result.left)
    return Update(factor * result.B, result.A)
