"""The commands around serving: export, serve-check."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from loraloom.cli.common import AsJson, Output, Overwrite, Quiet, ServerOption, command, typed
from loraloom.errors import LoraloomError


def export(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder, merged or not. It stays as it is.")],
    output: Output,
    server: ServerOption = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter anew as a server takes it: the same updates, in one rank, with alpha the same and no heads."""
    with command(quiet, as_json) as out:
        from loraloom.adapters.servers import SERVERS
        from loraloom.cli.merge_page import serve_steps
        from loraloom.cli.words import counted
        from loraloom.merging.card import served_line
        from loraloom.merging.serving import export_folder

        if server is None:
            raise LoraloomError("an export is for a server", f"name it: --for {', --for '.join(SERVERS)}")
        facts = export_folder(adapter, server, output, command=typed(), overwrite=overwrite)
        out.result(asdict(facts), "")
        ranks = f"rank {facts.ranks[0]}" if len(facts.ranks) == 1 else f"ranks {facts.ranks[0]} to {facts.ranks[-1]}"
        lines = [
            ("written for", served_line(facts.served)),
            ("made of", f"{counted(facts.layers, 'layer')} of {ranks}"),
        ]
        lines += [("head", f"{name}: beside it, in heads/") for name in facts.heads]
        if facts.left_out:
            lines.append(("left out", "; ".join(f"{name} ({why})" for name, why in facts.left_out.items())))
        out.facts(str(output), lines)
        serve_steps(out, facts.served, output, facts.base)


def serve_check(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder, merged or not.")],
    members: Annotated[
        list[Path] | None,
        typer.Argument(help="Adapters to swap with. Without any those that were merged, where they lie beside it."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Base model in place of the one that the adapter names: hub name or local folder."),
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Prompt to answer. Give it once for each.")] = None,
    no_chat: Annotated[
        bool, typer.Option("--no-chat", help="Give prompts as they stand, without the base's chat template.")
    ] = False,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that an answer has at most.")] = 24,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Serve adapters by PEFT, swap them, and compare each with the base that has the same update in its weights.

    Exits with 1 where logits differ by more than rounding.
    """
    with command(quiet, as_json) as out:
        from loraloom.cli.words import counted, listed, number
        from loraloom.study.serving import PROMPTS, serve_check as check

        facts = check(adapter, base, members or (), prompts=prompt or PROMPTS, chat=not no_chat, tokens=tokens)
        out.result(asdict(facts), "")
        rows = [
            (
                one.adapter,
                *(number(figure) for figure in (one.effect, one.difference, one.again, one.rounding)),
                "yes" if one.fine else "NO",
            )
            for one in facts.adapters
        ]
        title = f"Largest differences of logits at {counted(facts.tokens, 'token')} of answers"
        heads = ("adapter", "from the base", "served from fused", "after swaps", "rounding", "as it is")
        out.table(title, heads, rows)
        for one in facts.answers:
            if one.adapter == facts.adapters[0].adapter:
                out.say(f"> {one.prompt}\n{one.answer or '(an empty answer)'}")
        if facts.absent:
            out.hint(f"not found beside it, or changed since: {listed(facts.absent)}; name their folders to swap them")
        wrong = [one.adapter for one in facts.adapters if not one.fine]
        if wrong:
            out.warn(f"PEFT serves {listed(wrong)} as something else than the update in the file: export it anew")
            raise typer.Exit(1)
