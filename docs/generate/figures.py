"""The figures of docs/theory.md as SVG; `python docs/generate/figures.py` draws them anew.

Colours are CSS variables, so that a page may set them; alone, a figure follows the reader's light or dark theme.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FOLDER = Path(__file__).parent.parent / "figures"
Points = NDArray[np.float64]

_LIGHT = "--ink:#1f2328;--soft:#6b7280;--own:#0b62b8;--other:#b4470b;--fill:#0b62b81f;--warm:#b4470b1f"
_DARK = "--ink:#e6e8eb;--soft:#9aa4b2;--own:#6cb2ff;--other:#ffa366;--fill:#6cb2ff26;--warm:#ffa36626"
_STYLE = (
    f"svg.loraloom{{{_LIGHT}}}@media(prefers-color-scheme:dark){{svg.loraloom{{{_DARK}}}}}"
    "svg.loraloom text{font:14px system-ui,sans-serif;fill:var(--ink)}"
)
WIDE = 480  # of every figure: text stays legible on a phone


def figures() -> dict[str, str]:
    """Return every figure as the text of an SVG file, by its name without the ending."""
    drawn: tuple[Callable[[], str], ...] = (interference, scale, factors, core, distil)
    return {one.__name__: one() for one in drawn}


def interference() -> str:
    """Draw inputs of two tasks, and what a row of A answers to each: at random, and off the other's loud direction."""
    random = np.random.default_rng(3)
    own = random.normal(size=(70, 2)) @ np.array([[0.85, 0.45], [0.45, 0.85]])
    other = random.normal(size=(70, 2)) @ np.array([[1.5, 0.0], [0.0, 0.3]])
    parts = []
    for left, title, angle in ((0, "A at random", 35.0), (240, "A off what is loud there", 90.0)):
        a = np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))])
        x, y = left + 118.0, 130.0
        parts += [text(left + 118, 18, title, "middle", weight=600)]
        parts += [dots(x + 30 * other[:, 0], y - 30 * other[:, 1], "other")]
        parts += [dots(x + 30 * own[:, 0], y - 30 * own[:, 1], "own")]
        parts += [arrow(x - 78 * a[0], y + 78 * a[1], x + 78 * a[0], y - 78 * a[1], "ink")]
        parts += [text(x + 78 * a[0] + 8, y - 78 * a[1] + 5, "a")]
        for row, (name, points) in enumerate((("own", own), ("other", other))):
            size = float(np.sqrt(np.mean((points @ a) ** 2)))
            at = 246 + 26 * row
            parts += [text(left + 78, at + 5, f"{name}", "end"), bar(left + 86, at - 7, 80 * size, name)]
            parts += [text(left + 92 + 80 * size, at + 5, f"{size:.2f}")]
    parts += [text(WIDE / 2, 298, "root mean square of a·x over each task's inputs", "middle", "soft")]
    told = "Two tasks' inputs as clouds of points; an arrow, a row of A; bars tell how loudly it answers to each."
    return svg(310, told, parts)


def scale() -> str:
    """Draw how far a merged model is from a task's own, by the scale: what is lost of its own, what others add."""
    left, bottom, wide, high = 52.0, 220.0, 400.0, 180.0
    scales = np.linspace(0, 1, 51)
    parts = [line(left, bottom, left + wide, bottom, "soft"), line(left, bottom, left, bottom - high - 10, "soft")]
    parts += [text(left + wide * at, bottom + 18, f"{at:g}", "middle") for at in (0, 0.5, 1)]
    parts += [text(left + wide / 2, bottom + 38, "scale λ of the sum", "middle", "soft")]
    own, others = (1 - scales) ** 2, 0.8 * scales**2
    for values, colour, label, at, anchor in (
        (own, "own", "missing: (1 - λ)²", (62, 186), "start"),
        (others, "other", "added: c λ²", (452, 186), "end"),
        (own + others, "ink", "distance from the task's own model", (252, 48), "middle"),
    ):
        points = " ".join(f"{left + wide * s:.1f},{bottom - high * v:.1f}" for s, v in zip(scales, values, strict=True))
        parts += [f'<polyline points="{points}" fill="none" stroke="var(--{colour})" stroke-width="2.2"/>']
        parts += [text(*at, label, anchor, colour)]
    best = float(scales[np.argmin(own + others)])
    x, y = left + wide * best, bottom - high * float(np.min(own + others))
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="var(--ink)"/>']
    parts += [text(x, y - 28, f"least at 1 / (1 + c) = {1 / 1.8:.2f}", "middle")]
    told = "Two parabolas over the scale, one falling, one rising, and their sum with its least value between."
    return svg(270, told, parts)


