"""The command that trains a merged adapter, without labels, to answer as each single adapter does."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from loraloom.cli.common import AsJson, Columns, Output, Overwrite, Quiet, command, read_recipe, typed
from loraloom.cli.completion import words
from loraloom.settings import DISTIL_TEXTS


def distil(
    merged: Annotated[Path, typer.Argument(help="Folder of the merged adapter, from which training starts.")],
    adapters: Annotated[list[Path], typer.Argument(help="The adapters that were merged.")],
    output: Output,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="YAML recipe that names the base model and the tasks.")
    ] = None,
    unlabelled: Annotated[
        list[str] | None,
        typer.Option(
            "--unlabelled",
            help="Texts of an adapter's task, in place of a recipe: JSONL, CSV, TSV, Parquet or org/name on the hub. "
            "Give it once for each, in order. Labels are not read. `generic` lets the adapter answer generic English, "
            "`none` keeps its task near the start there.",
        ),
    ] = None,
    column: Columns = None,
    probe_texts: Annotated[
        int | None, typer.Option(min=8, help=f"Texts a task at most; {DISTIL_TEXTS} without it.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Rank of the result at most; the sum of the adapters' without it.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps at most; without it those that read 10,000 texts, and 60 for answers."),
    ] = None,
    loss: Annotated[
        str,
        typer.Option(
            autocompletion=words("output", "features", "both"),
            help="`output`, `features` that a head reads, or `both`.",
        ),
    ] = "output",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Texts of a task a step; without it 8, and 4 where answers are written.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Without it 2e-3, and 5e-4 where answers are written. It falls to 0.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Base model in place of the recipe's, or of the one the adapters name.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order of texts, and of which are held out.")] = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a merged adapter to answer unlabelled texts as each single adapter does. Heads stay as they are.

    The same command after a kill goes on from the last checkpoint. Answers of the single adapters are kept in the cache
    folder, for the next call. Under `accelerate launch -m` or torchrun the processes share out every batch.
    """
    with command(quiet, as_json) as out, out.progress() as shown:
        from loraloom.adapters.peft import read_adapter
        from loraloom.cli.merge_page import next_step, plan_page, result_page
        from loraloom.errors import raise_problems
        from loraloom.files.outputs import unfinished
        from loraloom.merging import MergeOptions, folders
        from loraloom.merging.facts import MERGED, MergeFacts
        from loraloom.model.processes import leave

        both = [] if bool(recipe) != bool(unlabelled) else ["name texts by --recipe or by --unlabelled, one of the two"]
        raise_problems("distil", both)
        start = read_adapter(merged)
        if recipe:
            from loraloom.study.by_hand import ByRecipe

            read = ByRecipe(read_recipe(recipe, base), shown)
            texts = probe_texts or read.recipe.probe_texts("distil", {})
            look = partial(read.look, texts, "none", scratch=unfinished(output), start=start)
        else:
            from loraloom.study.unlabelled import distil_by_files

            names, most = column or ["text"], probe_texts or DISTIL_TEXTS
            look = partial(distil_by_files, base, unlabelled or [], names, most, unfinished(output), start, shown)
        options = {"steps": steps, "loss": loss, "batch_size": batch_size, "learning_rate": learning_rate}
        asked = MergeOptions("distil", options, rank=rank, seed=seed, base=base)
        plan = folders.plan_folders(adapters, asked, output, overwrite=overwrite, look=look)
        facts = MergeFacts.of(plan, MERGED)
        plan_page(out, facts)
        done = folders.merge_folders(plan, output, typed(), shown, overwrite=overwrite)
        out.result({"folder": str(output), **asdict(done)}, "")
        result_page(out, done, output, facts.warnings)
        align = () if plan.writes else ("loraloom", "align", output, *adapters, "--recipe", recipe or "RECIPE")
        next_step(out, done, output, align)
        leave()
