"""A checkpoint's safetensors as streams: read the headers, and write a shard in which some weights take their update.

What no update touches is copied byte by byte; an adapted weight becomes W + dW in row blocks, summed in float32
(float64 for a float64 weight) and rounded once to the weight's own dtype. Memory is one update and a few blocks,
whatever the size of the shard. The library checks every header read here; the bytes are written by hand, because
`save_file` wants all tensors of a file in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loraloom.adapters.update import Update
from loraloom.errors import LoraloomError
from loraloom.files.hashing import Seen
from loraloom.files.tensors import read_header

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BLOCK = 1 << 20  # bytes: float32 copies of a block stay in the processor's cache
_AHEAD = 32  # blocks by which writing may be ahead of hashing
_HINT = "nothing was written; use a smaller scale, or convert the base to bfloat16 or float32 first"


@dataclass(frozen=True)
class Part:
    """One tensor of a shard: `size` bytes in `file` from `start`, or those of `whole`.

    `modules` names the updates that are added to it, none for most: each to its own (rows, columns) = `matrix`, one
    matrix after another. An update's rows are taken from `first` on. `transposed`: updates are (columns, rows).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    file: Seen
    start: int = 0
    whole: Tensor | None = None
    modules: tuple[str, ...] = ()
    matrix: tuple[int, int] = (0, 0)
    first: int = 0
    transposed: bool = False


@dataclass(frozen=True)
class Shard:
    """A safetensors file: the bytes of its header with their length before them, and its tensors as the bytes lie."""

    header: bytes
    parts: Sequence[Part]


def read_shard(path: Path) -> Shard:
    """Read the header of a safetensors file. Raises ValueError where it is none; see `read_header`."""
    seen = Seen.of(path)  # first: what is read later must be of this file
    raw, _, entries = read_header(path)
    parts = [Part(name, entry.dtype, entry.shape, entry.size, seen, entry.start) for name, entry in entries.items()]
    return Shard(raw, sorted(parts, key=lambda part: (part.start, part.size)))


def extended(shard: Shard, added: Sequence[Part]) -> Shard:
    """Return `shard` with further tensors and a new header, metadata kept; nothing is written."""
    # widest dtype first, as the library writes: then every tensor is aligned, since each size divides by its own width
    parts = sorted([*shard.parts, *added], key=lambda part: -(part.size // max(1, math.prod(part.shape))))
    old = json.loads(shard.header[8:])
    header: dict[str, Any] = {"__metadata__": old["__metadata__"]} if "__metadata__" in old else {}
    start = 0
    for part in parts:
        header[part.name] = {"dtype": part.dtype, "shape": part.shape, "data_offsets": [start, start + part.size]}
        start += part.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return Shard(len(text).to_bytes(8, "little") + text, parts)


def write_shard(
    shard: Shard,
    path: Path,
    delta: Callable[[str], Update | Tensor],
    progress: Callable[[int], None],
) -> str:
    """Write `shard` to `path` with the updates that `delta` gives by module; return the file's sha256.

    `progress` is told the bytes of each block. Raises LoraloomError where a value does not fit its dtype.
    """
    sha = hashlib.sha256(shard.header)
    lag: deque[Future[None]] = deque()
    # hashlib, reads, writes and torch let go of the interpreter, so the hash keeps a second core busy
    with open(path, "wb") as file, ThreadPoolExecutor(1) as hasher:
        file.write(shard.header)
        for part in shard.parts:
            for block in _blocks(part, delta):
                file.write(block)
                lag.append(hasher.submit(sha.update, block))
                if len(lag) > _AHEAD:
                    lag.popleft().result()
                progress(len(block))
    return sha.hexdigest()


def _blocks(part: Part, delta: Callable[[str], Update | Tensor]) -> Iterator[memoryview]:
    """Yield the bytes of `part` as they are to be written."""
    if part.whole is not None:
        yield part.whole.contiguous().view(-1).view(torch.uint8).numpy().data
        return
    with part.file.open() as file:
        file.seek(part.start)
        for module in part.modules:
            yield from _fused(part, module, file, delta(module))
        for start in range(0, 0 if part.modules else part.size, _BLOCK):
            yield _read(file, min(_BLOCK, part.size - start)).data


def _fused(part: Part, module: str, file: BinaryIO, update: Update | Tensor) -> Iterator[memoryview]:
    """Yield the bytes of W + dW, for the matrix W (rows, cols) of `module` as stored in `file` from here on."""
    dtype = FLOATS[part.dtype]
    work = torch.float64 if dtype == torch.float64 else torch.float32
    rows, cols = part.matrix
    factors = [update.B, update.A] if isinstance(update, Update) else [update]
    factors = [factor.detach().to("cpu", work) for factor in factors]
    if part.transposed:
        factors = [factor.T for factor in reversed(factors)]  # (B A)^T = A^T B^T
    factors[0] = factors[0][part.first : part.first + rows]
    if (factors[0].shape[0], factors[-1].shape[1]) != (rows, cols):
        raise ValueError(f"delta({module!r}) is not of the shape that was announced")
    step = max(1, _BLOCK // (cols * dtype.itemsize))
    room = torch.empty(min(step, rows), cols, dtype=work)
    threads = torch.get_num_threads()
    # blocks are too small to share out: threads that wait for each other took ten times as long on a busy machine
    torch.set_num_threads(1)
    try:
        for start in range(0, rows, step):
            here = slice(start, min(start + step, rows))
            stored = _read(file, (here.stop - start) * cols * dtype.itemsize)
            weight = torch.from_numpy(stored).view(dtype).view(-1, cols)
            total = room[: here.stop - start].copy_(weight)
            if len(factors) == 2:
                total.addmm_(factors[0][here], factors[1])
            else:
                total.add_(factors[0][here])
            # rounding keeps order, so the least and the greatest tell for all; a nan is both
            if not torch.stack(torch.aminmax(total)).to(dtype).isfinite().all():
                raise LoraloomError(f"{part.file.path}: {part.name}: {_overflow(weight, dtype)}", _HINT)
            weight.copy_(total)
            yield stored.data
    finally:
        torch.set_num_threads(threads)


def _overflow(weight: Tensor, dtype: torch.dtype) -> str:
    if not weight.isfinite().all():
        return "holds values that are not finite, before any update"
    return f"overflows {str(dtype).removeprefix('torch.')} with its update added"


def _read(file: BinaryIO, size: int) -> npt.NDArray[np.uint8]:
    block = np.empty(size, dtype=np.uint8)
    if file.readinto(block.data) != size:  # type: ignore[attr-defined]
        raise LoraloomError(
            f"{file.name}: ended early: it changed while it was read", "nothing was written; start again"
        )
    return block
