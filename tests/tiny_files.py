"""Three tasks' adapter folders and statistics files, small enough to compute with by hand."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from loraloom.adapters.peft import write_adapter
from loraloom.adapters.update import Adapter, Update
from loraloom.statistics.file import Layer, Statistics
from loraloom.statistics.moments import Moment

LAYERS = {"encoder.0.query": (6, 8), "encoder.1.query": (6, 8)}
TASKS = ("mood", "tone", "news")


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapter(seed: int, layers: dict[str, tuple[int, int]] = LAYERS) -> Adapter:
    made = {
        name: Update(normal(seed + i, m, 2), normal(seed + 50 + i, 2, n))
        for i, (name, (m, n)) in enumerate(layers.items())
    }
    return Adapter(made, {"peft_type": "LORA", "target_modules": ["query"], "lora_alpha": 2, "r": 2})


def statistics(seed: int, count: int = 20) -> Statistics:
    moments = {name: Moment.of_rows(normal(seed + i, count, n)) for i, (name, (_, n)) in enumerate(LAYERS.items())}
    return Statistics(
        "base", "f", moments, {name: Layer(name, n, m) for name, (m, n) in LAYERS.items()}, 1, count, "token"
    )


def write_three(folder: Path) -> Path:
    """Write adapters as TASK/ and statistics as TASK.heldout.safetensors; return the folder."""
    for i, task in enumerate(TASKS):
        write_adapter(adapter(10 * i), folder / task, provenance={})
        statistics(100 + 10 * i).save(folder / f"{task}.heldout.safetensors")
    return folder


def files(folder: Path) -> list[Path]:
    return [folder / f"{task}.heldout.safetensors" for task in reversed(TASKS)]
