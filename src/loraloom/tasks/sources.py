"""Where rows come from: JSONL, JSON, CSV, TSV and Parquet files, and data sets on the Hugging Face Hub.

Text formats are read with the standard library, so a text arrives exactly as written: the `datasets` JSON builder turns
the text "2020-01-01" into "2020-01-01 00:00:00", its CSV builder "007" into 7.0 and "NA" into null, and neither names
the line it stops at. Parquet and the Hub, whose columns have types, are read with `datasets`.
"""

from __future__ import annotations

import csv
import difflib
import json
import re
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from loraloom.errors import did_you_mean, reads_file

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_HUB = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w.-]+)(:(?P<config>[\w.-]+))?(#(?P<split>[\w.-]+))?")
_HUB_SPLITS = {"train": "train", "heldout": "validation", "test": "test"}


class Table(NamedTuple):
    """Rows of one source; a cell that a row lacks is absent or None."""

    source: str
    columns: Collection[str]
    rows: list[dict[str, Any]]


class HubName(NamedTuple):
    """A data set on the Hub, written `org/name`, `org/name:config`, `org/name#split` or `org/name:config#split`."""

    repo: str
    config: str | None
    split: str


def hub_name(source: str, split: str) -> HubName | None:
    """Return what `source` names on the Hub, or None where it names a file.

    A source that ends in one of SUFFIXES, or lies in a folder that is here, is a file. `split` is "train", "heldout" or
    "test": without `#split` these are the Hub's train, validation and test.
    """
    match = _HUB.fullmatch(source)
    path = Path(source)
    if match is None or path.suffix.lower() in SUFFIXES or path.parent.is_dir():
        return None
    return HubName(match["repo"], match["config"], match["split"] or _HUB_SPLITS[split])


@reads_file
def read_table(source: str, split: str, wanted: Sequence[str]) -> Table:
    """Read the rows of a file or of a data set on the Hub; of the typed sources, only the `wanted` columns.

    Raises ValueError saying why they cannot be read, with the line or row where there is one.
    """
    hub = hub_name(source, split)
    if hub is not None:
        return _from_dataset(source, _load_hub(hub), wanted)
    path = Path(source).expanduser()
    try:
        _check_path(path)
        if path.suffix.lower() == ".parquet":
            return _from_dataset(source, _load_parquet(path), wanted)
        rows = _read_text(path)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror or error}") from error
    return Table(source, set().union(*rows), rows)


def first_few(items: Sequence[str], count: int = 3) -> str:
    """Return the first `count` of `items` for a message, and how many more there are."""
    more = len(items) - count
    return ", ".join(items[:count]) + (f" and {more} more" if more > 0 else "")


def _check_path(path: Path) -> None:
    if path.is_dir():
        raise ValueError("is a folder: name one file")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"unknown suffix {path.suffix!r}: known: {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ValueError(f"no such file: there is no folder {path.parent}")
    if not path.exists():
        names = [file.name for file in path.parent.iterdir() if file.suffix.lower() in SUFFIXES]
        # The nearest few alone: a folder may hold thousands of files.
        near = difflib.get_close_matches(path.name, names, n=5, cutoff=0.0)
        raise ValueError(f"no such file: {did_you_mean(path.name, near) if near else 'its folder holds no data file'}")


def _read_text(path: Path) -> list[dict[str, Any]]:
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return _read_jsonl(path)
    if suffix == ".json":
        return _read_json(path)
    return _read_csv(path, delimiter="\t" if suffix == ".tsv" else ",")


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                faults.append(f"line {number} is not JSON ({error.msg} at column {error.colno})")
                continue
            if isinstance(row, dict):
                rows.append(row)
            else:
                faults.append(f"line {number} is not an object with columns")
    if faults:
        raise ValueError(first_few(faults))
    return rows


def _read_json(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error}); a file with one object a line is named .jsonl") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("must hold a list of objects, one a row")
    return rows


def _read_csv(path: Path, delimiter: str) -> list[dict[str, Any]]:
    # Strict: a stray quote is an error with its line instead of a row that swallows the rows after it.
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            header = list(reader.fieldnames or [])
            rows: list[dict[str, Any]] = list(reader)
        except csv.Error as error:
            raise ValueError(f"line {reader.reader.line_num}: {error}") from error
    if len(set(header)) < len(header):
        raise ValueError(f"header names a column twice: {', '.join(header)}")
    # DictReader keeps surplus fields under None and fills lacking ones with None.
    uneven = [f"row {i}" for i, row in enumerate(rows, start=1) if None in row or None in row.values()]
    if uneven:
        raise ValueError(f"more or fewer fields than the header's {len(header)} in {first_few(uneven)}")
    return rows


def _load_parquet(path: Path) -> datasets.Dataset:
    with tempfile.TemporaryDirectory() as cache:
        try:
            return datasets.load_dataset(
                "parquet", data_files=str(path), split="train", cache_dir=cache, keep_in_memory=True
            )
        except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
            raise ValueError(f"not a Parquet file with rows ({error.__cause__ or error})") from error


def _load_hub(name: HubName) -> datasets.Dataset:
    try:
        return datasets.load_dataset(name.repo, name.config, split=name.split)
    except Exception as error:  # datasets, the Hub and HTTP clients raise classes without a common base
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"not a file here, and split {name.split!r} cannot be had from the Hub ({reason}): check the name and the "
            "connection, or save the rows as .jsonl and name that file"
        ) from error


def _from_dataset(source: str, dataset: datasets.Dataset, wanted: Sequence[str]) -> Table:
    """Return the wanted columns as rows, class labels by name and unlabelled ones (-1) as None."""
    present = [column for column in dict.fromkeys(wanted) if column in dataset.column_names]
    rows: list[dict[str, Any]] = dataset.select_columns(present).to_list() if present else []
    for column in present:
        feature = dataset.features[column]
        if isinstance(feature, datasets.ClassLabel):
            for row in rows:
                row[column] = None if row[column] in (None, -1) else feature.int2str(row[column])
    return Table(source, dataset.column_names, rows)
