"""How long work tells where it stands: one bar a kind of stage on a terminal, nothing where nobody looks."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Reporter:
    """Shows progress on standard error while used as a context; silent when quiet or not a terminal."""

    def __init__(self, *, quiet: bool = False) -> None:
        console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[detail]}"),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Reporter:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def begin(self, kind: str, total: int) -> None:
        """Announce `total` stages of one kind."""
        self._tasks[kind] = self._bars.add_task(kind, total=total, detail="")

    def detail(self, kind: str, text: str) -> None:
        """Say what the kind is at. The kind must have begun."""
        self._bars.update(self._tasks[kind], detail=text)

    def reach(self, kind: str, count: int) -> None:
        """Say that `count` stages of the kind are done."""
        self._bars.update(self._tasks[kind], completed=count)

    def advance(self, kind: str) -> None:
        """Count one stage of the kind as done."""
        self._bars.update(self._tasks[kind], advance=1, detail="")