def factors() -> str:
    """Draw why the sum of two updates is their factors side by side, and not the product of summed factors."""
    parts = [text(0, 16, "The sum of two updates, exactly:", weight=600)]
    x, y = 0.0, 34.0
    for index, colour in ((1, "own"), (2, "other")):
        parts += [box(x, y, 22, 76, f"B{index}", colour), box(x + 28, y, 76, 22, f"A{index}", colour)]
        parts += [text(x + 122, y + 44, "+" if index == 1 else "=", "middle")]
        x += 140
    parts += [box(x, y, 22, 76, "B1", "own"), box(x + 22, y, 22, 76, "B2", "other")]
    parts += [box(x + 52, y, 76, 22, "A1", "own"), box(x + 52, y + 22, 76, 22, "A2", "other")]
    parts += [text(x + 136, y + 28, "rank"), text(x + 136, y + 46, "r1 + r2")]
    parts += [text(0, 146, "Summing A and B apart adds what nobody trained:", weight=600)]
    parts += [text(0, 174, "(B1 + B2)(A1 + A2) =")]
    x = 160.0
    for left, right, crossed in (("B1", "A1", False), ("B2", "A2", False), ("B1", "A2", True), ("B2", "A1", True)):
        colours = ("own" if left == "B1" else "other", "own" if right == "A1" else "other")
        parts += [box(x, 156, 28, 28, left, colours[0]), box(x + 28, 156, 28, 28, right, colours[1])]
        parts += [text(x + 68, 175, "+", "middle")] if right != "A1" or left == "B1" else []
        if crossed:
            parts += [line(x, 190, x + 56, 190, "ink")]
        x += 80
    parts += [text(400, 208, "cross terms", "end")]
    told = "The sum of two products B A is one product of stacked factors; summed factors have cross terms."
    return svg(218, told, parts)


def core() -> str:
    """Draw an update in factor space: thin orthonormal bases around a small core, on which a rule works."""
    parts = [text(0, 16, "No m × n matrix is ever made:", weight=600)]
    parts += [box(0, 36, 44, 150, "B", "own"), text(22, 204, "m × R", "middle", "soft")]
    parts += [box(52, 36, 118, 44, "A", "own"), text(111, 98, "R × n", "middle", "soft")]
    parts += [text(192, 112, "=", "middle")]
    parts += [box(214, 36, 44, 150, "Q", "soft"), text(236, 204, "m × R", "middle", "soft")]
    parts += [box(268, 36, 44, 44, "core", "other"), text(290, 98, "R × R", "middle", "soft")]
    parts += [box(322, 36, 118, 44, "P", "soft"), text(381, 98, "R × n", "middle", "soft")]
    parts += [text(268, 136, "The rule sees the core alone;"), text(268, 156, "R is the sum of the ranks.")]
    told = "A tall box B times a flat box A equals a tall box Q, a small square called core, and a flat box P."
    return svg(216, told, parts)


