"""Regression onto what each task's layer does to its own inputs, in the base model or in the one merged so far."""

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
from loraloom.merging.registry import Probe, Result, rule
from loraloom.model.tokens import Batch
from loraloom.statistics.moments import Moment, pooled

Layers = Mapping[str, Sequence[Update]]
# share of the mean diagonal of G_i that is added to it, so that inputs that no text reaches are averaged
_RIDGE = 1e-6

Shrink = Annotated[float, Field(ge=0, le=1, description="factor on the off-diagonal of every Gram matrix; 1: none")]


@rule(
    "regmean",
    formula="(Σ dWᵢ Gᵢ)(Σ Gᵢ)⁻¹",
    paper="Jin et al. 2023, Dataless Knowledge Fusion by Merging Weights of Language Models, arXiv 2212.09849",
    summary="the update whose outputs on every task's inputs are nearest to those of the task's own update",
    cost="factors; n x n Cholesky, or rows x rows",
    exact=True,
)
def regmean(updates: Sequence[Update], *, moments: Sequence[Moment], shrink: Shrink = 0.9) -> Update:
    """Return argmin_W sum_i |(W - dW_i) G_i^(1/2)|_F^2 = (sum_i dW_i G_i) (sum_i G_i)^-1 (Jin et al. 2023).

    Stays low-rank: B = [B_1 ... B_T], A = [A_1 G_1; ...; A_T G_T] (sum_i G_i)^-1, rank sum r_i. As in the published
    code, G_i is the mean over the rows, so every task counts alike, and its off-diagonal is multiplied by `shrink`
    (0.1 to 0.95, by model). Unlike there, 1e-6 of its mean diagonal is added: what no text reaches is
    averaged, nothing is singular, and one adapter still comes back as it is. The moments here are the BASE model's,
    as OSRM collects them; published code takes each task's own model's. With fewer rows than inputs only a system of
    the rows' size is solved (Woodbury). A zero adapter is not neutral: its inputs ask for a zero output.
    """
    _, A = _normal_equations(updates, moments, shrink)
    return Update(concatenate(updates).B, A.float())


@rule(
    "optimal_rank",
    formula="RegMean's objective under rank ≤ q: reduced-rank regression",
    paper="Izenman 1975, Reduced-rank regression for the multivariate linear model; on the objective of RegMean",
    summary="the best update of the given rank for RegMean's objective, where regmean cut by SVD is not",
    cost="as RegMean + R x R",
    exact=True,
    output_rank="max",
)
def optimal_rank(
    updates: Sequence[Update], *, moments: Sequence[Moment], rank: int | None, shrink: Shrink = 0.9
) -> Update:
    """Return argmin of RegMean's objective over all W of rank q = `rank`, or max r_i (reduced-rank regression).

    With S = sum_i G_i and W* the solution of `regmean` the objective is |(W - W*) S^(1/2)|_F^2 + constant. So W is
    W* whitened by S^(1/2), cut to q singular triples, and un-whitened: W = U_q U_q^T W*, U_q the top left singular
    vectors of W* S^(1/2). They are the eigenvectors of W* S W*^T, so no root of S is needed. `shrink` as in `regmean`.
    Derived from Eckart and Young; not published for adapters.
    """
    Y, A = _normal_equations(updates, moments, shrink)
    Q, R = torch.linalg.qr(concatenate(updates).B.double())
    squared = R @ (Y @ A.T) @ R.T
    _, vectors = torch.linalg.eigh((squared + squared.T) / 2)  # in ascending order
    U = vectors.flip(1)[:, : rank or max(update.rank for update in updates)]
    return Update((Q @ U).float(), (U.T @ R @ A).float())


