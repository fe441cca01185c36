"""How long work tells where it stands: one bar a kind of stage on a terminal, plain lines with times elsewhere."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import IO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from loraloom.errors import printable

T = TypeVar("T")
EVERY = 10.0  # seconds between two plain lines of one kind


class Reporter:
    """Shows progress on standard error while used as a context; silent when quiet."""

    def __init__(self, *, quiet: bool = False) -> None:
        console = Console(stderr=True)
        self._shown = None if quiet else _Bars(console) if console.is_terminal else _Lines(console.file)

    def __enter__(self) -> Reporter:
        if self._shown:
            self._shown.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:
            self._shown.stop(whole=error is None)

    def begin(self, kind: str, total: int) -> None:
        """Announce `total` stages of one kind."""
        if self._shown:
            self._shown.begin(kind, total)

    def detail(self, kind: str, text: str) -> None:
        """Say what the kind is at. The kind must have begun."""
        if self._shown:
            self._shown.update(kind, detail=text)

    def reach(self, kind: str, count: int) -> None:
        """Say that `count` stages of the kind are done."""
        if self._shown:
            self._shown.update(kind, done=count)

    def advance(self, kind: str) -> None:
        """Count one stage of the kind as done."""
        if self._shown:
            self._shown.update(kind, advance=1, detail="")

    def each(self, kind: str, items: Collection[T]) -> Iterator[T]:
        """Yield `items`, and count each as a stage of the kind that is done when the next is asked for."""
        self.begin(kind, len(items))
        for item in items:
            yield item
            self.advance(kind)


class _Bars:
    """Bars that move, for a terminal."""

    def __init__(self, console: Console) -> None:
        self.bars = Progress(
            TextColumn("{task.description:<12}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}", style="dim", markup=False),
            console=console,
        )
        self.tasks: dict[str, TaskID] = {}

    def start(self) -> None:
        self.bars.start()

    def stop(self, *, whole: bool) -> None:
        self.bars.stop()

    def begin(self, kind: str, total: int) -> None:
        self.tasks[kind] = self.bars.add_task(printable(kind), total=total, detail="")

    def update(self, kind: str, *, done: int | None = None, advance: int | None = None, detail: str = "") -> None:
        self.bars.update(self.tasks[kind], completed=done, advance=advance, detail=printable(detail))


@dataclass
class _Kind:
    """How far one kind of stage is, when it began and when it was last told."""

    total: int
    begun: float
    told: float
    done: int = 0
    ended: bool = False


class _Lines:
    """A line when a kind begins, every ten seconds, and when it ends; each after the time since the start."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file
        self.started = time.monotonic()
        self.kinds: dict[str, _Kind] = {}

    def start(self) -> None:
        self.started = time.monotonic()

    def stop(self, *, whole: bool) -> None:
        if whole:  # what nobody counted is done all the same
            for kind, one in self.kinds.items():
                self._end(kind, one)

    def begin(self, kind: str, total: int) -> None:
        now = time.monotonic()
        self.kinds[kind] = _Kind(total, now, now)
        self._write(kind if total == 1 else f"{kind}: {total} to do")
        if total == 0:
            self._end(kind, self.kinds[kind])

    def update(self, kind: str, *, done: int | None = None, advance: int | None = None, detail: str = "") -> None:
        one = self.kinds[kind]
        one.done = (one.done if done is None else done) + (advance or 0)
        if one.done >= one.total:
            self._end(kind, one)
        elif time.monotonic() - one.told >= EVERY:
            one.told = time.monotonic()
            self._write(f"{kind}: {one.done} of {one.total}" + (f", {detail}" if detail else ""))

    def _end(self, kind: str, one: _Kind) -> None:
        if not one.ended:
            one.ended = True
            self._write(f"{kind}: done in {_clock(time.monotonic() - one.begun)}")

    def _write(self, text: str) -> None:
        self.file.write(f"{_clock(time.monotonic() - self.started):>8}  {printable(text)}\n")
        self.file.flush()


def _clock(seconds: float) -> str:
    """Return hours, minutes and seconds: 0:07, 1:02:33."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
