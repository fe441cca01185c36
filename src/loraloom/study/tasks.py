"""The tasks of a recipe, made of files, data sets on the hub or installed packages, at once or as a stage; and who
teaches a merge to answer their texts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraloom.adapters.update import Adapter
from loraloom.model.generator import Generator
from loraloom.model.load import load_tokenizer
from loraloom.model.runner import Evaluator
from loraloom.model.vocabulary import writing_problems
from loraloom.progress import Reporter
from loraloom.settings import TrainingSettings
from loraloom.study.engine import Context, stage
from loraloom.study.inputs import Local
from loraloom.study.recipe import Recipe, TaskSettings
from loraloom.tasks.builtin import BuiltinTask, builtin_task, source_versions
from loraloom.tasks.files import file_task
from loraloom.tasks.glue import GlueTask, glue_task
from loraloom.tasks.prompts import PromptTask, prompt_task
from loraloom.tasks.splits import SplitTask
from loraloom.tasks.task import Task, answer_tokens_of
from loraloom.training.distil import ByTeachers
from loraloom.training.runs import Progress

ROWS = "rows"
_GLUE_FILES = ("train.jsonl", "dev.jsonl", "meta.json")


@stage("task", version=1)
def make_task(
    folder: Path,
    context: Context,
    *,
    name: str,
    settings: TaskSettings,
    files: Mapping[str, Local],
    packages: Mapping[str, str],
) -> None:
    """Write the rows of a task, of `files` where the settings name a place, or of packages of these versions."""
    places = {option: str(file.path) for option, file in files.items()}
    build_task(name, settings.model_validate({**settings.model_dump(), **places})).save(folder / ROWS)


def task_arguments(name: str, settings: TaskSettings) -> dict[str, Any]:
    """Return what `make_task` is given for a task of a recipe: its files by their content, wherever they lie."""
    files: dict[str, Local] = {}
    if isinstance(settings, GlueTask) and settings.path:
        files["path"] = Local.folder(settings.path, *(f"{name}/{file}" for file in _GLUE_FILES))
    if isinstance(settings, SplitTask):
        places = {split: Path(source).expanduser() for split, source in settings.sources.items()}
        files = {split: Local.file(path) for split, path in places.items() if os.path.isfile(path)}
    # the name of a file tells by its ending how it is read; epochs are of training
    names = {option: None if option == "path" else file.path.name for option, file in files.items()}
    return {
        "name": name,
        "settings": settings.model_copy(update={**names, "epochs": None}),
        "files": files,
        "packages": source_versions() if isinstance(settings, BuiltinTask) else {},
    }


def measuring_problems(members: Sequence[Adapter], recipe: Recipe) -> list[str]:
    """Return which adapters are none of the recipe's kind of tasks, or read other words than its base."""
    if recipe.generates:
        return writing_problems(members, load_tokenizer(recipe.base))
    return [f"{member.name}: has no head: a task is measured by its own" for member in members if not member.head]


def build_task(name: str, settings: TaskSettings) -> Task:
    """Return a task of a recipe, its rows read.

    name: as the recipe has it.
    settings: one of `Recipe.tasks`.

    Raises LoraloomError that tells all that is wrong with its rows.
    """
    if isinstance(settings, BuiltinTask):
        return builtin_task(name, settings)
    if isinstance(settings, GlueTask):
        return glue_task(name, settings)
    if isinstance(settings, PromptTask):
        return prompt_task(name, settings)
    return file_task(name, settings)


def teachers(
    model: Evaluator | Generator,
    members: Mapping[str, Adapter],
    tasks: Mapping[str, Task],
    texts: int,
    scratch: Path,
    settings: TrainingSettings,
    *,
    start: Adapter | None = None,
    reporter: Reporter | None = None,
    progress: Progress | None = None,
) -> ByTeachers:
    """Return what distils adapters by `texts` unlabelled training texts of each task; see `ByTeachers`."""
    return ByTeachers(
        model,
        members,
        {name: task.sample("train", texts) for name, task in tasks.items()},
        scratch,
        start=start,
        settings=settings,
        answer_tokens=answer_tokens_of(tasks),
        reporter=reporter,
        progress=progress,
    )