@rule(
    "regmean_pp",
    formula="RegMean with Gᵢ from the model merged so far, layer by layer",
    paper="Nguyen et al. 2025, RegMean++, arXiv 2508.03121",
    summary="RegMean with the inputs that each layer sees in the model merged so far, layer by layer",
    cost="a forward pass a group of layers",
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
    formula=(
        "(Σ lᵢ dWᵢ (XᵢᵀYᵢ + εI))(Σ lᵢ (YᵢᵀYᵢ + εI))⁻¹, Xᵢ read in task i's own model, "
        "Yᵢ in the model merged so far; lᵢ = 1 / mean ‖dWᵢ x‖²"
    ),
    paper="Chen et al. 2025, IterIS: Iterative Inference-Solving Alignment for LoRA Merging, arXiv 2411.15231",
    summary="the update that does in the model merged so far what each task's own does in its own model",
    cost="two forward passes a group of layers",
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

    layers: every merged layer's updates, by module path.
    probe: runs the base model; its first batch of the first task is read.

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
    """Return the rows (k, n) that a layer reads of a batch, of all its calls.

    probe: the base model with the tasks' texts.
    task, batch: which task's texts, and one of its batches.
    inside: the updates in the model, by module path.
    wanted: the layer's module path.
    """
    seen: list[Tensor] = []

    def see(module: str, rows: Tensor) -> None:
        if module == wanted:
            seen.append(rows)

    with torch.no_grad():
        probe.run(task, batch, inside, see)
    return torch.cat(seen)


def solve(Y: Tensor, d: Tensor, moments: Sequence[Moment], weights: Sequence[float]) -> Tensor:
    """Return Y (diag(d) + sum_i w_i H_i^T H_i)^-1 for Y (r, n), d (n,) above 0 and the moments of rows H_i; float64.

    With fewer rows than n only a system of the rows' size is solved.
    """
    thin = [moment.thin for moment in moments]
    if sum(len(d) if rows is None else len(rows) for rows in thin) < len(d):
        H = torch.cat([w**0.5 * moment.as_rows() for moment, w in zip(moments, weights, strict=True)])
        return _woodbury(Y, d, H)
    total = torch.diag(d)
    for moment, w in zip(moments, weights, strict=True):
        total += w * moment.as_gram()
    return torch.cholesky_solve(Y.T, torch.linalg.cholesky(total)).T


def _normal_equations(updates: Sequence[Update], moments: Sequence[Moment], shrink: float) -> tuple[Tensor, Tensor]:
    """Return Y = [A_1 G_1; ...; A_T G_T] and Y (sum G_i)^-1, both (sum r_i, n) float64.

    G_i = shrink F_i^T F_i + diag(d_i), F_i the factor of the mean over the rows of task i.
    """
    diagonals = [_diagonal(moment, shrink) for moment in moments]
    weights = [shrink / max(moment.count, 1) for moment in moments]
    Y = torch.cat(
        [
            w * _times_gram(update.A.double(), moment) + update.A.double() * d
            for update, moment, w, d in zip(updates, moments, weights, diagonals, strict=True)
        ]
    )
    return Y, solve(Y, torch.stack(diagonals).sum(dim=0), moments, weights)


def _woodbury(Y: Tensor, d: Tensor, H: Tensor) -> Tensor:
    """Return Y (diag(d) + H^T H)^-1 for H (k, n) by a k x k system."""
    scaled = H / d
    small = torch.eye(H.shape[0], dtype=H.dtype) + scaled @ H.T
    inner = torch.cholesky_solve(scaled @ Y.T, torch.linalg.cholesky(small))
    result: Tensor = Y / d - inner.T @ scaled
    return result


def _diagonal(moment: Moment, shrink: float) -> Tensor:
    """Return d (n,): the part of the mean diagonal that shrinking the off-diagonal leaves, and the ridge."""
    squares = moment.as_gram().diagonal() if moment.thin is None else moment.as_rows().square().sum(dim=0)
    mean = squares / max(moment.count, 1)
    return (1 - shrink) * mean + _RIDGE * mean.mean() + 1e-30  # the last: all inputs zero


def _times_gram(A: Tensor, moment: Moment) -> Tensor:
    """Return A H^T H for A (r, n) without an n x n matrix where there are rows."""
    if moment.thin is None:
        return A @ moment.as_gram()
    rows = moment.as_rows()
    return (A @ rows.T) @ rows
