"""Responses against a dense float64 recomputation, row by row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from loraloom.adapters.update import Adapter, Update
from loraloom.analysis.interference import interference, ratio, response, responses
from loraloom.errors import LoraloomError
from loraloom.statistics.file import Layer, Statistics
from loraloom.statistics.moments import Moment

TASKS, LAYERS, N, M, R = ["one", "two", "three"], ["a.query", "a.value"], 10, 7, 3


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapter(seed: int, layers: list[str] = LAYERS) -> Adapter:
    made = {name: Update(normal(seed + i, M, R), normal(seed + 50 + i, R, N)) for i, name in enumerate(layers)}
    return Adapter(made, {}, path=Path(f"adapter{seed}"))


def statistics(rows: Tensor, layers: list[str] = LAYERS) -> Statistics:
    """Both layers read the same tensor."""
    found = {name: Layer(LAYERS[0], N, M) for name in layers}
    return Statistics("base", "f", {LAYERS[0]: Moment.of_rows(rows)}, found, 1, len(rows), "token")


@pytest.mark.parametrize("count", [4, 200])
def test_against_dense(count: int) -> None:
    rows = {name: normal(100 + i, count + i, N) for i, name in enumerate(TASKS)}
    adapters = {name: adapter(10 * i) for i, name in enumerate(TASKS)}
    found = interference(adapters, {name: statistics(h) for name, h in rows.items()})
    assert (found.adapters, found.inputs, found.layers) == (TASKS, TASKS, LAYERS)
    relative: dict[str, list[float]] = {"A": [], "BA": []}
    for index, layer in enumerate(LAYERS):
        for i, one in enumerate(TASKS):
            update = adapters[one].updates[layer]
            A, dW = update.A.double(), update.B.double() @ update.A.double()
            for j, two in enumerate(TASKS):
                h = rows[two].double()
                seen = (h @ A.T).square().sum(1).mean().sqrt()
                through = (h @ dW.T).square().sum(1).mean().sqrt()
                assert float(found.A[index, i, j]) == pytest.approx(float(seen), rel=1e-9)
                assert float(found.BA[index, i, j]) == pytest.approx(float(through), rel=1e-9)
                if i != j:
                    own = rows[one].double()
                    relative["A"].append(float(seen / (own @ A.T).square().sum(1).mean().sqrt()))
                    relative["BA"].append(float(through / (own @ dW.T).square().sum(1).mean().sqrt()))
    for name, values in relative.items():
        assert ratio(getattr(found, name)) == pytest.approx(sum(values) / len(values), rel=1e-9)


def test_a_start_is_seen_by_its_first_factor_alone_and_nothing_turns_negative() -> None:
    rows = normal(0, 200, N)
    A = torch.linalg.svd(normal(1, N, N))[2][:R]
    fresh = Update(torch.zeros(M, R), A)
    seen, through = response(fresh, Moment.of_rows(rows))
    assert seen > 0.5
    assert through == 0.0
    blind = Moment.of_rows(rows - rows @ A.T @ A)
    assert max(response(Update(normal(2, M, R), A), blind)) < 1e-5
    # a Gram matrix off by rounding, as subtraction leaves it
    below = Moment(5, torch.zeros(N, dtype=torch.float64), gram=-1e-18 * torch.eye(N, dtype=torch.float64))
    assert response(Update(normal(2, M, R), A), below) == (0.0, 0.0)
    assert ratio(torch.zeros(2, 3, 3, dtype=torch.float64)) == 0.0


def test_all_that_is_missing_is_told_at_once() -> None:
    adapters = {"one": adapter(0), "two": adapter(1, ["a.query"]), "three": adapter(2)}
    seen = {"one": statistics(normal(0, 5, N), ["a.query"]), "two": statistics(normal(1, 5, N), ["a.query"])}
    with pytest.raises(LoraloomError) as told:
        interference(adapters, seen)
    for part in (
        "no statistics for task 'three'",
        "'one': the statistics lack 1 of its layers",
        "'three on the inputs of two': the statistics lack 1 of its layers",
    ):
        assert part in str(told.value)


def test_the_order_of_layers_does_not_matter() -> None:
    rows = {name: normal(i, 5, N) for i, name in enumerate(("one", "two"))}
    turned = adapter(1)
    turned = Adapter(dict(reversed(turned.updates.items())), {})
    seen = {name: statistics(h) for name, h in rows.items()}
    found = interference({"one": adapter(0), "two": turned}, seen)
    assert torch.equal(found.BA, interference({"one": adapter(0), "two": adapter(1)}, seen).BA)


def test_adapters_of_other_layers_have_no_response_there() -> None:
    """Any adapters, any inputs: what both have agrees with `interference`, the rest is not a number."""
    part, whole = adapter(0, ["a.value"]), adapter(0)
    seen = {name: statistics(normal(i, 30, N)) for i, name in enumerate(("x", "y"))}
    found = responses({"part": part, "whole": whole}, seen)
    assert (found.layers, found.inputs) == (["a.value", "a.query"], ["x", "y"])
    assert found.BA[1, 0].isnan().all()
    own = response(part.updates["a.value"], seen["y"].moment("a.value"))
    assert (float(found.A[0, 0, 1]), float(found.BA[0, 0, 1])) == own
    assert torch.equal(found.overall()[0], found.BA[0, 0])
    assert float(found.overall()[1, 0]) == pytest.approx(float(found.BA[:, 1, 0].square().mean().sqrt()))
    against = found.against("whole", "x")
    assert against[:, 0].isnan().all()
    assert torch.equal(against[:, 1], found.BA[:, 1, 1] / found.BA[:, 1, 0])


def test_a_layer_that_an_adapter_lacks_is_a_zero_update() -> None:
    rows = {name: normal(i, 20, N) for i, name in enumerate(("one", "two"))}
    seen = {name: statistics(h) for name, h in rows.items()}
    members = {"one": adapter(0), "two": adapter(1, ["a.query"])}
    found = interference(members, seen)
    assert found.layers == LAYERS
    assert not found.BA[1, 1].any()
    zero = Update(torch.zeros(M, 1), torch.zeros(1, N))
    padded = Adapter({**members["two"].updates, "a.value": zero}, {})
    assert torch.equal(found.BA, interference({"one": members["one"], "two": padded}, seen).BA)
