"""What commands say: results on standard output, hints on standard error, as text, as JSON, or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loraloom.errors import LoraloomError
from loraloom.progress import Reporter


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
            shown = text or "\n".join(f"{key}: {value}" for key, value in facts.items())
            self._out.print(escape(shown), soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table for people; nothing with --json, where `result` tells all."""
        if self.as_json or self.quiet:
            return
        table = Table(title=title, title_justify="left", header_style="bold")
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right")
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


def show_error(error: LoraloomError) -> None:
    """Print an error with its hint on standard error."""
    console = Console(stderr=True, highlight=False)
    console.print(f"[bold red]error:[/bold red] {escape(error.message)}", soft_wrap=True)
    if error.hint:
        console.print(f"  [dim]next:[/dim] {escape(error.hint)}", soft_wrap=True)


def hush_libraries() -> None:
    """Silence what libraries print while they load and save; their faults still come as exceptions."""
    import datasets
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()
    disable_progress_bars()
