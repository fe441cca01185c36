"""A study: which stages a recipe asks for, and what each of them depends on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from loraloom.adapters.peft import read_adapter
from loraloom.adapters.together import compatibility_problems
from loraloom.adapters.update import Adapter
from loraloom.errors import LoraloomError, collecting, raise_problems, raise_together
from loraloom.files.hashing import task_seed
from loraloom.model.readable import check_readable
from loraloom.progress import Reporter
from loraloom.results import Score, average
from loraloom.statistics.texts import generic_rows
from loraloom.study import agreement, answers, stages
from loraloom.study.engine import Engine, Reading, StageFunction
from loraloom.study.inputs import Base, Local, Output, Rows, Texts
from loraloom.study.merging import MergeStages
from loraloom.study.parts import GIVEN, Choice, Evaluated, Merges, Trained
from loraloom.study.recipe import Recipe
from loraloom.study.runners import Where, runner_of
from loraloom.study.store import Store
from loraloom.study.tasks import ROWS, make_task, measuring_problems, task_arguments
from loraloom.tasks.prompts import as_prompts
from loraloom.tasks.task import Task


class Study:
    """A recipe and the store that holds what it has computed so far.

    Every member below makes what is missing and returns where it lies; asking twice computes nothing twice. Everything
    that can be wrong with the recipe's inputs is found before the first adapter is trained.
    """

    def __init__(self, recipe: Recipe, folder: str | Path, reporter: Reporter, where: Where | None = None) -> None:
        recipe.check_complete()
        self.recipe = recipe
        self.base = Base.of(recipe.base, generates=recipe.generates)
        self.measured = Base.of(recipe.base, generates=recipe.generates, precision=recipe.evaluation.precision)
        store = Store(f"{str(folder).rstrip('/')}/stages")
        self.folder = store.root.parent
        runner = runner_of(where or Where(), self.base, recipe.report_to, store, reporter)
        self.engine = Engine(store, reporter, runner)
        self.reading = Reading(recipe.training.max_length, recipe.training.eval_batch_size)

    def close(self) -> None:
        """End what still runs; the same study goes on with it."""
        self.engine.runner.close()

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """The tasks of the recipe, made or read again. Raises LoraloomError that tells what is wrong with any."""
        self.engine.expect(make_task, len(self.recipe.tasks))
        made: dict[str, Output] = {}
        tasks: dict[str, Task] = {}
        errors: list[LoraloomError] = []
        for name, settings in self.recipe.tasks.items():
            with collecting(errors):
                made[name] = self.engine.do(make_task, name, **task_arguments(name, settings))
        self.engine.settle()
        for name, output in made.items():
            with collecting(errors):
                tasks[name] = Task.load(output.path / ROWS)
                asked = self.recipe.sample_problems(tasks[name])
                raise_problems("samples", asked, "lower it in the recipe, or give the task more training rows")
        raise_together(errors)
        check_readable(self.base.folder, tasks, self.reading.max_length)
        return tasks

    @property
    def heads(self) -> tuple[bool, ...]:
        """Tell of the heads that are evaluated whether they are aligned: both, but for answers, which have none."""
        return (False,) if self.recipe.generates else (False, True)

    @cached_property
    def rows(self) -> dict[str, Rows]:
        """The rows of every task, as stages read them."""
        return {name: Rows.of(task) for name, task in self.tasks.items()}

    @cached_property
    def given(self) -> dict[str, Local]:
        """The recipe's finished adapters, by task. Raises LoraloomError that tells what is wrong with any."""
        given: dict[str, Local] = {}
        members: list[Adapter] = []
        errors: list[LoraloomError] = []
        for name, folder in self.recipe.adapters.items():
            with collecting(errors):
                members.append(read_adapter(folder))
                given[name] = stages.given_adapter(folder, members[-1])
        raise_together(errors)
        problems = measuring_problems(members, self.recipe) + compatibility_problems(members)
        raise_problems("adapters", problems, "name adapters of the recipe's base model and kind of tasks")
        return given

    @cached_property
    def targets(self) -> list[str] | str:
        """The layers whose inputs count: the recipe's targets, or those of its finished adapters."""
        if not self.recipe.adapters:
            return self.recipe.lora.targets
        return sorted({module for path in self.recipe.adapters.values() for module in read_adapter(path).shapes})

    @cached_property
    def statistics(self) -> dict[str, dict[str, Output]]:
        """Statistics by split (train, heldout) and task."""
        self.engine.expect(stages.collect_statistics, 2 * len(self.tasks))
        count = self.recipe.statistics.texts
        return {
            split: {
                name: self._collect(f"{name}.{split}", Texts.of(task.sample(split, count)))
                if self.recipe.statistics.tokens == "prompt"
                else self._collect_answered(name, split, count)
                for name, task in self.tasks.items()
            }
            for split in ("train", "heldout")
        }

    @cached_property
    def atlas(self) -> Output:
        """The statistics of generic text, for inits that stay off its loud directions."""
        self.engine.expect(stages.collect_statistics, 1)
        rows = generic_rows(self.recipe.statistics.atlas_texts)
        if any("history" in task.train.column_names for task in self.tasks.values()):
            rows = as_prompts(rows)
        return self._collect("atlas", Texts.of(rows))

    @cached_property
    def bases(self) -> dict[str, Output]:
        """The base model alone, evaluated on every task; none for tasks that need a head."""
        if not self.recipe.generates:
            return {}
        self.engine.expect(answers.evaluate_base, len(self.tasks))
        return {
            name: self.engine.do(answers.evaluate_base, name, rows=rows, base=self.measured, reading=self.reading)
            for name, rows in self.rows.items()
        }

    @cached_property
    def trained(self) -> list[Trained]:
        """Every init and seed with all its adapters started, trained and evaluated alone; or the finished ones."""
        inits = self.recipe.inits or (GIVEN,)
        runs = [Trained(init, seed) for init in inits for seed in self.recipe.seeds]
        if self.recipe.adapters:
            self._each(runs, stages.copy_adapter, self._copy)
        else:
            self._each(runs, stages.start_adapter, self._start)
            self._each(runs, stages.train, self._train)
        self._each(runs, stages.evaluate_single, self._single)
        return runs

    def evaluations(self) -> Iterator[tuple[Trained, list[Evaluated]]]:
        """Yield every init and seed with all its merges."""
        chosen = [self._chosen(one) for one in self.merges]
        self.engine.expect(stages.evaluate_test, sum(map(len, chosen)))
        tested = [(one.trained, self._tested(one, by)) for one, by in zip(self.merges, chosen, strict=True)]
        for trained in self.trained:
            yield trained, [row for of, rows in tested if of is trained for row in rows]

    def transcript(self, one: Trained, row: Evaluated) -> Output:
        """Return what is written to a few prompts of every task: before merging, and by this merge."""
        self.engine.expect(answers.transcribe, 1)
        return self.engine.do(
            answers.transcribe,
            f"{one.label}.{row.settings.rule}.x{row.scale:g}",
            merged=row.merged,
            adapters=one.adapters,
            rows=self.rows,
            base=self.measured,
            reading=self.reading,
            scale=row.scale,
        )

    def interference(self) -> Iterator[tuple[Trained, dict[str, Any]]]:
        """Yield every init and seed with its responses before and after training."""
        self.engine.expect(stages.measure, len(self.trained))
        heldout = self.statistics["heldout"]
        found = [
            self.engine.do(stages.measure, one.label, starts=one.starts, adapters=one.adapters, heldout=heldout)
            for one in self.trained
        ]
        for one, output in zip(self.trained, found, strict=True):
            yield one, stages.read_responses(output)

    def _collect(self, label: str, texts: Texts) -> Output:
        settings = self.recipe.statistics
        return self.engine.do(
            stages.collect_statistics,
            label,
            texts=texts,
            base=self.base,
            targets=self.targets,
            kind=settings.kind,
            reading=Reading(settings.max_length, settings.batch_size),
        )

    def _collect_answered(self, name: str, split: str, count: int) -> Output:
        settings = self.recipe.statistics
        return self.engine.do(
            answers.collect_statistics,
            f"{name}.{split}",
            rows=self.rows[name],
            split=split,
            texts=count,
            base=self.base,
            targets=self.targets,
            kind=settings.kind,
            tokens=settings.tokens,
            reading=Reading(settings.max_length, settings.batch_size),
        )

    def _each(
        self, runs: Sequence[Trained], function: StageFunction[Any], step: Callable[[Trained, str], None]
    ) -> None:
        """Take a step, of this stage function, for every task of every init and seed."""
        self.engine.expect(function, len(runs) * len(self.tasks))
        for one in runs:
            for name in self.tasks:
                step(one, name)

    def _copy(self, one: Trained, name: str) -> None:
        one.adapters[name] = self.engine.do(stages.copy_adapter, name, given=self.given[name])

    def _start(self, one: Trained, name: str) -> None:
        settings, seen = self.recipe.inits[one.init], self.statistics["train"]
        others = {other: output for other, output in seen.items() if other != name}
        one.starts[name] = self.engine.do(
            stages.start_adapter,
            f"{one.label}.{name}",
            own=seen[name],
            off={"atlas": self.atlas} if settings.off == "atlas" else others,
            base=self.base,
            lora=self.recipe.lora,
            options=settings.start,
            seed=one.seed if settings.rule == "shared" else self._seed(one, name),
        )

    def _train(self, one: Trained, name: str) -> None:
        one.adapters[name] = self.engine.do(
            stages.train,
            f"{one.label}.{name}",
            rows=self.rows[name],
            start=one.starts[name],
            base=self.base,
            settings=self.recipe.training_of(name),
            seed=self._seed(one, name),
        )

    def _single(self, one: Trained, name: str) -> None:
        if self.recipe.generates:
            one.singles[name] = self.engine.do(
                answers.evaluate_single,
                f"{one.label}.{name}",
                adapter=one.adapters[name],
                rows=self.rows[name],
                base=self.measured,
                reading=self.reading,
            )
            return
        one.singles[name] = self.engine.do(
            stages.evaluate_single,
            f"{one.label}.{name}",
            adapter=one.adapters[name],
            rows=self.rows[name],
            base=self.measured,
            reading=self.reading,
            texts=self.recipe.alignment.texts,
        )

    @cached_property
    def _stages(self) -> MergeStages:
        seen, bases = self.statistics["train"], self.bases
        return MergeStages(self.recipe, self.engine, self.rows, bases, seen, self.base, self.measured, self.reading)

    @cached_property
    def agreement_texts(self) -> dict[str, Texts]:
        """The unlabelled held-out texts by which merges are compared with the single adapters; none where none are."""
        count = self.recipe.evaluation.agreement
        return {name: Texts.of(task.sample("heldout", count)) for name, task in self.tasks.items() if count}

    @cached_property
    def merges(self) -> list[Merges]:
        """Every init and seed merged in every way, evaluated on held-out rows at every scale."""
        runs, rules = self.trained, self.recipe.ways
        self.engine.expect(stages.merge, len(runs) * len(rules))
        self.engine.expect(stages.evaluate_heldout, len(runs) * sum(len(rule.listed) for rule in rules))
        merges = [Merges(one, rule, self._stages.merge(one, rule)) for one in runs for rule in rules]
        for one in merges:
            one.heldout.update({scale: self._stages.heldout(one, scale) for scale in one.settings.listed})
        self._measure_agreement(merges)
        return merges

    def _measure_agreement(self, merges: Sequence[Merges]) -> None:
        texts = self.agreement_texts
        if not texts:
            return
        self.engine.expect(agreement.answer_alone, len(self.trained) * len(texts))
        for run in self.trained:
            run.own.update({name: self._stages.own(run, name, found) for name, found in texts.items()})
        self.engine.expect(agreement.measure_distances, sum(len(one.heldout) for one in merges))
        for one in merges:
            one.distances.update({scale: self._stages.distances(one, scale, texts) for scale in one.heldout})

    @cached_property
    def _choices(self) -> list[tuple[Merges, float, Choice]]:
        """What is chosen for every entry of the recipe, of every init and seed, by heads: a merge at a scale."""
        found = []
        for trained, entry, aligned in itertools.product(self.trained, self.recipe.merging, self.heads):
            own = [one for one in self.merges if one.trained is trained]
            tried = [
                (one, scale)
                for way in entry.tried()
                for one in own
                if one.settings.merges_as(way)
                for scale in way.listed
            ]
            pick = self._nearest if entry.auto else self._best
            found.append((*pick(tried, aligned), Choice(entry, aligned)))
        return found

    def _chosen(self, one: Merges) -> dict[float, list[Choice]]:
        """Return by scale what a merge is the answer to."""
        found: dict[float, list[Choice]] = {}
        for merges, scale, choice in self._choices:
            if merges is one:
                found.setdefault(scale, []).append(choice)
        return found

    def _tested(self, one: Merges, chosen: Mapping[float, Sequence[Choice]]) -> list[Evaluated]:
        """Return a merge at every scale, tested at those that are chosen."""
        tests = {scale: self._stages.test(one, scale) for scale in chosen}
        return [
            Evaluated(
                one.merged,
                one.settings,
                scale,
                output,
                tests.get(scale),
                tuple(chosen.get(scale, ())),
                one.distances.get(scale),
            )
            for scale, output in one.heldout.items()
        ]

    def alone(self, single: Output, split: Literal["heldout", "test"] = "test") -> Score:
        """Return the score of an adapter alone, or of the base model; where answers are written, on test rows."""
        return answers.alone_score(single) if self.recipe.generates else stages.single_score(single, split)

    def judged(self, heldout: Output, aligned: bool) -> dict[str, Score]:
        """Return the scores by task by which held-out rows judge a scale: where answers are written, what is kept."""
        if self.recipe.generates:
            return answers.read_shares(heldout)["kept_probability"]
        return stages.read_scores(heldout, aligned)

    def _best(self, tried: Sequence[tuple[Merges, float]], aligned: bool) -> tuple[Merges, float]:
        """Return the merge and scale of the best held-out average, the smallest scale of equals."""
        if len(tried) == 1:
            return tried[0]

        def averaged(pair: tuple[Merges, float]) -> float:
            return average(self.judged(pair[0].heldout[pair[1]], aligned).values()).value

        return max(sorted(tried, key=lambda pair: pair[1]), key=averaged)

    def _nearest(self, tried: Sequence[tuple[Merges, float]], aligned: bool) -> tuple[Merges, float]:
        """Return the merge and scale nearest to the single models on average, the first of equals; labels not read."""

        def mean(pair: tuple[Merges, float]) -> float:
            distances = agreement.read_distances(pair[0].distances[pair[1]], aligned).values()
            known = [one for one in distances if one is not None]
            if not known:
                alike = f"merging: auto: every single model of {pair[0].trained.label} answers its texts alike"
                raise LoraloomError(alike, "train longer, or raise evaluation.agreement; or name rule and scales")
            return sum(known) / len(known)

        return min(tried, key=mean)

    def _seed(self, one: Trained, name: str) -> int:
        return one.seed if self.recipe.inits[one.init].seed == "shared" else task_seed(one.seed, name)
