"""From adapters and what is asked of a merge to a plan: everything that can be wrong is told here, all at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from loraloom.adapters.config import writes
from loraloom.adapters.dialects import common_dialect
from loraloom.adapters.together import common_copies
from loraloom.adapters.update import Adapter
from loraloom.errors import LoraloomError, raise_problems
from loraloom.merging.distillation import Distiller
from loraloom.merging.mends import clip_problems
from loraloom.merging.names import named_adapters
from loraloom.merging.normalise import AS_THEY_ARE, decided, factors_of, normalise_problems
from loraloom.merging.options import MergeOptions
from loraloom.merging.plan import Plan, ScaleFrom
from loraloom.merging.problems import (
    for_server,
    head_problems,
    is_alone,
    leaves_as_it_is,
    name_problems,
    need_problems,
    number_problems,
    statistics_by_name,
    together_problems,
    twice_problems,
)
from loraloom.merging.registry import Probe, Rule, get_rule
from loraloom.merging.stack import RULE as SUM, asked_problems, look_at
from loraloom.statistics.file import Statistics
from loraloom.statistics.fit import cover_problems


def make_plan(
    adapters: Mapping[str, Adapter] | Sequence[Adapter],
    options: MergeOptions,
    *,
    statistics: Mapping[str, Statistics] | Sequence[Statistics] = (),
    probe: Probe | None = None,
    distiller: Distiller | None = None,
) -> Plan:
    """Check a merge and return its plan; nothing is computed yet.

    adapters: by name; those of a sequence are named by their folders.
    options: how they are merged; see `MergeOptions`.
    statistics: of each adapter's inputs, by name or in the adapters' order, for rules that need them.
    probe: base model and texts of each task, for rules that need them.
    distiller: what trains a merge by the single adapters, for the rule that does.

    Raises LoraloomError that tells all problems at once: adapters that do not fit together, unknown or out-of-range
    options, weights that do not match, what the rule needs and was not given.
    """
    names, members = named_adapters(adapters)
    dialect, members, strange = common_dialect(members, options.to)
    stack = look_at(dict(zip(names, members, strict=True))) if options.stack else None
    problems = strange + name_problems(names) + twice_problems(members)
    problems += [] if strange else together_problems(members, options)
    if stack:
        problems += asked_problems(options) + stack.problems
        options = replace(options, rule=SUM, options={}, weights=None, scale=None, base=options.base or members[0].base)
    if not problems:
        problems += common_copies(dict(zip(names, members, strict=True)))[1]
    problems += number_problems(len(members), options)
    seen, wrong = statistics_by_name(names, statistics)
    problems += wrong
    for name, member in zip(names, members, strict=True):
        problems += cover_problems(name, member, seen[name]) if name in seen else []
    if _alone_and_whole(members, options):
        options = replace(options, heads="average")  # of itself
    problems += head_problems(names, members, options)
    found: Rule | None = None
    chosen: dict[str, Any] = {}
    try:
        found = get_rule(options.rule)
        chosen, wrong = found.check(options.options)
        as_it_is = leaves_as_it_is(found, options, len(members))
        problems += wrong + ([] if as_it_is else need_problems(found, options, seen, probe, distiller))
    except LoraloomError as error:
        problems.append(f"{error.message}: {error.hint}")
    problems += normalise_problems(options.normalise) + clip_problems(options.clip, options.normalise)
    factors: dict[str, dict[str, float]] = {}
    normalised = AS_THEY_ARE
    if not problems and found:  # this reads every weight
        normalised = decided(options, found, members, alone=is_alone(options, len(members)))
        if not is_alone(options, len(members)):
            heard = zip(names, members, options.weights or [1.0] * len(names), strict=True)
            factors, wrong = factors_of(normalised.way, {name: one for name, one, w in heard if w}, seen, options.clip)
            problems += wrong if normalised.who in ("asked", "clip") else []
    raise_problems(f"cannot merge {', '.join(names) or 'nothing'}", problems, "nothing was merged or written")
    assert found is not None  # get_rule raised otherwise
    weights = options.weights
    if weights is None:
        weights = [1.0 if found.default_weights == "one" else 1.0 / len(members)] * len(members)
    scale, scale_from = _scale(found, options, is_alone(options, len(members)))
    plan = Plan(
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
        targets=options.targets,
        as_it_is=as_it_is,
        stack=stack,
        normalised=normalised,
        factors=factors,
        dialect=dialect,
        clip=options.clip,
        screening=options.screening,
        distiller=distiller,
        dtype_asked=getattr(torch, options.dtype) if options.dtype else None,
    )
    if options.server is None:
        return plan
    return replace(plan, served=for_server(options.server, [plan.members[name] for name in plan.used], found, options))


def _alone_and_whole(members: Sequence[Adapter], options: MergeOptions) -> bool:
    """Tell whether one input takes part that writes and trained weights whole: without them it would not be itself."""
    used = [one for one, weight in zip(members, options.weights or [1.0] * len(members), strict=False) if weight]
    return options.heads == "keep" and len(members) == len(used) == 1 and bool(used[0].head) and writes(used[0].config)


def _scale(rule: Rule, options: MergeOptions, alone: bool) -> tuple[float, ScaleFrom]:
    """Return the scale in force and whose it is; the rules' own make room for several adapters, one stays as it is."""
    if options.scale is not None:
        chosen = options.agreement is not None and options.agreement.chose_scale
        return options.scale, "agreement" if chosen else "asked"
    if options.stack:
        return 1.0, "stack"
    if alone:
        return 1.0, "single adapter"
    return rule.default_scale, "rule"
