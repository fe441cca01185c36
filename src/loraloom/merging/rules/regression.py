"""Rules that go up the model: regression on what each layer reads once the layers below it are merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from loraloom.adapters.lowrank import NOISE, concatenate
from loraloom.adapters.update import Update
from loraloom.errors import LoraloomError
from loraloom.merging.probe import Batch, Probe
from loraloom.merging.registry import Result, rule
from loraloom.merging.rules.activation import Shrink, regmean, solve
from loraloom.statistics.moments import Moment, pooled

Layers = Mapping[str, Sequence[Update]]


@rule(
    "regmean_pp",
    paper="Nguyen et al. 2025, RegMean++, arXiv 2508.03121",
    summary="RegMean with the inputs that each layer sees in the model merged so far, layer by layer",
    exact=True,
)
def regmean_pp(layers: Layers, *, probe: Probe, shrink: Shrink = 0.9) -> dict[str, Result]:
    """Return RegMean of every layer, G_i from its inputs once all earlier layers are merged (arXiv 2508.03121).

    Goes up the model; layers that read the same tensor (query, key and value) are solved together. The paper goes a
    transformer block at a time, with the task's own weights inside the block; here every merged layer counts at once.
    Costs (groups of layers) x (batches of all tasks) forward passes. `shrink` as in `regmean` (published 0.95).
    """

    def solved(done: Mapping[str, Update], group: Sequence[str]) -> dict[str, Update]:
        moments = [_moment(layers, probe, done, task, group[0]) for task in range(len(probe.batches))]
        return {module: regmean(layers[module], moments=moments, shrink=shrink) for module in group}

    return _upwards(layers, probe, solved)


@rule(
    "iteris",
    paper="Chen et al. 2025, IterIS: Iterative Inference-Solving Alignment for LoRA Merging, arXiv 2411.15231",
    summary="the update that does in the model merged so far what each task's own does in its own model",
    exact=True,
)
def iteris(
    layers: Layers,
    *,
    probe: Probe,
    ridge: Annotated[float, Field(ge=1e-6, description="share of the mean energy of an input added to all")] = 0.01,
) -> dict[str, Result]:
    """Return dW = (sum_i l_i dW_i (X_i^T Y_i + e I)) (sum_i l_i (Y_i^T Y_i + e I))^-1 (Chen et al., CVPR 2025).

    Of task i's texts X_i holds the rows that the layer reads in the task's own model, Y_i those of the same tokens in
    the merged one, both divided by the root of their number: every task counts alike. So dW minimises
    sum_i l_i (|Y_i dW^T - X_i dW_i^T|_F^2 + e |dW - dW_i|_F^2), l_i = |dW_i|_F^2 / |X_i dW_i^T|_F^2, so that tasks
    whose inputs are loud do not outvote the others. A task without a response here still asks for none, with the
    weight of a mean response. Stays low-rank: B = [B_1 ... B_T], A = [l_i A_i (X_i^T Y_i + e I)]
    (sum_i l_i (Y_i^T Y_i + e I))^-1, rank sum r_i.

    e is `ridge` times the mean diagonal of the Y_i^T Y_i over all tasks: what no text reaches is averaged, by l_i.
    Published: all layers at once, again and again on inputs of the last round's model, from Y_i = X_i; here, as
    RegMean++ does, one sweep up the model, in which every layer is solved on what it will read. Published l_i is the
    same of the base weights with the update; e is 1e-7 of each Gram matrix's norm, and Y_i is mixed with 5e-4 of X_i.
    Weights given to the adapters move the tasks' own models. `ridge` 0.01 and 0.1 were within half a point of each
    other on held-out rows of four GLUE tasks.
    Costs 2 (groups of layers) x (batches of all tasks) forward passes, less one half of the first group's.
    """

    def solved(done: Mapping[str, Update], group: Sequence[str]) -> dict[str, Update]:
        tasks = [_reading(layers, probe, done, task, group) for task in range(len(probe.batches))]
        return {module: _aligned(layers[module], tasks, module, ridge) for module in group}

    return _upwards(layers, probe, solved)


def _upwards(
    layers: Layers, probe: Probe, solved: Callable[[Mapping[str, Update], Sequence[str]], dict[str, Update]]
) -> dict[str, Result]:
    """Return every layer as `solved(layers merged so far, layers that read one tensor)` gives it, lowest first."""
    groups = reading_groups(layers, probe)
    done: dict[str, Update] = {}
    for number, group in enumerate(groups, start=1):
        done |= solved(done, group)
        probe.step(number, len(groups))
    return dict(done)


def reading_groups(layers: Layers, probe: Probe) -> list[list[str]]:
    """Return the layers in the order in which they run, those that read the same tensor together.

    Raises LoraloomError where a layer does not run.
    """
    groups: list[tuple[Tensor, list[str]]] = []
    met: set[str] = set()

    def see(module: str, rows: Tensor) -> None:
        if module in met:
            return  # a layer that runs several times
        met.add(module)
        same = [group for read, group in groups if torch.equal(read, rows)]
        if same:
            same[0].append(module)
        else:
            groups.append((rows, [module]))

    with torch.no_grad():
        probe.run(0, probe.batches[0][0], {name: updates[0] for name, updates in layers.items()}, see)
    missing = sorted(set(layers) - met)
    if missing:
        raise LoraloomError(f"the forward pass does not call {', '.join(missing)}", "leave these layers out")
    return [group for _, group in groups]


@dataclass(frozen=True)
class _Reading:
    """What one task's texts tell of layers that read one tensor.

    `moment` is that of the rows Y in the merged model; by layer, `cross` holds A X^T Y (r, n) and `inner` A X^T X A^T
    (r, r), means over the rows, X those in the task's own model. All float64.
    """

    moment: Moment
    cross: dict[str, Tensor]
    inner: dict[str, Tensor]


def _reading(layers: Layers, probe: Probe, done: Mapping[str, Update], task: int, group: Sequence[str]) -> _Reading:
    """Return what the group reads of the task's texts; no more than a batch's rows are held at once."""
    own = {name: updates[task] for name, updates in layers.items()}
    moments: list[Moment] = []
    cross = {module: torch.zeros(own[module].A.shape, dtype=torch.float64) for module in group}
    inner = {module: torch.zeros(own[module].rank, own[module].rank, dtype=torch.float64) for module in group}
    for batch in probe.batches[task]:
        X = rows_read(probe, task, batch, own, group[0])
        Y = rows_read(probe, task, batch, {**own, **done}, group[0]) if done else X
        moments.append(Moment.of_rows(Y))
        X, Y = X.double(), Y.double()
        for module in group:
            hidden = X @ own[module].A.double().T
            cross[module] += hidden.T @ Y
            inner[module] += hidden.T @ hidden
    moment = pooled(moments)
    count = max(moment.count, 1)
    return _Reading(moment, {m: c / count for m, c in cross.items()}, {m: c / count for m, c in inner.items()})


def _aligned(updates: Sequence[Update], tasks: Sequence[_Reading], module: str, ridge: float) -> Update:
    """Return the solution for one layer; see `iteris`."""
    shares = _shares(updates, [task.inner[module] for task in tasks])
    moments = [task.moment for task in tasks]
    energies = [moment.trace() / max(moment.count, 1) / moment.width for moment in moments]
    e = ridge * sum(energies) / len(energies) + 1e-30  # the last: all inputs zero
    asked = torch.cat(
        [
            share * (task.cross[module] + e * update.A.double())
            for share, task, update in zip(shares, tasks, updates, strict=True)
        ]
    )
    weights = [share / max(moment.count, 1) for share, moment in zip(shares, moments, strict=True)]
    d = torch.full((asked.shape[1],), e, dtype=torch.float64)  # the shares sum to 1
    return Update(concatenate(updates).B, solve(asked, d, moments, weights).float())


def _shares(updates: Sequence[Update], inner: Sequence[Tensor]) -> list[float]:
    """Return l_i / sum l_i, l_i = |dW_i|^2 / |dW_i x|^2, the mean over the rows x; `inner` holds A_i X_i^T X_i A_i^T.

    A response of zero, within the rounding of the factors, is given the mean of the others.
    """
    found = []
    for update, square in zip(updates, inner, strict=True):
        outer = update.B.double().T @ update.B.double()
        energy = float((outer * square).sum())
        rounding = NOISE**2 * float(outer.trace() * square.trace())
        found.append(energy / update.energy() if energy > rounding else 0.0)
    known = [energy for energy in found if energy > 0]
    mean = sum(known) / len(known) if known else 1.0
    inverse = [mean / (energy or mean) for energy in found]
    return [one / sum(inverse) for one in inverse]


def _moment(layers: Layers, probe: Probe, done: Mapping[str, Update], task: int, wanted: str) -> Moment:
    """Return the moment of what `wanted` reads of the task's texts with the layers `done` merged, others the task's."""
    inside = {name: done.get(name, updates[task]) for name, updates in layers.items()}
    return pooled([Moment.of_rows(rows_read(probe, task, batch, inside, wanted)) for batch in probe.batches[task]])


def rows_read(probe: Probe, task: int, batch: Batch, inside: Mapping[str, Update], wanted: str) -> Tensor:
    """Return the rows (k, n) that `wanted` reads of a batch with the updates `inside`, of all its calls."""
    seen: list[Tensor] = []

    def see(module: str, rows: Tensor) -> None:
        if module == wanted:
            seen.append(rows)

    with torch.no_grad():
        probe.run(task, batch, inside, see)
    return torch.cat(seen)
