"""Adapter folders screened: what `loraloom screen` and `loraloom merge --screen` read beside the adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from loraloom.adapters.config import CONFIG
from loraloom.adapters.dialects import DIALECTS, in_dialect
from loraloom.adapters.peft import read_adapter, read_provenance
from loraloom.adapters.together import layer_problems, one_base
from loraloom.adapters.update import Adapter
from loraloom.analysis.screening import Screening, screen
from loraloom.analysis.screening_declared import KnownStart
from loraloom.analysis.screening_texts import ScreenTexts
from loraloom.errors import LoraloomError, collecting, raise_problems, raise_together
from loraloom.files.tensors import read_tensors
from loraloom.merging.mends import ScreenFacts, ScreenMode
from loraloom.merging.names import input_names
from loraloom.merging.options import MergeOptions
from loraloom.progress import Reporter

_AVOID = "avoid.safetensors"


def screen_folders(
    folders: Sequence[Path],
    *,
    reference: Path | None = None,
    starts: Path | None = None,
    texts: Callable[[Mapping[str, Adapter]], ScreenTexts] | None = None,
    reporter: Reporter | None = None,
) -> Screening:
    """Screen adapter folders, each against all the others; see `screen`.

    reference: a folder that holds folders of adapters known to be honest, at any depth; those of other bases or shapes
      are passed over.
    starts: a folder that holds the adapters' starts, each by the name of its adapter's folder.
    texts: reads the base model and texts of the tasks of the adapters that are given, by name.

    Raises LoraloomError that tells all folders that cannot be read.
    """
    errors: list[LoraloomError] = []
    members: dict[str, Adapter] = {}
    for name, folder in zip(input_names(folders), folders, strict=True):
        with collecting(errors):
            members[name] = read_adapter(folder)
    raise_together(errors)
    members = dict(zip(members, _named_alike(list(members.values())), strict=True))
    known = _reference(reference, members) if reference else {}
    begun = {name: _start(one, starts / name if starts else None) for name, one in members.items()}
    given = {name: one for name, one in begun.items() if one is not None}
    read = texts(members) if texts else None
    return screen(members, reference=known, starts=given or None, texts=read, reporter=reporter)


def screen_members(
    mode: ScreenMode, drop: bool, reporter: Reporter, members: Mapping[str, Adapter], options: MergeOptions
) -> tuple[dict[str, Adapter], MergeOptions]:
    """Screen the adapters of a merge without texts; return those that stay, and the options with what is to be told.

    mode: "warn" leaves them all; "refuse" raises LoraloomError where one is to be refused.
    drop: leaves those out that are to be refused, in place of that, and their weights.

    Raises LoraloomError where none would be left.
    """
    found = screen(members, reporter=reporter)
    refused = found.of("refuse")
    told = [f"{name}: {'; '.join(found.adapters[name].reasons[:3])}" for name in refused]
    if mode == "refuse" and not drop:
        raise_problems(
            "screened and refused", told, "leave them out (--drop-refused does), or look at them: `loraloom screen`"
        )
    kept = {name: one for name, one in members.items() if not (drop and name in refused)}
    raise_problems("screened and refused", told if not kept else [], "nothing is left to merge")
    verdicts = {name: str(one.verdict) for name, one in found.adapters.items()}
    reasons = {name: one.reasons for name, one in found.adapters.items() if one.reasons}
    facts = ScreenFacts(mode, verdicts, reasons, refused if drop else [])
    weights = options.weights
    if weights is not None and len(weights) == len(members):
        weights = [weight for name, weight in zip(members, weights, strict=True) if name in kept]
    return kept, replace(options, weights=weights, screening=facts)


def _named_alike(adapters: list[Adapter]) -> list[Adapter]:
    """Return adapters of several tools with their layers named as by the first's. Raises LoraloomError as that does."""
    if len({one.dialect for one in adapters}) < 2:
        return adapters
    return in_dialect(adapters, DIALECTS[adapters[0].dialect])


def _reference(folder: Path, members: Mapping[str, Adapter]) -> dict[str, Adapter]:
    paths = sorted(path.parent for path in folder.rglob(CONFIG))
    raise_problems(str(folder), [] if paths else ["no adapter is below it"], "name a folder of adapter folders")
    given = {one.path.resolve() for one in members.values() if one.path}
    first, found = next(iter(members.values())), dict[str, Adapter]()
    for path in paths:
        if path.resolve() in given:
            continue
        one = read_adapter(path)
        if one_base(first, one) is not False and not layer_problems([*members.values(), one]):
            found[f"{folder.name}/{path.relative_to(folder)}"] = one
    hint = "take adapters of the same base model"
    raise_problems(str(folder), [] if found else ["none of its adapters fits these"], hint)
    return found


def _start(adapter: Adapter, folder: Path | None) -> KnownStart | None:
    """Return what an adapter started from, by the start's folder or what lies beside it; None where neither tells."""
    kept = folder if folder and folder.is_dir() else None
    init = (read_provenance(kept) if kept else read_provenance(adapter.path) if adapter.path else {}).get("init")
    keep = init.get("keep") if isinstance(init, dict) else "free"
    beside = next((place / _AVOID for place in (kept, adapter.path) if place and (place / _AVOID).is_file()), None)
    if kept is None and beside is None:
        return None
    A = {at: update.A for at, update in read_adapter(kept).updates.items()} if kept else {}
    known = keep if keep in ("frozen", "projected") else "free"
    return KnownStart(known, A, read_tensors(beside) if beside else {})
