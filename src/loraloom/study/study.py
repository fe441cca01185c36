"""Runs a recipe: which stages, what is already done, what comes next."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from loraloom.adapters.heads import Head
from loraloom.adapters.peft import adapter_sha256, read_adapter, read_provenance
from loraloom.adapters.update import Adapter
from loraloom.errors import LoraloomError, collecting, raise_problems, raise_together
from loraloom.files.hashing import task_seed
from loraloom.merging import MergeOptions, get_rule, make_plan, write_merged
from loraloom.merging.needs import supply
from loraloom.model.load import base_folder, base_name, base_sha256
from loraloom.model.runner import Evaluator
from loraloom.progress import Reporter
from loraloom.results import average
from loraloom.statistics.texts import generic_rows
from loraloom.study import stages
from loraloom.study.recipe import MergeSettings, Recipe, slug
from loraloom.study.store import Stage, Store
from loraloom.tasks.task import Task
from loraloom.training import train_adapter

GIVEN = "given adapters"  # the init of a recipe that brings its adapters

# raised by hand where a stage's code changes what it computes
_VERSIONS = {
    "task": 1,
    "statistics": 1,
    "init": 2,
    "train": 2,
    "adapter": 1,
    "single": 1,
    "merge": 2,
    "evaluate": 1,
    "interference": 1,
}


class Output(NamedTuple):
    """A stage that is done and the folder of its output."""

    stage: Stage
    path: Path


@dataclass(frozen=True)
class Trained:
    """The adapters of one init and seed, by task: as they start, as trained, and evaluated alone."""

    init: str
    seed: int
    starts: dict[str, Output] = field(default_factory=dict)
    trained: dict[str, Output] = field(default_factory=dict)
    singles: dict[str, Output] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Return the name of this init and seed in stages and folders."""
        return f"{slug(self.init)}.s{self.seed}"

    @cached_property
    def adapters(self) -> dict[str, Adapter]:
        """The trained adapters, read once; each is of the recipe's task, whatever a given one was trained on."""
        read = {task: read_adapter(output.path / "adapter") for task, output in self.trained.items()}
        return {task: replace(adapter, task=task) for task, adapter in read.items()}

    @cached_property
    def heads(self) -> dict[str, Head]:
        """The tasks' heads as trained."""
        return {task: Head.of(adapter.head, adapter.name) for task, adapter in self.adapters.items()}


@dataclass(frozen=True)
class Evaluated:
    """One merged adapter at one scale: at scale 1, its held-out and, where chosen, test evaluation."""

    merged: Path
    settings: MergeSettings
    scale: float
    heldout: Output
    test: Path | None
    chosen_as_trained: bool
    chosen_aligned: bool


