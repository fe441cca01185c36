"""Fuse updates into a base model's checkpoint: a whole new folder, written shard by shard, without loading the model.

What a checkpoint is, is read from its config.json and the names in its shards alone.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from loraloom.adapters.update import Update
from loraloom.errors import LoraloomError, did_you_mean, raise_problems
from loraloom.files.atomic import check_folder, staged_folder
from loraloom.files.hashing import file_sha256, write_json
from loraloom.files.tensors import all_finite, write_files
from loraloom.merging.shards import (
    CONFIG,
    FLOATS,
    INDEX,
    Checkpoint,
    Part,
    Shard,
    each,
    extended,
    read_checkpoint,
    write_shard,
)

SUMS = "SHA256SUMS"
_OUTPUT = "lm_head"
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in")
# other formats, and what a training run left; configs, tokenizers and code have none of these endings
_NOT_COPIED = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ot"),
    *(".tflite", ".npz", ".pkl", ".index.json", ".zip", ".tar", ".gz"),
)
_DEQUANTISE = "fuse into the base it was made from, or call `model.dequantize()` in transformers and save that"
_OWN = ("README.md", "loraloom.json", SUMS)  # they tell of the base, or are written anew
_SMALL = 128 << 20  # bytes; the largest tokenizers have some 40 MB


@dataclass(frozen=True)
class FusedFacts:
    """What was written: `folder`, its `size` in bytes, and the `sha256` of every file by name.

    `tensors` maps each adapted module to the tensor that took its update; `replaced` and `added` name the tensors of
    the head; `untied`: lm_head.weight is a tensor of its own now; `left_out` names what of the base was not copied.
    """

    folder: Path
    size: int
    sha256: dict[str, str]
    tensors: dict[str, str]
    replaced: list[str]
    added: list[str]
    untied: bool
    left_out: list[str]


def fuse(
    base: Path,
    output: Path,
    delta: Callable[[str], Update | Tensor],
    shapes: Mapping[str, tuple[int, int]],
    *,
    transposed: bool,
    head: Mapping[str, Tensor] | None = None,
    files: Mapping[str, str] | None = None,
    extra: Mapping[str, Mapping[str, Tensor]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FusedFacts:
    """Write to `output` the checkpoint in folder `base` with every update added; it appears whole or not at all.

    `shapes` gives (m, n) = (outputs, inputs) of every adapted module, `delta` its dW: an Update or a dense (m, n)
    tensor, float32 or float64; it is called once a module, in the order of the shards. `transposed` is the adapter's
    `fan_in_fan_out` (Conv1D keeps its weight as (n, m)); it decides where no shape does. `head` holds tensors that
    replace the base's or are added, by parameter path; `files` are further text files by name, `extra` further
    safetensors files. `progress` is told the bytes done and those of all shards. `sha256sum -c SHA256SUMS` checks it.

    Raises LoraloomError that tells all problems before anything is written; for a value that does not fit its
    weight's dtype when it is met, with nothing left behind.
    """
    problems = _place_problems(base, output)
    found = read_checkpoint(base, problems)
    if found:
        tensors, prefix = _resolve(shapes, found, problems)
        heads = _head_parts(head or {}, prefix, found, problems)
        untied = _unties(found, tensors, shapes, heads, problems)
        shards = _plan(found, shapes, tensors, transposed, heads, problems)
        problems += _space_problems(output, _size(shards))
    raise_problems(f"cannot fuse into {base}", problems, "nothing was written")
    assert found
    with staged_folder(output) as staged:
        sha256 = _write_shards(shards, staged, delta, progress)
        _write_index(found, shards, staged)
        left_out = _copy_files(found.folder, staged)
        if untied:
            write_json(staged / CONFIG, {**found.config, "tie_word_embeddings": False})
        write_files(staged, files or {}, extra or {})
        written = {path.relative_to(staged).as_posix(): path for path in sorted(staged.rglob("*")) if path.is_file()}
        rest = {name: path for name, path in written.items() if name not in sha256}
        sha256.update({name: file_sha256(path) for name, path in rest.items()})
        sums = "".join(f"{sha256[name]}  {name}\n" for name in sorted(sha256))
        (staged / SUMS).write_text(sums, encoding="utf-8")
        size = sum(path.stat().st_size for path in staged.rglob("*") if path.is_file())
    replaced = [name for name in heads if name in found.parts]
    added = [name for name in heads if name not in found.parts]
    return FusedFacts(output, size, sha256, tensors, replaced, added, untied, left_out)


def _place_problems(base: Path, output: Path) -> list[str]:
    here, there = base.resolve(), output.resolve()
    if here == there or here in there.parents or there in here.parents:
        return [f"{output}: is the base's folder, or one lies in the other: name a folder elsewhere"]
    try:
        check_folder(output)
    except LoraloomError as error:
        return [f"{error.message}: {error.hint}"]
    return []


def _space_problems(output: Path, size: int) -> list[str]:
    there = next(path for path in [output.absolute(), *output.absolute().parents] if path.is_dir())
    free = shutil.disk_usage(there).free
    return [f"{output}: needs {size / 1e9:.1f} GB where {free / 1e9:.1f} GB are free"] if free < size else []


def _resolve(
    shapes: Mapping[str, tuple[int, int]], base: Checkpoint, problems: list[str]
) -> tuple[dict[str, str], tuple[str, str]]:
    """Return each module's tensor, and the one (prefix taken off, prefix put on) by which all modules are found."""
    known = {name.rpartition(".")[0] for name in base.parts}
    # a tied output has no tensor, and transformers looks for it under its own name
    modules = sorted(module for module in shapes if module != _OUTPUT or module in known)
    missing = [module for module in modules if module not in known]
    prefix = ("", "")
    if missing:
        fitting = [one for one in _prefixes(modules[0], known) if all(_renamed(m, one) in known for m in modules)]
        if len(fitting) == 1:
            prefix = fitting[0]
        elif fitting:
            places = " or ".join(sorted(_renamed(modules[0], one) for one in fitting))
            problems.append(f"{modules[0]}: could be {places}: name the modules as the checkpoint does")
        else:
            problems += each(missing, lambda m: f"no module {m} in the checkpoint: {_nearest(m, known)}")
    tensors = {m: f"{_renamed(m, prefix)}.weight" for m in modules if _renamed(m, prefix) in known}
    if len(modules) < len(shapes):
        tensors[_OUTPUT] = f"{_OUTPUT}.weight"
    return tensors, prefix


