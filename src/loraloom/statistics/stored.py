"""The moments in a statistics file, which may come from anyone: checked input by input, read at each access."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from loraloom.errors import raise_problems
from loraloom.files.tensors import Entry, StoredFile, all_finite
from loraloom.statistics.moments import Moment

# dtype of each part of a moment, and as the format names it
PARTS = {"total": torch.float64, "rows": torch.float32, "gram": torch.float64, "factor": torch.float32}
_LARGEST = 1e100  # energy of an input: far above float32's largest value squared, far below where float64 overflows
_NAMES = {torch.float64: "F64", torch.float32: "F32"}
_AGAIN = "collect the statistics again"
_COPIES = 4  # of a Gram matrix, while it is checked


class StoredMoments(Mapping[str, Moment]):
    """The moments of a file by input, read at each access; the last one stays, for layers that share an input.

    counts, lost: rows, and what was left out, of each input; see `Moment`.
    """

    def __init__(self, file: StoredFile, counts: Mapping[str, int], lost: Mapping[str, float]) -> None:
        self.file = file
        self.counts = counts
        self.lost = lost
        self._last: tuple[str, Moment] | None = None

    def __getitem__(self, name: str) -> Moment:
        """Return one moment. Raises LoraloomError where the file has gone or changed."""
        if self._last is None or self._last[0] != name:
            count, lost = self.counts[name], self.lost.get(name, 0.0)
            parts = {part: self.file[f"{name}.{part}"] for part in self._parts(name)}
            self._last = name, Moment(count, lost=lost, **parts)
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self.counts)

    def __len__(self) -> int:
        return len(self.counts)

    def __contains__(self, name: object) -> bool:
        return name in self.counts

    def check(self, widths: Mapping[str, set[int]]) -> None:
        """Raise LoraloomError telling all that does not fit; `widths` are those that the layers of an input read.

        Names and shapes first, then values, input by input, so that no more than one is in memory.
        """
        path = str(self.file.path)
        if len(self.counts) > len(self.file):
            raise_problems(path, [f"counts names {len(self.counts)} inputs, it holds {len(self.file)} tensors"], _AGAIN)
        problems = [f"input {name!r} of a layer has no moment" for name in sorted(widths.keys() - self.counts.keys())]
        problems += [
            f"lost names {name!r}, which has no moment" for name in sorted(self.lost.keys() - self.counts.keys())
        ]
        for name in self.counts:
            problems += self._shape_faults(name, widths.get(name, set()))
        known = {f"{name}.{part}" for name in self.counts for part in PARTS}
        problems += [f"tensor {name} belongs to no input" for name in sorted(self.file.entries.keys() - known)]
        raise_problems(path, problems, _AGAIN)
        size = _COPIES * max((entry.size for entry in self.file.entries.values()), default=0)
        free = free_memory()
        large = [f"its largest input takes {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"] if size > free else []
        raise_problems(path, large, "use a machine with more memory, or statistics collected with fewer --directions")
        impossible = []
        for name in self.counts:
            wrong = self._value_faults(name)
            problems += wrong
            impossible += [] if wrong else [f"{name}: {fault}" for fault in self[name].faults()]
        raise_problems(path, problems, _AGAIN)
        raise_problems(path, impossible, "do not use this file: no layer inputs give it; ask for it again")

    def _parts(self, name: str) -> dict[str, Entry]:
        """Return what the file holds of one input."""
        entries = {part: self.file.entries.get(f"{name}.{part}") for part in PARTS}
        return {part: entry for part, entry in entries.items() if entry is not None}

    def _shape_faults(self, name: str, widths: set[int]) -> list[str]:
        count, lost, parts = self.counts[name], self.lost.get(name, 0.0), self._parts(name)
        if len(widths) != 1:
            return [f"{name}: read by layers of widths {sorted(widths)}, not of one"]
        (n,) = widths
        found = {part: entry.shape for part, entry in parts.items()}
        fits: list[dict[str, tuple[int, ...]]] = [{"total": (n,), "gram": (n, n)}]
        if count < n:  # as many rows or more are kept as a Gram matrix
            fits.append({"total": (n,), "rows": (count, n)})
        factor = found.get("factor", ())
        if len(factor) == 2 and factor[0] <= n:
            fits.append({"total": (n,), "factor": (factor[0], n)})
        problems = [] if found in fits else [f"{name}: {found} does not fit {count} rows of width {n}"]
        if lost > _LARGEST or ("rows" in found and lost):
            problems.append(f"{name}: {' and '.join(found)} that lost {lost}")
        for part, entry in parts.items():
            if entry.dtype != _NAMES[PARTS[part]]:
                problems.append(f"{name}.{part}: is {entry.dtype}, not {_NAMES[PARTS[part]]}")
        return problems

    def _value_faults(self, name: str) -> list[str]:
        problems = []
        for part in self._parts(name):
            value = getattr(self[name], part)
            if not all_finite(value):
                problems.append(f"{name}.{part}: holds values that are not finite")
            elif value.numel() and float(torch.stack(torch.aminmax(value)).abs().max()) > _LARGEST:
                problems.append(f"{name}.{part}: holds values larger than any layer's inputs give")
        return problems


def free_memory() -> float:
    """Return the bytes of memory that are free; infinity where the system does not tell."""
    facts = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: *(\d+) kB", facts.read_text()) if facts.is_file() else None
    return 1024 * int(found[1]) if found else float("inf")
