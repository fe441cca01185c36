"""One self-contained HTML page: no network, plotly.js inlined once; of rows it shows a few."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from loraloom.files.atomic import write_text
from loraloom.report.aggregate import Figures, Merged
from loraloom.report.charts import charts
from loraloom.report.figure import Chart, color_of, symbol_of
from loraloom.report.tables import (
    agreement_table,
    average_share,
    merged_table,
    metric_tables,
    points,
    share,
    summary_rows,
    summary_table,
    transcript_table,
    worst_text,
)
from loraloom.report.verdict import comparisons, signed, verdict
from loraloom.results import StudyResult

MARK = b'<meta name="generator" content="loraloom">'  # by which a report is known
_HERE = Path(__file__).parent


def write_report(result: StudyResult, path: Path, *, overwrite: bool = False) -> Path:
    """Write the report of a study, and return its path.

    result: of the study; `StudyResult.load` reads a results.json.
    path: of the HTML file; it appears whole or not at all.
    overwrite: replace an earlier report.

    Raises LoraloomError where it cannot be written.
    """
    write_text(path, render(result), mark=MARK, overwrite=overwrite)
    return path


def render(result: StudyResult) -> str:
    """Return the page's HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    figures = Figures(result)
    drawn = charts(figures)
    return environment.get_template("template.html.j2").render(
        result=result,
        verdict=verdict(result),
        tiles=tiles(result),
        summary=summary_table(result),
        merged=merged_table(result),
        agreement=agreement_table(result),
        transcript=transcript_table(result),
        metrics=metric_tables(result),
        written=figures.written,
        judge=figures.judge,
        unranked=any(row.heldout is None for row in figures.merged),
        charts=drawn,
        legend=[(name, color_of(index), symbol_of(index)) for index, name in enumerate(figures.inits)],
        diagnostics=list(dict.fromkeys(key for init in result.inits for key in init.diagnostics)),
        recipe=yaml.safe_dump(result.recipe, sort_keys=False, allow_unicode=True),
        specification=Markup(_script_json(_specification(drawn))),
        style=Markup((_HERE / "style.css").read_text(encoding="utf-8")),
        script=Markup((_HERE / "page.js").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs()),
    )


def tiles(result: StudyResult) -> list[tuple[str, str, str]]:
    """Return the headline figures: (name, figure, what it is of)."""
    figures = Figures(result)
    found = []
    best = figures.best(figures.merged)
    if best is not None:
        found.append(("Best merged average", points(best.average), _way_of(figures, best)))
        single = f"its adapters alone reach {points(figures.single_averages.get(best.init))}"
        if figures.written:
            found.append(("Base model alone", points(figures.base_average), single))
            kept = share(average_share(best, figures.judge))
            found.append((figures.judge.capitalize(), kept, f"worst task: {worst_text(best)}"))
        else:
            found.append(("Kept of single-task", f"{100 * best.kept:.1f} %", single))
    for comparison in comparisons(result, aligned=best.aligned)[:1] if best else ():
        sides = f"{_way_of(figures, comparison.ours)} against {_way_of(figures, comparison.other)}"
        found.append(("Points against the next", signed(comparison), sides))
        rows = {row.init: row for row in summary_rows(result)}
        ours, other = rows[comparison.ours.init], rows[comparison.other.init]
        if ours is not other and ours.interference_after is not None and other.interference_after is not None:
            figure = f"{ours.interference_after:.2f} vs {other.interference_after:.2f}"
            found.append(
                ("Interference after training", figure, "the same two inits; 0 is none, 1 as loud as own inputs")
            )
    seeds = "seed" if len(result.seeds) == 1 else "seeds"
    rows_of = sum(task.rows.get("test", 0) for task in result.tasks)
    found.append(("Measured on", f"{len(result.tasks)} tasks", f"{rows_of:,} test rows, {len(result.seeds)} {seeds}"))
    return found


def _way_of(figures: Figures, row: Merged) -> str:
    return f"{row.init}, {row.label}{figures.heads(row.aligned)}"


def _specification(drawn: list[Chart]) -> dict[str, Any]:
    """Return what the page's script draws: chart id -> views -> panels."""
    return {
        chart.id: [
            [{"alt": panel.alt, "data": panel.data, "layout": panel.layout} for panel in view.panels]
            for view in chart.views
        ]
        for chart in drawn
    }


def _script_json(value: object) -> str:
    """Return JSON that is safe inside a script element: no text can close it or open a comment."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
