"""What the report says of tasks of answers: beside the base model, by what is kept, and nothing of heads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from loraloom.cli.study import study_table
from loraloom.cli.terminal import rules_table
from loraloom.report import (
    Table,
    base_average,
    markdown_tables,
    merged_table,
    metric_tables,
    single_table,
    summary_rows,
    summary_table,
    verdict,
    write_report,
)
from loraloom.report.aggregate import SHARES, Figures
from loraloom.report.charts import charts
from loraloom.report.page import tiles
from loraloom.report.tables import points, share
from loraloom.report.verdict import comparisons
from loraloom.results import MergeScore, Score, StudyResult, average

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "gen6-smollm2-seed0.json"
BASE = "base model alone"


def column(table: Table, name: str) -> list[str]:
    return [row[table.columns.index(name)] for row in table.rows]


def records_of(result: StudyResult, init: str, rule: str, space: str) -> list[MergeScore]:
    ways = [(one.split, one.init, one.rule, one.space) for one in result.merges]
    return [one for one, way in zip(result.merges, ways, strict=True) if way == ("test", init, rule, space)]


def test_the_base_model_is_a_row_of_every_table(answers: StudyResult) -> None:
    """Its average is the mean over tasks, its scores the records' own."""
    scores = {one.task: one.score for one in answers.bases}
    base = base_average(answers)
    assert base is not None
    assert base.value == pytest.approx(mean(score.value for score in scores.values()))
    summary, merged, single = summary_table(answers), merged_table(answers), single_table(answers)
    assert column(summary, "init")[0] == BASE
    assert column(summary, "merged")[0] == points(base)
    assert merged.rows[0][:5] == (BASE, "–", points(base), "–", "0 %")
    assert [column(merged, task)[0] for task in scores] == [points(score) for score in scores.values()]
    assert column(single, BASE) == [*(points(score) for score in scores.values()), points(base)]
    for table in metric_tables(answers):
        assert table.rows[0][0] == BASE
    for table in (summary, merged, single, *metric_tables(answers)):
        assert all(len(row) == len(table.columns) for row in table.rows)


def older(result: StudyResult) -> StudyResult:
    """Return the study as versions wrote it that knew of recovered loss alone."""

    def without(merge: MergeScore) -> MergeScore:
        held = {"scores": merge.recovered, "average": average(merge.recovered.values())}
        return merge.model_copy(update={"kept_probability": {}, **(held if merge.split == "heldout" else {})})

    return result.model_copy(update={"merges": [without(merge) for merge in result.merges]})


def test_what_is_kept_is_told_as_mean_and_worst_task(answers: StudyResult) -> None:
    """Against the records: over seeds by task, and the least of the tasks by name."""
    records = records_of(answers, "osrm", "ties", "core")
    kept, gain = (
        {task: mean(getattr(one, share)[task].value for one in records) for task in records[0].recovered}
        for share in ("kept_probability", "recovered")
    )
    for result, shares in ((answers, (kept, gain)), (older(answers), (gain,))):
        table = merged_table(result)
        row = next(row for row in table.rows if row[:2] == ("osrm", "ties · core"))
        for place, by_task in enumerate(shares, start=3):
            assert row[place].startswith(f"{100 * mean(by_task.values()):.1f} ±")
            assert row[place].endswith("\u00a0%")
        task = min(shares[0], key=lambda name: shares[0][name])
        assert row[3 + len(shares)].startswith(f"{task} {100 * shares[0][task]:.1f} ±")
        own = next(row for row in table.rows if row[:2] == ("osrm", "each task's own adapter"))
        assert own[3 : 3 + len(shares)] == tuple("100 %" for _ in shares)
        names = ("probability kept", "recovered loss")[-len(shares) :]
        assert table.columns[3 : 4 + len(shares)] == (*names, "worst task")


