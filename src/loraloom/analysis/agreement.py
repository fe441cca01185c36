"""Which rule and which scale: how far merged models are from the single models on a few texts, without labels.

A task's own adapter is the teacher. For every text, `merged` are the outputs of the merged model and `own` those of the
task's own; how far they are apart is told in the task's own unit, so that tasks can be averaged:

    classes:  mean KL(p_own || p_merged) / mean KL(p_own || mean p_own)
    numbers:  mean (own - merged)^2 / variance of own

0 is the single model itself, 1 a model that gives every text the mean of the own outputs: it knows the task's answers,
and nothing of the texts. The candidate of least mean distance over the tasks is taken; what it was worth against a
choice with labels is measured in docs/agreement.md. Not published elsewhere in this form; AdaMerging (arXiv
2310.02575) looks at the merged model's entropy instead, which a model that is sure and wrong has least of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from datasets import Dataset
from torch import Tensor

from loraloom.adapters.heads import Head
from loraloom.adapters.lowrank import Shared
from loraloom.adapters.update import Adapter, Update
from loraloom.errors import LoraloomError, collecting, raise_problems, raise_together
from loraloom.files.hashing import json_sha256
from loraloom.merging import MergeOptions, Plan, get_rule, make_plan
from loraloom.merging.choice import AgreementFacts, CandidateFacts, TextsFacts
from loraloom.model.runner import Evaluator
from loraloom.progress import Reporter

FARTHEST = 1e12  # what a distance is told as where it is larger, or where outputs are not finite
_FEWEST = 2  # texts: a single one has nothing to differ from
_ROUNDING = 1e-12  # outputs that vary by less, squared and relative, are alike

Updates = Mapping[str, Update]  # by module path


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


class SingleModels:
    """What the single models answer to a few unlabelled texts, run once, to measure any number of merged models by.

    evaluator: the base model.
    adapters: by name, each with its task's head as trained.
    texts: by the adapters' names, rows with text_a, and text_b for pairs; labels are not read.

    Raises LoraloomError that tells all that is wrong: an adapter without texts or without a head, too few texts.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        adapters: Mapping[str, Adapter],
        texts: Mapping[str, Dataset],
        reporter: Reporter | None = None,
    ) -> None:
        self.texts = {name: _facts(rows) for name, rows in texts.items()}
        self._evaluator = evaluator
        self._heads = _heads(adapters, texts)
        self._encoded = {name: evaluator.encode(texts[name]) for name in adapters}
        shown = (reporter or Reporter(quiet=True)).each("single models", adapters.items())
        self._own = {name: self._outputs(name, adapter.updates) for name, adapter in shown}
        if all(distance(own, own) is None for own in self._own.values()):
            raise LoraloomError("every adapter answers all its texts alike", "give more texts, and others")

    def distances(self, updates: Mapping[str, Updates]) -> dict[str, float | None]:
        """Return how far the model with `updates` is from each single model, by adapter; see `distance`.

        updates: what each adapter's task reads of a merged adapter; mostly the same for all.
        """
        return {name: distance(own, self._outputs(name, updates[name])) for name, own in self._own.items()}

    def _outputs(self, name: str, updates: Updates) -> Tensor:
        head = self._heads[name]
        return head.logits(self._evaluator.features(updates, head, self._encoded[name]))


def distance(own: Tensor, merged: Tensor) -> float | None:
    """Return how far outputs `merged` are from `own` of the same texts, in the unit of `own`: see the module.

    own, merged: (k, classes) logits, or (k, 1) numbers.

    None where `own` are alike for all texts: such a model has nothing to lose. At most FARTHEST.
    """
    own, merged = own.double(), merged.double()
    if own.shape[1] == 1:
        far, unit = (own - merged).square().mean(), (own - own.mean()).square().mean()
        alike = _ROUNDING * float(own.square().mean())
    else:
        log_own = own.log_softmax(dim=1)
        p_own = log_own.exp()
        mean = p_own.mean(dim=0).clamp_min(1e-300).log()
        far = (p_own * (log_own - merged.log_softmax(dim=1))).sum(dim=1).mean()
        unit, alike = (p_own * (log_own - mean)).sum(dim=1).mean(), _ROUNDING
    if float(unit) <= alike:
        return None
    found = max(float(far / unit), 0.0)  # where the two are one, rounding may leave it below
    return min(found, FARTHEST) if math.isfinite(found) else FARTHEST


def agreement(
    adapters: Mapping[str, Adapter],
    evaluator: Evaluator,
    texts: Mapping[str, Dataset],
    candidates: Sequence[Candidates] = CANDIDATES,
    *,
    options: MergeOptions | None = None,
    plan: Callable[[MergeOptions], Plan] | None = None,
    reporter: Reporter | None = None,
) -> AgreementFacts:
    """Return how far every candidate's merged model is from each single model; `.best` is the nearest on average.

    adapters: by name, each with its task's head as trained.
    evaluator: the base model.
    texts: by the adapters' names, a few rows with text_a, and text_b for pairs; labels are not read.
    candidates: rules and scales to try.
    options: everything else that is asked of the merge: weights, rank, seed.
    plan: makes the plan of a merge, for rules that need statistics or texts; `make_plan` without.
    reporter: is told how far the work is.

    The base model runs each text once for its single model and once a candidate. Raises LoraloomError as
    `SingleModels` and `make_plan` do, before any candidate is merged.
    """
    asked, shown = options or MergeOptions(), reporter or Reporter(quiet=True)
    planned = plan or partial(make_plan, adapters)
    plans = [planned(replace(asked, rule=one.rule, options=one.options, scale=1.0)) for one in candidates]
    single = SingleModels(evaluator, adapters, texts, shown)
    shown.begin("candidates", sum(len(one.scales) for one in candidates))
    found = []
    for one, made in zip(candidates, plans, strict=True):
        merged = merged_updates(made, list(adapters))
        for scale in one.scales:
            shown.detail("candidates", f"{one.rule} at {scale:g}")
            found.append(CandidateFacts(one.rule, dict(one.options), scale, single.distances(_scaled(merged, scale))))
            shown.advance("candidates")
    return AgreementFacts(single.texts, found)


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


def _heads(adapters: Mapping[str, Adapter], texts: Mapping[str, Dataset]) -> dict[str, Head]:
    """Return every adapter's head. Raises LoraloomError that tells all that lack one, and all that lack texts."""
    heads: dict[str, Head] = {}
    errors: list[LoraloomError] = []
    for name, adapter in adapters.items():
        with collecting(errors):
            heads[name] = Head.of(adapter.head, adapter.name)
    problems = [f"no texts for {name!r}" for name in adapters if name not in texts]
    problems += [
        f"{name}: {len(texts[name])} texts, {_FEWEST} are the fewest that can differ"
        for name in adapters
        if name in texts and len(texts[name]) < _FEWEST
    ]
    with collecting(errors):
        raise_problems("agreement cannot be measured", problems, "give each adapter texts of its task")
    raise_together(errors)
    return heads


def _facts(rows: Dataset) -> TextsFacts:
    columns = [name for name in ("text_a", "text_b") if name in rows.column_names]
    return TextsFacts(len(rows), json_sha256(rows.select_columns(columns).to_list()))
