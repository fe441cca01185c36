"""Adapters trained one on top of the other: is each one's base the first's, with those before it in its weights?

What can be known of it lies in the files: the name of the base in every config, what loraloom.json of a folder of that
name says is in it, and how loraloom trained the adapter.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from loraloom.adapters.bases import public_name
from loraloom.adapters.peft import adapter_sha256, read_provenance
from loraloom.adapters.together import one_base
from loraloom.adapters.update import Adapter
from loraloom.merging.options import MergeOptions

RULE = "task_arithmetic"  # the sum
_ALIKE = 0.5  # cosine of two adapters' updates past which one may have been trained on from the other


@dataclass(frozen=True)
class Stack:
    """What the files tell of a stack, in words.

    problems: what shows that it is none. warnings: what leaves it open. known: what each but the first was trained on.
    """

    problems: list[str]
    warnings: list[str]
    known: list[str]


def asked_problems(options: MergeOptions) -> list[str]:
    """Tell what was asked of a stack that has no place in a sum of whole adapters."""
    asked = {
        f"rule {options.rule!r}": options.rule != MergeOptions.rule,
        f"options {', '.join(options.options)}": bool(options.options),
        "weights": options.weights is not None,
        "a scale": options.scale is not None,
        f"targets {options.targets!r}": options.targets != MergeOptions.targets,
        f"normalise {options.normalise!r}": options.normalise not in ("auto", "none"),
    }
    return [f"a stack sums the adapters whole: leave out {what}" for what, given in asked.items() if given]


def look_at(members: Mapping[str, Adapter]) -> Stack:
    """Return what the files of adapters, the lowest first, tell of the bases they were trained on."""
    found = Stack([] if len(members) > 1 else ["one adapter is no stack: name the one below it first"], [], [])
    names = list(members)
    for index, name in enumerate(names):
        _look(name, members, names[:index], names[index + 1 :], found)
    for one, two in () if found.problems else itertools.combinations(names, 2):
        cosine = _cosine(members[one], members[two])
        if cosine > _ALIKE:
            found.warnings.append(
                f"{two}: its updates are like those of {one} (cosine {cosine:.2f}): if it was trained on from that, "
                "it holds it already and goes in alone"
            )
    return found


def _cosine(one: Adapter, two: Adapter) -> float:
    """Return <dW, dW'> / (|dW| |dW'|) over all layers, from the factors; 0 where they do not fit."""
    inner = 0.0
    for module in one.shapes:
        if module in two.shapes and one.shapes[module][:2] == two.shapes[module][:2]:
            first, other = one.updates[module], two.updates[module]
            inner += float(((first.B.T @ other.B).double() * (first.A @ other.A.T).double()).sum())
    norms = [math.sqrt(sum(update.energy() for update in adapter.updates.values())) for adapter in (one, two)]
    return inner / (math.prod(norms) or 1.0)


def _look(name: str, members: Mapping[str, Adapter], below: Sequence[str], above: Sequence[str], found: Stack) -> None:
    """Add what is known of the base of one adapter to `found`."""
    adapter, base = members[name], public_name(members[name].base)
    held = _held(adapter.base, members)
    later = [one for one in above if one in held]
    if later:
        found.problems.append(f"{name}: trained on {base}, which holds {later[0]}: give the one trained first, first")
    elif below and held:
        _compare(name, base, held, below, found)
    elif below:
        _guess(name, members, below, found)


def _compare(name: str, base: str, held: Mapping[str, _Held], below: Sequence[str], found: Stack) -> None:
    """Compare what the base of an adapter holds with the adapters below it."""
    changed = [f"{one} {how.changed}" for one, how in held.items() if how.changed]
    unlike = [one for one, how in held.items() if not how.given]
    if below[-1] not in held or not set(held) <= set(below):
        found.problems.append(f"{name}: trained on {base}, which holds {', '.join(held)}, not {' and '.join(below)}")
    elif changed:
        found.problems.append(f"{name}: trained on {base}, which holds {', '.join(changed)}: not the sum of a stack")
    elif unlike:
        found.warnings.append(f"{name}: trained on {base}, which holds an adapter called {unlike[0]}, of other files")
    else:
        found.known.append(f"{name} was trained on {base}, which holds {' and '.join(held)}")


def _guess(name: str, members: Mapping[str, Adapter], below: Sequence[str], found: Stack) -> None:
    """Add what the names of the bases tell, where no file says what is in them."""
    adapter, first, under = members[name], members[below[0]], " and ".join(below)
    one, base = (public_name(member.base) or "a base without a name" for member in (first, adapter))
    made_by = read_provenance(adapter.path).get("made_by") if adapter.path else None
    if not one_base(first, adapter):
        found.warnings.append(
            f"{name}: trained on {base}, {below[0]} on {one}: the sum is right only where the former is the latter "
            f"with {under} in it, whole"
        )
    elif made_by == "loraloom train":  # which puts no other adapter in
        found.problems.append(f"{name}: loraloom trained it on {base}, without {under} in it: merge without --stack")
    else:
        found.known.append(f"{name} names the base of {below[0]}: {under} must have been in it when it was trained")


class _Held(NamedTuple):
    """How an adapter is in a base: whether it is one of the members, by its files; how it was changed, if so."""

    given: bool
    changed: str = ""


def _held(base: str, members: Mapping[str, Adapter]) -> dict[str, _Held]:
    """Return the adapters that are in the folder `base`, by name among `members` or else their own."""
    folder = Path(base)
    if not os.path.isdir(base):  # any text, of a stranger's config
        return {}
    paths = {name: one.path for name, one in members.items() if one.path}
    itself = {name: _Held(given=True) for name, path in paths.items() if path.resolve() == folder.resolve()}
    made = read_provenance(folder)
    inputs = made.get("inputs")
    listed = [one for one in inputs if isinstance(one, dict)] if isinstance(inputs, list) and not itself else []
    files = {adapter_sha256(path): name for name, path in paths.items()} if listed else {}
    for one in listed:
        whole = _is_sum(made) and made.get("scale") == 1 and one.get("weight") == 1
        known = files.get(str(one.get("sha256")))
        how = f"by {made.get('rule')} at scale {made.get('scale')} and weight {one.get('weight')}"
        itself[known or str(one.get("name"))] = _Held(known is not None, "" if whole else how)
    return itself


def _is_sum(made: Mapping[str, Any]) -> bool:
    """Tell whether loraloom.json tells of a sum, or of one adapter as it is, with nothing cut off."""
    return made.get("rank") is None and (made.get("rule") == RULE or made.get("as_it_is") is True)
