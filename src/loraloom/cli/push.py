"""The command push: a merged adapter onto the hub, told first and sent when it is said so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraloom.cli.common import AsJson, Quiet, command
from loraloom.cli.words import counted, listed

if TYPE_CHECKING:
    from loraloom.cli.terminal import Out
    from loraloom.merging.push import Push


def push(
    merged: Annotated[Path, typer.Argument(help="Folder of a merged adapter, as `loraloom merge` writes it.")],
    place: Annotated[str, typer.Argument(help="Where it goes: org/name on the hub, or org/name@branch.")],
    measured: Annotated[
        Path | None,
        typer.Option(help="What `loraloom evaluate MERGED --json` printed: the model card gets it as a table."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="For you alone. A repository that everybody can read is refused then.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Send it. Without it nothing is sent, and the hub is not asked.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Tell what of a merged adapter would go to the Hugging Face hub, with its model card; with --yes send it.

    The card names base, members with their hashes, rule, scale, what the screening said and, with --measured, scores.
    """
    with command(quiet, as_json) as out:
        from loraloom.merging.push import plan_push, push as send

        plan = plan_push(merged, place, private=private, measured=measured)
        if not yes:
            out.facts(f"{merged}: would go to {place}", _facts(plan))
            out.say(plan.card)
        _warn(out, plan)
        done = send(plan) if yes else None
        files = [{"name": name, "size": size} for name, size in plan.files.items()]
        out.result({**asdict(plan), "files": files, "uploaded": done and asdict(done)}, "")
        if done:
            out.facts(f"{merged}: is on the hub", [("commit", done.commit), ("page", done.url)])
            out.next(
                "merge it, pinned",
                "loraloom",
                "merge",
                f"{place.partition('@')[0]}@{done.commit}",
                "ADAPTER",
                "-o",
                "merged",
            )
        else:
            out.hint("nothing was sent: --yes sends it")


def _facts(plan: Push) -> Iterator[tuple[str, str]]:
    from loraloom.merging.card import bytes_in_words

    yield "files", f"{counted(len(plan.files), 'file')}, {bytes_in_words(sum(plan.files.values()))}"
    for name, size in plan.files.items():
        yield "", f"{name}: {bytes_in_words(size)}"
    if plan.left_out:
        yield "left out", f"{listed(plan.left_out)}: not written by loraloom"
    yield (
        "read by",
        "you alone" if plan.private else "everybody, or as your organisation has it: --private for you alone",
    )


def _warn(out: Out, plan: Push) -> None:
    """Tell what people will miss in the card."""
    if not plan.base_on_hub:
        out.warn(f"its base, {plan.base or 'without a name'}, is no name on the hub: nobody will know what to load")
    refused = [name for name, verdict in plan.verdicts.items() if verdict == "refuse"]
    if refused:
        out.warn(f"the screening refused {listed(refused)}, and the card says so")
    if not plan.verdicts:
        out.warn("its members were not screened, and the card says nothing of it")
    if not plan.measured:
        out.hint(
            "no scores in the card: --measured takes what `loraloom evaluate MERGED --recipe RECIPE --json` prints"
        )