def _nearest(module: str, known: set[str]) -> str:
    """Return a hint that stays short: paths that end in the same word, or else words that are like it."""
    ends = {name.rpartition(".")[2] for name in known}
    end = module.rpartition(".")[2]
    alike = {name for name in known if name.rpartition(".")[2] == end}
    return did_you_mean(module, alike) if alike else did_you_mean(end, ends)


def _prefixes(module: str, known: set[str]) -> set[tuple[str, str]]:
    parts = module.split(".")
    taken = {(".".join(parts[:count]) + ".", "") for count in range(1, len(parts))}
    return taken | {("", name.removesuffix(module)) for name in known if name.endswith(f".{module}")}


def _renamed(name: str, prefix: tuple[str, str]) -> str:
    off, on = prefix
    return on + name.removeprefix(off) if name.startswith(off) else name


def _head_parts(
    head: Mapping[str, Tensor], prefix: tuple[str, str], base: Checkpoint, problems: list[str]
) -> dict[str, Part]:
    """Return the head's tensors by their names in the checkpoint, in its dtype."""
    dtypes = [part.dtype for part in base.parts.values() if part.dtype in FLOATS]
    heads = {}
    for name, tensor in head.items():
        if ".base_layer." in name:  # PEFT's copy of the base's own weight, beside an update of it
            continue
        here = name if name in base.parts else _renamed(name, prefix)
        old = base.parts.get(here)
        dtype = old.dtype if old else max(sorted(set(dtypes)), key=dtypes.count, default="F32")
        shape = tuple(tensor.shape)
        if old and old.shape != shape:
            problems.append(
                f"{here}: is {_times(old.shape)}, the adapter's is {_times(shape)}: config.json would not fit"
            )
        elif dtype not in FLOATS:
            problems.append(f"{here}: is {dtype}, quantised: {_DEQUANTISE}")
        else:
            whole = tensor.detach().to("cpu", FLOATS[dtype]).contiguous()
            if not all_finite(whole):
                problems.append(f"{here}: the adapter's values overflow {dtype}")
            heads[here] = Part(here, dtype, shape, whole.nbytes, base.folder, whole=whole)
    return heads


def _unties(
    base: Checkpoint,
    tensors: Mapping[str, str],
    shapes: Mapping[str, tuple[int, int]],
    heads: Mapping[str, Part],
    problems: list[str],
) -> bool:
    """Tell whether lm_head.weight must part from the embedding; a problem where that would change more than it."""
    changed: dict[str, Sequence[int]] = {name: shapes[module] for module, name in tensors.items()}
    changed.update({name: part.shape for name, part in heads.items()})
    over_words = [name for name, shape in changed.items() if _over_words(name, shape, base.config)]
    if not over_words:
        return False
    output = f"{_OUTPUT}.weight"
    if base.config.get("tie_word_embeddings", True) is False:
        if output in tensors.values() and output not in base.parts:
            problems.append(f"{output}: not in the checkpoint, and {CONFIG} says that it is not tied")
        return False
    nested = any(isinstance(value, dict) and "model_type" in value for value in base.config.values())
    if nested or base.config.get("is_encoder_decoder") or (output not in base.parts and output not in changed):
        more = "no way is known to part them in this kind of model"
        problems.append(f"{over_words[0]}: may be tied to another tensor (tie_word_embeddings), and {more}")
        return False
    return True


