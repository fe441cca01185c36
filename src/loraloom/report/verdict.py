"""The study's answer in a few sentences: which merge is best, against whom, and by how much."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from loraloom.errors import first_few
from loraloom.report.aggregate import HEADS, Figures, Merged
from loraloom.report.tables import points, share
from loraloom.results import StudyResult

_SHARES = {
    "probability kept": "keeps {} of the probability that they give to the right answers",
    "recovered loss": "recovers {} of what they gain in loss",
}
_NAMED = 3  # rivals that a sentence names; the table has all


@dataclass(frozen=True)
class Comparison:
    """The best merge on held-out rows, `ours`, against the best of another init, heads treated alike.

    Where there is one init alone, against the best of another rule.
    """

    ours: Merged
    other: Merged

    @property
    def difference(self) -> float:
        """Ours minus other on the test rows, as a fraction."""
        return self.ours.average.value - self.other.average.value

    @property
    def paired(self) -> bool:
        """Tell whether both were counted on the same resamples of the test rows."""
        return bool(self.ours.resamples) and len(self.ours.resamples) == len(self.other.resamples)

    @property
    def stderr(self) -> float:
        """Standard error of the difference, paired over rows and over seeds, whichever is larger.

        Where the results hold no resamples the two averages count as independent, which errs on the careful side.
        """
        rows = math.hypot(self.ours.average.stderr, self.other.average.stderr)
        if self.paired:
            rows = float(np.std(np.subtract(self.ours.resamples, self.other.resamples), ddof=1))
        seeds = sorted(self.ours.by_seed.keys() & self.other.by_seed.keys())
        apart = [self.ours.by_seed[seed] - self.other.by_seed[seed] for seed in seeds]
        spread = float(np.std(apart, ddof=1)) / math.sqrt(len(apart)) if len(apart) > 1 else 0.0
        return max(rows, spread)


def comparisons(result: StudyResult, *, aligned: bool) -> list[Comparison]:
    """Compare the best merge with the best of every other init, strongest first; of every other rule in a single init.

    Which merge is best, and which is the best of a rival, is decided on the held-out split; figures are of test rows.
    """
    figures = Figures(result)
    rows = [row for row in figures.merged if row.aligned == aligned]
    ours = figures.best(rows)
    if ours is None:
        return []
    by_init = len({row.init for row in rows}) > 1
    sides: dict[str, list[Merged]] = {}
    for row in rows:
        sides.setdefault(row.init if by_init else row.label, []).append(row)
    rivals = [figures.best(side) for name, side in sides.items() if name != (ours.init if by_init else ours.label)]
    found = [Comparison(ours, rival) for rival in rivals if rival and not _same(ours, rival)]
    return sorted(found, key=lambda comparison: -comparison.other.average.value)


def _same(ours: Merged, other: Merged) -> bool:
    """Tell whether labels and agreement have chosen the same merged adapters."""
    chosen = {ours.chosen_by, other.chosen_by} == {"labels", "agreement"}
    return chosen and (ours.rule, ours.scales, ours.by_seed) == (other.rule, other.scales, other.by_seed)


def verdict(result: StudyResult) -> str:
    """Return the answer: the merge that held-out rows pick, as trained and aligned, and its lead over each rival."""
    told = [*(_sentence(result, aligned) for aligned in HEADS), _gainless(Figures(result))]
    return " ".join(sentence for sentence in told if sentence) or (
        "No merged adapter was measured on the test rows, so there is no answer yet."
    )


def signed(comparison: Comparison) -> str:
    """Format the difference in points with its sign and standard error."""
    error = f"±{100 * comparison.stderr:.1f}"
    return f"{100 * comparison.difference:+.1f} {error}".replace("-", "−")


def _sentence(result: StudyResult, aligned: bool) -> str:
    figures = Figures(result)
    ours = figures.best(row for row in figures.merged if row.aligned == aligned)
    if ours is None:
        return ""
    picked = "Picked on held-out rows" if ours.heldout is not None else "Picked on the test rows, which flatters it"
    if figures.written and ours.heldout is not None:
        picked += f" by {figures.judge}"
    several = len(figures.inits) > 1
    subject = f"{ours.init} merged by {ours.label}" if several else ours.label
    reached = f"{subject} reaches {points(ours.average)} points"
    opening = f"{picked}{figures.heads(aligned)}: {reached}{_kept(figures, ours)}"
    found = comparisons(result, aligned=aligned)
    if not found:
        return f"{opening}; there is nothing to compare it with."
    rivals = [f"{signed(one)} against {_rival(one.other, several)}" for one in found[:_NAMED]]
    left = f" and {len(found) - _NAMED} more below" if len(found) > _NAMED else ""
    errors = (
        "paired over rows" if all(one.paired for one in found[:_NAMED]) else "with the averages taken as independent"
    )
    undecided = [one for one in found if abs(one.difference) <= one.stderr]
    tie = "; within the error of the first this is a tie" if undecided and undecided[0] is found[0] else ""
    worse = "; on the test rows it is not the best" if found[0].difference < 0 and not tie else ""
    against = ". In points it stands" if figures.written else ":"
    return f"{opening}{against} {', '.join(rivals)}{left} (errors {errors}){tie}{worse}."


def _gainless(figures: Figures) -> str:
    """Tell of which own adapters nothing can be recovered."""
    if not (figures.merged and figures.gainless):
        return ""
    names = first_few([f"{task} ({init})" for init, task in figures.gainless])
    return f"Own adapters that gain nothing in loss over the base model, so that 0 % counts as recovered: {names}."


def _kept(figures: Figures, ours: Merged) -> str:
    """Tell how much of its adapters a merge keeps: of answers, of their probability and gain in loss."""
    if not figures.written:
        return f", {100 * ours.kept:.1f} % of its adapters alone"
    between = f" (base model alone {points(figures.base_average)}"
    if ours.init in figures.single_averages:
        between += f", its adapters alone {points(figures.single_averages[ours.init])}"
    if ours.share is None:
        return f"{between})"
    kept = " and ".join(_SHARES[name].format(share(one.average)) for name, one in ours.shares.items())
    task, least = ours.share.worst
    return f"{between}), {kept}; on the worst task by {figures.judge}, {task}, {share(least)}"


def _rival(other: Merged, several: bool) -> str:
    """Name a rival by its init where there are several, and by its rule; of answers with what it keeps."""
    about = [other.label] if several else []
    about += [f"keeps {share(other.share.average)}"] if other.share else []
    name = other.init if several else other.label
    return f"{name} ({'; '.join(about)})" if about else name
