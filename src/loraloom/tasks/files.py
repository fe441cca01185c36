"""A task from the user's own rows: files, or a data set on the Hugging Face Hub. `sources` reads them."""

from __future__ import annotations

import math
import random
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import datasets

from loraloom.errors import did_you_mean, raise_problems
from loraloom.tasks.sources import Table, first_few, read_table
from loraloom.tasks.task import Metric, Task

_Row = dict[str, Any]


def file_task(
    name: str,
    *,
    train: str,
    test: str,
    heldout: str | None = None,
    text: Sequence[str],
    label: str,
    labels: Sequence[str] | None = None,
    metric: Metric | None = None,
    regression: bool = False,
    train_rows: int | None = None,
    heldout_rows: int = 200,
    test_rows: int | None = None,
    seed: int = 0,
    description: str = "",
) -> Task:
    """Read a task from files or from the Hub.

    `train`, `test` and `heldout` each name a file (.jsonl, .json, .csv, .tsv, .parquet) or a data set on the Hub,
    `org/name:config#split`, as in "nyu-mll/glue:sst2#train"; `:config` and `#split` may be left out (the split is then
    train, test or validation).

    `text` names one or two text columns, `label` the label column. Labels are strings or numbers, shown as strings;
    `labels` gives their order (else: the training labels in natural order, 2 before 10). Where no name in `labels` is a
    number, the numbers 0, 1, ... stand for its places. With `regression`, labels are finite numbers and `labels` is
    None. `metric` is accuracy for classes and pearson_spearman for regression unless given.

    Leak-free: a training (or given held-out) row whose texts are exactly those of a row of `test` is dropped and
    counted in `Task.source["overlap"]`. Without `heldout`, `heldout_rows` rows are cut from the training rows, spread
    evenly over the labels, never from `test`. A training row that repeats the texts of a held-out row is dropped and
    counted in `Task.source["repeats"]`. `train_rows`, `heldout_rows` and `test_rows` keep the first rows of a shuffle
    with `seed`, so a smaller sample is the start of a larger one and held-out rows do not depend on `train_rows`.

    Raises LoraloomError telling all faults at once, each with its file, column and rows (counted from 1, without
    header and blank lines).
    """
    asked = {"train": train_rows, "heldout": heldout_rows, "test": test_rows}
    problems = _option_problems(labels, metric, regression, asked)
    text_problem = _text_problem(text, label)
    if text_problem:  # without its columns no source can be read
        raise_problems(f"task {name!r}", [*text_problem, *problems])
    sources = {"train": train, "heldout": heldout, "test": test}
    wanted = {split: source for split, source in sources.items() if source is not None}
    read = {split: _read(split, source, (*text, label), problems) for split, source in wanted.items()}
    tables = {split: table for split, table in read.items() if table is not None}
    codes = None if regression else _codes(tables, label, labels, problems)
    if codes is not None and metric == "accuracy_f1" and len(codes.names) != 2:
        problems.append(f"metric: accuracy_f1 is for two labels, not {len(codes.names)}")
    rows = {split: _checked_rows(table, text, label, codes, problems) for split, table in tables.items()}
    splits: dict[str, list[_Row]] = {}
    dropped: dict[str, int] = {}
    if len(rows) == len(wanted):
        splits, dropped = _leak_free_splits(rows, wanted, asked, seed, problems)
        if not regression and not problems and len({row["label"] for row in splits["train"]}) == 1:
            problems.append(f"{train}: {label}: all training rows left have one label: ask for more train_rows")
    raise_problems(f"task {name!r}", problems)
    features = _features(len(text), regression)
    return Task(
        name=name,
        labels=None if codes is None else tuple(codes.names),
        metric=metric or ("pearson_spearman" if regression else "accuracy"),
        description=description,
        source={**sources, "text": list(text), "label": label, "seed": seed, **dropped},
        **{split: datasets.Dataset.from_list(part, features=features) for split, part in splits.items()},
    )


def _text_problem(text: Sequence[str], label: str) -> list[str]:
    if isinstance(text, str) or len(text) not in (1, 2):
        return [f"text: {text!r} must be a list of one or two column names"]
    if len({*text, label}) <= len(text):
        return [f"text: {list(text)} and label {label!r} must be different columns"]
    return []


def _option_problems(
    labels: Sequence[str] | None, metric: Metric | None, regression: bool, asked: Mapping[str, int | None]
) -> list[str]:
    problems = []
    if regression and labels is not None:
        problems.append("labels: regression has none: leave out one of the two")
    if labels is not None and len(set(map(_shown, labels))) < len(labels):
        problems.append(f"labels: the same name twice in {list(labels)}")
    if metric is not None and regression != (metric == "pearson_spearman"):
        problems.append(f"metric: {metric} does not fit {'regression' if regression else 'classes'}")
    short = [
        f"{split}_rows: {count} must be at least 1" for split, count in asked.items() if count is not None and count < 1
    ]
    return problems + short


def _features(texts: int, regression: bool) -> datasets.Features:
    columns = {column: datasets.Value("string") for column in ("text_a", "text_b")[:texts]}
    return datasets.Features({**columns, "label": datasets.Value("float64" if regression else "int64")})