def test_a_results_file_from_before_probability_is_read_and_shown(tmp_path: Path) -> None:
    """The study that the documentation tells of, as it was written then."""
    result = StudyResult.load(RESULTS)
    assert verdict(result).startswith("Picked on held-out rows by recovered loss: tsv")
    html = write_report(result, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Probability kept" not in html
    assert "held-out recovered loss" in html


def test_every_metric_of_every_task_is_told(answers: StudyResult) -> None:
    """Losses in nats a token, all else in points; of the base model, each own adapter and each merge."""
    found = metric_tables(answers)
    assert [table.caption for table in found] == [f"{task.name}: every metric" for task in answers.tasks]
    assert found[0].columns == ("init", "rule", "exact_match", "rouge_l", "loss (nats a token)", *SHARES)
    assert len(found[0].rows) == 1 + 4 + 4 * 3
    assert found[1].rows[0][4] == "2.200 ±0.050"
    assert found[1].rows[1][4].startswith("1.100 ±")
    assert [share(None), share(Score(value=-1.5, stderr=0.1))] == ["not measured", "−150.0 ±10.0\u00a0%"]


def test_nothing_is_said_of_heads_or_of_points_kept(answers: StudyResult, tmp_path: Path) -> None:
    """Neither has a meaning here: there are no heads, and own adapters may score nothing."""
    html = write_report(answers, tmp_path / "report.html").read_text(encoding="utf-8")
    shown = html[: html.index("* plotly.js v")]
    told = [shown, verdict(answers), markdown_tables(answers), json.dumps(tiles(answers))]
    for text in told:
        assert not re.search(r"\bheads?\b", re.sub(r"</?(head|thead)>", "", text))
        text = re.sub(r'probability kept|["#-]kept["-]', "", text, flags=re.IGNORECASE)  # the chart's name too
        assert not re.search(r"\bkept\b", text, flags=re.IGNORECASE)
        assert "majority" not in text.replace('kind == "majority"', "")
    assert "Recovered loss" in shown
    assert "a number" not in shown[shown.index("<caption>Tasks") :]
    assert "Every metric of every task" in shown


@pytest.mark.parametrize(("share", "field"), SHARES.items())
def test_charts_show_what_is_kept_in_per_cent(answers: StudyResult, share: str, field: str) -> None:
    """Held-out curves are of it, test marks of mean and worst task; of recovered loss the base model is a line."""
    answers = answers if field == "kept_probability" else older(answers)
    drawn: dict[str, Any] = {chart.id: chart for chart in charts(Figures(answers))}
    assert list(drawn) == ["merged", "kept", "scale", "interference", "layers", "single"]
    scale = drawn["scale"].views[0].panels
    assert [panel.title for panel in scale] == [""]
    assert scale[0].layout["yaxis"]["title"]["text"] == f"held-out {share}, %"
    assert f"Held-out {share} against scale" in scale[0].alt
    assert ("dotted", BASE) in drawn["merged"].keys
    kept = drawn["kept"].views[0].panels[0]
    assert (("dotted", BASE) in drawn["kept"].keys) == (share == "recovered loss")
    assert kept.layout["xaxis"]["title"]["text"] == f"{share}, %"
    records = records_of(answers, "osrm", "task_arithmetic", "full")
    found = [getattr(one, field) for one in records]
    by_task = {task: 100 * mean(one[task].value for one in found) for task in found[0]}
    marks = {trace["marker"]["symbol"]: trace["x"][0] for trace in kept.data if trace["name"] == "osrm"}
    worst = next(value for symbol, value in marks.items() if symbol.endswith("-open"))
    average = next(value for symbol, value in marks.items() if not symbol.endswith("-open"))
    assert (worst, average) == (pytest.approx(min(by_task.values())), pytest.approx(mean(by_task.values())))
    assert "cut off" not in drawn["kept"].caption + drawn["scale"].caption


def test_a_merge_that_breaks_the_model_leaves_the_others_readable(answers: StudyResult) -> None:
    """Thousands of per cent below the base model are cut off, and that is told; the table has them."""
    broken = {task.name: Score(value=-40.0, stderr=3.0) for task in answers.tasks}
    merges = [merge.model_copy(update={"kept_probability": broken, "recovered": broken}) for merge in answers.merges]
    merges = [
        merge.model_copy(update={"average": broken["topic"]}) if merge.split == "heldout" else merge for merge in merges
    ]
    drawn = {chart.id: chart for chart in charts(Figures(answers.model_copy(update={"merges": merges})))}
    for chart in (drawn["kept"], drawn["scale"]):
        assert "beyond −100 or 200 % is cut off" in chart.caption
    low, high = drawn["kept"].views[0].panels[0].layout["xaxis"]["range"]
    assert -110 < low < -100 < 100 < high
    for view in drawn["scale"].views:
        low, high = view.panels[0].layout["yaxis"]["range"]
        assert -110 < low < 0 < 100 < high
    assert any("−4000.0 ±" in cell for row in drawn["kept"].tables[0].rows for cell in row)


def test_the_verdict_tells_base_adapters_and_what_is_kept(answers: StudyResult) -> None:
    """The best by what is kept on held-out rows, in points and in shares, its rivals too; differences are paired."""
    told = verdict(answers)
    base = base_average(answers)
    assert told.startswith("Picked on held-out rows by probability kept: osrm merged by task_arithmetic reaches")
    assert f"(base model alone {points(base)}, its adapters alone " in told
    assert re.search(r", keeps \d+\.\d ±\d\.\d\s% of the probability that they give to the right answers and ", told)
    assert re.search(r"recovers \d+\.\d ±\d\.\d\s% of what they gain in loss; on the worst task by probability", told)
    assert re.search(r"by probability kept, topic, \d+", told)
    assert re.search(r"In points it stands \+.* against orthonormal \(task_arithmetic; keeps \d+\.\d", told)
    assert [name for name, _, _ in tiles(answers)][2] == "Probability kept"
    noise = tuple(0.001 * step for step in range(20))
    merges = [
        merge.model_copy(update={"resamples": [merge.average.value + one for one in noise]}) for merge in answers.merges
    ]
    paired = comparisons(answers.model_copy(update={"merges": merges, "seeds": [1]}), aligned=False)
    assert all(one.paired for one in paired)


def test_an_own_adapter_that_gains_nothing_is_named(answers: StudyResult) -> None:
    """Its recovered loss is 0 by definition, which is no fault of the merge."""
    assert "gain nothing" not in verdict(answers)
    worse = [
        one.model_copy(update={"score": one.score.model_copy(update={"more": {"loss": Score(value=9.0, stderr=0.1)}})})
        if (one.init, one.task) == ("lora", "grammar")
        else one
        for one in answers.singles
    ]
    assert verdict(answers.model_copy(update={"singles": worse})).endswith("0 % counts as recovered: grammar (lora).")


def test_terminal_tables_have_the_base_model_and_what_is_kept(answers: StudyResult) -> None:
    """`run` tells inits, `compare` rules; both begin with the base model."""
    base = base_average(answers)
    assert base is not None
    _, columns, cells = study_table(summary_rows(answers), base)
    assert columns == ("init", "single", "merged", "kept", "recovered", "worst task", "interference")
    assert cells[0][:5] == (BASE, "", f"{100 * base.value:.1f}", "", "0%")
    best = summary_rows(answers)[0].as_trained
    assert best is not None
    kept, gain = best.shares["probability kept"], best.shares["recovered loss"]
    task, least = kept.worst
    means = [f"{100 * one.average.value:.0f}%" for one in (kept, gain)]
    assert cells[1][3:6] == (*means, f"{100 * least.value:.0f}% {task}")
    _, columns, cells = rules_table(answers)
    assert columns == ("rule", "average", "probability kept", "recovered loss", "worst task", "scale", "rank")
    assert [row[0] for row in cells[:2]] == [BASE, "each task's own adapter"]
    assert all(len(row) == len(columns) for row in cells)


def test_a_study_of_which_parts_are_missing_still_makes_a_page(answers: StudyResult, tmp_path: Path) -> None:
    """Merges without what they keep, and no merges at all."""
    merges = [merge.model_copy(update={"kept_probability": {}, "recovered": {}}) for merge in answers.merges]
    partial = answers.model_copy(update={"merges": merges})
    html = write_report(partial, tmp_path / "partial.html").read_text(encoding="utf-8")
    assert 'data-chart="kept"' not in html
    assert "not measured" in html
    bare = answers.model_copy(update={"merges": [], "singles": [], "interference": []})
    html = write_report(bare, tmp_path / "bare.html").read_text(encoding="utf-8")
    assert BASE in html
