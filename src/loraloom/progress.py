"""How long work tells where it stands: one bar a kind of stage on a terminal, plain lines with times elsewhere."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from loraloom.errors import printable

T = TypeVar("T")
FIRST, EVERY = 10.0, 60.0  # seconds until a plain line tells how far work is, and between any two more of one work


class Reporter:
    """Shows progress on standard error while used as a context; silent when quiet.

    Work is of a kind, of which so many are to do: a kind begins, is reached or advanced, and may say what it is at.
    Stages have names beside: each is entered, may tell its steps, and is left. Several may be at work at once.
    """

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
        """Announce `total` stages of one kind, beside those that were announced before."""
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

    def found(self, kind: str) -> None:
        """Count one stage of the kind as done that was done before."""
        if self._shown:
            self._shown.found(kind)

    def enter(self, kind: str, name: str) -> None:
        """Say that the stage of this name has begun, once or more. The kind must have begun."""
        if self._shown:
            self._shown.enter(kind, name)

    def step(self, kind: str, name: str, done: int, total: int, loss: float | None = None) -> None:
        """Say how many of its steps a stage has done, and the training loss where it trains."""
        if self._shown:
            self._shown.step(kind, name, _Step(done, total, loss))

    def leave(self, kind: str, name: str) -> None:
        """Count the stage of this name as done."""
        if self._shown:
            self._shown.leave(kind, name)

    def each(self, kind: str, items: Collection[T]) -> Iterator[T]:
        """Yield `items`, and count each as a stage of the kind that is done when the next is asked for."""
        self.begin(kind, len(items))
        for item in items:
            yield item
            self.advance(kind)


@dataclass(frozen=True)
class _Step:
    """How many of its steps a stage has done, and its training loss."""

    done: int
    total: int
    loss: float | None
    at: float = field(default_factory=lambda: time.monotonic())

    def told(self, first: _Step) -> str:
        """Return loss and time left in words, by the pace since the `first` step that was told."""
        told = "" if self.loss is None else f", loss {self.loss:.3g}"
        if self.done > first.done:
            left = (self.total - self.done) * (self.at - first.at) / (self.done - first.done)
            told += f", {_clock(left)} left"
        return told


class _Bars:
    """Bars that move, for a terminal: one a kind, and below them one for every stage that tells its steps."""

    def __init__(self, console: Console) -> None:
        self.bars = Progress(
            TextColumn("{task.description:<12}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}", style="dim", markup=False),
            console=console,
        )
        self.kinds: dict[str, TaskID] = {}
        self.stages: dict[tuple[str, str], tuple[TaskID, _Step]] = {}

    def start(self) -> None:
        self.bars.start()

    def stop(self, *, whole: bool) -> None:
        self.bars.stop()

    def begin(self, kind: str, total: int) -> None:
        if kind in self.kinds:
            bar = next(task for task in self.bars.tasks if task.id == self.kinds[kind])
            self.bars.update(bar.id, total=total + (bar.total or 0))
        else:
            self.kinds[kind] = self.bars.add_task(printable(kind), total=total, detail="")

    def update(self, kind: str, *, done: int | None = None, advance: int | None = None, detail: str = "") -> None:
        self.bars.update(self.kinds[kind], completed=done, advance=advance, detail=printable(detail))

    def found(self, kind: str) -> None:
        self.update(kind, advance=1)

    def enter(self, kind: str, name: str) -> None:
        self.update(kind, detail=name)

    def step(self, kind: str, name: str, step: _Step) -> None:
        if (kind, name) not in self.stages:
            self.stages[kind, name] = self.bars.add_task("", total=step.total, detail=""), step
        bar, first = self.stages[kind, name]
        self.bars.update(bar, completed=step.done, detail=printable(name + step.told(first)))

    def leave(self, kind: str, name: str) -> None:
        if (kind, name) in self.stages:
            self.bars.remove_task(self.stages.pop((kind, name))[0])
        self.update(kind, advance=1)


@dataclass
class _Work:
    """A kind of stage, or one stage: how much of it is done, when it began and when it is told again.

    Of a kind: how many stages were entered or found done, how many of these were found, and when the first was entered.
    Of a stage: the first step that it told.
    """

    total: int
    begun: float
    again: float
    done: int = 0
    entered: int = 0
    found: int = 0
    since: float | None = None
    first: _Step | None = None
    ended: bool = False

    @classmethod
    def now(cls, total: int = 0) -> _Work:
        """Return work that begins now."""
        now = time.monotonic()
        return cls(total, now, now + FIRST)

    def due(self) -> bool:
        """Tell whether it is time for a line; the next is then due a while later."""
        now = time.monotonic()
        if now < self.again:
            return False
        self.again = now + EVERY
        return True

    def left(self) -> str:
        """Return in words how many stages are left of a kind, and how long they take at the pace of those before."""
        left, made = self.total - self.done, self.done - self.found
        if not left or not made or self.since is None:
            return f"{left} left"
        return f"{left} left, about {_clock(left * (time.monotonic() - self.since) / made)}"


class _Lines:
    """Lines, each after the time since the start: what begins, how far it is every minute, and what has ended."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file
        self.started = time.monotonic()
        self.kinds: dict[str, _Work] = {}
        self.stages: dict[tuple[str, str], _Work] = {}

    def start(self) -> None:
        self.started = time.monotonic()

    def stop(self, *, whole: bool) -> None:
        if whole:  # what nobody counted is done all the same
            for kind, one in self.kinds.items():
                self._end(kind, one)

    def begin(self, kind: str, total: int) -> None:
        earlier = self.kinds.get(kind)
        if earlier and not earlier.ended:
            earlier.total += total
        else:
            self.kinds[kind] = _Work.now(total)
        self._write(kind if total == 1 else f"{kind}: {total} to do")
        if total == 0:
            self._end(kind, self.kinds[kind])

    def update(self, kind: str, *, done: int | None = None, advance: int | None = None, detail: str = "") -> None:
        one = self.kinds[kind]
        one.done = (one.done if done is None else done) + (advance or 0)
        if one.done >= one.total:
            self._end(kind, one)
        elif one.due():
            self._write(f"{kind}: {one.done} of {one.total}" + (f", {detail}" if detail else ""))

    def found(self, kind: str) -> None:
        one = self.kinds[kind]
        one.done, one.entered, one.found = one.done + 1, one.entered + 1, one.found + 1
        if one.done >= one.total:
            self._end(kind, one)

    def enter(self, kind: str, name: str) -> None:
        if (kind, name) in self.stages:
            return
        of = self.kinds[kind]
        of.entered += 1
        of.since = time.monotonic() if of.since is None else of.since
        self.stages[kind, name] = _Work.now()
        self._write(f"{kind} {of.entered} of {of.total}: {name}")

    def step(self, kind: str, name: str, step: _Step) -> None:
        one = self.stages.setdefault((kind, name), _Work.now())
        one.first = one.first or step
        if one.due():
            self._write(f"{kind} {name}: step {step.done} of {step.total}{step.told(one.first)}")

    def leave(self, kind: str, name: str) -> None:
        of, one = self.kinds[kind], self.stages.pop((kind, name), None) or _Work.now()
        of.done += 1
        took = time.monotonic() - one.begun
        if took >= FIRST:  # what is quick needs no second line
            self._write(f"{kind} {name}: done in {_clock(took)}, {of.left()}")
        if of.done >= of.total:
            self._end(kind, of)

    def _end(self, kind: str, one: _Work) -> None:
        if not one.ended:
            one.ended = True
            found = f", {one.found} of {one.total} were there already" if one.found else ""
            self._write(f"{kind}: done in {_clock(time.monotonic() - one.begun)}{found}")

    def _write(self, text: str) -> None:
        self.file.write(f"{_clock(time.monotonic() - self.started):>8}  {printable(text)}\n")
        self.file.flush()


def _clock(seconds: float) -> str:
    """Return hours, minutes and seconds: 0:07, 1:02:33."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
