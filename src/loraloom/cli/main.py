"""The command line: what there is to type, in the order of the work.

Each command is one short function in the file of its family: it calls public functions and prints what they return.
"""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

import loraloom
from loraloom.cli.chat import chat
from loraloom.cli.check import check
from loraloom.cli.common import Commands, stop_at_signals
from loraloom.cli.compare import compare
from loraloom.cli.distil import distil
from loraloom.cli.doctor import doctor
from loraloom.cli.inspect import inspect
from loraloom.cli.list import list_
from loraloom.cli.merge import RULE_OPTIONS, RuleCommand, align, merge, rules
from loraloom.cli.push import push
from loraloom.cli.run import demo, run
from loraloom.cli.screen import screen
from loraloom.cli.serve import export, serve_check
from loraloom.cli.start import init, train
from loraloom.cli.statistics import atlas, statistics_app
from loraloom.cli.study import evaluate, report, study_app

app = typer.Typer(
    name="loraloom",
    cls=Commands,
    help="LoRA adapters that merge: start each task's adapter apart from the others, merge them into one, measure it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

TRY, BEFORE, MERGE, MEASURE = "Try it", "Before training", "Train and merge", "Measure and repeat"
app.command(rich_help_panel=TRY)(demo)
app.command(rich_help_panel=TRY)(doctor)
app.add_typer(statistics_app, name="statistics", rich_help_panel=BEFORE)
app.command(rich_help_panel=BEFORE)(atlas)
app.command(rich_help_panel=BEFORE)(inspect)
app.command(rich_help_panel=BEFORE)(init)
app.command(rich_help_panel=MERGE)(train)
app.command("list", rich_help_panel=MERGE)(list_)
app.command(rich_help_panel=MERGE)(screen)
app.command(cls=RuleCommand, context_settings=RULE_OPTIONS, rich_help_panel=MERGE)(merge)
app.command(rich_help_panel=MERGE)(distil)
app.command(rich_help_panel=MERGE)(rules)
app.command(rich_help_panel=MERGE)(check)
app.command(rich_help_panel=MERGE)(align)
app.command(rich_help_panel=MERGE)(export)
app.command(rich_help_panel=MERGE)(push)
app.command(rich_help_panel=MEASURE)(evaluate)
app.command(rich_help_panel=MEASURE)(chat)
app.command("serve-check", rich_help_panel=MEASURE)(serve_check)
app.command(rich_help_panel=MEASURE)(compare)
app.command(rich_help_panel=MEASURE)(run)
app.command(rich_help_panel=MEASURE)(report)
app.add_typer(study_app, name="study", rich_help_panel=MEASURE)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"loraloom {loraloom.__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line: a fault in the input exits with 2 and no traceback, a signal n with 128 + n."""
    stop_at_signals()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what a terminal of few characters cannot show
    try:
        app(prog_name="loraloom")
    except KeyboardInterrupt:
        sys.exit(130)
