"""The tables of docs/study-subspaces.md out of results.json: averages over seeds, shares, scale intervals.

    python experiments/study_tables.py study/results.json [more/results.json ...] [--baseline LoRA]

Several files are one study that was run in parts, an init or a seed each.

Test rows report at the scale that held-out rows chose. A difference to the baseline is paired over seeds: its standard
error is that of the mean of the seeds' differences. The scale interval is where the held-out average, linear between
the scales tried, stays within 1 point of its best; averaged over seeds.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

from loraloom import StudyResult

Key = tuple[str, str, bool]  # init, rule, heads aligned


def main() -> None:
    """Print the tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--baseline", default="LoRA")
    given = parser.parse_args()
    parts = [StudyResult.load(path) for path in given.results]
    if len({part.content_sha256 for part in parts}) > 1:
        parser.error("these results are not of the same rows")
    joined = {
        name: [one for part in parts for one in getattr(part, name)] for name in ("singles", "merges", "interference")
    }
    result = parts[0].model_copy(update=joined)
    singles = single_averages(result)
    print_singles(result, singles, given.baseline)
    print_merges(result, singles, given.baseline)
    print_intervals(result)
    print_responses(result)


def single_averages(result: StudyResult) -> dict[str, dict[int, float]]:
    """Return the mean test score of the single-task adapters by init and seed, in points."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in result.singles:
        found[one.init][one.seed].append(100 * one.score.value)
    return {init: {seed: mean(values) for seed, values in seeds.items()} for init, seeds in found.items()}


def print_singles(result: StudyResult, singles: dict[str, dict[int, float]], baseline: str) -> None:
    """Print every init's single-task scores by task, and the difference of the averages to the baseline's."""
    tasks = [task.name for task in result.tasks]
    table("init", "seeds", *tasks, "average", f"against {baseline}")
    for init, seeds in singles.items():
        scores = [
            mean(100 * one.score.value for one in result.singles if (one.init, one.task) == (init, task))
            for task in tasks
        ]
        row(init, len(seeds), *map(number, scores), number(mean(seeds.values())), paired(seeds, singles[baseline]))
    print()


def print_merges(result: StudyResult, singles: dict[str, dict[int, float]], baseline: str) -> None:
    """Print by rule and init the merged average, the share of the single tasks kept, the difference to the baseline."""
    found: dict[Key, dict[int, float]] = defaultdict(dict)
    for one in result.merges:
        if one.split == "test":
            found[one.init, one.rule, one.aligned][one.seed] = 100 * one.average.value
    table("rule", "heads", *singles)
    for rule in dict.fromkeys(rule for _, rule, _ in found):
        for aligned in (False, True):
            cells = [
                cell(found[init, rule, aligned], singles[init], found[baseline, rule, aligned]) for init in singles
            ]
            row(f"`{rule}`", "aligned" if aligned else "as trained", *cells)
    print()


def cell(seeds: dict[int, float], alone: dict[int, float], baseline: dict[int, float]) -> str:
    """Return one init's merged average with the share of the single-task average kept and the difference."""
    if not seeds:
        return ""
    average = mean(seeds.values())
    told = f"{average:.1f}, {100 * average / mean(alone[seed] for seed in seeds):.1f} %"
    return " ".join(filter(None, [told, paired(seeds, baseline)]))


def print_intervals(result: StudyResult) -> None:
    """Print how wide the scales are that come within 1 point of the best, and the curves, on held-out rows."""
    curves: dict[Key, dict[int, dict[float, float]]] = defaultdict(lambda: defaultdict(dict))
    for one in result.merges:
        if one.split == "heldout":
            curves[one.init, one.rule, one.aligned][one.seed][one.scale] = 100 * one.average.value
    curves = {key: seeds for key, seeds in curves.items() if all(len(curve) > 2 for curve in seeds.values())}
    kinds = sorted({(rule, aligned) for _, rule, aligned in curves})
    inits = dict.fromkeys(init for init, _, _ in curves)
    table("rule", "heads", *inits)
    for rule, aligned in kinds:
        cells = [width(curves.get((init, rule, aligned), {})) for init in inits]
        row(f"`{rule}`", "aligned" if aligned else "as trained", *cells)
    print()
    for rule, aligned in kinds:
        shown = {init: curves[init, rule, aligned] for init in inits if (init, rule, aligned) in curves}
        scales = sorted({scale for seeds in shown.values() for curve in seeds.values() for scale in curve})
        table(f"`{rule}`, heads {'aligned' if aligned else 'as trained'}, at", *(f"{scale:g}" for scale in scales))
        for init, seeds in shown.items():
            points = [[curve[scale] for curve in seeds.values() if scale in curve] for scale in scales]
            row(init, *(number(mean(values)) if values else "" for values in points))
        print()


def width(seeds: dict[int, dict[float, float]]) -> str:
    """Return the width of the scale interval with its ends, means over seeds."""
    if not seeds:
        return ""
    ends = [interval(curve) for curve in seeds.values()]
    low, high = mean(end[0] for end in ends), mean(end[1] for end in ends)
    return f"{high - low:.2f} ({low:.2f} to {high:.2f})"


def print_responses(result: StudyResult) -> None:
    """Print the interference ratios, means over seeds."""
    table("init", "before, A h", "after, A h", "after, B A h")
    for init in dict.fromkeys(one.init for one in result.interference):
        cells = []
        for when, quantity in (("before", "A"), ("after", "A"), ("after", "BA")):
            ratios = [
                one.ratio for one in result.interference if (one.init, one.when, one.quantity) == (init, when, quantity)
            ]
            cells.append(f"{mean(ratios):.3f}" if ratios else "")
        row(init, *cells)
    print()


def interval(curve: dict[float, float], within: float = 1.0) -> tuple[float, float]:
    """Return the ends of the scales around the best at which `curve`, linear between its points, is within `within`."""
    scales = sorted(curve)
    best = max(scales, key=lambda scale: curve[scale])
    floor, index = curve[best] - within, scales.index(best)
    return crossing(curve, scales[index::-1], floor), crossing(curve, scales[index:], floor)


def crossing(curve: dict[float, float], scales: list[float], floor: float) -> float:
    """Return where the curve first falls below `floor` along `scales`; the last scale where it does not."""
    for inside, outside in pairwise(scales):
        if curve[outside] < floor:
            share = (curve[inside] - floor) / (curve[inside] - curve[outside])
            return inside + share * (outside - inside)
    return scales[-1]


def paired(ours: dict[int, float], baseline: dict[int, float]) -> str:
    """Return the mean difference over the seeds that both have, with its standard error where there are two."""
    differences = [value - baseline[seed] for seed, value in ours.items() if seed in baseline]
    if not differences or ours is baseline:
        return ""
    error = f" ±{stdev(differences) / len(differences) ** 0.5:.1f}" if len(differences) > 1 else ""
    return f"{mean(differences):+.1f}{error}"


def number(value: float) -> str:
    """Return a figure in points."""
    return f"{value:.1f}"


def table(*columns: str) -> None:
    """Print the head of a Markdown table."""
    row(*columns)
    row(*("---" for _ in columns))


def row(*cells: object) -> None:
    """Print one row of a Markdown table."""
    print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
