"""The command that merges the same adapters by every rule and measures them: compare."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from loraloom.cli.common import (
    AsJson,
    Base,
    NormaliseOption,
    Output,
    Quiet,
    RecipeOption,
    command,
    one_value,
    read_recipe,
    typed,
)
from loraloom.cli.completion import rule_words

if TYPE_CHECKING:
    from loraloom.merging.options import Normalise
    from loraloom.report.aggregate import Merged


def compare(
    adapters: Annotated[list[Path], typer.Argument(help="Adapter folders, each with its task's head.")],
    recipe: RecipeOption,
    output: Output,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            "--rule",
            parser=one_value(str, "--rule"),
            metavar="NAME",
            autocompletion=rule_words(),
            help="Rule to try. Give it once for each; without it all are tried.",
        ),
    ] = None,
    scale: Annotated[
        list[float] | None,
        typer.Option(
            "--scale",
            parser=one_value(float, "--scale"),
            metavar="NUMBER",
            help="Scale to try. Give it once for each; without it multiples of the rule's own are tried.",
        ),
    ] = None,
    normalise: NormaliseOption = "auto",
    agreement: Annotated[
        bool,
        typer.Option(
            "--agreement",
            help="Tell also how far every merge is from the single adapters, and which scale that chooses.",
        ),
    ] = False,
    no_labels: Annotated[
        bool,
        typer.Option("--no-labels", help="Measure by agreement with the single adapters alone; no label is used."),
    ] = False,
    base: Base = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Merge the same adapters by every rule: held-out rows choose the scale, test rows report; HTML and JSON."""
    with command(quiet, as_json) as out:
        from loraloom.cli.merge_page import both_choices, both_choices_page, unlabelled_page
        from loraloom.cli.terminal import rules_table
        from loraloom.report import base_average, merged_rows
        from loraloom.study.compare import by_task, compare as run_compare, compare_unlabelled, without_labels

        given, tasks, way = by_task(adapters), read_recipe(recipe, base), cast("Normalise", normalise)
        near = partial(compare_unlabelled, given, tasks, output, scales=scale, normalise=way, reporter=out.progress())
        if no_labels:
            found = near(rules=rule or ())
            out.result({"agreement": str(output / "agreement.json"), **asdict(found)}, "")
            unlabelled_page(out, found, output / "agreement.json")
            return
        result = run_compare(
            given,
            tasks,
            output,
            rules=rule or (),
            scales=scale,
            normalise=way,
            command=typed(),
            reporter=out.progress(),
        )
        out.table(*rules_table(result))
        choices = both_choices(result, near(rules=without_labels(tasks, rule or ()))) if agreement else []
        if agreement:
            both_choices_page(out, choices)
        places = {"report": str(output / "report.html"), "results": str(output / "results.json")}
        unadapted = base_average(result)
        alone = {"base": unadapted.value} if unadapted else {}
        chosen = {"choices": choices} if agreement else {}
        out.result({**places, **alone, "rules": [_row(one) for one in merged_rows(result)], **chosen}, "")
        out.facts(str(output), places.items())


def _row(one: Merged) -> dict[str, Any]:
    """Return a rule's row of the comparison as JSON would hold it; `chosen_by`: who chose its scale."""
    from loraloom.report.aggregate import SHARES

    return {
        "rule": one.rule,
        "space": one.space,
        "aligned": one.aligned,
        "average": one.average.value,
        "stderr": one.average.stderr,
        "kept": one.kept,
        **{
            SHARES[name]: {task: score.value for task, score in kept.tasks.items()} for name, kept in one.shares.items()
        },
        "heldout": one.heldout,
        "scales": list(one.scales),
        "chosen_by": one.chosen_by,
        "output_ranks": list(one.output_ranks),
    }
