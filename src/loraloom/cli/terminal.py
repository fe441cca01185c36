"""What commands say: results on standard output, hints on standard error, as text, as JSON, or not at all."""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loraloom.errors import LoraloomError, printable
from loraloom.progress import Reporter

if TYPE_CHECKING:
    from loraloom.report.aggregate import Merged
    from loraloom.results import Score, StudyResult


class Out:
    """One command's output: `--json` prints one JSON object, `--quiet` only what was asked for.

    Every text passes `printable`: names out of strangers' files must not steer the terminal.
    """

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self._out = Console(highlight=False)
        self._err = Console(stderr=True, highlight=False)

    @property
    def _for_people(self) -> bool:
        return not (self.as_json or self.quiet)

    def result(self, facts: Mapping[str, Any], text: str | None = None) -> None:
        """Print the command's result: `facts` as JSON, or `text` for people; without it the facts, a line each."""
        if self.as_json:
            self._out.file.write(json.dumps(plain(facts), indent=1, allow_nan=False) + "\n")
        elif self._for_people and text != "":
            self._out.print(Text(printable("\n".join(lines(facts)) if text is None else text)), soft_wrap=True)

    def say(self, text: str) -> None:
        """Print a sentence for people, wrapped where the line ends."""
        if self._for_people:
            self._out.print(Text(printable(text)))
            self._out.print()

    def facts(self, title: str, facts: Iterable[tuple[str, str]]) -> None:
        """Print facts for people, a line each under a title: what, and what it is."""
        if not self._for_people:
            return
        grid = Table.grid(padding=(0, 2), pad_edge=False)
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for what, value in facts:
            grid.add_row(Text(f"  {_cell(what)}", style="dim"), _cell(value))
        self._out.print(Text(printable(title), style="bold"), grid, sep="\n")
        self._out.print()

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table for people, as wide as the terminal at most; nothing with --json, where `result` tells all.

        Where it does not fit, columns are numbered and told below the title; where that is too wide too, it is parted.
        """
        if not self._for_people:
            return
        wide, heads, legend = self._out.width, list(columns), ""
        cells = [max([len(printable(row[index])) for row in rows], default=0) for index in range(len(columns))]
        if sum(_widths(heads, cells)) > wide:
            long = [index for index, head in enumerate(heads) if index and len(head) > max(cells[index], 4)]
            legend = ", ".join(f"{count} {heads[index]}" for count, index in enumerate(long, start=1))
            for count, index in enumerate(long, start=1):
                heads[index] = str(count)
        self._out.print(Text(printable(title), style="bold"))
        if legend:
            self._out.print(Text(printable(legend), style="dim"))
        for part in _parts(_widths(heads, cells), wide):
            self._print_table([heads[index] for index in part], [[row[index] for index in part] for row in rows])

    def _print_table(self, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for index, head in enumerate(heads):
            # where the terminal is narrow, the first column gives way
            justify: Literal["left", "right"] = "left" if index == 0 else "right"
            table.add_column(_cell(head), justify=justify, no_wrap=index > 0, overflow="fold")
        for row in rows:
            table.add_row(*map(_cell, row))
        self._out.print(table)
        self._out.print()

    def hint(self, text: str) -> None:
        """Tell what is good to know, on standard error."""
        if self._for_people:
            self._err.print(Text(printable(text), style="dim"))

    def warn(self, text: str) -> None:
        """Tell what may do harm, on standard error."""
        if self._for_people:
            self._err.print(Text.assemble(("warning: ", "yellow"), printable(text)))

    def next(self, what: str, *words: object) -> None:
        """Tell the command to type next, and what it does, on standard error; `words` are quoted for the shell."""
        if self._for_people:
            self._err.print(Text.assemble(("next: ", "dim"), printable(f"{what}:")))
            self._err.print(Text(as_typed(words, self._err.width)), soft_wrap=True)

    @contextmanager
    def goes_on(self) -> Iterator[None]:
        """Tell, where the work inside is stopped by Ctrl-C or its like, that the same command goes on with it."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            self.hint("stopped; the same command goes on where this one stood")
            raise

    def progress(self) -> Reporter:
        """Return the progress display that fits."""
        return Reporter(quiet=not self._for_people)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning in one line on standard error, in place of Python's two."""
    console = Console(stderr=True, highlight=False)
    console.print(Text.assemble(("note: ", "yellow"), printable(str(message))), soft_wrap=True)


