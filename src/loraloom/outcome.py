"""A finished study as results.json, report.html and adapter folders: read from its stages, computed nowhere else."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from loraloom import stages
from loraloom.adapter import read_adapter, read_provenance, write_adapter
from loraloom.atomic import staged_folder
from loraloom.evaluation import labels
from loraloom.metrics import average, metric_value
from loraloom.progress import Reporter
from loraloom.recipe import Recipe
from loraloom.report import write_report
from loraloom.results import InitFacts, Interference, MergeScore, Score, SingleScore, StudyResult, TaskFacts
from loraloom.store import RECORD
from loraloom.study import Evaluated, Study, Trained, merged_facts
from loraloom.tasks.task import SPLITS, Task

_VERSIONS_OF = ("loraloom", "torch", "transformers", "peft", "datasets", "scikit-learn", "scipy", "numpy")


def run_study(
    recipe: Recipe, folder: str | Path, *, command: str = "", reporter: Reporter | None = None
) -> StudyResult:
    """Run a recipe in `folder` to its end and return what it measured.

    Writes results.json, report.html, adapters/<init>/<task> and merged/<init>/<rule>. What an earlier run of the same
    recipe in the same folder has done is not done again; a killed run goes on where it stood.
    """
    with reporter or Reporter(quiet=True) as shown:
        study = Study(recipe, folder, shown)
        merges, evaluated = [], []
        for one, rows in study.evaluations():
            merges += [score for row in rows for score in _merge_scores(study, one, row)]
            evaluated += [(one, row) for row in rows]
        responses = [table for one, found in study.interference() for table in _interference(one, found)]
        result = _result(study, merges, responses, command)
        for one in study.trained:
            _export_adapters(study, one)
        for one, row in evaluated:
            if row.chosen_aligned:
                _export_merged(study, one, row)
        result.save(study.folder / "results.json")
        write_report(result, study.folder / "report.html")
    return result


def _result(study: Study, merges: list[MergeScore], responses: list[Interference], command: str) -> StudyResult:
    recipe, tasks = study.recipe, study.tasks
    first = next(iter(study.statistics["train"].values()))[1]
    return StudyResult(
        name=recipe.name,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=command,
        base=recipe.base,
        base_sha256=stages.read_statistics(first).fingerprint,
        content_sha256=hashlib.sha256("".join(task.digest() for task in tasks.values()).encode()).hexdigest(),
        versions={"python": platform.python_version(), **{name: version(name) for name in _VERSIONS_OF}},
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, torch on {_device()}",
        seeds=recipe.seeds,
        recipe=recipe.model_dump(mode="json"),
        inits=[_init_facts(study, name) for name in recipe.inits],
        tasks=[_task_facts(task) for task in tasks.values()],
        singles=[
            SingleScore(init=one.init, seed=one.seed, task=task, score=_single(path, "test"))
            for one in study.trained
            for task, path in one.singles.items()
        ],
        merges=merges,
        interference=responses,
        seconds=study.store.seconds(),
        notes=_notes(study),
    )


def _merge_scores(study: Study, one: Trained, row: Evaluated) -> list[MergeScore]:
    facts, found = merged_facts(row.merged), []
    places: list[tuple[Literal["heldout", "test"], Path, bool]] = []
    places += [("heldout", row.heldout, aligned) for aligned in (False, True)]
    if row.test is not None:
        chosen = ((False, row.chosen_as_trained), (True, row.chosen_aligned))
        places += [("test", row.test, aligned) for aligned, is_chosen in chosen if is_chosen]
    for split, path, aligned in places:
        scores = stages.read_scores(path, aligned)
        alone = average({task: _single(folder, split) for task, folder in one.singles.items()})
        together = average(scores)
        found.append(
            MergeScore(
                init=one.init,
                seed=one.seed,
                scale=row.scale,
                aligned=aligned,
                split=split,
                scale_chosen_with_labels=split == "test" and len(row.settings.scales) > 1,
                scores=scores,
                average=together,
                kept=together.value / alone.value if alone.value else 0.0,
                **facts,
            )
        )
    return found


def _interference(one: Trained, found: dict[str, Any]) -> list[Interference]:
    return [
        Interference(init=one.init, seed=one.seed, tasks=found["tasks"], layers=found["layers"], **table)
        for table in found["tables"]
    ]


def _single(folder: Path, split: str) -> Score:
    return Score(**json.loads((folder / stages.SCORES).read_text(encoding="utf-8"))[split])


def _init_facts(study: Study, name: str) -> InitFacts:
    settings = study.recipe.inits[name]
    read = [
        json.loads((folder / stages.SCORES).read_text(encoding="utf-8"))
        for one in study.trained
        if one.init == name
        for folder in one.starts.values()
    ]
    rows = [one["diagnostics"] for one in read]
    diagnostics = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
    notes = sorted({note for one in read for note in one["notes"]})
    shown = notes[:5] + ([f"and {len(notes) - 5} more such notes in the adapters' loraloom.json"] if notes[5:] else [])
    return InitFacts(
        name=name,
        description=settings.description,
        options=settings.model_dump(exclude={"description"}),
        diagnostics=diagnostics,
        notes=shown,
    )


def _task_facts(task: Task) -> TaskFacts:
    text = " | ".join(str(task.train[0][column]) for column in task.text_columns)
    return TaskFacts(
        name=task.name,
        description=task.description,
        metric=task.metric,
        labels=list(task.labels) if task.labels else None,
        rows={split: len(getattr(task, split)) for split in SPLITS},
        majority=_majority(task),
        sha256=task.digest(),
        example=text if len(text) <= 200 else text[:199] + "…",
    )


def _majority(task: Task) -> float | None:
    if task.labels is None:
        return None
    commonest = int(labels(task, "train").mode().values)
    true = labels(task, "test")
    constant = torch.nn.functional.one_hot(torch.full_like(true, commonest), len(task.labels)).float()
    return metric_value(task.metric, constant, true)


def _notes(study: Study) -> list[str]:
    notes = [
        "Scales were chosen on held-out rows cut from the training rows, with their labels; test rows only report.",
        "Heads were aligned on unlabelled training texts.",
        "Held-out rows chose checkpoints as well as scales; interference was measured on their texts, without labels.",
    ]
    if len(study.recipe.seeds) == 1:
        notes.append("One seed: standard errors cover the choice of rows, not the spread over seeds.")
    return notes


def _export_adapters(study: Study, one: Trained) -> None:
    for task, folder in one.folders.items():
        _copy(folder, study.folder / "adapters" / _with_seed(study, one.init, one.seed) / task)


def _export_merged(study: Study, one: Trained, row: Evaluated) -> None:
    """Write the merged adapter at its chosen scale with the aligned heads beside it."""
    place = study.folder / "merged" / _with_seed(study, one.init, one.seed) / row.settings.rule
    provenance = {
        **read_provenance(row.merged / "adapter"),
        "scale": row.scale,
        "scale_chosen_on": "held-out rows, with labels",
        "heads": "aligned to the merged features on unlabelled training texts",
    }
    if place.is_dir() and read_provenance(place) == provenance:
        return
    heads = stages.read_aligned(row.heldout, one.heads)
    card = (row.merged / "adapter" / "README.md").read_text(encoding="utf-8")
    write_adapter(
        read_adapter(row.merged / "adapter").scaled(row.scale),
        place,
        provenance=provenance,
        files={"README.md": card.replace("scale 1", f"scale {row.scale:g}")},
        extra={f"heads/{task}.safetensors": head.tensors for task, head in heads.items()},
    )


def _copy(stage_folder: Path, place: Path) -> None:
    record = (stage_folder / RECORD).read_text(encoding="utf-8")
    if place.is_dir() and (place / RECORD).is_file() and (place / RECORD).read_text(encoding="utf-8") == record:
        return
    with staged_folder(place) as staged:
        shutil.copytree(stage_folder / "adapter", staged, dirs_exist_ok=True)
        shutil.copy2(stage_folder / RECORD, staged / RECORD)


def _with_seed(study: Study, init: str, seed: int) -> str:
    name = init.replace("/", "_").replace(" ", "-")
    return name if len(study.recipe.seeds) == 1 else f"{name}-seed{seed}"


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU with {torch.get_num_threads()} threads"
