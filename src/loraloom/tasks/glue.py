"""Eight tasks of GLUE (Wang et al. 2018, arXiv:1804.07461), from a folder or the Hub."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from loraloom.errors import LoraloomError, did_you_mean
from loraloom.tasks.files import FileTask, file_task
from loraloom.tasks.task import Metric, Task, TaskOptions


@dataclass(frozen=True)
class _Facts:
    """Columns on the Hub, labels in the order of their integers (None: a score), metric as GLUE reports it."""

    text: tuple[str, ...]
    labels: tuple[str, ...] | None
    metric: Metric
    description: str
    dev: str = "validation"


_ENTAILMENT = ("entailment", "not_entailment")

GLUE = {
    "cola": _Facts(
        ("sentence",), ("unacceptable", "acceptable"), "matthews", "CoLA: is the sentence acceptable English?"
    ),
    "sst2": _Facts(("sentence",), ("negative", "positive"), "accuracy", "SST-2: does the review like the film?"),
    "mrpc": _Facts(
        ("sentence1", "sentence2"),
        ("not_equivalent", "equivalent"),
        "accuracy_f1",
        "MRPC: do two sentences from the news say the same?",
    ),
    "qqp": _Facts(
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        "accuracy_f1",
        "QQP: do two questions on Quora ask the same?",
    ),
    "stsb": _Facts(
        ("sentence1", "sentence2"), None, "pearson_spearman", "STS-B: how alike are two sentences, from 0 to 5?"
    ),
    "mnli": _Facts(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        "accuracy",
        "MNLI: does the premise entail the hypothesis, contradict it, or neither?",
        dev="validation_matched",
    ),
    "qnli": _Facts(
        ("question", "sentence"), _ENTAILMENT, "accuracy", "QNLI: does the sentence hold the answer to the question?"
    ),
    "rte": _Facts(("sentence1", "sentence2"), _ENTAILMENT, "accuracy", "RTE: does the first text entail the second?"),
}


class GlueTask(TaskOptions):
    """One of the eight GLUE tasks, from a folder of JSONL or from the hub."""

    source: Literal["glue"] = "glue"
    path: Path | None = Field(None, description="folder with <task>/{train,dev}.jsonl; the hub's nyu-mll/glue without")


def glue_task(name: str, options: GlueTask, *, seed: int = 0) -> Task:
    """Read one task of `GLUE`; its dev rows become `test`, since GLUE's own test labels are secret.

    The path is a folder with `<name>/train.jsonl`, `dev.jsonl` (text_a, perhaps text_b, label) and `meta.json`, whose
    `labels` say what the integers stand for where they are names; its `note` and `licence` are kept in `Task.source`.
    Without it the rows come from nyu-mll/glue on the Hub. Held-out rows are cut from the training rows; sampling and
    leak rules are those of `file_task`.

    Raises LoraloomError for an unknown name, and for what `file_task` finds wrong.
    """
    if name not in GLUE:
        raise LoraloomError(f"glue: no task {name!r}", did_you_mean(name.lower(), GLUE))
    glue = GLUE[name]
    labels, facts = glue.labels, {}
    train, test, text = f"nyu-mll/glue:{name}#train", f"nyu-mll/glue:{name}#{glue.dev}", glue.text
    if options.path is not None:
        folder = options.path / name
        meta = _read_meta(folder)
        labels = _label_order(folder / "meta.json", meta.get("labels"), glue.labels)
        facts = {key: meta[key] for key in ("note", "licence") if meta.get(key)}
        train, test, text = str(folder / "train.jsonl"), str(folder / "dev.jsonl"), ("text_a", "text_b")[: len(text)]
    rows = FileTask(
        train=train,
        test=test,
        text=list(text),
        labels=None if labels is None else list(labels),
        metric=glue.metric,
        regression=labels is None,
        description=glue.description,
        **options.model_dump(include=set(TaskOptions.model_fields)),
    )
    task = file_task(name, rows, seed=seed)
    return replace(task, source={**task.source, **facts})


def _read_meta(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        known = [task for task in GLUE if (folder.parent / task).is_dir()]
        hint = f"it holds {', '.join(known)}" if known else "it holds no GLUE task: check path"
        raise LoraloomError(f"{folder}: no such folder in {folder.parent}", hint)
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoraloomError(f"{path}: cannot be read: {error}", "write it: an object with the key labels") from error
    if not isinstance(meta, dict):
        raise LoraloomError(f"{path}: must be an object with the key labels")
    return meta


def _label_order(path: Path, found: Any, known: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Return the names in the order of the folder's integers: that of meta.json where it gives GLUE's names."""
    if found is None or known is None:
        if found != known:
            raise LoraloomError(f"{path}: labels: {found}, where GLUE has {known}", "check that this is the right task")
        return None
    if not isinstance(found, list) or len(found) != len(known):
        raise LoraloomError(f"{path}: labels: {found}, where GLUE has {list(known)}", "list as many, in order")
    return tuple(found) if sorted(map(str, found)) == sorted(known) else known
