"""Rows of Parquet files, whose few bytes may unfold to any number of rows and any length of text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from loraloom.errors import first_few

# real text shrinks some 3 to 10 times, and a row of its own takes more than a byte
_SMALL, _UNFOLDS = 64 << 20, 50  # bytes that any file may unfold to; how many times its size a larger one may
_FEW = 1_000_000  # rows that any file may have


def read_parquet(path: Path, wanted: Sequence[str]) -> tuple[Collection[str], list[dict[str, Any]]]:
    """Return the names of all columns, and the `wanted` ones of every row; classes of `datasets` by name, -1 as None.

    Raises ValueError telling what is wrong, before anything unfolds that is too large.
    """
    try:
        schema = pyarrow.parquet.read_schema(path)
        present = [column for column in dict.fromkeys(wanted) if column in schema.names]
        texts = [column for column in present if _is_text(schema.field(column).type)]
        with pyarrow.parquet.ParquetFile(path, read_dictionary=texts, page_checksum_verification=True) as file:
            _check_metadata(file.metadata, path.stat().st_size)
            problems = [
                f"column {column!r} holds {schema.field(column).type}, neither text nor labels"
                for column in present
                if pyarrow.types.is_nested(schema.field(column).type)
            ]
            if problems:
                raise ValueError(first_few(problems))
            table = file.read(columns=present)
        _check_size(sum(map(_unfolded, table.columns)), path.stat().st_size)
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"not a Parquet file with rows ({reason})") from error
    features = _features(schema)
    cells = {column: _cells(table.column(column), features[column]) for column in present}
    return schema.names, [dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True)]


def _features(schema: Any) -> datasets.Features:
    try:
        return datasets.Features.from_arrow_schema(schema)
    except Exception as error:  # of what the file says that `datasets` wrote: errors of every kind
        raise ValueError("not a Parquet file with rows (what it says of its features is no such thing)") from error


def _is_text(kind: Any) -> bool:
    return bool(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))


def _check_metadata(metadata: Any, size: int) -> None:
    if metadata.num_rows > max(_FEW, size):
        raise ValueError(f"{metadata.num_rows:,} rows in {size:,} bytes, which no texts fit into: save them anew")
    # of whole groups: to ask a damaged file for a single column's ends the process (pyarrow 26)
    _check_size(sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)), size)


def _check_size(unfolded: int, size: int) -> None:
    if unfolded > max(_SMALL, _UNFOLDS * size):
        raise ValueError(
            f"its {size:,} bytes unfold to {unfolded:,}, as texts do not: save the rows anew, each text once"
        )


def _unfolded(column: Any) -> int:
    """Return the bytes of a column with every text written out; as read, equal ones are there once."""
    total = 0
    for chunk in column.chunks:
        if isinstance(chunk, pyarrow.DictionaryArray) and _is_text(chunk.type.value_type):
            lengths = pyarrow.compute.binary_length(chunk.dictionary).take(chunk.indices)
            total += pyarrow.compute.sum(lengths.cast(pyarrow.int64())).as_py() or 0
        else:
            total += chunk.nbytes
    return total


def _cells(column: Any, feature: Any) -> list[Any]:
    """Return the values of a column, equal texts as one and the same object."""
    values: list[Any] = []
    for chunk in column.chunks:
        if isinstance(chunk, pyarrow.DictionaryArray):
            known = [*chunk.dictionary.to_pylist(), None]
            values += [known[-1 if place is None else place] for place in chunk.indices.to_pylist()]
        else:
            values += chunk.to_pylist()
    if isinstance(feature, datasets.ClassLabel):
        return [None if value in (None, -1) else feature.int2str(value) for value in values]
    return values
