"""Where a merge goes in a checkpoint: the tensors that take its updates and heads, and what config.json says then."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

from torch import Tensor

from loraloom.errors import did_you_mean
from loraloom.files.tensors import all_finite
from loraloom.merging.checkpoint import CONFIG, Checkpoint, each
from loraloom.merging.shards import FLOATS, Part, Shard, extended

_OUTPUT = "lm_head"
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in")
_DEQUANTISE = "fuse into the base it was made from, or call `model.dequantize()` in transformers and save that"


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


def place(
    base: Checkpoint,
    shapes: Mapping[str, tuple[int, int]],
    head: Mapping[str, Tensor],
    *,
    transposed: bool,
    task_type: str | None = None,
    labels: Sequence[str] | None = None,
) -> tuple[Placement | None, list[str]]:
    """Return where updates of these `shapes` and the `head` go in `base`, or None with all that does not fit.

    The arguments are those of `fuse`.
    """
    names, problems = _find_names(list(shapes), list(head), base)
    tensors = {module: names.tensor(f"{module}.weight") for module in shapes if names.has(module) or module == _OUTPUT}
    heads, unfit = _head_parts(head, names, base)
    untied, inseparable = _untied(shapes, head, names, base)
    shards, misfits = _shards(base, shapes, tensors, transposed, heads)
    problems += [*unfit, *inseparable, *misfits]
    if problems:
        return None, problems
    config: dict[str, Any] | None = {}
    added = {name: tuple(tensor.shape) for name, tensor in head.items() if names.tensor(name) not in base.parts}
    if added:
        from loraloom.model.architecture import classifier_config  # takes seconds to import

        config = classifier_config(base.config, added, task_type, labels)
    changes = {**(config or {}), **({"tie_word_embeddings": False} if untied else {})}
    return Placement(shards, changes, tensors, heads, untied, config is not None), []


@dataclass(frozen=True)
class _Names:
    """How the adapter's names lead to the checkpoint's: `stored` has these by a tensor's name in the adapter's model.

    `renamed` has the model's name for those of the adapter that come of another version of transformers. A prefix is
    taken `off` or put `on` where the adapter was made on the model with a head, or on the backbone alone.
    """

    stored: Mapping[str, str]
    renamed: Mapping[str, str]
    off: str = ""
    on: str = ""

    def tensor(self, name: str) -> str:
        """Return the name that a tensor has in the checkpoint, or is to get."""
        return self.stored.get(self.seen(name), self.renamed.get(name, name).removeprefix(self.off))

    def has(self, module: str) -> bool:
        """Tell whether the checkpoint has tensors of `module`."""
        return self.seen(f"{module}.weight").rpartition(".")[0] in self.modules

    def seen(self, name: str) -> str:
        """Return the name of a tensor among those of `stored`."""
        return self.on + self.renamed.get(name, name).removeprefix(self.off)

    @cached_property
    def modules(self) -> set[str]:
        """Return the modules that have tensors, by the names of the adapter's model."""
        return {name.rpartition(".")[0] for name in self.stored}


def _find_names(modules: Sequence[str], heads: Sequence[str], base: Checkpoint) -> tuple[_Names, list[str]]:
    """Return how names lead to the checkpoint, and a problem where not all `modules` are found, or in several places.

    They may be the checkpoint's own, or those of the model that transformers builds from it.
    """
    direct = _Names({name: name for name in base.parts}, {})

    @cache
    def in_model() -> _Names:
        from loraloom.model.architecture import names_in_model  # takes seconds to import

        stored = {name: tensor for tensor, name in names_in_model(base.config, base.parts).items()}
        return _Names(stored, names_in_model(base.config, [*(f"{module}.weight" for module in modules), *heads]))

    places: set[str] = set()
    # a tied output has no tensor, and transformers looks for it under its own name
    for wanted in (modules, [module for module in modules if module != _OUTPUT]):
        for names in (direct, in_model):
            fitting = list(_fitting(names if isinstance(names, _Names) else names(), wanted))
            if len(fitting) == 1:
                return fitting[0], []
            places |= {one.tensor(f"{modules[0]}.weight").removesuffix(".weight") for one in fitting}
    if places:
        return direct, [
            f"{modules[0]}: could be {' or '.join(sorted(places))}: name the modules as the checkpoint does"
        ]
    missing = [module for module in sorted(modules) if not direct.has(module) and module != _OUTPUT]
    return direct, each(missing, lambda m: f"no module {m} in the checkpoint: {_nearest(m, direct.modules)}")


