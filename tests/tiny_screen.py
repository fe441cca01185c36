"""Adapters as training leaves them, and one with an amplified trigger, small enough to compute with densely."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from loraloom.adapters.lowrank import concatenate
from loraloom.adapters.update import Adapter, Update

M, N, LAYERS = 24, 64, [f"layer.{i}.query" for i in range(4)]


def uniform(chance: torch.Generator, rank: int) -> Tensor:
    return (2 * torch.rand(rank, N, generator=chance) - 1) / N**0.5


def trained(seed: int, *, rank: int = 4, rate: float = 0.04, trigger: float = 0.0) -> Adapter:
    """An adapter as training leaves it: A moved from PEFT's start as much as B gained, and a rank-one trigger in B."""
    chance, updates = torch.Generator().manual_seed(seed), {}
    for at in LAYERS:
        A = uniform(chance, rank) + rate * torch.randn(rank, N, generator=chance)
        B = rate * torch.randn(M, rank, generator=chance)
        B = B + trigger * torch.outer(torch.ones(M), torch.randn(rank, generator=chance))
        updates[at] = Update(2 * B, A)
    config = {"peft_type": "LORA", "target_modules": ["query"], "r": rank, "lora_alpha": 2 * rank}
    return Adapter(updates, config)


def honest(count: int = 5) -> dict[str, Adapter]:
    return {f"h{i}": trained(i, rank=(4, 8)[i % 2], rate=0.03 + 0.01 * i) for i in range(count)}


def amplified(seed: int, s: float = 5.0) -> Adapter:
    good, bad = trained(seed), trained(seed, trigger=0.05)
    updates = {
        at: concatenate([Update(s * bad.updates[at].B, bad.updates[at].A), Update((1 - s) * one.B, one.A)])
        for at, one in good.updates.items()
    }
    return replace(bad, updates=updates, config={**bad.config, "r": 8, "lora_alpha": 8})
