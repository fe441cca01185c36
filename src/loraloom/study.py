"""Runs a recipe: which stages, what is already done, what comes next."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from loraloom import stages
from loraloom.adapter import Adapter, read_adapter, read_provenance
from loraloom.base import base_folder, base_sha256
from loraloom.evaluation import Evaluator
from loraloom.heads import Head
from loraloom.initialise import task_seed
from loraloom.merging import merge, write_merged
from loraloom.metrics import average
from loraloom.progress import Reporter
from loraloom.recipe import InitSettings, MergeSettings, Recipe
from loraloom.store import Stage, Store
from loraloom.tasks.task import Task
from loraloom.training import train_adapter

# raised by hand where a stage's code changes what it computes
_VERSIONS = {
    "task": 1,
    "statistics": 1,
    "init": 1,
    "train": 1,
    "single": 1,
    "merge": 1,
    "evaluate": 1,
    "interference": 1,
}


@dataclass(frozen=True)
class Trained:
    """The adapters of one init and seed, by task: where each stage's output lies, and its stage."""

    init: str
    seed: int
    starts: dict[str, Path]
    folders: dict[str, Path]
    stages: dict[str, Stage]
    singles: dict[str, Path]

    @cached_property
    def adapters(self) -> dict[str, Adapter]:
        return {task: read_adapter(folder / "adapter") for task, folder in self.folders.items()}

    @cached_property
    def heads(self) -> dict[str, Head]:
        return {task: Head.of(adapter.head, adapter.name) for task, adapter in self.adapters.items()}


@dataclass(frozen=True)
class Evaluated:
    """One merged adapter at one scale: its folder at scale 1, its held-out and, where chosen, test evaluation."""

    merged: Path
    settings: MergeSettings
    scale: float
    heldout: Path
    test: Path | None
    chosen_as_trained: bool
    chosen_aligned: bool


