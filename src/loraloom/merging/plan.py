"""A merge that was checked and may begin: what each layer is merged from, by which rule, how."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from loraloom.adapters.beside import carry
from loraloom.adapters.config import CONFIG, merged_config
from loraloom.adapters.lowrank import Shared, truncate, truncate_dense
from loraloom.adapters.together import common_copies, compatibility_problems, equal_adapters
from loraloom.adapters.update import Adapter, Form, Shape, Update
from loraloom.errors import LoraloomError, did_you_mean, raise_problems
from loraloom.files.hashing import layer_seed
from loraloom.merging.choice import AgreementFacts
from loraloom.merging.names import input_names
from loraloom.merging.options import Heads, MergeOptions
from loraloom.merging.registry import Probe, Result, Rule, get_rule
from loraloom.statistics.file import Statistics
from loraloom.statistics.fit import cover_problems

ScaleFrom = Literal["asked", "agreement", "rule", "single adapter"]


class Layer(NamedTuple):
    """One merged layer.

    energy_lost: the share of |dW|_F^2 that truncation took.
    shared: what each task reads of it, where the rule tells tasks apart.
    energies: |w_i dW_i|_F^2 of each input that took part, in their order.
    """

    module: str
    update: Update
    energy_lost: float
    shared: Shared | None
    energies: tuple[float, ...]


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

    @property
    def space(self) -> str:
        """Return the space in which the rule works."""
        return str(self.options.get("space", self.rule.spaces[0]))

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Return every layer's m and n, in which the inputs agree, with the first one's rank."""
        return next(iter(self.members.values())).shapes

    @property
    def forms(self) -> Mapping[str, Form]:
        """Return the forms of the layers that are not linear, in which the inputs agree."""
        return next(iter(self.members.values())).forms

    @cached_property
    def modules(self) -> list[str]:
        """The module paths of all layers, in order."""
        return sorted(self.shapes)

    @cached_property
    def used(self) -> list[str]:
        """The inputs that take part: those of weight 0 do not, as if they had not been given."""
        return [name for name, weight in self.weights.items() if weight != 0] or list(self.members)

    @property
    def folders(self) -> list[Path]:
        """Return the folders that inputs were read from, which the result must not touch."""
        return [member.path for member in self.members.values() if member.path]

    def layers(self) -> Iterator[Layer]:
        """Yield every merged layer, one at a time."""
        return (self.layer(module) for module in self.modules)

    def bound(self, module: str) -> int:
        """Return the rank that a layer's result does not exceed where the caller asks for none."""
        ranks = [self.members[name].shapes[module].r for name in self.used]
        return max(ranks) if self.rule.output_rank == "max" else sum(ranks)

    def layer(self, module: str) -> Layer:
        """Return one merged layer as a low-rank update, truncated where it must be or was asked to be."""
        updates = self.updates(module)
        result = self._merged(module, updates)
        limit = self.rank or self.bound(module)
        if isinstance(result, Tensor):
            update, lost = truncate_dense(result, limit)
        else:
            update, lost = truncate(result.update() if isinstance(result, Shared) else result, limit)
        return Layer(module, update, lost, result if isinstance(result, Shared) else None, _energies(updates))

    def result(self, module: str) -> Result:
        """Return what the rule makes of one layer, times the scale: low-rank or dense, nothing truncated."""
        return self._merged(module, self.updates(module))

    def energies(self, module: str) -> tuple[float, ...]:
        """Return |w_i dW_i|_F^2 of one layer, of each input that takes part."""
        return _energies(self.updates(module))

    def _merged(self, module: str, updates: Sequence[Update]) -> Result:
        if self.rule.whole:
            result = self._all[module]
        else:
            moments = [self.statistics[name].moment(module) for name in self.used] if self.statistics else []
            seed = layer_seed(self.seed, module)
            result = self.rule.layer(updates, self.options, seed=seed, rank=self.rank, moments=moments)
        return _times(result, self.scale)

    @cached_property
    def _all(self) -> dict[str, Result]:
        assert self.probe is not None  # make_plan asked for it
        layers = {module: self.updates(module) for module in self.modules}
        return self.rule.model(layers, self.options, probe=self.probe, seed=self.seed, rank=self.rank)

    def updates(self, module: str) -> list[Update]:
        """Return what the rule is given of one layer: the inputs' updates times their weights."""
        updates = [(self.members[name].updates[module], self.weights[name]) for name in self.used]
        return [Update(weight * update.B, update.A) for update, weight in updates]

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
        configs = [member.config for member in self.members.values()]
        plain = [module for module in self.modules if module not in self.forms or not self.forms[module].count]
        return merged_config(configs, plain, self.base, with_head=self.heads == "average")

    @property
    def config(self) -> dict[str, Any]:
        """Return what the members' configs agree on, with target modules that hold for all; see `merged_config`."""
        return self._config[0]

    @property
    def copies(self) -> Mapping[str, Tensor]:
        """Return the base's weights that the inputs bring, in which they agree: an embedding beside its update."""
        return common_copies(self.members)[0]

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
        """What may not be meant: an adapter given twice, under two names; one adapter alone."""
        equal = [f"{one} and {two} hold the same updates" for one, two in equal_adapters(self.members)]
        equal += self.agreement.warnings if self.agreement else []
        return equal + (["one adapter takes part: there is nothing to merge"] if len(self.used) == 1 else [])

    @property
    def dtype(self) -> torch.dtype:
        """Return the widest dtype of the inputs."""
        return functools.reduce(torch.promote_types, (member.dtype for member in self.members.values()))