def _fitting(names: _Names, wanted: Sequence[str]) -> Iterator[_Names]:
    """Yield `names`, or else all ways to take a prefix off or put one on, by which every module is found."""
    if all(map(names.has, wanted)):
        yield names
    else:
        first = names.seen(f"{wanted[0]}.weight").removesuffix(".weight")
        parts = first.split(".")
        ways = [replace(names, off=".".join(parts[:count]) + ".") for count in range(1, len(parts))]
        ways += [replace(names, on=name.removesuffix(first)) for name in names.modules if name.endswith(f".{first}")]
        yield from (way for way in ways if all(map(way.has, wanted)))


def _nearest(module: str, known: set[str]) -> str:
    """Return a hint that stays short: paths that end in the same word, or else words that are like it."""
    ends = {name.rpartition(".")[2] for name in known}
    end = module.rpartition(".")[2]
    alike = {name for name in known if name.rpartition(".")[2] == end}
    return did_you_mean(module, alike) if alike else did_you_mean(end, ends)


def _head_parts(head: Mapping[str, Tensor], names: _Names, base: Checkpoint) -> tuple[dict[str, Part], list[str]]:
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
            heads[here] = Part(here, dtype, shape, whole.nbytes, base.folder, whole=whole)
    return heads, problems


def _untied(
    shapes: Mapping[str, tuple[int, int]], head: Mapping[str, Tensor], names: _Names, base: Checkpoint
) -> tuple[bool, list[str]]:
    """Tell whether lm_head.weight must part from the embedding; a problem where that would change more than it."""
    changed: dict[str, Sequence[int]] = {f"{module}.weight": shape for module, shape in shapes.items()}
    changed |= {name: tuple(tensor.shape) for name, tensor in head.items()}
    sizes = set(_settings(base.config, "vocab_size"))
    over_words = [name for name, shape in changed.items() if _is_over_words(name, shape, sizes)]
    output = names.tensor(f"{_OUTPUT}.weight")
    stored = output in base.parts
    if not over_words:
        return False, []
    ties = _settings(base.config, "tie_word_embeddings")
    if ties and all(tie is False for tie in ties):
        lacking = output in map(names.tensor, over_words) and not stored and f"{_OUTPUT}.weight" not in head
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
    return parts[-2:-1] == [_OUTPUT] or (len(shape) == 2 and shape[0] in sizes and not any(map(str.isdigit, parts)))


def _shards(
    base: Checkpoint,
    shapes: Mapping[str, tuple[int, int]],
    tensors: Mapping[str, str],
    transposed: bool,
    heads: Mapping[str, Part],
) -> tuple[dict[str, Shard], list[str]]:
    """Return the shards to write, and what does not fit; what the base lacks goes into the last of them."""
    changed = {name: part for name, part in heads.items() if name in base.parts}
    added = [part for name, part in heads.items() if name not in base.parts]
    problems = [f"{name}: both adapted and in the head: leave one out" for name in tensors.values() if name in heads]
    found: dict[str, Part] = {}
    for module, name in tensors.items():
        part = base.parts.get(name) or _tied_to(name, shapes[module], base)
        fault = _misfit(name, part, shapes[module], base)
        if part and not fault:
            found[module] = part
        problems += [fault] if fault else []
    # PEFT keeps one fan_in_fan_out for all layers, that of the last one: any shape that shows Conv1D goes before it
    conv1d = transposed or any(part.matrix != tuple(shapes[module]) for module, part in found.items())
    for module, part in found.items():
        name, (rows, cols) = tensors[module], part.matrix
        turned = (rows, cols) != tuple(shapes[module]) or (conv1d and rows == cols)
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
    return shards, problems


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
    if len(part.shape) < 2 or part.matrix not in fitting:
        return f"{name}: is {_times(part.shape)}, its update is {_times(shape)}: another model"
    return ""


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a number"
