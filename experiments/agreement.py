"""How few unlabelled texts choose a rule and a scale, and whether the worst task should count more than the mean.

    loraloom run recipes/agreement-glue5.yaml -o studies/agreement-glue5
    python experiments/agreement.py measure recipes/agreement-glue5.yaml OUTPUTS ADAPTERS
    python experiments/agreement.py tables OUTPUTS [OUTPUTS ...]

`measure` takes a folder with an adapter folder a task, as studies/agreement-glue5/adapters/LoRA, merges them by
every candidate, and keeps the outputs on 128 held-out and 160 test rows of a task: the former choose, without their
labels or, to compare, with them; the latter report.
`tables` draws subsets of the texts (seed 0) and prints Markdown: the tables of docs/agreement.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from loraloom import (
    Adapter,
    Candidates,
    Evaluator,
    Head,
    Recipe,
    Update,
    base_folder,
    build_task,
    merge,
    metric_value,
    read_adapter,
)

Values = NDArray[np.float64]
TEXTS, TESTED, DRAWS = 128, 160, 100
SIZES = (8, 16, 32, 64, 128)
TRIED = (
    Candidates("task_arithmetic", (0.2, 0.3, 0.4, 0.5, 0.75, 1.0)),
    Candidates("tsv", (0.2, 0.3, 0.5, 0.75, 1.0)),
    Candidates("iso_cts", (1.0, 2.0)),
    Candidates("consensus", (0.3, 0.5)),
)
FAMILIES = {
    "sums": ("task_arithmetic",),
    "sums, tsv": ("task_arithmetic", "tsv"),
    "sums, tsv, iso_cts": ("task_arithmetic", "tsv", "iso_cts"),
    "sums, tsv, consensus": ("task_arithmetic", "tsv", "consensus"),
}
USUAL = FAMILIES["sums, tsv"]
CRITERIA: dict[str, Callable[[Values], Values]] = {  # of distances (candidates, tasks)
    "mean": lambda d: d.mean(axis=1),
    "worst": lambda d: d.max(axis=1),
    "mean + worst": lambda d: d.mean(axis=1) + d.max(axis=1),
    "mean, each at most 1": lambda d: np.minimum(d, 1).mean(axis=1),
    "root mean square": lambda d: np.sqrt((d**2).mean(axis=1)),
}


def main() -> None:
    """Run one of the two steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    step = steps.add_parser("measure")
    step.add_argument("recipe")
    step.add_argument("output", type=Path)
    step.add_argument("adapters", type=Path)
    step.add_argument("--base")
    steps.add_parser("tables").add_argument("kept", type=Path, nargs="+")
    given = parser.parse_args()
    if given.step == "measure":
        recipe = Recipe.load(given.recipe)
        measure(recipe, given.base or recipe.base, given.adapters, given.output)
    else:
        tables([Kept(torch.load(path)) for path in given.kept])


# measuring


def measure(recipe: Recipe, base: str, folder: Path, output: Path) -> None:
    """Write the outputs of the single models and of every candidate, on held-out and test rows."""
    reading = recipe.training
    evaluator = Evaluator(base_folder(base), max_length=reading.max_length, batch_size=reading.eval_batch_size)
    tasks = {name: build_task(name, settings) for name, settings in recipe.tasks.items()}
    members = {name: read_adapter(folder / name) for name in tasks}
    heads = {name: Head.of(adapter.head, name) for name, adapter in members.items()}
    rows = {
        (name, split): getattr(task, split).select(range(count))
        for name, task in tasks.items()
        for split, count in (("heldout", TEXTS), ("test", TESTED))
    }
    encoded = {key: evaluator.encode(found) for key, found in rows.items()}
    labels = {(name, split): tasks[name].label_tensor(found) for (name, split), found in rows.items()}

    def seen(name: str, updates: Any) -> dict[str, Any]:
        made = {}
        for split in ("heldout", "test"):
            made[split] = heads[name].logits(evaluator.features(updates, heads[name], encoded[name, split]))
        return made

    single = {name: seen(name, member.updates) for name, member in members.items()}
    found: list[dict[str, Any]] = []
    kept = {
        "name": folder.name,
        "metrics": {name: task.metric for name, task in tasks.items()},
        "labels": labels,
        "single": single,
        "candidates": found,
    }
    for one in TRIED:
        whole = merge(members, one.rule, scale=1.0, **one.options).adapter
        for scale in one.scales:
            updates = scaled(whole, scale)
            found.append({"rule": one.rule, "scale": scale, "tasks": {name: seen(name, updates) for name in tasks}})
            print(one.rule, scale, flush=True)
        torch.save(kept, output)


