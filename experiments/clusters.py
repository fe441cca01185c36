"""Clusters of texts as tasks, after TC-LoRA: one task is cut into clusters of rows, an adapter each, all merged again.

    python experiments/clusters.py recipes/subspaces-glue8.yaml --out FOLDER [--tasks qqp,sst2] [--parts 4]

Against two controls: one adapter for all rows (`whole`), and parts of the same sizes drawn at random (`shards`).
Clusters are k-means of the base model's mean last hidden states. Every part is trained for the recipe's epochs, so all
three see as many rows; the parts' heads read the same labels and are averaged. Scales are chosen on held-out rows.
`alone` is the mean of the parts' adapters on all test rows, each with its own head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean

import torch
from sklearn.cluster import KMeans
from starts_lib import Ground, arguments
from torch import Tensor
from transformers import AutoModel

from loraloom import Adapter, Evaluator, Head, Task, base_folder, batches, build_task, evaluate, merge

MERGES = {"task_arithmetic": (0.25, 0.5, 0.75, 1.0), "tsv": (0.5, 0.75, 1.0)}
STARTS = ("LoRA", "apart")


def trained(ground: Ground, start: str, task: Task, way: str, parts: Sequence[Sequence[int]]) -> dict[str, Adapter]:
    """Return the trained adapter of every part of a task's training rows."""
    found = {}
    for index, rows in enumerate(parts):
        folder = ground.out / start / f"{task.name}.{way}.{index}"
        part = replace(task, train=task.train.select(rows))
        found[str(index)] = ground.trained(folder, part, folder.name, apart=start == "apart")
    return found


def scores(evaluator: Evaluator, task: Task, adapters: Mapping[str, Adapter]) -> list[float]:
    """Return the test scores in points: of the parts alone, then of every merge at the scale of held-out rows."""

    def score(adapter: Adapter, head: Head, split: str = "test") -> float:
        return 100 * evaluate(evaluator, adapter.updates, head, task, split=split).value

    heads = [Head.of(adapter.head, name) for name, adapter in adapters.items()]
    alone = mean(score(adapter, head) for adapter, head in zip(adapters.values(), heads, strict=True))
    if len(adapters) == 1:
        return [alone] * (1 + len(MERGES))
    head = Head({name: _mean([one.tensors[name] for one in heads]) for name in heads[0].tensors}, heads[0].last)
    found = [alone]
    for rule, scales in MERGES.items():
        merged = merge(adapters, rule, scale=1.0).adapter
        best = max(scales, key=lambda scale: score(merged.scaled(scale), head, "heldout"))
        found.append(score(merged.scaled(best), head))
    return found


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).mean(dim=0)


@torch.no_grad()
def embeddings(base: str, evaluator: Evaluator, task: Task) -> Tensor:
    """Return (k, n) float32: the base model's last hidden states of every training row, mean over its tokens."""
    model, encoded = AutoModel.from_pretrained(base_folder(base)).eval(), evaluator.encode(task.train)
    found: list[Tensor] = [torch.empty(0)] * len(encoded)
    for chosen, batch in batches(encoded, evaluator.tokenizer, 64):
        counted = batch["attention_mask"].unsqueeze(-1)
        means = (model(**batch).last_hidden_state * counted).sum(dim=1) / counted.sum(dim=1)
        for index, row in zip(chosen, means, strict=True):
            found[index] = row
    return torch.stack(found)


def cuts(rows: Tensor, parts: int, seed: int) -> dict[str, list[list[int]]]:
    """Return by way the training rows of every part."""
    cluster = KMeans(parts, n_init=10, random_state=seed).fit_predict(rows.numpy())
    clusters = [[i for i, label in enumerate(cluster) if label == part] for part in range(parts)]
    drawn = iter(torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist())
    shards = [[next(drawn) for _ in part] for part in clusters]
    return {"whole": [list(range(len(rows)))], "clusters": clusters, "shards": shards}


def main() -> None:
    """Train and merge every way, and print the table as Markdown."""
    parser = arguments(__doc__)
    parser.add_argument("--tasks", default="qqp,sst2", help="of the recipe, separated by commas (%(default)s)")
    parser.add_argument("--parts", type=int, default=4)
    given = parser.parse_args()
    ground = Ground.of(given)
    recipe, evaluator = ground.recipe, ground.evaluator
    print(f"| task | start | rows cut into | sizes | alone | {' | '.join(MERGES)} |\n|{'---|' * (5 + len(MERGES))}")
    for name in given.tasks.split(","):
        task = build_task(name, recipe.tasks[name])
        ways = cuts(embeddings(recipe.base, evaluator, task), given.parts, given.seed)
        for start in STARTS:
            for way, parts in ways.items():
                figures = scores(evaluator, task, trained(ground, start, task, way, parts))
                sizes = ", ".join(str(len(part)) for part in parts)
                print(f"| {name} | {start} | {way} | {sizes} | {' | '.join(f'{x:.1f}' for x in figures)} |", flush=True)


if __name__ == "__main__":
    main()
