"""Figures of a study brought together over seeds and layers: the numbers behind every table and chart of the report.

Over seeds a figure is the mean. Its standard error for one seed is the row-bootstrap error sqrt(sum se^2) / S with
S = 1; for several seeds it is the larger of that and the spread (standard deviation, n - 1) over seeds / sqrt(S).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from loraloom.results import Interference, MergeScore, Score, StudyResult, average

Stage = tuple[Literal["before", "after"], Literal["A", "BA"]]
STAGES: dict[Stage, str] = {
    ("before", "A"): "before training, |A h|",
    ("after", "A"): "after training, |A h|",
    ("after", "BA"): "after training, |B A h|",
}
HEADS = {False: "as trained", True: "aligned"}
# what is kept of the single adapters by merges that write, and its field of MergeScore; held-out rows judge by the
# first that a study has, of which older ones have the second alone
SHARES = {"probability kept": "kept_probability", "recovered loss": "recovered"}


def over_seeds(scores: Sequence[Score]) -> Score:
    """Return the mean of one figure over seeds (one score a seed) with its standard error, see the module's text.

    Of the further metrics, those that every seed has.
    """
    count = len(scores)
    values = [score.value for score in scores]
    rows = math.sqrt(sum(score.stderr**2 for score in scores)) / count
    spread = float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else 0.0
    common = [name for name in scores[0].more if all(name in score.more for score in scores)]
    more = {name: over_seeds([score.more[name] for score in scores]) for name in common}
    return Score(value=float(np.mean(values)), stderr=max(rows, spread), more=more)


@dataclass(frozen=True)
class Share:
    """What a merge keeps of the single adapters, by task and as the mean over tasks."""

    tasks: dict[str, Score]
    average: Score

    @property
    def worst(self) -> tuple[str, Score]:
        """The task of which least is kept, with what is."""
        return min(self.tasks.items(), key=lambda item: item[1].value)


@dataclass(frozen=True)
class Merged:
    """One way to merge one init's adapters on the test split, over seeds.

    `heldout` is the held-out average at the same scales, None where the study did not measure it; `by_seed` the test
    average of every seed; `resamples` that of every resample of the test rows, mean over seeds, empty where not kept.
    `shares` are those of tasks of answers, by name as in SHARES, else empty; `heldout` is the average of the first of
    them on held-out rows. `distance` is the mean over tasks from the single adapters on unlabelled texts, None where it
    was not measured.
    """

    init: str
    label: str
    rule: str
    space: str
    aligned: bool
    output_ranks: tuple[int, ...]
    scales: tuple[float, ...]
    chosen_by: Literal["labels", "agreement"] | None
    rule_chosen: bool
    scores: dict[str, Score]
    average: Score
    kept: float
    heldout: float | None
    by_seed: dict[int, float]
    resamples: tuple[float, ...]
    shares: dict[str, Share]
    distance: float | None = None

    @property
    def share(self) -> Share | None:
        """The share of the single adapters by which held-out rows judge."""
        return next(iter(self.shares.values()), None)


@dataclass(frozen=True)
class Sweep:
    """Held-out average against scale of one init under one way to merge, over seeds."""

    init: str
    label: str
    aligned: bool
    scales: tuple[float, ...]
    averages: tuple[Score, ...]


@dataclass(frozen=True)
class Agreed:
    """How near the merges of one init and seed are to its single adapters, and how good on held-out rows.

    candidates: ways to merge, each at a scale. spearman: rank correlation of mean distance and held-out average, -1
    where the nearer is always the better; None of fewer than three, or where one of the two never changes.
    """

    init: str
    seed: int
    aligned: bool
    candidates: int
    spearman: float | None
    nearest: MergeScore
    best: MergeScore


class Figures:
    """Every aggregated figure of a study, in the order of its inits and tasks."""

    def __init__(self, result: StudyResult) -> None:
        self.result = result
        self.inits = [init.name for init in result.inits]
        self.tasks = [task.name for task in result.tasks]

    @cached_property
    def bases(self) -> dict[str, Score]:
        """What the base model alone scores by task; of tasks of answers, for others need a head."""
        found = {one.task: one.score for one in self.result.bases}
        return {task: found[task] for task in self.tasks if task in found}

    @cached_property
    def base_average(self) -> Score | None:
        """Average of the base model alone over tasks, None where it was not measured on all of them."""
        return average(self.bases.values()) if self.bases and len(self.bases) == len(self.tasks) else None

    @property
    def written(self) -> bool:
        """Tell whether the tasks are of answers: measured against the base model, by what is kept, without heads."""
        return self.base_average is not None

    @cached_property
    def shares(self) -> tuple[str, ...]:
        """Names of the shares of the single adapters that were measured, of SHARES, the one that judges first."""
        found = [name for name, field in SHARES.items() if any(getattr(merge, field) for merge in self.result.merges)]
        return tuple(found) or tuple(SHARES)[-1:]

    @property
    def judge(self) -> str:
        """What held-out rows judge merges by: the average, or of answers a share of the single adapters."""
        return self.shares[0] if self.written else "average"

    def heads(self, aligned: bool) -> str:
        """Return `, heads` and which, to be put after the name of a merge; nothing where there are none."""
        return "" if self.written else f", heads {HEADS[aligned]}"

    @cached_property
    def singles(self) -> dict[str, dict[str, Score]]:
        """Single-task scores over seeds: init -> task -> score."""
        found: dict[tuple[str, str], list[Score]] = {}
        for single in self.result.singles:
            found.setdefault((single.init, single.task), []).append(single.score)
        return {
            init: {task: over_seeds(found[init, task]) for task in self.tasks if (init, task) in found}
            for init in self.inits
        }

    @cached_property
    def gainless(self) -> list[tuple[str, str]]:
        """Init and task of every own adapter that gains nothing in loss over the base model: 0 of it is recovered."""
        bases = {task: score.more["loss"].value for task, score in self.bases.items() if "loss" in score.more}
        found = [
            (one.init, one.task)
            for one in self.result.singles
            if one.task in bases and "loss" in one.score.more and one.score.more["loss"].value >= bases[one.task]
        ]
        return list(dict.fromkeys(found))  # of several seeds one is enough

    @cached_property
    def single_averages(self) -> dict[str, Score]:
        """Average of the single-task adapters over tasks, then over seeds, for each init that has them."""
        found: dict[str, dict[int, list[Score]]] = {}
        for single in self.result.singles:
            found.setdefault(single.init, {}).setdefault(single.seed, []).append(single.score)
        return {
            init: over_seeds([average(scores) for scores in found[init].values()])
            for init in self.inits
            if init in found
        }

    @cached_property
    def merged(self) -> list[Merged]:
        """Test figures of every init, rule, space, options and alignment."""
        groups = _group(merge for merge in self.result.merges if merge.split == "test")
        heldout = {
            (merge.way, merge.init, merge.aligned, merge.seed, round(merge.scale, 9)): merge.average.value
            for merge in self.result.merges
            if merge.split == "heldout"
        }
        rows = []
        for (_, init, aligned, *_), merges in groups.items():
            seen = [heldout.get((m.way, init, aligned, m.seed, round(m.scale, 9))) for m in merges]
            known = [value for value in seen if value is not None]
            rows.append(
                Merged(
                    init=init,
                    label=self.name(merges[0]),
                    rule=" or ".join(dict.fromkeys(merge.rule for merge in merges)),
                    space=merges[0].space,
                    aligned=aligned,
                    output_ranks=tuple(sorted({merge.output_rank for merge in merges})),
                    scales=tuple(sorted({merge.scale for merge in merges})),
                    chosen_by=merges[0].chosen_by,
                    rule_chosen=merges[0].rule_chosen,
                    scores={t: over_seeds([m.scores[t] for m in merges]) for t in self.tasks if t in merges[0].scores},
                    average=over_seeds([merge.average for merge in merges]),
                    kept=float(np.mean([merge.kept for merge in merges])),
                    heldout=float(np.mean(known)) if len(known) == len(merges) else None,
                    by_seed={merge.seed: merge.average.value for merge in merges},
                    resamples=_mean_resamples(merges),
                    shares=_shares(merges),
                    distance=_mean_distance(merges),
                )
            )
        return sorted(rows, key=lambda row: (self.inits.index(row.init), self.names.index(row.label), row.aligned))

    @cached_property
    def sweeps(self) -> list[Sweep]:
        """Held-out averages by scale, for every way to merge that was tried at two scales or more."""
        found: dict[tuple[str, str, bool], dict[float, list[Score]]] = {}
        for merge in self.result.merges:
            if merge.split == "heldout":
                scales = found.setdefault((merge.init, self.labels[merge.way], merge.aligned), {})
                scales.setdefault(round(merge.scale, 9), []).append(merge.average)
        return [
            Sweep(init, label, aligned, tuple(sorted(scales)), tuple(over_seeds(scales[s]) for s in sorted(scales)))
            for (init, label, aligned), scales in found.items()
            if len(scales) > 1
        ]

    @cached_property
    def agreed(self) -> list[Agreed]:
        """Distances from the single adapters against held-out averages, of every init, seed and kind of heads."""
        found: dict[tuple[str, int, bool], list[tuple[float, MergeScore]]] = {}
        for merge in self.result.merges:
            if merge.split == "heldout" and merge.distance is not None:
                key = (merge.init, merge.seed, merge.aligned)
                found.setdefault(key, []).append((merge.distance, merge))
        return [
            Agreed(
                *key,
                candidates=len(pairs),
                spearman=_spearman([(far, merge.average.value) for far, merge in pairs]),
                nearest=min(pairs, key=lambda pair: pair[0])[1],
                best=max((merge for _, merge in pairs), key=lambda merge: merge.average.value),
            )
            for key, pairs in found.items()
        ]

    @cached_property
    def labels(self) -> dict[tuple[str, str, str], str]:
        """Shortest name that tells each (rule, space, options) of the study from the others, in order of appearance."""
        ways = list(dict.fromkeys(merge.way for merge in self.result.merges))
        labels = {}
        for rule, space, options in ways:
            others = [json.loads(way[2]) for way in ways if way[:2] == (rule, space)]
            label = rule if space == "full" else f"{rule} · {space}"
            for name, value in json.loads(options).items():
                if any(other.get(name) != value for other in others):
                    label += f" · {name} {value}"
            labels[rule, space, options] = label
        return labels

    def name(self, merge: MergeScore) -> str:
        """Return the label of a merge, with what was left to agreement where it chose."""
        if merge.rule_chosen:
            way = merge.options.get("normalise")
            return "rule and scale auto" + (f" · normalise {way}" if way else "")
        return f"{self.labels[merge.way]} · scale auto" if merge.chosen_by == "agreement" else self.labels[merge.way]

    @cached_property
    def names(self) -> list[str]:
        """The name of every merge: what agreement chose of a way to merge follows it, what it chose of all is last."""
        order = list(self.labels.values())
        merges = sorted(
            self.result.merges,
            key=lambda one: (one.rule_chosen, order.index(self.labels[one.way]), one.chosen_by == "agreement"),
        )
        return list(dict.fromkeys(map(self.name, merges)))

    def best(self, rows: Iterable[Merged]) -> Merged | None:
        """Return the row with the best held-out average; rows without one come after, by their test average."""

        def rank(row: Merged) -> tuple[bool, float]:
            return (row.heldout is not None, row.average.value if row.heldout is None else row.heldout)

        return max(rows, key=rank, default=None)

    def ratio(self, init: str, stage: Stage) -> float | None:
        """Return the interference ratio of one init at one stage over seeds, None where it was not measured."""
        ratios = [record.ratio for record in self._records(init, stage)]
        return float(np.mean(ratios)) if ratios else None

    def responses(self, init: str, stage: Stage) -> NDArray[np.float64] | None:
        """Return responses [layer, adapter i, task j] over seeds, each row divided by the response to own inputs.

        Tasks come in the study's order; a row whose own response is zero is NaN. None where not measured.
        """
        records = self._records(init, stage)
        if not records:
            return None
        relative = []
        for record in records:
            order = [record.tasks.index(task) for task in self.tasks]
            values = np.asarray(record.values, dtype=np.float64)[:, order][:, :, order]
            own = np.diagonal(values, axis1=1, axis2=2)[:, :, None]
            relative.append(np.divide(values, own, out=np.full_like(values, np.nan), where=own > 0))
        return np.asarray(np.mean(relative, axis=0))

    @cached_property
    def layers(self) -> list[str]:
        """Names of the layers whose interference was measured."""
        return self.result.interference[0].layers if self.result.interference else []

    @cached_property
    def stages(self) -> list[Stage]:
        """The stages at which any init's interference was measured, from before to after training."""
        seen = {(record.when, record.quantity) for record in self.result.interference}
        return [stage for stage in STAGES if stage in seen]

    def _records(self, init: str, stage: Stage) -> list[Interference]:
        return [r for r in self.result.interference if r.init == init and (r.when, r.quantity) == stage]


