"""The command line: each command is one short documented function that calls public functions and prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import loraloom
from loraloom.cli_common import (
    AsJson,
    Base,
    CollectGroup,
    Output,
    Quiet,
    RecipeFile,
    Seed,
    StudyFolder,
    TaskName,
    command,
    read_recipe,
    typed,
)
from loraloom.cli_merge import RULE_OPTIONS, RuleCommand, align, compare, merge, rules

if TYPE_CHECKING:
    from loraloom.recipe import Recipe
    from loraloom.statistics import Statistics
    from loraloom.terminal import Out

app = typer.Typer(
    name="loraloom",
    help="LoRA adapters that merge: statistics, subspaces, training, merging, evaluation, a report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
statistics_app = typer.Typer(
    help="Collect what a base model's layers see: `loraloom statistics TEXTS` is short for `statistics collect TEXTS`.",
    cls=CollectGroup,
    no_args_is_help=True,
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
        from loraloom.demo import demo_recipe

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
        from loraloom.recipe import slug

        chosen = read_recipe(recipe, base)
        _run(chosen, output or Path("studies") / slug(chosen.name), out)


@statistics_app.command("collect")
def statistics(
    texts: Annotated[
        str, typer.Argument(help="JSONL, CSV, TSV, Parquet, or org/name on the hub. Labels are not read.")
    ],
    output: Output,
    base: Annotated[str, typer.Option("--base", help="Hub name or folder of the base model.")],
    column: Annotated[list[str], typer.Option("--column", help="Text column; twice for a pair of texts.")],
    target: Annotated[list[str], typer.Option("--target", help="Path ending of the layers to watch; several times.")],
    count: Annotated[int, typer.Option("--texts", min=1, help="Texts to read.")] = 100,
    kind: Annotated[str, typer.Option(help="A row a `token`, or a row the mean of a `sample`.")] = "token",
    rows: Annotated[
        int | None, typer.Option(min=0, help="Rows an input may hand on as they are; 0: sums over rows alone.")
    ] = None,
    max_length: Annotated[int, typer.Option(help="Word pieces kept of a text.")] = 128,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Collect what the base model's layers see of unlabelled texts: one file to share instead of data."""
    with command(quiet, as_json) as out:
        from loraloom.workflow import collect_from_file

        found = collect_from_file(texts, column, base, target, count, kind, max_length)
        _save_statistics(found if rows is None else found.limit_rows(rows), output, out)


