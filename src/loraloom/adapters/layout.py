"""From an adapter's named tensors to its layers: which factors make which update, of what form and scale."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from loraloom.adapters.patterns import check_patterns, pattern_values
from loraloom.adapters.stored import Checked, Place
from loraloom.adapters.update import Form, Shape

_LARGEST = torch.finfo(torch.float32).max
_MOST_EXPERTS = 1 << 12
_INNER = ".base_layer"  # of several parameters of one module PEFT wraps one inside the other


@dataclass
class Layers:
    """The layers of an adapter by module path, the dtype that holds all its factors, and what is wrong."""

    places: dict[str, Place] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)
    forms: dict[str, Form] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    problems: list[str] = field(default_factory=list)


def find_layers(
    factors: Mapping[str, Mapping[str, str]], checked: Mapping[str, Checked], config: Mapping[str, Any]
) -> Layers:
    """Return the layers that `factors` make: the names of the tensors by module and part, as `read_names` gives them.

    `checked` tells of each tensor, `config` is adapter_config.json. alpha/r, or alpha/sqrt(r) for rsLoRA, is the
    scaling of a place; r is the rank of the tensors, and that of the config for experts. Raises LoraloomError for a
    pattern of the config that cannot be matched.
    """
    layers = Layers(dtype=_common_dtype(factors, checked))
    found = {module: _pair(module, parts, checked, layers.problems) for module, parts in factors.items()}
    parameters = {module: parameters_of(module, config) for module in found}
    plain = [module for module in found if not parameters[module]]
    check_patterns(config, plain)
    pattern_values(config.get("rank_pattern") or {}, plain, None)  # the factors tell the ranks; a key must be a pattern
    alphas = alphas_of(plain, config)
    found_in = {module: names for module, names in parameters.items() if names}
    experts = {module: _expert_settings(module, names, config, layers.problems) for module, names in found_in.items()}
    for module, pair in found.items():
        if pair is None:
            continue
        if parameters[module]:
            _add_experts(layers, module, pair, *experts[module], checked, config)
            continue
        _add_layer(layers, module, pair, checked, scaling_of(alphas[module], checked[pair.A].shape[0], config))
    return layers


def plain_layers(
    factors: Mapping[str, Mapping[str, str]],
    checked: Mapping[str, Checked],
    scaling: Callable[[str, int], float],
    *,
    transposed: bool = False,
) -> Layers:
    """Return the layers that `factors` make where no config of PEFT tells of them.

    scaling: of a module whose factors have this rank. transposed: whether A lies as (n, r) in the file, B as (r, m).
    """
    layers = Layers(dtype=_common_dtype(factors, checked))
    if transposed:
        checked = {key: one._replace(shape=one.shape[::-1]) for key, one in checked.items()}
    for module, parts in factors.items():
        if transposed and any(len(checked[key].shape) == 3 for key in parts.values()):
            layers.problems.append(f"{module}: experts in one tensor, which are read of PEFT's adapters alone")
            continue
        pair = _pair(module, parts, checked, layers.problems)
        if pair is None:
            continue
        _add_layer(
            layers, module, pair._replace(transposed=transposed), checked, scaling(module, checked[pair.A].shape[0])
        )
    return layers


def _add_layer(layers: Layers, module: str, pair: Place, checked: Mapping[str, Checked], scaling: float) -> None:
    a, b = checked[pair.A], checked[pair.B]
    layers.shapes[module] = Shape(b.shape[0], torch.Size(a.shape[1:]).numel(), a.shape[0])
    layers.places[module] = pair._replace(scaling=scaling)
    if pair.form:
        layers.forms[module] = pair.form
    layers.problems += _overflow(module, b, scaling)


def _common_dtype(factors: Mapping[str, Mapping[str, str]], checked: Mapping[str, Checked]) -> torch.dtype:
    """Return the dtype that holds every factor."""
    dtypes = [checked[key].dtype for parts in factors.values() for key in parts.values() if not checked[key].fault]
    return functools.reduce(torch.promote_types, dtypes) if dtypes else torch.float32


def parameters_of(module: str, config: Mapping[str, Any]) -> list[str]:
    """Return the parameters of `module` that `target_parameters` names, by path; none for an ordinary layer."""
    outer = without_wrappers(module)
    split = [target.rpartition(".") for target in config.get("target_parameters") or ()]
    return sorted(f"{outer}.{leaf}" for of, _, leaf in split if f".{outer}".endswith(f".{of}" if of else ""))


def without_wrappers(module: str) -> str:
    """Return the path in the base of a module that PEFT wrapped several times."""
    while module.endswith(_INNER):
        module = module.removesuffix(_INNER)
    return module


def _pair(module: str, parts: Mapping[str, str], checked: Mapping[str, Checked], problems: list[str]) -> Place | None:
    """Return A and B of a module, their scaling still 1, or None with a further problem."""
    faults = [f"tensor {key} {checked[key].fault}" for key in parts.values() if checked[key].fault]
    problems += faults
    if faults:
        return None
    embedding = set(parts) == {"embedding_A", "embedding_B"}
    if not embedding and set(parts) != {"A", "B"}:
        told = " and ".join(_as_written(part, key) for part, key in sorted(parts.items()))
        problems.append(f"{module} has {told} alone: a half-written adapter?")
        return None
    a, b = sorted(parts.values(), key=lambda key: key != parts.get("embedding_A" if embedding else "A"))
    A, B = checked[a].shape, checked[b].shape
    if len(A) == len(B) == 2 and A[0] == B[1]:
        return Place(a, b, 1.0, Form("embedding") if embedding else None)
    convolution = len(A) == len(B) and 3 <= len(A) <= 5 and set(B[2:]) == {1} and not embedding
    if convolution and A[0] == B[1]:
        return Place(a, b, 1.0, Form("convolution", A[1:]))
    if convolution and A[0] % B[1] == 0:
        problems.append(f"{module}: LoRA of a convolution in {A[0] // B[1]} groups is no low-rank update of its weight")
    else:
        problems.append(f"{module}: lora_A {A} and lora_B {B} do not multiply")
    return None


def _as_written(part: str, key: str) -> str:
    """Return what the file calls A or B."""
    match = re.search(r"(lora_(?:down|up|a|b)|down|up)(?:\.weight)?$", key)
    return match[1] if match else f"lora_{part}"


def alphas_of(modules: Sequence[str], config: Mapping[str, Any]) -> dict[str, float]:
    """Return the alpha that PEFT's config gives each module. Raises LoraloomError for a pattern that is none."""
    return pattern_values(config.get("alpha_pattern") or {}, modules, config.get("lora_alpha", 8), "alpha_pattern")