def _read(split: str, source: str, wanted: Sequence[str], problems: list[str]) -> Table | None:
    """Return the rows of `source`, or None after adding to `problems` why they cannot be used."""
    try:
        table = read_table(source, split, wanted)
    except ValueError as error:
        problems.append(f"{source}: {error}")
        return None
    missing = [column for column in dict.fromkeys(wanted) if column not in table.columns]
    if not table.columns or not (missing or table.rows):
        problems.append(f"{source}: no rows")
        return None
    problems.extend(f"{source}: no column {column!r}: {did_you_mean(column, table.columns)}" for column in missing)
    return None if missing else table


# Checking: labels become indices or floats; faults are gathered by file, column and kind.


class _Codes(NamedTuple):
    """Label names in order, and the index of everything a row may write for one."""

    names: list[str]
    places: dict[str, int]


def _codes(tables: Mapping[str, Table], label: str, labels: Sequence[str] | None, problems: list[str]) -> _Codes:
    """Return the labels, given or found in the training rows (or, where those are unreadable, in the next table)."""
    table = next(iter(tables.values()), None)
    values = [] if table is None else [row.get(label) for row in table.rows]
    found = {_shown(value) for value in values if not _is_null(value)}
    names = [_shown(name) for name in labels] if labels is not None else sorted(found, key=_natural)
    places = {name: place for place, name in enumerate(names)}
    if labels is not None and not any(name.isdecimal() for name in names):
        places |= {str(place): place for place in range(len(names))}
    if "train" in tables:
        where = f"{tables['train'].source}: {label}"
        fractions = [name for name in names if labels is None and re.fullmatch(r"-?\d*\.\d+", name)]
        seen = {places.get(shown) for shown in found}
        absent = [name for name in names if places[name] not in seen]
        if fractions:
            problems.append(
                f"{where}: {first_few(fractions)} are scores, not classes: set regression, or list the labels"
            )
        elif absent:
            problems.append(f"{where}: no training row has the label {first_few(absent)}")
        elif len(names) < 2:
            problems.append(f"{where}: one class alone ({first_few(names) or 'none'}): a task needs two or more")
    return _Codes(names, places)


def _checked_rows(
    table: Table, text: Sequence[str], label: str, codes: _Codes | None, problems: list[str]
) -> list[_Row]:
    """Return rows with text_a, text_b and label; a faulty field is told in `problems` and stands as "" or 0."""
    faults: dict[tuple[str, str], list[str]] = defaultdict(list)

    def checked(number: int, column: str, value: Any, check: Callable[[Any], Any], stand_in: Any) -> Any:
        try:
            return check(value)
        except ValueError as error:
            faults[column, str(error)].append(f"row {number} ({_short(value)})")
            return stand_in

    def check_label(value: Any) -> int | float:
        return _number(value) if codes is None else _class(value, codes)

    rows = []
    for number, row in enumerate(table.rows, start=1):
        texts = (checked(number, column, row.get(column), _text, "") for column in text)
        checked_row = dict(zip(("text_a", "text_b"), texts, strict=False))
        rows.append({**checked_row, "label": checked(number, label, row.get(label), check_label, 0)})
    problems.extend(f"{table.source}: {column}: {kind}: {first_few(where)}" for (column, kind), where in faults.items())
    return rows


def _text(value: Any) -> str:
    if value is None:
        raise ValueError("null text")
    if not isinstance(value, str):
        raise ValueError("not a text")
    if not value.strip():
        raise ValueError("empty text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair, which is no Unicode text") from None
    return value


def _number(value: Any) -> float:
    if _is_null(value):
        raise ValueError("null label")
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("not a finite number")
    return number


def _class(value: Any, codes: _Codes) -> int:
    if _is_null(value):
        raise ValueError("null label")
    if not isinstance(value, (str, int, float)):
        raise ValueError("neither a string nor a number")
    if _shown(value) not in codes.places:
        raise ValueError(f"unknown label (known: {', '.join(codes.names[:20])})")
    return codes.places[_shown(value)]


def _is_null(value: Any) -> bool:
    return value is None or str(value).strip().lower() in ("", "nan")


def _shown(value: Any) -> str:
    """Return a label as a string; whole floats as integers, since a column with a gap turns 1 into 1.0."""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", str(value).strip())


def _natural(name: str) -> tuple[Any, ...]:
    if re.fullmatch(r"-?\d+(\.\d+)?", name):
        return (0, float(name), name)
    return (1, [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)], name)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."


# Splitting.


def _leak_free_splits(
    rows: Mapping[str, list[_Row]],
    sources: Mapping[str, str],
    asked: Mapping[str, int | None],
    seed: int,
    problems: list[str],
) -> tuple[dict[str, list[_Row]], dict[str, int]]:
    """Return the three splits, no text of one in another, and how many rows were dropped for that."""
    train, held_in_test = _without(rows["train"], rows["test"])
    if "heldout" in rows:
        heldout, more = _without(rows["heldout"], rows["test"])
        held_in_test += more
    else:
        heldout = _spread(train, asked["heldout"] or 1, seed)
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
    for split, part in splits.items():
        if len(part) < (asked[split] or 1):
            origin = split if split in rows else "train"
            wanted = asked[split] or "at least 1"
            there = f"{len(part)} left of {len(rows[origin])}{lost[split]}"
            problems.append(f"{sources[origin]}: {split}_rows: {wanted} asked for, {there}")
    drawn = {split: _draw(part, asked[split], seed) for split, part in splits.items()}
    return drawn, {"overlap": held_in_test, "repeats": repeats}


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
