"""Tasks that arrive one after another: what the earlier ones lose when every adapter is summed into one model.

    python benchmarks/arrivals.py recipes/subspaces-glue8.yaml --out FOLDER [--base FOLDER] [--seed 0]

Four tasks of the recipe in three orders. When a task arrives its adapter is trained, the earlier ones stay as they are,
and all so far are merged anew. Three ways to start it: `LoRA` (PEFT's default), `apart` (the default rule off generic
text, which knows nothing of the earlier adapters) and `after` (`loraloom init --after`: off the rows of the earlier A's
too). `final` is the average test score of the four tasks merged; `forgetting` what a task scores right after its
arrival less what it scores in the end, mean over the first three. Adapters and scores stay in FOLDER.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from peft import LoraConfig

from loraloom.adapter import Adapter
from loraloom.atomic import write_text
from loraloom.base import base_folder
from loraloom.evaluation import Evaluator, evaluate
from loraloom.heads import Head
from loraloom.initialise import initialise, task_seed
from loraloom.merging import merge
from loraloom.peft_folder import read_adapter
from loraloom.recipe import Recipe
from loraloom.stages import build_task
from loraloom.statistics import Statistics
from loraloom.tasks.task import Task
from loraloom.training import train_adapter
from loraloom.workflow import make_atlas

ORDERS = (("sst2", "qqp", "stsb", "qnli"), ("qnli", "stsb", "sst2", "qqp"), ("stsb", "sst2", "qqp", "qnli"))
WAYS = ("LoRA", "apart", "after")
MERGES = (("task_arithmetic", 0.5), ("tsv", 0.75))


@dataclass
class Ground:
    """What every sequence shares: the recipe, its four tasks, one base model, the atlas, and where things are kept."""

    recipe: Recipe
    tasks: dict[str, Task]
    evaluator: Evaluator
    atlas: Statistics
    out: Path
    seed: int

    def adapter(self, way: str, task: str, earlier: Sequence[str]) -> Adapter:
        """Return the trained adapter of `task`, which comes after `earlier`; trained where it is not there yet."""
        folder = self.out / f"s{self.seed}" / way / ("-".join([*earlier, task]) if way == "after" else task)
        if not folder.exists():
            print(f"training {folder}", file=sys.stderr, flush=True)
            start = None if way == "LoRA" else self._start(way, task, earlier, folder.with_name(f"{folder.name}.start"))
            train_adapter(
                self.recipe.base,
                self.tasks[task],
                folder,
                init=start,
                lora=self.recipe.lora,
                settings=self.recipe.training_of(task),
                seed=task_seed(self.seed, task),
            )
        return read_adapter(folder)

    def _start(self, way: str, task: str, earlier: Sequence[str], folder: Path) -> Path:
        after = {one: self.adapter(way, one, earlier[:index]) for index, one in enumerate(earlier)}
        lora = LoraConfig(
            r=self.recipe.lora.rank, lora_alpha=self.recipe.lora.alpha, target_modules=list(self.recipe.lora.targets)
        )
        known = {"atlas": self.atlas}
        seed = task_seed(self.seed, task)
        if not folder.exists():
            initialise(folder, None, known, lora, rule="apart", seed=seed, after=after if way == "after" else None)
        return folder

    def scores(self, way: str, order: Sequence[str]) -> dict[str, list[dict[str, float]]]:
        """Return by merge, for every arrival, the test scores of the tasks so far; kept in `out`."""
        path = self.out / f"s{self.seed}" / f"{way}.{'-'.join(order)}.json"
        if not path.exists():
            found: dict[str, list[dict[str, float]]] = {rule: [] for rule, _ in MERGES}
            for count in range(1, len(order) + 1):
                so_far = {task: self.adapter(way, task, order[:index]) for index, task in enumerate(order[:count])}
                for rule, scale in MERGES:
                    # one adapter alone is the model as it stands, whatever a rule makes of it
                    updates = (
                        merge(so_far, rule, scale=scale).adapter.updates if count > 1 else so_far[order[0]].updates
                    )
                    found[rule].append(
                        {
                            task: evaluate(self.evaluator, updates, Head.of(adapter.head, task), self.tasks[task]).value
                            for task, adapter in so_far.items()
                        }
                    )
            write_text(path, json.dumps(found, indent=1))
        kept: dict[str, list[dict[str, float]]] = json.loads(path.read_text(encoding="utf-8"))
        return kept


def main() -> None:
    """Run every way and order, and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", help="another base model, a folder or a name")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    recipe = Recipe.load(given.recipe)
    recipe = recipe.model_copy(update={"base": given.base}) if given.base else recipe
    ground = Ground(
        recipe,
        {name: build_task(name, recipe.tasks[name]) for name in ORDERS[0]},
        Evaluator(base_folder(recipe.base), max_length=recipe.training.max_length),
        make_atlas(
            recipe.base,
            list(recipe.lora.targets),
            None,
            [],
            recipe.statistics.atlas_texts,
            recipe.statistics.max_length,
        ),
        given.out,
        given.seed,
    )
    print("| rule | start | final, by order | final | forgetting, by order | forgetting |\n|---|---|---|---|---|---|")
    results = {way: [ground.scores(way, order) for order in ORDERS] for way in WAYS}
    for rule, scale in MERGES:
        for way, sequences in results.items():
            final = [100 * mean(scores[rule][-1].values()) for scores in sequences]
            lost = [
                100 * mean(scores[rule][i][task] - scores[rule][-1][task] for i, task in enumerate(order[:-1]))
                for order, scores in zip(ORDERS, sequences, strict=True)
            ]
            told = [", ".join(f"{value:.1f}" for value in values) for values in (final, lost)]
            cells = f"{told[0]} | {mean(final):.1f} | {told[1]} | {mean(lost):.1f}"
            print(f"| `{rule}` at {scale} | {way} | {cells} |")


if __name__ == "__main__":
    main()
