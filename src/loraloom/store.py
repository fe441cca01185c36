"""Stage outputs keyed by what they depend on: staged, renamed into place, locked, never half-written.

A stage is done when its folder is in its place: the folder is renamed there last, whole. The key is the sha256 of the
canonical JSON of everything the output depends on: options with their defaults, the stage's version, the keys of the
stages before it, hashes of data and base model. Device, workers and paths are no part of it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from loraloom.atomic import staged_folder, write_text
from loraloom.errors import LoraloomError

RECORD = "stage.json"


@dataclass(frozen=True)
class Stage:
    """One unit of work: `kind` (statistics, train ...), a readable `label`, and what the output depends on."""

    kind: str
    label: str
    depends_on: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Return the sha256 over kind and dependencies. Raises TypeError for a value that JSON cannot hold."""
        text = json.dumps([self.kind, dict(self.depends_on)], sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


class Store:
    """A folder of stage outputs: <root>/<kind>/<label>-<key>/, each with stage.json."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.computed: list[Stage] = []

    def path(self, stage: Stage) -> Path:
        """Return where the stage's output lies or will lie."""
        return self.root / stage.kind / f"{stage.label}-{stage.key[:12]}"

    def has(self, stage: Stage) -> bool:
        """Tell whether the stage's output is whole."""
        return (self.path(stage) / RECORD).is_file()

    def get(self, stage: Stage, make: Callable[[Path, Path], None]) -> Path:
        """Return the folder of the stage's output; where it is absent, make it first.

        `make(folder, scratch)` writes into `folder`, which is renamed into place when it returns; `scratch` outlives a
        kill, for work that can be resumed, and is removed at the end. Two processes never make one stage at a time.
        A failure is recorded in <root>/failures and raised, never served as a result.
        """
        path = self.path(stage)
        if self.has(stage):
            return path
        scratch = self.root / "unfinished" / stage.key[:12]
        with self._lock(stage):
            # another process may have made it while this one waited
            if not self.has(stage):
                for stale in path.parent.glob(f".{path.name}.*"):
                    shutil.rmtree(stale, ignore_errors=True)
                started = time.monotonic()
                try:
                    with staged_folder(path) as folder:
                        make(folder, scratch)
                        record = {
                            "kind": stage.kind,
                            "label": stage.label,
                            "key": stage.key,
                            "depends_on": dict(stage.depends_on),
                            "seconds": round(time.monotonic() - started, 3),
                        }
                        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                except Exception as error:
                    self._record_failure(stage, error)
                    raise
                shutil.rmtree(scratch, ignore_errors=True)
                self._failure(stage).unlink(missing_ok=True)
                self.computed.append(stage)
        return path

    def seconds(self) -> dict[str, float]:
        """Return the seconds that each kind of stage took when it was computed, over every output in the store."""
        total: dict[str, float] = {}
        for record in self.records():
            total[record["kind"]] = total.get(record["kind"], 0.0) + record["seconds"]
        return total

    def records(self) -> list[dict[str, Any]]:
        """Return the stage.json of every whole output, by path."""
        paths = sorted(self.root.glob(f"*/*/{RECORD}"))
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths if not path.parent.name.startswith(".")]

    def remove(self, stage_folder: str | Path) -> None:
        """Remove one output, named as `status` shows it (kind/label-key). Raises LoraloomError where it is absent."""
        path = self.root / stage_folder
        if not (path / RECORD).is_file():
            raise LoraloomError(f"{path}: no such stage output", "see `loraloom study status`")
        shutil.rmtree(path)

    def _lock(self, stage: Stage) -> filelock.BaseFileLock:
        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        # the system drops this lock when its holder dies, so a killed run never blocks the next
        return filelock.FileLock(folder / f"{stage.key[:12]}.lock")

    def _failure(self, stage: Stage) -> Path:
        return self.root / "failures" / f"{stage.kind}-{stage.label}-{stage.key[:12]}.txt"

    def _record_failure(self, stage: Stage, error: Exception) -> None:
        try:
            write_text(self._failure(stage), f"{type(error).__name__}: {error}\n")
        except LoraloomError:
            # a full disk must not hide the fault that filled it
            return
