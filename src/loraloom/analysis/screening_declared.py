"""Detectors that hold an adapter to its folder's own word: its rank, its targets, the start it promised to keep to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loraloom.adapters.lowrank import update_bases
from loraloom.adapters.patterns import pattern_values, targeted
from loraloom.adapters.update import Adapter, is_expert
from loraloom.analysis.detectors import Sighting, detector
from loraloom.analysis.screening_measures import Seen
from loraloom.analysis.screening_weights import apart, logs_of, sightings
from loraloom.errors import LoraloomError

_EXACT = 1e-2  # share of A by which rounding to 8 bits may move it
_SPREAD = 0.8  # logs by which honest adapters leave their starts differently


@dataclass(frozen=True)
class KnownStart:
    """What one adapter's A started from, and what it was to be kept to.

    keep: "free", "frozen" or "projected". A: by module path, (r, n). avoid: (n, p) with orthonormal columns.
    """

    keep: str
    A: Mapping[str, Tensor]
    avoid: Mapping[str, Tensor]


@detector("no update", says="it changes nothing: every update is zero", look=1.0, paper="plain")
def no_update(seen: Seen) -> dict[str, Sighting]:
    """Whether every layer's update is zero."""
    total = seen.energy.nansum(dim=1)
    return sightings(seen, (total == 0).double(), total, torch.zeros_like(total))


@detector(
    "rank",
    says="{where} has factors of rank {value}, its config declares {compared}",
    look=1.01,
    refuse=1.01,
    paper="the folder's own word",
)
def rank(seen: Seen) -> dict[str, Sighting]:
    """Rows of A over the rank that r and rank_pattern of the config declare; the worst layer."""
    found = {}
    for name in seen.members:
        one = seen.adapters[name]
        layers = [at for at in one.shapes if not is_expert(one.forms.get(at))]
        if one.config.get("r") and layers:
            declared = pattern_values(one.config.get("rank_pattern") or {}, layers, one.config["r"])
            worst = max(layers, key=lambda at: one.shapes[at].r / declared[at])
            own, told = float(one.shapes[worst].r), float(declared[worst])
            found[name] = Sighting(own / told, own, told, worst)
    return found


@detector(
    "targets",
    says="{value} of its layers are none that its config's targets name, {where} for one: PEFT would leave them out",
    look=1.0,
    refuse=1.0,
    paper="the folder's own word",
)
def targets(seen: Seen) -> dict[str, Sighting]:
    """Layers with an update that target_modules do not name, or that exclude_modules name."""
    found = {}
    for name in seen.members:
        beyond = _beyond_targets(seen.adapters[name])
        if beyond is not None:
            found[name] = Sighting(float(len(beyond)), float(len(beyond)), 0.0, beyond[0] if beyond else "")
    return found


@detector(
    "contract",
    says="{value} of A is where its start promised to stay off, in {where}; rounding leaves {compared}",
    look=1.0,
    refuse=5.0,
    paper="the start's own word: init.keep in loraloom.json",
)
def contract(seen: Seen, *, starts: Mapping[str, KnownStart]) -> dict[str, Sighting]:
    """Of an A kept `frozen` the share by which it differs from its start, of a `projected` one the share in the
    directions to stay off; |.|_F over |A|_F, the worst layer. A start that was let go promised nothing.
    """
    found = {}
    for name in seen.members:
        if name in starts and starts[name].keep != "free":
            shares = _broken(seen.adapters[name], starts[name])
            worst = max(shares, key=lambda at: shares[at], default="")
            if worst:
                found[name] = Sighting(shares[worst] / _EXACT, shares[worst], _EXACT, worst)
    return found


@detector(
    "start",
    says="A's rows left {value} of the space that they started in, the others' {compared}",
    look=4.0,
    paper="own: what was trained moves as the others do; what was computed need not",
)
def start(seen: Seen, *, starts: Mapping[str, KnownStart]) -> dict[str, Sighting]:
    """One less the overlap of A's row space with its start's, mean over layers, on both sides of the others'."""
    left = torch.tensor(
        [_left(one, starts[name]) if name in starts else torch.nan for name, one in seen.adapters.items()],
        dtype=torch.float64,
    )
    return apart(seen, logs_of(left), _SPREAD)


def _broken(adapter: Adapter, start: KnownStart) -> dict[str, float]:
    shares = {}
    for at in adapter.shapes:
        A = adapter.updates[at].A.double()
        if start.keep == "frozen" and at in start.A:
            shares[at] = float((A - start.A[at].double()).norm() / A.norm())
        elif start.keep == "projected" and at in start.avoid:
            shares[at] = float((A @ start.avoid[at].double()).norm() / A.norm())
    return shares


def _left(adapter: Adapter, start: KnownStart) -> float:
    common = [at for at in adapter.shapes if at in start.A and start.A[at].shape[1] == adapter.shapes[at].n]
    found = []
    for at in common:
        rows = update_bases(adapter.updates[at])[0]
        before = torch.linalg.qr(start.A[at].double().T).Q
        found.append(1 - float((rows.T @ before).square().sum()) / max(rows.shape[1], 1))
    return max(sum(found) / len(found), 1e-6) if found else torch.nan


def _beyond_targets(adapter: Adapter) -> list[str] | None:
    """Return the layers that no target names; None where there is no word of targets."""
    config = adapter.config
    named, layers = config.get("target_modules"), [at for at in adapter.shapes if not is_expert(adapter.forms.get(at))]
    if not named or named == "all-linear":
        return None
    try:
        inside = set(targeted(layers, named))
        excluded = config.get("exclude_modules")
        inside -= set(targeted(layers, excluded)) if excluded else set()
    except LoraloomError:
        return None
    return [at for at in layers if at not in inside]
