"""English text that every installation has: the docstrings of Python's own library and of loraloom's dependencies.

Source files are parsed with `ast` and never imported. A file belongs to one split by the sha256 of its path inside
its package, so no module gives rows to two splits, and a file's split is the same on every machine.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import inspect
import os
import re
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent

from loraloom.errors import raise_problems

STANDARD_LIBRARY = "python"
# Folders read of each package ("" is all of it). The large packages are cut short: a slow core should need seconds.
FOLDERS: dict[str, tuple[str, ...]] = {
    STANDARD_LIBRARY: ("",),
    "networkx": ("",),
    "numpy": ("fft", "lib", "linalg", "ma", "polynomial"),
    "pandas": ("core", "io"),
    "scipy": ("linalg", "signal", "stats"),
    "sklearn": ("",),
    "sympy": ("calculus", "combinatorics", "core", "geometry", "matrices", "sets", "stats"),
    "torch": ("autograd", "distributions", "nn", "optim"),
}
_SKIPPED_FOLDERS = {
    *("__pycache__", "_testing", "_vendor", "_vendored", "dist-packages", "distutils", "encodings", "ensurepip"),
    *("externals", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "testing", "tests", "tkinter"),
}
_MAX_BYTES = 300_000  # larger files are mostly generated tables, slow to parse
_SPLIT_BOUNDS = (("test", 0.26), ("heldout", 0.44), ("train", 1.0))  # cumulative shares of the files

_HEADER = re.compile(
    r"^(?P<title>[A-Z][A-Za-z ]+)\n[-=]{3,}[ ]*\n"  # numpydoc
    r"|^(?P<google>Args|Arguments|Attributes|Examples?|Notes?|Parameters|Raises|Returns|Shape|Yields):[ ]*\n",
    re.MULTILINE,
)
_PARAMETER_TITLES = {"args", "arguments", "attributes", "other parameters", "parameters"}
_ENTRY = re.compile(r"^(\S.*)((?:\n[ ]+\S.*)*)", re.MULTILINE)  # a line at the margin and the indented ones after it
_GOOGLE_HEAD = re.compile(r"\w+ \(([^()]*)\): (.*)")


@dataclass(frozen=True)
class Docstring:
    """One docstring: its file (`package/path.py`), its function's or class's name ("" for a module), and the text."""

    file: str
    name: str
    text: str


@dataclass(frozen=True)
class Part:
    """A paragraph of a docstring: `summary` (the first), `prose` (others before any section) or `parameter`.

    A parameter's paragraph is its description; `declared` is the type the docstring gives it.
    """

    role: str
    text: str
    declared: str = ""


def place(text: str) -> float:
    """Return a number in [0, 1) that depends on `text` alone (sha256), the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def package_of(file: str) -> str:
    """Return the package of `file` (`package/path.py`)."""
    return file.partition("/")[0]


def split_of(file: str) -> str:
    """Return the split that owns `file` (`package/path.py`): train, heldout or test."""
    return next(split for split, bound in _SPLIT_BOUNDS if place(file) < bound)


def docstrings() -> tuple[Docstring, ...]:
    """Return the ASCII docstrings of those packages in FOLDERS that are installed, in the order of their paths."""
    return tuple(docstring for package in FOLDERS for docstring in docstrings_of(package))


@cache
def docstrings_of(package: str) -> tuple[Docstring, ...]:
    """Return the ASCII docstrings of a package, none where it is not installed.

    package: a key of FOLDERS, as STANDARD_LIBRARY is.
    """
    with _collector_paused():
        return tuple(
            docstring
            for path, file in _source_files(package, FOLDERS[package])
            for docstring in _file_docstrings(path, file)
        )


def generic_texts(count: int) -> list[str]:
    """Return `count` paragraphs of English prose, 8 words or more, from the docstrings of Python's own library.

    The same for every call under one version of Python. Raises LoraloomError where there are not so many.
    """
    found = {
        " ".join(part.text.split())
        for docstring in docstrings_of(STANDARD_LIBRARY)
        for part in parts(docstring.text)
        if part.role != "parameter" and len(part.text.split()) >= 8
    }
    raise_problems(
        "generic text",
        [f"{count} texts were asked for, Python's own library holds {len(found)}"] if count > len(found) else [],
        "ask for fewer, or name a file of texts",
    )
    return sorted(found, key=place)[:count]


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause the cycle collector: syntax trees hold no cycles, and passing over them takes half the time of parsing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


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
            children[:] = [child for child in children if child not in _SKIPPED_FOLDERS]
            for path in (Path(parent, name) for name in names if name.endswith(".py")):
                if path.stat().st_size <= _MAX_BYTES:
                    found[f"{package}/{path.relative_to(root).as_posix()}"] = path
    return [(path, file) for file, path in sorted(found.items())]


def _file_docstrings(path: Path, file: str) -> Iterator[Docstring]:
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):  # a template, or written for another Python: no source of ours
        return
    for node in _owners(tree):
        text = ast.get_docstring(node, clean=False)
        if text and text.isascii():
            yield Docstring(file, "" if isinstance(node, ast.Module) else node.name, inspect.cleandoc(text))


def _owners(
    node: ast.Module | ast.ClassDef,
) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield a module or class, then its classes, functions and methods in the order of the file."""
    yield node
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _owners(child)
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child


def parts(text: str) -> list[Part]:
    """Return the summary, the prose and the parameters of a docstring in numpydoc's or Google's layout."""
    headers = list(_HEADER.finditer(text))
    ends = [header.start() for header in headers] + [len(text)]
    paragraphs = re.split(r"\n\s*\n", text[: ends[0]].strip())
    found = [Part("prose" if index else "summary", paragraph) for index, paragraph in enumerate(paragraphs)]
    for header, end in zip(headers, ends[1:], strict=True):
        if (header["title"] or header["google"]).lower() in _PARAMETER_TITLES:
            found += _parameters(dedent(text[header.end() : end]), google=header["google"] is not None)
    return found


def _parameters(section: str, google: bool) -> Iterator[Part]:
    for head, rest in _ENTRY.findall(section):
        if not google:
            yield Part("parameter", rest, head.partition(" : ")[2])
        elif match := _GOOGLE_HEAD.match(head):
            yield Part("parameter", match[2] + rest, match[1])


def first_sentence(paragraph: str) -> str:
    """Return the first sentence of a paragraph without its markup, or "" where it is no plain sentence."""
    text = re.sub(r":[a-z:]+:`~?([^`<]*)(?:<[^`]*>)?`", r"\1", paragraph)  # :class:`~a.B` and :func:`text <a.b>`
    text = " ".join(re.sub(r"[`*]+", "", text).split())
    sentence = re.split(r"(?<=[a-z)][.!?])\s+(?=[A-Z])", text, maxsplit=1)[0]
    return sentence if _is_plain(sentence) else ""


def _is_plain(sentence: str) -> bool:
    """Tell whether `sentence` is 5 to 24 words of prose from a capital to a full stop, without code in it."""
    words = sentence.split()
    letters = sum(character.isalpha() or character == " " for character in sentence)
    return (
        5 <= len(words) <= 24
        and max(map(len, words)) <= 20
        and re.match(r"[A-Z].*[.!?]$", sentence) is not None
        and letters >= 0.9 * len(sentence)
        and not re.search(r"https?:|>>>|::|\\|\||#|==|__", sentence)
    )
