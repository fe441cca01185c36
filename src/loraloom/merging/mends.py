"""What a screening said of the adapters of a merge and what was done about it: for loraloom.json and the model card."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

ScreenMode = Literal["off", "warn", "refuse"]


@dataclass(frozen=True)
class ScreenFacts:
    """What `loraloom merge --screen` found, and which adapters were dropped.

    mode: as asked for. verdicts: pass, look or refuse, by adapter, those dropped too. reasons: in words, by adapter.
    dropped: adapters that were refused and left out.
    """

    mode: ScreenMode
    verdicts: dict[str, str]
    reasons: dict[str, list[str]]
    dropped: list[str]

    @property
    def warnings(self) -> list[str]:
        """Return a warning for each adapter that is to be refused, the first reasons in full."""
        found = []
        for name in (name for name, verdict in self.verdicts.items() if verdict == "refuse"):
            reasons, word = self.reasons[name], "dropped" if name in self.dropped else "suspicious"
            more = f"; and {len(reasons) - 2} more: `loraloom screen` tells all" if len(reasons) > 2 else ""
            found.append(f"{name} is {word}: {'; '.join(reasons[:2])}{more}")
        return found


def clip_problems(clip: float | None, normalise: str) -> list[str]:
    """Tell what is wrong with a factor to clip by."""
    if clip is None:
        return []
    problems = [] if math.isfinite(clip) and clip > 0 else [f"clip {clip} is no factor above 0"]
    if normalise not in ("none", "auto"):
        problems.append("clip and normalise both set how loud adapters are: choose one")
    return problems


def clip_factors(energies: Mapping[str, Mapping[str, float]], clip: float) -> dict[str, dict[str, float]]:
    """Return what brings each module's |dW|^2 to at most `clip` times the members' median there; of those above alone.

    energies: by adapter's name and module path, of the adapters that take part.
    """
    by_layer: dict[str, list[float]] = {}
    for layers in energies.values():
        for module, energy in layers.items():
            by_layer.setdefault(module, []).append(energy)
    most = {module: clip * statistics.median(found) for module, found in by_layer.items()}
    found = {
        name: {module: math.sqrt(most[module] / one) for module, one in layers.items() if one > most[module]}
        for name, layers in energies.items()
    }
    return {name: factors for name, factors in found.items() if factors}
