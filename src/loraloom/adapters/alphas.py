"""What each update of an image LoRA is multiplied by: alpha over rank, from tensors or from the file's metadata."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from loraloom.adapters.config import field_problems, unsupported
from loraloom.adapters.images import component_of
from loraloom.adapters.layout import alphas_of, scaling_of
from loraloom.adapters.names import Names
from loraloom.errors import LoraloomError, first_line
from loraloom.files.reading import parse_json
from loraloom.files.tensors import StoredFile

METADATA = "lora_adapter_metadata"  # diffusers' entry: PEFT's config of each part, its fields after the part's name
_NUMBERS = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8")

Scaling = Callable[[str, int], float]


def read_scaling(names: Names, files: Mapping[str, StoredFile], problems: list[str]) -> Scaling:
    """Return what gives the scaling of a module whose factors have a rank, and add what is wrong to `problems`.

    By its tensor alpha, alpha over rank; else as the metadata of diffusers has it; else 1, as both tools take it.
    """
    alphas = {module: _alpha(key, files[key], problems) for module, key in names.alphas.items()}
    entry = next((file.metadata[METADATA] for file in files.values() if METADATA in file.metadata), None)
    if entry is None:
        return lambda module, rank: alphas.get(module, float(rank)) / rank
    if alphas:
        problems.append(f"{METADATA} and tensors tell alphas: diffusers refuses both in one file")
    configs = _configs(entry, {component_of(module) for module in names.factors}, problems)
    by_part: dict[str, dict[str, float]] = {}
    for part, config in configs.items():
        modules = {names.paths[module].removeprefix(f"{part}."): module for module in names.factors}
        modules = {path: module for path, module in modules.items() if component_of(module) == part}
        try:
            found = alphas_of(list(modules), config)
        except LoraloomError as error:
            problems.append(f"{METADATA}: {part}: {error.message}")
            continue
        by_part[part] = {module: found[path] for path, module in modules.items()}
    return lambda module, rank: (
        scaling_of(by_part[part][module], rank, configs[part]) if (part := component_of(module)) in by_part else 1.0
    )


def _alpha(key: str, file: StoredFile, problems: list[str]) -> float:
    """Return the one number in a tensor."""
    kind, shape = file.entries[key][:2]
    if kind not in _NUMBERS or math.prod(shape) != 1:
        problems.append(f"tensor {key} of {kind} and shape {list(shape)}: an alpha is one number")
        return 1.0
    value = float(file[key])
    if value == 0 or not math.isfinite(value):
        why = "which sd-scripts reads as the rank and others as no update" if value == 0 else "not finite"
        problems.append(f"tensor {key} is {value:g}: {why}")
    return value


def _configs(text: str, parts: set[str], problems: list[str]) -> dict[str, dict[str, Any]]:
    """Return PEFT's config of each of the `parts` of a pipeline, out of the metadata of diffusers."""
    try:
        found = parse_json(text)
    except ValueError as error:  # JSONDecodeError among them
        problems.append(f"{METADATA}: not valid JSON ({first_line(error)[:200]})")
        return {}
    if not isinstance(found, dict):
        problems.append(f"{METADATA}: {json.dumps(found)[:80]} is no JSON object")
        return {}
    alone = len(parts) == 1 and "r" in found  # of a part that was saved alone
    configs: dict[str, dict[str, Any]] = {}
    for part in sorted(parts):
        one = {key.removeprefix(f"{part}."): value for key, value in found.items() if key.startswith(f"{part}.")}
        config = dict(found) if alone else one
        wrong = field_problems(config) if config else ["nothing is told of this part"]
        problems += [f"{METADATA}: {part}: {problem}" for problem in wrong]
        problems += unsupported(config, f"{METADATA}: {part}") if not wrong else []
        if not wrong:
            configs[part] = config
    return configs
