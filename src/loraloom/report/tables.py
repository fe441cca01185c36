"""The study's figures as plain tables: for the page, for Markdown and for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from loraloom.report.aggregate import HEADS, STAGES, Figures, Merged, Stage
from loraloom.results import MergeScore, Score, StudyResult

MISSING = "not measured"
BASE = "base model alone"
OWN = "each task's own adapter"
NONE = "–"  # where there is nothing to measure
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


def share(score: Score | None) -> str:
    """Format a share of the single adapters in per cent with its standard error; no line ends before the sign."""
    return MISSING if score is None else f"{points(score)}\u00a0%"


def worst_text(row: Merged | None) -> str:
    """Format the task of which least is kept, with what is."""
    if row is None or row.share is None:
        return MISSING
    task, least = row.share.worst
    return f"{task} {share(least)}"


def average_share(row: Merged | None, name: str) -> Score | None:
    """Return what a merge keeps of the single adapters on average, None where it was not measured."""
    return row.shares[name].average if row and name in row.shares else None


def metric_text(metric: str, score: Score | None) -> str:
    """Format a metric of answers: a loss in nats a token, all others in points."""
    if score is None or metric != "loss":
        return points(score)
    return f"{score.value:.3f} ±{score.stderr:.3f}".replace("-", "−")


def number(value: float | None, digits: int = 2) -> str:
    """Format a number; None and NaN read as not measured."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def scales_text(scales: Iterable[float]) -> str:
    """Format the scales of a merge, one a seed where they differ."""
    return ", ".join(f"{scale:.4g}" for scale in scales)


def chosen_text(row: Merged) -> str:
    """Tell who chose the scale of a merge, of those that the recipe tries."""
    return row.chosen_by or "the recipe"


def merged_rows(result: StudyResult) -> list[Merged]:
    """Return every merge on the test split with its figures, in the study's order."""
    return Figures(result).merged


def base_average(result: StudyResult) -> Score | None:
    """Return what the base model alone scores, average over tasks of answers; None for tasks that need a head."""
    return Figures(result).base_average


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
    rows, figures = summary_rows(result), Figures(result)
    columns = {"init": [row.init for row in rows], "single-task": [points(row.single) for row in rows]}
    for aligned in HEADS:
        best = [row.aligned if aligned else row.as_trained for row in rows]
        if any(best):
            heads = figures.heads(aligned)
            columns[f"merged{heads}"] = [points(row.average if row else None) for row in best]
            if figures.written:
                columns |= {name: [share(average_share(row, name)) for row in best] for name in figures.shares}
                columns["worst task"] = [worst_text(row) for row in best]
            else:
                columns[f"kept{heads}"] = [f"{100 * row.kept:.1f} %" if row else MISSING for row in best]
            columns[f"rule{heads}"] = [_rule_text(row) if row else MISSING for row in best]
    columns["interference before"] = [number(row.interference_before) for row in rows]
    columns["interference after"] = [number(row.interference_after) for row in rows]
    cells = list(zip(*columns.values(), strict=True))
    if figures.written:
        alone = {"init": BASE, "merged": points(figures.base_average), "recovered loss": "0 %"}
        cells.insert(0, tuple(alone.get(column, NONE) for column in columns))
    return Table("Every init at its best", tuple(columns), tuple(cells))


def merged_table(result: StudyResult) -> Table:
    """Return every merge on the test split, task by task; of answers after the base model and the single adapters."""
    figures = Figures(result)
    near = any(row.distance is not None for row in figures.merged)
    tail = (*(["distance"] if near else []), "output rank", "scale", "scale chosen by", "space")
    rows = [
        (
            row.init,
            row.label,
            *(() if figures.written else (HEADS[row.aligned],)),
            points(row.average),
            *(_kept(figures, row) if figures.written else (f"{100 * row.kept:.1f} %",)),
            *(points(row.scores.get(task)) for task in figures.tasks),
            *([number(row.distance)] if near else []),
            ", ".join(map(str, row.output_ranks)),
            _scale_text(row),
            chosen_text(row),
            row.space,
        )
        for row in figures.merged
    ]
    alone = [
        (
            init,
            rule,
            points(mean),
            *kept,
            NONE,
            *(points(scores.get(task)) for task in figures.tasks),
            *[NONE] * len(tail),
        )
        for init, rule, mean, kept, scores in _alone(figures)
    ]
    columns = (
        *(("init", "rule") if figures.written else ("init", "rule", "heads")),
        "average",
        *((*figures.shares, "worst task") if figures.written else ("kept",)),
        *figures.tasks,
        *tail,
    )
    headers = 2 if figures.written else 3
    return Table("Merged adapters on the test rows, task by task", columns, (*alone, *rows), headers)


def _kept(figures: Figures, row: Merged) -> list[str]:
    """Return what a merge keeps of the single adapters, by every share, and of the worst task by the first."""
    return [*(share(average_share(row, name)) for name in figures.shares), worst_text(row)]


