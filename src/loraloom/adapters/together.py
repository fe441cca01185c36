"""Whether several adapters fit together, and what they share beside their updates."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from loraloom.adapters.bases import same_base
from loraloom.adapters.layout import parameters_of
from loraloom.adapters.update import Adapter, is_expert
from loraloom.files.tensors import tensors_sha256

Targets = Literal["union", "intersection", "same"]

_COPY = ".base_layer."  # follows the module's path in the name of a copy


def compatibility_problems(
    adapters: Sequence[Adapter], base: str | None = None, targets: Targets = "union"
) -> list[str]:
    """Return every difference of base model, forms and shapes between `adapters` that keeps them from one merge.

    base: a name that the caller gives for the base of all: their own are not compared then.
    targets: "same" wants all to adapt the same layers, "intersection" some that all of them adapt; see `layers_of_all`.
    """
    return _base_problems(adapters, base) + layer_problems(adapters, targets)


def layer_problems(adapters: Sequence[Adapter], targets: Targets = "union") -> list[str]:
    """Return what keeps the layers of `adapters` from one merge, whatever base each was trained on."""
    problems = []
    for other in adapters[1:]:
        problems += _class_problems(adapters[0], other) or _target_problems(adapters[0], other, targets)
    if targets == "intersection" and len(adapters) > 1 and not problems and not layers_of_all(adapters, targets):
        problems.append("no layer is adapted by all of them: take the union of their targets")
    owners: dict[str, Adapter] = {}
    for other in adapters:
        for module in sorted(other.shapes):
            problems += _shape_problems(module, owners.setdefault(module, other), other)
    experts = [one for one in adapters if one.config.get("target_parameters")]
    named = [sorted(one.config["target_parameters"]) for one in experts]
    meant = [_parameters(one) for one in experts]  # `experts.down_proj` and `mlp.experts.down_proj` may be one
    for one, names, paths in zip(experts[1:], named[1:], meant[1:], strict=True):
        if names != named[0] and paths != meant[0]:
            problems.append(f"target_parameters: {experts[0].name} has {named[0]}, {one.name} {names}")
    return problems


def _parameters(adapter: Adapter) -> set[str]:
    """Return the paths of the parameters that hold the experts which an adapter has."""
    modules = {form.module for form in adapter.forms.values() if is_expert(form)}
    return {path for module in modules for path in parameters_of(module, adapter.config)}


def one_base(one: Adapter, two: Adapter) -> bool | None:
    """Tell whether two adapters were trained on one base, by fingerprints or else names; None where none can tell."""
    told = _fingerprints_agree(one, two)
    return same_base(one.base, two.base) if told is None else told


def layers_of_all(adapters: Sequence[Adapter], targets: Targets) -> dict[str, Adapter]:
    """Return the layers of a merge by name, in order, each with the first of `adapters` that has it.

    Those that any adapter has, for the "union"; those that all have, otherwise.
    """
    owners: dict[str, Adapter] = {}
    for adapter in adapters:
        for module in adapter.shapes:
            owners.setdefault(module, adapter)
    if targets != "union":
        owners = {module: one for module, one in owners.items() if all(module in other.shapes for other in adapters)}
    return {module: owners[module] for module in sorted(owners)}


def common_copies(
    adapters: Mapping[str, Adapter], dropped: Collection[str] = ()
) -> tuple[Mapping[str, Tensor], list[str]]:
    """Return the base's weights that came with the adapters, in which all that bring them agree; and where not.

    PEFT saves the base's embedding beside its update. Where it was resized or trained the update alone is not enough.
    Those of layers that are `dropped` are left out.
    """
    common: dict[str, Mapping[str, Tensor]] = {}
    problems = []
    for name, adapter in adapters.items():
        for path in adapter.copies:
            if path.partition(_COPY)[0] in dropped:
                continue
            if path not in common:
                common[path] = adapter.copies
            elif not torch.equal(common[path][path], adapter.copies[path]):
                problems.append(
                    f"{path}: that of {name!r} differs from another's: trained or resized, it cannot be merged"
                )
    return Copies(common), problems


def equal_adapters(adapters: Mapping[str, Adapter]) -> list[tuple[str, str]]:
    """Return the pairs of names whose adapters hold the same updates."""
    alike: dict[object, list[str]] = {}  # by one layer, so that each adapter is read once, not once a pair
    for name, adapter in adapters.items():
        alike.setdefault(_mark(adapter), []).append(name)
    return [
        (one, two)
        for names in alike.values()
        for one, two in itertools.combinations(names, 2)
        if all(_equal(adapters[one], adapters[two], module) for module in adapters[one].shapes)
    ]


def _mark(adapter: Adapter) -> tuple[object, ...]:
    """Return what adapters of the same updates have in common: the shapes, and the numbers of one small layer."""
    at = min(adapter.shapes, key=lambda module: (sum(adapter.shapes[module][:2]), module))
    update = adapter.updates[at]
    return frozenset(adapter.shapes.items()), tensors_sha256({"A": update.A, "B": update.B})


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


def _base_problems(adapters: Sequence[Adapter], base: str | None) -> list[str]:
    """Return the adapters that were trained on other bases, unless the caller gives the name of one."""
    # one of each kind: of two hundred adapters of one base there are twenty thousand pairs
    kinds = {(one.base, one.fingerprint, frozenset(one.shapes) if one.fingerprint else None): one for one in adapters}
    if not any(_bases_differ(*pair, base) for pair in itertools.combinations(kinds.values(), 2)):
        return []
    pairs = list(itertools.combinations(adapters, 2))
    differing = [pair for pair in pairs if _bases_differ(*pair, base)]
    # against the first where it can tell; a folder's name may leave it to the others
    return [
        f"base model: {one.name} has {one.base!r:.200}, {two.name} has {two.base!r:.200}: if they are one, name it by "
        "--base, or mend base_model_name_or_path"
        for one, two in [pair for pair in differing if pair[0] is adapters[0]] or differing
    ]


def _target_problems(first: Adapter, other: Adapter, targets: Targets) -> list[str]:
    """Return the layers that only one of two adapters has, where all must have the same."""
    problems = []
    for left, right in ((first, other), (other, first)) if targets == "same" else ():
        missing = sorted(set(left.shapes) - set(right.shapes))
        if missing:
            shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            problems.append(f"{left.name} adapts {shown}; {right.name} does not")
    return problems


def _class_problems(first: Adapter, other: Adapter) -> list[str]:
    """Tell where one adapter has its layers in a part of the model that is the whole model to the other."""
    one, two = _stems(first), _stems(other)
    for outer, inner, longer, shorter in ((first, other, one - two, two - one), (other, first, two - one, one - two)):
        for long, short in itertools.product(sorted(longer), sorted(shorter)):
            if long.endswith(f".{short}"):
                return [
                    f"{outer.name} has the layers of {inner.name} under {long.removesuffix(short)!r}: they were "
                    "trained in two classes of model; name the layers as the base model of the merge does"
                ]
    return []


def _stems(adapter: Adapter) -> set[str]:
    """Return what stands before the first number in the paths of its layers, or before the last name."""
    parts = [module.split(".") for module in adapter.shapes]
    numbers = [next((i for i, part in enumerate(path) if part.isdigit()), len(path) - 1) for path in parts]
    return {".".join(path[:count]) for path, count in zip(parts, numbers, strict=True)} - {""}


def _shape_problems(module: str, first: Adapter, other: Adapter) -> list[str]:
    """Return how a layer differs between two adapters that both have it."""
    (m, n, _), (other_m, other_n, _) = first.shapes[module], other.shapes[module]
    if first.forms.get(module) != other.forms.get(module):
        kinds = [one.forms[module].kind if module in one.forms else "linear layer" for one in (first, other)]
        return [f"{module}: {first.name} has it as {kinds[0]}, {other.name} as {kinds[1]}"]
    if (m, n) != (other_m, other_n):
        return [f"{module}: {first.name} is {m} x {n}, {other.name} is {other_m} x {other_n}"]
    return []


def _bases_differ(one: Adapter, two: Adapter, base: str | None) -> bool:
    """Compare the bases by what can tell, by the names in the configs only where the caller gives none."""
    told = _fingerprints_agree(one, two)
    return told is False or (told is None and base is None and same_base(one.base, two.base) is False)


def _fingerprints_agree(one: Adapter, two: Adapter) -> bool | None:
    """Tell whether the fingerprints of two adapters' bases are one; None where they cannot tell.

    A fingerprint is of the adapted layers' weights, so it differs where these do.
    """
    if one.fingerprint and one.fingerprint == two.fingerprint:
        return True
    comparable = one.fingerprint and two.fingerprint and set(one.shapes) == set(two.shapes)
    return False if comparable else None
