"""Rows of JSONL, JSON, CSV and TSV files: every text exactly as written, every fault with its line.

Anybody may have written the file, so nothing in it may take memory or time out of all proportion to its size.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from loraloom.errors import first_few
from loraloom.files.reading import json_object

LONGEST_LINE = 10_000_000  # characters
LARGEST_JSON = 256 << 20  # bytes; what is read whole

Rows = list[dict[str, Any]]


def read_text(path: Path, wanted: Sequence[str]) -> tuple[Collection[str], Rows]:
    """Return the names of all columns, and the `wanted` ones of every row; a cell that a row lacks is absent.

    Raises ValueError telling what is wrong, with the line or row where there is one, and OSError.
    """
    suffix = path.suffix.lower()
    newline = "" if suffix in (".csv", ".tsv") else None  # a quoted field keeps its line ends
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline=newline) as file:
        if suffix == ".jsonl":
            return _read_jsonl(file, wanted)
        if suffix == ".json":
            return _read_json(file, wanted)
        return _read_csv(file, wanted, delimiter="\t" if suffix == ".tsv" else ",")


def _read_jsonl(file: TextIO, wanted: Sequence[str]) -> tuple[Collection[str], Rows]:
    columns: dict[str, None] = {}
    rows: Rows = []
    faults: list[str] = []
    for number, line in _lines(file):
        if not line.strip():
            continue
        try:
            row = _parsed(line)
        except ValueError as error:
            faults.append(f"line {number} is not JSON ({error})")
            continue
        if isinstance(row, dict):
            columns |= dict.fromkeys(row)
            rows.append({column: row[column] for column in wanted if column in row})
        else:
            faults.append(f"line {number} is not an object with columns")
    if faults:
        raise ValueError(first_few(faults))
    return columns, rows


def _read_json(file: TextIO, wanted: Sequence[str]) -> tuple[Collection[str], Rows]:
    text = file.read(LARGEST_JSON + 1)
    if len(text) > LARGEST_JSON:
        raise ValueError(f"larger than {LARGEST_JSON >> 20} MB: write one object a line into a .jsonl file")
    _check_text(text, "the file")
    try:
        content = _parsed(text)
    except ValueError as error:
        raise ValueError(f"not JSON ({error}); a file with one object a line is named .jsonl") from error
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ValueError("must hold a list of objects, one a row")
    columns = {column: None for row in content for column in row}
    return columns, [{column: row[column] for column in wanted if column in row} for row in content]


def _parsed(text: str) -> Any:
    """Return the JSON in `text`. Raises ValueError that tells in a few words why it is none."""
    try:
        return json.loads(text, object_pairs_hook=json_object)
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno} column {error.colno}"
        raise ValueError(f"{error.msg} at {where}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except ValueError as error:  # of a number, from Python's own guard; or of a name given twice
        raise ValueError("a number of thousands of digits" if "digits" in str(error) else str(error)) from error


def _read_csv(file: TextIO, wanted: Sequence[str], delimiter: str) -> tuple[Collection[str], Rows]:
    # strict: a stray quote is an error with its line instead of a row that swallows the rows after it
    reader = csv.reader((line for _, line in _lines(file)), delimiter=delimiter, strict=True)
    rows: Rows = []
    uneven: list[str] = []
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise ValueError(f"header names a column twice: {first_few(header)}")
        places = {column: header.index(column) for column in wanted if column in header}
        for fields in reader:
            if not fields:  # a blank line
                continue
            if len(fields) == len(header):
                rows.append({column: fields[place] for column, place in places.items()})
            else:
                rows.append({})
                uneven.append(f"row {len(rows)}")
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}{_hint(error)}") from error
    if uneven:
        raise ValueError(f"more or fewer fields than the header's {len(header)} in {first_few(uneven)}")
    return header, rows


def _hint(error: csv.Error) -> str:
    return ": is a quote not closed?" if "field limit" in str(error) else ""


def _lines(file: TextIO) -> Iterator[tuple[int, str]]:
    """Yield every line with its number, from 1. Raises ValueError for what is no line of text."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise ValueError(f"line {number} is longer than {LONGEST_LINE:,} characters")
        _check_text(line, f"line {number}")
        yield number, line


def _check_text(text: str, where: str) -> None:
    """Raise ValueError where `text`, read with surrogateescape, was no UTF-8, or UTF-16 that looks like it."""
    if "\0" in text:
        raise ValueError(f"{where} holds a NUL character: save the file as UTF-8")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            byte = ord(text[error.start]) - 0xDC00
            raise ValueError(f"{where} is not UTF-8 (byte 0x{byte:02x}): save the file as UTF-8") from None
