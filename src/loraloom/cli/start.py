"""The commands that make one adapter: init writes where its training starts, train trains it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraloom.cli.common import AsJson, Base, Overwrite, Quiet, RecipeOption, ReportTo, Seed, command, read_recipe
from loraloom.cli.completion import words
from loraloom.cli.words import counted, listed, number, percent
from loraloom.starts.options import Keep, Scale, StartRule

if TYPE_CHECKING:
    from loraloom.cli.terminal import Out
    from loraloom.starts.initialise import Initialisation

_KEPT = {
    "free": "let go while it trains",
    "frozen": "frozen",
    "projected": "kept off the loud directions by a callback",
}
_SCALED = {"unit": "rows of norm 1", "response": "responds as PEFT's default A would"}


def init(
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Adapter folder to write, or, for several tasks, the folder in which they lie."
        ),
    ],
    tasks: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Statistics of all tasks. Each gets a folder in OUTPUT by its file's name, started off all others."
        ),
    ] = None,
    own: Annotated[
        Path | None, typer.Option("--own", help="Statistics of the task itself. They are not needed, and sharpen it.")
    ] = None,
    other: Annotated[
        list[Path] | None,
        typer.Option("--other", help="Statistics of another task to stay off. Give it once for each."),
    ] = None,
    atlas: Annotated[
        Path | None,
        typer.Option("--atlas", help="Atlas of the base model, in place of other tasks' statistics."),
    ] = None,
    after: Annotated[
        list[Path] | None,
        typer.Option("--after", help="Adapter that exists already, to stay off too. Give it once for each."),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter.")] = 8,
    alpha: Annotated[float, typer.Option(min=0, help="LoRA's alpha: the update is alpha / rank times B A.")] = 16,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            help="Layers to adapt, by the ending of their path, as in q_proj. Give it once for each; without it all "
            "layers of the statistics are.",
        ),
    ] = None,
    rslora: Annotated[
        bool, typer.Option("--rslora", help="Scale by alpha / sqrt(rank), as rank-stabilised LoRA does.")
    ] = False,
    rule: Annotated[
        StartRule,
        typer.Option(
            help="Where A starts: apart is at random off the loud directions, osrm the paper's quietest directions; "
            "mean, random, shared and default (PEFT's own) are controls."
        ),
    ] = "apart",
    keep: Annotated[
        Keep,
        typer.Option(
            help="What becomes of A in training: free lets it go, frozen fixes it, projected keeps it off the loud "
            "directions by a callback."
        ),
    ] = "free",
    scale: Annotated[
        Scale | None,
        typer.Option(
            help="Length of A's rows: unit is 1, response makes A respond as PEFT's default A would. Without it "
            "response for apart, unit for all other rules."
        ),
    ] = None,
    task_type: Annotated[
        str | None,
        typer.Option(
            "--task-type",
            metavar="CAUSAL_LM|SEQ_2_SEQ_LM",
            autocompletion=words("CAUSAL_LM", "SEQ_2_SEQ_LM"),
            help="PEFT's word for what the base does, for trainers that ask for it, as Unsloth does.",
        ),
    ] = None,
    energy_share: Annotated[
        float,
        typer.Option(help="Share of the others' energy whose directions count as loud. More leaves less room for A."),
    ] = 0.5,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of A. Adapters with one seed start from one A and merge far worse; without it the folder's "
            "name gives one."
        ),
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write adapter folders that training starts from: A in a subspace, B = 0. No base model is loaded.

    Either name an atlas (--atlas) or the statistics of other tasks (--other), and get one folder. Or give the
    statistics of all tasks as arguments, and get a folder each.
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
        more: dict[str, Any] = {"after": after or [], "task_type": task_type, "overwrite": overwrite}
        with out.progress() as shown:
            shown.begin("starts", 1)
            if tasks:
                done = initialise_all_from_files(output, tasks, lora, options, seed=seed or 0, **more)
            else:
                done = {output: initialise_from_files(output, own, others, lora, options, seed=seed, **more)}
        shape = {"rank": rank, "alpha": alpha, "rslora": rslora}
        out.result({"starts": [{"folder": folder, **shape, **_facts(one)} for folder, one in done.items()]}, "")
        _page(done, f"rank {rank}, alpha {number(alpha)}", out)


def _facts(start: Initialisation) -> dict[str, Any]:
    told = start.provenance
    return {
        **told["init"],
        "base": told["base"],
        "layers": len(start.A),
        "own": told["own"],
        "others": [{"statistics": name, **facts} for name, facts in told["others"].items()],
        "after": told["after"],
        "diagnostics": start.diagnostics(),
        "notes": start.notes(),
    }


def _page(done: Mapping[Path, Initialisation], shape: str, out: Out) -> None:
    first = next(iter(done.values()))
    told, options = first.provenance, first.provenance["init"]
    folder = next(iter(done))
    several = len(done) > 1
    title = f"{counted(len(done), 'start')} in {folder.parent}" if several else f"{folder}: training starts from it"
    staying = "each other" if several else listed(list(told["others"]))
    facts = [
        ("base model", told["base"]),
        ("adapter", f"{shape}, {counted(len(first.A), 'layer')}, B = 0: it starts as the base model does"),
        ("A", f"rule {options['rule']}, {_SCALED[options['scale']]}, {_KEPT[options['keep']]}"),
        ("stays off", staying + (f", and the rows of {listed(told['after'])}" if told["after"] else "")),
    ]
    if not several:
        facts.append(("seed", str(options["seed"])))
    out.facts(title, facts)
    columns = ("start", "directions off", "others' energy", "own energy", "by chance")
    rows = [(folder.name, *_seen(one)) for folder, one in done.items()]
    out.table("What A sees, mean over layers; chance: any A of this rank", columns, rows)
    for note in sorted({note for one in done.values() for note in one.notes()}):
        out.hint(note)
    if options["keep"] != "free":
        out.hint(
            f'keep A so: trainer.add_callback(keep_callback("{folder}")), from loraloom; `train` does it by itself'
        )
    out.next("train it", "loraloom", "train", "--recipe", "RECIPE", "--task", "TASK", "--init", folder, "-o", "ADAPTER")
    out.hint(
        f'or PeftModel.from_pretrained(model, "{folder}", is_trainable=True); in axolotl, lora_model_dir: {folder}'
    )


def _seen(start: Initialisation) -> tuple[str, ...]:
    seen = start.diagnostics()
    own = percent(seen["own_energy"]) if start.provenance["own"] else "not known"
    chance = sum(A.shape[0] / A.shape[1] for A in start.A.values()) / len(start.A)
    return number(seen["avoided"]), percent(seen["others_energy"]), own, percent(chance)


def train(
    recipe: RecipeOption,
    task: Annotated[str, typer.Option("--task", help="Task of the recipe to train.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Adapter folder to write. It appears whole or not.")],
    start: Annotated[
        Path | None,
        typer.Option(
            "--init", help="Adapter folder to start from, as `loraloom init` writes it. Without it plain LoRA starts."
        ),
    ] = None,
    base: Base = None,
    seed: Seed = 0,
    report_to: ReportTo = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train the adapter of one task; the same command after a kill goes on from the last checkpoint.

    Under `accelerate launch --multi_gpu -m` or torchrun the processes share out every batch, and the first one writes.
    """
    with command(quiet, as_json) as out:
        from loraloom.model.processes import leave
        from loraloom.study.by_hand import train_from_recipe

        chosen = read_recipe(recipe, base, report_to)
        with out.goes_on(), out.progress() as shown:
            done = train_from_recipe(chosen, task, output, start, seed, shown, overwrite=overwrite)
        heldout = {"metric": done.metric, "heldout": done.heldout, "steps": done.steps}
        out.result({"folder": done.folder, "task": task, **heldout}, "")
        facts = [(f"held-out {done.metric}", f"{100 * done.heldout:.1f}"), ("steps", number(done.steps))]
        out.facts(f"{done.folder}: an adapter of task {task}", facts)
        out.next("merge it with others", "loraloom", "merge", done.folder, "ADAPTER", "-o", "merged")
        leave()
