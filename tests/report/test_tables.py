"""Aggregation, summary and verdict against a plain recomputation from the records."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats

from loraloom.report import markdown_tables, merged_table, single_table, summary_rows, summary_table, verdict
from loraloom.report.aggregate import Figures, Merged, off_diagonal_mean, over_seeds
from loraloom.report.tables import agreement_table, points
from loraloom.report.verdict import comparisons
from loraloom.results import MergeScore, Score, StudyResult


def plain(scores: list[Score]) -> tuple[float, float]:
    """The rule of the page, written out again."""
    count = len(scores)
    values = [score.value for score in scores]
    rows = math.sqrt(sum(score.stderr**2 for score in scores)) / count
    spread = statistics.stdev(values) / math.sqrt(count) if count > 1 else 0.0
    return statistics.mean(values), max(rows, spread)


def of(result: StudyResult, init: str, split: str, aligned: bool) -> list[MergeScore]:
    return [m for m in result.merges if (m.init, m.split, m.aligned) == (init, split, aligned)]


def test_error_over_seeds_is_the_larger_of_rows_and_spread() -> None:
    """One seed: the bootstrap error. Close seeds: the rows' error. Far seeds: their spread."""
    assert over_seeds([Score(value=0.5, stderr=0.02)]) == Score(value=0.5, stderr=0.02)
    close = over_seeds([Score(value=0.5, stderr=0.03), Score(value=0.5, stderr=0.04)])
    assert close.stderr == pytest.approx(0.025)
    far = over_seeds([Score(value=0.4, stderr=0.01), Score(value=0.6, stderr=0.01)])
    assert (far.value, far.stderr) == (pytest.approx(0.5), pytest.approx(0.1))


def test_agreement_is_the_rank_correlation_of_distance_and_held_out_average(result: StudyResult) -> None:
    assert agreement_table(result) is None
    far = {0.25: 0.9, 0.5: 0.2, 1.0: 0.7}
    merges = [
        merge.model_copy(update={"agreement": dict.fromkeys(merge.scores, far[merge.scale]) | {"grammar": None}})
        for merge in result.merges
    ]
    told = result.model_copy(update={"merges": merges})
    for one in Figures(told).agreed:
        own = [m for m in of(told, one.init, "heldout", one.aligned) if m.seed == one.seed]
        assert one.candidates == len(own) == 9
        ranks = [scipy.stats.rankdata(side) for side in ([far[m.scale] for m in own], [m.average.value for m in own])]
        assert one.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1])
        assert (one.nearest.scale, one.best) == (0.5, max(own, key=lambda m: m.average.value))
    table = agreement_table(told)
    assert table is not None
    assert len(table.rows) == 16
    assert "Agreement" in markdown_tables(told)
    merged = merged_table(told)
    assert {row[merged.columns.index("distance")] for row in merged.rows} == {"0.20"}
    alike = [merge.model_copy(update={"agreement": dict.fromkeys(merge.scores)}) for merge in result.merges]
    assert Figures(result.model_copy(update={"merges": alike})).agreed == []


def test_summary_equals_recomputation(result: StudyResult) -> None:
    """Single-task, merged, kept and interference of every init, from the records themselves."""
    for row in summary_rows(result):
        singles = []
        for seed in result.seeds:
            scores = [s.score for s in result.singles if (s.init, s.seed) == (row.init, seed)]
            error = math.sqrt(sum(score.stderr**2 for score in scores)) / len(scores)
            singles.append(Score(value=statistics.mean(score.value for score in scores), stderr=error))
        assert row.single is not None
        assert (row.single.value, row.single.stderr) == pytest.approx(plain(singles))
        for aligned, best in ((False, row.as_trained), (True, row.aligned)):
            assert best is not None
            ways = {(m.rule, m.space) for m in of(result, row.init, "test", aligned)}
            tests = {w: [m for m in of(result, row.init, "test", aligned) if (m.rule, m.space) == w] for w in ways}
            helds = {
                way: statistics.mean(
                    m.average.value
                    for m in of(result, row.init, "heldout", aligned)
                    if (m.rule, m.space, m.scale) == (*way, 0.5)
                )
                for way in ways
            }
            top = max(helds, key=lambda way: helds[way])
            assert (best.rule, best.space, best.heldout) == (*top, pytest.approx(helds[top]))
            assert best.scales == (0.5,)
            assert (best.average.value, best.average.stderr) == pytest.approx(plain([m.average for m in tests[top]]))
            assert best.kept == pytest.approx(statistics.mean(m.kept for m in tests[top]))
        for when, quantity, got in (("before", "A", row.interference_before), ("after", "BA", row.interference_after)):
            ratios = [
                r.ratio for r in result.interference if (r.init, r.when, r.quantity) == (row.init, when, quantity)
            ]
            assert got == pytest.approx(statistics.mean(ratios))


