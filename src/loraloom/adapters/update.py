"""One LoRA adapter as low-rank updates of a base model's layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from loraloom.adapters.beside import Beside
from loraloom.cores import side_by_side
from loraloom.files.hashing import Seen
from loraloom.notebook import facts


class Shape(NamedTuple):
    """Output width m, input width n and rank r of an update."""

    m: int
    n: int
    r: int


@dataclass(frozen=True)
class Form:
    """How an update stands in PEFT's files and in the base's weight, where it is not that of a linear layer.

    embedding: dW (width, words) is the weight's transposed. convolution: dW is (outputs, inputs x the kernel's sizes),
    `kernel` = (inputs, *sizes). experts: the update of expert `index` of `count`, whose factors all stand in the file
    under `module`.
    """

    kind: Literal["embedding", "convolution", "experts"]
    kernel: tuple[int, ...] = ()
    module: str = ""
    index: int = 0
    count: int = 0


def is_expert(form: Form | None) -> bool:
    """Tell whether a layer's form is that of an expert."""
    return form is not None and form.kind == "experts"


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
        """Return |dW|_F^2 = tr(B^T B A A^T), without dW; in float64, where the squares of any float32 are finite."""
        B, A = self.B.double(), self.A.double()
        return float(((B.T @ B) * (A @ A.T)).sum())

    def dense(self) -> Tensor:
        """Return dW (m, n)."""
        return self.B @ self.A


@dataclass(frozen=True)
class Adapter:
    """Low-rank updates by module path, with the task's head beside them.

    `updates` maps a module path of the base model to its Update, from memory or, where a folder was read, from the
    file at each access; `head` holds the tensors PEFT saves whole (`modules_to_save`), by parameter path; `config` is
    adapter_config.json as read; `dtype` is the one to write: the widest of the file's, and bfloat16 where that is of 8
    bits; `fingerprint` is that of the base weights and `task` the name of the task it was trained on, where they are
    known. `forms` tells of the layers that are not
    linear; `copies` are weights of the base that PEFT saves beside an embedding's update, by parameter path; `beside`
    is what else lies in the folder, and `sources` are the config and weights that were read, as they were then.
    `dialect` names the tool in whose files it stands and that its layers are named by: see `adapters.dialects`.
    """

    updates: Mapping[str, Update]
    config: dict[str, Any]
    head: dict[str, Tensor] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    path: Path | None = None
    fingerprint: str = ""
    task: str = ""
    forms: Mapping[str, Form] = field(default_factory=dict)
    copies: Mapping[str, Tensor] = field(default_factory=dict)
    beside: Beside = field(default_factory=Beside)
    sources: tuple[Seen, ...] = ()
    dialect: str = "peft"

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

    @cached_property
    def energies(self) -> Mapping[str, float]:
        """|dW|_F^2 of every update by module path; this reads every weight, once."""
        return dict(zip(self.updates, side_by_side(lambda at: self.updates[at].energy(), self.updates), strict=True))

    @property
    def rank(self) -> int:
        """Return the largest rank of any layer."""
        return max(shape.r for shape in self.shapes.values())

    def scaled(self, scale: float) -> Adapter:
        """Return the adapter with every update multiplied by `scale`, in memory."""
        updates = {name: Update(scale * update.B, update.A) for name, update in self.updates.items()}
        return replace(self, updates=updates)

    def _repr_html_(self) -> str:
        ranks = sorted({shape.r for shape in self.shapes.values()})
        told = {
            "base": self.base,
            "task": self.task,
            "layers": len(self.shapes),
            "of kinds": ", ".join(sorted({module.rpartition(".")[2] for module in self.shapes})),
            "rank": " to ".join(map(str, ranks[:1] + ranks[1:][-1:])),
            "numbers": f"{sum(r * (m + n) for m, n, r in self.shapes.values()):,}",
            "dtype": str(self.dtype).removeprefix("torch."),
            "head": ", ".join(self.head),
        }
        return facts(f"LoRA adapter {self.path.name if self.path else 'in memory'}", told)
