"""A task from the user's own rows: files, or a data set on the Hugging Face Hub. `sources` reads them."""

from __future__ import annotations

import reprlib
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Literal

import datasets
from pydantic import Field, model_validator

from loraloom.errors import first_few, raise_problems
from loraloom.tasks.classify import Classify, label_name
from loraloom.tasks.regress import Regress
from loraloom.tasks.sources import Table, check_unicode
from loraloom.tasks.splits import Checked, Row, SplitTask, parted, read_tables
from loraloom.tasks.task import Metric, Task


class FileTask(SplitTask):
    """A task from JSONL, JSON, CSV, TSV or Parquet files, or `org/name` on the hub."""

    source: Literal["files"] = "files"
    text: list[str] = Field(min_length=1, max_length=2, description="one or two text columns")
    label: str = Field("label", description="label column")
    labels: list[str] | None = Field(
        None, description="label values in order, for which 0, 1, ... may stand in rows; sorted where absent"
    )
    metric: Metric | None = Field(None, description="accuracy, or pearson_spearman for regression, where absent")
    regression: bool = Field(False, description="labels are numbers")

    @model_validator(mode="after")
    def _fit(self) -> FileTask:
        problems = []
        kind = Regress if self.regression else Classify
        if len({*self.text, self.label}) <= len(self.text):
            problems.append(f"text: {self.text} and label {self.label!r} must be different columns")
        if self.regression and self.labels is not None:
            problems.append("labels: regression has none: leave out one of the two")
        if self.labels is not None and len(set(map(label_name, self.labels))) < len(self.labels):
            problems.append(f"labels: the same name twice in {self.labels}")
        if self.metric is not None and self.metric not in kind.metrics:
            problems.append(f"metric: {self.metric} does not fit {kind.words}")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def file_task(name: str, options: FileTask, *, seed: int = 0) -> Task:
    """Read a task from files or from the Hub.

    name: of the task.
    options: where its rows are, which columns, what metric, how many; see `FileTask`.
    seed: of the shuffle that draws rows.

    Leak-free: a training (or given held-out) row whose texts are exactly those of a row of `test` is dropped and
    counted in `Task.source["overlap"]`. Without `heldout`, `heldout_rows` rows are cut from the training rows, spread
    evenly over the labels, never from `test`. A training row that repeats the texts of a held-out row is dropped and
    counted in `Task.source["repeats"]`. `train_rows`, `heldout_rows` and `test_rows` keep the first rows of a shuffle
    with `seed`, so a smaller sample is the start of a larger one and held-out rows do not depend on `train_rows`.
    Rows without text that `empty: drop` leaves out are counted in `Task.source["empty"]`.

    Raises LoraloomError telling all faults at once, each with its file, column and rows (counted from 1, without
    header and blank lines).
    """
    wanted = (*options.text, options.label)
    tables, problems = read_tables(options, wanted, lambda table: wanted)
    kind, faults = _kind(tables, options)
    problems += faults
    checked = {split: _checked(table, options, kind) for split, table in tables.items()}
    problems += [problem for one in checked.values() for problem in one.problems]
    parts, dropped, faults = parted(checked, options, seed)
    problems += faults
    if not options.regression and not problems and len({row["label"] for row in parts["train"]}) == 1:
        problems.append(
            f"{options.train}: {options.label}: all training rows left have one label: ask for more train_rows"
        )
    without_text = any(": empty text: " in problem or ": null text: " in problem for problem in problems)
    hint = "`empty: drop` in the recipe leaves rows without text out" if without_text else ""
    raise_problems(f"task {name!r}", problems, hint)
    features = _features(options, kind)
    return Task(
        name=name,
        labels=kind.labels if isinstance(kind, Classify) else None,
        metric=options.metric or kind.metrics[0],
        description=options.description,
        source={
            **{split: getattr(options, split) for split in options.asked},
            "text": options.text,
            "label": options.label,
            "seed": seed,
            "empty": sum(one.empty for one in checked.values()),
            **dropped,
        },
        **{split: datasets.Dataset.from_list(part, features=features) for split, part in parts.items()},
    )


def _features(options: FileTask, kind: Classify | Regress) -> datasets.Features:
    columns = {column: datasets.Value("string") for column in ("text_a", "text_b")[: len(options.text)]}
    return datasets.Features({**columns, "label": datasets.Value(kind.column)})


def _kind(tables: Mapping[str, Table], options: FileTask) -> tuple[Classify | Regress, list[str]]:
    """Return the task's kind, and what is wrong with its labels or metric.

    Classes are those of the training rows or, where these cannot be used, of the next table there is.
    """
    if options.regression:
        return Regress(), []
    table = next(iter(tables.values()), None)
    values = [row.get(options.label) for row in table.rows] if table else []
    kind, faults = Classify.of_rows(values, options.labels)
    problems = [f"{options.train}: {options.label}: {fault}" for fault in faults if "train" in tables]
    return kind, problems + (kind.metric_problems(options.metric) if options.metric else [])


def _checked(table: Table, options: FileTask, kind: Classify | Regress) -> Checked:
    """Check every row; faults are gathered by column and kind."""
    faults: dict[tuple[str, str], list[str]] = defaultdict(list)
    rows: list[Row] = []
    empty = 0
    names = dict(zip(("text_a", "text_b"), options.text, strict=False))
    for number, row in enumerate(table.rows, start=1):
        if options.empty == "drop" and any(_is_empty(row.get(column)) for column in options.text):
            empty += 1
            continue
        found: Row = {}
        for name, column in {**names, "label": options.label}.items():
            try:
                found[name] = kind.read(row.get(column)) if name == "label" else _text(row.get(column))
            except ValueError as error:
                faults[column, str(error)].append(f"row {number} ({reprlib.repr(row.get(column))})")
                found[name] = 0 if name == "label" else ""  # so that no split is told to be short of it
        rows.append(found)
    problems = [f"{table.source}: {column}: {what}: {first_few(where)}" for (column, what), where in faults.items()]
    return Checked(rows, problems, empty)


def _text(value: Any) -> str:
    if value is None:
        raise ValueError("null text")
    if not isinstance(value, str):
        raise ValueError("not a text")
    if _is_empty(value):
        raise ValueError("empty text")
    check_unicode(value)
    return value


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())
