"""Rules that go up the model against dense float64 computations, and what they refuse."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from loraloom.adapters.update import Update
from loraloom.errors import LoraloomError
from loraloom.merging.rules.regression import iteris, reading_groups, regmean_pp
from tiny_probe import layers_of, tiny_probe


class Attention:
    """Three layers: "query" and "value" read the text, "out" their product."""

    regression = (False, False)
    labels = ()

    def __init__(self, rows: int = 8, batches: int = 3) -> None:
        generator = torch.Generator().manual_seed(5)
        self.weights = {
            name: torch.randn(m, n, generator=generator) / n**0.5
            for name, (m, n) in {"query": (6, 5), "value": (6, 5), "out": (4, 6)}.items()
        }
        self.batches = [[{"x": torch.randn(rows, 5, generator=generator)} for _ in range(batches)] for _ in range(2)]
        self.runs = 0

    def run(
        self,
        task: int,
        batch: Mapping[str, Tensor],
        updates: Mapping[str, Update],
        see: Callable[[str, Tensor], None] | None = None,
    ) -> Tensor:
        self.runs += 1

        def layer(name: str, x: Tensor) -> Tensor:
            if see:
                see(name, x.clone())
            return x @ (self.weights[name] + updates[name].dense()).T

        x = batch["x"]
        return layer("out", torch.tanh(layer("query", x)) * layer("value", x))

    def step(self, done: int, total: int) -> None:
        assert 0 < done <= total


def attention_layers() -> dict[str, list[Update]]:
    """Updates of two tasks, not in the order in which the layers run."""
    generator = torch.Generator().manual_seed(6)
    return {
        name: [Update(torch.randn(m, 2, generator=generator), torch.randn(2, n, generator=generator)) for _ in range(2)]
        for name, (m, n) in {"out": (4, 6), "query": (6, 5), "value": (6, 5)}.items()
    }


def test_regmean_pp_goes_up_the_merged_model() -> None:
    probe, layers = Attention(), attention_layers()
    assert reading_groups(layers, probe) == [["query", "value"], ["out"]]
    probe.runs = 0
    found = regmean_pp(layers, probe=probe, shrink=0.7)
    assert probe.runs == 1 + 2 * 6  # one to see the order, then every batch once a group

    def solved(name: str, inputs: list[np.ndarray]) -> np.ndarray:
        above, below = 0.0, 0.0
        for update, H in zip(layers[name], inputs, strict=True):
            G = H.T @ H / len(H)
            G = 0.7 * G + 0.3 * np.diag(np.diag(G)) + 1e-6 * np.mean(np.diag(G)) * np.eye(len(G))
            above, below = above + update.dense().double().numpy() @ G, below + G
        return above @ np.linalg.inv(below)

    texts = [torch.cat([batch["x"] for batch in batches]).double().numpy() for batches in probe.batches]
    base = {name: weight.double().numpy() for name, weight in probe.weights.items()}
    query, value = solved("query", texts), solved("value", texts)
    inner = [np.tanh(H @ (base["query"] + query).T) * (H @ (base["value"] + value).T) for H in texts]
    for name, dW in (("query", query), ("value", value), ("out", solved("out", inner))):
        assert np.linalg.norm(found[name].dense().numpy() - dW) < 2e-5 * np.linalg.norm(dW), name


def attended(probe: Attention, inside: Mapping[str, np.ndarray], texts: np.ndarray) -> np.ndarray:
    """What "out" reads, in float64."""
    base = {name: weight.double().numpy() for name, weight in probe.weights.items()}
    return np.tanh(texts @ (base["query"] + inside["query"]).T) * (texts @ (base["value"] + inside["value"]).T)


@pytest.mark.parametrize("silent", [None, "value", "out"])
@pytest.mark.parametrize(("rows", "batches"), [(8, 3), (1, 2)])  # more rows than inputs, and fewer
def test_iteris_is_the_least_squares_of_every_task(rows: int, batches: int, silent: str | None) -> None:
    """Every layer's regression solved by stacking rows; `silent`: a layer in which the first task's update is zero."""
    probe, layers, ridge = Attention(rows, batches), attention_layers(), 0.05
    if silent:
        layers[silent][0] = Update(torch.zeros_like(layers[silent][0].B), layers[silent][0].A)
    found = iteris(layers, probe=probe, ridge=ridge)
    assert probe.runs == 1 + 2 * batches + 2 * 2 * batches  # the order; own inputs, the merged model's; the same first
    own = [{name: updates[task].dense().double().numpy() for name, updates in layers.items()} for task in range(2)]

    def solved(name: str, own_inputs: list[np.ndarray], inputs: list[np.ndarray]) -> np.ndarray:
        e = ridge * np.mean([np.mean(np.square(Y)) for Y in inputs])
        sizes = [
            np.sum(np.square(X @ dW[name].T)) / len(X) / (np.sum(np.square(dW[name])) or 1.0)
            for X, dW in zip(own_inputs, own, strict=True)
        ]
        sizes = [size or max(sizes) for size in sizes]  # of two tasks the mean of the others is the other
        stacked, wanted = [], []
        for X, Y, dW, size in zip(own_inputs, inputs, own, sizes, strict=True):
            stacked += [Y / np.sqrt(len(Y) * size), np.eye(Y.shape[1]) * np.sqrt(e / size)]
            wanted += [X @ dW[name].T / np.sqrt(len(X) * size), dW[name].T * np.sqrt(e / size)]
        return np.linalg.lstsq(np.vstack(stacked), np.vstack(wanted), rcond=None)[0].T

    texts = [torch.cat([batch["x"] for batch in batches]).double().numpy() for batches in probe.batches]
    merged = {name: solved(name, texts, texts) for name in ("query", "value")}
    above = [attended(probe, dW, H) for dW, H in zip(own, texts, strict=True)]
    merged["out"] = solved("out", above, [attended(probe, merged, H) for H in texts])
    for name, dW in merged.items():
        assert np.linalg.norm(found[name].dense().double().numpy() - dW) < 2e-5 * np.linalg.norm(dW), name


def test_iteris_makes_up_for_what_was_merged_below() -> None:
    """Layers whose own update is the same for all tasks: the later one differs from it where the earlier is merged."""
    probe, layers = Attention(), attention_layers()
    layers["out"][1] = layers["out"][0]

    def error(found: Mapping[str, Update]) -> float:
        """How far the merged update's responses are from each task's own."""
        merged = {name: update.dense().double().numpy() for name, update in found.items()}
        total = 0.0
        for task, batches in enumerate(probe.batches):
            texts = torch.cat([batch["x"] for batch in batches]).double().numpy()
            own = {name: updates[task].dense().double().numpy() for name, updates in layers.items()}
            X, Y = attended(probe, own, texts), attended(probe, merged, texts)
            total += np.sum(np.square(Y @ merged["out"].T - X @ own["out"].T)) / np.sum(np.square(X @ own["out"].T))
        return total

    found = iteris(layers, probe=probe, ridge=1e-6)
    assert error(found) < 0.9 * error({**found, "out": layers["out"][0]})


def test_a_layer_that_does_not_run_is_told() -> None:
    probe, layers = tiny_probe(["a", "b"], seed=3), layers_of(2, 2)
    with pytest.raises(LoraloomError, match="does not call third"):
        reading_groups({**layers, "third": layers["first"]}, probe)


def test_the_order_of_the_layers_given_does_not_matter() -> None:
    probe, layers = tiny_probe(["a", "b"], seed=3), layers_of(3, 2)
    turned = dict(reversed(layers.items()))
    for rule, name in itertools.product((regmean_pp, iteris), layers):
        one, two = (rule(given, probe=probe)[name] for given in (layers, turned))
        assert torch.equal(one.dense(), two.dense())
