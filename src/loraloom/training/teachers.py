"""What single models answer to unlabelled texts, computed once and kept on disk, part by part: a kill costs one part.

A folder a teacher, named by a hash of everything that its answers hang on: base, adapter, texts, how they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from loraloom.errors import LoraloomError, collecting
from loraloom.files.atomic import staged_file
from loraloom.files.tensors import read_header, save_tensors
from loraloom.model.processes import raise_of_all, rank_and_size

PART = 128  # texts of a file
LAYOUT = 2  # of what lessons keep here; counted up where an older one would be misread


class Teacher:
    """The answers of one single model by text, read from disk at access; `make` computes those of some texts.

    folder: of the parts. texts: how many there are. make: returns tensors by name of the texts of a range. Under a
    launcher every process makes some of the parts that are not there yet, and all wait for each other.
    """

    def __init__(self, folder: Path, texts: int, make: Callable[[range], Mapping[str, Tensor]]) -> None:
        self.folder, self.texts = folder, texts
        process, size = rank_and_size()
        errors: list[LoraloomError] = []
        with collecting(errors):
            folder.mkdir(parents=True, exist_ok=True)
            for number, start in enumerate(range(0, texts, PART)):
                if number % size == process and not _is_whole(self._part(number)):
                    with staged_file(self._part(number), overwrite=True) as place:
                        save_tensors(make(range(start, min(start + PART, texts))), place)
        raise_of_all(errors)

    def whole(self, name: str) -> Tensor:
        """Return one tensor of all texts, in their order."""
        return torch.cat([self._read(number, name) for number in range(-(-self.texts // PART))])

    def rows(self, name: str, indices: Sequence[int]) -> Tensor:
        """Return the rows of a tensor that has one row a text."""
        return torch.stack([self._read(index // PART, name, index % PART, index % PART + 1)[0] for index in indices])

    def span(self, name: str, number: int, start: int, end: int) -> Tensor:
        """Return the rows from `start` to `end` of a tensor in the part of this number."""
        return self._read(number, name, start, end)

    def _read(self, number: int, name: str, start: int = 0, end: int | None = None) -> Tensor:
        with safe_open(self._part(number), framework="pt") as file:
            found: Tensor = file.get_slice(name)[start:end]
            return found

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:05}.safetensors"


def _is_whole(path: Path) -> bool:
    try:
        read_header(path)
    except ValueError:
        return False
    return True
