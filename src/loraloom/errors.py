"""Errors for people: what is wrong, where, and what to do next."""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_FILE = "loraloom_file"  # the attribute of an exception that names the file in whose reading it was raised

_SHOWN = 20  # problems told in full before the rest is counted
_LINE = 400  # characters of one problem; names out of files may be longer than a screen


class LoraloomError(Exception):
    """A fault in an input that its owner can mend; the command line prints it without a traceback and exits with 2.

    `message` says what is wrong and where (file, tensor, option); `hint` says what to do next. Characters that a
    terminal would obey, from names in files, are written as escapes.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = printable(message)
        self.hint = printable(hint)

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


def raise_problems(what: str, problems: Sequence[str], hint: str = "") -> None:
    """Raise one LoraloomError that tells the `problems` found in `what`; do nothing when there are none.

    The first twenty are told in full, the others counted.
    """
    if len(problems) == 1:
        raise LoraloomError(f"{what}: {_cut(problems[0])}", hint)
    if problems:
        lines = [_cut(problem) for problem in problems[:_SHOWN]]
        if len(problems) > _SHOWN:
            lines.append(f"and {len(problems) - _SHOWN} more")
        raise LoraloomError(f"{what}: {len(problems)} problems" + "".join(f"\n  - {line}" for line in lines), hint)


def _cut(problem: str) -> str:
    return problem if len(problem) <= _LINE else f"{problem[:_LINE]} ... ({len(problem)} characters)"


def printable(text: str) -> str:
    """Return `text` with control characters, lone surrogates and their like as escapes; line breaks and blanks stay."""
    text = text.replace("\xa0", " ")  # a blank that does not break; Python calls it not printable
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def did_you_mean(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return a hint that names the `count` nearest of `known`, or all of them where nothing is near."""
    options = sorted(known)
    near = difflib.get_close_matches(name, options, n=count, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(repr(match) for match in near) + "?"
    return "known: " + ", ".join(options)


def first_few(items: Sequence[str], count: int = 3) -> str:
    """Return the first `count` of `items` for a message, and how many more there are."""
    more = len(items) - count
    return ", ".join(items[:count]) + (f" and {more} more" if more > 0 else "")


def first_line(error: Exception) -> str:
    """Return the first line of what a library says, or its exception's name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def collecting(errors: list[LoraloomError]) -> Iterator[None]:
    """Add a LoraloomError raised inside to `errors` and go on, so that `raise_together` tells it with the others."""
    try:
        yield
    except LoraloomError as error:
        errors.append(error)


def raise_together(errors: Sequence[LoraloomError]) -> None:
    """Raise one LoraloomError that tells everything `errors` tell, each once; do nothing when there are none."""
    if errors:
        messages = dict.fromkeys(error.message for error in errors)
        hints = dict.fromkeys(error.hint for error in errors if error.hint)
        raise LoraloomError("\n".join(messages), "; ".join(hints))


def reads_file(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a function as one that reads the file or folder which is its first path or text.

    Where it raises what nobody foresaw, `file_of` tells the command line which file that was, and so whose fault.
    """

    @functools.wraps(function)
    def marked(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except LoraloomError:
            raise
        except Exception as error:
            given = (one for one in (*args, *kwargs.values()) if isinstance(one, str | os.PathLike))
            if file_of(error) is None:  # the innermost file is the one at fault
                setattr(error, _FILE, os.fspath(next(given, "")) or None)
            raise

    return marked


def file_of(error: BaseException) -> str | None:
    """Return the file in whose reading `error` was raised, or None where it was raised elsewhere."""
    found: str | None = getattr(error, _FILE, None)
    return found
