"""Learned scales against the same search written out in dense float64 on the tiny model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from loraloom.adapters.update import Update
from loraloom.errors import LoraloomError
from loraloom.merging.rules.learned import adamerging, lorahub, nsc, soups
from tiny_probe import TinyProbe, layers_of, tiny_probe

NAMES = ("first", "second")


def outputs(probe: TinyProbe, task: int, batch: int, deltas: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the outputs and what each layer reads of the tokens that count, in float64 from dense updates."""
    x, kept = probe.batches[task][batch]["x"].double(), probe.batches[task][batch]["kept"]
    read = []
    for name, dW in zip(NAMES, deltas, strict=True):
        read.append(x[kept])
        x = torch.tanh(x @ (probe.weights[name].double() + dW).T)
    pooled = (x * kept[..., None]).sum(dim=1) / kept.sum(dim=1, keepdim=True)
    return pooled @ probe.heads[task].double().T, read


def written_out(
    layers: dict[str, list[Update]],
    probe: TinyProbe,
    loss: Callable[[int, int, list[Tensor]], Tensor],
    tasks: list[int],
    start: float,
    steps: int,
    rate: float,
    scales: Callable[[Tensor], Tensor] = lambda x: x,
    decay: float = 0.0,
) -> dict[str, Tensor]:
    """Adam by its formulas (Kingma and Ba), with decoupled weight decay; return the dense merged updates."""
    count = len(probe.batches)
    dense = [torch.stack([u.B.double() @ u.A.double() for u in layers[name]]) for name in NAMES]
    x = torch.full((2, count), start, dtype=torch.float64)
    mean, square = torch.zeros_like(x), torch.zeros_like(x)

    def merged(x: Tensor) -> list[Tensor]:
        return [torch.einsum("t,tij->ij", row, parts) for row, parts in zip(scales(x), dense, strict=True)]

    for step in range(1, steps + 1):
        x = x.detach().requires_grad_()
        total = torch.stack([loss(task, (step - 1) % len(probe.batches[task]), merged(x)) for task in tasks]).sum()
        (g,) = torch.autograd.grad(total, x)
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g**2
        x = x.detach() * (1 - rate * decay)
        x = x - rate * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    return dict(zip(NAMES, merged(x.detach()), strict=True))


def assert_same(found: dict[str, Update], expected: dict[str, Tensor], tolerance: float = 1e-3) -> None:
    for name, dW in expected.items():
        error = (found[name].dense().double() - dW).norm() / dW.norm()
        assert error < tolerance, f"{name}: {error:.1e}"


def labelled_loss(probe: TinyProbe, task: int, batch: int, deltas: list[Tensor]) -> Tensor:
    raw, labels = outputs(probe, task, batch, deltas)[0], probe.labels[task][batch]
    if probe.regression[task]:
        return ((raw[:, 0] - labels.double()) ** 2).mean()
    likely = torch.exp(raw) / torch.exp(raw).sum(dim=1, keepdim=True)
    return -torch.log(likely[torch.arange(len(labels)), labels]).mean()


@pytest.fixture
def probe() -> TinyProbe:
    return tiny_probe(["a", "b", "c"], seed=4, regression=["b"], batches=3)


def test_adamerging_is_the_search_written_out(probe: TinyProbe) -> None:
    layers = layers_of(10, 3)

    def entropy(task: int, batch: int, deltas: list[Tensor]) -> Tensor:
        raw = outputs(probe, task, batch, deltas)[0]
        likely = torch.exp(raw) / torch.exp(raw).sum(dim=1, keepdim=True)
        return -(likely * torch.log(likely)).sum(dim=1).mean()

    expected = written_out(layers, probe, entropy, tasks=[0, 2], start=0.3, steps=20, rate=0.05)
    found = adamerging(layers, probe=probe, steps=20, rate=0.05)
    assert_same(found, expected)
    unmoved = {name: 0.3 * sum(u.dense() for u in layers[name]) for name in NAMES}
    assert (found["first"].dense() - unmoved["first"]).norm() > 0.1 * unmoved["first"].norm()
    before, after = (
        sum(float(entropy(task, batch, deltas)) for task in (0, 2) for batch in range(3))
        for deltas in ([unmoved[name].double() for name in NAMES], [expected[name] for name in NAMES])
    )
    assert after < before