def off_diagonal_mean(responses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean over pairs i != j of responses [..., i, j]; NaN entries are left out, all-NaN gives NaN."""
    return _mean_of_known(responses[..., ~np.eye(responses.shape[-1], dtype=bool)], axis=-1)


def over_layers(responses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean over layers of responses [layer, i, j]; NaN entries are left out, all-NaN gives NaN."""
    return _mean_of_known(responses, axis=0)


def _mean_of_known(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    known = np.isfinite(values)
    count = known.sum(axis=axis)
    total = np.where(known, values, 0.0).sum(axis=axis)
    return np.asarray(np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0))


def _mean_resamples(merges: Sequence[MergeScore]) -> tuple[float, ...]:
    """Return the mean over seeds of every resample's average; nothing where a seed has none or other ones."""
    if len({len(merge.resamples) for merge in merges}) > 1:
        return ()
    return tuple(np.mean([merge.resamples for merge in merges], axis=0).tolist())


def _mean_distance(merges: Sequence[MergeScore]) -> float | None:
    known = [merge.distance for merge in merges if merge.distance is not None]
    return float(np.mean(known)) if len(known) == len(merges) else None


def _spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    from scipy.stats import spearmanr  # here, because it takes long to import

    changing = all(len(set(side)) > 1 for side in zip(*pairs, strict=True))
    return float(spearmanr(*zip(*pairs, strict=True)).statistic) if len(pairs) > 2 and changing else None


def _shares(merges: Sequence[MergeScore]) -> dict[str, Share]:
    """Return what is kept over seeds, by name; nothing of what a seed lacks."""
    found = {}
    for name, field in SHARES.items():
        seeds: list[dict[str, Score]] = [getattr(merge, field) for merge in merges]
        if all(seeds):
            by_task = {task: over_seeds([one[task] for one in seeds]) for task in seeds[0]}
            found[name] = Share(by_task, over_seeds([average(one.values()) for one in seeds]))
    return found


def _group(merges: Iterable[MergeScore]) -> dict[tuple[Any, ...], list[MergeScore]]:
    """Bring the seeds of one way to merge together; a rule or scale that nobody chose is part of the way."""
    groups: dict[tuple[Any, ...], list[MergeScore]] = {}
    for merge in merges:
        fixed = None if merge.chosen_by else round(merge.scale, 9)
        way = merge.options.get("normalise") if merge.rule_chosen else merge.way
        key = (way, merge.init, merge.aligned, merge.chosen_by, merge.rule_chosen, fixed)
        groups.setdefault(key, []).append(merge)
    return groups
