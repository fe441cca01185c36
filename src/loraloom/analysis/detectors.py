"""The registry of detectors of a screening: a detector is one decorated function over what was measured."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from loraloom.analysis.screening_measures import Seen
from loraloom.errors import LoraloomError
from loraloom.merging.registry import load_plugins

GROUP = "loraloom.detectors"  # of the entry points by which a package brings detectors of its own
Verdict = Literal["pass", "look", "refuse"]
Need = Literal["base and texts", "starts", "20 references"]
Function = TypeVar("Function", bound=Callable[..., "Mapping[str, Sighting]"])

_SUPPLIED: dict[str, Need] = {"texts": "base and texts", "starts": "starts", "scores": "20 references"}
_DETECTORS: dict[str, Detector] = {}


class Sighting(NamedTuple):
    """What a detector sees of one adapter.

    score: how suspicious it is; the detector's thresholds are of it.
    value, compared: the number that is told, and what it was compared with.
    where: the layer, adapter or text that it is of; "" where it is of the whole adapter.
    """

    score: float
    value: float
    compared: float
    where: str = ""


@dataclass(frozen=True)
class Detector:
    """A registered function with its facts.

    `function(seen)` returns a `Sighting` of every adapter of `seen.members` that it can tell anything of, by name. What
    else it wants it names in its signature, keyword-only and without a default: `texts`, the base model with each
    adapter's unlabelled texts; `starts`, the adapters' A's as they started; and `scores`, what the detectors that need
    nothing gave every adapter, references too, by detector and name. Without them it is left out.

    says: what was found, in words, with {value}, {compared} and {where} in it.
    look, refuse: scores from which an adapter is to be looked at, and refused; infinite where it never is.
    paper: where it was published, or why it tells anything.
    """

    name: str
    function: Callable[..., Mapping[str, Sighting]]
    says: str
    look: float
    refuse: float
    paper: str
    supplied: frozenset[str]

    @property
    def needs(self) -> tuple[Need, ...]:
        """Return what it needs beside the adapters."""
        return tuple(need for name, need in _SUPPLIED.items() if name in self.supplied)

    @property
    def notes(self) -> str:
        """Return what the function's docstring tells: what is computed, and what it cannot see."""
        return inspect.cleandoc(self.function.__doc__ or "")

    def verdict(self, score: float) -> Verdict:
        """Return what a score means."""
        return "refuse" if score >= self.refuse else "look" if score >= self.look else "pass"

    def run(self, seen: Seen, supplied: Mapping[str, Any]) -> Mapping[str, Sighting]:
        """Return what it sees of the members, given all that it needs by name."""
        return self.function(seen, **{name: supplied[name] for name in self.supplied})


def detector(
    name: str, *, says: str, look: float, refuse: float = float("inf"), paper: str
) -> Callable[[Function], Function]:
    """Register a function as a detector and return it untouched; see `Detector` for more of the arguments.

    name: by which it is known.
    says: what it tells of an adapter, with {value}, {compared} and {where} to be filled in.
    look, refuse: the scores from which on an adapter is to be looked at, or refused.
    paper: whose idea it is.

    Raises LoraloomError where the name is taken or the function wants what nobody supplies.
    """

    def register(function: Function) -> Function:
        if name in _DETECTORS:
            other = _DETECTORS[name].function
            raise LoraloomError(f"detector {name!r} exists: {other.__module__}.{other.__qualname__}", "rename it")
        wanted = list(inspect.signature(function).parameters.values())[1:]
        unknown = [one.name for one in wanted if one.name not in _SUPPLIED or one.kind is not one.KEYWORD_ONLY]
        if unknown:
            hint = f"keyword-only {' and '.join(_SUPPLIED)} are all that there is beside what was measured"
            raise LoraloomError(f"detector {name!r}: nobody supplies {', '.join(unknown)}", hint)
        supplied = frozenset(one.name for one in wanted)
        _DETECTORS[name] = Detector(name, function, says, look, refuse, paper, supplied)
        return function

    return register


@functools.cache
def _plugins() -> None:
    load_plugins(GROUP)


def every_detector() -> tuple[Detector, ...]:
    """Return all detectors, those of installed plugins included, in the order of their registration."""
    _plugins()
    return tuple(_DETECTORS.values())
