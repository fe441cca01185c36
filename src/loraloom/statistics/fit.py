"""Whether statistics fit together, and whether they cover what adapters read."""

from __future__ import annotations

from collections.abc import Mapping

from loraloom.adapters.update import Adapter
from loraloom.statistics.file import Statistics


def base_differences(statistics: Mapping[str, Statistics]) -> list[str]:
    """Tell which of `statistics`, by name, are of another base model or of other layers than the first."""
    name, first = next(iter(statistics.items()))
    problems = []
    for other, seen in statistics.items():
        # the fingerprint is of these layers' weights, so it differs where they do
        if seen.layers != first.layers:
            problems.append(f"statistics of {other!r} cover other layers than those of {name!r}")
        elif seen.fingerprint != first.fingerprint:
            bases = [f"{one.base} ({one.fingerprint[:12]})" for one in (seen, first)]
            problems.append(f"statistics of {other!r} come from {bases[0]}, those of {name!r} from {bases[1]}")
    return problems


def cover_problems(name: str, adapter: Adapter, statistics: Statistics, *, partly: bool = False) -> list[str]:
    """Tell what keeps `statistics` from covering the layers of the adapter called `name`.

    With `partly`, layers that they do not cover are no fault so long as they cover one.
    """
    problems = []
    # either is of the weights of its own layers, so it differs where these do
    comparable = adapter.fingerprint and set(adapter.shapes) == set(statistics.layers)
    if comparable and adapter.fingerprint != statistics.fingerprint:
        problems.append(f"{name!r}: the statistics are of another base model, {statistics.base}")
    missing = sorted(set(adapter.shapes) - set(statistics.layers))
    if partly and len(missing) == len(adapter.shapes):
        problems.append(f"{name!r}: the statistics cover none of its layers")
    elif missing and not partly:
        problems.append(f"{name!r}: the statistics lack {len(missing)} of its layers, {missing[0]} first")
    for module in sorted(set(adapter.shapes) & set(statistics.layers)):
        n, width = adapter.shapes[module].n, statistics.layers[module].in_features
        if n != width:
            problems.append(f"{name!r}: {module} reads {n} features, in the statistics {width}")
    return problems
