"""Safetensors files: whole, or tensor by tensor, so that no more than one is in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraloom.errors import LoraloomError, reads_file

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
_METADATA = {"format": "pt"}
_ENTRY = 160  # bytes of a tensor's entry in the header beside its name, at most


class TensorFile:
    """Writes tensors one after another and the header last, into room kept free for it.

    `names` are all that may be added: they size the header, which the format lets end in spaces. safetensors' own
    `save_file` wants every tensor at once.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self._names = set(names)
        self._room = 64 + sum(len(json.dumps(name)) + _ENTRY for name in self._names)
        self._room += -self._room % 8
        self._entries: dict[str, object] = {"__metadata__": _METADATA}
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
        header = json.dumps(self._entries, separators=(",", ":")).encode()
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._file.close()


def all_finite(tensor: Tensor) -> bool:
    """Tell whether every value is finite: the extremes tell it, twenty times faster than a mask of all values."""
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


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
