"""Predicted errors and scales against dense float64 sums over rows, and against a minimiser that knows no algebra."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.optimize import minimize
from torch import Tensor

from loraloom.adapters.update import Adapter, Update
from loraloom.analysis.interference import products
from loraloom.analysis.prediction import predict, solve_scales
from loraloom.errors import LoraloomError
from loraloom.statistics.file import Layer, Statistics
from loraloom.statistics.moments import Moment


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class World:
    """Random adapters on layers of two shapes, and each task's rows.

    heads: PEFT's task type of every adapter, in turn. The adapters in `without` lack the first layer.
    """

    def __init__(
        self,
        seed: int,
        ranks: tuple[int, ...],
        rows: int,
        kind: str = "rows",
        heads: tuple[str, ...] = ("SEQ_CLS",),
        without: tuple[int, ...] = (),
    ) -> None:
        self.own_head = [heads[i % len(heads)] == "SEQ_CLS" for i in range(len(ranks))]
        self.shapes = {"a.query": (7, 10), "b.up": (12, 10)}
        self.tasks = [f"task{i}" for i in range(len(ranks))]
        self.rows = {task: normal(seed + 100 + i, rows + i, 10) for i, task in enumerate(self.tasks)}
        self.adapters = {
            task: Adapter(
                {
                    name: Update(normal(seed + 10 * i + j, m, r), normal(seed + 50 + 10 * i + j, r, n))
                    for j, (name, (m, n)) in enumerate(self.shapes.items())
                    if j or i not in without
                },
                {"task_type": heads[i % len(heads)]},
            )
            for i, (task, r) in enumerate(zip(self.tasks, ranks, strict=True))
        }
        self.statistics = {task: self.statistics_of(h, kind) for task, h in self.rows.items()}

    def statistics_of(self, h: Tensor, kind: str) -> Statistics:
        total = h.sum(dim=0, dtype=torch.float64)
        given = {"rows": h} if kind == "rows" else {"factor": torch.linalg.qr(h, mode="r").R}
        moment = (
            Moment(len(h), total, gram=h.double().T @ h.double()) if kind == "gram" else Moment(len(h), total, **given)
        )
        layers = {name: Layer("a.query", n, m) for name, (m, n) in self.shapes.items()}
        return Statistics("base", "f", {"a.query": moment}, layers, 1, len(h), "token")

    def dense(self, scales: np.ndarray) -> np.ndarray:
        """Return (L, T): the squared errors where they count over the energy that is read, and the own responses.

        A row at a time: in the tasks' own output directions on rows less their mean, or whatever is written.
        """
        found = np.zeros((2, len(self.shapes), len(self.tasks)))
        for index, (layer, shape) in enumerate(self.shapes.items()):
            zero = np.zeros(shape)
            deltas = [
                a.updates[layer].dense().double().numpy() if layer in a.updates else zero
                for a in self.adapters.values()
            ]
            merged = sum(s * dW for s, dW in zip(scales[index], deltas, strict=True))
            for j, task in enumerate(self.tasks):
                h, P = self.rows[task].double().numpy(), np.eye(shape[0])
                energy = (h**2).sum(axis=1).mean()
                if self.own_head[j]:
                    U, S, _ = np.linalg.svd(deltas[j])
                    P = U[:, : (1e-5 * S[0] < S).sum()]
                    h = h - h.mean(axis=0)
                found[0, index, j] = (((h @ (merged - deltas[j]).T) @ P) ** 2).sum(axis=1).mean() / energy
                found[1, index, j] = ((h @ deltas[j].T) ** 2).sum(axis=1).mean() / energy
        return found


WORLDS = st.builds(
    World,
    seed=st.integers(0, 1000),
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
    rows=st.integers(2, 30),
    kind=st.sampled_from(["rows", "gram", "factor"]),
    heads=st.sampled_from([("SEQ_CLS",), ("CAUSAL_LM",), ("SEQ_CLS", "SEQ_2_SEQ_LM")]),
    without=st.sampled_from([(), (1,), (1, 2)]),
)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(world=WORLDS, seed=st.integers(0, 1000))
def test_errors_are_those_of_dense_rows(world: World, seed: int) -> None:
    scales = np.random.default_rng(seed).normal(size=(2, len(world.tasks)))
    found, (errors, own) = predict(world.adapters, world.statistics), world.dense(scales)
    torch.testing.assert_close(found.own, torch.tensor(own), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(found.errors(torch.tensor(scales)), torch.tensor(errors), rtol=1e-4, atol=1e-6)
    by_task = errors.sum(axis=0) / own.sum(axis=0)
    np.testing.assert_allclose(found.by_task(torch.tensor(scales)).numpy(), by_task, rtol=1e-4, atol=1e-6)
    one = world.dense(np.full((2, len(world.tasks)), 0.3))[0]
    torch.testing.assert_close(found.errors(0.3), torch.tensor(one), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("heads", ["SEQ_CLS", "CAUSAL_LM"])
@pytest.mark.parametrize("kind", ["rows", "gram"])
def test_scales_are_those_that_a_minimiser_finds(heads: str, kind: str) -> None:
    world = World(1, (2, 3, 1), 12, kind, heads=(heads,))
    found = predict(world.adapters, world.statistics)
    unit = world.dense(np.zeros((2, 3)))[1].sum(axis=0)

    def objective(scales: np.ndarray) -> float:
        return float((world.dense(np.broadcast_to(scales, (2, 3)))[0].sum(axis=0) / unit).sum())

    for shape, scales in (
        ((1, 1), torch.tensor([[found.uniform()]])),
        ((2, 1), found.by_layer()),
        ((2, 3), found.by_layer_and_adapter()),
    ):
        best = minimize(lambda s, shape=shape: objective(s.reshape(shape)), np.ones(np.prod(shape)), tol=1e-9).x
        np.testing.assert_allclose(scales.numpy(), best.reshape(shape), atol=2e-4)


def test_nothing_and_its_own_adapter() -> None:
    world = World(3, (2, 4), 9)
    found = predict(world.adapters, world.statistics)
    assert found.by_task(0.0).tolist() == pytest.approx([1, 1])
    torch.testing.assert_close(found.errors(0.0), found.own)
    alone = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    assert float(found.by_task(alone)[0]) == pytest.approx(0, abs=1e-9)
    single = predict({"task0": world.adapters["task0"]}, world.statistics)
    assert single.uniform() == pytest.approx(1)
    torch.testing.assert_close(single.by_layer_and_adapter(), torch.ones(2, 1, dtype=torch.float64))


def test_adapters_that_are_zero_or_alike_have_finite_scales() -> None:
    world = World(4, (2, 2, 3), 9)
    world.adapters["task1"] = world.adapters["task0"]
    zero = world.adapters["task2"].scaled(0.0)
    found = predict({**world.adapters, "task2": zero}, world.statistics)
    scales = found.by_layer_and_adapter()
    torch.testing.assert_close(scales, torch.tensor([[0.5, 0.5, 0.0]] * 2, dtype=torch.float64), atol=1e-6, rtol=0)
    assert found.uniform() == pytest.approx(0.5)
    assert found.by_task(1.0)[2] == 0  # a task without a response has none to lose
    nothing = predict({"task2": zero}, world.statistics)
    assert nothing.uniform() == 0
    assert not nothing.by_layer().any()
    assert not solve_scales(torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)).any()


@pytest.mark.parametrize("centred", [False, True])
def test_products_without_a_projector_are_mean_products_of_outputs(centred: bool) -> None:
    world = World(5, (2, 4, 1), 6)
    updates = [adapter.updates["b.up"] for adapter in world.adapters.values()]
    h = world.rows["task1"].double()
    h = h - h.mean(dim=0) if centred else h
    outputs = torch.stack([h @ update.dense().double().T for update in updates])
    expected = torch.einsum("akm,bkm->ab", outputs, outputs) / len(h)
    found = products(updates, world.statistics["task1"].moment("b.up"), centred=centred)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_what_is_missing_is_told() -> None:
    world = World(6, (2, 2), 5)
    with pytest.raises(LoraloomError, match="output errors cannot be predicted: no statistics for task 'task1'"):
        predict(world.adapters, {"task0": world.statistics["task0"]})
