"""The study's figures as plain tables: for the page, for Markdown and for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from loraloom.report.aggregate import HEADS, STAGES, Figures, Merged, Stage
from loraloom.results import Score, StudyResult

MISSING = "not measured"
_BEFORE: Stage = ("before", "A")
_AFTER: Stage = ("after", "BA")


@dataclass(frozen=True)
class Table:
    """A caption, column names and rows of text; the first `headers` cells of a row name it."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    headers: int = 1


@dataclass(frozen=True)
class SummaryRow:
    """One init at a glance. `as_trained` and `aligned` are its best merges, picked on the held-out split."""

    init: str
    single: Score | None
    as_trained: Merged | None
    aligned: Merged | None
    interference_before: float | None
    interference_after: float | None


def points(score: Score | None) -> str:
    """Format a score in points (per cent) with its standard error."""
    return MISSING if score is None else f"{100 * score.value:.1f} ±{100 * score.stderr:.1f}".replace("-", "−")


def number(value: float | None, digits: int = 2) -> str:
    """Format a number; None and NaN read as not measured."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def scales_text(scales: Iterable[float]) -> str:
    """Format the scales of a merge, one a seed where they differ."""
    return ", ".join(f"{scale:.4g}" for scale in scales)


def merged_rows(result: StudyResult) -> list[Merged]:
    """Return every merge on the test split with its figures, in the study's order."""
    return Figures(result).merged


def summary_rows(result: StudyResult) -> list[SummaryRow]:
    """Return one row per init, in the study's order."""
    figures = Figures(result)
    rows = []
    for init in figures.inits:
        own = [row for row in figures.merged if row.init == init]
        rows.append(
            SummaryRow(
                init=init,
                single=figures.single_averages.get(init),
                as_trained=figures.best(row for row in own if not row.aligned),
                aligned=figures.best(row for row in own if row.aligned),
                interference_before=figures.ratio(init, _BEFORE),
                interference_after=figures.ratio(init, _AFTER),
            )
        )
    return rows


def summary_table(result: StudyResult) -> Table:
    """Return the summary rows as text, leaving out the columns that the study did not measure at all."""
    rows = summary_rows(result)
    columns = {"init": [row.init for row in rows], "single-task": [points(row.single) for row in rows]}
    for aligned, heads in HEADS.items():
        best = [row.aligned if aligned else row.as_trained for row in rows]
        if any(best):
            columns[f"merged, heads {heads}"] = [points(row.average if row else None) for row in best]
            columns[f"kept, heads {heads}"] = [f"{100 * row.kept:.1f} %" if row else MISSING for row in best]
            columns[f"rule, heads {heads}"] = [_rule_text(row) if row else MISSING for row in best]
    columns["interference before"] = [number(row.interference_before) for row in rows]
    columns["interference after"] = [number(row.interference_after) for row in rows]
    return Table("Every init at its best", tuple(columns), tuple(zip(*columns.values(), strict=True)))


def merged_table(result: StudyResult) -> Table:
    """Return every merge on the test split, task by task."""
    figures = Figures(result)
    rows = tuple(
        (
            row.init,
            row.label,
            HEADS[row.aligned],
            points(row.average),
            f"{100 * row.kept:.1f} %",
            *(points(row.scores.get(task)) for task in figures.tasks),
            ", ".join(map(str, row.output_ranks)),
            scales_text(row.scales),
            "yes" if row.scale_chosen_with_labels else "no",
            row.space,
        )
        for row in figures.merged
    )
    tail = ("output rank", "scale", "scale chosen with labels", "space")
    columns = ("init", "rule", "heads", "average", "kept", *figures.tasks, *tail)
    return Table("Merged adapters on the test rows, task by task", columns, rows, headers=3)


def single_table(result: StudyResult) -> Table:
    """Return the single-task scores: one row per task, one column per init, the majority class last."""
    figures = Figures(result)
    rows = [
        (
            task.name,
            task.metric,
            *(points(figures.singles[init].get(task.name)) for init in figures.inits),
            "none" if task.majority is None else f"{100 * task.majority:.1f}",
        )
        for task in result.tasks
    ]
    averages = (points(figures.single_averages.get(init)) for init in figures.inits)
    rows.append(("average", "", *averages, ""))
    columns = ("task", "metric", *figures.inits, "majority class")
    return Table("Single-task adapters on their own test rows", columns, tuple(rows))


def interference_table(result: StudyResult) -> Table:
    """Return the interference ratio of every init at every measured stage."""
    figures = Figures(result)
    rows = tuple((init, *(number(figures.ratio(init, stage), 3) for stage in figures.stages)) for init in figures.inits)
    columns = ("init", *(STAGES[stage] for stage in figures.stages))
    return Table("Interference ratio: response to other tasks' inputs / response to own inputs", columns, rows)


def markdown_tables(result: StudyResult) -> str:
    """Return every table of the study as Markdown, each under a heading."""
    tables = (summary_table, merged_table, single_table, interference_table)
    return "\n".join(_markdown(make(result)) for make in tables)


def _rule_text(row: Merged) -> str:
    return f"{row.label}, scale {scales_text(row.scales)}"


def _markdown(table: Table) -> str:
    lines = [table.columns, tuple("---" for _ in table.columns), *table.rows]
    body = "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)
    return f"## {table.caption}\n\n{body}\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split())


def transcript_table(result: StudyResult) -> Table | None:
    """Return the same prompts answered before and after merging; None where the study's tasks have no answers."""
    found = result.transcript
    if found is None:
        return None
    names = [task.name for task in result.tasks]
    return Table(
        f"Test prompts, answered greedily: {found.init}, seed {found.seed}, {found.rule} at scale {found.scale:g}",
        ("task", "prompt", "expected", "base model", *(f"adapter {name}" for name in names), "merged"),
        tuple(
            (one.task, one.prompt, one.expected, one.base, *(one.singles[name] for name in names), one.merged)
            for one in found.answers
        ),
    )
