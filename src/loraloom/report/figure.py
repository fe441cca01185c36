"""What charts are made of: plotly figures in plain data, one colour and marker per init, colours as names of the theme.

A colour is written `var(--name)`; the page's script puts in the value of the theme in force. Every trace belongs to
an init through `legendgroup`, the init's index.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loraloom.report.aggregate import Figures
from loraloom.report.tables import Table

Json = dict[str, Any]
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "star", "hexagon")
DASHES = ("solid", "dash", "dot")


@dataclass(frozen=True)
class Panel:
    """One plotly drawing: its heading, the sentence that stands for it, and its figure."""

    title: str
    alt: str
    data: list[Json]
    layout: Json


@dataclass(frozen=True)
class View:
    """What one button of a chart's selector shows: as many panels in every view of a chart."""

    label: str
    panels: list[Panel]


@dataclass(frozen=True)
class Chart:
    """A section of the page: heading, what to look for, views, the tables of its data, and what its marks mean."""

    id: str
    title: str
    caption: str
    views: list[View]
    tables: list[Table]
    selector: str = ""
    keys: tuple[tuple[str, str], ...] = ()
    legend: bool = True


def line(figures: Figures, init: str, x: Sequence[float], y: Sequence[float | None]) -> Json:
    index = figures.inits.index(init)
    color = color_of(index)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": plain(init),
        "legendgroup": str(index),
        "x": list(x),
        "y": list(y),
        "line": {"color": color, "width": 2, "dash": DASHES[index // len(SYMBOLS) % len(DASHES)]},
        "marker": {"symbol": symbol_of(index), "size": 7, "color": color, "opacity": 1, "line": {"width": 0}},
    }


def layout_of(height: int, **axes: Json) -> Json:
    axis: Json = {"gridcolor": "var(--grid)", "zerolinecolor": "var(--grid)", "fixedrange": True, "automargin": True}
    return {
        "height": height,
        "xaxis": axis | axes.get("xaxis", {}),
        "yaxis": axis | axes.get("yaxis", {}),
        "margin": {"l": 48, "r": 12, "t": 8, "b": 44},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "var(--text)"},
        "hoverlabel": {"bgcolor": "var(--panel)", "font": {"color": "var(--text)"}, "bordercolor": "var(--grid)"},
        "dragmode": False,
        "showlegend": False,
    }


def padded(values: Sequence[float]) -> list[float]:
    pad = 0.06 * (max(values) - min(values)) or 1.0
    return [min(values) - pad, max(values) + pad]


def color_of(init: int) -> str:
    """Return the theme's colour of an init."""
    return f"var(--init-{init % len(SYMBOLS)})"


def symbol_of(init: int) -> str:
    """Return the marker of an init; colour and marker together are its own for 64 inits."""
    return SYMBOLS[(init + init // len(SYMBOLS)) % len(SYMBOLS)]


def finite(value: float) -> float | None:
    return round(float(value), 4) if math.isfinite(value) else None


def plain(text: str) -> str:
    """Escape text for plotly, which reads a few HTML tags in labels."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
