"""Rules that look at activations: regression onto what each task's layer does to its own inputs, and Fisher weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from loraloom.adapters.lowrank import concatenate
from loraloom.adapters.update import Update
from loraloom.merging.probe import Probe
from loraloom.merging.registry import Result, rule
from loraloom.statistics.moments import Moment

# share of the mean diagonal of G_i that is added to it, so that inputs that no text reaches are averaged
_RIDGE = 1e-6
# share of a task's root mean square Fisher below which its entries do not fall
_FLOOR = 1e-6

Shrink = Annotated[float, Field(ge=0, le=1, description="factor on the off-diagonal of every Gram matrix; 1: none")]


@rule(
    "regmean",
    paper="Jin et al. 2023, Dataless Knowledge Fusion by Merging Weights of Language Models, arXiv 2212.09849",
    summary="the update whose outputs on every task's inputs are nearest to those of the task's own update",
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
    paper="Izenman 1975, Reduced-rank regression for the multivariate linear model; on the objective of RegMean",
    summary="the best update of the given rank for RegMean's objective, where regmean cut by SVD is not",
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
    "fisher",
    paper="Matena and Raffel 2022, Merging Models with Fisher-Weighted Averaging, arXiv 2111.09832",
    summary="average of the updates, entry by entry, weighted by how much each task's predictions depend on the entry",
    exact=False,
)
def fisher(
    layers: Mapping[str, Sequence[Update]],
    *,
    probe: Probe,
    texts: Annotated[int, Field(gt=0, description="texts a task at most")] = 256,
) -> dict[str, Result]:
    """Return sum_i F_i dW_i / sum_i F_i, entry by entry: (m, n) float64 a layer (Matena and Raffel 2022).

    F_i is the diagonal of task i's Fisher information at its own model: the mean over the first `texts` texts of
    sum_c p_c (d log p_c / d dW)^2, the exact expectation over the model's own classes p, as in the published code; so
    no labels are used and nothing is drawn. A head that returns a number is a Gaussian of variance 1: (d output /
    d dW)^2. As published, each F_i is divided by its norm over all layers and kept above a floor (1e-6; here of its
    root mean square), so that entries on which nothing depends are averaged.

    Taken on the entries of dW, not of B and A, whose Fisher depends on how dW is split. Weights given to the adapters
    move the model at which F_i is taken. Costs one forward and (classes) backward passes a text, and memory of four
    dense (m, n) float32 or float64 tensors for every layer.
    """
    module_names = list(layers)
    above = {name: torch.zeros(layers[name][0].shape[:2], dtype=torch.float64) for name in module_names}
    below = {name: torch.zeros_like(above[name]) for name in module_names}
    for task in range(len(probe.batches)):
        updates = {name: layers[name][task] for name in module_names}
        weights = _fisher_of(probe, task, updates, texts)
        probe.step(task + 1, len(probe.batches))
        count = sum(weight.numel() for weight in weights.values())
        size = (sum(float(weight.square().sum()) for weight in weights.values()) / count) ** 0.5
        for name, weight in weights.items():
            share = (weight / size if size > 0 else weight).clamp_min(_FLOOR)
            above[name] += share * (updates[name].B.double() @ updates[name].A.double())
            below[name] += share
    return {name: above[name] / below[name] for name in module_names}


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


def _fisher_of(probe: Probe, task: int, updates: Mapping[str, Update], texts: int) -> dict[str, Tensor]:
    """Return the mean over texts of the expected squared gradient by each entry of dW, (m, n) float32 a layer."""
    # dW itself stands in for A, so that autograd differentiates by its entries
    leaves = {name: update.dense().requires_grad_() for name, update in updates.items()}
    inside = {name: Update(torch.eye(leaf.shape[0]), leaf) for name, leaf in leaves.items()}
    sums = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    done = 0
    for batch in probe.batches[task]:
        for row in range(len(next(iter(batch.values())))):
            if done == texts:
                break
            outputs = probe.run(task, {key: value[row : row + 1] for key, value in batch.items()}, inside)[0]
            for part, weight in _likelihoods(outputs, probe.regression[task]):
                gradients = torch.autograd.grad(part, list(leaves.values()), retain_graph=True, allow_unused=True)
                for name, gradient in zip(leaves, gradients, strict=True):
                    if gradient is not None:
                        sums[name] += weight * gradient.square()
            done += 1
    return {name: total / max(done, 1) for name, total in sums.items()}


def _likelihoods(outputs: Tensor, regression: bool) -> list[tuple[Tensor, float]]:
    """Return what to differentiate for one text, each with its weight in the expectation."""
    if regression:
        return [(outputs[0], 1.0)]
    log_probabilities = torch.log_softmax(outputs, dim=-1)
    return list(zip(log_probabilities, log_probabilities.detach().exp().tolist(), strict=True))