def base_shares(figures: Figures) -> list[str]:
    """Return what the base model keeps of the single adapters by definition: no loss is recovered without any."""
    return ["0 %" if name == "recovered loss" else NONE for name in figures.shares]


def _alone(figures: Figures) -> list[tuple[str, str, Score | None, list[str], dict[str, Score]]]:
    """Return what answers are measured against: name, rule, average, shares by definition, scores by task."""
    if not figures.written:
        return []
    whole = ["100 %" for _ in figures.shares]
    own = [(init, OWN, mean, whole, figures.singles[init]) for init, mean in figures.single_averages.items()]
    return [(BASE, NONE, figures.base_average, base_shares(figures), figures.bases), *own]


def metric_tables(result: StudyResult) -> list[Table]:
    """Return every metric of every task of answers, a table a task: base model, single and merged adapters."""
    figures = Figures(result)
    return [_metric_table(figures, task.name, task.metric) for task in result.tasks if figures.written]


def _metric_table(figures: Figures, task: str, metric: str) -> Table:
    more = list(figures.bases[task].more)
    scored = [(init, rule, scores.get(task), kept) for init, rule, _, kept, scores in _alone(figures)]
    for row in figures.merged:
        by_task = [row.shares[name].tasks if name in row.shares else {} for name in figures.shares]
        scored.append((row.init, _rule_text(row), row.scores.get(task), [share(one.get(task)) for one in by_task]))
    rows = tuple(
        (
            init,
            rule,
            points(score),
            *(metric_text(name, score.more.get(name) if score else None) for name in more),
            *kept,
        )
        for init, rule, score, kept in scored
    )
    names = ("loss (nats a token)" if name == "loss" else name for name in more)
    return Table(f"{task}: every metric", ("init", "rule", metric, *names, *figures.shares), rows, headers=2)


def single_table(result: StudyResult) -> Table:
    """Return the single-task scores: one row per task, one column per init, and what needs no adapter."""
    figures = Figures(result)
    shown = [(init, figures.singles[init], figures.single_averages.get(init)) for init in figures.inits]
    if figures.written:
        shown.insert(0, (BASE, figures.bases, figures.base_average))
    rows = [
        (
            task.name,
            task.metric,
            *(points(scores.get(task.name)) for _, scores, _ in shown),
            "none" if task.majority is None else f"{100 * task.majority:.1f}",
        )
        for task in result.tasks
    ]
    rows.append(("average", "", *(points(mean) for _, _, mean in shown), ""))
    constant = "commonest answer" if figures.written else "majority class"
    columns = ("task", "metric", *(name for name, _, _ in shown), constant)
    return Table("Single-task adapters on their own test rows", columns, tuple(rows))


def interference_table(result: StudyResult) -> Table:
    """Return the interference ratio of every init at every measured stage."""
    figures = Figures(result)
    rows = tuple((init, *(number(figures.ratio(init, stage), 3) for stage in figures.stages)) for init in figures.inits)
    columns = ("init", *(STAGES[stage] for stage in figures.stages))
    return Table("Interference ratio: response to other tasks' inputs / response to own inputs", columns, rows)


def agreement_table(result: StudyResult) -> Table | None:
    """Return how distances from the single adapters tell good merges, without labels; None where none was measured."""
    figures = Figures(result)
    if not figures.agreed:
        return None
    heads = () if figures.written else ("heads",)
    rows = tuple(
        (
            one.init,
            *([HEADS[one.aligned]] if heads else []),
            str(one.seed),
            str(one.candidates),
            number(one.spearman).replace("-", "−"),
            *(_at(figures, one.nearest), points(one.nearest.average), _at(figures, one.best), points(one.best.average)),
        )
        for one in figures.agreed
    )
    columns = ("init", *heads, "seed", "candidates", "Spearman's ρ", "nearest", "its average", "best", "its average")
    caption = f"Agreement: mean distance from the single adapters, without labels, against the held-out {figures.judge}"
    return Table(caption, columns, rows, headers=1 + len(heads))


def _at(figures: Figures, merge: MergeScore) -> str:
    return f"{figures.labels[merge.way]}, scale {merge.scale:.4g}"


def markdown_tables(result: StudyResult) -> str:
    """Return every table of the study as Markdown, each under a heading."""
    makers = (summary_table, merged_table, agreement_table, single_table, interference_table)
    made = [table for make in makers if (table := make(result)) is not None]
    return "\n".join(map(_markdown, [*made, *metric_tables(result)]))


def _rule_text(row: Merged) -> str:
    return f"{row.label}{f': {row.rule}' if row.rule_chosen else ''}, scale {scales_text(row.scales)}"


def _scale_text(row: Merged) -> str:
    return f"{row.rule} {scales_text(row.scales)}" if row.rule_chosen else scales_text(row.scales)


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
