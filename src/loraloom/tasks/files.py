"""A task from the user's own rows: files, or a data set on the Hugging Face Hub. `sources` reads them."""

from __future__ import annotations

import difflib
import itertools
import random
import reprlib
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import datasets
from pydantic import Field, model_validator

from loraloom.errors import did_you_mean, first_few, raise_problems
from loraloom.tasks.classify import Classify, label_name
from loraloom.tasks.regress import Regress
from loraloom.tasks.sources import Table, check_unicode, read_table
from loraloom.tasks.task import Metric, Task, TaskKind, TaskOptions

_Row = dict[str, Any]  # text_a, perhaps text_b, label

_SHOWN_COLUMNS, _SHOWN = 20, 100  # columns of a file, and characters of a name, in messages


class FileTask(TaskOptions):
    """A task from JSONL, JSON, CSV, TSV or Parquet files, or `org/name` on the hub."""

    source: Literal["files"] = "files"
    train: str = Field(description="a file, or a data set on the hub: org/name, org/name:config#split")
    test: str
    heldout: str | None = Field(None, description="cut from the training rows where absent")
    text: list[str] = Field(min_length=1, max_length=2, description="one or two text columns")
    label: str = Field("label", description="label column")
    labels: list[str] | None = Field(
        None, description="label values in order, for which 0, 1, ... may stand in rows; sorted where absent"
    )
    metric: Metric | None = Field(None, description="accuracy, or pearson_spearman for regression, where absent")
    regression: bool = Field(False, description="labels are numbers")
    empty: Literal["refuse", "drop"] = Field(
        "refuse", description="what a row without text does: the file is refused, or the row left out and counted"
    )
    description: str = ""

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

    @property
    def sources(self) -> dict[str, str]:
        """Return what is read, by split."""
        named = {"train": self.train, "heldout": self.heldout, "test": self.test}
        return {split: source for split, source in named.items() if source is not None}

    @property
    def asked(self) -> dict[str, int | None]:
        """Return how many rows are wanted, by split; None for all."""
        return {"train": self.train_rows, "heldout": self.heldout_rows, "test": self.test_rows}


def file_task(name: str, options: FileTask, *, seed: int = 0) -> Task:
    """Read a task from files or from the Hub.

    Leak-free: a training (or given held-out) row whose texts are exactly those of a row of `test` is dropped and
    counted in `Task.source["overlap"]`. Without `heldout`, `heldout_rows` rows are cut from the training rows, spread
    evenly over the labels, never from `test`. A training row that repeats the texts of a held-out row is dropped and
    counted in `Task.source["repeats"]`. `train_rows`, `heldout_rows` and `test_rows` keep the first rows of a shuffle
    with `seed`, so a smaller sample is the start of a larger one and held-out rows do not depend on `train_rows`.
    Rows without text that `empty: drop` leaves out are counted in `Task.source["empty"]`.

    Raises LoraloomError telling all faults at once, each with its file, column and rows (counted from 1, without
    header and blank lines).
    """
    tables, problems = _tables(options)
    kind, faults = _kind(tables, options)
    problems += faults
    checked = {split: _checked(table, options, kind) for split, table in tables.items()}
    problems += [problem for one in checked.values() for problem in one.problems]
    parts: dict[str, list[_Row]] = {}
    dropped: dict[str, int] = {}
    if len(checked) == len(options.sources):  # a split is missing, and that has been told
        rows = {split: one.rows for split, one in checked.items()}
        parts, dropped, faults = _leak_free(rows, options, seed)
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


def _features(options: FileTask, kind: TaskKind) -> datasets.Features:
    columns = {column: datasets.Value("string") for column in ("text_a", "text_b")[: len(options.text)]}
    return datasets.Features({**columns, "label": datasets.Value(kind.column)})


def _tables(options: FileTask) -> tuple[dict[str, Table], list[str]]:
    """Return the table of every split that can be used, and why the others cannot."""
    tables, problems = {}, []
    wanted = (*options.text, options.label)
    for split, source in options.sources.items():
        try:
            table = read_table(source, split, wanted)
        except ValueError as error:
            problems.append(f"{source}: {error}")
            continue
        missing = [column for column in dict.fromkeys(wanted) if column not in table.columns]
        if not table.columns or not (missing or table.rows):
            problems.append(f"{source}: no rows")
        elif missing:
            problems += [f"{source}: no column {column!r}: {_nearest(column, table)}" for column in missing]
        else:
            tables[split] = table
    return tables, problems


