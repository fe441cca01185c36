"""Single stages of a recipe by hand: files in, files out. What the commands train, align and evaluate call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from loraloom.adapters.heads import Head, align_heads, heads_by_task
from loraloom.adapters.peft import PROVENANCE, Input, inputs_by_task, read_adapter, read_provenance, task_of
from loraloom.adapters.together import compatibility_problems
from loraloom.adapters.update import Adapter
from loraloom.errors import LoraloomError, collecting, did_you_mean, raise_problems, raise_together
from loraloom.files.atomic import check_folder, staged_file, write_text
from loraloom.files.hashing import json_text, task_seed
from loraloom.files.tensors import save_tensors
from loraloom.merging import Rule
from loraloom.merging.folders import Look, Supplied
from loraloom.merging.names import input_names
from loraloom.merging.needs import supply
from loraloom.model.load import base_folder
from loraloom.model.runner import Evaluator, evaluate
from loraloom.progress import Reporter
from loraloom.results import Score
from loraloom.statistics.file import Statistics
from loraloom.study.recipe import Recipe
from loraloom.study.stages import build_task, merged_adapters
from loraloom.study.store import Store
from loraloom.tasks.task import Task
from loraloom.training import Trained, train_adapter


def train_from_recipe(
    recipe: Recipe, task: str, output: Path, init: Path | None, seed: int, reporter: Reporter
) -> Trained:
    """Train one task of a recipe as a study with this seed would; see `train_adapter`."""
    check_folder(output)
    built = _task(recipe, task)
    reporter.begin("training", 1)
    return train_adapter(
        recipe.base,
        built,
        output,
        init=init,
        lora=recipe.lora,
        settings=recipe.training_of(task),
        seed=task_seed(seed, task),
        progress=lambda done, total: reporter.detail("training", f"{task} step {done}/{total}"),
    )


def looker(recipe: Recipe, texts: int, reporter: Reporter) -> Look:
    """Return what supplies a merging rule from the recipe's base model, tasks and statistics; see `needs.supply`.

    A probe has `texts` training texts a task. An adapter's task is the one it was trained on, or the one its folder is
    named for. The function raises LoraloomError for an adapter without a task in the recipe, or without a head where
    the rule needs one.
    """

    def look(rule: Rule, members: Mapping[str, Adapter], known: Sequence[Statistics]) -> Supplied:
        names = _tasks_of([member.path for member in members.values() if member.path], recipe)
        tasks = {member: _task(recipe, name) for member, name in zip(members, names, strict=True)}
        if rule.whole:
            reporter.begin(rule.name, 1)

        def step(done: int, total: int) -> None:
            reporter.detail(rule.name, f"step {done}/{total}")

        load = partial(_evaluator, recipe)
        return supply(rule, members, tasks, load, recipe.statistics, texts, known=known, progress=step)

    return look


def align_folder(recipe: Recipe, merged: Path, folders: Sequence[Path], reporter: Reporter) -> dict[str, str]:
    """Align the heads beside a merged adapter to its features, in place, and return the head's file by task.

    `folders` are the adapters that were merged; those that share a task go by their names. Of each task of the recipe
    `alignment.texts` training texts are read, no labels. Raises LoraloomError for a folder without a head or a task in
    the recipe, told together, and for one that was not merged.
    """
    adapter = read_adapter(merged)
    errors: list[LoraloomError] = []
    given: list[tuple[Adapter, Head]] = []
    for folder in folders:
        with collecting(errors):
            member = read_adapter(folder)
            given.append((member, Head.of(member.head, str(folder))))
    with collecting(errors):
        names = _tasks_of(folders, recipe)
    with collecting(errors):
        problems = compatibility_problems([adapter, *(member for member, _ in given)])
        raise_problems("cannot align", problems, "merge these adapters")
    raise_together(errors)
    files = _head_files(merged, folders, names)
    reporter.begin("aligning", len(files))
    evaluator, texts = _evaluator(recipe), recipe.alignment.texts
    read = merged_adapters(merged, 1.0, files)
    heads, own, together = {}, {}, {}
    for key, name, (member, head) in zip(files, names, given, strict=True):
        rows = evaluator.encode(_task(recipe, name).sample("train", texts))
        heads[key], own[key] = head, evaluator.features(member.updates, head, rows)
        together[key] = evaluator.features(read[key].updates, head, rows)
        reporter.advance("aligning")
    for key, head in align_heads(heads, own, together, ridge=recipe.alignment.ridge).items():
        with staged_file(merged / files[key]) as place:
            save_tensors(head.tensors, place)
    _note_alignment(merged, f"on {texts} unlabelled training texts a task")
    return files


def evaluate_folder(recipe: Recipe, folder: Path, names: Sequence[str], split: str) -> dict[str, tuple[str, Score]]:
    """Return (metric, score) by task of an adapter folder with its head, or of a merged one with its heads.

    Where several inputs of a merge share a task, each goes by its own name, in `names` too. Raises LoraloomError for
    an unknown task or split, and a task without a head.
    """
    if split not in ("test", "heldout"):
        raise LoraloomError(f"split {split!r} is unknown", "use test or heldout")
    heads = heads_by_task(folder)
    wanted = list(names) or [key for name in recipe.tasks for key, one in heads.items() if one.task == name]
    missing = [name for name in wanted if name not in heads]
    if missing or not wanted:
        which = f"task {', '.join(missing)}" if missing else f"any task of the recipe ({', '.join(recipe.tasks)})"
        known = [key if key == one.task else f"{key} (task {one.task})" for key, one in heads.items()]
        raise LoraloomError(f"{folder}: no head for {which}", f"it has heads for: {', '.join(known) or 'none'}")
    tasks = {key: _task(recipe, heads[key].task) for key in wanted}
    evaluator = _evaluator(recipe)
    scores: dict[str, tuple[str, Score]] = {}
    read = merged_adapters(folder, 1.0, tasks)
    for key, task in tasks.items():
        scores[key] = task.metric, evaluate(evaluator, read[key].updates, heads[key].head, task, split=split)
    return scores


def study_store(folder: Path) -> Store:
    """Return the store of a study folder. Raises LoraloomError where there is none."""
    if not (folder / "stages").is_dir():
        raise LoraloomError(f"{folder}: not a study folder: it has no stages/", "name the folder of `loraloom run`")
    return Store(folder / "stages")


def _evaluator(recipe: Recipe) -> Evaluator:
    training = recipe.training
    return Evaluator(base_folder(recipe.base), max_length=training.max_length, batch_size=training.eval_batch_size)


def _tasks_of(folders: Sequence[Path], recipe: Recipe) -> list[str]:
    """Return the task of each adapter folder. Raises LoraloomError that tells every one that the recipe lacks."""
    names = [task_of(folder) for folder in folders]
    problems = [
        f"{folder}: the recipe has no task {name!r}: {did_you_mean(name, recipe.tasks)}"
        for name, folder in zip(names, folders, strict=True)
        if name not in recipe.tasks
    ]
    raise_problems("tasks of the adapters", problems, "name folders or tasks alike")
    return names


def _note_alignment(merged: Path, how: str) -> None:
    known, start = read_provenance(merged), "heads: aligned"
    # aligning again replaces its own note; what others noted stays
    notes = [note for note in known.get("notes", []) if not note.startswith(start)]
    told = {**known, "notes": [*notes, f"{start} to the merged features {how}"]}
    write_text(merged / PROVENANCE, json_text(told))


def _head_files(merged: Path, folders: Sequence[Path], tasks: Sequence[str]) -> dict[str, str]:
    """Return the head's file in `merged` of each of `folders`, by task, or by name where inputs share a task.

    Where a merged adapter tells no inputs, the file is called after the task. Raises LoraloomError for a folder that
    is not an input, and for two that are one.
    """
    known = inputs_by_task(merged) or {task: Input(task, task) for task in tasks}
    found: dict[str, Path] = {}
    problems = []
    for folder, task, name in zip(folders, tasks, input_names(folders), strict=True):
        alike = [key for key, one in known.items() if one.task == task]
        if len(alike) != 1:  # of several, or where no task was recorded, the one of this name
            alike = [key for key in alike or known if known[key].name == name]
        if not alike:
            problems.append(f"{folder}: was not merged into it; these were: {', '.join(known)}")
        elif alike[0] in found:
            problems.append(f"{found[alike[0]]} and {folder} are both {alike[0]!r}")
        else:
            found[alike[0]] = folder
    raise_problems(f"{merged}: cannot align", problems, "name the adapters that were merged, each once")
    return {key: f"heads/{known[key].name}.safetensors" for key in found}


def _task(recipe: Recipe, name: str) -> Task:
    if name not in recipe.tasks:
        raise LoraloomError(f"the recipe has no task {name!r}", did_you_mean(name, recipe.tasks))
    return build_task(name, recipe.tasks[name])
