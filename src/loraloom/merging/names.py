"""What inputs are called, in files and in what is published: short, safe, and telling of nobody's disk."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from loraloom.adapters.hub import folder_name, place_parts
from loraloom.adapters.update import Adapter
from loraloom.files.hashing import text_sha256

_LONGEST = 80  # bytes; a file's name may have 255, and others add to it


def input_names(folders: Sequence[Path]) -> list[str]:
    """Return a name for each folder that can name a file: its own, with as many parents' as tell it from the others.

    What file names, shells and the Hub do not take (`lr=0.1,seed=3` of a sweep) becomes a dash.
    """
    parts = [place_parts(folder) for folder in folders]
    for count in range(1, max((len(one) for one in parts), default=0) + 1):
        names = ["-".join(map(_plain, one[-count:])) for one in parts]
        if len({name.casefold() for name in names}) == len(names):
            break
    else:
        names = [_plain(folder_name(folder)) for folder in folders]
    names = [name if len(name.encode()) <= _LONGEST else _shortened(name) for name in names]
    found: list[str] = []
    for name in names:  # one folder twice, or two that differ in what became a dash
        taken = {other.casefold() for other in found}
        numbers = (f"{name}-{number}" for number in range(2, len(names) + 2))
        found.append(next(n for n in (name, *numbers) if n.casefold() not in taken))
    return found


def named_adapters(adapters: Mapping[str, Adapter] | Sequence[Adapter]) -> tuple[list[str], list[Adapter]]:
    """Return names and adapters; those of a sequence are named by their folders, or else numbered."""
    if isinstance(adapters, Mapping):
        return list(adapters), list(adapters.values())
    paths = [adapter.path for adapter in adapters if adapter.path]
    if len(paths) == len(adapters):
        return input_names(paths), list(adapters)
    names = [folder_name(a.path) if a.path else f"adapter{i}" for i, a in enumerate(adapters, start=1)]
    return names, list(adapters)


def public_command(command: str | None) -> str | None:
    """Return a typed command with the last part alone of every path that is not relative."""
    if not command:
        return command
    try:
        return shlex.join(_public(word) for word in shlex.split(command))
    except ValueError:  # no shell's line
        return None


def _public(word: str) -> str:
    option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    absolute = re.match(r"/|~|[A-Za-z]:[\\/]|\\\\", value)
    return option + equals + (re.split(r"[\\/]", value.rstrip("\\/"))[-1] if absolute else value)


def _plain(name: str) -> str:
    plain = re.sub(r"^\W+", "", re.sub(r"[^\w.+ -]+", "-", name)).rstrip("-. ")
    return plain or f"adapter-{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:8]}"


def _shortened(name: str) -> str:
    return f"{name[: _LONGEST - 9]}-{text_sha256(name)[:8]}"
