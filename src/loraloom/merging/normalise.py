"""How loud each adapter is beside the others of a merge, and the factors that make all equally loud.

Adapters of different rank, scaling, learning rate or number of layers differ in |dW| by far more than in what they
learnt, and most rules give the larger entries and directions the say: a quiet adapter is drowned. The energy of an
adapter is |dW|_F^2, summed over its layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

from loraloom.adapters.together import layers_of_all
from loraloom.adapters.update import Adapter, Update
from loraloom.errors import did_you_mean
from loraloom.merging.mends import clip_factors
from loraloom.merging.options import MergeOptions, Normalise
from loraloom.merging.registry import Rule
from loraloom.statistics.file import Statistics
from loraloom.statistics.moments import Moment

LOUD = 3.0  # times the energy of another adapter: from here on `auto` normalises, and else there is a warning

NormaliseFrom = Literal["asked", "energies", "weights", "rule", "clip", "single adapter", "stack"]  # who decided


def factors_of(
    normalise: Normalise,
    adapters: Mapping[str, Adapter],
    statistics: Mapping[str, Statistics],
    clip: float | None = None,
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Return g / size of every update, by adapter's name and module path, and what has no size.

    g is the geometric mean of the sizes in one layer, of the adapters that have an update there: alone, it stays as it
    is, and so does one that is zero.

    normalise: what a size is. "norm": |dW|_F. "response": the root mean square of |dW h| over the adapter's own inputs
        h, sqrt(tr(dW S dW^T)) with S the mean second moment of what the layer reads. "none": there are no factors.
    adapters: those that take part, by name.
    statistics: of their inputs, by name; for "response" alone.
    clip: without normalising, the most energy in a layer, times the adapters' median there; see `clip_factors`.
    """
    squares: Mapping[str, Mapping[str, float]]
    if normalise == "none":
        return {} if clip is None else clip_factors({name: one.energies for name, one in adapters.items()}, clip), []
    if normalise == "norm":
        squares, why = {name: one.energies for name, one in adapters.items()}, "every update is zero"
    else:
        why = "it does nothing to its own inputs"
        squares = {
            name: {module: _response(update, statistics[name].moment(module)) for module, update in one.updates.items()}
            for name, one in adapters.items()
        }
    logs = {
        name: {module: math.log(square) / 2 for module, square in layers.items() if square > 0}
        for name, layers in squares.items()
    }
    nothing = [f"{name!r} cannot be normalised: {why}: leave it out" for name, layers in logs.items() if not layers]
    by_layer: dict[str, list[float]] = {}
    for layers in logs.values():
        for module, log in layers.items():
            by_layer.setdefault(module, []).append(log)
    # exactly, whatever the order: rules that draw at random give out their draws by falling norm, which is equal now
    middle = {module: math.fsum(found) / len(found) for module, found in by_layer.items()}
    return {
        name: {module: math.exp(middle[module] - log) for module, log in layers.items()}
        for name, layers in logs.items()
    }, nothing


def loudness(energies: Iterable[float]) -> float:
    """Return how many times the energy of the quietest adapter that of the loudest is; those of none do not count."""
    heard = [one for one in energies if one > 0]
    return max(heard) / min(heard) if heard else 1.0


class Normalised(NamedTuple):
    """What is made equal of all adapters, never "auto"; who decided it; and how unlike they are where that did."""

    way: Normalise
    who: NormaliseFrom
    loudness: float | None = None


AS_THEY_ARE = Normalised("none", "asked")


def decided(options: MergeOptions, rule: Rule, members: Sequence[Adapter], *, alone: bool) -> Normalised:
    """Return what is to be made equal: what was asked for, or what "auto" comes to. It reads every weight for that."""
    if options.normalise != "auto":
        return Normalised(options.normalise, "asked")
    if options.stack or alone:
        return Normalised("none", "stack" if options.stack else "single adapter")
    if options.weights is not None or options.clip is not None:
        return Normalised("none", "clip" if options.weights is None else "weights")
    if rule.whole or "moments" in rule.supplied:
        return Normalised("none", "rule")
    merged = layers_of_all(members, options.targets)
    times = loudness(sum(energy for at, energy in one.energies.items() if at in merged) for one in members)
    return Normalised("norm" if times > LOUD else "none", "energies", times)


def normalise_problems(normalise: str) -> list[str]:
    """Tell of a way to normalise that there is not."""
    known = get_args(Normalise)
    return [] if normalise in known else [f"normalise {normalise!r} is unknown: {did_you_mean(normalise, known)}"]


def silent(energies: Mapping[str, float]) -> list[str]:
    """Return a warning for each adapter, by name, whose energy is 0: a start, or one saved without its factors."""
    return [f"{name} changes nothing, every update is 0: was it trained?" for name, one in energies.items() if one == 0]


def drowned(energies: Mapping[str, float]) -> list[str]:
    """Return a warning where energies, by adapter's name, differ by more than a factor of LOUD."""
    heard, times = {name: one for name, one in energies.items() if one > 0}, loudness(energies.values())
    if times <= LOUD:
        return []
    loudest = max(heard, key=lambda name: heard[name])
    quiet = [name for name, one in heard.items() if LOUD * one < heard[loudest]]
    return [
        f"{loudest} has up to {times:.3g} times the energy |dW|^2 of {', '.join(quiet)}: what the quiet ones learnt is "
        "likely to be lost; `--normalise norm` makes all equally loud"
    ]


def _response(update: Update, moment: Moment) -> float:
    """Return the mean of |dW h|^2 over the rows h of `moment`."""
    B = update.B.double()
    through = float(((B.T @ B) * moment.seen_by(update.A.double())).sum())
    return max(through, 0.0) / max(moment.count, 1)  # where it is 0, rounding may leave it below