def scaled(whole: Adapter, scale: float) -> dict[str, Update]:
    """Return the updates times `scale`."""
    return {module: Update(scale * update.B, update.A) for module, update in whole.updates.items()}


# tables


class Kept:
    """One set of adapters: test and held-out scores (candidates, tasks), and outputs by which distances are made."""

    def __init__(self, kept: dict[str, Any]) -> None:
        self.name, self.tasks = kept["name"], list(kept["single"])
        self.candidates = [(one["rule"], one["scale"]) for one in kept["candidates"]]
        self._kept, self.count = kept, TEXTS
        self._terms = [
            terms(kept["single"][name]["heldout"], [one["tasks"][name]["heldout"] for one in kept["candidates"]])
            for name in self.tasks
        ]
        everything = [np.arange(TESTED)] * len(self.tasks)
        self.test = self.scores("test", everything)
        self.single = np.array([self._score("test", name, kept["single"][name]) for name in self.tasks])

    def _score(self, split: str, name: str, outputs: dict[str, torch.Tensor], rows: Any = slice(None)) -> float:
        return metric_value(self._kept["metrics"][name], outputs[split][rows], self._kept["labels"][name, split][rows])

    def scores(self, split: str, chosen: Sequence[NDArray[np.int64]]) -> Values:
        """Return (candidates, tasks): each task's metric on those `chosen` of its rows, with their labels."""
        return np.array(
            [
                [
                    self._score(split, name, one["tasks"][name], rows)
                    for name, rows in zip(self.tasks, chosen, strict=True)
                ]
                for one in self._kept["candidates"]
            ]
        )

    def distances(self, chosen: Sequence[NDArray[np.int64]] | None = None) -> Values:
        """Return (candidates, tasks) on all held-out texts, or on those `chosen` of each task."""
        columns = []
        for index, (far, own, classes) in enumerate(self._terms):
            rows = np.arange(len(own)) if chosen is None else chosen[index]
            columns.append(far[:, rows].mean(axis=1) / unit(own[rows], classes))
        return np.stack(columns, axis=1)

    def of(self, rules: Iterable[str]) -> NDArray[np.int64]:
        """Return the places of the candidates by these rules."""
        return np.array([index for index, (rule, _) in enumerate(self.candidates) if rule in set(rules)])

    def average(self, index: int) -> float:
        """Return a candidate's test average, points."""
        return float(100 * self.test[index].mean())

    def worst(self, index: int) -> float:
        """Return the least share of a single task's test score that a candidate keeps, percent."""
        return float(100 * (self.test[index] / self.single).min())


def terms(own: torch.Tensor, merged: Sequence[torch.Tensor]) -> tuple[Values, Values, bool]:
    """Return divergences (candidates, k) of each text, and the own outputs: probabilities (k, classes), or (k, 1)."""
    mine = own.double().numpy()
    if mine.shape[1] == 1:
        return np.stack([(mine - one.double().numpy())[:, 0] ** 2 for one in merged]), mine, False
    p = own.double().softmax(dim=1).clamp_min(1e-300)
    far = [(p * (p.log() - one.double().log_softmax(dim=1))).sum(dim=1).numpy() for one in merged]
    return np.stack(far), p.numpy(), True


def unit(own: Values, classes: bool) -> float:
    """Return how far a model that always says the mean is from own outputs."""
    if not classes:
        return float(own.var())
    return float((own * (np.log(own) - np.log(own.mean(axis=0)))).sum(axis=1).mean())


