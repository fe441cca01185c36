"""English text that every installation has: the docstrings of Python's own library and of loraloom's dependencies.

Source files are parsed with `ast` and never imported. A file belongs to one split, by the sha256 of its path inside
its package, so no module gives rows to two splits, and the split of a file is the same on every machine.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent
from typing import Any

STANDARD_LIBRARY = "python"
# Folders read of each package ("" is all of it). The largest packages are cut short: a slow core should need seconds.
FOLDERS: dict[str, tuple[str, ...]] = {
    STANDARD_LIBRARY: ("",),
    "networkx": ("",),
    "numpy": ("",),
    "pandas": ("",),
    "scipy": ("linalg", "optimize", "signal", "sparse", "spatial", "stats"),
    "sklearn": ("",),
    "sympy": ("calculus", "combinatorics", "core", "functions", "geometry", "matrices", "sets", "solvers", "stats"),
    "torch": ("autograd", "distributed", "distributions", "nn", "optim", "utils"),
}
_SKIPPED_FOLDERS = {
    *("__pycache__", "_testing", "_vendor", "_vendored", "encodings", "ensurepip", "externals", "idlelib", "lib2to3"),
    *("dist-packages", "msilib", "pydoc_data", "site-packages", "test", "testing", "tests", "turtledemo"),
}
_MAX_BYTES = 300_000  # larger files are mostly generated tables, slow to parse
_SPLIT_BOUNDS = (("test", 0.24), ("heldout", 0.42), ("train", 1.0))  # cumulative shares of the files

_NUMPY_HEADER = re.compile(r"^([A-Z][A-Za-z ]+)\n[-=]{3,}[ ]*\n", re.M)
_GOOGLE_HEADER = re.compile(r"^(Args|Arguments|Parameters|Returns|Yields|Raises|Examples?|Notes?|Shape):[ ]*\n", re.M)
_ROLES = {
    **dict.fromkeys(("parameters", "other parameters", "args", "arguments", "attributes"), "parameter"),
    **dict.fromkeys(("returns", "yields"), "return value"),
    "raises": "error",
}


@dataclass(frozen=True)
class Docstring:
    """One docstring: its file (`package/path.py`), its owner's kind, name and arguments, and the text."""

    file: str
    kind: str
    name: str
    arguments: tuple[str, ...]
    text: str

    @property
    def package(self) -> str:
        """Return the name of the package that holds the file."""
        return self.file.partition("/")[0]


def split_of(file: str) -> str:
    """Return the split that owns `file` (`package/path.py`): train, heldout or test."""
    place = int.from_bytes(hashlib.sha256(file.encode()).digest()[:4], "big") / 2**32
    return next(split for split, bound in _SPLIT_BOUNDS if place < bound)


@cache
def docstrings() -> tuple[Docstring, ...]:
    """Return the docstrings of those packages in FOLDERS that are installed, in the order of their paths."""
    return tuple(
        docstring
        for package, folders in FOLDERS.items()
        for path, file in _source_files(package, folders)
        for docstring in _file_docstrings(path, file)
    )


def _source_files(package: str, folders: tuple[str, ...]) -> list[tuple[Path, str]]:
    """Return path and `package/path.py` of each source file, without tests, vendored and oversized ones."""
    if package == STANDARD_LIBRARY:
        root = Path(sysconfig.get_paths()["stdlib"])
    else:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            return []
        root = Path(spec.origin).parent
    found = {}
    for folder in folders:
        for parent, children, names in os.walk(root / folder):
            children[:] = [name for name in children if name not in _SKIPPED_FOLDERS and not name.startswith("config-")]
            for name in names:
                path = Path(parent, name)
                if name.endswith(".py") and path.stat().st_size <= _MAX_BYTES:
                    found[f"{package}/{path.relative_to(root).as_posix()}"] = path
    return [(path, file) for file, path in sorted(found.items())]