def test_rule_is_picked_on_heldout_rows_not_on_test(make: Callable[..., StudyResult]) -> None:
    """A rule that only shines on the test rows is not called best."""
    result = make()
    lucky = [
        m.model_copy(update={"average": Score(value=0.99, stderr=0.01)}) if (m.split, m.rule) == ("test", "ties") else m
        for m in result.merges
    ]
    row = summary_rows(result.model_copy(update={"merges": lucky}))[0]
    assert row.as_trained is not None
    assert row.as_trained.rule == "task_arithmetic"


def test_interference_cells_are_relative_to_own_inputs(result: StudyResult) -> None:
    """Rows divided by their diagonal, layer by layer; their off-diagonal mean is the study's own ratio."""
    figures = Figures(result)
    responses = figures.responses("osrm", ("after", "BA"))
    assert responses is not None
    records = [r for r in result.interference if (r.init, r.when, r.quantity) == ("osrm", "after", "BA")]
    by_hand = statistics.mean(r.values[2][1][3] / r.values[2][1][1] for r in records)
    assert responses[2, 1, 3] == pytest.approx(by_hand)
    assert float(off_diagonal_mean(responses).mean()) == pytest.approx(figures.ratio("osrm", ("after", "BA")))


def test_task_order_of_interference_is_the_studys(result: StudyResult) -> None:
    """A record that lists its tasks in another order shows the same map."""
    turned = [
        r.model_copy(
            update={"tasks": r.tasks[::-1], "values": [[row[::-1] for row in layer[::-1]] for layer in r.values]}
        )
        for r in result.interference
    ]
    again = Figures(result.model_copy(update={"interference": turned})).responses("lora", ("before", "A"))
    assert again is not None
    assert again.tolist() == Figures(result).responses("lora", ("before", "A")).tolist()  # type: ignore[union-attr]


def test_silent_adapter_is_not_a_number_but_no_error(result: StudyResult) -> None:
    """An adapter with no response to its own inputs has no ratio; the others keep theirs."""
    record = result.interference[0]
    values = [[[0.0] * 4, *layer[1:]] for layer in record.values]
    silent = result.model_copy(update={"interference": [record.model_copy(update={"values": values})]})
    responses = Figures(silent).responses(record.init, (record.when, record.quantity))
    assert responses is not None
    kept = [v for i, row in enumerate(responses[0].tolist()) if i for j, v in enumerate(row) if i != j]
    assert off_diagonal_mean(responses)[0] == pytest.approx(statistics.mean(kept))


def test_options_are_named_only_where_they_differ(result: StudyResult) -> None:
    """Two settings of one rule are told apart; a setting that never changes stays out of the name."""
    assert list(Figures(result).labels.values()) == ["task_arithmetic", "ties", "ties · core"]
    other = [m.model_copy(update={"options": {"keep": 0.5, "seed": 1}}) for m in result.merges if m.rule == "ties"]
    first = [m.model_copy(update={"options": {**m.options, "seed": 1}}) for m in result.merges]
    labels = Figures(result.model_copy(update={"merges": first + other})).labels.values()
    assert list(labels) == [
        "task_arithmetic", "ties · keep 0.2", "ties · core · keep 0.2", "ties · keep 0.5", "ties · core · keep 0.5",
    ]  # fmt: skip


def test_merges_with_and_without_labels_stay_apart(result: StudyResult) -> None:
    """The same rule at a fixed scale is a row of its own, and says that no label chose it."""
    fixed = [m.model_copy(update={"scale": 1.0, "chosen_by": None}) for m in result.merges if m.split == "test"]
    table = merged_table(result.model_copy(update={"merges": result.merges + fixed}))
    assert len(table.rows) == 2 * len(merged_table(result).rows)
    chosen = table.columns.index("scale chosen by")
    assert sorted({(row[table.columns.index("scale")], row[chosen]) for row in table.rows}) == [
        ("0.5", "labels"),
        ("1", "the recipe"),
    ]


