"""The dialects in which tools write LoRA adapters: how each names its tensors, and what one calls another's layers.

A dialect is a record here. Its module names are the file's own, made plain; they are translated only where adapters
of several dialects meet, or another one is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loraloom.adapters.images import (
    DENOISERS,
    component_of,
    diffusers_factor,
    diffusers_module,
    is_original,
    kohya_factor,
    kohya_module,
)
from loraloom.adapters.mlx import mlx_factor
from loraloom.adapters.names import EMBEDDING, FACTOR, Factor, Names, said_twice, told_of
from loraloom.adapters.update import Adapter, Shape, Update
from loraloom.errors import LoraloomError, collecting, did_you_mean, first_few, raise_problems, raise_together


@dataclass(frozen=True)
class Dialect:
    """How a tool names the tensors of an adapter, and what it reads.

    name: as `--to` takes it. title: for messages.
    weights: the file that is written.
    A, B: what follows a module in the names of its factors there.
    factor: what a tensor's name says, or None where it is not of this dialect.
    alpha: whether a tensor for each module tells its alpha; else the factors are written whole, at a scale of 1.
    transposed: whether A is (n, r) and B (r, m) there.
    one_rank: whether all modules of a model must have one rank.
    images: whether a module's name starts with the part of a pipeline that it is of.
    library, loading: that loads it, by the Hub's name for it, and the line of Python that does, for the model card.
    """

    name: str
    title: str
    weights: str
    A: str
    B: str
    factor: Callable[[str], Factor | None]
    library: str
    loading: str
    alpha: bool = False
    transposed: bool = False
    one_rank: bool = False
    images: bool = False


def _peft_factor(key: str) -> Factor | None:
    match = FACTOR.fullmatch(key) or EMBEDDING.fullmatch(key)
    return Factor(match["module"], match["part"], match["module"], match["adapter"] or "") if match else None


PEFT = Dialect(
    "peft",
    "PEFT",
    "adapter_model.safetensors",
    ".lora_A.weight",
    ".lora_B.weight",
    _peft_factor,
    "peft",
    "model = PeftModel.from_pretrained(base_model, folder)",
)
# diffusers scales layers of uneven ranks wrongly where nothing tells their alphas; and in kohya-ss' files also where
# tensors do, for of the attention's layers it misses them (0.42.1)
DIFFUSERS = Dialect(
    "diffusers",
    "diffusers",
    "pytorch_lora_weights.safetensors",
    ".lora_A.weight",
    ".lora_B.weight",
    diffusers_factor,
    "diffusers",
    "pipeline.load_lora_weights(folder)",
    one_rank=True,
    images=True,
)
KOHYA = Dialect(
    "kohya",
    "kohya-ss (sd-scripts)",
    "lora.safetensors",
    ".lora_down.weight",
    ".lora_up.weight",
    kohya_factor,
    "diffusers",
    'pipeline.load_lora_weights(folder, weight_name="lora.safetensors")',
    alpha=True,
    one_rank=True,
    images=True,
)
MLX = Dialect(
    "mlx",
    "MLX (mlx-lm)",
    "adapters.safetensors",
    ".lora_a",
    ".lora_b",
    mlx_factor,
    "mlx",
    "model, tokenizer = mlx_lm.load(base_model, adapter_path=folder)",
    transposed=True,
    one_rank=True,
)
DIALECTS = {one.name: one for one in (PEFT, DIFFUSERS, KOHYA, MLX)}
# a name that several read is of the one that asks for more
_STRICTEST_FIRST = (KOHYA, DIFFUSERS, MLX, PEFT)


def dialect_of(keys: Collection[str]) -> Dialect | None:
    """Return the dialect that most of the names of tensors are of, or None where none are of any."""
    counts = {one.name: sum(one.factor(key) is not None for key in keys) for one in _STRICTEST_FIRST}
    best = max(counts, key=counts.__getitem__)
    return DIALECTS[best] if counts[best] else None


def read_factors(keys: Iterable[str], dialect: Dialect) -> Names:
    """Return what the names of an adapter's tensors say in a dialect that has factors and alphas alone: not PEFT's."""
    names, adapters = Names(), set()
    for key in sorted(keys):
        found = dialect.factor(key)
        if not key.isprintable():
            names.problems.append(f"tensor {key!r}: a name with control characters")
        elif found is None:
            names.problems.append(f"tensor {key}: {_why_not(key, dialect)}")
        elif found.part == "alpha":
            names.problems += said_twice(key, names.alphas.get(found.module))
            names.alphas[found.module] = key
        else:
            adapters.add(found.adapter)
            names.paths[found.module] = found.path
            parts = names.factors.setdefault(found.module, {})
            names.problems += said_twice(key, parts.get(found.part))
            parts[found.part] = key
    lonely = sorted(set(names.alphas) - set(names.factors))
    names.problems += [f"tensor {names.alphas[module]}: an alpha without factors" for module in lonely]
    if len(adapters) > 1:
        shown = ", ".join(sorted(repr(name) if name else "one without a name" for name in adapters))
        names.problems = [f"holds several adapters: {shown}: save one of them alone"]
    names.problems += _two_ways(names.factors)
    return names


def _why_not(key: str, dialect: Dialect) -> str:
    """Return why a tensor cannot be read among those of `dialect`, with the dialect that its name is of, if any."""
    other = dialect_of([key])
    named = f"named as {other.title} does" if other and other is not dialect else ""
    told = named or told_of(key) or "a name of no LoRA that is known"
    return f"{told}, among tensors of {dialect.title}"


def _two_ways(modules: Iterable[str]) -> list[str]:
    """Tell where a file, or adapters that are to be merged, name one denoiser's layers in two ways."""
    kohya = [module for module in modules if module.startswith("lora_unet_")]
    original = [module for module in kohya if is_original(module)]
    if original and len(original) < len(kohya):
        other = next(module for module in kohya if not is_original(module))
        return [f"{original[0]} is the original UNet's name of a layer, {other} is diffusers'"]
    encoders = {module.split("_", 2)[1]: module for module in modules if module.startswith(("lora_te_", "lora_te1_"))}
    if len(encoders) > 1:
        return [f"{' and '.join(sorted(encoders.values()))} are of one text encoder"]
    parts = {component_of(module): module for module in modules}
    found = [parts[part] for part in DENOISERS if part in parts]
    return [f"{' and '.join(found)} are of two models that would be one"] if len(found) > 1 else []