def as_typed(words: Iterable[object], width: int) -> str:
    """Return a command as it can be pasted into a shell, in lines of at most `width` where its words allow."""
    typed = [""]
    for word in (printable(shlex.quote(str(word))) for word in words):
        if len(typed[-1]) + len(word) + 3 > width and typed[-1].strip():
            typed.append(f"     {word}")
        else:
            typed[-1] += f" {word}" if typed[-1] else f"  {word}"
    return " \\\n".join(typed)


def plain(value: Any) -> Any:
    """Return `value` as JSON knows it: numbers that are not finite as None, what it has no word for as text."""
    if hasattr(value, "tolist"):  # a tensor
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


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
    console.print(Text.assemble(("error:", "bold red"), " ", printable(error.message)), soft_wrap=True)
    if error.hint:
        console.print(Text.assemble(("  next:", "dim"), " ", printable(error.hint)), soft_wrap=True)


def _widths(heads: Sequence[str], cells: Sequence[int]) -> list[int]:
    """Return the characters that each column of a table takes; the first one gives way down to twelve."""
    first = min(max(len(heads[0]), cells[0]), 12)
    return [first, *(max(len(head), width) + 3 for head, width in zip(heads[1:], cells[1:], strict=True))]


def _parts(widths: Sequence[int], wide: int) -> list[list[int]]:
    """Return the columns of each part of a table that fits: the first one in each."""
    parts = [[0]]
    for index, width in enumerate(widths[1:], start=1):
        if len(parts[-1]) > 1 and sum(widths[i] for i in parts[-1]) + width > wide:
            parts.append([0])
        parts[-1].append(index)
    return parts


def _cell(text: str) -> Text:
    """Return what stands in a cell of a table: one line."""
    return Text(printable(text).replace("\n", "\\n"))


def rules_table(result: StudyResult) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """Return title, columns and rows of a comparison of rules, the best on held-out rows first.

    Of answers the base model and each task's own adapter stand before them, and what is kept of the latter beside
    the average.
    """
    from loraloom.report import base_average, merged_rows
    from loraloom.report.aggregate import Figures
    from loraloom.report.tables import BASE, OWN
    from loraloom.results import average

    rows = sorted(merged_rows(result), key=lambda row: (row.aligned, -(row.heldout or 0.0)))
    base, shares = base_average(result), Figures(result).shares
    shown: list[tuple[str, ...]] = [
        (
            row.label,
            *(() if base else ("aligned" if row.aligned else "as trained",)),
            _points(row.average),
            *(share_cells(row, shares) if base else (f"{100 * row.kept:.1f}%",)),
            ", ".join(f"{scale:g}" for scale in row.scales),
            ", ".join(map(str, row.output_ranks)),
        )
        for row in rows
    ]
    chosen = any(row.chosen_by == "labels" for row in rows)
    title = "Test rows; scales chosen on held-out rows" if chosen else "Test rows"
    if not base:
        heads = ("rule", "heads", "average", "kept", "scale", "rank")
        return f"{title}, with their labels" if chosen else title, heads, shown
    own = average(single.score for single in result.singles)
    alone: list[tuple[str, ...]] = [
        (BASE, _points(base), *base_cells(shares), "", "", ""),
        (OWN, _points(own), *["100%" for _ in shares], "", "", ""),
    ]
    columns = ("rule", "average", *shares, "worst task", "scale", "rank")
    return f"{title} by {shares[0]}, of their right answers" if chosen else title, columns, alone + shown


def share_cells(row: Merged | None, shares: Sequence[str]) -> tuple[str, ...]:
    """Return what a merged adapter keeps of the single ones: every share's mean, and the worst task of the first."""
    if row is None or row.share is None:
        return tuple("-" for _ in [*shares, ""])
    task, least = row.share.worst
    means = [f"{100 * row.shares[name].average.value:.0f}%" if name in row.shares else "-" for name in shares]
    return (*means, f"{100 * least.value:.0f}% {task}")


def base_cells(shares: Sequence[str]) -> tuple[str, ...]:
    """Return what the base model recovers of them by definition."""
    return tuple("0%" if name == "recovered loss" else "" for name in shares)


def _points(score: Score) -> str:
    return f"{100 * score.value:.1f} ±{100 * score.stderr:.1f}"


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
