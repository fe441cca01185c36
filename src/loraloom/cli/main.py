"""The command line: each command is one short documented function that calls public functions and prints."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import loraloom
from loraloom.cli.common import (
    AsJson,
    Base,
    Commands,
    Output,
    Overwrite,
    Quiet,
    RecipeFile,
    Seed,
    StudyFolder,
    TaskName,
    command,
    read_recipe,
    stop_at_signals,
    typed,
)
from loraloom.cli.inspect import inspect
from loraloom.cli.merge import RULE_OPTIONS, RuleCommand, align, compare, merge, rules
from loraloom.cli.statistics import atlas, statistics_app

if TYPE_CHECKING:
    from loraloom.cli.terminal import Out
    from loraloom.study.recipe import Recipe

app = typer.Typer(
    name="loraloom",
    cls=Commands,
    help="LoRA adapters that merge: statistics, subspaces, training, merging, evaluation, a report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
study_app = typer.Typer(help="Look at what a study folder holds.", no_args_is_help=True)
app.add_typer(statistics_app, name="statistics")
app.add_typer(study_app, name="study")


@app.command()
def demo(
    output: Output = Path("loraloom-demo"),
    fast: Annotated[bool, typer.Option("--fast", help="A reduced size that checks the installation.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train, merge and measure on a small real model and real text; writes report.html. No download."""
    with command(quiet, as_json) as out:
        from loraloom.study.demo import demo_recipe

        _run(demo_recipe(fast=fast), output, out)


@app.command()
def run(
    recipe: RecipeFile,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Study folder; studies/<recipe's name> without.")
    ] = None,
    base: Base = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe to its end: what is done already is not done again, a killed run goes on where it stood."""
    with command(quiet, as_json) as out:
        from loraloom.study.recipe import slug

        chosen = read_recipe(recipe, base)
        _run(chosen, output or Path("studies") / slug(chosen.name), out)


app.command()(atlas)


@app.command()
def init(
    output: Output,
    tasks: Annotated[
        list[Path] | None,
        typer.Argument(help="Statistics of all tasks, to start each off the others in OUTPUT/<name of its file>."),
    ] = None,
    own: Annotated[Path | None, typer.Option("--own", help="Statistics of the task itself; not needed.")] = None,
    other: Annotated[
        list[Path] | None, typer.Option("--other", help="Statistics of another task; several times.")
    ] = None,
    atlas: Annotated[
        Path | None, typer.Option("--atlas", help="Atlas of the base, in place of other tasks' statistics.")
    ] = None,
    after: Annotated[
        list[Path] | None,
        typer.Option("--after", help="Adapter that is there already: its rows are stayed off."),
    ] = None,
    rank: Annotated[int, typer.Option(min=1)] = 8,
    alpha: Annotated[float, typer.Option(min=0)] = 16,
    target: Annotated[
        list[str] | None, typer.Option("--target", help="Path ending of a target layer; all of the statistics without.")
    ] = None,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha / sqrt(rank).")] = False,
    rule: Annotated[str, typer.Option(help="apart; osrm (the paper), mean, random, shared, default.")] = "apart",
    keep: Annotated[str, typer.Option(help="free, frozen or projected.")] = "free",
    scale: Annotated[str | None, typer.Option(help="unit or response; as the rule is meant without.")] = None,
    energy_share: Annotated[float, typer.Option(help="Share of the energy to stay off.")] = 0.5,
    seed: Annotated[
        int | None,
        typer.Option(help="Equal seeds start at the same A and merge badly; by the folder's name without."),
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write adapter folders that training starts from: A in its subspace, B = 0. No base model is loaded.

    Of all tasks at once by their statistics files, or of one by --own, --other and --atlas.
    """
    with command(quiet, as_json) as out:
        from loraloom.errors import raise_problems
        from loraloom.settings import LoraSettings, checked
        from loraloom.starts.files import initialise_all_from_files, initialise_from_files
        from loraloom.starts.options import StartOptions

        others = [*(other or []), *([atlas] if atlas else [])]
        mixed = [f"{path} is given with the files of all tasks" for path in [*([own] if own else []), *others] if tasks]
        raise_problems("init", mixed, "give the files of all tasks, or --own, --other and --atlas for one of them")
        shape = {"rank": rank, "alpha": alpha, "targets": target or "all-linear", "rslora": rslora}
        lora = checked(LoraSettings, "init", shape)
        chosen = {"rule": rule, "keep": keep, "scale": scale, "energy_share": energy_share}
        options = checked(StartOptions, "init", chosen)
        more: dict[str, Any] = {"after": after or [], "overwrite": overwrite}
        if tasks:
            done = initialise_all_from_files(output, tasks, lora, options, seed=seed or 0, **more)
        else:
            done = {output: initialise_from_files(output, own, others, lora, options, seed=seed, **more)}
        facts = {
            folder.name: {"folder": str(folder), **one.provenance["init"], "diagnostics": one.diagnostics()}
            for folder, one in done.items()
        }
        out.result({"folder": str(output), "tasks": facts} if tasks else facts[output.name])
        for note in sorted({note for one in done.values() for note in one.notes()}):
            out.hint(note)


