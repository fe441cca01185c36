"""Moments in a safetensors file: written whole, checked one at a time, read at each access. It may come from anyone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loraloom.errors import LoraloomError, raise_problems
from loraloom.files.atomic import staged_file
from loraloom.files.tensors import all_finite
from loraloom.statistics.moments import Moment

_DTYPES = {"total": torch.float64, "rows": torch.float32, "gram": torch.float64, "factor": torch.float32}
_AGAIN = "collect the statistics again"


def save_moments(moments: Mapping[str, Moment], path: Path, metadata: Mapping[str, str]) -> None:
    """Write `moments` and `metadata` as one file, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    counts, lost = {}, {}
    for name, moment in moments.items():
        tensors |= {
            f"{name}.{part}": value.contiguous() for part in _DTYPES if (value := getattr(moment, part)) is not None
        }
        counts[name] = moment.count
        if moment.lost:
            lost[name] = moment.lost
    own = {"counts": json.dumps(counts), **({"lost": json.dumps(lost)} if lost else {})}
    with staged_file(path) as temporary:
        save_file(tensors, temporary, metadata={**metadata, **own})


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a file. Raises LoraloomError where it is absent or half-written."""
    if not path.is_file():
        raise LoraloomError(f"{path}: no such file", "name a file that was saved as statistics")
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise LoraloomError(f"{path}: cannot be read ({error}): half-written?", _AGAIN) from error


class StoredMoments(Mapping[str, Moment]):
    """The moments of a file by input, read at each access; the last one stays, for layers that share an input."""

    def __init__(self, path: Path, counts: Mapping[str, int], lost: Mapping[str, float]) -> None:
        self.path = path
        self.counts = counts
        self.lost = lost
        self._last: tuple[str, Moment] | None = None

    @classmethod
    def of(cls, path: Path, metadata: Mapping[str, str]) -> StoredMoments:
        """Return the moments that `metadata` tells of. Raises KeyError, ValueError, ... where it is damaged."""
        counts = {str(name): int(count) for name, count in json.loads(metadata["counts"]).items()}
        lost = {str(name): float(value) for name, value in json.loads(metadata.get("lost", "{}")).items()}
        return cls(path, counts, lost)

    def __getitem__(self, name: str) -> Moment:
        """Return one moment. Raises LoraloomError where the file has gone or changed."""
        if self._last is None or self._last[0] != name:
            count = self.counts[name]
            try:
                # opened anew, so that the pages of one input are given back before the next
                with safe_open(self.path, framework="pt") as file:
                    there = set(file.keys())
                    # copied: what is mapped must not outlive the file
                    parts = {
                        part: file.get_tensor(f"{name}.{part}").clone() for part in _DTYPES if f"{name}.{part}" in there
                    }
            except (SafetensorError, OSError) as error:
                raise LoraloomError(f"{self.path}: cannot be read any more ({error})", "was it replaced?") from error
            self._last = name, Moment(count, lost=self.lost.get(name, 0.0), **parts)
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self.counts)

    def __len__(self) -> int:
        return len(self.counts)

    def check(self, widths: Mapping[str, set[int]]) -> None:
        """Raise LoraloomError telling all that does not fit; `widths` are those that the layers of an input read.

        Names and shapes first, then values, input by input, so that no more than one is in memory.
        """
        with safe_open(self.path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        problems = [f"input {name!r} of a layer has no moment" for name in sorted(widths.keys() - self.counts.keys())]
        problems += [
            f"lost names {name!r}, which has no moment" for name in sorted(self.lost.keys() - self.counts.keys())
        ]
        for name in self.counts:
            problems += self._shape_faults(name, widths.get(name, set()), shapes)
        known = {f"{name}.{part}" for name in self.counts for part in _DTYPES}
        problems += [f"tensor {name} belongs to no input" for name in sorted(shapes.keys() - known)]
        raise_problems(str(self.path), problems, _AGAIN)
        impossible = []
        for name in self.counts:
            wrong = self._value_faults(name)
            problems += wrong
            impossible += [] if wrong else [f"{name}: {fault}" for fault in self[name].faults()]
        raise_problems(str(self.path), problems, _AGAIN)
        raise_problems(str(self.path), impossible, "do not use this file: no layer inputs give it; ask for it again")

    def _shape_faults(self, name: str, widths: set[int], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        count, lost = self.counts[name], self.lost.get(name, 0.0)
        problems = [f"{name}: {count} rows"] if count < 0 else []
        if not (math.isfinite(lost) and lost >= 0):
            problems.append(f"{name}: lost is {lost}")
        if len(widths) != 1:
            return [*problems, f"{name}: read by layers of widths {sorted(widths)}, not of one"]
        (n,) = widths
        found = {part: shape for part in _DTYPES if (shape := shapes.get(f"{name}.{part}")) is not None}
        factor: Any = found.get("factor", ())
        fits: list[dict[str, tuple[int, ...]]] = [{"total": (n,), "rows": (count, n)}, {"total": (n,), "gram": (n, n)}]
        if len(factor) == 2 and factor[0] <= n:
            fits.append({"total": (n,), "factor": (factor[0], n)})
        if found not in fits:
            problems.append(f"{name}: {found} does not fit {count} rows of width {n}")
        if "rows" in found and lost:
            problems.append(f"{name}: rows that lost {lost}")
        return problems

    def _value_faults(self, name: str) -> list[str]:
        parts = {part: value for part in _DTYPES if (value := getattr(self[name], part)) is not None}
        problems = []
        for part, value in parts.items():
            if value.dtype != _DTYPES[part]:
                problems.append(f"{name}.{part}: is {value.dtype}, not {_DTYPES[part]}")
            elif not all_finite(value):
                problems.append(f"{name}.{part}: holds values that are not finite")
        return problems