def make_plan(
    adapters: Mapping[str, Adapter] | Sequence[Adapter],
    options: MergeOptions,
    *,
    statistics: Mapping[str, Statistics] | Sequence[Statistics] = (),
    probe: Probe | None = None,
) -> Plan:
    """Check a merge and return its plan; nothing is computed yet.

    adapters: by name; those of a sequence are named by their folders.
    options: how they are merged; see `MergeOptions`.
    statistics: of each adapter's inputs, by name or in the adapters' order, for rules that need them.
    probe: base model and texts of each task, for rules that need them.

    Raises LoraloomError that tells all problems at once: adapters that do not fit together, unknown or out-of-range
    options, weights that do not match, what the rule needs and was not given.
    """
    names, members = _named(adapters)
    problems = _name_problems(names) + _twice_problems(members) + compatibility_problems(members, options.base)
    if not problems:
        problems += common_copies(dict(zip(names, members, strict=True)))[1]
    problems += _number_problems(len(members), options)
    seen, wrong = _by_name(names, statistics)
    problems += wrong
    for name, member in zip(names, members, strict=True):
        problems += cover_problems(name, member, seen[name]) if name in seen else []
    problems += _head_problems(names, members, options)
    found: Rule | None = None
    chosen: dict[str, Any] = {}
    try:
        found = get_rule(options.rule)
        chosen, wrong = found.check(options.options)
        problems += wrong + _need_problems(found, options.weights, seen, probe)
    except LoraloomError as error:
        problems.append(f"{error.message}: {error.hint}")
    raise_problems(f"cannot merge {', '.join(names) or 'nothing'}", problems, "nothing was merged or written")
    assert found is not None  # get_rule raised otherwise
    weights = options.weights
    if weights is None:
        weights = [1.0 if found.default_weights == "one" else 1.0 / len(members)] * len(members)
    scale, scale_from = _scale(found, options, weights)
    return Plan(
        members=dict(zip(names, members, strict=True)),
        rule=found,
        options=chosen,
        weights=dict(zip(names, weights, strict=True)),
        scale=scale,
        scale_from=scale_from,
        rank=options.rank,
        seed=options.seed,
        statistics=seen,
        probe=probe,
        heads=options.heads,
        base=options.base,
        agreement=options.agreement,
    )


def _scale(rule: Rule, options: MergeOptions, weights: Sequence[float]) -> tuple[float, ScaleFrom]:
    """Return the scale in force and whose it is; the rules' own make room for several adapters, one stays as it is."""
    if options.scale is not None:
        chosen = options.agreement is not None and options.agreement.chose_scale
        return options.scale, "agreement" if chosen else "asked"
    if sum(weight != 0 for weight in weights) == 1:
        return 1.0, "single adapter"
    return rule.default_scale, "rule"


