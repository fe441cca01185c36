"""What is wrong with what is asked of a merge, or may not be meant, in words; found before anything is computed."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import get_args

from loraloom.adapters.config import writes
from loraloom.adapters.dialects import DIALECTS, PEFT
from loraloom.adapters.patterns import pattern_values
from loraloom.adapters.servers import ServedFacts, fit_server, get_server
from loraloom.adapters.together import Targets, compatibility_problems, layer_problems, layers_of_all
from loraloom.adapters.update import Adapter, is_expert
from loraloom.errors import LoraloomError, did_you_mean, first_few
from loraloom.merging.distillation import Distiller
from loraloom.merging.options import Dtype, Heads, MergeOptions
from loraloom.merging.registry import Probe, Rule
from loraloom.statistics.file import Statistics


def together_problems(members: Sequence[Adapter], options: MergeOptions) -> list[str]:
    """Tell what keeps adapters from one merge. Those of a stack may name other bases: see `stack.look_at`."""
    if options.stack:
        return layer_problems(members, options.targets)
    return compatibility_problems(members, options.base, options.targets)


def twice_problems(members: Sequence[Adapter]) -> list[str]:
    """Tell the folders that are given twice."""
    paths = [str(member.path.resolve()) for member in members if member.path]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    return [f"{path} is given several times: give it once, with a larger weight" for path in twice]


def name_problems(names: Sequence[str]) -> list[str]:
    """Tell what is wrong with the names of the inputs."""
    if not names:
        return ["no adapters: give at least one"]
    problems = [f"input name {name!r} cannot name a file" for name in names if not re.fullmatch(r"\w[\w.+ -]*", name)]
    folded = [name.casefold() for name in names]
    twice = sorted({name for name in folded if folded.count(name) > 1})
    return problems + [f"several inputs are called {name!r}: give each a name of its own" for name in twice]


def number_problems(count: int, options: MergeOptions) -> list[str]:
    """Tell what is wrong with the numbers, and the words, of `options` for so many inputs."""
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
    if options.targets not in get_args(Targets):
        problems.append(f"targets {options.targets!r} is unknown: {did_you_mean(options.targets, get_args(Targets))}")
    if options.dtype is not None and options.dtype not in get_args(Dtype):
        problems.append(f"dtype {options.dtype!r} is unknown: {did_you_mean(options.dtype, get_args(Dtype))}")
    return problems


def statistics_by_name(
    names: Sequence[str], statistics: Mapping[str, Statistics] | Sequence[Statistics]
) -> tuple[dict[str, Statistics], list[str]]:
    """Return statistics by the names of the inputs that they are of, and what is wrong with their number or names."""
    if not statistics:
        return {}, []
    if not isinstance(statistics, Mapping):
        if len(statistics) != len(names):
            return {}, [f"{len(statistics)} statistics for {len(names)} adapters: give one for each, in their order"]
        statistics = dict(zip(names, statistics, strict=True))
    return dict(statistics), [f"no statistics for {name!r}" for name in names if name not in statistics]


def head_problems(names: Sequence[str], members: Sequence[Adapter], options: MergeOptions) -> list[str]:
    """Tell what is wrong with how the heads are asked for."""
    if options.heads not in get_args(Heads):
        return [f"heads {options.heads!r} is unknown: {did_you_mean(options.heads, get_args(Heads))}"]
    if options.heads == "keep":
        return []
    if any(member.dialect != PEFT.name for member in members):
        return ["heads cannot be averaged: PEFT's adapters alone have any in them"]
    shapes = [{path: tuple(tensor.shape) for path, tensor in member.head.items()} for member in members]
    problems = [
        f"heads cannot be averaged: {name} has {shape or 'none'}, {names[0]} has {shapes[0] or 'none'}"
        for name, shape in zip(names[1:], shapes[1:], strict=True)
        if shape != shapes[0]
    ]
    if options.weights is not None and sum(options.weights) == 0:
        problems.append("heads cannot be averaged: the weights add up to 0")
    return problems


def is_alone(options: MergeOptions, count: int) -> bool:
    """Tell whether one input takes part, of `count`."""
    return sum(weight != 0 for weight in options.weights or [1.0] * count) == 1


def leaves_as_it_is(rule: Rule, options: MergeOptions, count: int) -> bool:
    """Tell whether one input takes part, of `count`, and no option of the rule is asked for: it is left out."""
    return is_alone(options, count) and rule.check(options.options)[0] == rule.check({})[0]


def need_problems(
    rule: Rule,
    options: MergeOptions,
    statistics: Mapping[str, Statistics],
    probe: Probe | None,
    distiller: Distiller | None = None,
) -> list[str]:
    """Tell what the rule and the way to normalise need and were not given."""
    problems = []
    if rule.whole and options.weights and 0 in options.weights:
        problems.append(f"rule {rule.name!r} looks at the texts of every input: leave an adapter of weight 0 out")
    if "moments" in rule.supplied and not statistics:
        problems.append(f"rule {rule.name!r} needs statistics of each task's inputs: see `loraloom statistics`")
    if options.normalise == "response" and not statistics:
        problems.append("normalising by response needs statistics of each task's inputs: see `loraloom statistics`")
    if rule.distils and distiller is None:
        problems.append(
            f"rule {rule.name!r} needs the base model and unlabelled texts of each task: name a recipe by --recipe, or "
            "files by --unlabelled"
        )
    if "probe" in rule.supplied and probe is None:
        problems.append(f"rule {rule.name!r} needs the base model and texts of each task: name a recipe by --recipe")
    if rule.labelled and probe is not None and not probe.labels:
        problems.append(f"rule {rule.name!r} needs labelled texts")
    return problems


def dropped_layers(name: str, member: Adapter, layers: Collection[str]) -> list[str]:
    """Tell how much of an input is lost where it has more than the `layers` of the merge."""
    lost = [module for module in sorted(member.shapes) if module not in layers]
    if not lost:
        return []
    energies = {module: member.updates[module].energy() for module in member.shapes}
    share = 100 * sum(energies[module] for module in lost) / (sum(energies.values()) or 1.0)
    return [f"{name}: {len(lost)} of its {len(energies)} layers are dropped, with {share:.3g} % of its energy"]


def odd_ranks(name: str, member: Adapter) -> list[str]:
    """Tell of an input whose factors have other ranks than its config says: PEFT would not load it."""
    layers = [module for module in member.shapes if not is_expert(member.forms.get(module))]
    if not member.config.get("r") or member.path is None or member.dialect != PEFT.name:
        return []
    said = pattern_values(member.config.get("rank_pattern") or {}, layers, member.config["r"])
    odd = [module for module in layers if member.shapes[module].r != said[module]]
    if not odd:
        return []
    own, told = member.shapes[odd[0]].r, said[odd[0]]
    what = f"rank {own} where its config says {told}, in {len(odd)} of its {len(layers)} layers"
    return [f"{name}: factors of {what}: PEFT would refuse them; the factors' own is taken, also to divide alpha"]


def trained_whole(members: Mapping[str, Adapter]) -> list[str]:
    """Tell of weights that inputs which write trained whole: kept where a task's head is, they are in no model."""
    found = {name: one for name, one in members.items() if one.head and writes(one.config)}
    alike = len({frozenset(one.head) for one in members.values()}) == 1
    mend = "--heads average puts their mean there" if alike else "those of others have nothing to be averaged with"
    return [
        f"{name} trained {first_few(sorted(one.head))} whole, beside its LoRA: the result has the base's; {mend}"
        for name, one in found.items()
    ]


