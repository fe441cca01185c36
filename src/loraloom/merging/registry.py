"""The registry of merging rules: a rule is one decorated function, and its signature is its option schema."""

from __future__ import annotations

import functools
import inspect
import types
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import entry_points
from typing import Any, Literal, Protocol, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from torch import Tensor

from loraloom.adapters.lowrank import Shared
from loraloom.adapters.update import Update
from loraloom.errors import LoraloomError, did_you_mean
from loraloom.merging.distillation import Distiller
from loraloom.merging.options import MergeOptions
from loraloom.model.tokens import Batch
from loraloom.statistics.moments import Moment

GROUP = "loraloom.rules"
Space = Literal["full", "core", "knots"]
Need = Literal["statistics", "base and texts", "labels", "heads", "seed"]
Result = Update | Tensor | Shared  # of one layer
Function = TypeVar("Function", bound=Callable[..., "Result | dict[str, Result]"])

_PLAIN = (int, float, bool, str, type(None))
# names that mean something else in a call of merge(), or among the options of the command `merge`
TAKEN = (
    *("adapters", "statistics", *(field.name for field in fields(MergeOptions))),
    *(
        "weight",
        "recipe",
        "probe_texts",
        "unlabelled",
        "column",
        "base",
        "output",
        "overwrite",
        "fuse_into",
        "from_mergekit",
        "dry_run",
        "screen",
        "drop_refused",
        "for",
        "quiet",
        "json",
        "help",
    ),
)
_SUPPLIED = (
    "distiller",
    "generator",
    "moments",
    "probe",
    "rank",
    "weights",
)  # keyword-only, without a default or None: given to the rule by `merge`
_HELP = (
    "write it as `def f(updates, *, option: float = 0.2)`: keyword-only, each int, float, bool, str, Literal or None"
)
_RULES: dict[str, Rule] = {}


class Probe(Protocol):
    """A frozen base model with each task's texts, heads and, where they are at hand, labels.

    Tasks are numbered as the adapters are. `loraloom.model.probe.TaskProbe` is one for Hugging Face models.
    """

    @property
    def batches(self) -> Sequence[Sequence[Batch]]:
        """Return the texts of every task as model inputs, batch by batch."""

    @property
    def labels(self) -> Sequence[Sequence[Tensor]]:
        """Return the labels of every task, batch by batch as `batches`: int64 classes, or float32 for regression.

        Empty where there are none.
        """

    @property
    def regression(self) -> Sequence[bool]:
        """Tell of every task whether its head returns a number, not the logits of classes."""

    def run(
        self,
        task: int,
        batch: Batch,
        updates: Mapping[str, Update],
        see: Callable[[str, Tensor], None] | None = None,
    ) -> Tensor:
        """Return the outputs (k, classes or 1) of the task's head for one batch, with `updates` in the base model.

        Differentiable in the updates. `see(module, rows)` is called for every updated layer, in the order in which the
        layers run, with what it reads: (tokens, n), padding left out, differentiable too. Take gradients before another
        task runs: the heads may share their place in the model.
        """

    def step(self, done: int, total: int) -> None:
        """Tell the user that `done` of `total` steps are behind."""