def tables(sets: Sequence[Kept]) -> None:
    """Print every table."""
    print("\n### Sets\n\n| set | single | best on test | chosen by 128 labels | chosen by 128 texts | Spearman |")
    print("|---|---|---|---|---|---|")
    for one in sets:
        usual = one.of(USUAL)
        distances, means = one.distances().mean(axis=1)[usual], one.test.mean(axis=1)[usual]
        labelled = one.scores("heldout", [np.arange(TEXTS)] * len(one.tasks)).mean(axis=1)
        three = (means.argmax(), labelled[usual].argmax(), distances.argmin())
        cells = [told(one, usual[pick]) for pick in three]
        rho = -spearmanr(distances, means).statistic
        print(f"| {one.name} | {100 * one.single.mean():.1f} | {' | '.join(cells)} | {rho:.2f} |")
    print("\n### How few texts\n\n| a task | same choice as 128 texts | lost to the best | 90 % lose less | most |")
    print("|---|---|---|---|---|")
    for labels in (False, True):
        for size in SIZES:
            print(few(sets, size, labels=labels))
    for title, few_texts in (("128 texts a task", None), ("32 texts a task", 32)):
        print(f"\n### What counts, {title}\n\n| criterion | test average | keeps of the worst task |\n|---|---|---|")
        for name, criterion in CRITERIA.items():
            print(f"| {name} | {mean_over_draws(sets, USUAL, criterion, few_texts)} |")
    columns = "test average | keeps of the worst task |\n|---|---|---|"
    print(f"\n### Which candidates, 64 texts a task\n\n| candidates | {columns}")
    for name, rules in FAMILIES.items():
        print(f"| {name} | {mean_over_draws(sets, rules, CRITERIA['mean'], 64)} |")
    print("\n### Distances\n")
    for one in sets:
        print(f"\n{one.name}: distance (test score) of each task\n\n| candidate | {' | '.join(one.tasks)} | mean |")
        print("|---" * (len(one.tasks) + 2) + "|")
        distances = one.distances()
        for index, (rule, scale) in enumerate(one.candidates):
            cells = [f"{d:.2f} ({100 * s:.1f})" for d, s in zip(distances[index], one.test[index], strict=True)]
            print(
                f"| {rule} {scale:g} | {' | '.join(cells)} | {distances[index].mean():.2f} ({one.average(index):.1f}) |"
            )


def told(one: Kept, index: int) -> str:
    """Return a candidate with its test average and what it keeps of its worst task."""
    rule, scale = one.candidates[index]
    return f"{rule} {scale:g}: {one.average(index):.1f}, worst {one.worst(index):.0f} %"


def best(one: Kept, rules: Iterable[str], distances: Values, criterion: Any = CRITERIA["mean"]) -> int:
    """Return the candidate of least criterion among those by `rules`."""
    places = one.of(rules)
    return int(places[criterion(distances)[places].argmin()])


def subsets(one: Kept, size: int | None) -> Iterable[list[NDArray[np.int64]]]:
    """Yield the texts of each task in DRAWS subsets of so many; all of them once without a size."""
    generator = np.random.default_rng(0)
    for _ in range(1 if size in (None, one.count) else DRAWS):
        yield [generator.choice(one.count, size or one.count, replace=False) for _ in one.tasks]


def few(sets: Sequence[Kept], size: int, *, labels: bool) -> str:
    """Return the row of one number of texts, of which the labels choose, or the distances."""
    same, lost = [], []
    for one in sets:
        whole = best(one, USUAL, one.distances())
        for chosen in subsets(one, size):
            pick = best(one, USUAL, -one.scores("heldout", chosen) if labels else one.distances(chosen))
            same.append(pick == whole)
            lost.append(one.average(one.of(USUAL)[one.test[one.of(USUAL)].mean(axis=1).argmax()]) - one.average(pick))
    shares = f"{100 * np.mean(same):.0f} % | {np.mean(lost):.2f} | {np.quantile(lost, 0.9):.2f} | {np.max(lost):.2f}"
    return f"| {size} {'labelled rows' if labels else 'texts'} | {shares} |"


def mean_over_draws(sets: Sequence[Kept], rules: Iterable[str], criterion: Any, size: int | None) -> str:
    """Return test average and the worst task's share, means over subsets and sets."""
    found = []
    for one in sets:
        picks = [best(one, rules, one.distances(rows), criterion) for rows in subsets(one, size)]
        found.append([np.mean([one.average(i) for i in picks]), np.mean([one.worst(i) for i in picks])])
    average, worst = np.mean(found, axis=0)
    return f"{average:.2f} | {worst:.1f} %"


if __name__ == "__main__":
    main()