class Study:
    """A recipe and the store that holds what it has computed so far.

    Every member below makes what is missing and returns where it lies; asking twice computes nothing twice. Everything
    that can be wrong with the recipe's inputs is found before the first adapter is trained.
    """

    def __init__(self, recipe: Recipe, folder: str | Path, reporter: Reporter) -> None:
        recipe.check_complete()
        self.recipe = recipe
        self.folder = Path(folder)
        self.store = Store(self.folder / "stages")
        self.reporter = reporter
        self.base = base_folder(recipe.base)
        self.base_name = base_name(recipe.base)
        self.base_sha256 = base_sha256(self.base)

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """The tasks of the recipe, made or read again. Raises LoraloomError that tells what is wrong with any."""
        self.reporter.begin("tasks", len(self.recipe.tasks))
        tasks: dict[str, Task] = {}
        errors: list[LoraloomError] = []
        for name, settings in self.recipe.tasks.items():
            stage = self._stage("task", name, stages.task_inputs(name, settings))

            def make(folder: Path, _: Path, name: str = name, settings: Any = settings) -> None:
                stages.build_task(name, settings).save(folder / "rows")

            with collecting(errors):
                tasks[name] = Task.load(self._get("tasks", stage, make).path / "rows")
                asked = stages.sample_problems(tasks[name], self.recipe.statistics, self.recipe.alignment)
                raise_problems("samples", asked, "lower it in the recipe, or give the task more training rows")
        raise_together(errors)
        return tasks

    @cached_property
    def digests(self) -> dict[str, str]:
        """The sha256 of every task's rows."""
        return {name: task.digest() for name, task in self.tasks.items()}

    @cached_property
    def evaluator(self) -> Evaluator:
        """The one base model in memory; loaded when a stage needs it."""
        training = self.recipe.training
        return Evaluator(self.base, max_length=training.max_length, batch_size=training.eval_batch_size)

    @cached_property
    def statistics(self) -> dict[str, dict[str, Output]]:
        """Statistics by split (train, heldout) and task."""
        self.reporter.begin("statistics", 2 * len(self.tasks))
        return {split: {name: self._statistics(name, split) for name in self.tasks} for split in ("train", "heldout")}

    @cached_property
    def trained(self) -> list[Trained]:
        """Every init and seed with all its adapters initialised, trained and evaluated alone; or the finished ones."""
        if self.recipe.adapters:
            return self._given()
        runs = [Trained(init, seed) for init in self.recipe.inits for seed in self.recipe.seeds]
        steps = {"inits": self._start, "training": self._train, "single tasks": self._single}
        for bar, step in steps.items():
            self.reporter.begin(bar, len(runs) * len(self.tasks))
            if bar == "training":
                # it loads a base of its own; two large ones would not fit
                self.__dict__.pop("evaluator", None)
            for one in runs:
                for name in self.tasks:
                    step(one, name)
        return runs

    def _given(self) -> list[Trained]:
        """Return the recipe's finished adapters, evaluated alone; seeds are those of the rules that draw at random."""
        runs = [Trained(GIVEN, seed) for seed in self.recipe.seeds]
        self.reporter.begin("single tasks", len(runs) * len(self.tasks))
        for one in runs:
            for name in self.tasks:
                source = self.recipe.adapters[name]
                stage = self._stage("adapter", name, {"sha256": adapter_sha256(source)})

                def make(folder: Path, _: Path, source: Path = source) -> None:
                    stages.copy_adapter(source, folder)

                one.trained[name] = Output(stage, self.store.get(stage, make))
                self._single(one, name)
        return runs

    @cached_property
    def targets(self) -> list[str] | str:
        """The layers whose inputs count: the recipe's targets, or those of its finished adapters."""
        if not self.recipe.adapters:
            return self.recipe.lora.targets
        return sorted({module for path in self.recipe.adapters.values() for module in read_adapter(path).shapes})

    def evaluations(self) -> Iterator[tuple[Trained, list[Evaluated]]]:
        """Yield every init and seed with all its merges."""
        runs, rules = len(self.trained), self.recipe.merging
        self.reporter.begin("merging", runs * len(rules))
        self.reporter.begin("evaluation", runs * sum(len(rule.scales) for rule in rules))
        for one in self.trained:
            yield one, [row for rule in rules for row in self._evaluate(one, rule)]

    def interference(self) -> Iterator[tuple[Trained, dict[str, Any]]]:
        """Yield every init and seed with its responses before and after training."""
        self.reporter.begin("interference", len(self.trained))
        heldout = self.statistics["heldout"]
        for one in self.trained:
            inputs = {f"{name} trained": output.stage for name, output in one.trained.items()}
            inputs |= {f"{name} inputs": output.stage for name, output in heldout.items()}

            def make(folder: Path, _: Path, one: Trained = one) -> None:
                start = {name: output.path / "adapter" for name, output in one.starts.items()}
                trained = {name: output.path / "adapter" for name, output in one.trained.items()}
                seen = {name: output.path for name, output in heldout.items()}
                stages.make_interference(folder, start, trained, seen)

            stage = self._stage("interference", one.label, {}, inputs)
            path = self._get("interference", stage, make).path / stages.RESPONSES
            yield one, json.loads(path.read_text(encoding="utf-8"))

    @cached_property
    def atlas(self) -> Output:
        """The statistics of generic text, for inits that stay off its loud directions."""
        self.reporter.begin("atlas", 1)
        settings, targets = self.recipe.statistics, self.targets
        rows = generic_rows(settings.atlas_texts)
        options = {**settings.model_dump(exclude={"texts"}), "targets": targets, "base": self.base_sha256}
        stage = self._stage("statistics", "atlas", {**options, "text_sha256": stages.texts_sha256(rows)})

        def make(folder: Path, _: Path) -> None:
            stages.make_statistics(folder, self.evaluator, rows, settings, targets)

        return self._get("atlas", stage, make)

    def _statistics(self, name: str, split: str) -> Output:
        settings, targets = self.recipe.statistics, self.targets
        options = {"rows_sha256": self.digests[name], "split": split, "targets": targets, "base": self.base_sha256}
        chosen = settings.model_dump(exclude={"atlas_texts"})
        stage = self._stage("statistics", f"{name}.{split}", {**chosen, **options})

        def make(folder: Path, _: Path) -> None:
            rows = self.tasks[name].sample(split, settings.texts)
            stages.make_statistics(folder, self.evaluator, rows, settings, targets)

        return self._get("statistics", stage, make)

    def _start(self, one: Trained, name: str) -> None:
        settings, lora = self.recipe.inits[one.init], self.recipe.lora
        own = self.statistics["train"][name]
        if settings.off == "atlas":
            others = {"atlas": self.atlas}
        else:
            others = {other: output for other, output in self.statistics["train"].items() if other != name}
        seed = one.seed if settings.rule == "shared" else self._seed(one, name)
        options = {**settings.model_dump(exclude={"description", "seed"}), "lora": lora.model_dump()}
        inputs = {"own": own.stage, **{f"off {other}": output.stage for other, output in others.items()}}
        stage = self._stage("init", f"{one.label}.{name}", {**options, "seed": seed}, inputs)

        def make(folder: Path, _: Path) -> None:
            read = {other: stages.read_statistics(output.path) for other, output in others.items()}
            stages.make_init(folder, stages.read_statistics(own.path), read, lora, settings, seed, self.base_name)

        one.starts[name] = self._get("inits", stage, make)

    def _train(self, one: Trained, name: str) -> None:
        start, seed = one.starts[name], self._seed(one, name)
        settings = self.recipe.training_of(name)
        options = {"rows_sha256": self.digests[name], "base": self.base_sha256, "seed": seed}
        stage = self._stage("train", f"{one.label}.{name}", {**settings.model_dump(), **options}, {"init": start.stage})

        def make(folder: Path, scratch: Path) -> None:
            train_adapter(
                self.base_name,
                self.tasks[name],
                folder / "adapter",
                init=start.path / "adapter",
                settings=settings,
                seed=seed,
                checkpoints=scratch,
                progress=lambda done, total: self.reporter.detail("training", f"{stage.label} step {done}/{total}"),
            )

        one.trained[name] = self._get("training", stage, make)

    def _single(self, one: Trained, name: str) -> None:
        alignment, trained = self.recipe.alignment, one.trained[name]
        options = {"texts": alignment.texts, "max_length": self.recipe.training.max_length}
        stage = self._stage("single", f"{one.label}.{name}", options, {"train": trained.stage})

        def make(folder: Path, _: Path) -> None:
            adapter = read_adapter(trained.path / "adapter")
            stages.make_single(folder, self.evaluator, adapter, self.tasks[name], alignment)

        one.singles[name] = self._get("single tasks", stage, make)

    def _evaluate(self, one: Trained, settings: MergeSettings) -> list[Evaluated]:
        """Return one init and seed merged by one rule at every scale, tested at the scales that held-out rows chose."""
        label = f"{one.label}.{settings.rule}"
        merged = self._merge(one, settings, label)
        heldout = {scale: self._heldout(one, merged, scale, label) for scale in settings.scales}
        best = {aligned: _best_scale(heldout, aligned) for aligned in (False, True)}
        tests = {scale: self._test(one, merged, scale, heldout[scale], label) for scale in sorted(set(best.values()))}
        return [
            Evaluated(merged.path, settings, scale, output, tests.get(scale), scale == best[False], scale == best[True])
            for scale, output in heldout.items()
        ]

    def _merge(self, one: Trained, settings: MergeSettings, label: str) -> Output:
        rule = get_rule(settings.rule)
        inputs = {name: output.stage for name, output in one.trained.items()}
        options = {"rule": settings.rule, "options": settings.filled(), "seed": one.seed}
        seen = self.statistics["train"] if "moments" in rule.supplied else {}
        inputs |= {f"{name} inputs": output.stage for name, output in seen.items()}
        if rule.whole:
            length = self.recipe.training.max_length
            options |= {"texts": settings.texts, "rows_sha256": self.digests, "max_length": length}
            options |= {"base": self.base_sha256}

        def make(folder: Path, _: Path) -> None:
            def step(done: int, total: int) -> None:
                self.reporter.detail("merging", f"{label} step {done}/{total}")

            statistics, probe = supply(
                rule,
                one.adapters,
                self.tasks,
                lambda: self.evaluator,
                self.recipe.statistics,
                settings.texts,
                known={name: stages.read_statistics(output.path) for name, output in seen.items()},
                progress=step,
            )
            asked = MergeOptions(settings.rule, settings.options, scale=1.0, seed=one.seed)
            plan = make_plan(one.adapters, asked, statistics=statistics, probe=probe)
            write_merged(plan, folder / "adapter")

        return self._get("merging", self._stage("merge", label, options, inputs), make)

    def _heldout(self, one: Trained, merged: Output, scale: float, label: str) -> Output:
        alignment = self.recipe.alignment
        # the rows, the texts aligned on and their length are those of the single-task evaluations
        inputs = {"merge": merged.stage, **{f"{name} alone": output.stage for name, output in one.singles.items()}}
        options = {"scale": scale, "ridge": alignment.ridge, "split": "heldout"}

        def make(folder: Path, _: Path) -> None:
            adapter = stages.merged_adapters(merged.path / "adapter", scale, self.tasks)
            own = {name: stages.own_features(output.path) for name, output in one.singles.items()}
            stages.make_heldout_evaluation(folder, self.evaluator, adapter, one.heads, own, self.tasks, alignment)

        return self._get("evaluation", self._stage("evaluate", f"{label}.x{scale:g}.heldout", options, inputs), make)

    def _test(self, one: Trained, merged: Output, scale: float, heldout: Output, label: str) -> Path:
        stage = self._stage("evaluate", f"{label}.x{scale:g}.test", {"split": "test"}, {"heldout": heldout.stage})

        def make(folder: Path, _: Path) -> None:
            adapter = stages.merged_adapters(merged.path / "adapter", scale, self.tasks)
            aligned = stages.read_aligned(heldout.path, one.heads)
            stages.make_test_evaluation(folder, self.evaluator, adapter, one.heads, aligned, self.tasks)

        return self.store.get(stage, make)

    def _seed(self, one: Trained, name: str) -> int:
        return one.seed if self.recipe.inits[one.init].seed == "shared" else task_seed(one.seed, name)

    def _stage(
        self, kind: str, label: str, options: Mapping[str, Any], inputs: Mapping[str, Stage] | None = None
    ) -> Stage:
        return Stage(kind, label, {"version": _VERSIONS[kind], **options}, inputs or {})

    def _get(self, bar: str, stage: Stage, make: Callable[[Path, Path], None]) -> Output:
        self.reporter.detail(bar, stage.label)
        path = self.store.get(stage, make)
        self.reporter.advance(bar)
        return Output(stage, path)


def _best_scale(heldout: Mapping[float, Output], aligned: bool) -> float:
    """Return the scale of the best held-out average, the smallest of equals."""
    averages = {
        scale: average(stages.read_scores(output.path, aligned).values()).value for scale, output in heldout.items()
    }
    return max(sorted(averages), key=lambda scale: averages[scale])


def merged_facts(folder: Path) -> dict[str, Any]:
    """Return rule, space, options and output rank of a merged adapter."""
    facts = read_provenance(folder / "adapter")
    ranks = [layer["rank"] for layer in facts["layers"].values()]
    return {**{key: facts[key] for key in ("rule", "space", "options")}, "output_rank": max(ranks)}
