"""Fisher weights against a dense float64 computation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from loraloom.merging.rules.fisher import fisher
from tiny_probe import TinyProbe, layers_of, tiny_probe


def test_fisher_is_the_dense_computation() -> None:
    """Every text's Jacobian of every output by every entry of both layers, in float64; one task is a regression."""
    probe = tiny_probe(["a", "b"], seed=3, regression=["b"])
    layers = layers_of(0, 2)
    found = fisher(layers, probe=probe, texts=9)
    weights = []
    for task in range(2):
        dense = {name: found[task].dense().double() for name, found in layers.items()}
        rows = [
            {key: value[row : row + 1] for key, value in batch.items()}
            for batch in probe.batches[task]
            for row in range(6)
        ]
        total = {name: torch.zeros_like(dW) for name, dW in dense.items()}
        for row in rows[:9]:

            def outputs(first: Tensor, second: Tensor, row: Mapping[str, Tensor] = row, task: int = task) -> Tensor:
                x = row["x"].double()
                for name, dW in (("first", first), ("second", second)):
                    x = torch.tanh(x @ (probe.weights[name].double() + dW).T)
                kept = row["kept"][..., None]
                raw = ((x * kept).sum(dim=1) / kept.sum(dim=1))[0] @ probe.heads[task].double().T
                return raw if probe.regression[task] else raw - raw.logsumexp(dim=0)

            values = outputs(dense["first"], dense["second"])
            likely = torch.ones(1, dtype=torch.float64) if probe.regression[task] else values.exp()
            jacobians = torch.func.jacrev(outputs, argnums=(0, 1))(dense["first"], dense["second"])
            for name, jacobian in zip(total, jacobians, strict=True):
                total[name] += torch.einsum("c,cij->ij", likely, jacobian**2) / 9
        size = torch.cat([part.flatten() for part in total.values()]).square().mean().sqrt()
        weights.append({name: (part / size).clamp_min(1e-6) for name, part in total.items()})
    for name, updates in layers.items():
        above = sum(w[name] * u.dense().double() for w, u in zip(weights, updates, strict=True))
        expected = above / sum(w[name] for w in weights)
        assert (found[name] - expected).norm() < 2e-5 * expected.norm(), name
    average = sum(u.dense() for u in layers["first"]) / 2
    assert (found["first"] - average).norm() > 0.1 * average.norm()


def test_fisher_averages_where_nothing_depends() -> None:
    """Heads of zeros: no output depends on any entry."""
    probe = tiny_probe(["a", "b"], seed=3)
    blind = TinyProbe(probe.weights, [0 * head for head in probe.heads], probe.batches, [], probe.regression)
    layers = layers_of(1, 2)
    for name, dW in fisher(layers, probe=blind).items():
        average = sum(u.B.double() @ u.A.double() for u in layers[name]) / 2
        assert (dW - average).norm() < 1e-6 * average.norm()


def test_the_order_of_the_layers_given_does_not_matter() -> None:
    probe, layers = tiny_probe(["a", "b"], seed=3), layers_of(3, 2)
    one, two = (fisher(given, probe=probe) for given in (layers, dict(reversed(layers.items()))))
    for name in layers:
        assert torch.equal(one[name], two[name])
