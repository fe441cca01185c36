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
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loraloom.adapters.update import Update
from loraloom.errors import LoraloomError

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BLOCK = 1 << 20  # bytes: float32 copies of a block stay in the processor's cache
_AHEAD = 32  # blocks by which writing may be ahead of hashing
_HINT = "nothing was written; use a smaller scale, or convert the base to bfloat16 or float32 first"


@dataclass(frozen=True)
class Part:
    """One tensor of a shard: `size` bytes in `file` from `start`, or those of `whole`.

    `module` names the update that is added to it, "" for none; `transposed`: the tensor is (n, m), the update (m, n).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    file: Path
    start: int = 0
    whole: Tensor | None = None
    module: str = ""
    transposed: bool = False


@dataclass(frozen=True)
class Shard:
    """A safetensors file: the bytes of its header with their length before them, and its tensors as the bytes lie."""

    header: bytes
    parts: Sequence[Part]


@dataclass(frozen=True)
class Checkpoint:
    """A base model's folder: its config, shards by file name, every tensor by name, and the index where it has one."""

    folder: Path
    config: dict[str, Any]
    shards: dict[str, Shard]
    parts: dict[str, Part]
    index: dict[str, Any] | None

    def owns(self, part: Part) -> bool:
        """Tell whether `part` is the one that its name stands for: another shard may hold a stale copy."""
        return self.parts.get(part.name) is part


def read_checkpoint(folder: Path, problems: list[str]) -> Checkpoint | None:
    """Return what the checkpoint holds; or None, with `problems` longer by all that is wrong with it."""
    before = len(problems)
    config = _read_json(folder / CONFIG, problems)
    index, home = None, {}
    if (folder / SINGLE).is_file():  # as transformers does: one file goes before an index
        names = [SINGLE]
    elif (folder / INDEX).is_file():
        index = _read_json(folder / INDEX, problems)
        home = dict(index.get("weight_map") or {})
        names = sorted(set(map(str, home.values())))
        if index and not names:
            problems.append(f"{INDEX}: names no shards: download it again")
    else:
        problems.append(_no_safetensors(folder))
        return None
    shards = {}
    for name in names:
        if Path(name).name != name:
            problems.append(f"{INDEX}: names {name!r}, which is not a file of this folder")
            continue
        try:
            shards[name] = read_shard(folder / name)
        except FileNotFoundError:
            problems.append(f"{name}: missing, though {INDEX} names it: download it again")
        except (SafetensorError, OSError, ValueError) as error:
            problems.append(f"{name}: cannot be read ({error}): download it again")
    own = [part for file, shard in shards.items() for part in shard.parts if home.get(part.name, file) == file]
    parts = {part.name: part for part in own}
    astray = [name for name, file in home.items() if file in shards and name not in parts]
    problems += each(astray, lambda name: f"{home[name]}: lacks tensor {name}, which {INDEX} places there")
    return None if len(problems) > before else Checkpoint(folder, config, shards, parts, index)


def _read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        problems.append(f"{path.name}: not a JSON object: download it again")
    except OSError as error:
        problems.append(f"{path.name}: cannot be read ({error.strerror}): name a folder that transformers can load")
    except ValueError as error:
        problems.append(f"{path.name}: not valid JSON ({error}): download it again")
    return {}


def _no_safetensors(folder: Path) -> str:
    others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".safetensors", ".pt", ".gguf"))
    pickle = next((name for name in others if name.endswith(".bin")), None)
    if pickle:
        convert = "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        return f"{pickle} is a pickle, which may run code: convert it, with the model's own class: `{convert}`"
    beside = f"; it holds {', '.join(others[:3])}" if others else ""
    return f"holds neither {SINGLE} nor {INDEX}{beside}: name the folder of a whole model in safetensors"


def each(names: Sequence[str], tell: Callable[[str], str]) -> list[str]:
    """Tell of the first three, and how many more there are."""
    return [tell(name) for name in names[:3]] + ([f"and {len(names) - 3} more like it"] if names[3:] else [])


def read_shard(path: Path) -> Shard:
    """Read the header of a safetensors file. Raises SafetensorError or OSError where it is not one, or cut short."""
    with safe_open(path, framework="pt"), open(path, "rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
    parts = []
    for name, entry in json.loads(header).items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            begin = 8 + len(header) + start
            parts.append(Part(name, entry["dtype"], tuple(entry["shape"]), end - start, path, begin))
    return Shard(length + header, sorted(parts, key=lambda part: (part.start, part.size)))


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
    with open(part.file, "rb") as file:
        file.seek(part.start)
        if part.module:
            yield from _fused(part, file, delta(part.module))
        else:
            for start in range(0, part.size, _BLOCK):
                yield _read(file, min(_BLOCK, part.size - start)).data


def _fused(part: Part, file: BinaryIO, update: Update | Tensor) -> Iterator[memoryview]:
    """Yield the bytes of W + dW, for W (rows, cols) as stored in `file` from here on."""
    dtype = FLOATS[part.dtype]
    work = torch.float64 if dtype == torch.float64 else torch.float32
    rows, cols = part.shape
    factors = [update.B, update.A] if isinstance(update, Update) else [update]
    factors = [factor.detach().to("cpu", work) for factor in factors]
    if part.transposed:
        factors = [factor.T for factor in reversed(factors)]  # (B A)^T = A^T B^T
    if (factors[0].shape[0], factors[-1].shape[1]) != (rows, cols):
        raise ValueError(f"delta({part.module!r}) is not of the shape that was announced")
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
                raise LoraloomError(f"{part.file}: {part.name}: {_overflow(weight, dtype)}", _HINT)
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
