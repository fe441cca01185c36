"""Runs stages: functions of inputs and options, whose outputs a store keeps by exactly what the function was given.

A study asks an engine for outputs, each of which may be waited for. The engine hands a stage to its runner when the
stages before it are done. Where a stage then runs is the runner's affair: here, in processes, on a cluster. All that
runners share is the store.
"""

from __future__ import annotations

import importlib
import pickle
import socket
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

from pydantic import BaseModel

from loraloom.errors import LoraloomError
from loraloom.model.generator import Generator
from loraloom.model.runner import Evaluator
from loraloom.progress import Reporter
from loraloom.study.inputs import Base, Input, Local, Output
from loraloom.study.store import Stage, Store
from loraloom.training.runs import Progress, Reports

P = ParamSpec("P")
Model = TypeVar("Model", Evaluator, Generator)
_TURN, _NOTED = 0.5, 1.0  # seconds between two looks at the notes of stages at work, and between two notes


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
    unload: lets that base model go, to make room for another use of the memory.
    progress: is told how many steps of all are done, and the training loss where there is one.
    reports: where else a training's curves go.
    """

    scratch: Path
    evaluator: Callable[[Base, Reading], Evaluator]
    generator: Callable[[Base, Reading], Generator]
    unload: Callable[[], None]
    progress: Progress
    reports: Reports | None

    def model(self, base: Base, reading: Reading) -> Evaluator | Generator:
        """Return the base model as what it is to be: one that writes, or one that gives features for heads."""
        return self.generator(base, reading) if base.generates else self.evaluator(base, reading)


@dataclass(frozen=True)
class StageFunction(Generic[P]):
    """A function that writes a stage's output into a folder, and what its outputs are filed under.

    `version` is raised by hand where the code changes what it computes. Another process knows it by its name.
    """

    kind: str
    version: int
    write: Callable[Concatenate[Path, Context, P], None]

    def __reduce__(self) -> tuple[Any, ...]:
        return _by_name, (self.write.__module__, self.write.__qualname__)

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


@dataclass(frozen=True)
class Call:
    """One stage with its function, its inputs and its options: all that a process needs to run it, wherever it is."""

    stage: Stage
    function: StageFunction[Any]
    given: Mapping[str, Any]

    def over(self, store: Store) -> Call:
        """Return the call with the outputs that it reads where this process has them, by its own view of the store."""
        return replace(self, given={name: _over(value, store) for name, value in self.given.items()})

    @property
    def inputs(self) -> list[Input]:
        """Return what the stage reads."""
        return [one for name, value in self.given.items() for one in _inputs(name, value).values()]


class Worker:
    """Runs stages over a store, one after another, and keeps the one base model that they use in memory."""

    def __init__(self, store: Store, report_to: Sequence[str] = ()) -> None:
        self.store = store
        self.report_to = report_to
        self.loaded: Evaluator | Generator | None = None
        self._asked: object = None  # what it was loaded by

    def run(self, call: Call, progress: Progress) -> None:
        """Have the output of a stage in the store, made by its function where it is not there."""

        def make(folder: Path, scratch: Path) -> None:
            logs = self.store.root.parent / "logs" / call.stage.label
            reports = Reports(self.report_to, logs) if self.report_to else None
            context = Context(scratch, self.evaluator, self.generator, self.unload, progress, reports)
            call.function.write(folder, context, **call.given)
            for one in call.inputs:
                if isinstance(one, Local):
                    one.check()

        self.store.get(call.stage, make)

    def answer(self, call: Call) -> Exception | None:
        """Run a stage for another process; return its failure, if any, as it can be sent there.

        A note in the store tells meanwhile how far it is, for those who look on from elsewhere.
        """
        stage, again = call.stage, 0.0

        def note(done: int, total: int, loss: float | None = None) -> None:
            nonlocal again
            if time.monotonic() >= again:
                self.store.note(stage, done, total, loss)
                again = time.monotonic() + _NOTED

        note(0, 0)
        try:
            self.run(call.over(self.store), note)
        except Exception as error:
            return _sendable(error)
        finally:
            self.store.forget(stage)
        return None

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


class Runner(Protocol):
    """Where stages run. Their outputs land in the store, and what they say while they run too (`Store.notes`)."""

    def submit(self, call: Call) -> None:
        """Have a stage run, now or when there is room; all that it reads is in the store."""

    def wait(self, seconds: float) -> list[tuple[str, Exception | None]]:
        """Return the keys of stages that have ended since, each with its failure; wait so long for a first one."""

    def close(self) -> None:
        """End what still runs; it can be gone on with."""


class Here:
    """Runs every stage at once, in this process, and shows its steps itself."""

    def __init__(self, worker: Worker, reporter: Reporter) -> None:
        self.worker = worker
        self.reporter = reporter
        self.ended: list[tuple[str, Exception | None]] = []

    def submit(self, call: Call) -> None:
        """Run a stage to its end."""
        stage = call.stage
        self.reporter.enter(stage.kind, stage.label)
        self.worker.run(call, partial(self.reporter.step, stage.kind, stage.label))
        self.ended.append((stage.key, None))

    def wait(self, seconds: float) -> list[tuple[str, Exception | None]]:
        """Return the keys of the stages that have run since."""
        ended, self.ended = self.ended, []
        return ended

    def close(self) -> None:
        """Do nothing: what was submitted has run."""


class Engine:
    """Gives the outputs of stages: from the store, or by its runner as soon as what they read is there."""

    def __init__(self, store: Store, reporter: Reporter, runner: Runner) -> None:
        self.store = store
        self.reporter = reporter
        self.runner = runner
        self.made: dict[str, Path] = {}
        self.waiting: list[Call] = []
        self.running: dict[str, Call] = {}
        self.failed: dict[str, Exception] = {}

    def expect(self, function: StageFunction[Any], count: int) -> None:
        """Announce `count` stages of one function, to show how far they are."""
        self.reporter.begin(function.kind, count)

    def do(self, function: StageFunction[P], label: str, *args: P.args, **given: P.kwargs) -> Output:
        """Return the output of `function` for these arguments, from the store where it is there already.

        `label` is for people alone. Stages of the function must be expected. The output may still be in work: who asks
        for its path waits for it, and is told of whatever failed. Where stages run here, all is told at once.
        """
        stage = function.stage(label, *args, **given)
        found = self.store.find(stage)
        if found is not None:
            self.made[stage.key] = found
        if stage.key in self.made or stage.key in self._asked():
            self.reporter.found(function.kind)
        else:
            self.waiting.append(Call(stage, function, given))
            self._turn(0)
        return Output(stage, self.made.get(stage.key) or partial(self._path, stage.key))

    def settle(self) -> None:
        """Wait until what runs has ended, well or not; what failed is told to who asks for its path."""
        while self.running:
            self._turn(_TURN)

    def _asked(self) -> set[str]:
        return {call.stage.key for call in self.waiting} | self.running.keys()

    def _path(self, key: str) -> Path:
        while key not in self.made:
            if self.failed:  # its own failure, or the first of any: a study needs all of them
                raise self.failed.get(key) or next(iter(self.failed.values()))
            self._turn(_TURN)
        return self.made[key]

    def _turn(self, seconds: float) -> None:
        """Submit what can run, and take what has ended, which is waited for as long."""
        for call in [one for one in self.waiting if all(key in self.made for key in _outputs(one))]:
            self.waiting.remove(call)
            self.runner.submit(call)
            self.running[call.stage.key] = call
        for key, failure in self.runner.wait(seconds):
            stage = self.running.pop(key).stage
            self.store.forget(stage)  # where it was killed
            path = self.store.find(stage)
            if failure is not None or path is None:
                gone = LoraloomError(f"{self.store.root}: {stage.name} was made and is gone", "run the same again")
                self.failed[key] = failure or gone
                continue
            self.made[key] = path
            self.reporter.enter(stage.kind, stage.label)
            self.reporter.leave(stage.kind, stage.label)
        for call in self.running.values():
            stage, note = call.stage, self.store.noted(call.stage)
            if note:
                self.reporter.enter(stage.kind, stage.label)
            if note and note["total"]:
                self.reporter.step(stage.kind, stage.label, note["done"], note["total"], note["loss"])


def _over(value: Any, store: Store) -> Any:
    """Return an argument with every output in it where `store` has it. Raises LoraloomError where it has none."""
    if isinstance(value, Mapping):
        return {name: _over(one, store) for name, one in value.items()}
    if not isinstance(value, Output):
        return value
    path = store.find(value.stage)
    if path is None:
        hint = "the machines of a cluster share the study's folder at the same path, or its address (-o s3://...)"
        raise LoraloomError(f"{socket.gethostname()}: {store.place} has no {value.stage.name}, made elsewhere", hint)
    return Output(value.stage, path)


def _sendable(error: Exception) -> Exception:
    """Return an exception that can be sent to another process, with its traceback, which would stay here, as a note."""
    there = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    vars(error)["__notes__"] = [there]  # as `add_note` of Python 3.11 keeps it
    return error


def _outputs(call: Call) -> list[str]:
    """Return the keys of the outputs that a stage reads."""
    return [one.key for one in call.inputs if isinstance(one, Output)]


def _by_name(module: str, name: str) -> StageFunction[Any]:
    """Return the stage function that a module has by this name."""
    found: StageFunction[Any] = getattr(importlib.import_module(module), name)
    return found


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
