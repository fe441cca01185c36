"""Runs stages: functions of inputs and options, whose outputs a store keeps by exactly what the function was given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from pydantic import BaseModel

from loraloom.model.generator import Generator
from loraloom.model.runner import Evaluator
from loraloom.progress import Reporter
from loraloom.study.inputs import Base, Input, Local, Output
from loraloom.study.store import Stage, Store

P = ParamSpec("P")
Model = TypeVar("Model", Evaluator, Generator)


@dataclass(frozen=True)
class Reading:
    """How rows are read: tokens kept of a text, and rows of a batch."""

    max_length: int
    batch_size: int


@dataclass(frozen=True)
class Context:
    """What a stage may use beside its inputs and options; none of it changes what the stage computes.

    scratch: a folder that outlives a kill, for work that can be resumed.
    evaluator, generator: give a base model, which stays loaded from one stage to the next, reading rows as asked.
    progress: is told how many steps of all are done.
    """

    scratch: Path
    evaluator: Callable[[Base, Reading], Evaluator]
    generator: Callable[[Base, Reading], Generator]
    progress: Callable[[int, int], None]

    def model(self, base: Base, reading: Reading) -> Evaluator | Generator:
        """Return the base model as what it is to be: one that writes, or one that gives features for heads."""
        return self.generator(base, reading) if base.generates else self.evaluator(base, reading)


@dataclass(frozen=True)
class StageFunction(Generic[P]):
    """A function that writes a stage's output into a folder, and what its outputs are filed under.

    `version` is raised by hand where the code changes what it computes.
    """

    kind: str
    version: int
    write: Callable[Concatenate[Path, Context, P], None]

    def stage(self, label: str, *args: P.args, **given: P.kwargs) -> Stage:
        """Return the stage for these arguments: every one of them is in its key, as an input or as an option.

        Raises TypeError for an argument that is neither an input, nor inputs by name, nor a plain value.
        """
        assert not args  # all arguments of a stage have names
        inputs: dict[str, Stage] = {}
        content: dict[str, str] = {}
        options: dict[str, Any] = {}
        for name, value in given.items():
            read = _inputs(name, value)
            if not read:
                options[name] = _plain(value)
            for key, one in read.items():
                if isinstance(one, Output):
                    inputs[key] = one.stage
                else:
                    content[key] = one.key
        return Stage(self.kind, label, options, inputs, content, self.version)


def stage(kind: str, *, version: int) -> Callable[[Callable[Concatenate[Path, Context, P], None]], StageFunction[P]]:
    """Make a stage of a function (folder, context, *, inputs and options): it writes its output into `folder`."""
    return partial(StageFunction, kind, version)


class Engine:
    """Runs stages over a store, and keeps the one base model that they use in memory."""

    def __init__(self, store: Store, reporter: Reporter) -> None:
        self.store = store
        self.reporter = reporter
        self.loaded: Evaluator | Generator | None = None
        self._asked: object = None  # what it was loaded by

    def expect(self, function: StageFunction[Any], count: int) -> None:
        """Announce `count` stages of one function, to show how far they are."""
        self.reporter.begin(function.kind, count)

    def do(self, function: StageFunction[P], label: str, *args: P.args, **given: P.kwargs) -> Output:
        """Return the output of `function` for these arguments, from the store where it is there already.

        `label` is for people alone. Stages of the function must be expected.
        """
        stage = function.stage(label, *args, **given)
        self.reporter.detail(function.kind, label)

        def make(folder: Path, scratch: Path) -> None:
            context = Context(scratch, self.evaluator, self.generator, partial(self._show, function.kind, label))
            function.write(folder, context, *args, **given)
            for one in (one for name, value in given.items() for one in _inputs(name, value).values()):
                if isinstance(one, Local):
                    one.check()

        path = self.store.get(stage, make)
        self.reporter.advance(function.kind)
        return Output(stage, path)

    def evaluator(self, base: Base, reading: Reading) -> Evaluator:
        """Return the base model that gives features for heads, loaded where it is not, that reads rows as asked."""
        return self._loaded(Evaluator, base, reading)

    def generator(self, base: Base, reading: Reading) -> Generator:
        """Return the base model that writes, loaded where it is not, that reads rows as asked."""
        return self._loaded(Generator, base, reading, precision=base.precision)

    def _loaded(self, of: type[Model], base: Base, reading: Reading, **options: Any) -> Model:
        asked = (base.folder, options)
        if not isinstance(self.loaded, of) or self._asked != asked:
            self.loaded = None  # two large ones would not fit
            self.loaded, self._asked = of(base.folder, **options), asked
        found = copy(self.loaded)
        found.max_length, found.batch_size = reading.max_length, reading.batch_size
        return found

    def unload(self) -> None:
        """Let the base model go, to make room for another use of the memory."""
        self.loaded = None

    def _show(self, kind: str, label: str, done: int, total: int) -> None:
        self.reporter.detail(kind, f"{label} step {done}/{total}")


def _inputs(name: str, value: object) -> dict[str, Input]:
    """Return what an argument reads, by name; nothing where it is an option."""
    named = {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, Mapping) else {name: value}
    found = {key: one for key, one in named.items() if isinstance(one, Input)}
    return found if len(found) == len(named) else {}


def _plain(value: Any) -> Any:
    """Return an option as JSON can hold it, whole. Raises TypeError for what is no plain value, as a path."""
    if isinstance(value, BaseModel):
        return {name: _plain(getattr(value, name)) for name in type(value).model_fields}
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{value!r} is no plain value: it cannot be an option of a stage")
