"""The outlook against brute force: shares by dense projectors, the best A by a search over random starts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.optimize import minimize
from torch import Tensor

from loraloom.analysis.outlook import best_starts, outlook, own_and_others, share
from loraloom.errors import LoraloomError
from loraloom.starts.subspace import osrm_subspace
from loraloom.statistics.file import Layer, Statistics
from loraloom.statistics.moments import Moment

N = 12


def rows(seed: int, count: int = 40, loud: int = 0, width: int = N) -> Tensor:
    """Return rows with most energy in the directions from `loud` on."""
    drawn = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return drawn * torch.linspace(3, 0.3, width).roll(loud)


def statistics(h: Tensor, fingerprint: str = "f") -> Statistics:
    layers = {name: Layer("q", h.shape[1], 5) for name in ("q", "v")}
    return Statistics("base", fingerprint, {"q": Moment.of_rows(h)}, layers, 1, len(h), "token")


def normalised(h: Tensor) -> np.ndarray:
    G = (h.double().T @ h.double()).numpy()
    return np.asarray(G / np.trace(G))


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(counts=st.lists(st.integers(2, 40), min_size=2, max_size=4), rank=st.integers(1, 6), seed=st.integers(0, 100))
def test_shares_of_energy_are_those_of_dense_projectors(counts: list[int], rank: int, seed: int) -> None:
    given_rows = {f"t{i}": rows(seed + i, count, 3 * i) for i, count in enumerate(counts)}
    found = outlook({name: statistics(h) for name, h in given_rows.items()}, rank)
    grams = [normalised(h) for h in given_rows.values()]
    for i, G in enumerate(grams):
        values, vectors = np.linalg.eigh(G)
        p = int((np.cumsum(values[::-1]) < 0.5).sum()) + 1
        V = vectors[:, ::-1][:, :p]
        assert float(found.chance[0, i]) == pytest.approx(p / N)
        for j, other in enumerate(grams):
            assert float(found.shared[0, i, j]) == pytest.approx(np.trace(V.T @ other @ V), rel=1e-4)
    for rule in ("apart", "osrm", "mean"):
        for i in range(len(grams)):
            moments = [Moment.of_rows(h) for h in given_rows.values()]
            own = moments.pop(i)
            A = osrm_subspace(moments, own, rank, rule=rule, seed=i).A.double().numpy()
            for j, other in enumerate(grams):
                assert float(found.starts[rule][0, i, j]) == pytest.approx(np.trace(A @ other @ A.T), abs=1e-6)
    assert found.starts["random"].numpy() == pytest.approx(rank / N)
    assert found.thin() == [name for name, h in given_rows.items() if len(h) < N]


def test_figures_of_a_start_are_means_over_inputs_and_tasks() -> None:
    values = torch.tensor([[[0.4, 0.1], [0.2, 0.2]], [[0.9, 0.9], [0.4, 0.1]]], dtype=torch.float64)
    own, others, relative = own_and_others(values)
    assert own.tolist() == [[0.4, 0.2], [0.9, 0.1]]
    torch.testing.assert_close(others, torch.tensor([[0.1, 0.2], [0.9, 0.4]], dtype=torch.float64))
    torch.testing.assert_close(relative, torch.tensor([[4, 1], [1, 0.25]], dtype=torch.float64))
    found = outlook({f"t{i}": statistics(rows(i, loud=4 * i)) for i in range(2)}, 2)
    object.__setattr__(found, "starts", {"made": values})
    told = found.of_start("made")
    assert told.own == pytest.approx(0.4)
    assert told.own_to_others == pytest.approx(6.25 / 4)
    assert told.worst_input == pytest.approx(0.625)
    assert told.interference == pytest.approx((0.5 + 1 + 1 + 2) / 4)


@pytest.mark.parametrize("rank", [1, 3])
def test_no_other_subspace_has_a_better_ratio(rank: int) -> None:
    own, others = rows(0), [rows(1, loud=4), rows(2, loud=6)]
    (A,) = best_starts(Moment.of_rows(own), [Moment.of_rows(h) for h in others], [rank])
    torch.testing.assert_close(A @ A.T, torch.eye(rank, dtype=torch.float64))
    X, Y = normalised(own), np.mean([normalised(h) for h in others], axis=0) + np.eye(N) / N

    def lost(entries: np.ndarray) -> float:
        Q = np.linalg.qr(entries.reshape(N, rank))[0]
        return -float(np.trace(Q.T @ X @ Q) / np.trace(Q.T @ Y @ Q))

    searched = [
        minimize(lost, np.random.default_rng(seed).normal(size=N * rank), method="BFGS", tol=1e-10).fun
        for seed in range(4)
    ]
    assert lost(A.T.numpy()) == pytest.approx(min(searched), rel=1e-4)


def test_tasks_of_one_input_need_no_start_and_tasks_apart_can_have_one() -> None:
    same = rows(0)
    alike = outlook({"a": statistics(same), "b": statistics(same)}, 2)
    assert not alike.helped().any()
    assert alike.suggested_rank() is None
    assert alike.attainable == pytest.approx(torch.ones_like(alike.attainable))
    axes = torch.eye(N)
    three, nine = (torch.cat([loud, 1e-3 * axes]) for loud in (axes[:3], axes[3:]))
    apart = outlook({"a": statistics(three), "b": statistics(nine)}, 2)
    assert apart.helped().all()
    # 4 directions: a's three and one of b's nine, 1 against 1 / 9; 8: 1 against 5 / 9
    assert apart.suggested_rank() == 4
    assert share(Moment.of_rows(three), 7 * axes) == pytest.approx(1)  # whatever the norm of A
    few = outlook({"a": statistics(axes[:3]), "b": statistics(axes[3:])}, 2)
    assert few.attainable[0, 0].tolist() == [pytest.approx(share_ / 1e-6) for share_ in (1 / 3, 2 / 3)] + [0, 0]


def test_a_fault_in_the_statistics_is_told() -> None:
    one, other = statistics(rows(0)), statistics(rows(1), "g")
    with pytest.raises(LoraloomError, match="one task has no others"):
        outlook({"a": one}, 2)
    with pytest.raises(LoraloomError, match="'b' come from"):
        outlook({"a": one, "b": other}, 2)
    narrow = statistics(rows(1, width=10))
    with pytest.raises(LoraloomError, match="'b' cover other layers"):
        outlook({"a": one, "b": narrow}, 2)
    with pytest.raises(LoraloomError, match="rank 13 does not fit"):
        outlook({"a": one, "b": one}, 13)
