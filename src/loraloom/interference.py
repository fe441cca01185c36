"""What each adapter does to every task's inputs, layer by layer: |A_i h_j| and |B_i A_i h_j|."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loraloom.adapter import Adapter, Update
from loraloom.errors import raise_problems
from loraloom.moments import Moment
from loraloom.statistics import Statistics


@dataclass(frozen=True)
class Responses:
    """Root-mean-square responses of every task's adapter to every task's inputs.

    A, BA: (layers, T, T) float64, [layer, adapter i, task j], of |A_i h_j| and |B_i A_i h_j| a row h_j; the diagonal
    is the response to the task's own inputs.
    """

    tasks: list[str]
    layers: list[str]
    A: Tensor
    BA: Tensor


def interference(adapters: Mapping[str, Adapter], statistics: Mapping[str, Statistics]) -> Responses:
    """Return the responses of `adapters`, by task, to the inputs in `statistics`, by task, of the same names.

    Use statistics of held-out texts: those that chose a subspace flatter it. Raises LoraloomError naming the tasks or
    layers that are missing.
    """
    tasks, layers = list(adapters), list(next(iter(adapters.values())).updates)
    _check(adapters, statistics, layers)
    A = torch.zeros(len(layers), len(tasks), len(tasks), dtype=torch.float64)
    BA = torch.zeros_like(A)
    for index, layer in enumerate(layers):
        for i, adapter in enumerate(adapters.values()):
            for j, task in enumerate(tasks):
                update, moment = adapter.updates[layer], statistics[task].moment(layer)
                A[index, i, j], BA[index, i, j] = response(update, moment)
    return Responses(tasks, layers, A, BA)


def response(update: Update, moment: Moment) -> tuple[float, float]:
    """Return the root mean square over rows h of |A h| and of |B A h|, from r x r matrices."""
    K = _seen(update.A.double(), moment)
    B = update.B.double()
    rows = max(moment.count, 1)
    seen, through = float(K.trace()), float(((B.T @ B) * K).sum())
    # where a sum is 0, rounding may leave it below
    return (max(seen, 0.0) / rows) ** 0.5, (max(through, 0.0) / rows) ** 0.5


def ratio(values: Tensor) -> float:
    """Return the mean over layers and pairs i != j of [l, i, j] / [l, i, i]: response to others against to own."""
    own = values.diagonal(dim1=1, dim2=2)[:, :, None]
    off = ~torch.eye(values.shape[1], dtype=torch.bool)
    relative = torch.where(own > 0, values / own.clamp_min(1e-300), torch.zeros_like(values))
    return float(relative[:, off].mean())


def _seen(A: Tensor, moment: Moment) -> Tensor:
    """Return A G A^T, (r, r)."""
    if moment.gram is not None:
        return A @ moment.gram @ A.T
    through = moment.as_rows() @ A.T
    return through.T @ through


def _check(adapters: Mapping[str, Adapter], statistics: Mapping[str, Statistics], layers: list[str]) -> None:
    problems = [f"no statistics for task {task!r}" for task in adapters if task not in statistics]
    for task, adapter in adapters.items():
        if set(adapter.updates) != set(layers):
            problems.append(f"the adapter of {task!r} covers other layers than the first")
        if task in statistics:
            missing = sorted(set(layers) - set(statistics[task].layers))
            if missing:
                problems.append(f"statistics of {task!r} lack {missing[0]} and {len(missing) - 1} more layers")
    raise_problems("interference cannot be measured", problems, "collect statistics on the adapters' target modules")
