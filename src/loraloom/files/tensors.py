"""Safetensors files: whole, or tensor by tensor, so that no more than one is in memory. They may come from anyone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraloom.errors import LoraloomError, reads_file
from loraloom.files.hashing import Seen
from loraloom.files.reading import check_fetched

# as the format names them: https://github.com/huggingface/safetensors
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_TORCH = {name: dtype for dtype, name in _DTYPES.items()}
MOST_TENSORS = 200_000  # in one file: the largest models, a trillion parameters in experts, have some 150,000
_HEADER = 16 << 20  # bytes of one file's header; 100,000 tensors take as many
_METADATA = {"format": "pt"}
_ENTRY = 160  # bytes of a tensor's entry in the header beside its name, at most


class TensorFile:
    """Writes tensors one after another and the header last, into room kept free for it.

    `names` are all that may be added: they size the header, which the format lets end in spaces. safetensors' own
    `save_file` wants every tensor at once, and shuffles `metadata`; here equal content gives equal bytes.
    """

    def __init__(self, path: Path, names: Iterable[str], metadata: Mapping[str, str] | None = None) -> None:
        self._names = set(names)
        self._entries: dict[str, object] = {"__metadata__": metadata or _METADATA}
        self._room = len(_compact(self._entries)) + sum(len(json.dumps(name)) + _ENTRY for name in self._names)
        self._room += -self._room % 8
        self._end = 0
        self._file = open(path, "wb")  # noqa: SIM115 (closed by `close`)
        self._file.seek(8 + self._room)

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor. Raises ValueError for a name that was not announced or is there already."""
        if name not in self._names or name in self._entries:
            raise ValueError(f"{name} was not announced, or was added before")
        whole = tensor.detach().to("cpu").contiguous()
        data = whole.flatten().view(torch.uint8).numpy()
        start, self._end = self._end, self._end + data.nbytes
        self._entries[name] = {
            "dtype": _DTYPES[whole.dtype],
            "shape": list(whole.shape),
            "data_offsets": [start, self._end],
        }
        data.tofile(self._file)

    def close(self) -> None:
        """Write the header and close the file; calling it twice does no harm."""
        if self._file.closed:
            return
        header = _compact(self._entries)
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._file.close()


def _compact(content: object) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


class Entry(NamedTuple):
    """One tensor of a safetensors file: its dtype as the format names it, its shape, and where its bytes lie."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class Header(NamedTuple):
    """The header of a safetensors file: its bytes with their length before them, its metadata, and its tensors."""

    raw: bytes
    metadata: dict[str, str]
    entries: dict[str, Entry]


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises ValueError that says why where it is none, is cut short, or has a header larger than any has; LoraloomError
    where Git left a pointer in its place.
    """
    try:
        check_fetched(path)
        with open(path, "rb") as file:
            length = file.read(8)
            if int.from_bytes(length, "little") > _HEADER:
                raise ValueError(f"a header of {int.from_bytes(length, 'little')} bytes")
            text = file.read(int.from_bytes(length, "little"))
        if text.count(b'"data_offsets"') > MOST_TENSORS:
            raise ValueError("more tensors than any model has")
        with safe_open(path, framework="pt"):  # its checks: nesting, offsets, sizes
            pass
    except (SafetensorError, OSError, RuntimeError) as error:  # the last where the system will not map so large a file
        raise ValueError(str(error)) from error
    found = json.loads(text)
    metadata = found.pop("__metadata__", None) or {}
    entries = {}
    for name, entry in found.items():
        start, end = entry["data_offsets"]
        entries[name] = Entry(entry["dtype"], tuple(entry["shape"]), len(length) + len(text) + start, end - start)
    return Header(length + text, metadata, entries)


class StoredFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file by name, read anew at each access: nothing stays in memory.

    entries: dtype, shape and place of every tensor. metadata: what the file says beside its tensors.

    Raises ValueError that says why where it is no such file; see `read_header`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.seen = Seen.of(path)  # first, so that a change while the header is read shows too
        except OSError as error:
            raise ValueError(str(error)) from error
        header = read_header(path)
        self.entries, self.metadata = header.entries, header.metadata

    def __getitem__(self, name: str) -> Tensor:
        """Return one tensor. Raises LoraloomError where the file has gone or changed since it was opened first."""
        entry = self.entries[name]
        dtype = _TORCH.get(entry.dtype)
        if dtype is None:
            raise LoraloomError(f"{self.path}: tensor {name} is of {entry.dtype}, which torch does not know")
        with self.seen.open() as file:
            try:
                data = _bytes_from(file, entry)
            except OSError as error:
                raise self.seen.gone(error.strerror or str(error)) from error
        return data.view(dtype).reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries


def _bytes_from(file: BinaryIO, entry: Entry) -> Tensor:
    data = torch.empty(entry.size, dtype=torch.uint8)
    file.seek(entry.start)
    if file.readinto(data.numpy().data) != entry.size:  # type: ignore[attr-defined]
        raise OSError("it ended early")
    return data


def all_finite(tensor: Tensor) -> bool:
    """Tell whether every value is finite: the extremes tell it, twenty times faster than a mask of all values."""
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of tensors by name: of names, dtypes, shapes and values, whatever their order."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        whole = tensors[name].detach().to("cpu").contiguous()
        sha.update(f"{name} {whole.dtype} {tuple(whole.shape)}".encode())
        sha.update(whole.flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors from any device as one safetensors file."""
    whole = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    save_file(whole, path, metadata=_METADATA)


def write_files(folder: Path, texts: Mapping[str, str], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write text files and safetensors files into `folder` by their names, which may lead into sub-folders."""
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    for name, content in tensors.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_tensors(content, folder / name)


@reads_file
def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a small safetensors file by name. Raises LoraloomError where it cannot be read."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise LoraloomError(f"{path}: cannot be read ({error}): half-written?", "write it again") from error
