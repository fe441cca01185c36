"""mergekit's YAML: the merges of adapters (`base+lora`) that it describes, as options of a merge here.

Read from mergekit's own code at commit a6e4028: config.py, common.py, sparsify.py, merge_methods/. There W = base + dW
is fused first, so that its deltas W - base are the updates dW = s B A here, but for the rounding of the fused weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from loraloom.adapters.bases import same_base
from loraloom.errors import did_you_mean, raise_problems, reads_file
from loraloom.files.reading import read_yaml
from loraloom.merging.options import Dtype, MergeOptions
from loraloom.settings import Settings, checked

_PLAIN = "interpolates whole weights, which is no sum of updates"
# methods of mergekit's that are taken no part of, and why
_REFUSED = {
    "slerp": _PLAIN,
    "nuslerp": _PLAIN,
    "multislerp": _PLAIN,
    "karcher": _PLAIN,
    "nearswap": _PLAIN,
    "arcee_fusion": "chooses entries by the base's weights",
    "passthrough": "stacks layers of whole models",
    "model_stock": "has no rule here; `--rule weighted` is the mean that it moves towards the base",
    "ram": "has no rule here; `loraloom rules` lists what there is",
    "ramplus_tl": "has no rule here; `loraloom rules` lists what there is",
    "breadcrumbs_ties": "has no rule here; --rule breadcrumbs and --rule ties are the two that it joins",
    "della": "rescales by the L1 norm, where --rule della divides every entry by its chance, as its authors do",
    "della_linear": "rescales by the L1 norm, and has no rule here; --rule dare is near",
}
_INT8 = "saves memory in mergekit, and changes no value"
_BY_L1 = "entries are divided by the density, as published; mergekit matches each tensor's L1 norm: equal on average"


@dataclass(frozen=True)
class _Method:
    """How one of mergekit's methods is said here.

    rule: its name. options: mergekit's parameters of each model by the rule's options, with mergekit's defaults.
    normalize, rescale: mergekit's defaults; None where it has no such parameter.
    weighted: whether it reads weights. votes: whether entries vote, so that normalizing divides entry by entry.
    """

    rule: str
    options: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    normalize: bool | None = False
    rescale: bool | None = None
    weighted: bool = True
    votes: bool = False

    @property
    def known(self) -> set[str]:
        """Return the parameters of mergekit's that mean something."""
        found = {name for name, _ in self.options.values()} | {"int8_mask"}
        found |= {"weight"} if self.weighted else set()
        found |= {"normalize"} if self.normalize is not None else set()
        return found | ({"lambda", "rescale"} if self.rescale is not None else set())


_DENSITY = {"density": ("density", 1.0)}
_METHODS = {
    "linear": _Method("weighted", normalize=True),
    "task_arithmetic": _Method("task_arithmetic", rescale=False),
    "ties": _Method("ties", _DENSITY, normalize=True, rescale=False, votes=True),
    "dare_linear": _Method("dare", _DENSITY, rescale=True),
    "dare_ties": _Method("dare_ties", _DENSITY, rescale=True, votes=True),
    "breadcrumbs": _Method("breadcrumbs", {**_DENSITY, "gamma": ("gamma", 0.01)}, rescale=False),
    "sce": _Method("sce", {"density": ("select_topk", 1.0)}, normalize=None, weighted=False),
}
_DROPPING = ("dare", "dare_ties")


class _Model(BaseModel):
    model_config = ConfigDict(extra="allow", coerce_numbers_to_str=True)

    model: str | dict[str, Any]
    parameters: dict[str, Any] | None = None


class _Recipe(Settings):
    """The fields of mergekit's MergeConfiguration."""

    model_config = ConfigDict(extra="allow", coerce_numbers_to_str=True)

    merge_method: str
    models: list[_Model] | None = Field(None, min_length=1)
    modules: Any = None
    slices: Any = None
    base_model: str | dict[str, Any] | None = None
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    parameters: dict[str, Any] | None = None
    tokenizer: Any = None
    tokenizer_source: Any = None
    chat_template: Any = None


@dataclass(frozen=True)
class MergekitMerge:
    """A merge of adapters that mergekit's YAML describes.

    base: name or folder of the base model of all, as the YAML has it.
    adapters: folders, or names on the hub with `@revision` where the YAML has one.
    options: how they are merged.
    left_out: what the YAML asks for beside the updates, and what differs by chance alone: with why.
    """

    base: str
    adapters: list[Path]
    options: MergeOptions
    left_out: dict[str, str]


