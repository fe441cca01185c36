"""A base model of two layers with texts of every task, for the rules that look at them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraloom.adapters.update import Update
from loraloom.merging.distillation import Distilling

WIDTHS = {"first": (26, 17), "second": (15, 26)}  # (m, n); "second" reads tanh of what "first" returns


@dataclass(frozen=True)
class TinyProbe:
    """Implements merging.probe.Probe: `weights` of the layers, a head (classes or 1, 15) a task, padded sequences."""

    weights: dict[str, Tensor]
    heads: list[Tensor]
    batches: list[list[dict[str, Tensor]]]
    labels: list[list[Tensor]]
    regression: list[bool]

    def run(
        self,
        task: int,
        batch: Mapping[str, Tensor],
        updates: Mapping[str, Update],
        see: Callable[[str, Tensor], None] | None = None,
    ) -> Tensor:
        x, kept = batch["x"], batch["kept"]
        for name, weight in self.weights.items():
            if see is not None and name in updates:
                see(name, x[kept])
            y = x @ weight.T
            if name in updates:
                y = y + (x @ updates[name].A.T) @ updates[name].B.T
            x = torch.tanh(y)
        features = (x * kept[..., None]).sum(dim=1) / kept.sum(dim=1, keepdim=True)
        return features @ self.heads[task].T

    def step(self, done: int, total: int) -> None:
        assert 0 <= done <= total


def tiny_probe(tasks: Sequence[str], seed: int, *, regression: Sequence[str] = (), batches: int = 2) -> TinyProbe:
    """Return a model drawn from `seed` and texts drawn from it and the task's name, six a batch; 3 classes a task."""
    shared = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(m, n, generator=shared) / n**0.5 for name, (m, n) in WIDTHS.items()}
    heads, inputs, labels = [], [], []
    for task in tasks:
        own = torch.Generator().manual_seed(seed + sum(task.encode()))
        number = task in regression
        heads.append(torch.randn(1 if number else 3, 15, generator=own))
        lengths = [torch.randint(1, 5, (6, 1), generator=own) for _ in range(batches)]
        inputs.append(
            [{"x": torch.randn(6, 4, 17, generator=own), "kept": torch.arange(4)[None] < length} for length in lengths]
        )
        labels.append(
            [
                torch.randn(6, generator=own) if number else torch.randint(0, 3, (6,), generator=own)
                for _ in range(batches)
            ]
        )
    return TinyProbe(weights, heads, inputs, labels, [task in regression for task in tasks])


def layers_of(seed: int, tasks: int, size: float = 0.3) -> dict[str, list[Update]]:
    """Updates for the tiny model, small enough that tanh is not flat."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: [
            Update(size * torch.randn(m, 2, generator=generator), size * torch.randn(2, n, generator=generator))
            for _ in range(tasks)
        ]
        for name, (m, n) in {"first": (26, 17), "second": (15, 26)}.items()
    }


class Untrained:
    """Implements merging.distillation.Distiller: it leaves the start as it is, so that the rule around it is seen."""

    start = None
    facts = None

    def train(self, start: Mapping[str, Update], asked: Distilling, seed: int) -> dict[str, Update]:
        return dict(start)
