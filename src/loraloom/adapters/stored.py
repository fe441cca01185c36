"""The tensors of an adapter's files: checked once, then read layer by layer at each access."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from loraloom.adapters.update import Form, Shape, Update
from loraloom.errors import LoraloomError, first_few, raise_problems
from loraloom.files.reading import read_json_object
from loraloom.files.tensors import StoredFile

WEIGHTS = "adapter_model.safetensors"
INDEX = ".index.json"  # follows the name of the whole file
_SHARD = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.safetensors")
# as safetensors names them
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)
_ZERO = "is empty: saved under DeepSpeed's ZeRO-3 without gathering its parts?"


class WeightFiles(NamedTuple):
    """The files of an adapter's weights: its one file, or its shards in order.

    fault: what is missing, or nothing. places: each tensor's shard by name, where an index tells it.
    """

    paths: list[Path]
    fault: str = ""
    places: Mapping[str, str] | None = None


def weight_files(folder: Path, name: str = WEIGHTS) -> WeightFiles:
    """Return the file of that name in `folder`, or else its shards.

    Raises LoraloomError for an index that cannot be read.
    """
    if (folder / name).is_file():
        return WeightFiles([folder / name])
    stem = name.removesuffix(".safetensors")
    shards = {path: match for path in sorted(folder.iterdir()) if (match := shard_of(path.name, stem))}
    if (folder / f"{name}{INDEX}").is_file():
        places, files = _read_index(folder / f"{name}{INDEX}")
        missing = [file for file in files if not (folder / file).is_file()]
        return WeightFiles([folder / file for file in files if file not in missing], _missing(missing), places)
    if shards:
        count = max(int(match["count"]) for match in shards.values())
        parts = sorted(set(range(1, count + 1)) - {int(match["part"]) for match in shards.values()})
        return WeightFiles(list(shards), _missing([f"{stem}-{part:05d}-of-{count:05d}.safetensors" for part in parts]))
    if (folder / f"{stem}.bin").is_file():
        pickle = f"{stem}.bin is a pickle, which may run code: load it in PEFT and save it as safetensors"
        return WeightFiles([], pickle)
    return WeightFiles([], f"{name} is missing: half-written?")


def shard_of(name: str, stem: str | None = None) -> re.Match[str] | None:
    """Return what the name of a shard says, of the file without its ending where `stem` is given; None of others."""
    match = _SHARD.fullmatch(name)
    return match if match and stem in (None, match["stem"]) else None


def _missing(names: list[str]) -> str:
    return f"{', '.join(names[:3])} is missing: half-written?" if names else ""


def _read_index(path: Path) -> tuple[dict[str, str], list[str]]:
    """Return what an index says: each tensor's file, and the files, which must lie beside it."""
    places = read_json_object(path, "save the adapter again").get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise LoraloomError(f"{path}: holds no weight_map of tensors to files", "save the adapter again")
    files = sorted(set(places.values()))
    foreign = [file for file in files if Path(file).name != file or not file.endswith(".safetensors")]
    raise_problems(
        str(path), [f"weight_map: {file!r:.80}: no safetensors file beside it" for file in foreign], "save it again"
    )
    return places, files


class Place(NamedTuple):
    """Where the factors of one module's update stand, by the names of the tensors, and what B is multiplied by.

    transposed: whether both lie transposed there.
    """

    A: str
    B: str
    scaling: float
    form: Form | None = None
    transposed: bool = False


