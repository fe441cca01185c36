"""Eight tasks of GLUE (Wang et al. 2018, arXiv:1804.07461), from a folder or the Hub."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from loraloom.errors import LoraloomError, did_you_mean, raise_problems
from loraloom.tasks.files import FileTask, file_task
from loraloom.tasks.generate import Generate
from loraloom.tasks.prompts import prompt_rows
from loraloom.tasks.splits import Row, leak_free
from loraloom.tasks.task import Metric, Task, TaskOptions

_ANSWER_TOKENS = 8  # a word or a number


@dataclass(frozen=True)
class _Facts:
    """Columns on the Hub, labels in the order of their integers (None: a score), metric as GLUE reports it.

    asked: the question of a prompt, before the texts. words: the labels as answers to it, in the same order.
    """

    text: tuple[str, ...]
    labels: tuple[str, ...] | None
    metric: Metric
    description: str
    asked: str
    words: tuple[str, ...] = ("no", "yes")
    dev: str = "validation"


_ENTAILMENT = ("entailment", "not_entailment")

GLUE = {
    "cola": _Facts(
        ("sentence",),
        ("unacceptable", "acceptable"),
        "matthews",
        "CoLA: is the sentence acceptable English?",
        "Is this sentence acceptable English, yes or no?",
    ),
    "sst2": _Facts(
        ("sentence",),
        ("negative", "positive"),
        "accuracy",
        "SST-2: does the review like the film?",
        "Is this review positive or negative?",
        ("negative", "positive"),
    ),
    "mrpc": _Facts(
        ("sentence1", "sentence2"),
        ("not_equivalent", "equivalent"),
        "accuracy_f1",
        "MRPC: do two sentences from the news say the same?",
        "Do these sentences say the same, yes or no?",
    ),
    "qqp": _Facts(
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        "accuracy_f1",
        "QQP: do two questions on Quora ask the same?",
        "Do these questions ask the same, yes or no?",
    ),
    "stsb": _Facts(
        ("sentence1", "sentence2"),
        None,
        "pearson_spearman",
        "STS-B: how alike are two sentences, from 0 to 5?",
        "How alike are these sentences, from 0 to 5?",
    ),
    "mnli": _Facts(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        "accuracy",
        "MNLI: does the premise entail the hypothesis, contradict it, or neither?",
        "Does the second text follow from the first: yes, maybe or no?",
        ("yes", "maybe", "no"),
        dev="validation_matched",
    ),
    "qnli": _Facts(
        ("question", "sentence"),
        _ENTAILMENT,
        "accuracy",
        "QNLI: does the sentence hold the answer to the question?",
        "Does the text answer the question, yes or no?",
        ("yes", "no"),
    ),
    "rte": _Facts(
        ("sentence1", "sentence2"),
        _ENTAILMENT,
        "accuracy",
        "RTE: does the first text entail the second?",
        "Does the second text follow from the first, yes or no?",
        ("yes", "no"),
    ),
}


class GlueTask(TaskOptions):
    """One of the eight GLUE tasks, from a folder of JSONL or from the hub."""

    source: Literal["glue"] = "glue"
    path: Path | None = Field(None, description="folder with <task>/{train,dev}.jsonl; the hub's nyu-mll/glue without")
    answers: bool = Field(False, description="asked and answered in words, by a model that writes")
    characters: int | None = Field(None, ge=1, description="with answers: leave out rows whose texts have more")

    system: str | None = Field(None, description="with answers: the system prompt")

    @model_validator(mode="after")
    def _fit(self) -> GlueTask:
        odd = [option for option in ("characters", "system") if getattr(self, option) is not None]
        if odd and not self.answers:
            raise ValueError(f"{' and '.join(odd)}: for `answers: true` alone")
        return self

    def generates(self, name: str) -> bool:
        """Tell whether the task's answers are written."""
        return self.answers


def glue_task(name: str, options: GlueTask, *, seed: int = 0) -> Task:
    """Read one task of `GLUE`; its dev rows become `test`, since GLUE's own test labels are secret.

    name: of the task, a key of `GLUE`.
    options: where its rows are, how many are taken, and whether answers are written.
    seed: by which rows are drawn.

    The path is a folder with `<name>/train.jsonl`, `dev.jsonl` (text_a, perhaps text_b, label) and `meta.json`, whose
    `labels` say what the integers stand for where they are names; its `note` and `licence` are kept in `Task.source`.
    Without it the rows come from nyu-mll/glue on the Hub. Held-out rows are cut from the training rows; sampling and
    leak rules are those of `file_task`.

    With `answers` a row is a prompt, a question and the texts below it or behind it, and an answer: a word for a label,
    a score to the nearest fifth as Raffel et al. 2020 (arXiv:1910.10683) write it. Rows of longer texts than
    `characters` are left out before any are drawn, and counted in `Task.source["long"]`.

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
    if options.answers:
        task = _in_words(file_task(name, _all_rows(rows), seed=seed), rows, options, seed)
    else:
        task = file_task(name, rows, seed=seed)
    return replace(task, source={**task.source, **facts})


def _all_rows(rows: FileTask) -> FileTask:
    return rows.model_copy(update={"train_rows": None, "heldout_rows": 2, "test_rows": None})


def _in_words(task: Task, rows: FileTask, options: GlueTask, seed: int) -> Task:
    """Return of all rows of a task, as prompts and answers, as many as `rows` asks for."""
    given = {"train": [*task.heldout, *task.train], "test": list(task.test)}
    asked = {
        split: [_asked(task, row) for row in found if _fits(row, options.characters)] for split, found in given.items()
    }
    parts, dropped, problems = leak_free(asked, rows, seed)
    long = sum(map(len, given.values())) - sum(map(len, asked.values()))
    hint = f"{long} rows have more than {options.characters} characters" if long else "ask for fewer rows"
    raise_problems(f"task {task.name!r}", problems, hint)
    numbers = task.labels is None
    return Task(
        name=task.name,
        labels=None,
        metric="pearson" if numbers else "exact_match",
        also=("parse_rate",) if numbers else (),
        answering=Generate(_ANSWER_TOKENS),
        description=task.description,
        source={**task.source, **{why: count + task.source[why] for why, count in dropped.items()}, "long": long},
        **{split: prompt_rows(part, system=options.system) for split, part in parts.items()},
    )


def _fits(row: Row, characters: int | None) -> bool:
    return characters is None or len(row["text_a"]) + len(row.get("text_b", "")) <= characters


def _asked(task: Task, row: Row) -> Row:
    """Return prompt and answer. One text stands behind the question, two below it."""
    glue = GLUE[task.name]
    texts = [row[column].strip() for column in task.text_columns]
    prompt = f"{glue.asked} {texts[0]}" if len(texts) == 1 else "\n".join([glue.asked, *texts])
    if task.labels is None or glue.labels is None:
        return {"text_a": prompt, "label": f"{round(row['label'] * 5) / 5:.1f}"}
    return {"text_a": prompt, "label": glue.words[glue.labels.index(task.labels[row["label"]])]}


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
