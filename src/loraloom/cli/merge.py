"""The commands around merging: merge, align, rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from typer.core import TyperCommand

from loraloom.cli.common import (
    AsJson,
    Base,
    Columns,
    NormaliseOption,
    Output,
    Overwrite,
    Quiet,
    RecipeOption,
    ServerOption,
    ToOption,
    command,
    one_value,
    read_recipe,
    typed,
)
from loraloom.cli.completion import rule_words, words
from loraloom.cli.screen import Clip, DropRefused, ScreenOption
from loraloom.errors import LoraloomError, collecting, raise_together
from loraloom.settings import AGREEMENT_TEXTS, DISTIL_TEXTS

if TYPE_CHECKING:
    from loraloom.adapters.together import Targets
    from loraloom.merging.options import Dtype, Heads, Normalise

# options that have no place where more than a rule is given by other means
BY_THE_CALLER = ("rule", "scale", "weight", "weights", "normalise")
NOT_IN_YAML = ("adapters", "stack", "statistics", "recipe", "unlabelled")
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
    output: Output,
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            help="Adapter folders, or org/name@revision on the hub. Options of the rule may stand among them."
        ),
    ] = None,
    rule: Annotated[
        str,
        typer.Option(
            "--rule",
            autocompletion=rule_words("auto"),
            help="Merging rule. `loraloom rules` lists all, `loraloom rules NAME` tells one. `auto` chooses rule and "
            "scale as --scale auto does.",
        ),
    ] = "tsv",
    scale: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER|auto",
            autocompletion=words("auto"),
            help="Factor on the result. Without it the rule's own, or 1 for a single adapter. `auto` tries several and "
            "takes the one that agrees best with the single adapters on texts, which --recipe or --unlabelled names.",
        ),
    ] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option(
            "--weight",
            parser=one_value(float, "--weight"),
            metavar="NUMBER",
            help="Weight of an adapter. Give it once for each, in order.",
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", hidden=True, help="How --weight was written before: all, with commas.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Rank of the result at most. The energy that this loses is told.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the rules that draw at random.")] = 0,
    heads: Annotated[
        str,
        typer.Option(
            autocompletion=words("keep", "average"),
            help="`keep` lays each task's head beside the result, `average` puts their mean into it.",
        ),
    ] = "keep",
    normalise: NormaliseOption = "auto",
    screen: ScreenOption = "warn",
    drop_refused: DropRefused = False,
    clip: Clip = None,
    statistics: Annotated[
        list[Path] | None,
        typer.Option("--statistics", help="Statistics of an adapter's task. Give it once for each, in order."),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", help="YAML recipe that names the base model and the tasks, for rules that need them."),
    ] = None,
    probe_texts: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Texts a task for a rule that looks at texts, and for `auto`. Without it as the recipe has them, "
            f"{AGREEMENT_TEXTS} for `auto`, and {DISTIL_TEXTS} at most for `distil`.",
        ),
    ] = None,
    unlabelled: Annotated[
        list[str] | None,
        typer.Option(
            "--unlabelled",
            help="Texts of an adapter's task for `auto` and `distil`, in place of a recipe: JSONL, CSV, TSV, Parquet "
            "or org/name on the hub. Give it once for each, in order. Labels are not read.",
        ),
    ] = None,
    column: Columns = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help="Base model in place of the recipe's, and of adapters that name theirs in ways not known as one.",
        ),
    ] = None,
    targets: Annotated[
        str,
        typer.Option(
            autocompletion=words("union", "intersection", "same"),
            help="Layers of the result, of adapters of different ones: `union`, where one that lacks a layer leaves it "
            "as it is; `intersection`; or `same`, which refuses them.",
        ),
    ] = "union",
    stack: Annotated[
        bool,
        typer.Option(
            "--stack",
            help="The adapters were trained one on top of the other, in this order (SFT, then DPO): sum them whole.",
        ),
    ] = False,
    to: ToOption = None,
    server: ServerOption = None,
    from_mergekit: Annotated[
        Path | None,
        typer.Option(
            "--from-mergekit",
            metavar="YAML",
            help="Merge what a YAML of mergekit's says of models that are given as `base+lora`; see docs/mergekit.md.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            autocompletion=words("float32", "bfloat16", "float16"),
            help="Of the result: float32, bfloat16 or float16; else the widest of the adapters'.",
        ),
    ] = None,
    fuse_into: Annotated[
        Path | None,
        typer.Option("--fuse-into", help="Checkpoint folder of the base model. It is written with the result in it."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, tell the plan, sizes and time, and write nothing.")
    ] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Merge adapters into one PEFT folder, heads kept beside it; or into a checkpoint, by --fuse-into.

    No base model is loaded, except for rules that look at texts.
    """
    with command(quiet, as_json) as out, out.progress() as shown:
        from loraloom.cli.auto import AUTO, given_scale, to_try
        from loraloom.cli.merge_page import WITH_TEXTS, next_step, plan_page, result_page
        from loraloom.cli.rule_options import former_weights, split_arguments
        from loraloom.cli.screen import screen_option
        from loraloom.files.outputs import unfinished
        from loraloom.merging import MergeOptions, folders
        from loraloom.merging.facts import MERGED, MergeFacts
        from loraloom.merging.fuse import FUSED
        from loraloom.merging.mergekit import read_mergekit
        from loraloom.model.processes import leave

        if fuse_into and dtype:
            raise LoraloomError("--fuse-into keeps the checkpoint's own dtypes", "leave out --dtype")
        if stack:
            _check_unused(context, "--stack", "sums the adapters whole", (*BY_THE_CALLER, "drop_refused"))
        if (server or to) and fuse_into:
            named = "--for" if server else "--to"
            raise LoraloomError(f"{named} writes an adapter, --fuse-into a whole checkpoint", "leave out one of them")
        paths, options = split_arguments(adapters or [], rule, _flags(context))
        candidates = to_try(rule, scale, options, recipe, unlabelled)
        look, choose, count = None, None, probe_texts or AGREEMENT_TEXTS
        way = cast("Normalise", normalise)
        if recipe:
            from loraloom.study.by_hand import ByRecipe

            read = ByRecipe(read_recipe(recipe, base), shown)
            looked = probe_texts or read.recipe.probe_texts(rule, options)
            look = partial(read.look, looked, way, scratch=unfinished(output))
            choose = partial(read.choose, count, candidates) if candidates else None
        if unlabelled and not candidates:
            from loraloom.study.unlabelled import distil_by_files

            most = probe_texts or DISTIL_TEXTS
            look = partial(distil_by_files, base, unlabelled, column or ["text"], most, unfinished(output), None, shown)
        elif unlabelled:
            from loraloom.study.unlabelled import choose_by_files

            choose = partial(choose_by_files, base, unlabelled, column or ["text"], count, candidates, shown)
        weight = former_weights(weights, weight)
        named = MergeOptions.rule if rule == AUTO else rule
        asked = MergeOptions(named, options, weight, given_scale(scale), dtype=cast("Dtype | None", dtype))
        not_taken = {}
        if from_mergekit:
            _check_unused(context, "--from-mergekit", "says what is merged and how", (*BY_THE_CALLER, *NOT_IN_YAML))
            said = read_mergekit(from_mergekit)
            paths, asked = said.adapters, replace(said.options, dtype=asked.dtype or said.options.dtype)
            not_taken = {"not_taken": said.left_out}
            for name, why in said.left_out.items():
                out.warn(f"{from_mergekit}: {name} is not taken: {why}")
        asked = replace(asked, rank=rank, seed=seed, heads=cast("Heads", heads), base=base, to=to)
        asked = replace(asked, targets=cast("Targets", targets), stack=stack, normalise=way, server=server, clip=clip)
        kind, seen = FUSED if fuse_into else MERGED, statistics or ()
        plan = folders.plan_folders(
            paths,
            asked,
            output,
            kind=kind,
            overwrite=overwrite,
            statistics=seen,
            look=look,
            choose=choose,
            screen=screen_option(screen, drop_refused, shown),
        )
        read_whole = not dry_run or folders.quickly_read(plan)
        facts = MergeFacts.of(plan, kind, energies=read_whole)
        plan_page(out, facts)
        told = facts.warnings
        if dry_run:
            facts = folders.dry_run(plan, output, fuse_into, overwrite=overwrite)
        elif fuse_into:
            facts = folders.fuse_folders(plan, fuse_into, output, typed(), shown, overwrite=overwrite)
        else:
            facts = folders.merge_folders(plan, output, typed(), shown, overwrite=overwrite)
        out.result({"folder": str(output), **asdict(facts), **not_taken}, "")
        result_page(out, facts, output, told)
        if len(facts.inputs) > 1 and not (recipe or unlabelled or stack or plan.dialect.images):
            out.hint(WITH_TEXTS)
        align = () if plan.writes else ("loraloom", "align", output, *paths, "--recipe", recipe or "RECIPE")
        next_step(out, facts, output, align)
        leave()


