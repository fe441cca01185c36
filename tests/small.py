"""Small updates of one layer, and how the tests of the rules compare them."""

from __future__ import annotations

import numpy as np
import torch

from loraloom.adapters.update import Update

M, N = 14, 11


def update(seed: int, rank: int) -> Update:
    generator = torch.Generator().manual_seed(seed)
    return Update(torch.randn(M, rank, generator=generator), torch.randn(rank, N, generator=generator))


def dense(update: Update) -> np.ndarray:
    return update.B.double().numpy() @ update.A.double().numpy()


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> bool:
    return bool(np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected))
