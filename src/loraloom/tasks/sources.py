"""Where rows come from: JSONL, JSON, CSV, TSV and Parquet files, and data sets on the Hugging Face Hub.

Text files are read with the standard library, so a text arrives exactly as written: the `datasets` JSON builder turns
the text "2020-01-01" into "2020-01-01 00:00:00", its CSV builder "007" into 7.0 and "NA" into null, and neither names
the line it stops at.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from loraloom.errors import LoraloomError, did_you_mean, reads_file
from loraloom.files.reading import check_fetched
from loraloom.tasks.parquet import read_parquet
from loraloom.tasks.textfiles import read_text

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_HUB = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w.-]+)(:(?P<config>[\w.-]+))?(#(?P<split>[\w.-]+))?")
_HUB_SPLITS = {"train": "train", "heldout": "validation", "test": "test"}


class Table(NamedTuple):
    """Rows of one source: the names of all its columns, and the cells of those that were wanted; one may be absent."""

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
    """Read some columns of a file or of a data set on the Hub.

    source: a file of a known suffix; or org/name, org/name:config#split.
    split: train, heldout or test, which tells the Hub's split where the source does not.
    wanted: the columns; one that is not there is left out.

    Raises ValueError saying why they cannot be read, with the line or row where there is one.
    """
    try:
        hub = hub_name(source, split)
        if hub is not None:
            return _from_dataset(source, _load_hub(hub), wanted)
        path = Path(source).expanduser()
        _check_path(path)
        try:
            check_fetched(path)
        except LoraloomError as error:  # told with what is wrong with other files
            raise ValueError(f"{error.message.removeprefix(f'{path}: ')}: {error.hint}") from error
        read = read_parquet if path.suffix.lower() == ".parquet" else read_text
        return Table(source, *read(path, wanted))
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror or error}") from error
    except RuntimeError as error:  # of a home folder that nobody has
        raise ValueError(f"cannot be read: {error}") from error


def too_few(rows: int, asked: int) -> list[str]:
    """Return what is wrong with a source of so many `rows` where more texts are `asked` for."""
    return [] if rows >= asked else [f"{asked} texts were asked for, it holds {rows}: lower --texts to that"]


def is_null(value: Any) -> bool:
    """Tell whether a cell holds nothing: null, NaN, or blanks."""
    if isinstance(value, str):
        return value.strip().lower() in ("", "nan")
    return value is None or (isinstance(value, float) and math.isnan(value))


def check_unicode(text: str) -> None:
    """Raise ValueError for half a surrogate pair, which JSON can write and nothing else can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair, which is no Unicode text") from None


def _check_path(path: Path) -> None:
    if path.is_dir():
        raise ValueError("is a folder: name one file")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"unknown suffix {path.suffix!r}: known: {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ValueError(f"no such file: there is no folder {path.parent}")
    if path.exists() and not path.is_file():
        raise ValueError("is no regular file: save its rows as one")
    if not path.exists():
        names = [file.name for file in path.parent.iterdir() if file.suffix.lower() in SUFFIXES]
        # The nearest few alone: a folder may hold thousands of files.
        near = difflib.get_close_matches(path.name, names, n=5, cutoff=0.0)
        raise ValueError(f"no such file: {did_you_mean(path.name, near) if near else 'its folder holds no data file'}")


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