def _energies(updates: Sequence[Update]) -> tuple[float, ...]:
    return tuple(update.energy() for update in updates)


def _times(result: Result, factor: float) -> Result:
    if isinstance(result, Tensor):
        return result * factor
    if isinstance(result, Shared):
        return replace(result, left=factor * result.left)
    return Update(factor * result.B, result.A)


def _named(adapters: Mapping[str, Adapter] | Sequence[Adapter]) -> tuple[list[str], list[Adapter]]:
    if isinstance(adapters, Mapping):
        return list(adapters), list(adapters.values())
    paths = [adapter.path for adapter in adapters if adapter.path]
    if len(paths) == len(adapters):
        return input_names(paths), list(adapters)
    names = [a.path.resolve().name if a.path else f"adapter{i}" for i, a in enumerate(adapters, start=1)]
    return names, list(adapters)


def _twice_problems(members: Sequence[Adapter]) -> list[str]:
    paths = [str(member.path.resolve()) for member in members if member.path]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    return [f"{path} is given several times: give it once, with a larger weight" for path in twice]


def _name_problems(names: Sequence[str]) -> list[str]:
    if not names:
        return ["no adapters: give at least one"]
    problems = [f"input name {name!r} cannot name a file" for name in names if not re.fullmatch(r"\w[\w.+ -]*", name)]
    folded = [name.casefold() for name in names]
    twice = sorted({name for name in folded if folded.count(name) > 1})
    return problems + [f"several inputs are called {name!r}: give each a name of its own" for name in twice]


def _number_problems(count: int, options: MergeOptions) -> list[str]:
    problems, weights = [], options.weights
    if weights is not None and len(weights) != count:
        problems.append(f"{len(weights)} weights for {count} adapters: give one for each")
    for weight in weights or ():
        if not math.isfinite(weight):
            problems.append(f"weight {weight} is not finite")
    if weights and not any(weights):
        problems.append("every weight is 0")
    if options.scale is not None and not math.isfinite(options.scale):
        problems.append(f"scale {options.scale} is not finite")
    if options.rank is not None and options.rank < 1:
        problems.append(f"rank {options.rank} is below 1")
    return problems


def _by_name(
    names: Sequence[str], statistics: Mapping[str, Statistics] | Sequence[Statistics]
) -> tuple[dict[str, Statistics], list[str]]:
    if not statistics:
        return {}, []
    if not isinstance(statistics, Mapping):
        if len(statistics) != len(names):
            return {}, [f"{len(statistics)} statistics for {len(names)} adapters: give one for each, in their order"]
        statistics = dict(zip(names, statistics, strict=True))
    return dict(statistics), [f"no statistics for {name!r}" for name in names if name not in statistics]


def _head_problems(names: Sequence[str], members: Sequence[Adapter], options: MergeOptions) -> list[str]:
    if options.heads not in get_args(Heads):
        return [f"heads {options.heads!r} is unknown: {did_you_mean(options.heads, get_args(Heads))}"]
    if options.heads == "keep":
        return []
    shapes = [{path: tuple(tensor.shape) for path, tensor in member.head.items()} for member in members]
    problems = [
        f"heads cannot be averaged: {name} has {shape or 'none'}, {names[0]} has {shapes[0] or 'none'}"
        for name, shape in zip(names[1:], shapes[1:], strict=True)
        if shape != shapes[0]
    ]
    if options.weights is not None and sum(options.weights) == 0:
        problems.append("heads cannot be averaged: the weights add up to 0")
    return problems


def _need_problems(
    rule: Rule, weights: Sequence[float] | None, statistics: Mapping[str, Statistics], probe: Probe | None
) -> list[str]:
    problems = []
    if rule.whole and weights and 0 in weights:
        problems.append(f"rule {rule.name!r} looks at the texts of every input: leave an adapter of weight 0 out")
    if "moments" in rule.supplied and not statistics:
        problems.append(f"rule {rule.name!r} needs statistics of each task's inputs: see `loraloom statistics`")
    if rule.whole and probe is None:
        problems.append(f"rule {rule.name!r} needs the base model and texts of each task: name a recipe by --recipe")
    if rule.labelled and probe is not None and not probe.labels:
        problems.append(f"rule {rule.name!r} needs labelled texts")
    return problems
