"""Charts of interference: task by task as heat maps, and layer by layer as curves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from loraloom.report.aggregate import STAGES, Figures, Stage, off_diagonal_mean, over_layers
from loraloom.report.figure import Chart, Json, Panel, View, finite, layout_of, line, plain
from loraloom.report.tables import Table, interference_table, number

HEAT_TOP = 1.0
_MOST_VIEWS = 40  # buttons of one chart
_HEAT = [[step / 4, f"var(--heat-{step})"] for step in range(5)]


def heat_chart(figures: Figures) -> Chart | None:
    """Interference task by task, averaged over layers: one view per init, one panel per stage."""
    inits = [init for init in figures.inits if any(figures.ratio(init, stage) is not None for stage in figures.stages)]
    if not inits:
        return None
    views = [View(init, [_heat_panel(figures, init, stage) for stage in figures.stages]) for init in inits]
    tables = [_heat_table(figures, init, stage) for init in inits for stage in figures.stages]
    return Chart(
        id="interference",
        title="Whose inputs does an adapter answer to?",
        caption="Row: the adapter of a task. Column: the task whose held-out inputs it is given. A cell is the "
        "response relative to the adapter's own inputs (1 on the diagonal), averaged over layers. Look for faint cells "
        "off the diagonal: such an adapter leaves the other tasks alone.",
        views=views,
        tables=[interference_table(figures.result), *tables],
        selector="Init",
        keys=(("heat", f"0 to {HEAT_TOP:g} and above"),),
        legend=False,
    )


def _heat_panel(figures: Figures, init: str, stage: Stage) -> Panel:
    responses = figures.responses(init, stage)
    if responses is None:
        return Panel(STAGES[stage], f"{STAGES[stage]}, {init}: not measured.", [], layout_of(120))
    mean = over_layers(responses)
    names = [plain(task) for task in figures.tasks]
    size = len(names)
    cells = [[finite(value) for value in row] for row in mean]
    trace: Json = {
        "type": "heatmap",
        "x": names,
        "y": names,
        "z": cells,
        "zmin": 0,
        "zmax": HEAT_TOP,
        "colorscale": _HEAT,
        "showscale": False,
        "xgap": 2,
        "ygap": 2,
        "hovertemplate": "adapter %{y}, inputs of %{x}: %{z:.3f}<extra></extra>",
    }
    layout = layout_of(90 + 34 * size)
    category = {"showgrid": False, "zeroline": False, "type": "category"}
    layout["xaxis"] |= category | {"title": {"text": "inputs of"}, "tickangle": -45}
    layout["yaxis"] |= category | {"title": {"text": "adapter of"}, "autorange": "reversed"}
    if size <= 10:
        layout["annotations"] = [
            {
                "x": names[column],
                "y": names[row],
                "text": "–" if value is None else f"{value:.2f}",
                "showarrow": False,
                "font": {"size": 11, "color": f"var(--heat-text-{round(4 * min(value or 0, HEAT_TOP) / HEAT_TOP)})"},
            }
            for row, values in enumerate(cells)
            for column, value in enumerate(values)
        ]
    return Panel(STAGES[stage], f"Heat map {STAGES[stage]}, {init}: {_extremes(figures, mean)}", [trace], layout)


def _extremes(figures: Figures, mean: Any) -> str:
    pairs = [
        (float(mean[i, j]), f"adapter {own} on inputs of {other}")
        for i, own in enumerate(figures.tasks)
        for j, other in enumerate(figures.tasks)
        if i != j and math.isfinite(mean[i, j])
    ]
    if not pairs:
        return "no response to compare."
    (least, quiet), (most, loud) = min(pairs), max(pairs)
    average = sum(value for value, _ in pairs) / len(pairs)
    return f"mean off the diagonal {average:.2f}, least {least:.2f} ({quiet}), most {most:.2f} ({loud})."


def _heat_table(figures: Figures, init: str, stage: Stage) -> Table:
    responses = figures.responses(init, stage)
    mean = np.full((len(figures.tasks),) * 2, np.nan) if responses is None else over_layers(responses)
    rows = tuple((task, *(number(value) for value in mean[i])) for i, task in enumerate(figures.tasks))
    return Table(f"{init}, {STAGES[stage]}: adapter (row) on inputs (column)", ("adapter", *figures.tasks), rows)


def layer_chart(figures: Figures) -> Chart | None:
    """Interference ratio by depth, one line per init: one view per kind of layer, one panel per stage."""
    kinds: dict[str, list[int]] = {}
    for index, layer in enumerate(figures.layers):
        kinds.setdefault(_kind(layer), []).append(index)
    if len(kinds) > _MOST_VIEWS:
        kinds = {"all": list(range(len(figures.layers)))}
    if not kinds or not any(figures.responses(init, stage) is not None for init in figures.inits for stage in STAGES):
        return None
    views = [
        View(kind, [_layer_panel(figures, kind, layers, stage) for stage in figures.stages])
        for kind, layers in kinds.items()
    ]
    return Chart(
        id="layers",
        title="Where in the model does it happen?",
        caption="The mean over the cells off the diagonal of the map above, layer by layer from input to output: 0 is "
        "silence, 1 is as loud as own inputs. Look for lines that start low and stay low; a line that climbs after "
        "training has left its subspace.",
        views=views,
        tables=[_layer_table(figures, stage) for stage in figures.stages],
        selector="Layers",
    )


def _kind(layer: str) -> str:
    """Return what follows the layer's number in its name, else the whole name."""
    parts = layer.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[0] + 1 :]) if numbers else layer


def _layer_panel(figures: Figures, kind: str, layers: list[int], stage: Stage) -> Panel:
    data, said = [], []
    for init in figures.inits:
        responses = figures.responses(init, stage)
        if responses is None:
            continue
        ratios = off_diagonal_mean(responses)
        values = [finite(ratios[layer]) for layer in layers]
        trace = line(figures, init, list(range(1, len(layers) + 1)), values)
        trace["hovertemplate"] = "layer %{x}: %{y:.3f}"
        data.append(trace)
        known = [value for value in values if value is not None]
        if known:
            said.append(f"{init} {min(known):.2f} to {max(known):.2f}")
    layout = layout_of(280, xaxis={"title": {"text": "layer"}}, yaxis={"title": {"text": "ratio"}})
    layout["yaxis"]["range"] = [0, 1.06 * _tallest(figures)]
    layout["xaxis"] |= {"tickformat": "d", "range": [0.5, len(layers) + 0.5]}
    alt = f"Interference ratio by layer, {kind}, {STAGES[stage]}: {'; '.join(said) or 'not measured'}."
    return Panel(STAGES[stage], alt, data, layout)


def _tallest(figures: Figures) -> float:
    """Return the largest ratio of any init, stage and layer: every panel and view shares one axis."""
    found = [figures.responses(init, stage) for init in figures.inits for stage in figures.stages]
    ratios = np.concatenate([off_diagonal_mean(responses) for responses in found if responses is not None])
    return float(np.max(ratios, initial=0.0, where=np.isfinite(ratios))) or 1.0


def _layer_table(figures: Figures, stage: Stage) -> Table:
    columns = {}
    for init in figures.inits:
        responses = figures.responses(init, stage)
        if responses is not None:
            columns[init] = [number(value, 3) for value in off_diagonal_mean(responses)]
    rows = tuple((layer, *(column[index] for column in columns.values())) for index, layer in enumerate(figures.layers))
    return Table(f"Interference ratio by layer, {STAGES[stage]}", ("layer", *columns), rows)
