"""What a merge keeps that is distilled by unlabelled texts: by their number, by rank, start and loss, beside controls.

    loraloom run recipes/distil-glue6.yaml -o studies/distil-glue6
    python experiments/distil.py measure recipes/distil-glue6.yaml ADAPTERS RESULTS [--arms default "rank 8"]
    python experiments/distil.py tables RESULTS

`measure` takes a folder with an adapter folder a task, as studies/distil-glue6/adapters/LoRA, and appends a row an arm
to RESULTS, a JSON file: every task's test score with the heads as trained and aligned, the label-free distance on the
recipe's held-out rows, which no arm is trained on, seconds of CPU and peak memory. Arms that are there are left out, so
a killed run goes on; peak memory is that of the process, so give `--arms` one arm where it counts. The start's scale
and every default were chosen by the held-out rows. `tables` prints Markdown: the tables of docs/distil.md.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from loraloom import (
    Evaluator,
    Head,
    Recipe,
    Update,
    align_head,
    base_folder,
    batches,
    build_task,
    distil,
    merge,
    metric_value,
    read_adapter,
    train_adapter,
)

Arm = dict[str, Any]
SCALES = (0.2, 0.3, 0.5, 0.75)
ALIGNED_BY = 200  # unlabelled texts a task
ARMS: dict[str, Arm] = {
    "single": {"how": "single"},
    **{f"TA {scale}": {"how": "merge", "rule": "task_arithmetic", "scale": scale} for scale in SCALES},
    **{f"TSV {scale}": {"how": "merge", "rule": "tsv", "scale": scale} for scale in SCALES},
    "best TA": {"how": "best", "rule": "task_arithmetic"},
    "best TSV": {"how": "best", "rule": "tsv"},
    "default": {"how": "distil"},
    **{f"{texts} texts": {"how": "distil", "texts": texts} for texts in (32, 64, 256, 2000)},
    **{f"rank {rank}": {"how": "distil", "rank": rank} for rank in (8, 16)},
    **{f"{steps} steps": {"how": "distil", "steps": steps} for steps in (100, 200, 800)},
    "outputs and features": {"how": "distil", "loss": "both"},
    "features alone": {"how": "distil", "loss": "features"},
    "from TA 0.3": {"how": "distil", "start": "task_arithmetic", "start_scale": 0.3},
    "from TSV 0.05": {"how": "distil", "start_scale": 0.05},
    "generic text": {"how": "distil", "texts": "generic"},
    "labels": {"how": "labels"},
    "labels, rank 8": {"how": "labels", "rank": 8},
    "each by itself": {"how": "self"},
    "training one": {"how": "train"},
}


def main() -> None:
    """Run one of the two steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    step = steps.add_parser("measure")
    step.add_argument("recipe")
    step.add_argument("adapters", type=Path)
    step.add_argument("results", type=Path)
    step.add_argument("--base")
    step.add_argument("--seed", type=int, default=0)
    step.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
    steps.add_parser("tables").add_argument("results", type=Path, nargs="+")
    given = parser.parse_args()
    if given.step == "tables":
        tables([json.loads(path.read_text(encoding="utf-8")) for path in given.results])
        return
    recipe = Recipe.load(given.recipe)
    kept = Kept(given.results, given.recipe, given.adapters, given.seed)
    bench = Bench(recipe, given.base or recipe.base, given.adapters, given.seed)
    for name in given.arms:
        if name not in kept.done:
            kept.add({"arm": name, **bench.row(ARMS[name])})