class Study:
    """A recipe and the store that holds what it has computed so far.

    Every method below makes what is missing and returns where it lies; calling one twice computes nothing twice.
    """

    def __init__(self, recipe: Recipe, folder: str | Path, reporter: Reporter) -> None:
        self.recipe = recipe
        self.folder = Path(folder)
        self.store = Store(self.folder / "stages")
        self.reporter = reporter
        self.base = base_folder(recipe.base)
        self.base_sha256 = base_sha256(self.base)

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """The tasks of the recipe, made or read again."""
        self.reporter.begin("tasks", len(self.recipe.tasks))
        tasks = {}
        for name, settings in self.recipe.tasks.items():
            stage = self._stage("task", name, stages.task_inputs(name, settings))

            def make(folder: Path, _: Path, name: str = name, settings: Any = settings) -> None:
                stages.build_task(name, settings).save(folder / "rows")

            tasks[name] = Task.load(self._get("tasks", stage, make) / "rows")
        return tasks

    @cached_property
    def evaluator(self) -> Evaluator:
        """The one base model in memory; loaded when the first stage needs it."""
        training = self.recipe.training
        return Evaluator(self.base, max_length=training.max_length, batch_size=training.eval_batch_size)

    @cached_property
    def statistics(self) -> dict[str, dict[str, tuple[Stage, Path]]]:
        """Statistics by split (train, heldout) and task."""
        self.reporter.begin("statistics", 2 * len(self.tasks))
        settings, targets = self.recipe.statistics, self.recipe.lora.targets
        found: dict[str, dict[str, tuple[Stage, Path]]] = {"train": {}, "heldout": {}}
        for split, by_task in found.items():
            for name, task in self.tasks.items():
                inputs = {"task": task.digest(), "split": split, "targets": targets, "base": self.base_sha256}
                stage = self._stage("statistics", f"{name}.{split}", {**inputs, **settings.model_dump()})

                def make(folder: Path, _: Path, task: Task = task, split: str = split) -> None:
                    stages.make_statistics(folder, self.evaluator, task, split, settings, targets)

                by_task[name] = stage, self._get("statistics", stage, make)
        return found

    @cached_property
    def trained(self) -> list[Trained]:
        """Every init and seed with all its adapters initialised, trained and evaluated alone."""
        count = len(self.recipe.inits) * len(self.recipe.seeds) * len(self.tasks)
        for kind in ("inits", "training", "single tasks"):
            self.reporter.begin(kind, count)
        found = []
        for init, settings in self.recipe.inits.items():
            for seed in self.recipe.seeds:
                one = Trained(init, seed, {}, {}, {}, {})
                for name in self.tasks:
                    self._train(one, name, settings)
                found.append(one)
        return found

    def evaluated(self, one: Trained, settings: MergeSettings) -> list[Evaluated]:
        """Return one init and seed merged by one rule at every scale, tested at the scales that held-out rows chose."""
        merge_stage, merged_folder = self._merge(one, settings)
        label = f"{one.init}.{settings.rule}.s{one.seed}"
        upstream = {"merge": merge_stage.key, "tasks": {name: task.digest() for name, task in self.tasks.items()}}
        upstream["settings"] = {**self.recipe.alignment.model_dump(), "max_length": self.recipe.training.max_length}
        heldout: dict[float, tuple[Stage, Path]] = {}
        for scale in settings.scales:
            stage = self._stage(
                "evaluate", f"{label}.x{scale:g}.heldout", {**upstream, "scale": scale, "split": "heldout"}
            )

            def make(folder: Path, _: Path, scale: float = scale) -> None:
                merged = read_adapter(merged_folder / "adapter").scaled(scale)
                own = {name: stages.own_features(path) for name, path in one.singles.items()}
                alignment = self.recipe.alignment
                stages.make_heldout_evaluation(folder, self.evaluator, merged, one.heads, own, self.tasks, alignment)

            heldout[scale] = stage, self._get("evaluation", stage, make)
        best = {aligned: _best_scale(heldout, aligned) for aligned in (False, True)}
        tests: dict[float, Path] = {}
        for scale in sorted(set(best.values())):
            tests[scale] = self._test(one, merged_folder, scale, *heldout[scale], label)
        return [
            Evaluated(merged_folder, settings, scale, path, tests.get(scale), scale == best[False], scale == best[True])
            for scale, (_, path) in heldout.items()
        ]

    def evaluations(self) -> Iterator[tuple[Trained, list[Evaluated]]]:
        """Yield every init and seed with all its merges."""
        runs, rules = len(self.trained), self.recipe.merging
        self.reporter.begin("merging", runs * len(rules))
        self.reporter.begin("evaluation", runs * sum(len(rule.scales) for rule in rules))
        for one in self.trained:
            yield one, [row for rule in rules for row in self.evaluated(one, rule)]

    def interference(self) -> Iterator[tuple[Trained, dict[str, Any]]]:
        """Yield every init and seed with its responses before and after training."""
        self.reporter.begin("interference", len(self.trained))
        heldout = self.statistics["heldout"]
        for one in self.trained:
            keys = {name: [one.stages[name].key, heldout[name][0].key] for name in self.tasks}
            stage = self._stage("interference", f"{one.init}.s{one.seed}", keys)

            def make(folder: Path, _: Path, one: Trained = one) -> None:
                start = {name: path / "adapter" for name, path in one.starts.items()}
                trained = {name: path / "adapter" for name, path in one.folders.items()}
                stages.make_interference(folder, start, trained, {name: path for name, (_, path) in heldout.items()})

            path = self._get("interference", stage, make) / stages.RESPONSES
            yield one, json.loads(path.read_text(encoding="utf-8"))

    def _train(self, one: Trained, name: str, settings: InitSettings) -> None:
        task, statistics = self.tasks[name], self.statistics["train"]
        label = f"{one.init}.{name}.s{one.seed}"
        seed = one.seed if settings.seed == "shared" else task_seed(one.seed, name)
        start_seed = one.seed if settings.rule == "shared" else seed
        keys = {other: stage.key for other, (stage, _) in statistics.items()}
        init_inputs = {"own": name, "statistics": keys, "lora": self.recipe.lora.model_dump(), "seed": start_seed}
        init_stage = self._stage("init", label, {**init_inputs, **settings.model_dump(exclude={"description", "seed"})})

        def make_init(folder: Path, _: Path) -> None:
            read = {other: stages.read_statistics(path) for other, (_, path) in statistics.items()}
            own = read.pop(name)
            stages.make_init(folder, own, read, self.recipe.lora, settings, start_seed, self.base)

        one.starts[name] = self._get("inits", init_stage, make_init)

        training = self.recipe.training
        train_inputs = {"init": init_stage.key, "task": task.digest(), "base": self.base_sha256, "seed": seed}
        train_stage = self._stage("train", label, {**train_inputs, **training.model_dump()})

        def make_train(folder: Path, scratch: Path) -> None:
            train_adapter(
                self.base,
                task,
                folder / "adapter",
                init=one.starts[name] / "adapter",
                settings=training,
                seed=seed,
                checkpoints=scratch,
                progress=lambda done, total: self.reporter.detail("training", f"{label} step {done}/{total}"),
            )

        one.stages[name] = train_stage
        one.folders[name] = self._get("training", train_stage, make_train)

        alignment = self.recipe.alignment
        single_inputs = {"train": train_stage.key, "texts": alignment.texts, "max_length": training.max_length}
        single_stage = self._stage("single", label, {**single_inputs, "task": task.digest()})

        def make_single(folder: Path, _: Path) -> None:
            adapter = read_adapter(one.folders[name] / "adapter")
            stages.make_single(folder, self.evaluator, adapter, task, alignment)

        one.singles[name] = self._get("single tasks", single_stage, make_single)

    def _merge(self, one: Trained, settings: MergeSettings) -> tuple[Stage, Path]:
        inputs = {"adapters": {name: stage.key for name, stage in one.stages.items()}, "rule": settings.rule}
        stage = self._stage("merge", f"{one.init}.{settings.rule}.s{one.seed}", {**inputs, "options": settings.options})

        def make(folder: Path, _: Path) -> None:
            merged = merge(one.adapters, settings.rule, scale=1.0, **settings.options)
            write_merged(merged, folder / "adapter")

        return stage, self._get("merging", stage, make)

    def _test(self, one: Trained, merged_folder: Path, scale: float, stage: Stage, heldout: Path, label: str) -> Path:
        test = self._stage("evaluate", f"{label}.x{scale:g}.test", {"heldout": stage.key, "split": "test"})

        def make(folder: Path, _: Path) -> None:
            merged = read_adapter(merged_folder / "adapter").scaled(scale)
            aligned = stages.read_aligned(heldout, one.heads)
            stages.make_test_evaluation(folder, self.evaluator, merged, one.heads, aligned, self.tasks)

        return self.store.get(test, make)

    def _stage(self, kind: str, label: str, depends_on: Mapping[str, Any]) -> Stage:
        return Stage(kind, label.replace("/", "_").replace(" ", "-"), {"version": _VERSIONS[kind], **depends_on})

    def _get(self, bar: str, stage: Stage, make: Callable[[Path, Path], None]) -> Path:
        self.reporter.detail(bar, stage.label)
        path = self.store.get(stage, make)
        self.reporter.advance(bar)
        return path


def _best_scale(heldout: Mapping[float, tuple[Stage, Path]], aligned: bool) -> float:
    """Return the scale of the best held-out average, the smallest of equals."""
    averages = {scale: average(stages.read_scores(path, aligned)).value for scale, (_, path) in heldout.items()}
    return max(sorted(averages), key=lambda scale: averages[scale])


def merged_facts(folder: Path) -> dict[str, Any]:
    """Return rule, space, options and output rank of a merged adapter."""
    facts = read_provenance(folder / "adapter")
    ranks = [layer["rank"] for layer in facts["layers"].values()]
    return {**{key: facts[key] for key in ("rule", "space", "options")}, "output_rank": max(ranks)}
