"""What commands say: results on standard output, hints on standard error, as text, as JSON, or not at all."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loraloom.errors import LoraloomError
from loraloom.progress import Reporter

if TYPE_CHECKING:
    from loraloom.report import SummaryRow
    from loraloom.report.aggregate import Merged
    from loraloom.results import Score, StudyResult


class Out:
    """One command's output: `--json` prints one JSON object, `--quiet` only what was asked for."""

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self._out = Console(highlight=False)
        self._err = Console(stderr=True, highlight=False)

    def result(self, facts: Mapping[str, Any], text: str = "") -> None:
        """Print the command's result: `facts` as JSON, or `text`, or the facts a line each."""
        if self.as_json:
            self._out.file.write(json.dumps(facts, indent=1, default=str) + "\n")
        elif not self.quiet:
            shown = text or "\n".join(lines(facts))
            self._out.print(escape(shown), soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table for people; nothing with --json, where `result` tells all."""
        if self.as_json or self.quiet:
            return
        table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for index, column in enumerate(columns):
            # where the terminal is narrow, the first column gives way
            table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index > 0)
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        self._out.print(table)

    def hint(self, text: str) -> None:
        """Tell what may be done next, on standard error."""
        if not (self.quiet or self.as_json):
            self._err.print(f"[dim]{escape(text)}[/dim]", soft_wrap=True)

    def progress(self) -> Reporter:
        """Return the progress display that fits."""
        return Reporter(quiet=self.quiet or self.as_json)


def lines(facts: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Yield facts as lines, those within facts set in."""
    for key, value in facts.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{key}:"
            yield from lines(value, f"{indent}  ")
        else:
            yield f"{indent}{key}: {value if value not in ({}, None) else 'none'}"


def show_error(error: LoraloomError) -> None:
    """Print an error with its hint on standard error."""
    console = Console(stderr=True, highlight=False)
    console.print(f"[bold red]error:[/bold red] {escape(error.message)}", soft_wrap=True)
    if error.hint:
        console.print(f"  [dim]next:[/dim] {escape(error.hint)}", soft_wrap=True)


def study_table(rows: Sequence[SummaryRow]) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """Return title, columns and rows of a study's summary, short enough for 80 characters."""
    rules = {merged.rule for row in rows for merged in (row.as_trained, row.aligned) if merged}
    legend = "".join(f", {_short(rule)}: {rule}" for rule in sorted(rules) if _short(rule) != rule)
    columns = ("init", "single", "merged", "kept", "+ aligned", "kept", "interference")
    shown: list[tuple[str, ...]] = [
        (
            row.init,
            _points(row.single),
            *_merged(row.as_trained),
            *_merged(row.aligned),
            f"{_number(row.interference_before)} → {_number(row.interference_after)}",
        )
        for row in rows
    ]
    return f"Averages over tasks with rule and scale{legend}", columns, shown


def rules_table(result: StudyResult) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """Return title, columns and rows of a comparison of rules, the best on held-out rows first."""
    from loraloom.report import merged_rows

    rows = sorted(merged_rows(result), key=lambda row: (row.aligned, -(row.heldout or 0.0)))
    columns = ("rule", "heads", "average", "kept", "scale", "rank")
    shown: list[tuple[str, ...]] = [
        (
            row.label,
            "aligned" if row.aligned else "as trained",
            f"{_points(row.average)} ±{100 * row.average.stderr:.1f}",
            f"{100 * row.kept:.1f}%",
            ", ".join(f"{scale:g}" for scale in row.scales),
            ", ".join(map(str, row.output_ranks)),
        )
        for row in rows
    ]
    return "Test rows; scales chosen on held-out rows, with their labels", columns, shown


def explanation(found: Mapping[str, Any]) -> str:
    """Return what `Store.explain` found as an indented list."""
    options = [f"  {name}: {json.dumps(value)}" for name, value in found["options"].items()]
    return "\n".join([str(found["output"]), *options, *_inputs(found["inputs"], 1)])


def _inputs(inputs: Mapping[str, Any], depth: int) -> list[str]:
    lines = []
    for name, one in inputs.items():
        lines.append(f"{'  ' * depth}{name}: {one['output']}" + ("" if one["present"] else "  MISSING"))
        lines += _inputs(one.get("inputs", {}), depth + 1)
    return lines


def _merged(merged: Merged | None) -> tuple[str, str]:
    """Return score with rule and scale, and share kept."""
    if merged is None:
        return "-", "-"
    low, high = min(merged.scales), max(merged.scales)
    scale = f"{low:.2g}" if low == high else f"{low:.2g}-{high:.2g}"
    return f"{_points(merged.average)} {_short(merged.rule)} {scale}", f"{100 * merged.kept:.0f}%"


def _short(rule: str) -> str:
    """Return the initials of a rule of several words."""
    words = rule.split("_")
    return rule if len(words) == 1 else "".join(word[:1] for word in words)


def _points(score: Score | None) -> str:
    return "-" if score is None else f"{100 * score.value:.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def hush_libraries() -> None:
    """Silence what libraries print and warn while they load and save; faults still come as exceptions.

    Call before the libraries are imported: their progress bars are switched off by environment variables.
    """
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    logging.disable(logging.WARNING)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        # a rule plugin that cannot be loaded, for one
        warnings.filterwarnings("default", module="loraloom")
