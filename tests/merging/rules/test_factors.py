"""RobustMerge against the authors' steps on the factors; LoRA-LEGO on units that are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loraloom.adapters.update import Update
from loraloom.merging.rules.factors import lego, robust

M, N = 16, 12


def update(seed: int, rank: int) -> Update:
    generator = torch.Generator().manual_seed(seed)
    return Update(torch.randn(M, rank, generator=generator), torch.randn(rank, N, generator=generator))


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((found - expected).norm() <= tolerance * expected.norm())


def published_robust(updates: list[Update], mask_ratio: float, att_ratio: float) -> Tensor:
    """The steps of AuroraZengfh/RobustMerge, llava/model/builder.py; its two fuse weights of 2 left out."""

    def trimmed(X: Tensor) -> Tensor:
        flat = X.reshape(len(X), -1)
        least = flat.abs().kthvalue(int(flat.shape[1] * (1 - mask_ratio)), dim=1, keepdim=True).values
        return ((flat.abs() >= least) * flat).reshape(X.shape)

    A, B = torch.stack([u.A for u in updates]), torch.stack([u.B for u in updates])
    scale = A.abs().sum(dim=-1) / trimmed(A).abs().sum(dim=-1)
    ordered = scale.sort(dim=1).values
    scale = scale.clamp(ordered[:, int(scale.shape[1] * (1 - att_ratio))][:, None], ordered[:, -1:])
    merged_B = (scale[:, None] * trimmed(B)).sum(dim=0) / scale.sum(dim=0)
    return merged_B @ trimmed(A).sum(dim=0)


@pytest.mark.parametrize("ratio", [0.4, 0.6])
@pytest.mark.parametrize("free", [0.2, 0.5])
def test_robust_is_the_published_code(ratio: float, free: float) -> None:
    updates = [Update(update(seed, 10).B[:N], update(seed, 10).A) for seed in range(3)]
    size = 10 * N
    kept = size - int(size * (1 - ratio)) + 1  # the code keeps one entry more than the share
    found = robust(updates, density=kept / size, free=free).dense()
    assert close(found, published_robust(updates, ratio, free))


def test_robust_of_different_ranks_leaves_out_what_a_task_lacks() -> None:
    """Rank by rank from the formula, for ranks 4 and 2."""
    large, small = update(0, 4), update(1, 2)
    found = robust([small, large], density=1.0, free=1.0)
    A, B = large.A.clone(), large.B.clone()
    A[:2] += small.A
    B[:, :2] = (B[:, :2] + small.B) / 2
    assert close(found.dense(), B @ A)


def test_robust_of_a_rank_of_which_nothing_is_kept() -> None:
    one, two = update(0, 3), update(1, 3)
    one.A[0] *= 1e-6  # every larger entry is kept before these
    found = robust([one, two], density=0.5)
    assert found.A.isfinite().all()
    assert found.B.isfinite().all()
    alone = robust([two], density=0.5)
    assert close(found.B[:, :1], alone.B[:, :1])
    assert close(found.A[:1], alone.A[:1])


def turned(update: Update) -> Update:
    """The same dW with its ranks in another order, with other signs and lengths."""
    order = torch.arange(update.rank - 1, -1, -1)
    sizes = torch.linspace(-2.0, 3.5, update.rank)
    return Update(update.B[:, order] * sizes, update.A[order] / sizes[:, None])


def test_lego_puts_equal_units_into_one_cluster() -> None:
    """Of R = 2 r units k = r are different: sqrt(R / k) times the adapter itself."""
    one = update(0, 4)
    assert close(lego([one, turned(one)], rank=None).dense(), 2**0.5 * one.dense())
    assert close(lego([one, turned(one), one], rank=None).dense(), 3**0.5 * one.dense())


def test_lego_of_more_clusters_than_different_units_takes_those_there_are() -> None:
    one = update(0, 4)
    found = lego([one, one], rank=7)
    assert found.rank == 4
    assert close(found.dense(), 2**0.5 * one.dense())


def test_lego_of_as_many_clusters_as_units_is_the_sum() -> None:
    updates = [update(0, 3), update(1, 2)]
    assert close(lego(updates, rank=5).dense(), updates[0].dense() + updates[1].dense())


def test_lego_finds_clusters_that_are_there() -> None:
    """Three directions seen through noise by four adapters, each in factors of its own."""
    base = update(0, 3)
    U, S, Vh = torch.linalg.svd(base.dense().double(), full_matrices=False)
    U, S, Vh = U[:, :3], torch.tensor([9.0, 6.0, 4.0], dtype=torch.float64), Vh[:3]
    draws = torch.Generator().manual_seed(1)
    seen = []
    for _ in range(4):
        noise = [1e-3 * torch.randn(x.shape, generator=draws, dtype=torch.float64) for x in (U, Vh)]
        seen.append(turned(Update(((U + noise[0]) * S).float(), (Vh + noise[1]).float())))
    found = lego(seen, rank=None).dense().double()
    assert close(found, 2 * (U * S) @ Vh, 1e-2)  # sqrt(12 / 3)
