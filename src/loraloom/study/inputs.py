"""What stages read: earlier outputs, rows, texts, the base model and files, each known by a hash of its content."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from loraloom.errors import LoraloomError
from loraloom.files.hashing import file_sha256, json_sha256
from loraloom.model.load import base_folder, base_sha256
from loraloom.model.runner import in_bfloat16
from loraloom.settings import Precision
from loraloom.study.store import Stage
from loraloom.tasks.task import Task


@dataclass(frozen=True)
class Output:
    """The output of an earlier stage; to another process it goes when it is made."""

    stage: Stage
    _made: Path | Callable[[], Path]

    @property
    def path(self) -> Path:
        """Return its folder, which is waited for. Raises what the stage, or one that it needs, raised."""
        return self._made if isinstance(self._made, Path) else self._made()

    def __reduce__(self) -> tuple[Any, ...]:
        return Output, (self.stage, self.path)

    @property
    def key(self) -> str:
        """Return the stage's key."""
        return self.stage.key


@dataclass(frozen=True)
class Rows:
    """A task's rows with their labels, and what its metric is."""

    task: Task
    key: str

    @classmethod
    def of(cls, task: Task) -> Rows:
        """Return what the digest of `task` covers of it, and no more."""
        return cls(replace(task, description="", source={}), task.digest())


@dataclass(frozen=True)
class Texts:
    """Texts, or pairs of texts, without labels."""

    rows: Dataset
    key: str

    @classmethod
    def of(cls, rows: Dataset) -> Texts:
        """Return the texts in `rows`."""
        texts = rows.select_columns([name for name in ("text_a", "text_b", "history") if name in rows.column_names])
        return cls(texts, json_sha256(texts.to_list()))


@dataclass(frozen=True)
class Base:
    """The base model in `folder`, as a language model where it `generates`, run in this precision.

    Adapters record its `name`, which like a label is no part of the key.
    """

    name: str
    folder: str
    key: str
    generates: bool = False
    precision: Precision = "float32"

    @classmethod
    def of(cls, base: str, *, generates: bool = False, precision: Precision = "float32") -> Base:
        """Return the base model of this name on the hub, or in this folder. Raises LoraloomError as `load` does."""
        folder = base_folder(base)
        sha256 = base_sha256(folder)
        half = ["bfloat16"] if in_bfloat16(precision) else []
        key = json_sha256(["generates", sha256, *half]) if generates else sha256
        return cls(base, folder, key, generates, precision)


@dataclass(frozen=True)
class Local:
    """A file that the user named; or a folder, and the names of what is read of it."""

    path: Path
    key: str
    names: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise LoraloomError where what was read is no longer what the key was made of."""
        again = Local.folder(self.path, *self.names) if self.names else Local.file(self.path)
        if again.key != self.key:
            raise LoraloomError(f"{self.path}: changed while it was read", "run it again when nobody writes there")

    @classmethod
    def file(cls, path: Path) -> Local:
        """Return a file."""
        return cls(path, _sha256(path))

    @classmethod
    def folder(cls, path: Path, *names: str) -> Local:
        """Return a folder of which the files of these names are read; one may be missing, which its reader tells."""
        return cls(path, json_sha256({name: _sha256(path / name) for name in names}), names)


Input = Output | Rows | Texts | Base | Local  # two of one key are read alike, wherever they lie, whatever their names


def _sha256(path: Path) -> str:
    return file_sha256(path) if os.path.isfile(path) else "missing"
