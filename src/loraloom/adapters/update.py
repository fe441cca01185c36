"""One LoRA adapter as low-rank updates of a base model's layers, and whether several fit together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loraloom.errors import raise_problems

# with these task types PEFT refuses to load an adapter that holds no head
_HEADED_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


class Shape(NamedTuple):
    """Output width m, input width n and rank r of an update."""

    m: int
    n: int
    r: int


@dataclass(frozen=True)
class Update:
    """dW = B A of one layer: B (m, r) with alpha/r folded in, A (r, n); both float32."""

    B: Tensor
    A: Tensor

    @property
    def rank(self) -> int:
        """Return r, the number of rows of A."""
        return self.A.shape[0]

    @property
    def shape(self) -> Shape:
        """Return m, n and r."""
        return Shape(self.B.shape[0], self.A.shape[1], self.rank)

    def energy(self) -> float:
        """Return |dW|_F^2 = tr(B^T B A A^T), without dW."""
        return float(((self.B.T @ self.B).double() * (self.A @ self.A.T).double()).sum())

    def dense(self) -> Tensor:
        """Return dW (m, n)."""
        return self.B @ self.A


@dataclass(frozen=True)
class Adapter:
    """Low-rank updates by module path, with the task's head beside them.

    `updates` maps a module path of the base model to its Update, from memory or, where a folder was read, from the
    file at each access; `head` holds the tensors PEFT saves whole (`modules_to_save`), by parameter path; `config` is
    adapter_config.json as read; `dtype` is the files' own; `fingerprint` that of the base weights and `task` the name
    of the task it was trained on, where they are known.
    """

    updates: Mapping[str, Update]
    config: dict[str, Any]
    head: dict[str, Tensor] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    path: Path | None = None
    fingerprint: str = ""
    task: str = ""

    @property
    def name(self) -> str:
        """Return the folder's name, for messages."""
        return str(self.path) if self.path else "adapter"

    @property
    def base(self) -> str:
        """Return the name or folder of the base model, as the config gives it."""
        return str(self.config.get("base_model_name_or_path") or "")

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """The shape of every update by module path, without reading weights."""
        known: Mapping[str, Shape] | None = getattr(self.updates, "shapes", None)
        return {name: update.shape for name, update in self.updates.items()} if known is None else known

    @property
    def rank(self) -> int:
        """Return the largest rank of any layer."""
        return max(shape.r for shape in self.shapes.values())

    def scaled(self, scale: float) -> Adapter:
        """Return the adapter with every update multiplied by `scale`, in memory."""
        updates = {name: Update(scale * update.B, update.A) for name, update in self.updates.items()}
        return replace(self, updates=updates)


def matches_target(module: str, targets: str | Iterable[str]) -> bool:
    """Tell whether PEFT would adapt `module`: a regular expression over the whole path, or a list of path endings."""
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Return the value of the first key of a PEFT rank_pattern or alpha_pattern that matches `module`."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def module_scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return alpha/r of `module`, or alpha/sqrt(r) for rsLoRA, with alpha_pattern honoured; `rank` is the tensor's."""
    alpha = float(pattern_value(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", 8)))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def headless_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` for an adapter without a head, such that PEFT loads it and keeps the base model's own head."""
    kept = {key: value for key, value in config.items() if key != "modules_to_save"}
    if kept.get("task_type") in _HEADED_TASKS:
        kept["task_type"] = None
    return kept


def compatibility_problems(adapters: Sequence[Adapter]) -> list[str]:
    """Return every difference of base model, target modules and shapes between the first of `adapters` and the rest."""
    problems = []
    for other in adapters[1:]:
        first = adapters[0]
        if _bases_differ(first, other):
            problems.append(f"base model: {first.name} has {first.base!r}, {other.name} has {other.base!r}")
        for one, two in ((first, other), (other, first)):
            missing = sorted(set(one.shapes) - set(two.shapes))
            if missing:
                shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
                problems.append(f"{one.name} adapts {shown}; {two.name} does not")
        for module in sorted(set(first.shapes) & set(other.shapes)):
            (m, n, _), (other_m, other_n, _) = first.shapes[module], other.shapes[module]
            if (m, n) != (other_m, other_n):
                problems.append(f"{module}: {first.name} is {m} x {n}, {other.name} is {other_m} x {other_n}")
    return problems


def check_compatible(adapters: Sequence[Adapter]) -> None:
    """Raise LoraloomError telling all of `compatibility_problems`; do nothing where there are none."""
    hint = "merge adapters of one base model and one target set"
    raise_problems("these adapters do not fit together", compatibility_problems(adapters), hint)


def _bases_differ(one: Adapter, two: Adapter) -> bool:
    """Compare the fingerprints of the bases where both are known, else their names; a local folder's tells nothing.

    One base lies in another folder on every machine, so two paths need not be two bases.
    """
    if one.fingerprint and two.fingerprint:
        return one.fingerprint != two.fingerprint
    if any(not adapter.base or adapter.base.startswith(("/", ".", "~")) for adapter in (one, two)):
        return False
    return one.base != two.base
