"""The low-rank toolbox against dense numpy, and the rules on inputs where directions or signs cancel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loraloom.adapters import lowrank as core
from loraloom.adapters.update import Update
from loraloom.merging import spaces
from loraloom.merging.rules.entrywise import ties
from loraloom.merging.rules.spectral import tsv


def update(m: int, n: int, r: int, seed: int = 0) -> Update:
    generator = torch.Generator().manual_seed(seed)
    return Update(torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator))


def best(dW: torch.Tensor, rank: int) -> tuple[np.ndarray, float]:
    U, S, Vh = np.linalg.svd(dW.double().numpy(), full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank], float((S[rank:] ** 2).sum() / (S**2).sum())


# the last has sum r_i above both m and n
@pytest.mark.parametrize(("m", "n", "ranks"), [(30, 20, (3, 4)), (9, 40, (2, 6)), (7, 8, (6, 5))])
@pytest.mark.parametrize("change", [lambda c: c, core.canonical], ids=["qr", "canonical"])
def test_shared_coordinates_lose_nothing(m, n, ranks, change) -> None:
    updates = [update(m, n, r, seed) for seed, r in enumerate(ranks)]
    shared = change(core.shared_core(updates))
    for Q in (shared.QB, shared.QA):
        torch.testing.assert_close(Q.T @ Q, torch.eye(Q.shape[1], dtype=torch.float64), atol=1e-12, rtol=0)
    for one, M in zip(updates, shared.cores, strict=True):
        expected = one.B.double() @ one.A.double()
        torch.testing.assert_close(shared.QB @ M @ shared.QA.T, expected, atol=1e-10, rtol=0)
        torch.testing.assert_close(core.from_core(shared, M).dense().double(), expected, atol=2e-5, rtol=0)


def test_canonical_bases_drop_directions_no_update_uses() -> None:
    one = update(30, 20, 4)
    assert core.canonical(core.shared_core([one, Update(2 * one.B, one.A)])).cores[0].shape == (4, 4)


@pytest.mark.parametrize(("m", "n", "r"), [(30, 20, 6), (5, 40, 8)])
@pytest.mark.parametrize("rank", [1, 3, 50])
def test_truncation_is_the_best_approximation_and_tells_its_loss(m, n, r, rank) -> None:
    one = update(m, n, r)
    expected, lost = best(one.dense(), rank)
    for cut, told in (core.truncate(one, rank), core.truncate_dense(one.dense(), rank)):
        np.testing.assert_allclose(cut.dense().numpy(), expected, atol=3e-5)
        assert told == pytest.approx(lost, abs=1e-7)  # dense() is float32
    assert core.truncate(one, rank)[0].rank == min(rank, r)


def test_svd_factors() -> None:
    one = update(30, 20, 5)
    U, S, Vh = core.svd_factors(one)
    np.testing.assert_allclose(S.numpy(), np.linalg.svd(one.dense().double().numpy())[1][:5], rtol=1e-6)
    torch.testing.assert_close((U * S @ Vh).float(), one.dense(), atol=1e-5, rtol=0)


def test_polar_leaves_missing_directions_missing() -> None:
    U = torch.linalg.qr(torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    torch.testing.assert_close(core.polar(torch.cat([U, U], dim=1)), torch.cat([U, U], dim=1) / 2**0.5)


@pytest.mark.parametrize(("least", "tolerance"), [(1e-1, 1e-13), (1e-3, 1e-9), (1e-4, 1e-7)])
def test_polar_is_that_of_the_singular_vectors(least: float, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    P = torch.linalg.qr(torch.randn(40, 6, generator=generator, dtype=torch.float64)).Q
    Q = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    X = P * torch.logspace(0, torch.tensor(least).log10(), 6, dtype=torch.float64) @ Q.T
    assert float((core.polar(X) - P @ Q.T).abs().max()) < tolerance


def test_tsv_of_copies_is_the_update() -> None:
    """Two copies share every direction; a polar factor filled up with arbitrary vectors would add noise."""
    one = update(30, 20, 4)
    torch.testing.assert_close(tsv([one, one]).dense(), one.dense(), atol=1e-5, rtol=0)


def test_tsv_ignores_the_zero_singular_values_of_a_rank_deficient_update() -> None:
    one, other = update(30, 20, 3), update(30, 20, 2, seed=1)
    padded = Update(torch.cat([one.B, one.B], dim=1) / 2, torch.cat([one.A, one.A]))
    torch.testing.assert_close(tsv([padded, other]).dense(), tsv([one, other]).dense(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("space", ["full", "core"])
def test_ties_elects_nothing_where_signs_cancel(space) -> None:
    """Without a tolerance the rounding of x + y - (x + y) would elect a sign, another one in another order."""
    x, y = update(20, 14, 2), update(20, 14, 2, seed=1)
    both = core.concatenate([x, y])
    members = [x, y, Update(-both.B, both.A)]
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        result = ties([members[i] for i in order], density=1.0, space=space)
        dense = result if isinstance(result, torch.Tensor) else result.dense()
        assert float(dense.abs().max()) < 1e-5


def test_ties_keeps_all_entries_that_share_the_last_kept_magnitude() -> None:
    flat = Update(torch.ones(4, 1), torch.ones(1, 5))
    torch.testing.assert_close(ties([flat], density=0.2), torch.ones(4, 5, dtype=torch.float64))


def test_ties_is_the_same_in_any_blocks(monkeypatch) -> None:
    members = [update(33, 20, r, seed) for seed, r in enumerate((2, 3, 4))]
    whole = ties(members)
    monkeypatch.setattr(spaces, "_BLOCK", 3 * 20 * 5)  # 5 rows a block, and 3 in the last
    torch.testing.assert_close(ties(members), whole, atol=1e-12, rtol=0)