@reads_file
def read_mergekit(path: str | Path) -> MergekitMerge:
    """Return the merge of adapters that a YAML file of mergekit's describes.

    Taken: models as `base+lora`, weight, density, gamma, select_topk, normalize, rescale, lambda, dtype; of the methods
    linear, task_arithmetic, ties, dare_linear, dare_ties, breadcrumbs and sce. Where mergekit takes the whole part of
    density x entries, and of gamma x entries, here it is the nearest number: an entry more or less a layer.

    Raises LoraloomError that tells at once all that is asked of the updates and cannot be had here: other methods,
    whole models, slices, values that change over layers or tensors, densities of each model's own.
    """
    path = Path(path)
    hint = "see docs/mergekit.md for what is taken"
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise_problems(str(path), ["holds no options"], hint)
    read = _Reading(checked(_Recipe, str(path), content))
    raise_problems(str(path), read.problems, hint)
    return MergekitMerge(read.base, [Path(lora) for lora in read.loras], read.options, read.left_out)


class _Reading:
    """One recipe on its way to options: what it says, and what is wrong with it."""

    def __init__(self, recipe: _Recipe) -> None:
        self.recipe = recipe
        self.problems: list[str] = []
        self.left_out: dict[str, str] = {}
        self.base, self.loras, self.options = "", list[str](), MergeOptions()
        method = _METHODS.get(recipe.merge_method)
        if method is None:
            why = _REFUSED.get(recipe.merge_method, did_you_mean(recipe.merge_method, [*_METHODS, *_REFUSED]))
            self.problems.append(f"merge_method {recipe.merge_method!r} is not taken: {why}")
            method = _Method("")
        self._beside()
        members = self._members()
        self.options = self._options(method, members)

    def _beside(self) -> None:
        """Note what is asked for beside the models, and refuse what is no list of models."""
        for name, value in (("slices", self.recipe.slices), ("modules", self.recipe.modules)):
            if value is not None:
                self.problems.append(f"{name} is not taken: write `models`, whose layers are all merged")
        if self.recipe.models is None and not self.problems:
            self.problems.append("models is missing: name each adapter as `model: base+lora`")
        for name in ("tokenizer", "tokenizer_source", "chat_template"):
            if getattr(self.recipe, name) is not None:
                self.left_out[name] = "an adapter brings no vocabulary of its own; the base's is used"
        unknown = [*(self.recipe.model_extra or {})]
        unknown += [f"models.{name}" for one in self.recipe.models or () for name in one.model_extra or ()]
        self.left_out.update(dict.fromkeys(unknown, "mergekit reads nothing of that name"))

    def _members(self) -> list[tuple[str | None, Mapping[str, Any]]]:
        """Return each model's adapter, None for the bare base, with its parameters; settle base and adapters."""
        parts = [_parts(one.model) for one in self.recipe.models or ()]
        base_of = _parts(self.recipe.base_model)[0] if self.recipe.base_model else None
        bases = [base_of] if base_of else [base for base, lora in parts if lora][:1]
        self.base = bases[0] if bases else ""
        found: list[tuple[str | None, Mapping[str, Any]]] = []
        for model, (base, lora) in zip(self.recipe.models or (), parts, strict=True):
            if lora is None and base != self.base:
                self.problems.append(f"model {base!r} is a whole model: write `base+lora`, with the adapter made of it")
            elif base != self.base and same_base(base, self.base) is not True:
                self.problems.append(f"model {base!r}+{lora!r} is on another base than {self.base!r}")
            found.append((lora, model.parameters or {}))
        self.loras = [lora for lora, _ in found if lora]
        if self.recipe.models and not self.loras and not self.problems:
            self.problems.append("no model has an adapter: write `model: base+lora`")
        return found

    def _options(self, method: _Method, members: list[tuple[str | None, Mapping[str, Any]]]) -> MergeOptions:
        """Return the options of the merge, for adapters in the order of `loras`."""
        shared = self.recipe.parameters or {}
        for name in sorted({*shared, *(name for _, own in members for name in own)} - method.known):
            if method.rule:
                self.left_out[name] = f"{self.recipe.merge_method} reads nothing of that name"
        if self._constant(shared, "int8_mask", False):
            self.left_out["int8_mask"] = _INT8
        normalize = bool(self._constant(shared, "normalize", method.normalize or False))
        scale = self._constant(shared, "lambda", 1.0) if "lambda" in method.known else 1.0
        options: dict[str, Any] = {
            to: self._common(members, shared, name, default) for to, (name, default) in method.options.items()
        }
        scale *= self._rescaled(method, shared, options.get("density", 1.0))
        weights = self._weights(method, members, shared)
        if method.votes:
            options = {**options, "divisor": "weights" if normalize else "one"}
        elif self.recipe.merge_method == "linear" or normalize:
            total = sum(weights)
            if not normalize and not math.isclose(total, 1.0) and not self.problems:
                self.problems.append(
                    f"weights that sum to {total:g} scale the base too: set normalize, or let them be 1"
                )
            scale /= total if normalize and abs(total) >= 1e-8 else 1.0
        of_loras = [weight for weight, (lora, _) in zip(weights, members, strict=True) if lora]
        dtype = self.recipe.out_dtype or self.recipe.dtype
        return MergeOptions(method.rule, options, of_loras, scale, dtype=dtype)

    def _weights(
        self, method: _Method, members: list[tuple[str | None, Mapping[str, Any]]], shared: Mapping[str, Any]
    ) -> list[float]:
        """Return a weight for every model; of the base, only what `linear` reads counts."""
        if not method.weighted:
            return [1.0] * len(members)
        found = []
        for lora, own in members:
            missing = "weight" not in own and "weight" not in shared
            counts = lora or self.recipe.merge_method == "linear"
            if missing and counts:
                self.problems.append(f"model {lora or self.base!r} has no weight")
            found.append(self._constant({**shared, **own}, "weight", 0.0) if counts else 0.0)
        return found

    def _rescaled(self, method: _Method, shared: Mapping[str, Any], density: float) -> float:
        """Return what undoes the division by the density where the recipe asks for none."""
        rescale = bool(self._constant(shared, "rescale", method.rescale or False))
        if method.rule in _DROPPING:
            if density < 1 and rescale:
                self.left_out["rescale"] = _BY_L1
            return 1.0 if rescale else density
        if rescale:
            self.problems.append("rescale is not taken but for dare: it matches each tensor's L1 norm")
        return 1.0

    def _common(
        self,
        members: list[tuple[str | None, Mapping[str, Any]]],
        shared: Mapping[str, Any],
        name: str,
        default: float,
    ) -> float:
        """Return a parameter that all adapters must have alike."""
        values = [self._constant({**shared, **own}, name, default) for lora, own in members if lora]
        if len(set(values)) > 1:
            self.problems.append(
                f"{name} differs between the models ({', '.join(map(str, values))}): one holds for all"
            )
        return values[0] if values else default

    def _constant(self, given: Mapping[str, Any], name: str, default: float) -> float:
        """Return a parameter that is one number for all layers and tensors."""
        value = given.get(name, default)
        constant = _constant(value)
        if constant is None:
            problem = f"{name} {str(value)[:80]} changes over layers or tensors: one number holds for all"
            self.problems += [problem] if problem not in self.problems else []
        return default if constant is None else constant


def _constant(value: Any) -> float | None:
    """Return the number that a ParameterSetting of mergekit's is everywhere; None where it is none."""
    if isinstance(value, bool | int | float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return _constant(value.get("value")) if value.get("filter") in (None, "*") else None
    if not isinstance(value, list) or not value:
        return None
    if isinstance(value[0], dict) and value[0].get("filter") in (None, "*"):
        return _constant(value[0])  # the first that fits is taken
    numbers = {_constant(one.get("value") if isinstance(one, dict) else one) for one in value}
    last = value[-1]
    ends = not isinstance(last, dict) or last.get("filter") in (None, "*")
    return numbers.pop() if len(numbers) == 1 and ends else None


def _parts(model: str | dict[str, Any]) -> tuple[str, str | None]:
    """Return base and adapter of a ModelReference of mergekit's: `base(@revision)(+lora(@revision))`."""
    if isinstance(model, str):
        base, plus, lora = model.partition("+")
        return base, lora if plus else None
    return _place(model.get("model")), _place(model["lora"]) if model.get("lora") else None


def _place(part: Any) -> str:
    if isinstance(part, dict):
        revision = part.get("revision")
        return f"{part.get('path')}@{revision}" if revision else str(part.get("path"))
    return str(part)
