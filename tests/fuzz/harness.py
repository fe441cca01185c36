"""Malformed inputs: how they are made and how what becomes of them is judged and counted.

Every file kind has a module `strategies_<kind>.py`, which makes valid files and spoils them, and a `test_<kind>.py`. An
input may be refused, by one LoraloomError that can be printed, or accepted, where `check` finds nothing wrong with it.
Anything else fails the test: hypothesis shrinks it, and the shrunk input is kept as an `@example`.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings, strategies as st

from loraloom.errors import LoraloomError

T = TypeVar("T")


class Hang(BaseException):
    """An input took longer than LIMIT; no Exception, so that no reader takes it for a fault of the file."""


LIMIT = 20.0  # seconds after which an input counts as a hang; 2 are promised, on a machine that does nothing else
SLOW = 2.0
TALLY: dict[str, Counter[str]] = {}

TIMES = int(os.environ.get("LORALOOM_FUZZ", "1"))  # `make fuzz` tries so many times the inputs of `make test`
many = settings(
    max_examples=200 * TIMES,
    deadline=None,
    derandomize=TIMES == 1,  # `make test` tries the same inputs every time, `make fuzz` new ones
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)

_RAW = {'"@deep"': "[" * 100_000 + "]" * 100_000, '"@huge"': "9" * 5_000}  # what no parser's recursion or int() takes
WORDS = ["", "x", "8", "../../etc/passwd", "a" * 300, "\u202e\x00\x1b[2J", "(.*)*x", "[", "</script><script>", "\ud800"]
NUMBERS = [0, 1, -1, 2.5, 10**30, float("nan"), float("inf"), -float("inf"), 1e308]
PLAIN: list[Any] = [None, True, False, "@deep", "@huge", *NUMBERS, *WORDS]


def weird() -> st.SearchStrategy[Any]:
    """Values of every JSON type, most of them wrong wherever they stand."""
    leaves = st.one_of(st.sampled_from(PLAIN), st.integers(), st.floats(), st.text(max_size=20))
    keys = st.one_of(st.sampled_from(WORDS), st.text(max_size=8))
    return st.recursive(
        leaves,
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3)),
        max_leaves=5,
    )


def as_json(value: Any) -> bytes:
    """Return JSON, NaN and Infinity as Python writes them, deep brackets for "@deep" and long digits for "@huge"."""
    text = json.dumps(value)
    for mark, raw in _RAW.items():
        text = text.replace(mark, raw)
    return text.encode()


@st.composite
def spoiled(draw: st.DrawFn, valid: Any, times: int = 3) -> Any:
    """Return a copy of `valid` (dicts, lists, leaves) in which up to `times` places were replaced, dropped or added."""
    found = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, times))):
        places = list(_places(found))
        if not places:
            return draw(weird())
        holder, key = draw(st.sampled_from(places))
        what = draw(st.sampled_from(["replace", "replace", "drop", "add"]))
        if what == "replace":
            holder[key] = draw(weird())
        elif what == "drop":
            del holder[key]
        elif isinstance(holder, dict):
            holder[draw(st.text(max_size=12))] = draw(weird())
        else:
            holder.append(draw(weird()))
    return found


@st.composite
def torn(draw: st.DrawFn, content: bytes) -> bytes:
    """Return `content` cut off, with bytes changed, or with a part of it twice: what a broken disk leaves."""
    data = bytearray(content)
    how = draw(st.sampled_from(["cut", "change", "twice", "nothing", "before"]))
    if how == "nothing" or not data:
        return draw(st.binary(max_size=30))
    place = draw(st.integers(0, len(data) - 1))
    if how == "cut":
        return bytes(data[:place])
    if how == "change":
        for _ in range(draw(st.integers(1, 4))):
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        return bytes(data)
    return bytes(data[:place] + data[place // 2 :]) if how == "twice" else draw(st.binary(max_size=9)) + bytes(data)


def judge(
    kind: str, call: Callable[[], T], *, check: Callable[[T], str] | None = None, absent: Path | None = None
) -> T | None:
    """Run `call` on one malformed input of a file `kind`; return its result, or None where the input was refused.

    `check` returns what is wrong with an accepted result, or nothing. `absent` must not exist after a refusal, nor any
    leftover beside it. Fails where anything but a LoraloomError is raised, where its message cannot be printed, and
    where it takes longer than LIMIT.
    """
    tally = TALLY.setdefault(kind, Counter())
    tally["tried"] += 1
    started = time.monotonic()
    result: T | None = None
    outcome = "traceback"
    try:
        with _limited():
            result = call()
        outcome = "accepted"
    except LoraloomError as error:
        str(error).encode()  # a lone surrogate in a message could not be printed
        outcome = "refused"
        if absent is not None:
            assert not absent.exists(), f"{absent} was written, and refused"
            assert not list(absent.parent.glob(".*.part")), "a leftover of a refused input"
    except Hang:
        outcome = "hang"
        raise
    finally:
        tally[outcome] += 1
        tally["slow"] += time.monotonic() - started > SLOW
    if outcome == "accepted" and check is not None:
        wrong = check(result)  # type: ignore[arg-type]
        if wrong:
            tally["accepted"] -= 1
            tally["wrong"] += 1
        assert not wrong, wrong
    return result


@contextmanager
def _limited() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang(f"no answer within {LIMIT:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every (holder, key or index) inside nested dicts and lists."""
    keys: list[Any] = list(value) if isinstance(value, dict) else []
    keys += range(len(value)) if isinstance(value, list) else []
    for key in keys:
        yield value, key
        yield from _places(value[key])