def _file_docstrings(path: Path, file: str) -> Iterator[Docstring]:
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):  # a template or a file for another Python is no source of ours
        return
    for node, kind in _owners(tree, inside_class=False):
        text = ast.get_docstring(node, clean=False)
        if text and text.isascii():
            arguments = () if isinstance(node, (ast.Module, ast.ClassDef)) else _argument_names(node.args)
            yield Docstring(file, kind, getattr(node, "name", ""), arguments, inspect.cleandoc(text))


def _owners(node: ast.Module | ast.ClassDef, inside_class: bool) -> Iterator[tuple[Any, str]]:
    """Yield the module, its classes, functions and methods, in the order of the file; local functions are left out."""
    yield node, "class" if inside_class else "module"
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _owners(child, inside_class=True)
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child, "method" if inside_class else "function"


def _argument_names(arguments: ast.arguments) -> tuple[str, ...]:
    every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    return tuple(argument.arg for argument in every if argument.arg not in ("self", "cls"))


def parts(text: str) -> list[tuple[str, str]]:
    """Return (role, paragraph) pairs of a docstring in numpydoc's or Google's layout.

    Roles: `summary` (its first paragraph), `prose` (further ones before any section), `parameter`, `return value`
    and `error` (the description of one entry of such a section).
    """
    headers = sorted([*_NUMPY_HEADER.finditer(text), *_GOOGLE_HEADER.finditer(text)], key=lambda header: header.start())
    ends = [header.start() for header in headers] + [len(text)]
    paragraphs = re.split(r"\n\s*\n", text[: ends[0]].strip())
    found = [("prose" if index else "summary", paragraph) for index, paragraph in enumerate(paragraphs)]
    for header, end in zip(headers, ends[1:], strict=True):
        role = _ROLES.get(header[1].lower())
        if role:
            body = text[header.end() : end]
            found += [(role, entry) for entry in _entries(dedent(body), google=header[0].rstrip().endswith(":"))]
    return found


def _entries(body: str, google: bool) -> Iterator[str]:
    """Yield the description of each entry of a section, without its name and type."""
    for entry in re.findall(r"^\S.*(?:\n[ ]+\S.*)*", body, re.M):
        head, _, rest = entry.partition("\n")
        if google:
            name, colon, first = head.partition(": ")
            rest = f"{first if colon else name}\n{rest}"
        yield rest


def sentences(paragraph: str) -> list[str]:
    """Return the plain English sentences of a paragraph, 5 to 28 words each, without markup."""
    text = re.sub(r":[a-z:]+:`~?([^`<]*)(?:<[^`]*>)?`", r"\1", paragraph)  # :class:`~a.B` and :func:`text <a.b>`
    text = " ".join(re.sub(r"[`*]+", "", text).split())
    return [
        found
        for found in re.split(r"(?<=[a-z)][.!?])\s+(?=[A-Z])", text)
        if found.endswith((".", "!", "?")) and _is_plain(found)
    ]


def _is_plain(sentence: str) -> bool:
    words = sentence.split()
    letters = sum(character.isalpha() or character == " " for character in sentence)
    return (
        5 <= len(words) <= 28
        and sentence[0].isupper()
        and letters >= 0.9 * len(sentence)
        and not re.search(r"https?:|>>>|::|\\|\||#|={2}|__", sentence)
    )


def typed(text: str):
    headers = sorted([*_NUMPY_HEADER.finditer(text), *_GOOGLE_HEADER.finditer(text)], key=lambda header: header.start())
    ends = [header.start() for header in headers] + [len(text)]
    for header, end in zip(headers, ends[1:], strict=True):
        if _ROLES.get(header[1].lower())=="parameter":
            body=dedent(text[header.end():end]); google=header[0].rstrip().endswith(":")
            for entry in re.findall(r"^\S.*(?:\n[ ]+\S.*)*", body, re.M):
                head,_,rest=entry.partition("\n")
                if google:
                    m=re.match(r"\w+ \(([^)]*)\): (.*)",head)
                    if m: yield m[1], m[2]+"\n"+rest
                elif " : " in head: yield head.split(" : ",1)[1], rest
