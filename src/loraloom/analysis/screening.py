"""Whether adapters of strangers look as honest ones do: a verdict for each, every number beside its comparison.

It is a screen, no protection. A backdoor that was trained in plainly, at no larger scale than the task, leaves next to
nothing in the weights, and who knows these detectors can get around them; docs/screening.md tells what was missed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from loraloom.adapters.together import layer_problems
from loraloom.adapters.update import Adapter
from loraloom.analysis import (  # noqa: F401 (importing a family registers it)
    screening_declared,
    screening_texts,
    screening_together,
    screening_weights,
)
from loraloom.analysis.detectors import Detector, Sighting, Verdict, every_detector
from loraloom.analysis.screening_declared import KnownStart
from loraloom.analysis.screening_measures import Seen, measure
from loraloom.analysis.screening_texts import ScreenTexts
from loraloom.errors import raise_problems
from loraloom.progress import Reporter

_ORDER: tuple[Verdict, ...] = ("pass", "look", "refuse")


@dataclass(frozen=True)
class Finding:
    """What one detector tells of one adapter; see `Sighting` for the numbers.

    look, refuse: scores from which on it is one; None where it never is.
    reason: all of it in words.
    """

    detector: str
    verdict: Verdict
    score: float
    value: float
    compared: float
    where: str
    look: float
    refuse: float | None
    reason: str

    @classmethod
    def of(cls, found: Detector, sighting: Sighting) -> Finding:
        """Return what a sighting means to its detector."""
        score, value, compared, where = sighting
        told = found.says.format(value=_number(value), compared=_number(compared), where=where)
        refuse = None if math.isinf(found.refuse) else found.refuse
        return cls(found.name, found.verdict(score), score, value, compared, where, found.look, refuse, told)


@dataclass(frozen=True)
class Screened:
    """One adapter's verdict: the worst of its findings, which are in the order of the detectors.

    silent: detectors that could tell nothing of it.
    """

    verdict: Verdict
    findings: list[Finding]
    silent: list[str]

    @property
    def reasons(self) -> list[str]:
        """Return what speaks against it, in words, the worst first."""
        told = [one for one in self.findings if one.verdict != "pass"]
        worst = sorted(told, key=lambda one: (_ORDER.index(one.verdict), one.score / one.look), reverse=True)
        return [one.reason for one in worst]


@dataclass(frozen=True)
class Screening:
    """The verdicts by adapter, and how they came about.

    compared: how many other adapters each was compared with.
    reference: names of adapters that were compared with and not judged.
    left_out: detectors that did not run, with what they need.
    """

    adapters: dict[str, Screened]
    compared: int
    reference: list[str]
    left_out: dict[str, list[str]]

    def of(self, verdict: Verdict) -> list[str]:
        """Return the names of the adapters with this verdict."""
        return [name for name, one in self.adapters.items() if one.verdict == verdict]

    @property
    def warnings(self) -> list[str]:
        """Return a sentence for each adapter that does not pass."""
        return [f"{name}: {'; '.join(one.reasons)}" for name, one in self.adapters.items() if one.reasons]


def screen(
    adapters: Mapping[str, Adapter],
    *,
    reference: Mapping[str, Adapter] | None = None,
    starts: Mapping[str, KnownStart] | None = None,
    texts: ScreenTexts | None = None,
    reporter: Reporter | None = None,
) -> Screening:
    """Screen adapters of one base model, each against all the others.

    adapters: to be judged, by name.
    reference: others that are known to be honest, by names of their own: to compare with. Without them there are but
      the adapters themselves, and of fewer than four little can be said.
    starts: what each adapter's A started from, by name, where it is known.
    texts: the base model with a few texts of each adapter's task, for the detectors that look at texts.
    reporter: is told how far the work is.

    Raises LoraloomError where the adapters are not of one base, by their layers' shapes.
    """
    known = dict(reference or {})
    members = list(adapters.values())
    problems = [] if members else ["no adapters: give at least one"]
    problems += layer_problems([*members, *known.values()])
    problems += [f"{name!r} is the name of an adapter and of one to compare with" for name in adapters if name in known]
    raise_problems("cannot screen", problems, "screen adapters of one base model together")
    seen = measure(adapters, known, reporter)
    supplied: dict[str, Any] = {name: one for name, one in (("starts", starts), ("texts", texts)) if one is not None}
    if len(known) >= screening_together.FEWEST:
        supplied["scores"] = _scores(replace(seen, members=seen.names))
    running = [one for one in every_detector() if one.supplied <= supplied.keys()]
    sightings = {one.name: one.run(seen, supplied) for one in running}
    return Screening(
        {name: _screened(name, running, sightings) for name in adapters},
        compared=len(seen.adapters) - 1,
        reference=list(known),
        left_out={one.name: list(one.needs) for one in every_detector() if one not in running},
    )


def _scores(seen: Seen) -> dict[str, dict[str, float]]:
    """Return what every detector that needs nothing gives each adapter, by detector and name."""
    first = [one for one in every_detector() if not one.supplied]
    return {one.name: {name: found.score for name, found in one.run(seen, {}).items()} for one in first}


def _screened(name: str, ran: list[Detector], sightings: Mapping[str, Mapping[str, Sighting]]) -> Screened:
    findings = [Finding.of(one, sightings[one.name][name]) for one in ran if name in sightings[one.name]]
    worst = max((_ORDER.index(one.verdict) for one in findings), default=0)
    return Screened(_ORDER[worst], findings, [one.name for one in ran if name not in sightings[one.name]])


def _number(value: float) -> str:
    """Return a number with the three digits that mean something."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