def align(
    merged: Annotated[Path, typer.Argument(help="Folder of the merged adapter. Its heads are written anew.")],
    adapters: Annotated[list[str], typer.Argument(help="The adapters that were merged, as `merge` was given them.")],
    recipe: RecipeOption,
    base: Base = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Fit each task's head to what the merged adapter makes of its texts: closed form, no labels, no cost later."""
    with command(quiet, as_json) as out, out.progress() as shown:
        from loraloom.adapters.hub import adapter_folder
        from loraloom.study.align import align_folder

        errors: list[LoraloomError] = []
        folders: list[Path] = []
        for one in adapters:
            with collecting(errors):
                folders.append(adapter_folder(one))
        raise_together(errors)
        heads = align_folder(read_recipe(recipe, base), merged, folders, shown)
        out.result({"folder": str(merged), "heads": heads}, "")
        out.facts(f"{merged}: heads aligned, without labels", heads.items())
        out.next("measure it", "loraloom", "evaluate", merged, "--recipe", recipe, *(("--base", base) if base else ()))


def rules(
    rule: Annotated[
        str | None,
        typer.Argument(autocompletion=rule_words(), help="A rule to tell whole: formula, paper, cost and options."),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """List the merging rules, or tell one whole."""
    with command(quiet, as_json) as out:
        from loraloom.cli.rule_options import one_rule, rule_list
        from loraloom.merging import get_rule, rule_names

        if rule:
            out.result(get_rule(rule).schema(), one_rule(get_rule(rule)))
        else:
            every = [get_rule(name) for name in rule_names()]
            out.result({one.name: one.schema() for one in every}, rule_list(every))


def _check_unused(context: typer.Context, flag: str, why: str, names: Sequence[str]) -> None:
    """Raise LoraloomError where a parameter of `names` is given, which has no place beside `flag`; `auto` too."""
    # by its name: which click it is of depends on typer's version
    sources = {name: getattr(context.get_parameter_source(name), "name", "DEFAULT") for name in names}
    given = [name for name, source in sources.items() if source != "DEFAULT"]
    if given:
        flags = [name if name == "adapters" else f"--{name.replace('_', '-')}" for name in given]
        raise LoraloomError(f"{flag} {why}: leave out {' and '.join(flags)}", f"or leave out {flag}")


def _flags(context: typer.Context) -> list[str]:
    return [flag for parameter in context.command.params for flag in parameter.opts if flag.startswith("--")]