@app.command()
def train(
    recipe: RecipeFile,
    task: TaskName,
    output: Output,
    start: Annotated[
        Path | None, typer.Option("--init", help="Adapter folder to start from; plain LoRA without.")
    ] = None,
    base: Base = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train one adapter of a recipe; the same command after a kill goes on from the last checkpoint.

    Under `accelerate launch --multi_gpu -m` or torchrun the processes share out every batch, and the first one writes.
    """
    with command(quiet, as_json) as out, out.progress() as shown:
        from loraloom.model.processes import leave
        from loraloom.study.by_hand import train_from_recipe

        chosen = read_recipe(recipe, base)
        done = train_from_recipe(chosen, task, output, start, seed, shown, overwrite=overwrite)
        out.result({"folder": str(done.folder), "heldout": round(done.heldout, 4), "steps": done.steps})
        leave()


app.command(cls=RuleCommand, context_settings=RULE_OPTIONS)(merge)
app.command()(align)
app.command()(compare)
app.command()(rules)


@app.command()
def evaluate(
    recipe: RecipeFile,
    adapter: Annotated[Path, typer.Argument(help="An adapter folder, a single task's or a merged one.")],
    task: Annotated[list[str] | None, typer.Option("--task", help="Tasks of the recipe; all that have a head.")] = None,
    split: Annotated[str, typer.Option(help="test or heldout.")] = "test",
    base: Base = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure an adapter on tasks of a recipe, each with its own head."""
    with command(quiet, as_json) as out:
        from loraloom.study.by_hand import evaluate_folder

        scores = evaluate_folder(read_recipe(recipe, base), adapter, task or [], split)
        out.table(
            f"{adapter} on {split} rows",
            ("task", "metric", "value", "standard error"),
            [(name, metric, f"{score.value:.4f}", f"{score.stderr:.4f}") for name, (metric, score) in scores.items()],
        )
        if as_json:
            out.result({name: {"metric": metric, **score.model_dump()} for name, (metric, score) in scores.items()})


app.command()(inspect)


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="results.json of a study.")],
    output: Output,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Draw the report of a results file again."""
    with command(quiet, as_json) as out:
        from loraloom.report import write_report
        from loraloom.results import StudyResult

        out.result({"report": str(write_report(StudyResult.load(results), output, overwrite=overwrite))})


@study_app.command("status")
def study_status(folder: StudyFolder, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """List the stage outputs of a study and what each took, and the stages that failed."""
    with command(quiet, as_json) as out:
        from loraloom.study.store import study_store

        store = study_store(folder)
        outputs, failures = store.outputs(), store.failures()
        rows = [(name, f"{record['seconds']:.1f}") for name, record in outputs.items()]
        out.table(f"{len(rows)} stage outputs in {folder}", ("output", "seconds"), rows)
        failed = "\n".join(f"failed: {name}: {message}" for name, message in failures.items())
        out.result({"outputs": outputs, "failures": failures}, failed or "no stage failed")


@study_app.command("explain")
def study_explain(
    folder: StudyFolder,
    output: Annotated[str, typer.Argument(help="A stage output as `status` shows it.")],
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Tell what an output depends on, and what of it is missing."""
    with command(quiet, as_json) as out:
        from loraloom.cli.terminal import explanation
        from loraloom.study.store import study_store

        found = study_store(folder).explain(output)
        out.result(found, explanation(found))


@study_app.command("rm")
def study_rm(
    folder: StudyFolder,
    outputs: Annotated[list[str], typer.Argument(help="Stage outputs as `status` shows them.")],
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Remove stage outputs; the next run makes them again."""
    with command(quiet, as_json) as out:
        from loraloom.study.store import study_store

        store = study_store(folder)
        for name in outputs:
            store.remove(name)
        out.result({"removed": outputs}, "\n".join(f"removed {name}" for name in outputs))


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


def _run(recipe: Recipe, folder: Path, out: Out) -> None:
    from loraloom.cli.terminal import study_table
    from loraloom.report import summary_rows, verdict
    from loraloom.study.export import run_study

    result = run_study(recipe, folder, command=typed(), reporter=out.progress())
    out.table(*study_table(summary_rows(result)))
    places = {"report": str(folder / "report.html"), "results": str(folder / "results.json")}
    facts = {"verdict": verdict(result), "folder": str(folder), **places}
    out.result(facts, "\n".join([facts["verdict"], "", *(f"{name}: {path}" for name, path in places.items())]))
    out.hint("open the report in a browser; the adapters lie in adapters/ and merged/ beside it")
