"""The command list: which adapters lie below a folder, and which of them can be merged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraloom.cli.common import AsJson, Quiet, command
from loraloom.cli.words import counted, listed, number, span

if TYPE_CHECKING:
    from loraloom.adapters.listing import Group, Listed, Listing


def list_(
    folder: Annotated[Path, typer.Argument(help="Folder of adapters, at any depth.")],
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """List the adapters below a folder by base model and layers, with rank, alpha, energy, and whether screened.

    Those of one group can be merged as they are. Verdicts are those that `loraloom screen --record` wrote to
    screening.json in the folder.
    """
    with command(quiet, as_json) as out:
        from loraloom.adapters.listing import list_adapters

        with out.progress() as shown:
            found = list_adapters(folder, reporter=shown)
        out.result(_facts(found), "")
        for group in found.groups:
            columns = ("adapter", "rank", "alpha", "energy", "screened")
            out.table(_title(group), columns, [_row(one) for one in group.adapters])
        for name, problem in found.unread.items():
            out.warn(f"{name} cannot be read: {problem}")


def _title(group: Group) -> str:
    shapes = listed([f"{count} of {m} x {n}" for (m, n), count in group.shapes.items()])
    base = group.base or "a base without a name"
    return f"{base}: {counted(len(group.adapters), 'adapter')} of {listed(group.targets)}; layers: {shapes}"


def _row(one: Listed) -> tuple[str, ...]:
    return one.name, span(*one.rank), span(*one.alpha), number(one.energy), one.verdict or "no"


def _facts(listing: Listing) -> dict[str, Any]:
    return {
        "groups": [
            {
                "base": group.base or None,
                "targets": group.targets,
                "shapes": [{"m": m, "n": n, "layers": count} for (m, n), count in group.shapes.items()],
                "adapters": [
                    {
                        "name": one.name,
                        "rank": {"least": one.rank[0], "largest": one.rank[1]},
                        "alpha": {"least": one.alpha[0], "largest": one.alpha[1]},
                        "energy": one.energy,
                        "verdict": one.verdict,
                    }
                    for one in group.adapters
                ],
            }
            for group in listing.groups
        ],
        "unread": [{"name": name, "problem": problem} for name, problem in listing.unread.items()],
    }
