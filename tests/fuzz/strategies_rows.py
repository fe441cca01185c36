"""Files of rows in every format, spoiled in cells, structure or bytes, and the options that read them."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pyarrow
import pyarrow.parquet
from harness import as_json, spoiled, torn, weird
from hypothesis import strategies as st

Row = dict[str, Any]

_LINES = [
    b"[" * 100_000,
    b'{"text": ' * 100_000,
    b'{"text": "x", "mood": ' + b"9" * 5_000 + b"}",
    b'{"text": "x", "text": "y", "mood": "bad"}',
    b'{"text": "\\ud800", "mood": "bad"}',
    b'{"text": "x", "mood": "\\udfff"}',
    b'{"\\ud800": "x"}',
    b'{"text": "x", "mood": 1e999}',
    b'{"text": "x", "mood": NaN}',
    b'"text"',
    b"null",
    b'"open, quote',
    b"x,y,z,w\r\r\n",
    b"\xff\xfe\x00",
    b"\x00" * 9,
    "\u2028, \u0085".encode(),
]
OPTIONS: dict[str, Any] = {"text": ["text"], "label": "mood", "heldout_rows": 2}
_CHANGES: list[dict[str, Any]] = [
    {},
    {"text": ["text", "other"]},
    {"labels": ["bad", "good"]},
    {"labels": ["a", "b", "c"], "metric": "accuracy_f1"},
    {"regression": True},
    {"empty": "drop"},
    {"label": "nowhere"},
    {"train_rows": 3, "test_rows": 2},
]


def _table() -> list[Row]:
    """Return rows that make a task of classes, by name or place, or of numbers."""
    return [{"text": f"word {i}", "other": f"more {i // 2}", "mood": str(i % 2)} for i in range(8)]


def _jsonl(rows: Any) -> bytes:
    return b"\n".join(map(as_json, rows if isinstance(rows, list) else [rows])) + b"\n"


def _delimited(rows: Any, delimiter: str) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, escapechar="\\")
    dicts = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    if dicts:
        writer.writerow(dicts[0])
    writer.writerows(row.values() for row in dicts)
    return out.getvalue().encode("utf-8", errors="surrogatepass")


def _parquet(rows: Any) -> bytes:
    """Return the rows as Parquet where its types can hold them, else as its own columns of JSON."""
    dicts = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    out = io.BytesIO()
    try:
        table = pyarrow.Table.from_pylist(dicts)
        pyarrow.parquet.write_table(table, out)
    except (pyarrow.ArrowException, UnicodeError, OverflowError, TypeError):
        out = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"text": [json.dumps(row) for row in dicts]}), out)
    return out.getvalue()


_WRITERS = {
    ".jsonl": _jsonl,
    ".json": as_json,
    ".csv": lambda rows: _delimited(rows, ","),
    ".tsv": lambda rows: _delimited(rows, "\t"),
    ".parquet": _parquet,
}


@st.composite
def row_files(draw: st.DrawFn) -> tuple[str, bytes, dict[str, Any]]:
    """Return a suffix, the bytes of a file of that kind, and the options of the task that reads it."""
    suffix = draw(st.sampled_from(list(_WRITERS)))
    options = {**OPTIONS, **draw(st.sampled_from(_CHANGES))}
    how = draw(st.sampled_from(["cells", "cells", "column", "line", "torn", "whole"]))
    rows: Any = _table()
    if how == "cells":
        rows = draw(spoiled(rows, times=2))
    elif how == "column":
        column = draw(st.sampled_from(["text", "mood"]))
        values = draw(st.lists(weird(), min_size=1, max_size=8))
        rows = [{**row, column: values[i % len(values)]} for i, row in enumerate(rows)]
    elif how == "whole":
        rows = draw(weird())
    data = _WRITERS[suffix](rows)
    if how == "line":
        lines = data.split(b"\n")
        lines.insert(draw(st.integers(0, len(lines))), draw(st.sampled_from(_LINES)))
        data = b"\n".join(lines)
    return suffix, draw(torn(data)) if how == "torn" else data, options
