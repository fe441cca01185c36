"""The study's answer in one sentence: does OSRM merge better than what it is compared with, and by how much."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from loraloom.report.aggregate import HEADS, Figures, Merged
from loraloom.report.tables import points
from loraloom.results import StudyResult

_OSRM_RULES = ("osrm", "apart")


@dataclass(frozen=True)
class Comparison:
    """The best merge of one side against the best of the other, heads treated alike.

    `stderr` takes the two averages as independent; both are measured on the same rows, so it is an upper estimate
    where they rise and fall together.
    """

    ours: Merged
    other: Merged

    @property
    def difference(self) -> float:
        """Ours minus other, as a fraction."""
        return self.ours.average.value - self.other.average.value

    @property
    def stderr(self) -> float:
        """Standard error of the difference."""
        return math.hypot(self.ours.average.stderr, self.other.average.stderr)

    @property
    def outcome(self) -> Literal["win", "tie", "lose"]:
        """A difference within one standard error is a tie."""
        if abs(self.difference) <= self.stderr:
            return "tie"
        return "win" if self.difference > 0 else "lose"

    @property
    def strength(self) -> str:
        """How the difference stands to its standard error, in words."""
        size, error = abs(self.difference), f"its standard error ({100 * self.stderr:.1f})"
        if size <= self.stderr:
            return f"within {error}"
        return f"more than twice {error}" if size > 2 * self.stderr else f"between one and two times {error}"


def is_osrm(result: StudyResult, init: str) -> bool:
    """Tell an OSRM init from its controls: it starts, or keeps, A where the other tasks' inputs are quiet.

    Its options decide; where they name no rule, its name does.
    """
    facts = next(facts for facts in result.inits if facts.name == init)
    if "rule" in facts.options:
        return facts.options["rule"] in _OSRM_RULES or facts.options.get("keep") == "projected"
    return "osrm" in init.lower()


def comparisons(result: StudyResult) -> list[Comparison]:
    """Compare the best OSRM merge with the best of every other init, for heads as trained and for aligned heads.

    Which init and rule is best is decided on the held-out split. Without an OSRM init (or with nothing else) the
    best init stands against the best of the rest. Empty where there is nothing to compare.
    """
    figures = Figures(result)
    osrm = {init for init in figures.inits if is_osrm(result, init)}
    found = []
    for aligned in HEADS:
        rows = [row for row in figures.merged if row.aligned == aligned]
        best = figures.best(rows)
        if best is None:
            continue
        sides = osrm if osrm and osrm != set(figures.inits) else {best.init}
        ours = figures.best(row for row in rows if row.init in sides)
        other = figures.best(row for row in rows if row.init not in sides)
        if ours and other:
            found.append(Comparison(ours, other))
    return found


def verdict(result: StudyResult) -> str:
    """Return the answer in one sentence, with points and standard errors."""
    found = comparisons(result)
    if not found:
        best = Figures(result).best(Figures(result).merged)
        if best is None:
            return "No merged adapter was measured on the test rows, so there is no answer yet."
        kept = f"{100 * best.kept:.1f} % of the single-task average"
        return (
            f"{best.init} merged with {best.label} reaches {points(best.average)} points, {kept}; nothing to compare."
        )
    first = found[0]
    other, name = "the best other init", first.ours.init
    subject = f"The best init ({name})"
    if is_osrm(result, name):
        subject = name if "osrm" in name.lower() else f"OSRM ({name})"
    opening = {
        "win": f"{subject} merges better than {other} ({first.other.init})",
        "lose": f"{subject} merges worse than {other} ({first.other.init})",
        "tie": f"{subject} and {other} ({first.other.init}) merge equally well as far as this study can tell",
    }[first.outcome]
    figures = f"{points(first.ours.average)} against {points(first.other.average)}, heads {HEADS[first.ours.aligned]}"
    sentence = f"{opening}: {figures}, a difference of {signed(first)} points, {first.strength}"
    if len(found) > 1:
        second = found[1]
        sentence += f"; with heads {HEADS[second.ours.aligned]} it is {signed(second)} points, {second.strength}"
        if (second.ours.init, second.other.init) != (first.ours.init, first.other.init):
            sentence += f", {second.ours.init} against {second.other.init}"
    return sentence + "."


def signed(comparison: Comparison) -> str:
    """Format the difference in points with its sign."""
    return f"{100 * comparison.difference:+.1f}".replace("-", "−")
