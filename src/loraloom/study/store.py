"""Stage outputs keyed by what they depend on: staged, renamed into place, locked, never half-written.

A stage is done when its folder is in its place: the folder is renamed there last, whole. The key is the sha256 of the
canonical JSON of everything the output depends on: options with their defaults, the stage's version, the keys of the
stages before it, hashes of data and base model. Device, workers, paths and the readable label are no part of it.

Every file of an output is known by its sha256. It is read again where its time of writing is not what was recorded, and
what was changed is made anew. An edit that keeps size and time is not noticed.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import filelock

from loraloom.errors import LoraloomError, did_you_mean, reads_file
from loraloom.files.atomic import remove_leftovers, staged_folder, write_text
from loraloom.files.hashing import file_sha256, json_sha256, write_json
from loraloom.files.outputs import check_folder
from loraloom.study.remote import Remote, is_address, local_copy

RECORD = "stage.json"
_SHORT = 12  # characters of the key in names
_UNFINISHED, _FAILURES, _LOCKS, _NOTES = "unfinished", "failures", "locks", "notes"


@dataclass(frozen=True)
class Stage:
    """One unit of work: `kind` (statistics, train ...), a readable `label`, and what the output depends on.

    options: plain values.
    inputs: the stages whose outputs it reads.
    content: the sha256 of whatever else it reads: rows, files, the base model.
    version: of the code, raised where it computes something else.
    """

    kind: str
    label: str
    options: Mapping[str, Any]
    inputs: Mapping[str, Stage] = field(default_factory=dict)
    content: Mapping[str, str] = field(default_factory=dict)
    version: int = 1

    @cached_property
    def key(self) -> str:
        """Return the sha256 over all but the label. Raises TypeError for a value that JSON cannot hold."""
        reads = {**{name: stage.key for name, stage in self.inputs.items()}, **self.content}
        options = {name: _in_order(value) for name, value in self.options.items()}
        return json_sha256([self.kind, self.version, options, _in_order(reads)])

    @property
    def name(self) -> str:
        """Return what people call the output: kind/label-key."""
        return f"{self.kind}/{self.label}-{self.key[:_SHORT]}"


class Store:
    """A folder of stage outputs: <root>/<kind>/<label>-<key>/, each with stage.json.

    place: a folder, or an address of fsspec's: all outputs are then there too, and `root` is this machine's copy.
    `used` holds the records of all stages that it was asked for, by key.
    """

    def __init__(self, place: str | Path) -> None:
        self.place = str(place)
        self.remote = Remote(self.place) if is_address(place) else None
        self.root = local_copy(self.place.removesuffix("/stages")) / "stages" if self.remote else Path(place)
        self.used: dict[str, dict[str, Any]] = {}

    def get(self, stage: Stage, make: Callable[[Path, Path], None]) -> Path:
        """Return the folder of the stage's output; where it is absent or was tampered with, make it first.

        `make(folder, scratch)` writes into `folder`, which is renamed into place when it returns; `scratch` outlives a
        kill, for work that can be resumed, and is removed at the end. Two processes never make one stage at a time.
        A failure is recorded in <root>/failures and raised, never served as a result.
        """
        path = self.find(stage)
        if path is None:
            with self._lock(stage.key):
                # another process may have made it while this one waited
                path = self.find(stage) or self._make(stage, make)
                self.used[stage.key] = _read_record(path)
                if self.remote:
                    self.remote.put(stage.key, path, self.used[stage.key])
        return path

    def find(self, stage: Stage) -> Path | None:
        """Return the folder of the stage's whole output; None where it is absent or was tampered with."""
        path = self._found(stage.kind, stage.key)
        if self.remote and path is None:
            path = self.remote.get(stage.key, self.root)
        if path is not None:
            self.used[stage.key] = _read_record(path)
            if self.remote:  # where it was made, but not yet put
                self.remote.put(stage.key, path, self.used[stage.key])
        return path

    def note(self, stage: Stage, done: int, total: int, loss: float | None) -> None:
        """Keep a note that a stage is at work in this process, and how far it is."""
        path = self._note(stage.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        work = {"name": stage.name, "done": done, "total": total, "loss": loss}
        said = {**work, "host": socket.gethostname(), "process": os.getpid(), "at": time.time()}
        part = path.with_suffix(".part")
        write_json(part, said)
        os.replace(part, path)
        if self.remote:
            self.remote.note(stage.key, said)

    def noted(self, stage: Stage) -> dict[str, Any] | None:
        """Return the note of a stage at work, if there is one."""
        note = _read_note(self._note(stage.key))
        return self.remote.read_note(stage.key) if self.remote and note is None else note

    def notes(self) -> list[dict[str, Any]]:
        """Return the notes of all stages at work, in whatever process."""
        return [note for path in sorted((self.root / _NOTES).glob("*.json")) if (note := _read_note(path))]

    def forget(self, stage: Stage) -> None:
        """Remove the note of a stage that is no longer at work."""
        with suppress(OSError):
            self._note(stage.key).unlink()
        if self.remote:
            self.remote.forget(stage.key)

    def tidy(self) -> None:
        """Remove what killed runs left half-written, but for scratch that can be resumed and stages now in work."""
        for folder in (*self.root.glob("*"), *(self.root / _FAILURES).glob("*")):
            remove_leftovers(folder)
        for note in (self.root / _NOTES).glob("*"):
            with suppress(filelock.Timeout), self._lock(note.stem, timeout=0):
                note.unlink(missing_ok=True)
        for folder in (self.root / _UNFINISHED).glob("*"):
            with suppress(filelock.Timeout), self._lock(folder.name, timeout=0):
                if any(self.root.glob(f"*/*-{folder.name}/{RECORD}")):
                    shutil.rmtree(folder, ignore_errors=True)

    def seconds(self) -> dict[str, float]:
        """Return the seconds that the stages asked for took when they were computed, by kind."""
        total: dict[str, float] = {}
        for record in self.used.values():
            total[record["kind"]] = round(total.get(record["kind"], 0.0) + record["seconds"], 3)
        return total

    def outputs(self) -> dict[str, dict[str, Any]]:
        """Return the stage.json of every whole output, by its name (kind/label-key)."""
        found = {}
        for path in sorted(self.root.glob(f"*/*/{RECORD}")):
            folder = path.parent
            if not folder.name.startswith(".") and _is_whole(folder):
                found[f"{folder.parent.name}/{folder.name}"] = _read_record(folder)
        return found

    def failures(self) -> dict[str, str]:
        """Return the message of every stage that failed last time, by its name."""
        paths = sorted((self.root / _FAILURES).glob("*/*.txt"))
        return {f"{path.parent.name}/{path.stem}": path.read_text(encoding="utf-8").strip() for path in paths}

    def explain(self, name: str) -> dict[str, Any]:
        """Return what the output `name` depends on: options, hashes, and inputs, each with `present` and its own.

        Raises LoraloomError where there is no such output.
        """
        record = self._known(name)
        inputs = {}
        for key, upstream in record["inputs"].items():
            path = self._found(upstream.split("/")[0], upstream[-_SHORT:])
            found = f"{path.parent.name}/{path.name}" if path else upstream
            inputs[key] = {"output": found, "present": path is not None}
            if path is not None:
                inputs[key]["inputs"] = self.explain(found)["inputs"]
        return {"output": name, "options": record["options"], "content": record.get("content", {}), "inputs": inputs}

    def remove(self, name: str) -> None:
        """Remove one output by its name. Raises LoraloomError where it is absent."""
        record = self._known(name)
        with self._lock(record["key"]):
            check_folder(self.root / name, kind=record["kind"], overwrite=True)
            shutil.rmtree(self.root / name, ignore_errors=True)

    def lock(self, name: str) -> filelock.BaseFileLock:
        """Return the lock of `name`, which one process holds at a time; it falls open when its holder dies."""
        folder = self.root / _LOCKS
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LoraloomError(
                f"{self.root}: cannot be written: {error.strerror}", "choose another folder (--output)"
            ) from error
        return filelock.FileLock(folder / f"{name}.lock")

    def _make(self, stage: Stage, make: Callable[[Path, Path], None]) -> Path:
        path = self.root / stage.name
        scratch = self.root / _UNFINISHED / stage.key[:_SHORT]
        failure = self.root / _FAILURES / f"{stage.name}.txt"
        started, worked = time.monotonic(), time.process_time()
        try:
            # what is there was tampered with, or it would have been found
            with staged_folder(path, kind=stage.kind, overwrite=True) as folder:
                make(folder, scratch)
                files, written = _sealed(folder)
                record = {
                    "kind": stage.kind,
                    "label": stage.label,
                    "key": stage.key,
                    "version": stage.version,
                    "options": dict(stage.options),
                    "content": dict(stage.content),
                    "inputs": {name: upstream.name for name, upstream in stage.inputs.items()},
                    "seconds": round(time.monotonic() - started, 3),
                    "cpu_seconds": round(time.process_time() - worked, 3),
                    "written": written,
                    "files": files,
                }
                write_json(folder / RECORD, record)
        except Exception as error:
            # a full disk must not hide the fault that filled it
            with suppress(LoraloomError):
                write_text(failure, f"{type(error).__name__}: {error}\n", overwrite=True)
            raise
        shutil.rmtree(scratch, ignore_errors=True)
        failure.unlink(missing_ok=True)
        return path

    def _note(self, key: str) -> Path:
        return self.root / _NOTES / f"{key[:_SHORT]}.json"

    def _found(self, kind: str, key: str) -> Path | None:
        """Return the folder of a whole output, whatever it is labelled."""
        for path in (self.root / kind).glob(f"*-{key[:_SHORT]}"):
            if _is_whole(path) and _read_record(path)["key"].startswith(key):
                return path
        return None

    def _known(self, name: str) -> dict[str, Any]:
        known = self.outputs()
        if name not in known:
            raise LoraloomError(f"{self.root}: no whole output {name!r}", did_you_mean(name, known) if known else "")
        return known[name]

    def _lock(self, key: str, timeout: float = -1) -> filelock.BaseFileLock:
        lock = self.lock(key[:_SHORT])
        lock.timeout = timeout
        return lock


def study_store(folder: Path) -> Store:
    """Return the store of a study folder. Raises LoraloomError where there is none."""
    if not (folder / "stages").is_dir():
        raise LoraloomError(f"{folder}: not a study folder: it has no stages/", "name the folder of `loraloom run`")
    return Store(folder / "stages")


def _in_order(value: Any) -> Any:
    """Return mappings as lists of pairs: the order of tasks that are merged counts, and that of PEFT's patterns."""
    if isinstance(value, Mapping):
        return [[key, _in_order(one)] for key, one in value.items()]
    return [_in_order(one) for one in value] if isinstance(value, list) else value


def _sealed(folder: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Return size and sha256 of every file in `folder`, and the time that all of them now say they were written at.

    A minute back, on a second that any file system can tell: a later write shows by it, however coarse its clock.
    """
    written = (time.time_ns() // 10**9 // 2 * 2 - 60) * 10**9
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            files[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            os.utime(path, ns=(written, written))
    return files, written


def _is_whole(folder: Path) -> bool:
    """Tell whether every file of an output is there as it was written; further files do not count."""
    try:
        record = _read_record(folder)
        return all(_is_kept(folder / name, **file, written=record["written"]) for name, file in record["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _is_kept(path: Path, bytes: int, sha256: str, written: int) -> bool:
    """Tell whether a file has this size and, unless it still says it was `written` then, this sha256."""
    found = path.stat()
    if found.st_size != bytes:
        return False
    return found.st_mtime_ns == written or _sha256(path, found.st_mtime_ns) == sha256


@functools.cache
def _sha256(path: Path, written: int) -> str:
    """Return the sha256 of a file, read once for every time of writing."""
    return file_sha256(path)


def _read_note(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None  # it has just gone


@reads_file
def _read_record(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / RECORD).read_text(encoding="utf-8")))
