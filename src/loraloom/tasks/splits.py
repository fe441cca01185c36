"""Train, held-out and test rows from files or data sets on the Hub: read, drawn, no text of one in another."""

from __future__ import annotations

import difflib
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import Field

from loraloom.errors import did_you_mean
from loraloom.tasks.sources import Table, read_table
from loraloom.tasks.task import TaskOptions

Row = dict[str, Any]  # of a task: its texts, and its label

_SHOWN_COLUMNS, _SHOWN = 20, 100  # columns of a file, and characters of a name, in messages


class SplitTask(TaskOptions):
    """What every task of rows from JSONL, JSON, CSV, TSV or Parquet files, or from the hub, takes."""

    train: str = Field(description="a file, or a data set on the hub: org/name, org/name:config#split")
    test: str
    heldout: str | None = Field(None, description="cut from the training rows where absent")
    empty: Literal["refuse", "drop"] = Field(
        "refuse", description="what a row without text does: the file is refused, or the row left out and counted"
    )
    description: str = ""

    @property
    def sources(self) -> dict[str, str]:
        """Return what is read, by split."""
        named = {"train": self.train, "heldout": self.heldout, "test": self.test}
        return {split: source for split, source in named.items() if source is not None}

    @property
    def asked(self) -> dict[str, int | None]:
        """Return how many rows are wanted, by split; None for all."""
        return {"train": self.train_rows, "heldout": self.heldout_rows, "test": self.test_rows}


class Checked(NamedTuple):
    """The rows of a table, what is wrong with any, and how many `empty` ones were left out."""

    rows: list[Row]
    problems: list[str]
    empty: int


def read_tables(
    options: SplitTask, wanted: Sequence[str], needed: Callable[[Table], Sequence[str]]
) -> tuple[dict[str, Table], list[str]]:
    """Return the table of every split that can be used, and why the others cannot.

    wanted: the columns that are read where they are there. needed: tells which of them a table must have.
    """
    tables, problems = {}, []
    for split, source in options.sources.items():
        try:
            table = read_table(source, split, wanted)
        except ValueError as error:
            problems.append(f"{source}: {error}")
            continue
        missing = [column for column in dict.fromkeys(needed(table)) if column not in table.columns]
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


def parted(
    checked: Mapping[str, Checked], options: SplitTask, seed: int
) -> tuple[dict[str, list[Row]], dict[str, int], list[str]]:
    """Return what `leak_free` does of checked tables; nothing where a split is missing, which has been told."""
    if len(checked) < len(options.sources):
        return {}, {}, []
    return leak_free({split: one.rows for split, one in checked.items()}, options, seed)


def leak_free(
    rows: Mapping[str, list[Row]], options: SplitTask, seed: int
) -> tuple[dict[str, list[Row]], dict[str, int], list[str]]:
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


def _texts(row: Row) -> tuple[str, ...]:
    """Return what a row is asked by: all but its label."""
    return tuple(str(value) for column, value in row.items() if column != "label")


def _without(rows: list[Row], seen: list[Row]) -> tuple[list[Row], int]:
    known = set(map(_texts, seen))
    kept = [row for row in rows if _texts(row) not in known]
    return kept, len(rows) - len(kept)


def _draw(rows: list[Row], count: int | None, seed: int) -> list[Row]:
    return random.Random(seed).sample(rows, len(rows))[:count]


def _spread(rows: list[Row], count: int, seed: int) -> list[Row]:
    """Draw `count` rows at even steps through the shuffled rows sorted by label: each label within one of its share."""
    ordered = sorted(_draw(rows, None, seed), key=lambda row: row["label"])
    count = min(count, len(rows))
    return [ordered[(2 * step + 1) * len(rows) // (2 * count)] for step in range(count)]