@statistics_app.command("show")
def show_statistics(
    file: Annotated[Path, typer.Argument(help="What `loraloom statistics` or `loraloom atlas` wrote.")],
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Tell what a statistics file holds, and so what whoever has it can read."""
    with command(quiet, as_json) as out:
        from loraloom.statistics import Statistics

        found = Statistics.load(file).contents()
        out.result(found)
        if found["inputs with their rows"]:
            out.hint(
                f"{found['inputs with their rows']} inputs hold every row the layer read: texts can be guessed from "
                "them one by one. `loraloom statistics --rows 0` writes sums alone"
            )


@app.command()
def atlas(
    base: Annotated[str, typer.Argument(help="Hub name or folder of the base model.")],
    output: Output,
    target: Annotated[list[str], typer.Option("--target", help="Path ending of the layers to watch; several times.")],
    texts: Annotated[
        str | None, typer.Option("--text-file", help="Texts of your own; English that every Python has without.")
    ] = None,
    column: Annotated[list[str] | None, typer.Option("--column", help="Text column of that file.")] = None,
    count: Annotated[int, typer.Option("--texts", min=1, help="Texts to read.")] = 300,
    max_length: Annotated[int, typer.Option(help="Word pieces kept of a text.")] = 128,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Map what a base model's layers see of generic text, once for all teams: one file, no task's data in it."""
    with command(quiet, as_json) as out:
        from loraloom.workflow import make_atlas

        _save_statistics(make_atlas(base, target, texts, column or [], count, max_length), output, out)


@app.command()
def init(
    output: Output,
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
    rule: Annotated[
        str, typer.Option(help="apart; complement, osrm (the paper), mean, random, shared, default.")
    ] = "apart",
    keep: Annotated[str | None, typer.Option(help="free, frozen or projected; as the rule is meant without.")] = None,
    scale: Annotated[str | None, typer.Option(help="unit or response; as the rule is meant without.")] = None,
    energy_share: Annotated[float, typer.Option(help="Share of the energy to stay off.")] = 0.5,
    seed: Annotated[
        int | None,
        typer.Option(help="Equal seeds start at the same A and merge badly; by OUTPUT's name without."),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write the adapter folder that training starts from: A in its subspace, B = 0. No base model is loaded."""
    with command(quiet, as_json) as out:
        from loraloom.workflow import initialise_from_files

        lora = {"rank": rank, "alpha": alpha, "targets": target, "rslora": rslora}
        options = {"rule": rule, "keep": keep, "scale": scale, "energy_share": energy_share, "seed": seed}
        others = [*(other or []), *([atlas] if atlas else [])]
        done = initialise_from_files(output, own, others, after or [], lora, options)
        out.result({"folder": str(output), **done.provenance["init"], "diagnostics": done.diagnostics()})
        for note in done.notes():
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
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train one adapter of a recipe; the same command after a kill goes on from the last checkpoint."""
    with command(quiet, as_json) as out, out.progress() as shown:
        from loraloom.workflow import train_from_recipe

        done = train_from_recipe(read_recipe(recipe, base), task, output, start, seed, shown)
        out.result({"folder": str(done.folder), "heldout": round(done.heldout, 4), "steps": done.steps})


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
        from loraloom.workflow import evaluate_folder

        scores = evaluate_folder(read_recipe(recipe, base), adapter, task or [], split)
        out.table(
            f"{adapter} on {split} rows",
            ("task", "metric", "value", "standard error"),
            [(name, metric, f"{score.value:.4f}", f"{score.stderr:.4f}") for name, (metric, score) in scores.items()],
        )
        if as_json:
            out.result({name: {"metric": metric, **score.model_dump()} for name, (metric, score) in scores.items()})


@app.command()
def inspect(
    paths: Annotated[list[Path], typer.Argument(help="Adapter folders and statistics files, in any order.")],
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Tell what adapters and statistics hold, what adapters share, and each one's response to each task's inputs."""
    with command(quiet, as_json) as out:
        from loraloom.workflow import inspect_paths

        facts, responses, shared = inspect_paths(paths)
        if responses:
            columns = ("adapter", *(Path(name).name for name in responses["statistics"]))
            rows = [(Path(name).name, *(f"{value:.3g}" for value in row)) for name, row in responses["rows"].items()]
            out.table("|B A h|, root mean square over rows and layers", columns, rows)
        told = {}
        if shared:
            told = shared.tables()
            names = [Path(name).name for name in shared.names]
            for title, table in told.items():
                cells = [
                    (name, *("-" if value is None else f"{value:.2f}" for value in row))
                    for name, row in zip(names, table, strict=True)
                ]
                out.table(f"overlap of the {title}, mean over layers", ("adapter", *names), cells)
            for one, two, value in shared.same_start():
                out.hint(
                    f"{one} and {two} started from nearly the same A (overlap {value:.2f}) and merge worse than "
                    "adapters of a seed each: train one again from `loraloom init` with another seed"
                )
        found = {"files": facts, "responses": responses, "overlaps": told}
        out.result(found, json.dumps(facts, indent=1, default=str))


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="results.json of a study.")],
    output: Output,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Draw the report of a results file again."""
    with command(quiet, as_json) as out:
        from loraloom.report import write_report
        from loraloom.results import StudyResult

        out.result({"report": str(write_report(StudyResult.load(results), output))})


@study_app.command("status")
def study_status(folder: StudyFolder, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """List the stage outputs of a study and what each took, and the stages that failed."""
    with command(quiet, as_json) as out:
        from loraloom.workflow import study_store

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
        from loraloom.terminal import explanation
        from loraloom.workflow import study_store

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
        from loraloom.workflow import study_store

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
    """Run the command line: a fault in the input exits with 2 and no traceback, Ctrl-C with 130."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)


def _save_statistics(found: Statistics, output: Path, out: Out) -> None:
    found.save(output)
    out.result({"file": str(output), "texts": found.texts, "tokens": found.tokens, "layers": len(found.layers)})


def _run(recipe: Recipe, folder: Path, out: Out) -> None:
    from loraloom.outcome import run_study
    from loraloom.report import summary_rows, verdict
    from loraloom.terminal import study_table

    result = run_study(recipe, folder, command=typed(), reporter=out.progress())
    out.table(*study_table(summary_rows(result)))
    places = {"report": str(folder / "report.html"), "results": str(folder / "results.json")}
    facts = {"verdict": verdict(result), "folder": str(folder), **places}
    out.result(facts, "\n".join([facts["verdict"], "", *(f"{name}: {path}" for name, path in places.items())]))
    out.hint("open the report in a browser; the adapters lie in adapters/ and merged/ beside it")
