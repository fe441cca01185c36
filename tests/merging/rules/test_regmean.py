"""RegMean and its best cut against dense float64 computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from loraloom.adapters.lowrank import truncate
from loraloom.adapters.update import Update
from loraloom.merging.rules.regression import optimal_rank, regmean
from loraloom.statistics.moments import Moment

M, N = 7, 9


def updates_of(seed: int, ranks: tuple[int, ...] = (2, 3, 1), m: int = M, n: int = N) -> list[Update]:
    generator = torch.Generator().manual_seed(seed)
    return [Update(torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator)) for r in ranks]


def moments_of(seed: int, rows: tuple[int, ...] = (20, 5, 30), n: int = N) -> tuple[list[Moment], list[np.ndarray]]:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(k, n, generator=generator) * torch.rand(n, generator=generator) for k in rows]
    return [Moment.of_rows(H) for H in inputs], [H.double().numpy() for H in inputs]


def objective(W: np.ndarray, updates: list[Update], inputs: list[np.ndarray]) -> float:
    """What RegMean minimises at shrink 1: mean squared difference of outputs, summed over tasks."""
    return sum(
        (((W - u.dense().double().numpy()) @ H.T) ** 2).sum() / len(H) for u, H in zip(updates, inputs, strict=True)
    )


def test_regmean_is_the_minimum() -> None:
    updates, (moments, inputs) = updates_of(0), moments_of(0)
    found = regmean(updates, moments=moments, shrink=1.0).dense().double().numpy()
    best = objective(found, updates, inputs)
    generator = np.random.default_rng(0)
    for _ in range(200):
        assert objective(found + 1e-2 * generator.standard_normal(found.shape), updates, inputs) > best
    average = sum(u.dense().double().numpy() for u in updates) / 3
    assert best < 0.9 * objective(average, updates, inputs)


@pytest.mark.parametrize("shrink", [0.0, 0.5, 1.0])
def test_few_rows_give_what_the_whole_gram_matrix_gives(shrink: float) -> None:
    updates, (few, _) = updates_of(1, n=40), moments_of(1, rows=(6, 9, 4), n=40)
    whole = [Moment(m.count, m.total, gram=m.as_gram()) for m in few]
    assert all(m.rows is not None for m in few)
    one, two = (regmean(updates, moments=m, shrink=shrink).dense() for m in (few, whole))
    assert (one - two).norm() < 1e-6 * two.norm()
    assert (regmean(updates[:1], moments=few[:1], shrink=shrink).dense() - updates[0].dense()).norm() < 1e-5


def test_inputs_that_no_text_reaches_are_averaged() -> None:
    updates, (moments, inputs) = updates_of(2), moments_of(2)
    for H in inputs:
        H[:, 4] = 0.0
    moments = [Moment.of_rows(torch.from_numpy(H)) for H in inputs]
    average = sum(u.dense() for u in updates) / 3
    own = [(m.as_gram().trace() / m.count) for m in moments]  # the ridge of each
    expected = sum(u.dense()[:, 4] * e for u, e in zip(updates, own, strict=True)) / sum(own)
    assert torch.allclose(regmean(updates, moments=moments).dense()[:, 4], expected.float(), atol=1e-5)
    nothing = [Moment.of_rows(torch.zeros(5, N)) for _ in updates]
    assert torch.allclose(regmean(updates, moments=nothing).dense(), average, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_optimal_rank_is_the_best_of_its_rank(rank: int) -> None:
    """Against regmean cut by SVD, and against descent over all factors from many starts."""
    updates, (moments, inputs) = updates_of(3), moments_of(3)
    found = optimal_rank(updates, moments=moments, rank=rank, shrink=1.0)
    assert found.rank == rank
    best = objective(found.dense().double().numpy(), updates, inputs)
    cut = truncate(regmean(updates, moments=moments, shrink=1.0), rank)[0]
    assert best < objective(cut.dense().double().numpy(), updates, inputs)
    for start in range(3):
        generator = torch.Generator().manual_seed(start)
        B = torch.randn(M, rank, generator=generator, dtype=torch.float64).requires_grad_()
        A = torch.randn(rank, N, generator=generator, dtype=torch.float64).requires_grad_()
        search = torch.optim.LBFGS([B, A], max_iter=300, line_search_fn="strong_wolfe")

        def loss(search: torch.optim.Optimizer = search, B: Tensor = B, A: Tensor = A) -> Tensor:
            search.zero_grad()
            parts = [
                (((B @ A - u.dense().double()) @ torch.from_numpy(H).T) ** 2).sum() / len(H)
                for u, H in zip(updates, inputs, strict=True)
            ]
            total = torch.stack(parts).sum()
            total.backward()
            return total

        search.step(loss)
        assert float(loss().detach()) > best * (1 - 1e-5)


def test_few_rows_need_no_system_of_the_layers_width(monkeypatch: pytest.MonkeyPatch) -> None:
    solved, real = [], torch.linalg.cholesky

    def watched(matrix: Tensor) -> Tensor:
        solved.append(len(matrix))
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "cholesky", watched)
    updates, (moments, _) = updates_of(4, ranks=(16,) * 3, m=64, n=2048), moments_of(4, n=2048)
    optimal_rank(updates, moments=moments, rank=None)
    regmean(updates, moments=moments)
    assert solved == [55, 55]  # 20 + 5 + 30 rows
