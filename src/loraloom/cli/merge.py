"""The commands around merging: merge, compare, rules."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from typer.core import TyperCommand

from loraloom.cli.common import AsJson, Base, Output, Quiet, command, read_recipe, typed

if TYPE_CHECKING:
    from loraloom.merging.options import Heads

# options that the command does not know are those of a merging rule
RULE_OPTIONS = {"ignore_unknown_options": True}


class RuleCommand(TyperCommand):
    """A command whose help tells the options of every merging rule."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the usual help, then the options of the rules."""
        from loraloom.cli.rule_options import options_help

        super().format_help(ctx, formatter)
        typer.echo(options_help())


def merge(
    context: typer.Context,
    adapters: Annotated[list[str], typer.Argument(help="Adapter folders, and options of the rule.")],
    output: Output,
    rule: Annotated[str, typer.Option("--rule", help="See `loraloom rules`.")] = "tsv",
    scale: Annotated[float | None, typer.Option(help="Factor on the result; the rule's own without.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="One for each adapter, in order, with commas: 0.5,0.3,0.2.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Truncate the result; the energy lost is told.")] = None,
    seed: Annotated[int, typer.Option(help="For rules that draw at random.")] = 0,
    heads: Annotated[
        str, typer.Option(help="keep each task's head beside the result, or average them in it.")
    ] = "keep",
    statistics: Annotated[
        list[Path] | None, typer.Option("--statistics", help="Statistics file, once for each adapter, in order.")
    ] = None,
    tasks: Annotated[
        Path | None, typer.Option("--tasks", help="Recipe with base and tasks, for rules that look at texts.")
    ] = None,
    texts: Annotated[
        int | None, typer.Option(min=1, help="Texts a task that its probe has; the recipe's for the rule without.")
    ] = None,
    base: Base = None,
    fuse_into: Annotated[
        Path | None, typer.Option("--fuse-into", help="Checkpoint folder: write it with the result in its weights.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, tell the plan, sizes and time, write nothing.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Merge adapters into one PEFT folder, heads kept beside it; or into a checkpoint, by --fuse-into.

    No base model is loaded, except for rules that look at texts.
    """
    with command(quiet, as_json) as out, out.progress() as shown:
        from loraloom.cli.rule_options import number_list, split_arguments
        from loraloom.merging import MergeOptions, folders

        paths, options = split_arguments(adapters, rule, _flags(context))
        look = None
        if tasks:
            from loraloom.study.by_hand import looker

            recipe = read_recipe(tasks, base)
            look = looker(recipe, texts or recipe.probe_texts(rule, options), shown)
        asked = MergeOptions(rule, options, number_list(weights, "--weights"), scale, rank, seed, cast("Heads", heads))
        plan = folders.plan_folders(paths, asked, output, statistics=statistics or (), look=look)
        if dry_run:
            out.result(folders.dry_run(plan, fuse_into))
        elif fuse_into:
            out.result(folders.fuse_folders(plan, fuse_into, output, typed(), shown))
        else:
            out.result(folders.merge_folders(plan, output, typed(), shown))


def align(
    merged: Annotated[Path, typer.Argument(help="Folder of the merged adapter; its heads are written anew.")],
    adapters: Annotated[list[Path], typer.Argument(help="The adapters that were merged, in the same order.")],
    tasks: Annotated[Path, typer.Option("--tasks", help="Recipe with base and tasks; an adapter's task by its name.")],
    base: Base = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Fit each task's head to what the merged adapter makes of its texts: closed form, no labels, no cost later."""
    with command(quiet, as_json) as out, out.progress() as shown:
        from loraloom.study.by_hand import align_folder

        out.result({"folder": str(merged), "heads": align_folder(read_recipe(tasks, base), merged, adapters, shown)})


def compare(
    adapters: Annotated[list[Path], typer.Argument(help="Adapter folders, each with its task's head.")],
    tasks: Annotated[Path, typer.Option("--tasks", help="Recipe with base and tasks; an adapter's task by its name.")],
    output: Output,
    rules: Annotated[str | None, typer.Option(help="Rules, with commas; all without.")] = None,
    scales: Annotated[
        str | None, typer.Option(help="Scales to try, with commas; multiples of the rule's own without.")
    ] = None,
    base: Base = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Merge the same adapters by every rule: held-out rows choose the scale, test rows report; HTML and JSON."""
    with command(quiet, as_json) as out:
        from loraloom.cli.rule_options import number_list
        from loraloom.cli.terminal import rules_table
        from loraloom.study.compare import by_task
        from loraloom.study.compare import compare as run_compare

        chosen = [name.strip() for name in rules.split(",")] if rules else []
        result = run_compare(
            by_task(adapters),
            read_recipe(tasks, base),
            output,
            rules=chosen,
            scales=number_list(scales, "--scales"),
            command=typed(),
            reporter=out.progress(),
        )
        out.table(*rules_table(result))
        places = {"report": str(output / "report.html"), "results": str(output / "results.json")}
        out.result(places)


def rules(quiet: Quiet = False, as_json: AsJson = False) -> None:
    """List the merging rules with formula, paper, spaces and options."""
    with command(quiet, as_json) as out:
        from loraloom.merging import get_rule, rule_names

        names = rule_names()
        out.result(
            {name: get_rule(name).help() for name in names}, "\n\n".join(get_rule(name).help() for name in names)
        )


def _flags(context: typer.Context) -> list[str]:
    return [flag for parameter in context.command.params for flag in parameter.opts if flag.startswith("--")]
