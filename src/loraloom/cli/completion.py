"""What a shell's Tab completes: the fixed words of options, and the names of the rules; without loading torch."""

from __future__ import annotations

import ast
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import loraloom

_RULES = "loraloom.rules"  # the group of entry points in which packages name theirs


def words(*known: str) -> Callable[[str], list[str]]:
    """Return what completes an option that takes one of `known`."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in known if word.startswith(incomplete)]

    return complete


def rule_words(*more: str) -> Callable[[str], list[str]]:
    """Return what completes the name of a merging rule, or one of `more`."""

    def complete(incomplete: str) -> list[str]:
        return words(*more, *_rule_names())(incomplete)

    return complete


def _rule_names() -> list[str]:
    """Return the names of all rules, out of their decorators in the sources: importing them takes seconds."""
    found = {entry.name for entry in entry_points(group=_RULES)}
    for path in (Path(loraloom.__file__).parent / "merging" / "rules").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "rule":
                found |= {str(one.value) for one in node.args[:1] if isinstance(one, ast.Constant)}
    return sorted(found)
