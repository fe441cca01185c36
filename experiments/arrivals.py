"""Tasks that arrive one after another: what the earlier ones lose when every adapter is summed into one model.

    python experiments/arrivals.py recipes/subspaces-glue8.yaml --out FOLDER [--base FOLDER] [--seed 0]

Four tasks of the recipe in three orders. When a task arrives its adapter is trained, the earlier ones stay as they are,
and all so far are merged anew. Three ways to start it: `LoRA` (PEFT's default), `apart` (the default rule off generic
text, which knows nothing of the earlier adapters) and `after` (`loraloom init --after`: off the rows of the earlier A's
too). `final` is the average test score of the four tasks merged; `forgetting` what a task scores right after its
arrival less what it scores in the end, mean over the first three. Adapters and scores stay in FOLDER.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from starts_lib import Ground, arguments

from loraloom import Adapter, Head, Task, Update, build_task, evaluate, merge

ORDERS = (("sst2", "qqp", "stsb", "qnli"), ("qnli", "stsb", "sst2", "qqp"), ("stsb", "sst2", "qqp", "qnli"))
WAYS = ("LoRA", "apart", "after")
MERGES = (("task_arithmetic", 0.5), ("tsv", 0.75))


@dataclass
class Sequences:
    """The four tasks, and the ground that all their sequences share."""

    ground: Ground
    tasks: dict[str, Task]

    def adapter(self, way: str, task: str, earlier: Sequence[str]) -> Adapter:
        """Return the trained adapter of `task`, which comes after `earlier`; trained where it is not there yet."""
        after = {}
        if way == "after":
            after = {one: self.adapter(way, one, earlier[:index]) for index, one in enumerate(earlier)}
        folder = self.ground.out / way / "-".join([*after, task])
        return self.ground.trained(folder, self.tasks[task], task, apart=way != "LoRA", after=after)

    def scores(self, way: str, order: Sequence[str]) -> dict[str, list[dict[str, float]]]:
        """Return by merge, for every arrival, the test scores of the tasks so far; kept in a file."""
        path = self.ground.out / f"{way}.{'-'.join(order)}.json"
        if not path.exists():
            found: dict[str, list[dict[str, float]]] = {rule: [] for rule, _ in MERGES}
            for count in range(1, len(order) + 1):
                so_far = {task: self.adapter(way, task, order[:index]) for index, task in enumerate(order[:count])}
                for rule, scale in MERGES:
                    # one adapter alone is the model as it stands, whatever a rule makes of it
                    updates = (
                        merge(so_far, rule, scale=scale).adapter.updates if count > 1 else so_far[order[0]].updates
                    )
                    found[rule].append({task: self._score(task, updates, own) for task, own in so_far.items()})
            path.write_text(json.dumps(found, indent=1), encoding="utf-8")
        kept: dict[str, list[dict[str, float]]] = json.loads(path.read_text(encoding="utf-8"))
        return kept

    def _score(self, task: str, updates: Mapping[str, Update], own: Adapter) -> float:
        return evaluate(self.ground.evaluator, updates, Head.of(own.head, task), self.tasks[task]).value


def main() -> None:
    """Run every way and order, and print the table as Markdown."""
    ground = Ground.of(arguments(__doc__).parse_args())
    sequences = Sequences(ground, {name: build_task(name, ground.recipe.tasks[name]) for name in ORDERS[0]})
    print("| rule | start | final, by order | final | forgetting, by order | forgetting |\n|---|---|---|---|---|---|")
    results = {way: [sequences.scores(way, order) for order in ORDERS] for way in WAYS}
    for rule, scale in MERGES:
        for way, orders in results.items():
            final = [100 * mean(scores[rule][-1].values()) for scores in orders]
            lost = [
                100 * mean(scores[rule][i][task] - scores[rule][-1][task] for i, task in enumerate(order[:-1]))
                for order, scores in zip(ORDERS, orders, strict=True)
            ]
            told = [", ".join(f"{value:.1f}" for value in values) for values in (final, lost)]
            cells = f"{told[0]} | {mean(final):.1f} | {told[1]} | {mean(lost):.1f}"
            print(f"| `{rule}` at {scale} | {way} | {cells} |")


if __name__ == "__main__":
    main()
