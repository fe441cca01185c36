"""The page of a screening: every detector's score of every adapter, and what each number was compared with."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from loraloom.files.atomic import write_text
from loraloom.files.outputs import check_file
from loraloom.report.figure import Json, layout_of, plain

MARK = b'<meta name="generator" content="loraloom screen">'  # by which the page is known
_HERE = Path(__file__).parent
_TOP = 3.0  # times a detector's first threshold: the darkest colour
_HEAT = [[step / 4, f"var(--heat-{step})"] for step in range(5)]


def check_screen_page(path: Path, *, overwrite: bool, inputs: Iterable[Path]) -> None:
    """Raise LoraloomError where the page must not be written."""
    check_file(path, mark=MARK, overwrite=overwrite, inputs=inputs)


def write_screen_page(facts: Mapping[str, Any], path: Path, *, overwrite: bool = False) -> Path:
    """Write the facts of `loraloom screen --json` as one self-contained page, and return it."""
    write_text(path, render_screen(facts), mark=MARK, overwrite=overwrite)
    return path


def render_screen(facts: Mapping[str, Any]) -> str:
    """Return the page's HTML."""
    adapters = facts["adapters"]
    data, layout = _heat(adapters)
    figures = {"scores": [[{"alt": "Scores of every adapter by detector", "data": data, "layout": layout}]]}
    specification = json.dumps(figures, allow_nan=False).replace("<", "\\u003c")
    sections = "".join(_section(one) for one in adapters)
    counts = ", ".join(
        f"{sum(one['verdict'] == word for one in adapters)} {word}" for word in ("pass", "look", "refuse")
    )
    policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">{MARK.decode()}
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>loraloom screen</title><link rel="icon" href="data:,">
<style>{(_HERE / "style.css").read_text(encoding="utf-8")}</style></head>
<body><header><p class="kicker">loraloom screen</p><h1>{counts}</h1>
<p class="verdict">Each adapter against {facts["compared"]} others. A screen, no protection: what was poisoned and not
amplified leaves little in the weights, and who knows these checks can pass them.</p></header>
<main><section><h2>What is out of the ordinary?</h2><figure data-chart="scores"><figcaption>A cell is a detector's score
over the score from which it says "look": 1 and above speaks against the adapter.</figcaption>
<div class="across"><div class="plot" data-panel role="img"></div></div></figure></section>{sections}</main>
<script>{get_plotlyjs()}</script><script type="application/json" id="figures">{specification}</script>
<script>{(_HERE / "page.js").read_text(encoding="utf-8")}</script></body></html>
"""


def _heat(adapters: list[dict[str, Any]]) -> tuple[list[Json], Json]:
    detectors = list(dict.fromkeys(finding["detector"] for one in adapters for finding in one["findings"]))
    scores = [{finding["detector"]: finding for finding in one["findings"]} for one in adapters]
    cells = [
        [round(one[name]["score"] / one[name]["look"], 3) if name in one else None for name in detectors]
        for one in scores
    ]
    told = [[plain(one[name]["reason"]) if name in one else "" for name in detectors] for one in scores]
    trace: Json = {
        "type": "heatmap",
        "x": detectors,
        "y": [plain(one["name"]) for one in adapters],
        "z": cells,
        "text": told,
        "zmin": 0,
        "zmax": _TOP,
        "colorscale": _HEAT,
        "showscale": False,
        "xgap": 2,
        "ygap": 2,
        "hovertemplate": "%{y}, %{x}: %{z}<br>%{text}<extra></extra>",
    }
    axis = {"tickangle": -40, "type": "category"}
    return [trace], layout_of(170 + 26 * len(adapters), xaxis=axis, yaxis={"autorange": "reversed", "type": "category"})


def _section(one: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{html.escape(finding["detector"])}</th><td>{finding["verdict"]}</td>'
        f'<td class="number">{finding["score"]:.3g}</td><td class="reason">{html.escape(finding["reason"])}</td></tr>'
        for finding in sorted(one["findings"], key=lambda finding: -finding["score"] / finding["look"])
    )
    head = "".join(f'<th scope="col">{column}</th>' for column in ("detector", "verdict", "score", "what it saw"))
    title = f"{html.escape(one['name'])}: {one['verdict']}"
    return (
        f'<section><h2>{title}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></section>"
    )