class StoredTensors(Mapping[str, Tensor]):
    """Tensors of an adapter's files by name, read at each access: nothing stays in memory.

    float8 comes as bfloat16, which holds its every value.
    """

    def __init__(self, files: Mapping[str, StoredFile], names: Mapping[str, str]) -> None:
        self.files = files
        self.names = names

    def __getitem__(self, name: str) -> Tensor:
        """Return one tensor. Raises LoraloomError where the file has gone or changed."""
        key = self.names[name]
        tensor = self.files[key][key]
        return tensor.to(torch.bfloat16) if tensor.dtype in _EIGHT_BITS else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class StoredUpdates(Mapping[str, Update]):
    """The updates of an adapter's files, read and scaled at each access; see `StoredTensors`."""

    def __init__(
        self, files: Mapping[str, StoredFile], places: Mapping[str, Place], shapes: Mapping[str, Shape]
    ) -> None:
        self.places = places
        self.shapes = shapes
        self._tensors = StoredTensors(files, {key: key for place in places.values() for key in place[:2]})
        self._last: tuple[str, Tensor, Tensor] | None = None  # the experts of a layer stand in one tensor

    def __getitem__(self, module: str) -> Update:
        """Return B with alpha/r folded in, and A. Raises LoraloomError where the file has gone or changed."""
        place = self.places[module]
        form = place.form
        if form and form.kind == "experts":
            last = self._last  # which another thread may replace meanwhile
            if last is None or last[0] != form.module:
                last = self._last = form.module, *self._factors(place)
            _, A, B = last
            A = A.reshape(form.count, -1, A.shape[1])[form.index].clone()
            B = B.reshape(B.shape[0], -1, form.count)[..., form.index].clone()
        else:
            A, B = self._factors(place)
            A, B = A.flatten(1), B.flatten(1)
        return Update(B.mul_(place.scaling), A)

    def _factors(self, place: Place) -> tuple[Tensor, Tensor]:
        A, B = (self._tensors[key].to(torch.float32) for key in (place.A, place.B))
        return (A.T.contiguous(), B.T.contiguous()) if place.transposed else (A, B)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class Checked(NamedTuple):
    """What was found of one tensor: its shape, its dtype, its largest magnitude, and what is wrong with it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    largest: float
    fault: str


def check_tensors(
    paths: list[Path], places: Mapping[str, str] | None = None
) -> tuple[dict[str, Checked], dict[str, StoredFile]]:
    """Return what is in the files, tensor by tensor, and each tensor's file.

    places: each tensor's file by name, where an index tells it.

    Raises ValueError for a file that cannot be read, a tensor in two of them, and one that is not where the index says.
    """
    files: dict[str, StoredFile] = {}
    for file in map(StoredFile, paths):
        twice = next((key for key in file if key in files), None)
        if twice is not None:
            raise ValueError(f"tensor {twice} is in {files[twice].path.name} and in {file.path.name}")
        files.update(dict.fromkeys(file, file))
    if places is not None:
        lost = sorted(key for key, name in places.items() if key not in files or files[key].path.name != name)
        lost += sorted(set(files) - set(places))
        if lost:
            raise ValueError(f"the index and the shards differ in tensor {first_few(lost)}")
    return {key: _checked(file, key) for key, file in files.items()}, files


def whole_problems(tensors: Mapping[str, Checked]) -> list[str]:
    """Return what is wrong with tensors that PEFT saved whole, by parameter path: empty, not finite, an unfit bias."""
    problems = [f"tensor {path} {one.fault}" for path, one in tensors.items() if one.fault]
    for path, weight in tensors.items():
        bias = tensors.get(f"{path.removesuffix('.weight')}.bias") if path.endswith(".weight") else None
        # a Conv1D of GPT-2 keeps its outputs last
        if bias and not (bias.fault or weight.fault) and bias.shape not in (weight.shape[:1], weight.shape[-1:]):
            problems.append(f"tensor {path} of {weight.shape} does not fit its bias of {bias.shape}")
    return problems


def _checked(file: StoredFile, key: str) -> Checked:
    kind, shape = file.entries[key][:2]
    if kind not in _FLOATS:
        return Checked(shape, torch.float32, 0.0, f"is of {kind}: weights are floating-point numbers")
    if 0 in shape:
        return Checked(shape, torch.float32, 0.0, _ZERO if shape == (0,) else "is empty: of rank 0")
    tensor = file[key]
    dtype = torch.bfloat16 if tensor.dtype in _EIGHT_BITS else tensor.dtype
    largest = max(abs(float(one)) for one in torch.aminmax(tensor.to(dtype)))
    return Checked(shape, dtype, largest, "" if math.isfinite(largest) else "holds values that are not finite")
