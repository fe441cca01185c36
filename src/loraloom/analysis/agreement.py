"""Which rule and which scale, without labels: the candidate whose merged model is nearest to the single models.

How far one is from a single model is defined in single.py. The candidate of least mean distance over the tasks is
taken; what that is worth against a choice with labels is measured in docs/agreement.md. Not published elsewhere in this
form; AdaMerging (arXiv 2310.02575) looks at the merged model's entropy instead, of which a model that is sure and wrong
has little.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from datasets import Dataset

from loraloom.adapters.lowrank import Shared
from loraloom.adapters.update import Adapter, Update
from loraloom.analysis.single import SingleModels
from loraloom.merging import MergeOptions, Plan, get_rule, make_plan
from loraloom.merging.choice import AgreementFacts, CandidateFacts
from loraloom.model.generator import Generator
from loraloom.model.runner import Evaluator
from loraloom.model.written import Updates
from loraloom.progress import Reporter
from loraloom.tasks.generate import ANSWER_TOKENS


@dataclass(frozen=True)
class Candidates:
    """One rule at a few scales: it merges once, at scale 1, and the scales are applied to that.

    options: the rule's own; what is left out takes the rule's default.
    """

    rule: str
    scales: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


# what is tried where nobody says what to try; from factors alone, so for bases of any size
CANDIDATES = (
    Candidates("task_arithmetic", (0.2, 0.3, 0.4, 0.5, 0.75, 1.0)),
    Candidates("tsv", (0.2, 0.3, 0.5, 0.75, 1.0)),
)
FACTORS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # scales of any other rule, times its own


def candidates_of(
    rule: str | None = None, options: Mapping[str, Any] | None = None, scale: float | None = None
) -> tuple[Candidates, ...]:
    """Return what is tried where a rule, its scale or both are to be chosen: those are None.

    rule: alone, at its scales in CANDIDATES, or else at FACTORS times its own.
    options: of that rule.
    scale: of every rule in CANDIDATES.
    """
    if rule is None:
        return tuple(one if scale is None else replace(one, scales=(scale,)) for one in CANDIDATES)
    known = next((one.scales for one in CANDIDATES if one.rule == rule), ())
    scales = known or tuple(round(get_rule(rule).default_scale * factor, 6) for factor in FACTORS)
    return (Candidates(rule, scales if scale is None else (scale,), options or {}),)


def agreement(
    adapters: Mapping[str, Adapter],
    model: Evaluator | Generator,
    texts: Mapping[str, Dataset],
    candidates: Sequence[Candidates] = CANDIDATES,
    *,
    options: MergeOptions | None = None,
    plan: Callable[[MergeOptions], Plan] | None = None,
    answer_tokens: int = ANSWER_TOKENS,
    reporter: Reporter | None = None,
) -> AgreementFacts:
    """Return how far every candidate's merged model is from each single model; `.best` is the nearest on average.

    adapters: by name; where heads answer, each with its task's as trained.
    model: the base model: an Evaluator where heads answer, a Generator where answers are written.
    texts: by the adapters' names, a few rows with text_a, and text_b for pairs, or history for prompts; labels are not
      read.
    candidates: rules and scales to try.
    options: everything else that is asked of the merge: weights, rank, seed.
    plan: makes the plan of a merge, for rules that need statistics or texts; `make_plan` without.
    answer_tokens: the most that a single model writes.
    reporter: is told how far the work is.

    The base model runs each text once for its single model and once a candidate. Raises LoraloomError as
    `SingleModels` and `make_plan` do, before any candidate is merged.
    """
    asked, shown = options or MergeOptions(), reporter or Reporter(quiet=True)
    planned = plan or partial(make_plan, adapters)
    plans = [planned(replace(asked, rule=one.rule, options=one.options, scale=1.0)) for one in candidates]
    single = SingleModels(model, adapters, texts, answer_tokens=answer_tokens, reporter=shown)
    shown.begin("candidates", sum(len(one.scales) for one in candidates))
    found = []
    for one, made in zip(candidates, plans, strict=True):
        merged = merged_updates(made, list(adapters))
        for scale in one.scales:
            shown.detail("candidates", f"{one.rule} at {scale:g}")
            found.append(CandidateFacts(one.rule, dict(one.options), scale, single.distances(_scaled(merged, scale))))
            shown.advance("candidates")
    return AgreementFacts(single.texts, found)


def chosen(options: MergeOptions, found: AgreementFacts) -> MergeOptions:
    """Return `options` with the best candidate's rule and scale, and with the whole curve for the record."""
    best = found.best
    return replace(options, rule=best.rule, options=best.options, scale=best.scale, agreement=found)


def merged_updates(plan: Plan, names: Sequence[str]) -> dict[str, Updates]:
    """Return what the task of each adapter reads of a merge: one adapter for all, or its own of a rule that tells."""
    whole: dict[str, Update] = {}
    own: dict[str, dict[str, Update]] = {name: {} for name in plan.used}
    for layer in plan.layers():
        whole[layer.module] = layer.update
        if isinstance(layer.shared, Shared):
            for name, update in zip(plan.used, layer.shared.readouts(), strict=True):
                own[name][layer.module] = update
    return {name: own.get(name) or whole for name in names}


def _scaled(merged: Mapping[str, Updates], scale: float) -> dict[str, Updates]:
    return {
        name: {module: Update(scale * update.B, update.A) for module, update in updates.items()}
        for name, updates in merged.items()
    }
