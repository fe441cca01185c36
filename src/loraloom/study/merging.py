"""Which stages merge the adapters of a study and measure the merges, and what each of them depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loraloom.merging import get_rule
from loraloom.merging.needs import reads_inputs
from loraloom.study import agreement, answers, stages
from loraloom.study.engine import Engine, Reading, StageFunction
from loraloom.study.entries import MergeSettings
from loraloom.study.inputs import Base, Output, Rows, Texts
from loraloom.study.parts import Merges, Trained
from loraloom.study.recipe import Recipe
from loraloom.tasks.task import answer_tokens_of


@dataclass(frozen=True)
class MergeStages:
    """The stages of a recipe's merges, of what the study has before them.

    bases: the base model alone on every task of answers. statistics: of training texts, by task.
    base, measured: the base model as it trains, and as it is measured.
    """

    recipe: Recipe
    engine: Engine
    rows: Mapping[str, Rows]
    bases: Mapping[str, Output]
    statistics: Mapping[str, Output]
    base: Base
    measured: Base
    reading: Reading

    def merge(self, one: Trained, settings: MergeSettings) -> Output:
        """Return the adapters of one init and seed merged by one rule, at scale 1."""
        rule, label = get_rule(settings.rule), one.merged_by(settings.rule)
        adapters, options = one.adapters, settings.filled()
        statistics = self.statistics if reads_inputs(rule, settings.normalise) else {}
        if rule.distils:
            return self.engine.do(
                stages.merge_by_teachers,
                label,
                adapters=adapters,
                statistics=statistics,
                rows=self.rows,
                base=self.base,
                reading=self.reading,
                texts=settings.texts,
                rule=rule.name,
                options=options,
                normalise=settings.normalise,
                training=self.recipe.training,
                seed=one.seed,
            )
        if not rule.whole:
            return self.engine.do(
                stages.merge,
                label,
                adapters=adapters,
                statistics=statistics,
                rule=rule.name,
                options=options,
                normalise=settings.normalise,
                seed=one.seed,
            )
        return self.engine.do(
            stages.merge_by_texts,
            label,
            adapters=adapters,
            statistics=statistics,
            rows=self.rows,
            base=self.base,
            reading=self.reading,
            texts=settings.texts,
            rule=rule.name,
            options=options,
            normalise=settings.normalise,
            seed=one.seed,
        )

    def heldout(self, one: Merges, scale: float) -> Output:
        """Return a merge at a scale evaluated on held-out rows."""
        if self.recipe.generates:
            return self._answered(answers.evaluate_heldout, one, scale)
        return self.engine.do(
            stages.evaluate_heldout,
            f"{one.label}.x{scale:g}",
            merged=one.merged,
            adapters=one.trained.adapters,
            singles=one.trained.singles,
            rows=self.rows,
            base=self.measured,
            reading=self.reading,
            scale=scale,
            texts=self.recipe.alignment.texts,
            ridge=self.recipe.alignment.ridge,
        )

    def test(self, one: Merges, scale: float) -> Output:
        """Return a merge at a scale evaluated on test rows."""
        if self.recipe.generates:
            return self._answered(answers.evaluate_test, one, scale)
        return self.engine.do(
            stages.evaluate_test,
            f"{one.label}.x{scale:g}",
            merged=one.merged,
            adapters=one.trained.adapters,
            heldout=one.heldout[scale],
            rows=self.rows,
            base=self.measured,
            reading=self.reading,
            scale=scale,
        )

    def _answered(self, function: StageFunction[Any], one: Merges, scale: float) -> Output:
        return self.engine.do(
            function,
            f"{one.label}.x{scale:g}",
            merged=one.merged,
            bases=self.bases,
            singles=one.trained.singles,
            rows=self.rows,
            base=self.measured,
            reading=self.reading,
            scale=scale,
        )

    def own(self, one: Trained, name: str, texts: Texts) -> Output:
        """Return what a task's own adapter answers to a few texts."""
        return self.engine.do(
            agreement.answer_alone,
            f"{one.label}.{name}",
            adapter=one.adapters[name],
            texts=texts,
            base=self.measured,
            reading=self.reading,
            answer_tokens=answer_tokens_of({name: self.rows[name].task}),
        )

    def distances(self, one: Merges, scale: float, texts: Mapping[str, Texts]) -> Output:
        """Return how far a merge at a scale is from each single adapter on these texts, without labels."""
        heads = {} if self.recipe.generates else one.trained.adapters
        return self.engine.do(
            agreement.measure_distances,
            f"{one.label}.x{scale:g}",
            merged=one.merged,
            own=one.trained.own,
            heads=heads,
            aligned={"heldout": one.heldout[scale]} if heads else {},
            texts=texts,
            base=self.measured,
            reading=self.reading,
            scale=scale,
        )
