"""Where a merge goes in a checkpoint: the tensors that take its updates and heads, and what config.json says then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from torch import Tensor

from loraloom.adapters.update import Form
from loraloom.files.hashing import Seen
from loraloom.files.tensors import all_finite
from loraloom.merging.checkpoint import CONFIG, Checkpoint
from loraloom.merging.experts import grouped, place_experts
from loraloom.merging.lookup import OUTPUT, Names, find_names
from loraloom.merging.shards import FLOATS, Part, Shard, extended

_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in")
_DEQUANTISE = "fuse into the base it was made from, or call `model.dequantize()` in transformers and save that"


@dataclass(frozen=True)
class Changes:
    """What a merge changes in a checkpoint.

    - shapes: (m, n) = (outputs, inputs) of every adapted module. Modules have the checkpoint's names or those of the
      model that transformers builds from it; the checkpoint keeps its own.
    - transposed: the adapter's `fan_in_fan_out` (Conv1D keeps its weight as (n, m)); it decides where no shape does.
    - forms: of the modules that are no linear layers, as the adapter has them.
    - head: tensors that replace the base's or are added, by parameter path. Where they make a classifier, config.json
      tells so: the class, of `task_type` (PEFT's word) where that is given, and the `labels`, or LABEL_0 ...
    """

    shapes: Mapping[str, tuple[int, int]]
    transposed: bool = False
    forms: Mapping[str, Form] = field(default_factory=dict)
    head: Mapping[str, Tensor] = field(default_factory=dict)
    task_type: str | None = None
    labels: Sequence[str] | None = None


@dataclass(frozen=True)
class Placement:
    """What is to be written: every shard by file name, and what changes in config.json.

    `tensors` maps each adapted module to the tensor that takes its update; `heads` are the parts of the head by name in
    the checkpoint; `untied`: lm_head.weight becomes a tensor of its own; `classified`: config.json tells of the head.
    """

    shards: dict[str, Shard]
    config: dict[str, Any]
    tensors: dict[str, str]
    heads: dict[str, Part]
    untied: bool
    classified: bool

    @property
    def size(self) -> int:
        """Return the bytes of all tensors."""
        return sum(part.size for shard in self.shards.values() for part in shard.parts)


def place(base: Checkpoint, changes: Changes) -> tuple[Placement | None, list[str]]:
    """Return where the `changes` go in `base`, or None with all that does not fit."""
    shapes, forms, head = changes.shapes, changes.forms, changes.head
    groups = grouped(shapes, forms)
    experts = {module for group in groups for module in group.experts}
    plain = {module: shape for module, shape in shapes.items() if module not in experts}
    names, problems = find_names([*plain, *(group.module for group in groups)], list(head), base)
    tensors = {module: names.tensor(f"{module}.weight") for module in plain if names.has(module) or module == OUTPUT}
    parts, misfits = _weights(base, plain, tensors, changes)
    expert_parts, odd = place_experts([group for group in groups if names.has(group.module)], names, base)
    parts += expert_parts
    heads, unfit = _head_parts(head, names, base)
    twice = [f"{part.name}: both adapted and in the head: leave one out" for part in parts if part.name in heads]
    untied, inseparable = _untied(plain, forms, head, names, base)
    problems += [*misfits, *odd, *unfit, *twice, *inseparable]
    if problems:
        return None, problems
    config: dict[str, Any] | None = {}
    added = {name: tuple(tensor.shape) for name, tensor in head.items() if names.tensor(name) not in base.parts}
    if added:
        from loraloom.model.architecture import classifier_config  # takes seconds to import

        config = classifier_config(base.config, added, changes.task_type, changes.labels)
    told = {**(config or {}), **({"tie_word_embeddings": False} if untied else {})}
    taking: dict[str, list[str]] = {}
    for part in parts:
        for module in part.modules:
            taking.setdefault(module, []).append(part.name)
    tensors = {module: " and ".join(found) for module, found in taking.items()}
    return Placement(_shards(base, [*parts, *heads.values()]), told, tensors, heads, untied, config is not None), []


def _head_parts(head: Mapping[str, Tensor], names: Names, base: Checkpoint) -> tuple[dict[str, Part], list[str]]:
    """Return the head's tensors by their names in the checkpoint, in its dtype; and what is wrong with them."""
    dtypes = [part.dtype for part in base.parts.values() if part.dtype in FLOATS]
    common = max(sorted(set(dtypes)), key=dtypes.count, default="F32")
    heads, problems = {}, []
    for name, tensor in head.items():
        here = names.tensor(name)
        old, shape = base.parts.get(here), tuple(tensor.shape)
        dtype = old.dtype if old else common
        if old and old.shape != shape:
            problems.append(f"{here}: is {_times(old.shape)}, the adapter's is {_times(shape)}: {CONFIG} would not fit")
        elif dtype not in FLOATS:
            problems.append(f"{here}: is {dtype}, quantised: {_DEQUANTISE}")
        else:
            whole = tensor.detach().to("cpu", FLOATS[dtype]).contiguous()
            if not all_finite(whole):
                problems.append(f"{here}: the adapter's values overflow {dtype}")
            heads[here] = Part(here, dtype, shape, whole.nbytes, Seen(base.folder, ()), whole=whole)
    return heads, problems


def _untied(
    shapes: Mapping[str, tuple[int, int]],
    forms: Mapping[str, Form],
    head: Mapping[str, Tensor],
    names: Names,
    base: Checkpoint,
) -> tuple[bool, list[str]]:
    """Tell whether lm_head.weight must part from the embedding; a problem where that would change more than it."""
    changed: dict[str, Sequence[int]] = {
        f"{module}.weight": shape[::-1] if _is_embedding(module, forms) else shape for module, shape in shapes.items()
    }
    changed |= {name: tuple(tensor.shape) for name, tensor in head.items()}
    sizes = set(_settings(base.config, "vocab_size"))
    over_words = [name for name, shape in changed.items() if _is_over_words(name, shape, sizes)]
    output = names.tensor(f"{OUTPUT}.weight")
    stored = output in base.parts
    if not over_words:
        return False, []
    ties = _settings(base.config, "tie_word_embeddings")
    if ties and all(tie is False for tie in ties):
        lacking = output in map(names.tensor, over_words) and not stored and f"{OUTPUT}.weight" not in head
        return False, [f"{output}: not in the checkpoint, and {CONFIG} says that it is not tied"] if lacking else []
    nested = any(isinstance(value, dict) and "model_type" in value for value in base.config.values())
    written = stored or any(names.tensor(name) == output for name in over_words)
    if nested or base.config.get("is_encoder_decoder") or not written:
        more = "no way is known to part them in this kind of model"
        return False, [f"{over_words[0]}: may be tied to another tensor (tie_word_embeddings), and {more}"]
    return True, []


def _settings(config: Mapping[str, Any], key: str) -> list[Any]:
    """Return the values of `key` in config.json and in the parts that it is composed of."""
    inner = [value for value in config.values() if isinstance(value, dict)]
    return [part[key] for part in (config, *inner) if isinstance(part.get(key), int)]


def _is_over_words(name: str, shape: Sequence[int], sizes: set[int]) -> bool:
    """Tell whether a tensor has a row for each word: an embedding or an output, which may be tied."""
    parts = name.split(".")
    return parts[-2:-1] == [OUTPUT] or (len(shape) == 2 and shape[0] in sizes and not any(map(str.isdigit, parts)))


def _is_embedding(module: str, forms: Mapping[str, Form]) -> bool:
    return module in forms and forms[module].kind == "embedding"


def _weights(
    base: Checkpoint,
    shapes: Mapping[str, tuple[int, int]],
    tensors: Mapping[str, str],
    changes: Changes,
) -> tuple[list[Part], list[str]]:
    """Return the tensors that take an update each, and what does not fit."""
    found: dict[str, Part] = {}
    problems = []
    for module, name in tensors.items():
        part = base.parts.get(name) or _tied_to(name, shapes[module], base)
        fault = _misfit(name, part, shapes[module], base)
        if part and not fault:
            matrix = (part.shape[0], prod(part.shape[1:]))
            found[module] = replace(part, name=name, modules=(module,), matrix=matrix)
        problems += [fault] if fault else []
    # PEFT keeps one fan_in_fan_out for all layers, that of the last one: any shape that shows Conv1D goes before it
    linear = {module: part for module, part in found.items() if module not in changes.forms}
    conv1d = changes.transposed or any(part.matrix != tuple(shapes[module]) for module, part in linear.items())
    parts = []
    for module, part in found.items():
        square = part.matrix[0] == part.matrix[1]
        turned_square = square and (conv1d if module in linear else _is_embedding(module, changes.forms))
        parts.append(replace(part, transposed=part.matrix != tuple(shapes[module]) or turned_square))
    return parts, problems


def _shards(base: Checkpoint, parts: Sequence[Part]) -> dict[str, Shard]:
    """Return the shards to write; what the base lacks goes into the last of them."""
    changed = {part.name: part for part in parts if part.name in base.parts}
    added = [part for part in parts if part.name not in base.parts]
    shards = {
        file: Shard(shard.header, [changed.get(part.name, part) if base.owns(part) else part for part in shard.parts])
        for file, shard in base.shards.items()
    }
    if added:
        last = max(shards)
        shards[last] = extended(shards[last], added)
    return shards


def _tied_to(name: str, shape: tuple[int, int], base: Checkpoint) -> Part | None:
    """Return the embedding that is a tied output's weight, where the checkpoint has nothing of the output itself."""
    if any(other.startswith(f"{name.removesuffix('.weight')}.") for other in base.parts):
        return None
    alike = [part for part in base.parts.values() if part.shape == tuple(shape) and len(part.name.split(".")) > 1]
    embeddings = [part for part in alike if part.name.split(".")[-2] in _EMBEDDINGS]
    return embeddings[0] if len(embeddings) == 1 else None


def _misfit(name: str, part: Part | None, shape: tuple[int, int], base: Checkpoint) -> str:
    """Return why an update (m, n) cannot go into the tensor of this name, or an empty string."""
    module = name.removesuffix(".weight")
    beside = [other.removeprefix(f"{module}.") for other in base.parts if other.startswith(f"{module}.")]
    if part is None and beside:
        return f"{name}: not in the checkpoint, which has {', '.join(beside)}: quantised? {_DEQUANTISE}"
    if part is None:
        return f"{name}: not in the checkpoint, and no embedding of its shape is there to be tied to it"
    if part.dtype not in FLOATS:
        return f"{name}: is {part.dtype}, quantised: {_DEQUANTISE}"
    fitting = [tuple(shape), tuple(shape)[::-1]] if len(part.shape) == 2 else [tuple(shape)]
    if len(part.shape) < 2 or (part.shape[0], prod(part.shape[1:])) not in fitting:
        return f"{name}: is {_times(part.shape)}, its update is {_times(shape)}: another model"
    return ""


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a number"
