"""The command check: what an adapter's folder is, and whether a merge is what its members say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraloom.cli.common import AsJson, Quiet, command
from loraloom.cli.words import counted, listed, number, percent, span

if TYPE_CHECKING:
    from loraloom.analysis.checking import Check, FolderFacts, MemberMerge
    from loraloom.cli.terminal import Out

_LOUD = 20  # times the middle layer's |dW| from which a layer is told
_PRUNED = 0.02  # share of zeros among the entries of A and B


def check(
    folder: Annotated[Path, typer.Argument(help="Adapter folder.")],
    members: Annotated[
        list[Path] | None, typer.Argument(help="The adapters that it was merged from, where they are at hand.")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Tell what an adapter's folder is and what is odd about it; with its members, whether their merge is right.

    It finds what PEFT's add_weighted_adapter gets wrong: factors of different members that multiply, and the sqrt(r) of
    rsLoRA that is applied twice.
    """
    with command(quiet, as_json) as out:
        from loraloom.analysis.checking import check_folder_of

        found = check_folder_of(folder, members or [])
        out.result({**asdict(found), "wrong": found.wrong}, "")
        out.facts(found.folder.path, _facts(found.folder))
        for warning in _odd(found.folder, found.merge is not None):
            out.warn(warning)
        if found.merge:
            _merge_page(out, found, found.merge)


def _facts(facts: FolderFacts) -> Iterator[tuple[str, str]]:
    yield "base", facts.base or "not named"
    yield "layers", f"{facts.layers}: {listed(facts.targets)}"
    yield "rank", span(*facts.ranks)
    rule = "alpha / sqrt(r), rsLoRA" if facts.rslora else "alpha / r"
    yield "scaling", f"{span(*facts.scalings)}, {rule}"
    yield (
        "|dW|^2",
        f"{number(facts.energy)}; 99 % of a layer's in {facts.held} directions, the middle one of the layers",
    )
    yield "dtype", facts.dtype
    yield "heads", listed(facts.heads) or "none"
    yield "made by", facts.made_by or "not known"


def _odd(facts: FolderFacts, has_members: bool) -> Iterator[str]:
    """Yield what is odd about a folder alone."""
    if not facts.base:
        yield "no base model is named: base_model_name_or_path is empty"
    elif facts.base.startswith(("/", "~", ".")):
        yield f"its base is a folder on somebody's disk: {facts.base}"
    if len(facts.still) == facts.layers:
        yield "every update is zero: not trained, or its start"
    elif facts.still:
        yield f"{counted(len(facts.still), 'layer')} of {facts.layers} with an update of zero: {listed(facts.still, 3)}"
    if facts.zeros > _PRUNED:
        yield (
            f"{percent(facts.zeros)} of the entries of A and B are exactly 0: factors that were pruned apart, as "
            "PEFT's ties, dare and magnitude_prune do, multiply to something else than the pruned update"
        )
    if facts.leftover and not has_members:
        yield (
            f"alpha is r beside use_rslora, so that {facts.leftover:.3g} multiplies: right if it was trained so, but a "
            "merge of PEFT's add_weighted_adapter is that much too loud; give its members to tell which"
        )
    module, times = facts.loudest
    if times > _LOUD:
        yield f"{module} is {number(times)} times as loud as the middle layer"


def _merge_page(out: Out, found: Check, merge: MemberMerge) -> None:
    """Print what a folder is of its members, and what to do where that is not what was meant."""
    leftover = found.folder.leftover
    if merge.weights:
        heads = ("member", "weight in force", *(["without the sqrt(r)"] if leftover else []))
        rows = [
            (Path(one.path).name, number(weight), *([number(weight / leftover)] if leftover else []))
            for one, weight in zip(found.members, merge.weights, strict=True)
        ]
        out.table("What it holds of its members", heads, rows)
    out.say(_verdict(merge))
    if leftover:
        out.warn(
            f"use_rslora is set, so that {leftover:.3g} multiplies a merge that has every member's scaling in it: set "
            "use_rslora to false in adapter_config.json"
        )
    if found.wrong:
        out.next("merge them right", "loraloom", "merge", *(one.path for one in found.members), "-o", "merged")


def _verdict(merge: MemberMerge) -> str:
    rest = f"; no sum of them is {percent(merge.unexplained)} of it"
    return {
        "sum": "A sum of its members, exact.",
        "truncated sum": f"A sum of its members, cut to a lower rank{rest}: as much was lost.",
        "crossed factors": (
            "A and B of its members were summed apart, as PEFT's `linear` does, so that factors of different members "
            f"multiply: these cross terms are {percent(merge.crossed)} of its energy, and nobody trained them."
        ),
        "dropped entries": f"Entries of A and B were dropped apart, as PEFT's ties, dare and magnitude_prune do{rest}.",
        "other": f"Neither a sum of its members nor one of lower rank{rest}.",
    }[merge.kind]
