"""One step of a recipe by hand, outside a study: train a task, supply a merging rule, evaluate a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

from loraloom.adapters.heads import heads_by_task
from loraloom.adapters.peft import read_adapter, task_of
from loraloom.adapters.update import Adapter
from loraloom.analysis.agreement import Candidates, agreement, chosen
from loraloom.analysis.screening_texts import ScreenTexts
from loraloom.analysis.searchlight import Reader
from loraloom.errors import LoraloomError, collecting, raise_problems, raise_together
from loraloom.files.atomic import staged_folder
from loraloom.files.hashing import task_seed
from loraloom.merging import MergeOptions, Rule
from loraloom.merging.choice import AgreementFacts
from loraloom.merging.distillation import Distiller
from loraloom.merging.folders import Planned, Supplied
from loraloom.merging.needs import supply
from loraloom.merging.options import Normalise
from loraloom.model.generator import Generator, answer_task
from loraloom.model.load import base_folder, load_tokenizer
from loraloom.model.readable import check_readable
from loraloom.model.runner import Evaluator, evaluate
from loraloom.model.vocabulary import writing_problems
from loraloom.progress import Reporter
from loraloom.results import Score
from loraloom.statistics.file import Statistics
from loraloom.study.answers import write_answers
from loraloom.study.recipe import Recipe
from loraloom.study.stages import merged_adapters
from loraloom.study.tasks import build_task, teachers
from loraloom.tasks.task import Task, answer_tokens_of
from loraloom.training.adapter import Trained, check_trained, train_adapter
from loraloom.training.runs import Reports


def train_from_recipe(
    recipe: Recipe,
    task: str,
    output: Path,
    init: Path | None,
    seed: int,
    reporter: Reporter,
    *,
    overwrite: bool = False,
) -> Trained:
    """Train one task of a recipe as a study with this seed would; see `train_adapter`.

    Where the recipe has the curves written to files, these lie beside the output, in a folder of its name and `.logs`.
    """
    check_trained(output, recipe.base, init, overwrite)  # before rows are read
    built = build_task(task, recipe.task(task))
    check_readable(recipe.base, {task: built}, recipe.training.max_length)
    reporter.begin("training", 1)
    return train_adapter(
        recipe.base,
        built,
        output,
        init=init,
        lora=recipe.lora,
        settings=recipe.training_of(task),
        seed=task_seed(seed, task),
        overwrite=overwrite,
        progress=partial(reporter.step, "training", task),
        reports=Reports(recipe.report_to, output.with_name(f"{output.name}.logs")) if recipe.report_to else None,
    )


class ByRecipe:
    """What a merge may look at beside the adapters: a recipe's tasks, read once, and its base model, loaded once.

    An adapter's task is the one it was trained on, or the one its folder is named for.
    """

    def __init__(self, recipe: Recipe, reporter: Reporter) -> None:
        self.recipe, self._reporter = recipe, reporter
        self._tasks: dict[str, Task] = {}

    @cached_property
    def model(self) -> Evaluator | Generator:
        """The base model: one that writes, where the recipe's answers are written."""
        return generator_of(self.recipe) if self.recipe.generates else evaluator_of(self.recipe)

    def tasks(self, members: Mapping[str, Adapter]) -> dict[str, Task]:
        """Return the tasks of adapters, by their names. Raises LoraloomError as `tasks_of` does."""
        if self._tasks.keys() != members.keys():
            found = tasks_of(self.recipe, [member.path for member in members.values() if member.path])
            self._tasks = dict(zip(members, found, strict=True))
        return self._tasks

    def look(
        self,
        texts: int,
        normalise: Normalise,
        rule: Rule,
        members: Mapping[str, Adapter],
        known: Sequence[Statistics],
        *,
        scratch: Path | None = None,
        start: Adapter | None = None,
    ) -> Supplied:
        """Return what a rule needs, of `texts` training texts a task; see `needs.supply`.

        To `normalise` by response takes statistics, whatever the rule. A rule that trains does so in the folder
        `scratch`, from `start` where one is given. Raises LoraloomError for an adapter without a
        task in the recipe, or without a head where the rule needs one.
        """
        if "probe" in rule.supplied:
            self._reporter.begin(rule.name, 1)

        def distiller() -> Distiller:
            assert scratch is not None
            tasks, training = self.tasks(members), self.recipe.training
            return teachers(self.model, members, tasks, texts, scratch, training, start=start, reporter=self._reporter)

        return supply(
            rule,
            members,
            self.tasks(members),
            lambda: self.model,
            self.recipe.statistics,
            texts,
            known=known,
            normalise=normalise,
            progress=lambda done, total: self._reporter.detail(rule.name, f"step {done}/{total}"),
            distiller=distiller,
        )

    def choose(
        self,
        texts: int,
        candidates: Sequence[Candidates],
        members: Mapping[str, Adapter],
        options: MergeOptions,
        plan: Planned,
    ) -> MergeOptions:
        """Return `options` with the rule and scale that agree best with the single models, on `texts` texts a task.

        Raises LoraloomError as `agreement` does.
        """
        return chosen(options, self.agreement(texts, candidates, members, options=options, plan=plan))

    def screen_texts(self, texts: int, words: Sequence[str], members: Mapping[str, Adapter]) -> ScreenTexts:
        """Return what a screening looks at beside the weights: of each task `texts` held-out rows with labels.

        words: that may be triggers.
        """
        tasks = self.tasks(members)
        rows = {name: task.sample("heldout", texts) for name, task in tasks.items()}
        return ScreenTexts(Reader(self.model, answer_tokens_of(tasks)), rows, tuple(words))

    def agreement(
        self,
        texts: int,
        candidates: Sequence[Candidates],
        members: Mapping[str, Adapter],
        *,
        options: MergeOptions | None = None,
        plan: Planned,
    ) -> AgreementFacts:
        """Return how far every candidate is from the single models, on `texts` training texts a task."""
        tasks = self.tasks(members)
        rows = {name: task.sample("train", texts) for name, task in tasks.items()}
        return agreement(
            members,
            self.model,
            rows,
            candidates,
            options=options,
            plan=plan,
            answer_tokens=answer_tokens_of(tasks),
            reporter=self._reporter,
        )