def unseen_layers(name: str, statistics: Statistics, layers: Collection[str]) -> list[str]:
    """Tell in how many `layers` of the merge a rule cannot know what an input's task reads: none that it has itself."""
    count = sum(module not in statistics.layers for module in layers)
    told = f"its statistics lack {count} of the layers, which it does not adapt: there it has no say"
    return [f"{name}: {told}"] if count else []


def for_server(name: str, members: Sequence[Adapter], rule: Rule, options: MergeOptions) -> ServedFacts:
    """Return how a merge of `members` by `rule` is written for the server of this name.

    It is so for whatever ranks its layers come out with, and known before anything is looked at. Raises LoraloomError
    with every reason why the server would not take it as it is meant.
    """
    server = get_server(name)
    other = next((DIALECTS[one.dialect] for one in members if one.dialect != PEFT.name), None)
    if other:
        raise LoraloomError(f"{server.title} reads no adapters of {other.title}", "say --to peft as well")
    layers = layers_of_all(members, options.targets)
    ranks = {
        module: options.rank or rule.bound([one.shapes[module].r for one in members if module in one.shapes])
        for module in layers
    }
    forms = {module: one.forms[module] for module, one in layers.items() if module in one.forms}
    turned = any(one.config.get("fan_in_fan_out") for one in members)
    head = members[0].head if options.heads == "average" else ()
    return fit_server(server, "the merge", ranks, forms, turned=turned, head=head)
