"""Rules that learn their scales: one number a task, or a task and layer, by what the merged model does on texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from loraloom.adapters.lowrank import concatenate, norm, update_bases
from loraloom.adapters.update import Update
from loraloom.errors import LoraloomError
from loraloom.merging.registry import Probe, Result, rule
from loraloom.merging.rules.regression import reading_groups

Layers = Mapping[str, Sequence[Update]]
Loss = Callable[[int, int, dict[str, Update]], Tensor]  # of a task, the number of its batch, and the merged updates
Results = dict[str, Result]

Steps = Annotated[int, Field(ge=0, description="steps of the optimiser, each with one batch of every task")]
Rate = Annotated[float, Field(gt=0, description="learning rate")]
Init = Annotated[float, Field(description="scale of every task and layer at the start")]

_BOUND = 1.5  # of LoraHub's weights
_REACH, _FINEST = 0.5, 0.01  # of the steps of LoraHub's search: first ones, and the last, below which it ends


@rule(
    "adamerging",
    formula="Σ λᵢₗ dWᵢ, λ per task and layer by entropy on unlabelled texts",
    paper="Yang et al. 2024, AdaMerging, arXiv 2310.02575",
    summary="a scale for every task and layer such that the merged model is sure of its predictions",
    cost="steps x tasks passes, forward and back",
    exact=True,
)
def adamerging(layers: Layers, *, probe: Probe, init: Init = 0.3, steps: Steps = 50, rate: Rate = 0.01) -> Results:
    """Return sum_i lambda_i dW_i with the lambda_i of every layer learned without labels (Yang et al. 2024).

    Layer-wise AdaMerging: Adam minimises the sum over tasks of the mean entropy of the merged model's predictions on
    the task's texts, from lambda = `init`. Published: rate 1e-3 for 500 to 1000 steps on the TEST inputs, and in the
    "++" variant on updates trimmed by TIES; here rate 1e-2 for 50 steps, which goes as far at a fraction of the
    cost, on whatever texts the probe holds, and untrimmed. A number has no entropy: tasks of regression have their
    scales learned, but no say. Raises LoraloomError where no task has classes.
    """
    tasks = [task for task, regression in enumerate(probe.regression) if not regression]
    if not tasks:
        raise LoraloomError("adamerging: every task is a regression, which has no entropy", "use nsc or lorahub")

    def entropy(task: int, number: int, updates: dict[str, Update]) -> Tensor:
        outputs = probe.run(task, probe.batches[task][number], updates)
        log_probabilities = torch.log_softmax(outputs, dim=-1)
        return -(log_probabilities.exp() * log_probabilities).sum(dim=-1).mean()

    scales = torch.full(_size(layers), init, dtype=torch.float64, requires_grad=True)
    return _learn(layers, probe, scales, lambda x: x, entropy, tasks, steps, torch.optim.Adam([scales], lr=rate))


@rule(
    "nsc",
    formula="λ per task and layer by what Aᵢ leaves of its inputs' energy",
    paper="Lee et al. 2026, Label-Free Cross-Task LoRA Merging with Null-Space Compression, arXiv 2603.26317",
    summary="a scale for every task and layer such that deep layers read what the task's own A can see",
    cost="steps x tasks passes, forward and back",
    exact=True,
)
def nsc(
    layers: Layers,
    *,
    probe: Probe,
    init: Init = 0.4,
    steps: Steps = 50,
    rate: Rate = 0.002,
    share: Annotated[float, Field(gt=0, le=1, description="share of the layers that are looked at, deepest")] = 0.25,
) -> Results:
    """Return sum_i lambda_i dW_i with the lambda_i of every layer learned without labels or outputs (Lee et al. 2026).

    AdamW minimises the mean over tasks and layers of the null-space ratio of task i's tokens z, as the merged model
    reads them: sqrt(1 - z^T A_i^T (A_i A_i^T)^-1 A_i z / |z|^2), the share of z that A_i does not see. The scales act
    through what they make of z in later layers; those of the last layers have no effect and stay. Only the deepest
    `share` of the layers is looked at; the paper counts transformer blocks, here groups of layers that read the same
    tensor count. Published: rate 1e-3 for 100 steps (3e-4 for 500), and `init` 0.4; here half the steps at twice the
    rate. The row space of A_i is taken by SVD, so a rank-deficient A needs no ridge. Fits regression.
    """
    groups = reading_groups(layers, probe)
    deep = {module for group in groups[-math.ceil(share * len(groups)) :] for module in group}
    seen = {module: [_rows_of(update) for update in layers[module]] for module in deep}

    def ratio(task: int, number: int, updates: dict[str, Update]) -> Tensor:
        ratios: dict[str, list[Tensor]] = {}

        def see(module: str, rows: Tensor) -> None:
            if module in deep and len(seen[module][task]):
                inside = (rows @ seen[module][task].T).square().sum(dim=-1)
                outside = 1 - inside / rows.square().sum(dim=-1).clamp_min(1e-8)
                ratios.setdefault(module, []).append(outside.clamp_min(1e-12).sqrt().mean())

        probe.run(task, probe.batches[task][number], updates, see)
        means = [torch.stack(values).mean() for values in ratios.values()]
        return torch.stack(means).mean() if means else torch.zeros(())

    tasks = range(len(probe.batches))
    scales = torch.full(_size(layers), init, dtype=torch.float64, requires_grad=True)
    return _learn(layers, probe, scales, lambda x: x, ratio, tasks, steps, torch.optim.AdamW([scales], lr=rate))


@rule(
    "soups",
    formula="softmax weights per layer, learned on labelled texts",
    paper="Prabhakar et al. 2025, LoRA Soups (CAT), arXiv 2410.13025",
    summary="weights of the tasks in every layer, summing to one, learned on labelled texts",
    cost="steps x tasks passes, forward and back",
    exact=True,
    labelled=True,
)
def soups(layers: Layers, *, probe: Probe, steps: Steps = 50, rate: Rate = 0.05) -> Results:
    """Return sum_i a_i dW_i, a = softmax of one learned number a task and layer (Prabhakar et al. 2025, CAT).

    Adam minimises the sum over tasks of the loss on labelled texts (cross-entropy; mean squared error for
    regression), from a_i = 1/T. By the softmax, as in the published code, the weights of a layer sum to one.
    Published: rate 1e-4 for one epoch of 10,000 texts, which hardly leaves the average; here rate 0.05 for 50 steps.
    The adapters' own heads are used and stay as they are.
    """
    start = torch.zeros(_size(layers), dtype=torch.float64, requires_grad=True)
    tasks, optimiser = range(len(probe.batches)), torch.optim.Adam([start], lr=rate)
    loss = partial(_labelled_loss, probe)
    return _learn(layers, probe, start, lambda x: x.softmax(dim=1), loss, tasks, steps, optimiser)


@rule(
    "lorahub",
    formula="one w per task by search in [−1.5, 1.5], loss + 0.05 mean |w|",
    paper="Huang et al. 2024, LoraHub, arXiv 2307.13269",
    summary="one weight a task, found without gradients on labelled texts",
    cost="steps x tasks passes, forward",
    exact=True,
    labelled=True,
)
def lorahub(
    layers: Layers,
    *,
    probe: Probe,
    steps: Annotated[int, Field(gt=0, description="trials of the search, each a pass over all texts")] = 40,
    penalty: Annotated[float, Field(ge=0, description="weight of the mean |w_i| beside the loss")] = 0.05,
) -> Results:
    """Return sum_i w_i dW_i, w in [-1.5, 1.5]^T the best trial of a search without gradients (Huang et al. 2024).

    Minimises the mean over tasks of the loss on all labelled texts (as in `soups`) plus `penalty` times the mean
    |w_i|, from w = 0, in `steps` trials at most. Published code searches with nevergrad's NGOpt; here it is Nelder and
    Mead's simplex, which draws nothing and compares losses only, so that rounding cannot lead it elsewhere. It sums
    the factors, (sum w_i B_i)(sum w_i A_i) with cross terms B_i A_j; here dW is summed exactly. And it fits a few
    examples of ONE new task; here the texts of all merged tasks count.
    """
    from scipy.optimize import minimize  # here, because it takes long to import and no other rule needs it

    # the search depends on the order of its coordinates; strength is an order that the caller's order does not change
    tasks = sorted(range(len(probe.batches)), key=lambda task: -sum(norm(updates[task]) for updates in layers.values()))
    ordered = {module: [updates[task] for task in tasks] for module, updates in layers.items()}
    trials: list[tuple[float, Tensor]] = []

    def objective(point: NDArray[np.float64]) -> float:
        weights = torch.from_numpy(point.copy())
        merged = _combined(ordered, weights.expand(len(layers), -1))
        with torch.no_grad():
            losses = [_mean_loss(probe, task, merged) for task in tasks]
        value = float(torch.stack(losses).mean() + penalty * weights.abs().mean())
        trials.append((value, weights))
        probe.step(min(len(trials), steps), steps)
        return value

    start = np.vstack([np.zeros(len(tasks)), _REACH * np.eye(len(tasks))])
    bounds = [(-_BOUND, _BOUND)] * len(tasks)
    limits = {"maxfev": steps, "xatol": _FINEST, "fatol": 0.0, "initial_simplex": start}
    minimize(objective, start[0], method="Nelder-Mead", bounds=bounds, options=limits)
    best = min(trials, key=lambda trial: trial[0])[1]
    return dict(_combined(ordered, best.expand(len(layers), -1)))


def _learn(
    layers: Layers,
    probe: Probe,
    learned: Tensor,
    scales: Callable[[Tensor], Tensor],
    loss: Loss,
    tasks: Sequence[int],
    steps: int,
    optimiser: torch.optim.Optimizer,
) -> Results:
    """Return the merged updates at scales(learned), (layers, T), after `steps` steps down the sum of the tasks' losses.

    Every step takes the next batch of each of `tasks`, one backward pass each.
    """
    for step in range(steps):
        optimiser.zero_grad()
        for task in tasks:
            found = loss(task, step % len(probe.batches[task]), _combined(layers, scales(learned)))
            if found.requires_grad:  # no layer may read what the scales change
                found.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        probe.step(step + 1, steps)
    return dict(_combined(layers, scales(learned.detach())))


def _combined(layers: Layers, scales: Tensor) -> dict[str, Update]:
    """Return sum_i scales[l, i] dW_i of every layer l by concatenation, differentiable in `scales` (layers, T)."""
    return {
        module: concatenate([Update(scale * update.B, update.A) for scale, update in zip(row, updates, strict=True)])
        for row, (module, updates) in zip(scales, layers.items(), strict=True)
    }


def _size(layers: Layers) -> tuple[int, int]:
    return len(layers), len(next(iter(layers.values())))


def _labelled_loss(probe: Probe, task: int, number: int, updates: Mapping[str, Update]) -> Tensor:
    outputs, labels = probe.run(task, probe.batches[task][number], updates), probe.labels[task][number]
    if probe.regression[task]:
        return functional.mse_loss(outputs[:, 0], labels)
    return functional.cross_entropy(outputs, labels)


def _mean_loss(probe: Probe, task: int, updates: Mapping[str, Update]) -> Tensor:
    """Return the mean loss over all texts of a task."""
    losses = [_labelled_loss(probe, task, number, updates) for number in range(len(probe.batches[task]))]
    sizes = torch.tensor([len(labels) for labels in probe.labels[task]])
    return (torch.stack(losses) * sizes).sum() / sizes.sum()


def _rows_of(update: Update) -> Tensor:
    """Return an orthonormal basis (k, n) of the rows of A, without the directions that are rounding."""
    rows, _ = update_bases(Update(torch.eye(update.rank), update.A))
    return rows.T.to(update.A.dtype)