def evaluate_folder(
    recipe: Recipe,
    folder: Path,
    names: Sequence[str],
    split: str,
    reporter: Reporter | None = None,
    *,
    answers: Path | None = None,
) -> dict[str, tuple[str, Score]]:
    """Return (metric, score) by task of an adapter folder with its head, or of a merged one with its heads.

    answers: a folder for what is written, a file a task, where answers are written.

    Where several inputs of a merge share a task, each goes by its own name, in `names` too. Raises LoraloomError for
    an unknown task, and a task without a head. Where answers are written there are no heads, and every task of the
    recipe is measured where `names` has none.
    """
    if recipe.generates:
        return _written(recipe, folder, names, split, reporter or Reporter(quiet=True), answers)
    raise_problems("--answers", ["the recipe's tasks are of heads, which write none"] if answers else [])
    heads = heads_by_task(folder)
    wanted = list(names) or [key for name in recipe.tasks for key, one in heads.items() if one.task == name]
    missing = [name for name in wanted if name not in heads]
    if missing or not wanted:
        which = f"task {', '.join(missing)}" if missing else f"any task of the recipe ({', '.join(recipe.tasks)})"
        known = [key if key == one.task else f"{key} (task {one.task})" for key, one in heads.items()]
        raise LoraloomError(f"{folder}: no head for {which}", f"it has heads for: {', '.join(known) or 'none'}")
    tasks = {key: build_task(heads[key].task, recipe.task(heads[key].task)) for key in wanted}
    evaluator = evaluator_of(recipe)
    read = merged_adapters(folder, 1.0, tasks)
    shown = reporter or Reporter(quiet=True)
    return {
        key: (task.metric, evaluate(evaluator, read[key].updates, heads[key].head, task, split=split))
        for key, task in shown.each("evaluation", tasks.items())
    }


def _written(
    recipe: Recipe, folder: Path, names: Sequence[str], split: str, reporter: Reporter, answers: Path | None
) -> dict[str, tuple[str, Score]]:
    """Return (metric, score) of an adapter that writes, on the tasks named, or on all of the recipe."""
    wanted = list(names) or list(recipe.tasks)
    settings = {name: recipe.task(name) for name in wanted}
    read = merged_adapters(folder, 1.0, wanted)
    problems = writing_problems([read_adapter(folder)], load_tokenizer(recipe.base))
    raise_problems("it cannot answer the recipe's prompts", problems, "name an adapter of the recipe's base model")
    tasks = {name: build_task(name, one) for name, one in settings.items()}
    check_readable(recipe.base, tasks, recipe.training.max_length, [split])
    generator = generator_of(recipe)
    found = {
        name: answer_task(generator, read[name].updates, task, getattr(task, split))
        for name, task in reporter.each("evaluation", tasks.items())
    }
    if answers is not None:
        with staged_folder(answers, kind="answers", inputs=[folder]) as staged:
            for name, one in found.items():
                write_answers(staged / f"{name}.jsonl", getattr(tasks[name], split), one.answers)
    return {name: (tasks[name].metric, one.score) for name, one in found.items()}


def tasks_of(recipe: Recipe, folders: Sequence[Path]) -> list[Task]:
    """Return the task of each adapter's folder: the one it was trained on, or the one that the folder is named for.

    Raises LoraloomError that tells every one that the recipe lacks, and what is wrong with the rows of the others.
    """
    found: list[Task] = []
    errors: list[LoraloomError] = []
    for folder in folders:
        with collecting(errors):
            name = task_of(folder)
            found.append(build_task(name, recipe.task(name, of=str(folder))))
    raise_together(errors)
    return found


def evaluator_of(recipe: Recipe) -> Evaluator:
    """Load the recipe's base model; it reads rows as a study evaluates them."""
    training = recipe.training
    return Evaluator(base_folder(recipe.base), max_length=training.max_length, batch_size=training.eval_batch_size)


def generator_of(recipe: Recipe) -> Generator:
    """Load the recipe's base model as one that writes; it reads rows as a study evaluates them."""
    training = recipe.training
    return Generator(
        base_folder(recipe.base),
        max_length=training.max_length,
        batch_size=training.eval_batch_size,
        precision=recipe.evaluation.precision,
    )
