"""Docstrings as Markdown: lines of `name: meaning` become a list, and nothing in them is a tag.

A griffe extension, for mkdocstrings: the code's docstrings are plain text.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ITEM = re.compile(r"^([a-z_]\w*(?:, [a-z_]\w*)*): (?=\S)")


def as_markdown(text: str) -> str:
    """Return a docstring as Markdown."""
    lines = []
    inside = False
    for line in text.splitlines():
        item = _ITEM.match(line)
        if item:
            lines += [] if inside else [""]
            line = f"- `{item[1]}`: {line[item.end() :]}"
        elif inside and line.strip():
            line = f"    {line.strip()}"
        inside = bool(item) or (inside and bool(line.strip()))
        lines.append(line)
    pieces = re.split(r"(`[^`\n]*`)", "\n".join(lines))
    return "".join(piece if piece.startswith("`") else _plain(piece) for piece in pieces)


def _plain(text: str) -> str:
    return re.sub(r"[*_\[]", r"\\\g<0>", text.replace("<", "&lt;"))


class PlainText(griffe.Extension):  # type: ignore[misc]
    """Turns every docstring into Markdown when it is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Turn the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
