"""What the commands share: their common options, and the tone in which they are run."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperGroup

import loraloom
from loraloom.cli.completion import words
from loraloom.errors import LoraloomError, did_you_mean, file_of

if TYPE_CHECKING:
    from loraloom.cli.terminal import Out
    from loraloom.study.recipe import Recipe

# of click, or of the copy of it that newer versions of typer bring
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object, for programs.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write. It appears whole or not at all.")]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace an earlier result of the same kind; nothing else ever is."),
]
RecipeOption = Annotated[Path, typer.Option("--recipe", help="Recipe in YAML that names the base model and the tasks.")]
Base = Annotated[
    str | None, typer.Option("--base", help="Base model in place of the recipe's: hub name or local folder.")
]
Columns = Annotated[
    list[str] | None,
    typer.Option("--column", help="Column of a text in --unlabelled, `text` without it; twice for a pair of texts."),
]
ToOption = Annotated[
    str | None,
    typer.Option(
        "--to",
        metavar="peft|diffusers|kohya|mlx",
        autocompletion=words("peft", "diffusers", "kohya", "mlx"),
        help="Tool whose files are written: see docs/dialects.md. Without it that of the adapters.",
    ),
]
ServerOption = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="vllm|sglang|llamacpp|ollama",
        autocompletion=words("vllm", "sglang", "llamacpp", "ollama"),
        help="Server to write the adapter for: one rank that it takes in every layer, alpha the same, no heads; or why "
        "it would not take it. docs/serving.md tells what each takes.",
    ),
]
NormaliseOption = Annotated[
    str,
    typer.Option(
        "--normalise",
        autocompletion=words("auto", "none", "norm", "response"),
        help="Make all equally loud in each layer, before the weights: `norm` by |dW|, `response` by what each does to "
        "its own inputs, which takes statistics or a recipe. `none` leaves them; `auto` is `norm` where their energies "
        "differ more than 3-fold and no weights are given, for rules that see updates alone.",
    ),
]
ReportTo = Annotated[
    list[str] | None,
    typer.Option(
        "--report-to", help="Where training's curves go too: tensorboard, wandb, mlflow ... Give it once for each."
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the study. Every task draws its own from it.")]

_Value = TypeVar("_Value", float, str)


class Commands(TyperGroup):
    """The commands: words that none of them takes are told as every other fault is."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run the command that was typed, and exit with its status."""
        from loraloom.cli.terminal import show_error

        try:
            status = super().main(*args, standalone_mode=False, **extra)  # type: ignore[misc]
        except _USAGE_ERROR as error:
            if type(error).__name__ != "NoArgsIsHelpError":  # the help was its message
                show_error(_misuse(error))
            sys.exit(2)
        if standalone_mode:
            sys.exit(status or 0)
        return status


def _misuse(error: Any) -> LoraloomError:
    """Return what to tell of words that a command does not take."""
    message = error.format_message().replace("Value error, ", "").replace(": Input should", ": should").rstrip(".")
    path = error.ctx.command_path if error.ctx else "loraloom"
    message, _, possible = message.partition(" (Possible options: ")
    choice = re.search(r"'([^']*)' is not one of (.*)", message)
    near = f"did you mean {possible.rstrip(')').replace(', ', ' or ')}?" if possible else ""
    if choice:
        near = did_you_mean(choice[1], re.findall(r"'(.*?)'", choice[2]))
    hint = f"{near} " if near.startswith("did") else ""
    return LoraloomError(message[:1].lower() + message[1:], f"{hint}`{path} --help` tells what it takes")


def read_recipe(path: Path, base: str | None, report_to: list[str] | None = None) -> Recipe:
    """Read a recipe, with another base model and other reports of training where they are given."""
    from loraloom.study.recipe import Recipe

    recipe = Recipe.load(path)
    given = {"base": base, "report_to": report_to}
    return recipe.model_copy(update={name: value for name, value in given.items() if value})


def typed() -> str:
    """Return the command as a shell takes it."""
    return shlex.join(["loraloom", *sys.argv[1:]])


def stop_at_signals() -> None:
    """Let SIGTERM (docker stop, Slurm, systemd) and SIGHUP end the command as Ctrl-C does: cleaned up, exit 128 + n."""

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, stop)


@contextlib.contextmanager
def command(quiet: bool, as_json: bool) -> Iterator[Out]:
    """Set the tone of one command: output of one process, libraries that keep quiet, faults without a traceback.

    A fault in an input exits with 2, one of loraloom's own with 1; LORALOOM_RAISE in the environment lets what nobody
    foresaw through as it is.
    """
    from loraloom.cli.terminal import Out, hush_libraries, show_error, show_warning

    hush_libraries()
    warnings.showwarning = show_warning
    if quiet:
        warnings.simplefilter("ignore")
    first = os.environ.get("RANK", "0") == "0"  # of the processes that a launcher started; the others keep still
    try:
        yield Out(as_json=as_json and first, quiet=quiet or not first)
    except LoraloomError as error:
        if first:
            show_error(error)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as stop:
        raise typer.Exit(130) from stop
    except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
        raise
    except Exception as error:
        if os.environ.get("LORALOOM_RAISE"):
            raise
        if first:
            show_error(unforeseen(error))
        raise typer.Exit(2 if blames_input(error) else 1) from error


def unforeseen(error: Exception) -> LoraloomError:
    """Return what to tell of an exception that nobody foresaw: the file at fault, or that the fault is loraloom's."""
    what = f"{type(error).__name__}: {error}".strip().partition("\n")[0].removesuffix(": ")
    if isinstance(error, OSError) and error.filename is not None:
        return LoraloomError(
            f"{os.fsdecode(error.filename)}: {error.strerror}", "check that it is there and may be used"
        )
    handle, place = tempfile.mkstemp(prefix="loraloom-fault-", suffix=".txt")
    with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"loraloom {loraloom.__version__}, Python {sys.version}\n{typed()}\n\n")
        traceback.print_exception(error, file=file)
    report = f"report it, with the traceback in {place}"
    path = file_of(error)
    if path is not None:
        return LoraloomError(
            f"{path}: cannot be used: {what}", f"write the file again; if it is as it should be, {report}"
        )
    return LoraloomError(f"a fault of loraloom's own: {what}", report)


def blames_input(error: Exception) -> bool:
    """Tell whether an exception came of a file that was read, or of the system."""
    return file_of(error) is not None or (isinstance(error, OSError) and error.filename is not None)


def one_value(read: Callable[[str], _Value], flag: str) -> Callable[[str], _Value]:
    """Return what reads a value of an option that is given once for each, and tells how a list is written."""

    def parse(text: str) -> _Value:
        from loraloom.cli.rule_options import each

        if "," in text:
            raise typer.BadParameter(f"{text!r} is a list: did you mean {each(flag, text)}?")
        try:
            return read(text)
        except ValueError as error:
            raise typer.BadParameter(f"{text!r} is not a number") from error

    return parse