def asked_dialect(name: str | None, adapters: Sequence[Adapter]) -> tuple[Dialect, list[str]]:
    """Return the dialect that a merge is written in, and what is wrong with that: `name`, else what all came in."""
    came = list(dict.fromkeys(one.dialect for one in adapters))
    if name is not None and name not in DIALECTS:
        return PEFT, [f"dialect {name!r} is unknown: {did_you_mean(name, DIALECTS)}"]
    if name is None and len(came) > 1:
        titles = ", ".join(f"{one.name} of {DIALECTS[one.dialect].title}" for one in _firsts(adapters))
        return PEFT, [f"the adapters are of several tools: {titles}: say by --to which one the result is for"]
    return DIALECTS[name or next(iter(came), PEFT.name)], []


def common_dialect(adapters: Sequence[Adapter], asked: str | None) -> tuple[Dialect, list[Adapter], list[str]]:
    """Return the dialect of a merge, the adapters with their layers named as there, and what keeps them from that.

    asked: the name of a dialect; None for that of all adapters, in which they stay as they are.
    """
    dialect, problems = asked_dialect(asked, adapters)
    if problems:
        return dialect, list(adapters), problems
    two_ways = dialect.images and _two_ways(sorted({module for one in adapters for module in one.shapes}))
    if two_ways and asked is None:
        hint = "say --to diffusers or --to kohya, which make them one" if dialect is KOHYA else "rename those of one"
        return dialect, list(adapters), [f"{told}: {hint}" for told in two_ways]
    if all(one.dialect == dialect.name for one in adapters) and not two_ways:
        return dialect, list(adapters), []
    try:
        return dialect, in_dialect(adapters, dialect), []
    except LoraloomError as error:
        told = [line.removeprefix("  - ") for line in error.message.split("\n")]
        return dialect, list(adapters), [*told[:-1], f"{told[-1]}; {error.hint}"]


def in_dialect(adapters: Sequence[Adapter], dialect: Dialect) -> list[Adapter]:
    """Return adapters with their layers named as in `dialect`, in one way.

    Raises LoraloomError that names the layers which have no name there.
    """
    modules = [module for one in adapters for module in one.shapes]
    # SDXL has two text encoders, which kohya-ss numbers; its UNet alone has several blocks in a transformer
    numbered = any(re.search(r"text_encoder_2|lora_te[12]_|transformer_blocks[._][1-9]", module) for module in modules)
    found: list[Adapter] = []
    errors: list[LoraloomError] = []
    for one in adapters:
        with collecting(errors):
            found.append(translated(one, dialect, numbered=numbered))
    raise_together(errors)
    return found


