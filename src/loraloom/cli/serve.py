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
