"""Charts of scores: merged, by scale, and single-task; `charts` puts them in the order of the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from loraloom.report.aggregate import HEADS, Figures
from loraloom.report.figure import Chart, Json, Panel, View, color_of, layout_of, line, padded, plain, symbol_of
from loraloom.report.maps import heat_chart, layer_chart
from loraloom.report.tables import Table, points, single_table
from loraloom.results import Score

_SLOT = 13


def charts(figures: Figures) -> list[Chart]:
    """Return the charts that the study has data for, in the order of the page."""
    makers = (merged_chart, scale_chart, heat_chart, layer_chart, single_chart)
    return [chart for chart in (make(figures) for make in makers) if chart is not None]


@dataclass(frozen=True)
class _Dot:
    init: int
    score: Score
    filled: bool
    shift: float


def merged_chart(figures: Figures) -> Chart | None:
    """Test average by rule and init, with the single-task average as the line to reach."""
    if not figures.merged:
        return None
    bands: dict[str, list[_Dot]] = {}
    for row in sorted(figures.merged, key=lambda row: list(figures.labels.values()).index(row.label)):
        shift = 0.2 if row.aligned else -0.2
        dot = _Dot(figures.inits.index(row.init), row.average, row.aligned, shift)
        bands.setdefault(row.label, []).append(dot)
    data, layout = _dots(figures, bands)
    best = figures.best(figures.merged)
    low = min(figures.merged, key=lambda row: row.average.value)
    assert best is not None
    singles = [100 * score.value for score in figures.single_averages.values()]
    alt = (
        f"Merged average on the test rows of {len(figures.inits)} inits under {len(bands)} rules. "
        f"Best on the held-out rows: {best.init} with {best.label}, heads {HEADS[best.aligned]}, "
        f"{points(best.average)}. "
        f"Lowest: {low.init} with {low.label}, heads {HEADS[low.aligned]}, {points(low.average)}."
    )
    if singles:
        mean = float(np.mean(singles))
        tall: Json = {"yref": "paper", "y0": 0, "y1": 1, "layer": "below"}
        band = {
            "type": "rect",
            "x0": min(singles),
            "x1": max(singles),
            "fillcolor": "var(--band)",
            "line": {"width": 0},
        }
        goal = {"type": "line", "x0": mean, "x1": mean, "line": {"color": "var(--muted)", "width": 1.5, "dash": "dash"}}
        layout["shapes"] += [tall | band, tall | goal]
        alt += f" Single-task average: {mean:.1f}, between {min(singles):.1f} and {max(singles):.1f} by init."
    return Chart(
        id="merged",
        title="How good is the merged adapter?",
        caption="Each mark is one merged adapter: its average over all tasks on the test rows, at the scale chosen on "
        "the held-out rows or the only one tried. Look for the init that stands furthest right under most rules, and "
        "for bars (one standard error) that do not overlap. The dashed line is what separate adapters reach, the grey "
        "band its range over inits: on it, nothing was lost.",
        views=[View("", [Panel("", alt, data, layout)])],
        tables=[merged_averages(figures)],
        keys=(("open", "heads as trained"), ("filled", "heads aligned"), ("dashed", "single-task average")),
    )


def merged_averages(figures: Figures) -> Table:
    """Return the averages of the first chart: one row per rule and alignment, one column per init."""
    cells: dict[tuple[str, bool, bool], dict[str, str]] = {}
    for row in figures.merged:
        way = (row.label, row.aligned, row.scale_chosen_with_labels)
        cells.setdefault(way, {})[row.init] = points(row.average)
    rows = tuple(
        (label, HEADS[aligned], "yes" if chosen else "no", *(found.get(init, "not measured") for init in figures.inits))
        for (label, aligned, chosen), found in sorted(
            cells.items(), key=lambda item: list(figures.labels.values()).index(item[0][0])
        )
    )
    columns = ("rule", "heads", "scale chosen with labels", *figures.inits)
    return Table("Merged average on the test rows", columns, rows, headers=3)


def scale_chart(figures: Figures) -> Chart | None:
    """Held-out average against scale, one line per init: one view per rule, one panel per alignment."""
    labels = [label for label in figures.labels.values() if any(sweep.label == label for sweep in figures.sweeps)]
    if not labels:
        return None
    flags = sorted({sweep.aligned for sweep in figures.sweeps})
    views = [View(label, [_scale_panel(figures, label, aligned) for aligned in flags]) for label in labels]
    return Chart(
        id="scale",
        title="How much does the scale matter?",
        caption="The merged update is multiplied by the scale before it is added. Look for a line that is high and "
        "flat: such an init needs no search for the scale. The larger mark is each line's best scale. Held-out rows.",
        views=views,
        tables=[_scale_table(figures, label) for label in labels],
        selector="Rule",
    )


def _scale_panel(figures: Figures, label: str, aligned: bool) -> Panel:
    data, said = [], []
    both = [sweep for sweep in figures.sweeps if sweep.label == label]
    for sweep in both:
        if sweep.aligned != aligned:
            continue
        values = [100 * score.value for score in sweep.averages]
        top = int(np.argmax(values))
        sizes = [12 if index == top else 6 for index in range(len(values))]
        errors = [100 * score.stderr for score in sweep.averages]
        trace = line(figures, sweep.init, sweep.scales, values) | {"customdata": errors}
        trace["marker"]["size"] = sizes
        trace["hovertemplate"] = "scale %{x}: %{y:.1f} ±%{customdata:.1f}"
        data.append(trace)
        said.append(f"{sweep.init} {min(values):.1f} to {values[top]:.1f}, best at {sweep.scales[top]:.4g}")
    title = f"heads {HEADS[aligned]}"
    alt = f"Held-out average against scale, {label}, {title}: {'; '.join(said) or 'not measured'}."
    values = [100 * score.value for sweep in both for score in sweep.averages]
    layout = layout_of(300, xaxis={"title": {"text": "scale"}}, yaxis={"title": {"text": "held-out average"}})
    layout["yaxis"]["range"] = padded(values)
    return Panel(title, alt, data, layout)


def _scale_table(figures: Figures, label: str) -> Table:
    sweeps = [sweep for sweep in figures.sweeps if sweep.label == label]
    scales = sorted({scale for sweep in sweeps for scale in sweep.scales})
    rows = []
    for sweep in sorted(sweeps, key=lambda sweep: (figures.inits.index(sweep.init), sweep.aligned)):
        found = dict(zip(sweep.scales, sweep.averages, strict=True))
        mean = np.mean([100 * score.value for score in sweep.averages])
        rows.append((sweep.init, HEADS[sweep.aligned], *(points(found.get(scale)) for scale in scales), f"{mean:.1f}"))
    columns = ("init", "heads", *(f"scale {scale:.4g}" for scale in scales), "mean over scales")
    return Table(f"Held-out average by scale: {label}", columns, tuple(rows), headers=2)


def single_chart(figures: Figures) -> Chart | None:
    """Single-task scores by task and init, with the score of always naming the commonest class."""
    if not figures.result.singles:
        return None
    bands = {
        task: [
            _Dot(index, figures.singles[init][task], True, 0)
            for index, init in enumerate(figures.inits)
            if task in figures.singles[init]
        ]
        for task in figures.tasks
    }
    majority = {task.name: task.majority for task in figures.result.tasks if task.majority is not None}
    data, layout = _dots(figures, bands, majority)
    said = [
        f"{task} {100 * min(dot.score.value for dot in dots):.1f} to {100 * max(dot.score.value for dot in dots):.1f}"
        for task, dots in bands.items()
        if dots
    ]
    return Chart(
        id="single",
        title="Is anything lost before the merge?",
        caption="Each task's own adapter on its own test rows, before any merge. Look for marks of one task that lie "
        "within each other's bars: then the init costs nothing here. The thick stroke is what always naming the "
        "commonest class would score.",
        views=[View("", [Panel("", f"Single-task scores by task over inits: {'; '.join(said)}.", data, layout)])],
        tables=[single_table(figures.result)],
        keys=(("majority", "always the commonest class"),),
    )


def _dots(
    figures: Figures, bands: dict[str, list[_Dot]], marks: dict[str, float] | None = None
) -> tuple[list[Json], Json]:
    """Lay bands under each other, each with its name and one slot per init; `marks` are strokes across a band."""
    count = len(figures.inits)
    height = count + 2.0
    traces: dict[tuple[int, bool], Json] = {}
    shapes, notes = [], []
    for number_, (label, dots) in enumerate(bands.items()):
        top = number_ * height
        notes.append(_band_name(label, top))
        if number_:
            shapes.append(_stroke(xref="paper", x0=0, x1=1, y0=top, y1=top, color="var(--grid)", width=1))
        mark = (marks or {}).get(label)
        if mark is not None:
            x = 100 * mark
            shapes.append(_stroke(x0=x, x1=x, y0=top + 1.5, y1=top + height - 0.4, color="var(--muted)", width=4))
        for dot in dots:
            trace = traces.setdefault((dot.init, dot.filled), _dot_trace(figures, dot))
            trace["x"].append(100 * dot.score.value)
            trace["y"].append(top + 2 + dot.init + dot.shift)
            trace["error_x"]["array"].append(100 * dot.score.stderr)
            trace["text"].append(f"{plain(label)}: {points(dot.score)}")
    layout = layout_of(round(len(bands) * height * _SLOT) + 70, xaxis={"title": {"text": "points"}, "side": "top"})
    layout["yaxis"] |= {"range": [len(bands) * height, 0], "showticklabels": False, "showgrid": False}
    layout["yaxis"]["zeroline"] = False
    values = [100 * mark for mark in (marks or {}).values()]
    values += [100 * score.value for score in figures.single_averages.values()]
    values += [x + side * e for t in traces.values() for x, e in _bars(t) for side in (-1, 1)]
    layout["xaxis"]["range"] = padded(values)
    layout["margin"] = {"l": 12, "r": 12, "t": 44, "b": 12}
    return list(traces.values()), layout | {"shapes": shapes, "annotations": notes, "hovermode": "closest"}


def _bars(trace: Json) -> zip[tuple[float, float]]:
    return zip(trace["x"], trace["error_x"]["array"], strict=True)


def _dot_trace(figures: Figures, dot: _Dot) -> Json:
    color = color_of(dot.init)
    symbol = symbol_of(dot.init) + ("" if dot.filled else "-open")
    return {
        "type": "scatter",
        "mode": "markers",
        "name": plain(figures.inits[dot.init]),
        "legendgroup": str(dot.init),
        "x": [],
        "y": [],
        "text": [],
        "hovertemplate": "%{text}",
        "error_x": {"type": "data", "array": [], "thickness": 1.2, "width": 0, "color": color},
        "marker": {"symbol": symbol, "size": 10, "color": color, "line": {"width": 1.5, "color": color}},
    }


def _band_name(label: str, top: float) -> Json:
    place = {"xref": "paper", "x": 0, "xanchor": "left", "y": top + 0.75, "yanchor": "middle", "showarrow": False}
    return place | {"text": plain(label), "font": {"size": 12.5, "weight": 600}}


def _stroke(color: str, width: int, **place: Any) -> Json:
    return {"type": "line", "line": {"color": color, "width": width}, "layer": "below"} | place