def _over_words(name: str, shape: Sequence[int], config: Mapping[str, Any]) -> bool:
    """Tell whether a tensor has a row for each word: an embedding or an output, which may be tied."""
    if name == f"{_OUTPUT}.weight":
        return True
    layered = any(part.isdigit() for part in name.split("."))
    return len(shape) == 2 and shape[0] == config.get("vocab_size") and not layered


def _plan(
    base: Checkpoint,
    shapes: Mapping[str, tuple[int, int]],
    tensors: Mapping[str, str],
    transposed: bool,
    heads: Mapping[str, Part],
    problems: list[str],
) -> dict[str, Shard]:
    """Return the shards to write; what the base lacks goes into the last of them."""
    changed = {name: part for name, part in heads.items() if name in base.parts}
    added = [part for name, part in heads.items() if name not in base.parts]
    stored = {module: _stored(name, shapes[module], base, problems) for module, name in tensors.items()}
    found = {module: part for module, part in stored.items() if part}
    # PEFT keeps one fan_in_fan_out for all layers, that of the last one: any shape that shows Conv1D goes before it
    conv = transposed or any(part.shape != tuple(shapes[module]) for module, part in found.items())
    for module, part in found.items():
        name = tensors[module]
        if name in heads:
            problems.append(f"{name}: both adapted and in the head: leave one out")
        turned = part.shape != tuple(shapes[module]) or (conv and part.shape[0] == part.shape[1])
        fused = replace(part, name=name, module=module, transposed=turned)
        if name in base.parts:
            changed[name] = fused
        else:
            added.append(fused)
    shards = {
        file: Shard(shard.header, [changed.get(part.name, part) if base.owns(part) else part for part in shard.parts])
        for file, shard in base.shards.items()
    }
    if added:
        last = max(shards)
        shards[last] = extended(shards[last], added)
    return shards


def _stored(name: str, shape: tuple[int, int], base: Checkpoint, problems: list[str]) -> Part | None:
    """Return the tensor that takes an update of (m, n), or None with a further problem."""
    module = name.removesuffix(".weight")
    beside = [other.removeprefix(f"{module}.") for other in base.parts if other.startswith(f"{module}.")]
    part = base.parts.get(name)
    if part is None and not beside:  # a tied output: the words' embedding is its weight
        embeddings = [part for part in base.parts.values() if part.name.split(".")[-2:-1] and part.shape == shape]
        embeddings = [part for part in embeddings if part.name.split(".")[-2] in _EMBEDDINGS]
        part = embeddings[0] if len(embeddings) == 1 else None
    if part is None and beside:
        problems.append(f"{name}: not in the checkpoint, which has {', '.join(beside)}: quantised? {_DEQUANTISE}")
    elif part is None:
        problems.append(f"{name}: not in the checkpoint, and no embedding of its shape is there to be tied to it")
    elif part.dtype not in FLOATS:
        problems.append(f"{name}: is {part.dtype}, quantised: {_DEQUANTISE}")
    elif part.shape not in (tuple(shape), tuple(shape)[::-1]):
        problems.append(f"{name}: is {_times(part.shape)}, its update is {_times(shape)}: another model")
    else:
        return part
    return None


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a number"


def _write_shards(
    shards: Mapping[str, Shard],
    staged: Path,
    delta: Callable[[str], Update | Tensor],
    progress: Callable[[int, int], None] | None,
) -> dict[str, str]:
    """Write every shard and return their sha256."""
    total, done = _size(shards), 0

    def tell(size: int) -> None:
        nonlocal done
        done += size
        if progress:
            progress(done, total)

    sha256 = {}
    with ThreadPoolExecutor(1) as flusher:  # the disk works while the next shard is computed
        flushed = []
        for name, shard in shards.items():
            sha256[name] = write_shard(shard, staged / name, delta, tell)
            flushed.append(flusher.submit(_flush, staged / name))
        for future in flushed:
            future.result()
    return sha256


def _size(shards: Mapping[str, Shard]) -> int:
    return sum(part.size for shard in shards.values() for part in shard.parts)


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _copy_files(base: Path, staged: Path) -> list[str]:
    """Copy config, tokenizer and code; return what else the base holds: weights, folders, hidden and large files."""
    left_out = []
    for path in sorted(base.iterdir()):
        if (staged / path.name).exists():
            continue
        if (
            path.is_file()
            and not path.name.startswith(".")
            and not path.name.endswith(_NOT_COPIED)
            and path.name not in _OWN
            and path.stat().st_size <= _SMALL
        ):
            shutil.copyfile(path, staged / path.name)  # a snapshot of the hub holds links
        else:
            left_out.append(path.name)
    return left_out


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
