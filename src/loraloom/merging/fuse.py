"""Fuse updates into a base model's checkpoint: a new folder, written shard by shard, without loading the model."""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from loraloom.adapters.beside import displaced
from loraloom.adapters.update import Update
from loraloom.errors import LoraloomError, raise_problems
from loraloom.files.atomic import staged_folder
from loraloom.files.hashing import file_sha256, write_json
from loraloom.files.outputs import check_folder
from loraloom.files.tensors import write_files
from loraloom.merging.checkpoint import CONFIG, INDEX, Checkpoint, files_beside, read_checkpoint
from loraloom.merging.placement import Changes, Placement, place
from loraloom.merging.shards import Shard, write_shard

SUMS = "SHA256SUMS"
FUSED = "fused checkpoint"  # the kind of result


@dataclass(frozen=True)
class FusedFacts:
    """What was written: `folder`, its `size` in bytes, and the `sha256` of every file by name.

    `tensors` maps each adapted module to the tensor that took its update; `replaced` and `added` name the tensors of
    the head; `config` holds what config.json says and the base's does not; `untied`: lm_head.weight is a tensor of its
    own now; `classified`: config.json tells of the head's class and labels, or none was added; `left_out` names what of
    the base was not copied.
    """

    folder: Path
    size: int
    sha256: dict[str, str]
    tensors: dict[str, str]
    replaced: list[str]
    added: list[str]
    config: dict[str, Any]
    untied: bool
    classified: bool
    left_out: list[str]


def fuse(
    base: Path,
    output: Path,
    changes: Changes,
    delta: Callable[[str], Update | Tensor],
    *,
    files: Mapping[str, str] | None = None,
    carried: Mapping[str, bytes] | None = None,
    extra: Mapping[str, Mapping[str, Tensor]] | None = None,
    overwrite: bool = False,
    inputs: Sequence[Path] = (),
    progress: Callable[[int, int], None] | None = None,
) -> FusedFacts:
    """Write to `output` the checkpoint in folder `base` with every update added; it appears whole or not at all.

    - base: the checkpoint's folder. What it is, is read from its config.json and the headers of its shards alone; links
      that lead out of it are not followed, and code in it is not run.
    - changes: which modules have updates, and the head.
    - delta: gives a module's dW: an Update or a dense (m, n) tensor, float32 or float64. It is called in the order of
      the shards, once a module unless the checkpoint has an expert's weights far apart.
    - files, extra: further text files, and further safetensors files, by name.
    - carried: files of the adapters, such as a tokenizer with tokens of its own, in place of the base's of these names.
    - overwrite: replace an earlier fused checkpoint.
    - inputs: folders that must stay as they are, as the base does.
    - progress: is told the bytes done and those of all shards.

    `sha256sum -c SHA256SUMS` checks the folder. Raises LoraloomError that tells all problems before anything is
    written; for a value that does not fit its weight's dtype when it is met, with nothing left behind.
    """
    where: dict[str, Any] = {"kind": FUSED, "overwrite": overwrite, "inputs": [base, *inputs]}
    found, placed = prepare(base, output, changes, overwrite=overwrite)
    with staged_folder(output, **where) as staged:
        sha256 = _write_shards(placed, staged, delta, progress)
        _write_index(found, placed.shards, staged)
        left_out = _copy_files(found, staged, displaced(carried or ()))
        if placed.config:
            write_json(staged / CONFIG, {**found.config, **placed.config})
        for name, content in (carried or {}).items():
            (staged / name).write_bytes(content)
        write_files(staged, files or {}, extra or {})
        written = {path.relative_to(staged).as_posix(): path for path in sorted(staged.rglob("*")) if path.is_file()}
        sha256 |= {name: file_sha256(path) for name, path in written.items() if name not in sha256}
        sums = "".join(f"{sha256[name]}  {name}\n" for name in sorted(sha256))
        (staged / SUMS).write_text(sums, encoding="utf-8")
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    return FusedFacts(
        output,
        size,
        sha256,
        placed.tensors,
        replaced=[name for name in placed.heads if name in found.parts],
        added=[name for name in placed.heads if name not in found.parts],
        config=placed.config,
        untied=placed.untied,
        classified=placed.classified,
        left_out=left_out,
    )


def prepare(base: Path, output: Path, changes: Changes, *, overwrite: bool = False) -> tuple[Checkpoint, Placement]:
    """Return what `fuse` would write and from what. Raises LoraloomError that tells all problems."""
    found, problems = read_checkpoint(base)
    problems = _output_problems(base, output, overwrite) + problems
    placed, misfits = place(found, changes) if found else (None, [])
    problems += misfits + (_space_problems(output, placed.size) if placed else [])
    raise_problems(f"cannot fuse into {base}", problems, "nothing was written")
    assert found
    assert placed
    return found, placed


def _output_problems(base: Path, output: Path, overwrite: bool) -> list[str]:
    try:
        check_folder(output, kind=FUSED, overwrite=overwrite, inputs=[base])
    except LoraloomError as error:
        return [f"{error.message}: {error.hint}"]
    return []


def _space_problems(output: Path, size: int) -> list[str]:
    there = next(path for path in [output.absolute(), *output.absolute().parents] if path.is_dir())
    free = shutil.disk_usage(there).free
    return [f"{output}: needs {size / 1e9:.1f} GB where {free / 1e9:.1f} GB are free"] if free < size else []


def _write_shards(
    placed: Placement,
    staged: Path,
    delta: Callable[[str], Update | Tensor],
    progress: Callable[[int, int], None] | None,
) -> dict[str, str]:
    """Write every shard and return their sha256."""
    total, done = placed.size, 0

    def tell(size: int) -> None:
        nonlocal done
        done += size
        if progress:
            progress(done, total)

    modules = Counter(module for shard in placed.shards.values() for part in shard.parts for module in part.modules)
    remembered = lru_cache(2)(delta)  # of an expert, whose gate and output the checkpoint has apart

    def once(module: str) -> Update | Tensor:
        return remembered(module) if modules[module] > 1 else delta(module)

    sha256 = {}
    with ThreadPoolExecutor(1) as flusher:  # the disk works while the next shard is computed
        flushed = []
        for name, shard in placed.shards.items():
            sha256[name] = write_shard(shard, staged / name, once, tell)
            flushed.append(flusher.submit(_flush, staged / name))
        for future in flushed:
            future.result()
    return sha256


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _copy_files(base: Checkpoint, staged: Path, displaced: Set[str]) -> list[str]:
    """Copy what the model needs beside its weights, but for the `displaced`; return the names of what else there is."""
    needed, left_out = files_beside(base)
    for name in needed:
        if name not in displaced:
            (staged / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(base.folder / name, staged / name)  # the content, where the hub's cache has a link
    return sorted({*left_out, *(displaced & set(needed))})


def _write_index(base: Checkpoint, shards: Mapping[str, Shard], staged: Path) -> None:
    """Write the index with the added tensors; as it was where there are none."""
    if base.index is None:
        return
    added = [part for shard in shards.values() for part in shard.parts if part.name not in base.parts]
    if not added:
        shutil.copyfile(base.folder / INDEX, staged / INDEX)
        return
    metadata = dict(base.index.get("metadata") or {})
    if isinstance(metadata.get("total_size"), int):
        metadata["total_size"] += sum(part.size for part in added)
    if isinstance(metadata.get("total_parameters"), int):
        metadata["total_parameters"] += sum(math.prod(part.shape) for part in added)
    weight_map = {**base.index["weight_map"], **{part.name: max(shards) for part in added}}
    write_json(staged / INDEX, {**base.index, "metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