@dataclass(frozen=True)
class Rule:
    """A registered function with its facts.

    `function(updates, *, options...)` merges ONE layer; the weights are folded into each B already and the scale is
    applied afterwards. An adapter that lacks the layer gives an update of rank 0. It returns an Update; or the dense
    (m, n) dW where the rule has no low-rank form, which `merge` truncates to rank sum r_i and reports the energy lost;
    or a `Shared`, which also tells what each task reads of it.
    What else it wants it names in its signature, keyword-only, without a default or with None: `generator:
    torch.Generator`; `moments: Sequence[Moment]`, of each task's inputs to the layer; `rank: int | None`, the one that
    the caller asked for; `weights: Sequence[float]`, those in the updates already; `probe: Probe`, the base model with
    each task's texts; `distiller: Distiller`, which trains a merge by them. With either of the last two the rule merges
    ALL layers: `function(layers: Mapping[str, Sequence[Update]], *, probe, ...)` returns its result by module path.

    formula: what it computes of one layer, in one line.
    paper: where it was published.
    summary: what it does, in words.
    cost: what it takes beside reading and writing.
    exact: whether the low-rank result equals the dense rule.
    spaces: where entries may be compared; of a rule in factors, whose result does not depend on it, "full" alone.
    default_scale, default_weights: in force where the caller names none; weights of one, or of 1/T.
    output_rank: the rank that `merge` truncates to where the caller names none: sum r_i or max r_i.
    labelled: whether the probe must hold labels.
    heads: whether it looks at every class of an output, so that there must be few: not the words of a language model.
    """

    name: str
    function: Callable[..., Any]
    formula: str
    paper: str
    summary: str
    cost: str
    exact: bool
    spaces: tuple[Space, ...]
    default_scale: float
    default_weights: Literal["one", "mean"]
    output_rank: Literal["sum", "max"]
    labelled: bool
    heads: bool
    supplied: frozenset[str]
    options: type[BaseModel]

    @property
    def needs(self) -> tuple[Need, ...]:
        """Return what the rule needs beyond the adapters."""
        found: list[Need] = []
        if "moments" in self.supplied:
            found.append("statistics")
        if self.whole:
            found.append("base and texts")
        if self.labelled:
            found.append("labels")
        if self.heads:
            found.append("heads")
        if "generator" in self.supplied:
            found.append("seed")
        return tuple(found)

    @property
    def notes(self) -> str:
        """Return what the function's docstring tells: what is computed, how it differs from what was published."""
        return inspect.cleandoc(self.function.__doc__ or "")

    @property
    def whole(self) -> bool:
        """Tell whether the rule merges all layers at once, with a probe or a distiller."""
        return "probe" in self.supplied or self.distils

    @property
    def distils(self) -> bool:
        """Tell whether the rule trains the merged adapter by its single adapters, with a distiller."""
        return "distiller" in self.supplied

    def bound(self, ranks: Sequence[int]) -> int:
        """Return the rank that a layer's result has at most, of updates of `ranks`, where the caller names none."""
        return max(ranks) if self.output_rank == "max" else sum(ranks)

    def check(self, options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Return all options with their defaults filled in, and what is wrong with those given."""
        known = self.options.model_fields
        problems = [
            f"rule {self.name!r} has no option {name!r}: {did_you_mean(name, known) if known else 'it takes none'}"
            for name in options
            if name not in known
        ]
        try:
            given = {name: value for name, value in options.items() if name in known}
            return self.options(**given).model_dump(), problems
        except ValidationError as error:
            problems += [f"option {e['loc'][0]!r}: {e['msg']}, not {e['input']!r}" for e in error.errors()]
            return {}, problems

    def layer(
        self,
        updates: Sequence[Update],
        options: Mapping[str, Any],
        *,
        seed: int = 0,
        rank: int | None = None,
        moments: Sequence[Moment] = (),
        weights: Sequence[float] | None = None,
    ) -> Result:
        """Merge the updates of one layer; `seed` feeds the generator of a rule that draws at random.

        weights: what each update was multiplied by already; None where it was nothing.
        """
        folded = [1.0] * len(updates) if weights is None else weights
        given = self._given(seed, rank=rank, moments=moments, weights=folded)
        result: Result = self.function(updates, **options, **given)
        return result

    def model(
        self,
        layers: Mapping[str, Sequence[Update]],
        options: Mapping[str, Any],
        *,
        probe: Probe | None = None,
        distiller: Distiller | None = None,
        seed: int = 0,
        rank: int | None = None,
    ) -> dict[str, Result]:
        """Merge all layers, by module path, with a rule that is `whole`."""
        result: dict[str, Result] = self.function(
            layers, **options, **self._given(seed, rank=rank, probe=probe, distiller=distiller)
        )
        return result

    def _given(self, seed: int, **more: Any) -> dict[str, Any]:
        everything = {"generator": torch.Generator().manual_seed(seed), **more}
        return {name: everything[name] for name in self.supplied}

    def schema(self) -> dict[str, Any]:
        """Return the rule as JSON would hold it; `options` as JSON Schema, by name, with type, bounds and default."""
        options = self.options.model_json_schema()["properties"]
        return {
            "name": self.name,
            "formula": self.formula,
            "paper": self.paper,
            "summary": self.summary,
            "cost": self.cost,
            "needs": list(self.needs),
            "spaces": list(self.spaces),
            "exact": self.exact,
            "output_rank": self.output_rank,
            "default_scale": self.default_scale,
            "default_weights": self.default_weights,
            "notes": self.notes,
            "options": {
                name: {key: value for key, value in option.items() if key != "title"}
                for name, option in options.items()
            },
        }


def rule(
    name: str,
    *,
    formula: str,
    paper: str,
    summary: str,
    cost: str,
    exact: bool,
    spaces: tuple[Space, ...] = ("full",),
    default_scale: float = 1.0,
    default_weights: Literal["one", "mean"] = "one",
    output_rank: Literal["sum", "max"] = "sum",
    labelled: bool = False,
    heads: bool = False,
) -> Callable[[Function], Function]:
    """Register a function as a merging rule and return it untouched; see `Rule` for the arguments.

    Raises LoraloomError where the name is taken or an option of the function is not keyword-only and plainly typed.
    """

    def register(function: Function) -> Function:
        if name in _RULES:
            other = _RULES[name].function
            raise LoraloomError(f"rule {name!r} exists: {other.__module__}.{other.__qualname__}", "choose another name")
        supplied, options = _signature(name, function, spaces)
        if labelled and "probe" not in supplied:
            raise LoraloomError(f"rule {name!r}: labels come with a probe", "give it a parameter `probe: Probe`")
        _RULES[name] = Rule(
            name=name,
            function=function,
            formula=formula,
            paper=paper,
            summary=summary,
            cost=cost,
            exact=exact,
            spaces=spaces,
            default_scale=default_scale,
            default_weights=default_weights,
            output_rank=output_rank,
            labelled=labelled,
            heads=heads,
            supplied=supplied,
            options=options,
        )
        return function

    return register


def get_rule(name: str) -> Rule:
    """Return the rule called `name`. Raises LoraloomError with the nearest names where there is none."""
    load_plugins()
    if name not in _RULES:
        raise LoraloomError(f"no merging rule is called {name!r}", did_you_mean(name, _RULES))
    return _RULES[name]


def rule_names() -> tuple[str, ...]:
    """Return the names of all rules, those of installed plugins included, in alphabetical order."""
    load_plugins()
    return tuple(sorted(_RULES))


@functools.cache
def load_plugins(group: str = GROUP) -> None:
    """Load each entry point of the group once; importing it runs its decorator. A broken one is named, not fatal."""
    for entry in entry_points(group=group):
        try:
            entry.load()
        except Exception as error:  # whatever a plugin raises: the others must still work
            source = f" of {entry.dist.name}" if entry.dist else ""
            kind = group.rpartition(".")[2].removesuffix("s")
            warnings.warn(f"{kind} plugin {entry.name!r}{source} ({entry.value}) is left out: {error!r}", stacklevel=3)


def option_flag(name: str) -> str:
    """Return an option of a rule as it is typed on the command line."""
    return f"--{name.replace('_', '-')}"


def _signature(
    name: str, function: Callable[..., Any], spaces: Sequence[str]
) -> tuple[frozenset[str], type[BaseModel]]:
    """Return what `merge` supplies to `function`, and the pydantic model of its options; raise where one cannot be."""
    parameters = list(inspect.signature(function, eval_str=True).parameters.values())
    if not parameters or parameters[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        raise LoraloomError(f"rule {name!r}: the first parameter must be the updates", _HELP)
    found: dict[str, Any] = {}
    supplied = set()
    for parameter in parameters[1:]:
        if parameter.name in _SUPPLIED and parameter.default in (inspect.Parameter.empty, None):
            supplied.add(parameter.name)
            continue
        fault = _option_fault(parameter)
        if fault:
            raise LoraloomError(f"rule {name!r}: option {parameter.name!r} {fault}", _HELP)
        found[parameter.name] = (parameter.annotation, parameter.default)
    config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)
    model: type[BaseModel] = create_model(f"{name}_options", __config__=config, **found)
    space = model.model_fields.get("space")
    if len(spaces) > 1 and (space is None or set(typing.get_args(space.annotation)) != set(spaces)):
        raise LoraloomError(f"rule {name!r} has several spaces", f"give it `space: Literal[{str(spaces)[1:-1]}]`")
    return frozenset(supplied), model


def _option_fault(parameter: inspect.Parameter) -> str:
    if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
        return "is not keyword-only"
    if parameter.name in (*TAKEN, *_SUPPLIED):
        return "has a name that `merge` takes for itself: choose another"
    if parameter.annotation is inspect.Parameter.empty:
        return "has no type annotation"
    if not _is_plain(parameter.annotation):
        return f"has the unsupported type {parameter.annotation}"
    if parameter.default is inspect.Parameter.empty:
        return "has no default"
    return ""


def _is_plain(annotation: Any) -> bool:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _is_plain(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return all(_is_plain(part) for part in typing.get_args(annotation))
    return origin is Literal or annotation in _PLAIN
