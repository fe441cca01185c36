"""Whether several adapters fit together, and what they share beside their updates."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from loraloom.adapters.bases import same_base
from loraloom.adapters.update import Adapter


def compatibility_problems(adapters: Sequence[Adapter], base: str | None = None) -> list[str]:
    """Return every difference of base model, target modules, forms and shapes between `adapters`.

    `base` is a name that the caller gives for the base of all: their own are not compared then.
    """
    pairs = list(itertools.combinations(adapters, 2))
    differing = [pair for pair in pairs if _bases_differ(*pair, base)]
    # against the first where it can tell; a folder's name may leave it to the others
    problems = [
        f"base model: {one.name} has {one.base!r:.200}, {two.name} has {two.base!r:.200}: if they are one, name it by "
        "--base, or mend base_model_name_or_path"
        for one, two in [pair for pair in differing if pair[0] is adapters[0]] or differing
    ]
    for other in adapters[1:]:
        first = adapters[0]
        problems += _layer_problems(first, other)
        for module in sorted(set(first.shapes) & set(other.shapes)):
            (m, n, _), (other_m, other_n, _) = first.shapes[module], other.shapes[module]
            if first.forms.get(module) != other.forms.get(module):
                kinds = [one.forms[module].kind if module in one.forms else "linear layer" for one in (first, other)]
                problems.append(f"{module}: {first.name} has it as {kinds[0]}, {other.name} as {kinds[1]}")
            elif (m, n) != (other_m, other_n):
                problems.append(f"{module}: {first.name} is {m} x {n}, {other.name} is {other_m} x {other_n}")
        targets = [frozenset(one.config.get("target_parameters") or ()) for one in (first, other)]
        if targets[0] != targets[1]:
            problems.append(
                f"target_parameters: {first.name} has {sorted(targets[0])}, {other.name} {sorted(targets[1])}"
            )
    return problems


def common_copies(adapters: Mapping[str, Adapter]) -> tuple[Mapping[str, Tensor], list[str]]:
    """Return the base's weights that came with the adapters, in which all that bring them agree; and where not.

    PEFT saves the base's embedding beside its update. Where it was resized or trained the update alone is not enough.
    """
    common: dict[str, Mapping[str, Tensor]] = {}
    problems = []
    for name, adapter in adapters.items():
        for path in adapter.copies:
            if path not in common:
                common[path] = adapter.copies
            elif not torch.equal(common[path][path], adapter.copies[path]):
                problems.append(
                    f"{path}: that of {name!r} differs from another's: trained or resized, it cannot be merged"
                )
    return Copies(common), problems


def equal_adapters(adapters: Mapping[str, Adapter]) -> list[tuple[str, str]]:
    """Return the pairs of names whose adapters hold the same updates."""
    return [
        (one, two)
        for (one, first), (two, other) in itertools.combinations(adapters.items(), 2)
        if first.shapes == other.shapes and all(_equal(first, other, module) for module in first.shapes)
    ]


def _equal(first: Adapter, other: Adapter, module: str) -> bool:
    one, two = first.updates[module], other.updates[module]
    return torch.equal(one.A, two.A) and torch.equal(one.B, two.B)


class Copies(Mapping[str, Tensor]):
    """Tensors by path, each read from the adapter that brings it when it is asked for."""

    def __init__(self, owners: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.owners = owners

    def __getitem__(self, path: str) -> Tensor:
        """Return one tensor."""
        return self.owners[path][path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.owners)

    def __len__(self) -> int:
        return len(self.owners)


def _layer_problems(first: Adapter, other: Adapter) -> list[str]:
    one, two = set(first.shapes), set(other.shapes)
    if one == two:
        return []
    for outer, inner, more, fewer in ((first, other, one, two), (other, first, two, one)):
        prefix = _prefix(more, fewer)
        if prefix:
            return [
                f"{outer.name} has the layers of {inner.name} under {prefix!r}: they were trained in two classes of "
                "model; name the layers as the base model of the merge does"
            ]
    problems = []
    for left, right, names in ((first, other, one - two), (other, first, two - one)):
        missing = sorted(names)
        if missing:
            shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            problems.append(f"{left.name} adapts {shown}; {right.name} does not")
    return problems


def _prefix(longer: set[str], shorter: set[str]) -> str:
    """Return what stands before each name of `shorter` in `longer`, or an empty string."""
    if len(longer) != len(shorter) or not longer:
        return ""
    parts = min(longer).split(".")
    prefixes = (".".join(parts[:count]) + "." for count in range(1, len(parts)))
    return next((prefix for prefix in prefixes if {prefix + name for name in shorter} == longer), "")


def _bases_differ(one: Adapter, two: Adapter, base: str | None) -> bool:
    """Compare the fingerprints of the bases where both are known, else their names, unless the caller gives one."""
    if one.fingerprint and two.fingerprint:
        return one.fingerprint != two.fingerprint
    return base is None and same_base(one.base, two.base) is False
