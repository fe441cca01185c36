"""Tensor rules on tensors of known rank, on updates that are alike, and what each task reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from loraloom.adapters.lowrank import Shared
from loraloom.adapters.update import Update
from loraloom.merging.rules.tensor import cp, ctm
from small import M, N, close, dense, update


def weighted(updates: list[Update]) -> list[Update]:
    """As `merge` hands them over at the default weights of the rule."""
    return [Update(u.B / len(updates), u.A) for u in updates]


def merged_cp(updates: list[Update], **options: Any) -> Update:
    found = cp(updates, **options)
    assert isinstance(found, Update)
    return found


def shared_cp(updates: list[Update], rank: int | None) -> Shared:
    found = cp(updates, rank=rank, per_task=True)
    assert isinstance(found, Shared)
    return found


def test_cp_of_enough_rank_is_the_mean_and_every_task_reads_its_own_update() -> None:
    updates = [update(0, 2), update(1, 3), update(2, 1)]
    mean = np.mean([dense(u) for u in updates], axis=0)
    assert close(dense(merged_cp(weighted(updates), rank=6)), mean)
    shared = shared_cp(weighted(updates), 6)
    assert close(dense(shared.update()), mean)
    for own, readout in zip(updates, shared.readouts(), strict=True):
        assert close(dense(readout), dense(own))


def test_cp_finds_factors_that_all_tasks_share() -> None:
    """dW_i = U diag(c_i) V^T with neither U nor V orthogonal: the triples it starts from are not the factors."""
    draws = torch.Generator().manual_seed(3)
    U, V = torch.randn(M, 3, generator=draws), torch.randn(3, N, generator=draws)
    strengths = torch.tensor([[3.0, 1.0, 0.5], [0.2, 2.0, 1.0], [1.0, -1.0, 2.0], [0.5, 0.3, -1.5]])
    updates = [Update(U * c, V) for c in strengths]
    shared = shared_cp(weighted(updates), None)
    assert shared.core.shape == (3, 3)
    for own, readout in zip(updates, shared.readouts(), strict=True):
        assert close(dense(readout), dense(own), 1e-3)
    assert close(dense(shared.update()), np.mean([dense(u) for u in updates], axis=0), 1e-3)


def test_cp_beats_the_triples_that_it_starts_from() -> None:
    updates = [update(seed, 4) for seed in range(3)]
    shared = shared_cp(weighted(updates), 4)
    lost = sum(np.linalg.norm(dense(r) - dense(u)) ** 2 for r, u in zip(shared.readouts(), updates, strict=True))
    strengths = np.concatenate([np.linalg.svd(dense(u), compute_uv=False)[:4] for u in updates])
    kept_by_triples = np.sort(strengths**2)[-4:].sum()
    assert lost < (strengths**2).sum() - kept_by_triples


def test_cp_of_the_same_adapter_twice_and_of_opposite_ones() -> None:
    one = update(0, 4)
    assert close(dense(merged_cp([one, one], rank=None)), 2 * dense(one))
    minus = Update(-one.B, one.A)
    assert np.abs(dense(merged_cp([one, minus], rank=None))).max() < 1e-5
    shared = shared_cp(weighted([one, minus]), None)
    assert close(dense(shared.readouts()[1]), -dense(one))


def test_cp_of_nothing_but_zeros_reads_zeros() -> None:
    zero = Update(torch.zeros(M, 2), update(0, 2).A)
    shared = shared_cp([zero, zero], None)
    for found in (shared.update(), *shared.readouts()):
        assert not found.dense().any()


def merged_ctm(updates: list[Update], seed: int = 0, **options: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    return dense(ctm(updates, generator=generator, **{"rank": None, **options}))


def test_ctm_keeps_the_rank_by_construction() -> None:
    updates = [update(seed, 4) for seed in range(3)]
    assert np.linalg.matrix_rank(merged_ctm(updates), tol=1e-4) <= 4
    assert np.linalg.matrix_rank(merged_ctm(updates, rank=2), tol=1e-4) <= 2


def test_ctm_rescales_the_updates_for_the_subspaces_alone() -> None:
    """With beta 0 no norm bears on the subspaces, and what is added there are the updates as they are."""
    one, two = update(0, 4), update(1, 4)
    plain: dict[str, Any] = {"beta": 0.0, "merge": "dare", "drop": 0.0}
    found = [merged_ctm([Update(c * one.B, one.A), two], **plain) for c in (1.0, 2.0, 3.0)]
    assert close(found[2] - found[1], found[1] - found[0])
    own = {**plain, "beta": 1.0}
    strong = merged_ctm([Update(1e3 * one.B, one.A), two], **own)
    assert close(strong, 1e3 * dense(one), 1e-2)  # the strong one alone chooses the subspaces


def test_ctm_drops_without_bias() -> None:
    updates = [update(0, 3), update(1, 3)]
    wanted = merged_ctm(updates, merge="dare", drop=0.0)
    found = np.mean([merged_ctm(updates, seed, merge="dare", drop=0.5) for seed in range(400)], axis=0)
    assert close(found, wanted, 0.15)


def test_ctm_of_one_adapter_twice_is_that_adapter() -> None:
    one = update(0, 4)
    assert close(merged_ctm([one, one], density=1.0), dense(one))
    assert close(merged_ctm([one, one], density=1.0, rank=9), dense(one))  # more than there is to choose from
