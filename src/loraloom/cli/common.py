"""What the commands share: their common options, and the tone in which they are run."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraloom.errors import LoraloomError

if TYPE_CHECKING:
    from loraloom.cli.terminal import Out
    from loraloom.study.recipe import Recipe

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="Folder or file to write; it appears whole or not at all.")
]
RecipeFile = Annotated[Path, typer.Argument(help="A YAML recipe.")]
Base = Annotated[str | None, typer.Option("--base", help="Base model in place of the recipe's: hub name or folder.")]
TaskName = Annotated[str, typer.Option("--task", help="A task of the recipe.")]
StudyFolder = Annotated[Path, typer.Argument(help="A study folder.")]
Seed = Annotated[int, typer.Option("--seed", help="The study's seed; every task draws its own from it.")]


def read_recipe(path: Path, base: str | None) -> Recipe:
    """Read a recipe, with another base model where one is given."""
    from loraloom.study.recipe import Recipe

    recipe = Recipe.load(path)
    return recipe.model_copy(update={"base": base}) if base else recipe


def typed() -> str:
    """Return the command as it was typed."""
    return " ".join(["loraloom", *sys.argv[1:]])


@contextlib.contextmanager
def command(quiet: bool, as_json: bool) -> Iterator[Out]:
    """Set the tone of one command: output of one process, libraries that keep quiet, faults without a traceback."""
    from loraloom.cli.terminal import Out, hush_libraries, show_error

    hush_libraries()
    first = os.environ.get("RANK", "0") == "0"  # of the processes that a launcher started; the others keep still
    try:
        yield Out(as_json=as_json and first, quiet=quiet or not first)
    except LoraloomError as error:
        if first:
            show_error(error)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as stop:
        raise typer.Exit(130) from stop