def _nearest(column: str, table: Table) -> str:
    names = [name[:_SHOWN] for name in itertools.islice(table.columns, 1000)]
    return did_you_mean(column, difflib.get_close_matches(column, names) or names[:_SHOWN_COLUMNS])


def _kind(tables: Mapping[str, Table], options: FileTask) -> tuple[TaskKind, list[str]]:
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


class _Checked(NamedTuple):
    """The rows of a table, what is wrong with any, and how many `empty` ones were left out."""

    rows: list[_Row]
    problems: list[str]
    empty: int


def _checked(table: Table, options: FileTask, kind: TaskKind) -> _Checked:
    """Check every row; faults are gathered by column and kind."""
    faults: dict[tuple[str, str], list[str]] = defaultdict(list)
    rows: list[_Row] = []
    empty = 0
    names = dict(zip(("text_a", "text_b"), options.text, strict=False))
    for number, row in enumerate(table.rows, start=1):
        if options.empty == "drop" and any(_is_empty(row.get(column)) for column in options.text):
            empty += 1
            continue
        found: _Row = {}
        for name, column in {**names, "label": options.label}.items():
            try:
                found[name] = kind.read(row.get(column)) if name == "label" else _text(row.get(column))
            except ValueError as error:
                faults[column, str(error)].append(f"row {number} ({reprlib.repr(row.get(column))})")
                found[name] = 0 if name == "label" else ""  # so that no split is told to be short of it
        rows.append(found)
    problems = [f"{table.source}: {column}: {what}: {first_few(where)}" for (column, what), where in faults.items()]
    return _Checked(rows, problems, empty)


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


# Splitting.


def _leak_free(
    rows: Mapping[str, list[_Row]], options: FileTask, seed: int
) -> tuple[dict[str, list[_Row]], dict[str, int], list[str]]:
    """Return the three splits, no text of one in another; how many rows were dropped for that; and which are short."""
    asked = options.asked
    train, held_in_test = _without(rows["train"], rows["test"])
    if "heldout" in rows:
        heldout, more = _without(rows["heldout"], rows["test"])
        held_in_test += more
    else:
        heldout = _spread(train, options.heldout_rows, seed)
        chosen = set(map(id, heldout))
        train = [row for row in train if id(row) not in chosen]
    train, repeats = _without(train, heldout)
    splits = {"train": train, "heldout": heldout, "test": rows["test"]}
    cut = 0 if "heldout" in rows else len(heldout)
    lost = {
        "train": f" ({held_in_test} are in test, {cut} cut for heldout, {repeats} repeat heldout)",
        "heldout": f" ({held_in_test} are in test)",
        "test": "",
    }
    problems = []
    for split, part in splits.items():
        if len(part) < (asked[split] or 1):
            origin = split if split in rows else "train"
            wanted = asked[split] or "at least 1"
            there = f"{len(part)} left of {len(rows[origin])}{lost[split]}"
            problems.append(f"{options.sources[origin]}: {split}_rows: {wanted} asked for, {there}")
    drawn = {split: _draw(part, asked[split], seed) for split, part in splits.items()}
    return drawn, {"overlap": held_in_test, "repeats": repeats}, problems


def _texts(row: _Row) -> tuple[str, str | None]:
    return row["text_a"], row.get("text_b")


def _without(rows: list[_Row], seen: list[_Row]) -> tuple[list[_Row], int]:
    known = set(map(_texts, seen))
    kept = [row for row in rows if _texts(row) not in known]
    return kept, len(rows) - len(kept)


def _draw(rows: list[_Row], count: int | None, seed: int) -> list[_Row]:
    return random.Random(seed).sample(rows, len(rows))[:count]


def _spread(rows: list[_Row], count: int, seed: int) -> list[_Row]:
    """Draw `count` rows at even steps through the shuffled rows sorted by label: each label within one of its share."""
    ordered = sorted(_draw(rows, None, seed), key=lambda row: float(row["label"]))
    count = min(count, len(rows))
    return [ordered[(2 * step + 1) * len(rows) // (2 * count)] for step in range(count)]
