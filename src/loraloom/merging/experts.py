"""Where the updates of fused experts go: one parameter of the model, one tensor of the checkpoint or many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from loraloom.adapters.layout import without_wrappers
from loraloom.adapters.update import Form
from loraloom.merging.checkpoint import Checkpoint
from loraloom.merging.lookup import Names
from loraloom.merging.shards import Part


class Group(NamedTuple):
    """The experts of one parameter: the module that has it, each expert's module in the adapter, and their (m, n)."""

    module: str
    experts: list[str]
    shape: tuple[int, int]


def grouped(shapes: Mapping[str, tuple[int, int]], forms: Mapping[str, Form]) -> list[Group]:
    """Return the experts of an adapter by the parameter that they are of, in their order."""
    found: dict[str, dict[int, str]] = {}
    for name in shapes:
        if name in forms and forms[name].kind == "experts":
            found.setdefault(forms[name].module, {})[forms[name].index] = name
    return [
        Group(without_wrappers(module), [experts[index] for index in sorted(experts)], shapes[experts[0]])
        for module, experts in found.items()
    ]


def place_experts(groups: Sequence[Group], names: Names, base: Checkpoint) -> tuple[list[Part], list[str]]:
    """Return the checkpoint's tensors that take the updates of `groups`, and what does not fit.

    No name tells which parameter of its module a group is of; its shape does: (experts, m, n), or (experts, n, m) in
    modules that have inputs before outputs.
    """

    @cache
    def inputs_first() -> Set[str] | None:
        from loraloom.model.architecture import modules_with_inputs_first  # takes seconds to import

        return modules_with_inputs_first(base.config)

    found, problems = [], []
    for group in groups:
        module, (m, n) = names.module(group.module), group.shape
        fitting = [parts for name in names.modules[module] if (parts := _parts(name, group, names, base))]
        if len(fitting) != 1:
            what = f"{'several parameters' if fitting else 'no parameter'} of {len(group.experts)} experts of {m} x {n}"
            problems.append(f"{group.module}: {what} in the checkpoint: another model, or quantised")
            continue
        if m == n and len(fitting[0]) == 1:
            turned = inputs_first()
            if turned is None:
                problems.append(f"{fitting[0][0].name}: square, and nothing tells whether inputs or outputs come first")
                continue
            fitting = [[replace(fitting[0][0], transposed=module in turned)]]
        found += fitting[0]
    return found, problems


def _parts(name: str, group: Group, names: Names, base: Checkpoint) -> list[Part]:
    """Return the tensors of the parameter of this name, or none where it is not the one of the group."""
    if name in names.joined:
        return _split(names.joined[name], group, base)
    return _whole(base.parts[names.stored[name]], group)


def _whole(part: Part, group: Group) -> list[Part]:
    """Return the tensor that holds all experts, or none where this one does not."""
    shape = part.shape if len(part.shape) == 3 else (1, *part.shape)
    for turned, (rows, cols) in enumerate((group.shape, group.shape[::-1])):
        if shape == (len(group.experts), rows, cols):
            return [replace(part, modules=tuple(group.experts), matrix=(rows, cols), transposed=bool(turned))]
    return []


def _split(tensors: Sequence[Sequence[str]], group: Group, base: Checkpoint) -> list[Part]:
    """Return the tensors of every expert, each with its rows of the update, or none where they do not make it up."""
    found = []
    if len(tensors) != len(group.experts):
        return []
    for expert, own in zip(group.experts, tensors, strict=True):
        parts = [base.parts[name] for name in own]
        if any(len(part.shape) != 2 or part.shape[1] != group.shape[1] for part in parts):
            return []
        starts = [sum(part.shape[0] for part in parts[:index]) for index in range(len(parts) + 1)]
        if starts.pop() != group.shape[0]:
            return []
        for part, start in zip(parts, starts, strict=True):
            found.append(replace(part, modules=(expert,), matrix=(part.shape[0], part.shape[1]), first=start))
    return found