def test_tables_are_rectangular_and_complete(result: StudyResult) -> None:
    """Every init, rule and alignment has its row; every task has its column."""
    merged = merged_table(result)
    assert len(merged.rows) == 4 * 3 * 2
    for table in (merged, summary_table(result), single_table(result)):
        assert all(len(row) == len(table.columns) for row in table.rows)
    text = markdown_tables(result)
    assert text.count("\n## ") + text.startswith("## ") == 4
    assert points(summary_rows(result)[3].single) in text


@pytest.mark.parametrize(
    ("levels", "parts"),
    [
        ({"lora": 0.60, "osrm": 0.70}, ("osrm merged by", "70.0", "+10.0 ±0.7 against lora (")),
        ({"lora": 0.70, "osrm": 0.60}, ("lora merged by", "+10.0 ±0.7 against osrm (")),
        ({"lora": 0.701, "osrm": 0.70}, ("lora merged by", "+0.1 ±0.7 against osrm (", "this is a tie")),
        (
            {"one": 0.70, "two": 0.68, "three": 0.65, "four": 0.6, "five": 0.5},
            ("one merged by", "+2.0 ±0.7 against two", "+5.0 ±0.7 against three", "four", "and 1 more below"),
        ),
    ],
)
def test_verdict_names_the_best_and_every_rival(
    make: Callable[..., StudyResult], levels: dict[str, float], parts: tuple[str, ...]
) -> None:
    """Each side by name, in points with the error of the difference; a small lead is told as a tie."""
    sentence = verdict(make(inits=levels, seeds=(1,), noise=0.0, aligned=(False,)))
    for part in (*parts, "Picked on held-out rows", "heads as trained"):
        assert part in sentence
    assert sentence.endswith(".")


def test_nobody_is_counted_on_another_ones_side(make: Callable[..., StudyResult]) -> None:
    """Two inits of one method are rivals like any others: the better one is compared with the worse one too."""
    result = make(inits={"LoRA": 0.71, "OSRM": 0.76, "apart": 0.74}, seeds=(1,), noise=0.0)
    told = comparisons(result, aligned=False)
    assert [(one.ours.init, one.other.init) for one in told] == [("OSRM", "apart"), ("OSRM", "LoRA")]


def test_a_single_init_is_told_by_rules(make: Callable[..., StudyResult]) -> None:
    """Given adapters have one init: its best rule stands against the others."""
    sentence = verdict(make(inits={"given adapters": 0.7}, seeds=(1,), noise=0.0))
    assert "task_arithmetic reaches" in sentence
    assert "against ties" in sentence
    assert "given adapters" not in sentence


def test_errors_of_differences_are_paired(make: Callable[..., StudyResult]) -> None:
    """Against numpy over the records: resamples common to both sides, and the spread of the seeds' differences."""
    plain = make(inits={"a": 0.7, "b": 0.69}, noise=0.002)
    shared = np.random.default_rng(0).normal(0, 0.03, 200)
    merges = []
    for index, merge in enumerate(plain.merges):
        own = np.random.default_rng(index).normal(0, 0.001, 200)
        merges.append(merge.model_copy(update={"resamples": (merge.average.value + shared + own).tolist()}))
    result = plain.model_copy(update={"merges": merges})
    (one,) = comparisons(result, aligned=True)
    assert one.paired

    def records(side: Merged) -> list[MergeScore]:
        return [
            merge
            for merge in merges
            if (merge.init, merge.rule, merge.space, merge.split, merge.aligned)
            == (side.init, side.rule, side.space, "test", True)
        ]

    ours, other = records(one.ours), records(one.other)
    rows = np.std(
        np.mean([merge.resamples for merge in ours], axis=0) - np.mean([merge.resamples for merge in other], axis=0),
        ddof=1,
    )
    seeds = [a.average.value - b.average.value for a, b in zip(ours, other, strict=True)]
    assert one.stderr == pytest.approx(max(rows, np.std(seeds, ddof=1) / 2**0.5))
    assert one.stderr < 0.005  # the rows' own spread, 0.03, is common to both sides
    (alone,) = comparisons(plain, aligned=True)
    assert not alone.paired
    assert "taken as independent" in verdict(plain)
    assert "paired over rows" in verdict(result)


def test_verdict_without_anything_to_compare(make: Callable[..., StudyResult]) -> None:
    """No merge at all still gets an honest sentence."""
    assert verdict(make(inits={"osrm": 0.7}).model_copy(update={"merges": []})).startswith("No merged adapter")
