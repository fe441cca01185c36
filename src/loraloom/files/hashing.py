"""Every sha256, derived seed and JSON text: equal content gives equal values, in every process and version."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from loraloom.errors import LoraloomError

_READ = 1 << 20  # bytes at a time
_SAMPLES, _SAMPLE = 1024, 1 << 16  # blocks of a large file, and bytes of each


def text_sha256(text: str) -> str:
    """Return the sha256 of a text as UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def json_sha256(content: Any) -> str:
    """Return the sha256 of the canonical JSON of plain values: keys sorted, no spaces.

    Raises TypeError for a value that JSON cannot hold, ValueError for a number that is not finite.
    """
    return text_sha256(json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False))


class Seen(NamedTuple):
    """A file as it was when it was looked at first, by which it is told from what stands in its place later."""

    path: Path
    state: tuple[int, ...]

    @classmethod
    def of(cls, path: Path) -> Seen:
        """Return the file that is at `path` now. Raises OSError where there is none."""
        return cls(path, _state(os.stat(path)))

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the file to read it. Raises LoraloomError where it has gone, or has changed since or meanwhile."""
        try:
            file = open(self.path, "rb")  # noqa: SIM115 (closed below)
        except OSError as error:
            raise self.gone(error.strerror or str(error)) from error
        with file:
            for moment in ("before", "after"):
                if _state(os.fstat(file.fileno())) != self.state:
                    raise self.gone("it changed while it was used")
                if moment == "before":
                    yield file

    def gone(self, why: str) -> LoraloomError:
        """Return what to raise where the file is no longer what it was."""
        return LoraloomError(f"{self.path}: cannot be read any more ({why})", "was it replaced? start again")


def file_sha256(*paths: Path) -> str:
    """Return the sha256 of a file, or of several one after another. Raises OSError where one cannot be read."""
    return seen_sha256(Seen.of(path) for path in paths)


def seen_sha256(files: Iterable[Seen]) -> str:
    """Return the sha256 of files one after another. Raises LoraloomError where one is not what was seen."""
    sha = hashlib.sha256()
    for seen in files:
        with seen.open() as file:
            while block := file.read(_READ):
                sha.update(block)
    return sha.hexdigest()


def sampled_sha256(paths: Iterable[Path]) -> str:
    """Return a sha256 over names, sizes and contents of files: of one above 64 MiB, evenly spaced blocks alone.

    Raises OSError where one cannot be read.
    """
    sha = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        sha.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for start in range(0, size, max(_SAMPLE, size // _SAMPLES)):
                file.seek(start)
                sha.update(file.read(_SAMPLE))
    return sha.hexdigest()


def task_seed(seed: int, task: str) -> int:
    """Return a seed of the task's own, drawn from the study's seed and the task's name."""
    return int(text_sha256(f"{seed}/{task}")[:7], 16)


def layer_seed(seed: int, module: str) -> int:
    """Return a seed that depends on the layer's name, not on its place among the layers."""
    return int(text_sha256(f"{seed}:{module}")[:14], 16)


def json_text(content: Any, *, sort_keys: bool = False) -> str:
    """Return JSON for a file that people read too. Raises LoraloomError naming a number that is not finite."""
    try:
        return json.dumps(content, indent=2, sort_keys=sort_keys, allow_nan=False) + "\n"
    except ValueError as error:
        fault = next(_not_finite(content, ""), None)
        if fault is None:
            raise
        raise LoraloomError(f"{fault}: not finite, which JSON cannot hold", "nothing was written") from error


def write_json(path: Path, content: Any, *, sort_keys: bool = False) -> None:
    """Write `json_text` to a file of a folder that is being made; elsewhere use `atomic.write_text`."""
    path.write_text(json_text(content, sort_keys=sort_keys), encoding="utf-8")


def _state(found: os.stat_result) -> tuple[int, ...]:
    """Return what tells one state of a file from the next: its place on the disk, its size, its last change."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _not_finite(content: Any, at: str) -> Iterator[str]:
    """Yield the place and value of every number that is not finite."""
    if isinstance(content, float) and not math.isfinite(content):
        yield f"{at.lstrip('.')} is {content}"
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _not_finite(value, f"{at}.{key}")
    elif isinstance(content, list | tuple):
        for index, value in enumerate(content):
            yield from _not_finite(value, f"{at}.{index}")
