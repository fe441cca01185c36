"""A merged adapter on its way to the hub: which of its files go, and the model card with what was measured of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraloom.adapters.peft import adapter_sha256
from loraloom.adapters.upload import Uploaded, split_place, upload
from loraloom.errors import LoraloomError, collecting, first_few, raise_together
from loraloom.files.outputs import RECORD, read_record
from loraloom.files.reading import read_json_object
from loraloom.merging.facts import MergedFacts

_CARD = "README.md"
_MEASURED = "## Measured"
_AGAIN = "write it anew: loraloom evaluate MERGED --recipe RECIPE --json > measured.json"


@dataclass(frozen=True)
class Push:
    """What would go up.

    place: `org/name`, or `org/name@branch`. files: their bytes by name, the card's as it goes up.
    left_out: files of the folder that loraloom did not write. card: the whole text of the model card.
    base: as the members name it; `base_on_hub` where that can be a name on the hub.
    verdicts: of the screening before the merge, by member; empty where none was made.
    measured: whether the card has a table of what was measured.
    """

    folder: str
    place: str
    private: bool
    files: dict[str, int]
    left_out: list[str]
    card: str
    base: str
    base_on_hub: bool
    verdicts: dict[str, str]
    measured: bool


def plan_push(folder: Path, place: str, *, private: bool = False, measured: Path | None = None) -> Push:
    """Return what a push of a merged adapter would put on the hub, which is not asked.

    folder: as `merge` wrote it. place: `org/name` or `org/name@branch`.
    measured: what `evaluate --json` printed of this adapter, for a table in the card.

    Raises LoraloomError where the folder is no merged adapter, or the figures are of another one.
    """
    errors: list[LoraloomError] = []
    with collecting(errors):
        split_place(place)
    facts, section = None, ""
    with collecting(errors):
        facts = MergedFacts.read(folder)
        section = _measured(measured, folder) if measured else ""
    raise_together(errors)
    assert facts is not None
    record = read_record(folder)
    ours = {RECORD, *record.files} if record else set()
    there = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    lost = sorted(ours - there.keys())
    if lost or not record:
        what = f"{first_few(lost)} of it missing" if record else "its list of files is missing"
        raise LoraloomError(f"{folder}: not the whole of a merged adapter: {what}", "merge the adapters again")
    written = there[_CARD].read_text(encoding="utf-8", errors="replace")
    card = written.partition(f"\n{_MEASURED}\n")[0].rstrip("\n") + "\n" + section if section else written
    sizes = {name: path.stat().st_size for name, path in there.items() if name in ours}
    return Push(
        folder=str(folder),
        place=place,
        private=private,
        files={**sizes, _CARD: len(card.encode())},
        left_out=sorted(there.keys() - ours),
        card=card,
        base=facts.base,
        base_on_hub=bool(re.search(r"^base_model: ", card, flags=re.M)),
        verdicts=facts.screening.verdicts if facts.screening else {},
        measured=f"\n{_MEASURED}\n" in card,
    )


def push(plan: Push) -> Uploaded:
    """Put on the hub what was planned, in one commit. Raises LoraloomError where the hub does not take it."""
    files: dict[str, Path | bytes] = {name: Path(plan.folder, name) for name in plan.files}
    files[_CARD] = plan.card.encode()
    return upload(plan.place, files, "Merged adapter, by loraloom", private=plan.private)


def _measured(path: Path, folder: Path) -> str:
    """Return the card's table of what `evaluate --json` told of this adapter."""
    told = read_json_object(path, _AGAIN)
    try:
        if told["sha256"] != adapter_sha256(folder):
            raise LoraloomError(f"{path}: measured of other weights than those of {folder}", _AGAIN)
        rows = [_row(one) for one in told["tasks"]]
        if len(rows) > 1:
            rows.append(_row({"task": "average", "metric": "", **told["average"]}))
        head = f"On {told['split']!s} rows, in points with their standard error over rows."
    except (KeyError, TypeError, ValueError) as error:
        raise LoraloomError(f"{path}: is not what `evaluate --json` prints", _AGAIN) from error
    return "\n".join(["", _MEASURED, "", head, "", "| task | metric | value |", "|---|---|---|", *rows, ""])


def _row(one: Mapping[str, Any]) -> str:
    name, metric = (str(one[key]).replace("|", "/").replace("\n", " ") for key in ("task", "metric"))
    return f"| {name} | {metric} | {100 * float(one['value']):.1f} ±{100 * float(one['stderr']):.1f} |"