def test_adamerging_needs_classes() -> None:
    numbers = tiny_probe(["a", "b"], seed=4, regression=["a", "b"])
    with pytest.raises(LoraloomError, match="every task is a regression"):
        adamerging(layers_of(10, 2), probe=numbers)


def test_nsc_is_the_search_written_out(probe: TinyProbe) -> None:
    """Only the second layer is looked at, by the paper's formula; only the first one's scales can move it."""
    layers = layers_of(11, 3)

    def ratio(task: int, batch: int, deltas: list[Tensor]) -> Tensor:
        z, A = outputs(probe, task, batch, deltas)[1][1], layers["second"][task].A.double()
        projected = z @ A.T @ torch.linalg.inv(A @ A.T) @ A
        return torch.sqrt(1 - (z * projected).sum(dim=1) / (z * z).sum(dim=1)).mean()

    expected = written_out(layers, probe, ratio, tasks=[0, 1, 2], start=0.4, steps=20, rate=0.05, decay=0.01)
    found = nsc(layers, probe=probe, steps=20, rate=0.05)
    assert_same(found, expected)
    kept = 0.4 * (1 - 0.05 * 0.01) ** 20  # the second layer's scales: only weight decay touches them
    assert torch.allclose(found["second"].dense(), kept * sum(u.dense() for u in layers["second"]), atol=1e-6)


def test_nsc_stays_where_nothing_can_be_learned(probe: TinyProbe) -> None:
    """One layer alone: what it reads does not depend on any scale."""
    layers = {"first": layers_of(11, 3)["first"]}
    found = nsc(layers, probe=probe, steps=3)
    assert torch.equal(found["first"].dense(), nsc(layers, probe=probe, steps=0)["first"].dense())


def test_soups_is_the_search_written_out(probe: TinyProbe) -> None:
    layers = layers_of(12, 3)
    expected = written_out(
        layers,
        probe,
        lambda task, batch, deltas: labelled_loss(probe, task, batch, deltas),
        tasks=[0, 1, 2],
        start=0.0,
        steps=20,
        rate=0.1,
        scales=lambda x: torch.exp(x) / torch.exp(x).sum(dim=1, keepdim=True),
    )
    assert_same(soups(layers, probe=probe, steps=20, rate=0.1), expected)


def test_lorahub_finds_what_a_grid_finds() -> None:
    """Labels made by a known mixture with little of the second adapter: a search of 80 comes as low as a fine grid."""
    probe, layers = tiny_probe(["a", "b"], seed=6), layers_of(13, 2)
    dense = {name: [u.B.double() @ u.A.double() for u in layers[name]] for name in NAMES}

    def mixed(w: tuple[float, float]) -> list[Tensor]:
        return [w[0] * dense[name][0] + w[1] * dense[name][1] for name in NAMES]

    for task in range(2):
        for batch in range(2):
            probe.labels[task][batch] = outputs(probe, task, batch, mixed((1.2, -0.3)))[0].argmax(dim=1)

    def value(w: tuple[float, float]) -> float:
        losses = [float(labelled_loss(probe, task, batch, mixed(w))) for task in range(2) for batch in range(2)]
        return sum(losses) / 4 + 0.05 * (abs(w[0]) + abs(w[1])) / 2

    grid = np.linspace(-1.5, 1.5, 31)
    best = min(value((a, b)) for a in grid for b in grid)
    found = lorahub(layers, probe=probe, steps=80)
    basis = torch.stack([d.flatten() for d in dense["first"]], dim=1)
    w = torch.linalg.lstsq(basis, found["first"].dense().double().flatten()[:, None]).solution.flatten().tolist()
    assert_same(found, dict(zip(NAMES, mixed((w[0], w[1])), strict=True)), tolerance=1e-5)  # one weight for all layers
    assert max(map(abs, w)) <= 1.5 + 1e-6
    assert value((w[0], w[1])) < best + 2e-3 < value((0.0, 0.0))


def test_progress_is_told_to_the_end() -> None:
    told: list[tuple[int, int]] = []

    class Told(TinyProbe):
        def step(self, done: int, total: int) -> None:
            told.append((done, total))

    plain = tiny_probe(["a", "b"], seed=6)
    probe = Told(plain.weights, plain.heads, plain.batches, plain.labels, plain.regression)
    adamerging(layers_of(14, 2), probe=probe, steps=4)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    told.clear()
    lorahub(layers_of(14, 2), probe=probe, steps=9)
    assert [done for done, _ in told] == list(range(1, len(told) + 1))
    assert len(told) == 9