def translated(adapter: Adapter, dialect: Dialect, *, numbered: bool = False) -> Adapter:
    """Return an adapter with its layers named as in `dialect`, its updates read as before.

    numbered: whether kohya-ss' first text encoder is to have a number, as SDXL's has.

    Raises LoraloomError that names the layers which have no name there.
    """
    source = DIALECTS[adapter.dialect]
    if source is dialect and not dialect.images:
        return adapter
    names = {module: _translated(module, source, dialect, adapter, numbered) for module in adapter.shapes}
    lost = [module for module, name in names.items() if name is None]
    hint = f"merge it as {source.title} writes it: leave --to out"
    if lost:
        raise LoraloomError(f"{adapter.name}: what {dialect.title} calls {first_few(lost)} is not known", hint)
    found = {module: str(name) for module, name in names.items()}
    problems = _unfit(adapter, dialect, found)
    raise_problems(f"{adapter.name} as {dialect.title} has it", problems, hint)
    forms = {found[module]: form for module, form in adapter.forms.items()}
    config = adapter.config
    if dialect is PEFT:
        base = config.get("base_model_name_or_path")
        targets = sorted(found.values())
        config = {"peft_type": "LORA", "base_model_name_or_path": base, "bias": "none", "target_modules": targets}
    return replace(adapter, updates=Renamed(adapter, found), forms=forms, dialect=dialect.name, config=config)


def _translated(module: str, source: Dialect, dialect: Dialect, adapter: Adapter, numbered: bool) -> str | None:
    if not source.images and not dialect.images:
        return module
    if source is MLX or dialect is MLX:  # of language models alone
        return None
    if source is KOHYA:
        plain = diffusers_module(module)
    else:
        plain = module if source.images else f"{_component(adapter.config)}.{module}"
    if plain is None or plain.startswith("."):
        return None
    if dialect is KOHYA:
        return kohya_module(plain, numbered=numbered)
    return plain if dialect.images else plain.partition(".")[2]


def last_name(module: str) -> str:
    """Return the last part of a layer's path, found again where kohya-ss wrote the path flat."""
    plain = (
        diffusers_module(module) if module.startswith(("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")) else None
    )
    return (plain or module).rpartition(".")[2]


def _component(config: Mapping[str, Any]) -> str:
    """Return the part of a pipeline that a PEFT adapter is of, by the class of its base; nothing where none tells."""
    name = str((config.get("auto_mapping") or {}).get("base_model_class"))
    if name.startswith("UNet"):
        return "unet"
    return "transformer" if "Transformer2D" in name or "Transformer3D" in name else ""


def _unfit(adapter: Adapter, dialect: Dialect, names: Mapping[str, str]) -> list[str]:
    """Return what of an adapter has no place in `dialect`, whose names of its layers are given."""
    problems = []
    if len(set(names.values())) < len(names):
        twice = next(name for name in names.values() if list(names.values()).count(name) > 1)
        problems.append(f"several layers are called {twice} there")
    parts = sorted({component_of(module) for module in names})
    if DIALECTS[adapter.dialect].images and not dialect.images and len(parts) > 1:
        problems.append(f"holds layers of {' and '.join(parts)}, where {dialect.title} has one model a folder")
    if adapter.dialect == PEFT.name:
        kinds = {form.kind for form in adapter.forms.values()} - ({"convolution"} if dialect.images else {"embedding"})
        problems += [f"{kind}: cannot be written there" for kind in sorted(kinds)]
        problems += [f"{path}: the base's own weight cannot be written there" for path in sorted(adapter.copies)]
    return problems


class Renamed(Mapping[str, Update]):
    """The updates of an adapter under other names, read when they are asked for."""

    def __init__(self, adapter: Adapter, names: Mapping[str, str]) -> None:
        self._updates = adapter.updates
        self._modules = {name: module for module, name in names.items()}
        self.shapes: Mapping[str, Shape] = {names[module]: shape for module, shape in adapter.shapes.items()}

    def __getitem__(self, name: str) -> Update:
        """Return one update."""
        return self._updates[self._modules[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


def _firsts(adapters: Sequence[Adapter]) -> list[Adapter]:
    return list({one.dialect: one for one in reversed(adapters)}.values())[::-1]
