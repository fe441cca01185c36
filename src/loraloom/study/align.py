"""Heads aligned to a merged adapter by hand, beside it in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loraloom.adapters.heads import Head, align_heads
from loraloom.adapters.peft import PROVENANCE, Input, inputs_by_task, read_adapter, read_provenance
from loraloom.adapters.together import compatibility_problems
from loraloom.adapters.update import Adapter
from loraloom.errors import LoraloomError, collecting, raise_problems, raise_together
from loraloom.files.atomic import add_to_record, staged_file, write_text
from loraloom.files.hashing import json_text
from loraloom.files.tensors import save_tensors
from loraloom.merging.card import merged_card
from loraloom.merging.facts import MergedFacts
from loraloom.merging.names import input_names
from loraloom.progress import Reporter
from loraloom.study.by_hand import evaluator_of, tasks_of
from loraloom.study.recipe import Recipe
from loraloom.study.stages import merged_adapters


def align_folder(recipe: Recipe, merged: Path, folders: Sequence[Path], reporter: Reporter) -> dict[str, str]:
    """Align the heads beside a merged adapter to its features, in place, and return the head's file by task.

    `folders` are the adapters that were merged; those that share a task go by their names. Of each task of the recipe
    `alignment.texts` training texts are read, no labels. Raises LoraloomError for a folder without a head or a task in
    the recipe, told together, for one that was not merged, and where `merged` is a single adapter with its own head.
    """
    adapter = read_adapter(merged)
    errors: list[LoraloomError] = []
    if adapter.head and not (inputs_by_task(merged) or (merged / "heads").is_dir()):
        single = f"{merged}: is no merged adapter: it holds a head of its own"
        errors.append(LoraloomError(single, "name the merged one first, then its members"))
    if "output_rank" in read_provenance(merged):
        with collecting(errors):  # before anything is written: its model card is made from this anew
            MergedFacts.read(merged)
    given: list[tuple[Adapter, Head]] = []
    for folder in folders:
        with collecting(errors):
            member = read_adapter(folder)
            given.append((member, Head.of(member.head, str(folder))))
    with collecting(errors):
        tasks = tasks_of(recipe, folders)
    with collecting(errors):
        problems = compatibility_problems([adapter, *(member for member, _ in given)])
        raise_problems("cannot align", problems, "merge these adapters")
    raise_together(errors)
    files = _head_files(merged, folders, [task.name for task in tasks])
    reporter.begin("aligning", len(files))
    evaluator, texts = evaluator_of(recipe), recipe.alignment.texts
    read = merged_adapters(merged, 1.0, files)
    heads, own, together = {}, {}, {}
    for key, task, (member, head) in zip(files, tasks, given, strict=True):
        rows = evaluator.encode(task.sample("train", texts))
        heads[key], own[key] = head, evaluator.features(member.updates, head, rows)
        together[key] = evaluator.features(read[key].updates, head, rows)
        reporter.advance("aligning")
    add_to_record(merged, files.values())
    for key, head in align_heads(heads, own, together, ridge=recipe.alignment.ridge).items():
        with staged_file(merged / files[key], overwrite=True) as place:
            save_tensors(head.tensors, place)
    _note_alignment(merged, f"on {texts} unlabelled training texts a task")
    return files


def _note_alignment(merged: Path, how: str) -> None:
    """Note in loraloom.json, and in the model card of a merge by this version, how the heads were aligned."""
    known, start = read_provenance(merged), "heads: aligned"
    # aligning again replaces its own note; what others noted stays
    notes = [note for note in known.get("notes", []) if not note.startswith(start)]
    told = {**known, "notes": [*notes, f"{start} to the merged features {how}"]}
    write_text(merged / PROVENANCE, json_text(told), overwrite=True)
    if "output_rank" in known:
        write_text(merged / "README.md", merged_card(MergedFacts.read(merged)), overwrite=True)


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