def distil() -> str:
    """Draw a distillation: single models answer each task's texts, and the merged adapter learns to answer so."""
    parts = []
    for row, (name, colour) in enumerate((("task 1", "own"), ("task 2", "other"))):
        y = 14.0 + 92 * row
        parts += [box(0, y, 96, 46, f"texts, {name}", colour, size=13)]
        parts += [arrow(96, y + 23, 126, y + 23, "ink"), box(130, y, 128, 46, "base + adapter", colour, size=13)]
        parts += [text(194, y + 64, "frozen", "middle", "soft")]
        parts += [arrow(258, y + 23, 310, y + 23, "ink"), text(284, y + 16, "answer", "middle", "soft", size=12)]
    parts += [box(314, 14, 66, 138, "how far?", "ink", size=13)]
    parts += [box(130, 218, 128, 46, "base + merge", "ink", size=13), text(194, 282, "A and B learn", "middle", "soft")]
    parts += [text(54, 196, "the same"), text(54, 214, "texts")]
    parts += [path("M48 152 L48 241 L126 241"), path("M258 241 L347 241 L347 156")]
    parts += [path("M380 83 L430 83 L430 310 L194 310 L194 290"), text(424, 330, "gradient", "end", "soft")]
    told = "Each task's texts go through its single model and through the merged one, which the distance trains."
    return svg(340, told, parts)


def svg(high: float, told: str, parts: Iterable[str]) -> str:
    """Return a figure of WIDE x `high`, with what it shows in words for who cannot see it."""
    head = '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    tip = f'<defs>{head}<path d="M0 0 L8 4 L0 8z" fill="var(--ink)"/></marker></defs>'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" class="loraloom" viewBox="0 0 {WIDE} {high:g}" role="img"'
    return "\n".join([f'{start} aria-label="{escape(told)}"><style>{_STYLE}</style>{tip}', *parts, "</svg>\n"])


def text(
    x: float, y: float, words: str, anchor: str = "start", colour: str = "ink", *, size: int = 14, weight: int = 400
) -> str:
    """Return words at a place: their baseline's start, middle or end."""
    style = f"fill:var(--{colour});font-size:{size}px;font-weight:{weight}"
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" style="{style}">{escape(words)}</text>'


def box(x: float, y: float, wide: float, high: float, words: str, colour: str, *, size: int = 14) -> str:
    """Return a box with words in its middle."""
    fill = {"own": "var(--fill)", "other": "var(--warm)"}.get(colour, "none")
    drawn = f'<rect x="{x + 1:g}" y="{y:g}" width="{wide - 2:g}" height="{high:g}" rx="2"'
    return f'{drawn} fill="{fill}" stroke="var(--{colour})" stroke-width="1.4"/>' + text(
        x + wide / 2, y + high / 2 + 5, words, "middle", size=size
    )


def line(x: float, y: float, to_x: float, to_y: float, colour: str) -> str:
    """Return a line."""
    return f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" stroke="var(--{colour})" stroke-width="1.4"/>'


def arrow(x: float, y: float, to_x: float, to_y: float, colour: str) -> str:
    """Return a line with a tip."""
    ends = f'x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}"'
    return f'<line {ends} stroke="var(--{colour})" stroke-width="2" marker-end="url(#tip)"/>'


def path(steps: str) -> str:
    """Return a bent line with a tip."""
    return f'<path d="{steps}" fill="none" stroke="var(--ink)" stroke-width="2" marker-end="url(#tip)"/>'


def bar(x: float, y: float, wide: float, colour: str) -> str:
    """Return a bar that goes to the right."""
    return f'<rect x="{x:g}" y="{y:g}" width="{wide:.1f}" height="14" fill="var(--{colour})"/>'


def dots(x: Points, y: Points, colour: str) -> str:
    """Return a dot for each point."""
    places = "".join(f"M{a:.1f} {b:.1f}h.01" for a, b in zip(x, y, strict=True))
    return f'<path d="{places}" stroke="var(--{colour})" stroke-width="4" stroke-linecap="round" opacity=".65"/>'


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, drawn in figures().items():
        (FOLDER / f"{name}.svg").write_text(drawn, encoding="utf-8")
