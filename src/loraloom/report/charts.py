"""Charts of scores: merged, by scale, and single-task; `charts` puts them in the order of the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from loraloom.report.aggregate import HEADS, Figures
from loraloom.report.figure import Chart, Json, Panel, View, color_of, layout_of, line, padded, plain, symbol_of
from loraloom.report.maps import heat_chart, layer_chart
from loraloom.report.tables import (
    BASE,
    MISSING,
    NONE,
    OWN,
    Table,
    average_share,
    chosen_text,
    points,
    share,
    single_table,
    worst_text,
)
from loraloom.results import Score

_ENDS = {
    "probability kept": "100 % is each task's own adapter, 0 % that right answers are not to be expected",
    "recovered loss": "100 % is each task's own adapter, 0 % the base model",
}
_SLOT = 13
_TALL: Json = {"yref": "paper", "y0": 0, "y1": 1, "layer": "below"}
_WIDEST = (-100.0, 200.0)  # per cent of what is kept that are drawn; a merge that breaks a model has thousands below


def charts(figures: Figures) -> list[Chart]:
    """Return the charts that the study has data for, in the order of the page."""
    makers = (merged_chart, kept_chart, scale_chart, heat_chart, layer_chart, single_chart)
    return [chart for chart in (make(figures) for make in makers) if chart is not None]


@dataclass(frozen=True)
class _Dot:
    init: int
    score: Score
    text: str
    filled: bool = True
    shift: float = 0.0


def merged_chart(figures: Figures) -> Chart | None:
    """Test average by rule and init, with the single-task average as the line to reach."""
    if not figures.merged:
        return None
    bands: dict[str, list[_Dot]] = {}
    for row in sorted(figures.merged, key=lambda row: figures.names.index(row.label)):
        dot = _Dot(figures.inits.index(row.init), row.average, points(row.average))
        if not figures.written:
            dot = replace(dot, filled=row.aligned, shift=0.2 if row.aligned else -0.2)
        bands.setdefault(row.label, []).append(dot)
    singles = [100 * score.value for score in figures.single_averages.values()]
    base = [100 * score.value for score in (figures.base_average,) if score]
    data, layout = _dots(figures, bands, lines=singles + base)
    best = figures.best(figures.merged)
    low = min(figures.merged, key=lambda row: row.average.value)
    assert best is not None
    alt = (
        f"Merged average on the test rows of {len(figures.inits)} inits under {len(bands)} rules. "
        f"Best on the held-out rows: {best.init} with {best.label}{figures.heads(best.aligned)}, "
        f"{points(best.average)}. "
        f"Lowest: {low.init} with {low.label}{figures.heads(low.aligned)}, {points(low.average)}."
    )
    if singles:
        mean = float(np.mean(singles))
        band = {
            "type": "rect",
            "x0": min(singles),
            "x1": max(singles),
            "fillcolor": "var(--band)",
            "line": {"width": 0},
        }
        layout["shapes"] += [_TALL | band, _upright(mean, "dash")]
        alt += f" Single-task average: {mean:.1f}, between {min(singles):.1f} and {max(singles):.1f} by init."
    if base:
        layout["shapes"].append(_upright(base[0], "dot"))
        alt += f" Base model alone: {base[0]:.1f}."
    heads = () if figures.written else (("open", "heads as trained"), ("filled", "heads aligned"))
    bases = (("dotted", "base model alone"),) if base else ()
    return Chart(
        id="merged",
        title="How good is the merged adapter?",
        caption="Each mark is one merged adapter: its average over all tasks on the test rows, at the scale chosen on "
        "the held-out rows or the only one tried. Look for the init that stands furthest right under most rules, and "
        "for bars (one standard error) that do not overlap. The dashed line is what separate adapters reach, the grey "
        "band its range over inits: on it, nothing was lost."
        + (" The dotted line is the base model without any adapter: on it, nothing was gained." if base else ""),
        views=[View("", [Panel("", alt, data, layout)])],
        tables=[merged_averages(figures)],
        keys=(*heads, ("dashed", "single-task average"), *bases),
    )


def merged_averages(figures: Figures) -> Table:
    """Return the averages of the first chart: one row per rule and alignment, one column per init."""
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    if figures.written:
        cells[BASE, NONE] = dict.fromkeys(figures.inits, points(figures.base_average))
        cells[OWN, NONE] = {init: points(score) for init, score in figures.single_averages.items()}
    for row in figures.merged:
        heads = () if figures.written else (HEADS[row.aligned],)
        way = (row.label, *heads, chosen_text(row))
        cells.setdefault(way, {})[row.init] = points(row.average)
    columns = ("rule", *(() if figures.written else ("heads",)), "scale chosen by")
    return _by_init(figures, "Merged average on the test rows", columns, cells)


def _by_init(
    figures: Figures, caption: str, columns: tuple[str, ...], cells: dict[tuple[str, ...], dict[str, str]]
) -> Table:
    """Return a table of what is told by init: its rows have the names in `columns`."""
    rows = tuple((*way, *(found.get(init, MISSING) for init in figures.inits)) for way, found in cells.items())
    return Table(caption, (*columns, *figures.inits), rows, headers=len(columns))


def kept_chart(figures: Figures) -> Chart | None:
    """What answers keep of the single adapters by rule and init: the mean over tasks, and the worst task."""
    what, rows = figures.judge, [row for row in figures.merged if row.share]
    if not (figures.written and rows):
        return None
    bands: dict[str, list[_Dot]] = {}
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for row in sorted(rows, key=lambda row: figures.names.index(row.label)):
        assert row.share
        (task, least), average = row.share.worst, row.share.average
        init, chosen = figures.inits.index(row.init), chosen_text(row)
        mean, worst = share(average), f"{task} {share(least)}"
        cells.setdefault((row.label, chosen, "mean"), {})[row.init] = mean
        cells.setdefault((row.label, chosen, "worst task"), {})[row.init] = worst
        dots = (
            _Dot(init, _within(least), f"worst task: {worst}", filled=False, shift=-0.2),
            _Dot(init, _within(average), f"mean: {mean}", shift=0.2),
        )
        bands.setdefault(row.label, []).extend(dots)
    data, layout = _dots(figures, bands, lines=[0.0, 100.0], unit=f"{what}, %")
    layout["xaxis"]["range"] = _cut(layout["xaxis"]["range"])
    layout["shapes"] += [_upright(100, "dash"), *([_upright(0, "dot")] if what == "recovered loss" else [])]
    drawn = [score.value for row in rows if row.share for score in (row.share.average, row.share.worst[1])]
    said = [
        f"{row.init} with {row.label} {share(average_share(row, what))}, worst task {worst_text(row)}" for row in rows
    ]
    return Chart(
        id="kept",
        title="How much of what each adapter learnt is left?",
        caption=f"{what.capitalize()} on the test rows: {_ENDS[what]}. Every merged "
        "adapter has two marks: the mean over tasks, and its worst task. Look for two that lie close together and far "
        f"right: such a merge sacrifices no task.{_edges(drawn)}",
        views=[View("", [Panel("", f"{what.capitalize()} on the test rows: {'; '.join(said)}.", data, layout)])],
        tables=[_by_init(figures, f"{what.capitalize()} on the test rows", ("rule", "scale chosen by", "of"), cells)],
        keys=(
            ("filled", "mean over tasks"),
            ("open", "worst task"),
            ("dashed", OWN),
            *((("dotted", BASE),) if what == "recovered loss" else ()),
        ),
    )


def scale_chart(figures: Figures) -> Chart | None:
    """Held-out average against scale, one line per init: one view per rule, one panel per alignment."""
    labels = [label for label in figures.labels.values() if any(sweep.label == label for sweep in figures.sweeps)]
    if not labels:
        return None
    flags = sorted({sweep.aligned for sweep in figures.sweeps})
    views = [View(label, [_scale_panel(figures, label, aligned) for aligned in flags]) for label in labels]
    unit = ""
    if figures.written:
        drawn = [score.value for sweep in figures.sweeps for score in sweep.averages]
        unit = f" They are measured by {figures.judge}: {_ENDS[figures.judge]}."
        unit += _edges(drawn)
    return Chart(
        id="scale",
        title="How much does the scale matter?",
        caption="The merged update is multiplied by the scale before it is added. Look for a line that is high and "
        "flat: such an init needs no search for the scale. The larger mark is each line's best scale. Held-out rows."
        + unit,
        views=views,
        tables=[_scale_table(figures, label) for label in labels],
        selector="Rule",
    )


def _scale_panel(figures: Figures, label: str, aligned: bool) -> Panel:
    data, said = [], []
    both = [sweep for sweep in figures.sweeps if sweep.label == label]
    percent = " %" if figures.written else ""
    for sweep in both:
        if sweep.aligned != aligned:
            continue
        values = [100 * score.value for score in sweep.averages]
        top = int(np.argmax(values))
        sizes = [12 if index == top else 6 for index in range(len(values))]
        errors = [100 * score.stderr for score in sweep.averages]
        trace = line(figures, sweep.init, sweep.scales, values) | {"customdata": errors}
        trace["marker"]["size"] = sizes
        trace["hovertemplate"] = f"scale %{{x}}: %{{y:.1f}} ±%{{customdata:.1f}}{percent}"
        data.append(trace)
        said.append(f"{sweep.init} {min(values):.1f} to {values[top]:.1f}{percent}, best at {sweep.scales[top]:.4g}")
    what = _heldout(figures)
    alt = f"{what} against scale, {label}{figures.heads(aligned)}: {'; '.join(said) or 'not measured'}."
    values = [100 * score.value for sweep in both for score in sweep.averages]
    title = f"{what.lower()}{', %' if figures.written else ''}"
    layout = layout_of(300, xaxis={"title": {"text": "scale"}}, yaxis={"title": {"text": title}})
    layout["yaxis"]["range"] = _cut(padded([0.0, 100.0, *values])) if figures.written else padded(values)
    return Panel("" if figures.written else f"heads {HEADS[aligned]}", alt, data, layout)


def _heldout(figures: Figures) -> str:
    """Name what held-out rows judge by."""
    return f"Held-out {figures.judge}"


def _scale_table(figures: Figures, label: str) -> Table:
    sweeps = [sweep for sweep in figures.sweeps if sweep.label == label]
    scales = sorted({scale for sweep in sweeps for scale in sweep.scales})
    tell, percent = (share, " %") if figures.written else (points, "")
    rows = []
    for sweep in sorted(sweeps, key=lambda sweep: (figures.inits.index(sweep.init), sweep.aligned)):
        found = dict(zip(sweep.scales, sweep.averages, strict=True))
        mean = np.mean([100 * score.value for score in sweep.averages])
        heads = () if figures.written else (HEADS[sweep.aligned],)
        rows.append((sweep.init, *heads, *(tell(found.get(scale)) for scale in scales), f"{mean:.1f}{percent}"))
    names = ("init",) if figures.written else ("init", "heads")
    columns = (*names, *(f"scale {scale:.4g}" for scale in scales), "mean over scales")
    return Table(f"{_heldout(figures)} by scale: {label}", columns, tuple(rows), headers=len(names))


def single_chart(figures: Figures) -> Chart | None:
    """Single-task scores by task and init, with the score of always naming the commonest class."""
    if not figures.result.singles:
        return None
    bands = {
        task: [
            _Dot(index, figures.singles[init][task], points(figures.singles[init][task]))
            for index, init in enumerate(figures.inits)
            if task in figures.singles[init]
        ]
        for task in figures.tasks
    }
    if figures.written:
        key, stroke = BASE, "the base model scores without any adapter"
        marks = {task: score.value for task, score in figures.bases.items()}
    else:
        key, stroke = "always the commonest class", "always naming the commonest class would score"
        marks = {task.name: task.majority for task in figures.result.tasks if task.majority is not None}
    data, layout = _dots(figures, bands, marks)
    said = [
        f"{task} {100 * min(dot.score.value for dot in dots):.1f} to {100 * max(dot.score.value for dot in dots):.1f}"
        for task, dots in bands.items()
        if dots
    ]
    return Chart(
        id="single",
        title="Is anything lost before the merge?",
        caption="Each task's own adapter on its own test rows, before any merge. Look for marks of one task that lie "
        "within each other's bars: then the init costs nothing here. The thick stroke is what "
        f"{stroke}.",
        views=[View("", [Panel("", f"Single-task scores by task over inits: {'; '.join(said)}.", data, layout)])],
        tables=[single_table(figures.result)],
        keys=(("majority", key),),
    )


def _dots(
    figures: Figures,
    bands: dict[str, list[_Dot]],
    marks: dict[str, float] | None = None,
    *,
    lines: Sequence[float] = (),
    unit: str = "points",
) -> tuple[list[Json], Json]:
    """Lay bands under each other, each with its name and one slot per init; `marks` are strokes across a band.

    The axis reaches to `lines` too, for what is drawn through all bands.
    """
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
            trace["text"].append(f"{plain(label)}: {plain(dot.text)}")
    layout = layout_of(round(len(bands) * height * _SLOT) + 70, xaxis={"title": {"text": unit}, "side": "top"})
    layout["yaxis"] |= {"range": [len(bands) * height, 0], "showticklabels": False, "showgrid": False}
    layout["yaxis"]["zeroline"] = False
    values = [100 * mark for mark in (marks or {}).values()]
    values += lines
    values += [x + side * e for t in traces.values() for x, e in _bars(t) for side in (-1, 1)]
    layout["xaxis"]["range"] = padded(values)
    layout["margin"] = {"l": 12, "r": 12, "t": 44, "b": 12}
    return list(traces.values()), layout | {"shapes": shapes, "annotations": notes, "hovermode": "closest"}


def _within(score: Score) -> Score:
    """Return what is kept at the edge of what is drawn where it lies beyond, without its error there."""
    low, high = (bound / 100 for bound in _WIDEST)
    inside = low <= score.value <= high
    return score if inside else Score(value=min(max(score.value, low), high), stderr=0.0)


def _edges(values: Iterable[float]) -> str:
    """Tell that some of what is kept is cut off where some are."""
    low, high = _WIDEST
    if all(low <= 100 * value <= high for value in values):
        return ""
    return f" What lies beyond −{-low:.0f} or {high:.0f} % is cut off; the numbers tell it."


def _cut(bounds: list[float]) -> list[float]:
    """Return the bounds of an axis within what is drawn of shares kept."""
    pad = 0.02 * (_WIDEST[1] - _WIDEST[0])
    return [max(bounds[0], _WIDEST[0] - pad), min(bounds[1], _WIDEST[1] + pad)]


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
    return place | {"text": plain(label), "font": {"size": 12.5, "weight": 600}, "bgcolor": "var(--panel)"}


def _upright(x: float, dash: str) -> Json:
    """Return a line through all bands."""
    return _TALL | {"type": "line", "x0": x, "x1": x, "line": {"color": "var(--muted)", "width": 1.5, "dash": dash}}


def _stroke(color: str, width: int, **place: Any) -> Json:
    return {"type": "line", "line": {"color": color, "width": width}, "layer": "below"} | place
