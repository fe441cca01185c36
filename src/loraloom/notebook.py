"""What a notebook shows of an object: a title and a small table, with nothing in it taken for HTML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from loraloom.errors import printable

_LONGEST = 80  # characters of a cell: names come out of files


def facts(title: str, found: Mapping[str, object]) -> str:
    """Return a title and a table of names and values as HTML; a value that is empty is left out."""
    return listing(title, (), [(name, value) for name, value in found.items() if value not in (None, "")])


def listing(title: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a title and a table as HTML; without `head` the first cell of each row heads it."""
    lines = [_row("th", head)] if head else []
    lines += [_row("td", row) if head else _row("td", row[1:], row[0]) for row in rows]
    return f"<table><caption>{_text(title)}</caption>{''.join(lines)}</table>"


def _row(tag: str, cells: Sequence[object], headed: object = None) -> str:
    first = "" if headed is None else f"<th>{_text(headed)}</th>"
    return f"<tr>{first}{''.join(f'<{tag}>{_text(cell)}</{tag}>' for cell in cells)}</tr>"


def _text(value: object) -> str:
    text = printable(str(value))
    return escape(text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…")