def scaling_of(alpha: float, r: int, config: Mapping[str, Any]) -> float:
    """Return alpha/r, or alpha/sqrt(r) where PEFT's config asks for rsLoRA."""
    return float(alpha) / (r**0.5 if config.get("use_rslora") else r)


def _expert_settings(
    module: str, parameters: Sequence[str], config: Mapping[str, Any], problems: list[str]
) -> tuple[int, float]:
    """Return rank and alpha of a parameter's factors. Which of a module's parameters they are of, no name tells."""
    ranks = pattern_values(config.get("rank_pattern") or {}, parameters, config.get("r", 8))
    alphas = alphas_of(parameters, config)
    pairs = {(int(ranks[name]), float(alphas[name])) for name in parameters}
    if len(pairs) > 1:
        problems.append(f"{module}: rank_pattern and alpha_pattern differ between {', '.join(parameters)}")
    return min(pairs)


def _add_experts(
    layers: Layers,
    module: str,
    pair: Place,
    r: int,
    alpha: float,
    checked: Mapping[str, Checked],
    config: Mapping[str, Any],
) -> None:
    """Add a layer for each expert: A is (experts, r, inputs) in one, B (outputs, r, experts), in PEFT's order."""
    a, b = checked[pair.A], checked[pair.B]
    if pair.form or r < 1 or a.shape[0] % r:
        layers.problems.append(f"{module}: lora_A {a.shape} does not hold experts of rank {r}, as the config has it")
        return
    count = a.shape[0] // r
    if count > _MOST_EXPERTS:
        layers.problems.append(f"{module}: {count} experts of rank {r}: is r of the config the factors'?")
        return
    scaling = scaling_of(alpha, r, config)
    for index in range(count):
        expert = f"{module}.{index}"
        form = Form("experts", module=module, index=index, count=count)
        layers.forms[expert] = form
        layers.shapes[expert] = Shape(b.shape[0], a.shape[1], r)
        layers.places[expert] = Place(pair.A, pair.B, scaling, form)
    layers.problems += _overflow(module, b, scaling)


def _overflow(module: str, b: Checked, scaling: float) -> list[str]:
    if b.largest * abs(scaling) <= _LARGEST:
        return []
    return [f"{module}: lora_B times alpha/r overflows: a largest value of {b.largest:.3g} times {scaling:.3g}"]
