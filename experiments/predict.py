"""How well `loraloom inspect` ranks what merging costs: Spearman correlations with losses measured on real adapters.

    python experiments/predict.py STUDY [STUDY ...] [--draws 1000]

STUDY is a folder of `loraloom run`. A prediction sees adapters and the statistics of unlabelled held-out texts. The
loss is a task's single score minus its score in a merge, on held-out rows at every scale tried, and on test rows at the
scales that held-out rows chose. Merges of every rule are predicted from their merged updates; of one init and seed,
all are of the same adapters. Intervals are 95 % of a bootstrap that draws inits with seeds, and tasks, each with
replacement. The tables of docs/predict.md come from it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata

from loraloom import Adapter, Statistics, StudyResult, norm, overlaps, predict, products, read_adapter, slug

Values = NDArray[np.float64]

PREDICTORS = {
    "own directions": "error in the task's own output directions, inputs less their mean: what inspect tells",
    "own directions, relative": "the same over the task's own response",
    "own directions, not centred": "the same on the inputs as they are",
    "whole output": "error of the whole layer output",
    "whole output, relative": "the same over the task's own response",
    "amplification": "|dW_merged h_j| over |dW_j h_j|",
    "others / own": "mean over the other adapters i of |dW_i h_j| over |dW_j h_j|; no merge needed",
    "row overlap": "mean overlap of A's rows with the other adapters'; no statistics needed",
    "norm": "|dW_merged| over |dW_j|; no statistics needed",
    "own response": "|dW_j (h_j - mean)|^2, what the task has to lose; no merge needed",
}


@dataclass(frozen=True)
class Run:
    """One init and seed: merges (rule, scale), tasks; losses and predictions (merges, tasks) by split and heads."""

    name: str
    tasks: list[str]
    merges: list[tuple[str, float]]
    losses: dict[tuple[str, bool], Values]
    predictions: dict[str, Values]
    scales: tuple[float, float, float]  # predicted: as inspect does, without weights, of the whole output


def main() -> None:
    """Print the tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", type=Path, nargs="+")
    parser.add_argument("--draws", type=int, default=1000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    runs = [run for study in given.studies for run in runs_of(study)]
    print(f"{len(runs)} runs: {', '.join(run.name for run in runs)}; {len(runs[0].tasks)} tasks\n")
    for split in ("heldout", "test"):
        for aligned in (False, True):
            print(f"{split} rows, heads {'aligned' if aligned else 'as trained'}\n")
            print_correlations(runs, split, aligned, given.draws)
    print_scales(runs)


def runs_of(study: Path) -> Iterator[Run]:
    """Yield every init and seed of a study."""
    result = StudyResult.load(study / "results.json")
    tasks = [task.name for task in result.tasks]
    seen = {
        task: Statistics.load(only(study, f"statistics/{task}.heldout-*") / "statistics.safetensors") for task in tasks
    }
    for init, seed in dict.fromkeys((one.init, one.seed) for one in result.singles):
        label = f"{slug(init)}.s{seed}"
        members = {task: read_adapter(only(study, f"train/{label}.{task}-*") / "adapter") for task in tasks}
        scores = [one for one in result.merges if (one.init, one.seed) == (init, seed)]
        merges = list(dict.fromkeys((one.rule, one.scale) for one in scores))
        merged = {rule: read_adapter(only(study, f"merge/{label}.{rule}-*") / "adapter") for rule, _ in merges}
        single = [
            json.loads((only(study, f"single/{label}.{task}-*") / "scores.json").read_text(encoding="utf-8"))
            for task in tasks
        ]
        losses = {}
        for split in ("heldout", "test"):
            alone = np.array([one[split]["value"] for one in single])
            for aligned in (False, True):
                table = np.full((len(merges), len(tasks)), np.nan)
                for one in scores:
                    if (one.split, one.aligned) == (split, aligned):
                        table[merges.index((one.rule, one.scale))] = alone - [one.scores[task].value for task in tasks]
                losses[split, aligned] = table
        predictions, scales = predicted(members, merged, merges, seen)
        yield Run(f"{init} {seed}", tasks, merges, losses, predictions, scales)


def predicted(
    members: dict[str, Adapter],
    merged: dict[str, Adapter],
    merges: Sequence[tuple[str, float]],
    seen: dict[str, Statistics],
) -> tuple[dict[str, Values], tuple[float, float, float]]:
    """Return every predictor as (merges, tasks), and the scales of least predicted error of the plain sum."""
    tasks, rules = list(members), list(merged)
    count = len(tasks)
    # summed over layers: [task, a, b] over the tasks' updates and then the merged ones
    forms = {kind: np.zeros((count, count + len(rules), count + len(rules))) for kind in ("whole", "as is", "centred")}
    for layer in next(iter(members.values())).shapes:
        updates = [adapter.updates[layer] for adapter in (*members.values(), *merged.values())]
        for j, task in enumerate(tasks):
            moment = seen[task].moment(layer)
            forms["whole"][j] += products(updates, moment).numpy()
            forms["as is"][j] += products(updates, moment, onto=updates[j]).numpy()
            forms["centred"][j] += products(updates, moment, onto=updates[j], centred=True).numpy()
    size = {name: total_norm(adapter) for name, adapter in (members | merged).items()}
    shared = overlaps(members).rows.numpy()
    each = np.arange(count)
    own = forms["whole"][each, each, each]
    found = {name: np.zeros((len(merges), count)) for name in PREDICTORS}
    kinds = {"whole output": "whole", "own directions": "centred", "own directions, not centred": "as is"}
    for row, (rule, scale) in enumerate(merges):
        m = count + rules.index(rule)
        for name, kind in kinds.items():
            form = forms[kind]
            alone = form[each, each, each]
            found[name][row] = scale**2 * form[:, m, m] - 2 * scale * form[each, m, each] + alone
            if f"{name}, relative" in found:
                found[f"{name}, relative"][row] = found[name][row] / alone
        found["amplification"][row] = scale * np.sqrt(forms["whole"][:, m, m] / own)
        others = np.sqrt(forms["whole"][:, each, each] / own[:, None])
        found["others / own"][row] = (others.sum(axis=1) - 1) / (count - 1)
        found["row overlap"][row] = (shared.sum(axis=1) - 1) / (count - 1)
        found["norm"][row] = [scale * size[rule] / size[name] for name in tasks]
        found["own response"][row] = forms["centred"][each, each, each]
    unweighted, whole = (
        float(form[each, :count, each].sum() / form[:, :count, :count].sum())
        for form in (forms["centred"], forms["whole"])
    )
    return found, (predict(members, seen).uniform(), unweighted, whole)


def total_norm(adapter: Adapter) -> float:
    """Return |dW| over all layers."""
    return float(sum(norm(update) ** 2 for update in adapter.updates.values()) ** 0.5)


def only(study: Path, pattern: str) -> Path:
    """Return the one stage output that fits."""
    found = sorted((study / "stages").glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"{study}: {len(found)} outputs {pattern}, one is expected")
    return found[0]


def print_correlations(runs: Sequence[Run], split: str, aligned: bool, draws: int) -> None:
    """Print Spearman's rho of every predictor with its interval, for four questions."""
    row("prediction", "tasks of one merge", "merges of one task", "merges by their average", "all")
    row("---", "---", "---", "---", "---")
    for name in PREDICTORS:
        pairs = []
        for run in runs:
            measured = ~np.isnan(run.losses[split, aligned][:, 0])
            pairs.append((run.predictions[name][measured], run.losses[split, aligned][measured]))
        row(name, *(with_interval(question, pairs, draws) for question in (by_task, by_merge, by_average, overall)))
    print()


Pairs = Sequence[tuple[Values, Values]]  # prediction and loss, (merges, tasks), one for each run drawn


def by_task(pairs: Pairs, tasks: NDArray[np.int64]) -> float:
    """Return the mean over merges of rho over tasks."""
    return mean(np.concatenate([spearman(x[:, tasks], y[:, tasks]) for x, y in pairs]))


def by_merge(pairs: Pairs, tasks: NDArray[np.int64]) -> float:
    """Return the mean over runs and tasks of rho over merges."""
    return mean(np.concatenate([spearman(x[:, tasks].T, y[:, tasks].T) for x, y in pairs]))


def by_average(pairs: Pairs, tasks: NDArray[np.int64]) -> float:
    """Return the mean over runs of rho over merges, of the averages over tasks."""
    return mean(np.concatenate([spearman(x[:, tasks].mean(1)[None], y[:, tasks].mean(1)[None]) for x, y in pairs]))


def overall(pairs: Pairs, tasks: NDArray[np.int64]) -> float:
    """Return rho over all merges and tasks of all runs."""
    x, y = (np.concatenate([pair[i][:, tasks].ravel() for pair in pairs])[None] for i in (0, 1))
    return mean(spearman(x, y))


def with_interval(question: Callable[[Pairs, NDArray[np.int64]], float], pairs: Pairs, draws: int) -> str:
    """Return rho with the 95 % interval of a bootstrap over runs and tasks; "-" where the prediction is constant."""
    generator, count = np.random.default_rng(0), pairs[0][0].shape[1]
    found = question(pairs, np.arange(count, dtype=np.int64))
    if np.isnan(found):
        return "-"
    drawn = []
    for _ in range(draws):
        chosen = [pairs[i] for i in generator.integers(len(pairs), size=len(pairs))]
        drawn.append(question(chosen, generator.integers(count, size=(count,))))
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return f"{found:+.2f} ({low:+.2f} to {high:+.2f})"


def spearman(x: Values, y: Values) -> Values:
    """Return rho of every row of x and y (k, p): (k,), NaN where one is constant."""
    if x.shape[1] < 3:
        return np.full(len(x), np.nan)
    a, b = (rankdata(values, axis=1) for values in (np.round(x, 12), np.round(y, 12)))
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    size = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return np.where(size > 0, (a * b).sum(axis=1) / np.where(size > 0, size, 1), np.nan)


def mean(values: Values) -> float:
    """Return the mean of those that are numbers; NaN where there is none."""
    numbers = values[~np.isnan(values)]
    return float(numbers.mean()) if len(numbers) else float("nan")


def print_scales(runs: Sequence[Run]) -> None:
    """Print for the plain sum the predicted scales, the best measured ones, and what the nearest tried one costs."""
    row("run", "inspect", "unweighted", "whole output", "best as trained", "best aligned", "costs", "costs, aligned")
    row(*["---"] * 8)
    costs: dict[tuple[int, bool], list[float]] = {}
    for run in runs:
        places = [i for i, (rule, _) in enumerate(run.merges) if rule == "task_arithmetic"]
        scales = np.array([run.merges[i][1] for i in places])
        losses = {aligned: 100 * run.losses["heldout", aligned][places].mean(axis=1) for aligned in (False, True)}
        for which, scale in enumerate(run.scales):
            nearest = int(np.abs(np.log(scales / scale)).argmin())
            for aligned, loss in losses.items():
                costs.setdefault((which, aligned), []).append(float(loss[nearest] - loss.min()))
        best = [f"{scales[int(loss.argmin())]:g}" for loss in losses.values()]
        row(run.name, *(f"{scale:.2f}" for scale in run.scales), *best, *(f"{costs[0, a][-1]:.1f}" for a in losses))
    print("\nMean cost in points of the scale tried that is nearest, as trained and aligned:")
    for which, name in enumerate(("inspect", "unweighted", "whole output")):
        print(f"- {name}: {np.mean(costs[which, False]):.1f} and {np.mean(costs[which, True]):.1f}")


def row(*cells: object) -> None:
    """Print one row of a Markdown table."""
    print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
