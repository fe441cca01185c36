"""Spectral rules against the published full-space steps, their own objective, and inputs without a unique answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loraloom.adapters.update import Update
from loraloom.merging.rules.spectral import iso_c, iso_cts, wudi
from small import N, close, dense, update


def published_iso_c(deltas: list[np.ndarray]) -> np.ndarray:
    """danielm1405/iso-merging, src/utils/iso.py: all min(m, n) singular values become their mean."""
    U, S, Vh = np.linalg.svd(np.sum(deltas, axis=0), full_matrices=False)
    return S.mean() * U @ Vh


def test_iso_c_is_the_published_code_where_the_sum_has_full_rank() -> None:
    updates = [update(0, 6), update(1, 5)]
    assert close(dense(iso_c(updates, rank=None)), published_iso_c([dense(u) for u in updates]))


def test_iso_c_differs_from_the_published_scale_by_the_ranks_used() -> None:
    updates = [update(0, 2), update(1, 3)]
    total = sum(dense(u) for u in updates)
    U, _, Vh = np.linalg.svd(total)
    used = U[:, :5] @ U[:, :5].T @ published_iso_c([total]) @ Vh[:5].T @ Vh[:5]
    assert close(dense(iso_c(updates, rank=None)), N / 5 * used)


def test_an_asked_rank_keeps_the_strongest_directions_of_the_sum() -> None:
    updates = [update(0, 2), update(1, 3)]
    U, S, Vh = np.linalg.svd(sum(dense(u) for u in updates))
    assert close(dense(iso_c(updates, rank=2)), S[:2].mean() * U[:, :2] @ Vh[:2])
    assert np.linalg.matrix_rank(dense(iso_cts(updates, rank=3)), tol=1e-4) == 3


@pytest.mark.parametrize("rule", [iso_c, iso_cts])
def test_updates_that_cancel_leave_nothing_to_flatten(rule: object) -> None:
    """Rounding must not become a direction as strong as any other."""
    one = update(0, 3)
    R = torch.tensor([[1.0, 0.3, 0.0], [0.2, 1.0, 0.1], [0.0, -0.4, 1.0]], dtype=torch.float64)
    other = Update(-(one.B.double() @ R).float(), torch.linalg.solve(R, one.A.double()).float())
    assert np.abs(dense(rule([one, other], rank=None))).max() <= 1e-5  # type: ignore[operator]
    kept = update(1, 2)
    assert close(dense(rule([one, other, kept], rank=None)), dense(rule([kept], rank=None)), 1e-4)  # type: ignore[operator]


def test_iso_of_the_same_adapter_twice_stays_in_its_subspaces() -> None:
    one = update(0, 4)
    U, S, Vh = np.linalg.svd(dense(one))
    flat = S[:4].mean() * U[:, :4] @ Vh[:4]
    assert close(dense(iso_c([one, one], rank=None)), 2 * flat)
    for common in (0.0, 0.5, 0.8):
        found = dense(iso_cts([one, one], rank=None, common=common))
        assert np.isfinite(found).all()
        assert close(U[:, :4] @ U[:, :4].T @ found @ Vh[:4].T @ Vh[:4], found)


def interference(merged: np.ndarray, deltas: list[np.ndarray], ridge: float) -> float:
    losses = [np.linalg.norm((merged - dW) @ dW.T) ** 2 / np.linalg.norm(dW) ** 2 for dW in deltas]
    return float(sum(losses) + ridge * np.linalg.norm(merged) ** 2)


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.1])
def test_wudi_is_the_least_of_its_objective(ridge: float) -> None:
    deltas = [dense(update(seed, 3)) for seed in range(3)]
    merged = dense(wudi([update(seed, 3) for seed in range(3)], ridge=ridge))
    least = interference(merged, deltas, ridge)
    draws = np.random.default_rng(0)
    for size in (1e-3, 1e-1, 1.0):
        for _ in range(20):
            step = size * draws.normal(size=merged.shape)
            assert interference(merged + step, deltas, ridge) >= least - 1e-4 * size  # float32 factors
    assert least < interference(np.sum(deltas, axis=0), deltas, ridge)  # where the published code starts


def test_wudi_adds_updates_that_read_different_inputs() -> None:
    one, two = update(0, 3), update(1, 3)
    one.A[:, 5:] = 0.0
    two.A[:, :5] = 0.0
    assert close(dense(wudi([one, two], ridge=0.0)), dense(one) + dense(two))


def test_wudi_of_nearly_collinear_inputs_stays_small() -> None:
    """Two tasks that read almost the same input and answer differently: the exact minimum has norm 1/angle."""
    one = update(0, 1)
    two = Update(update(1, 1).B, one.A + 1e-3 * update(2, 1).A)
    largest = max(np.linalg.norm(dense(one)), np.linalg.norm(dense(two)))
    assert np.linalg.norm(dense(wudi([one, two], ridge=0.0))) > 100 * largest
    assert np.linalg.norm(dense(wudi([one, two]))) < 2 * largest
    assert close(dense(wudi([one, one], ridge=0.0)), dense(one))