class Kept:
    """The rows so far, on disk after every one."""

    def __init__(self, path: Path, recipe: str, adapters: Path, seed: int) -> None:
        self.path = path
        packages = ("loraloom", "torch", "transformers", "peft")
        about: dict[str, Any] = {"recipe": Path(recipe).name, "adapters": adapters.name, "seed": seed}
        about["versions"] = {name: version(name) for name in packages}
        fresh: dict[str, Any] = {"about": about, "rows": []}
        self.found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else fresh
        self.done = {row["arm"] for row in self.found["rows"]}

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row, and print it."""
        self.found["rows"].append(row)
        self.path.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        print(row["arm"], {key: value for key, value in row.items() if key in ("trained", "aligned", "cpu_seconds")})


class Bench:
    """Adapters of one base, with what their single models make of the rows that judge."""

    def __init__(self, recipe: Recipe, base: str, folder: Path, seed: int) -> None:
        self.recipe, self.seed, reading = recipe, seed, recipe.training
        self.model = Evaluator(base_folder(base), max_length=reading.max_length, batch_size=reading.eval_batch_size)
        self.tasks = {name: build_task(name, settings) for name, settings in recipe.tasks.items()}
        self.members = {name: read_adapter(folder / name) for name in self.tasks}
        self.heads = {name: Head.of(adapter.head, name) for name, adapter in self.members.items()}
        self.encoded, self.own, self.parts = {}, {}, {}
        for name, task in self.tasks.items():
            rows = [self.model.encode(one) for one in (task.test, task.heldout, task.sample("train", ALIGNED_BY))]
            self.encoded[name], self.parts[name] = [text for one in rows for text in one], [len(one) for one in rows]
            self.own[name] = self._read(name, self.members[name].updates)

    def _read(self, name: str, updates: Mapping[str, Update], first: int = 0) -> tuple[torch.Tensor, ...]:
        """Return features of test rows, held-out rows and texts, or from the `first` of these on."""
        if name in self.own and updates is self.members[name].updates:
            return self.own[name][first:]
        parts = self.parts[name]
        rows = self.encoded[name][sum(parts[:first]) :]
        return torch.split(self.model.features(updates, self.heads[name], rows), parts[first:])

    def row(self, arm: Arm) -> dict[str, Any]:
        """Return what an arm costs and reaches."""
        asked = {key: value for key, value in arm.items() if key != "how"}
        begun, wall = time.process_time(), time.perf_counter()
        found, more = getattr(self, f"_{arm['how']}")(**asked)
        spent = {"cpu_seconds": time.process_time() - begun, "seconds": time.perf_counter() - wall}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        return {"asked": asked, **(self._scores(found) if found else {}), **spent, "peak_mib": peak, **more}

    def _scores(self, found: Mapping[str, Mapping[str, Update]], split: str = "test") -> dict[str, Any]:
        trained, aligned, apart = {}, {}, {}
        for name, task in self.tasks.items():
            head, (_, own_heldout, own_texts) = self.heads[name], self.own[name]
            read = self._read(name, found[name], 1 if split == "heldout" else 0)
            (heldout, texts), judged = read[-2:], read[0]
            labels = task.label_tensor(getattr(task, split))
            trained[name] = metric_value(task.metric, head.logits(judged), labels)
            aligned[name] = metric_value(task.metric, align_head(head, own_texts, texts).logits(judged), labels)
            apart[name] = _apart(head.logits(own_heldout), head.logits(heldout))
        return {"trained": trained, "aligned": aligned, "distance": apart}

    def _single(self) -> Any:
        return {name: member.updates for name, member in self.members.items()}, {}

    def _merge(self, rule: str, scale: float) -> Any:
        return dict.fromkeys(self.tasks, merge(self.members, rule, scale=scale, seed=self.seed).adapter.updates), {}

    def _best(self, rule: str) -> Any:
        """Return the scores of a rule at the scale that is best on held-out rows, with heads as trained and aligned."""
        heldout: dict[str, dict[str, float]] = {"trained": {}, "aligned": {}}
        for scale in SCALES:
            found = self._scores(self._merge(rule, scale)[0], "heldout")
            for heads, kept in heldout.items():
                kept[str(scale)] = _mean(found[heads])
        best = {heads: max(kept, key=lambda scale: kept[scale]) for heads, kept in heldout.items()}
        rows = {scale: self._scores(self._merge(rule, float(scale))[0]) for scale in set(best.values())}
        scores: Arm = {heads: rows[scale][heads] for heads, scale in best.items()}
        return None, {**scores, "distance": rows[best["trained"]]["distance"], "scale": best, "heldout": heldout}

    def _distil(self, texts: int | str | None = None, names: list[str] | None = None, **options: Any) -> Any:
        names = names or list(self.tasks)
        usual = next(one.texts for one in self.recipe.merging if one.rule == "distil")
        rows = {
            name: texts if isinstance(texts, str) else self.tasks[name].sample("train", texts or usual)
            for name in names
        }
        with tempfile.TemporaryDirectory() as place:
            members = {name: self.members[name] for name in names}
            given: Arm = {"seed": self.seed, "teachers": f"{place}/teachers", **options}
            merged = distil(members, self.model, rows, f"{place}/work", **given)
        assert merged.plan.distiller
        facts = merged.plan.distiller.facts
        assert facts
        told: dict[str, Any] = {"steps": facts.steps, "best_step": facts.best_step, "batch_size": facts.batch_size}
        told["texts"] = {name: one.texts.count for name, one in facts.tasks.items()}
        return dict.fromkeys(names, merged.adapter.updates), told

    def _self(self) -> Any:
        return {name: self._distil(names=[name])[0][name] for name in self.tasks}, {}

    def _labels(self, rank: int | None = None, batch: int = 8, rate: float = 2e-3) -> Any:
        """Return the same start trained on the same rows by their labels: one adapter for all tasks, heads held."""
        steps = 10_000 // (batch * len(self.tasks))  # as many texts as the default reads
        start = merge(self.members, "tsv", scale=0.5, rank=rank, seed=self.seed).adapter.updates
        factors = {
            module: Update(u.B.clone().requires_grad_(), u.A.clone().requires_grad_()) for module, u in start.items()
        }
        weights = [tensor for update in factors.values() for tensor in (update.B, update.A)]
        optimiser = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
        falling = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, steps)
        drawn = random.Random(self.seed)
        usual = next(one.texts for one in self.recipe.merging if one.rule == "distil")
        rows = {name: task.sample("train", usual) for name, task in self.tasks.items()}
        encoded = {name: self.model.encode(one) for name, one in rows.items()}
        labels = {name: task.label_tensor(rows[name]) for name, task in self.tasks.items()}
        for _ in range(steps):
            for name in self.tasks:
                chosen = drawn.sample(range(len(rows[name])), batch)
                order, inputs = next(batches([encoded[name][row] for row in chosen], self.model.tokenizer, batch))
                with self.model.running(factors, self.heads[name]) as run:
                    said = self.heads[name].logits(run(inputs))
                right = labels[name][[chosen[place] for place in order]]
                torch.autograd.backward(_loss(said, right))
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimiser.step()
            falling.step()
            optimiser.zero_grad()
        trained = {module: Update(u.B.detach(), u.A.detach()) for module, u in factors.items()}
        return dict.fromkeys(self.tasks, trained), {"steps": steps, "batch_size": batch}

    def _train(self) -> Any:
        """Train one adapter as the study does, for what it costs: of the task with the most rows."""
        task = max(self.tasks.values(), key=lambda one: len(one.train))
        place = Path(tempfile.mkdtemp())
        done = train_adapter(
            self.model.base, task, place / "one", lora=self.recipe.lora, settings=self.recipe.training_of(task.name)
        )
        shutil.rmtree(place)
        return None, {"task": task.name, "steps": done.steps}


def _apart(own: torch.Tensor, merged: torch.Tensor) -> float:
    """Return the mean divergence, or squared error, of outputs, against that of the mean answer."""
    own, merged = own.double(), merged.double()
    if own.shape[1] == 1:
        return float((own - merged).square().mean() / own.var(correction=0))
    p = own.softmax(1)
    far = (p * (p.log() - merged.log_softmax(1))).sum(1).mean()
    return float(far / (p * (p.log() - p.mean(0).log())).sum(1).mean())


def _loss(said: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if said.shape[1] == 1:
        return torch.nn.functional.mse_loss(said[:, 0], right)
    return torch.nn.functional.cross_entropy(said, right)


def tables(files: list[dict[str, Any]]) -> None:
    """Print a row an arm: test averages over tasks, the share kept, the task that kept least, cost."""
    for found in files:
        rows = {row["arm"]: row for row in found["rows"]}
        alone = rows["single"]["trained"]
        print(f"\n{found['about']}\n")
        print("| merged by | as trained | kept | least of a task | aligned | distance | CPU s | steps |")
        print("|---|---|---|---|---|---|---|---|")
        for name, row in rows.items():
            cost = f"{row['cpu_seconds']:.0f} | {row.get('best_step', '')} |"
            if "trained" not in row:
                print(f"| {name} | | | | | | {cost}")
                continue
            mean, aligned, apart = (100 * _mean(row[key]) for key in ("trained", "aligned", "distance"))
            kept = 100 * sum(row["trained"].values()) / sum(alone.values())
            least = min(alone, key=lambda task: row["trained"][task] / alone[task])
            worst = f"{least} {100 * row['trained'][least] / alone[least]:.1f} %"
            print(f"| {name} | {mean:.1f} | {kept:.1f} % | {worst} | {aligned:.1f} | {apart / 100:.3f} | {cost}")


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


if __name__ == "__main__":
    main()
