"""What each adapter does to every task's inputs, layer by layer: |A_i h_j| and |B_i A_i h_j|."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loraloom.adapters.lowrank import update_bases
from loraloom.adapters.update import Adapter, Update
from loraloom.errors import raise_problems
from loraloom.progress import Reporter
from loraloom.statistics.file import Statistics
from loraloom.statistics.fit import cover_problems
from loraloom.statistics.moments import Moment


@dataclass(frozen=True)
class Responses:
    """Root-mean-square responses |A h| and |B A h| of adapters to the rows h that layers read of each task's texts.

    adapters, inputs: names of the adapters and of the statistics.
    layers: module paths, in the order in which the adapters name them.
    A, BA: (layers, adapters, inputs) float64; NaN where an adapter has no such layer.
    """

    adapters: list[str]
    inputs: list[str]
    layers: list[str]
    A: Tensor
    BA: Tensor

    def overall(self) -> Tensor:
        """Return |B A h|, (adapters, inputs) float64: the root mean square over rows and layers."""
        return self.BA.square().nanmean(dim=0).sqrt()

    def against(self, adapter: str, own: str) -> Tensor:
        """Return |B A h| of `adapter` over that to the inputs `own`, (layers, inputs) float64: NaN for `own` itself."""
        of, index = self.BA[:, self.adapters.index(adapter)], self.inputs.index(own)
        found = of / of[:, index, None].clamp_min(1e-300)
        found[:, index] = torch.nan
        return found


def responses(
    adapters: Mapping[str, Adapter], statistics: Mapping[str, Statistics], reporter: Reporter | None = None
) -> Responses:
    """Return the responses of every adapter to the inputs in every statistics, both by name.

    The statistics must cover the layers of each adapter; see `cover_problems`. No more than one layer is in memory.
    """
    layers = list(dict.fromkeys(layer for adapter in adapters.values() for layer in adapter.shapes))
    A = torch.full((len(layers), len(adapters), len(statistics)), torch.nan, dtype=torch.float64)
    BA = A.clone()
    shown = reporter or Reporter(quiet=True)
    for index, layer in enumerate(shown.each("responses", layers)):
        updates = {i: one.updates[layer] for i, one in enumerate(adapters.values()) if layer in one.shapes}
        for j, seen in enumerate(statistics.values()):
            moment = seen.moment(layer)
            for i, update in updates.items():
                A[index, i, j], BA[index, i, j] = response(update, moment)
    return Responses(list(adapters), list(statistics), layers, A, BA)


def interference(adapters: Mapping[str, Adapter], statistics: Mapping[str, Statistics]) -> Responses:
    """Return the responses of adapters to the inputs of all tasks, in one order, so that the diagonal is the own.

    adapters: by task. A layer that only some of them have is a zero update of the others, whose response is 0.
    statistics: by task, of the same names. Use those of held-out texts: those that chose a subspace flatter it.

    Raises LoraloomError naming the tasks or layers that are missing.
    """
    check_cover("interference cannot be measured", adapters, statistics)
    found = responses(adapters, {task: statistics[task] for task in adapters})
    return replace(found, A=found.A.nan_to_num(), BA=found.BA.nan_to_num())


def response(update: Update, moment: Moment) -> tuple[float, float]:
    """Return the root mean square over rows h of |A h| and of |B A h|, from r x r matrices."""
    K = moment.seen_by(update.A.double())
    B = update.B.double()
    rows = max(moment.count, 1)
    seen, through = float(K.trace()), float(((B.T @ B) * K).sum())
    # where a sum is 0, rounding may leave it below
    return (max(seen, 0.0) / rows) ** 0.5, (max(through, 0.0) / rows) ** 0.5


def products(updates: Sequence[Update], moment: Moment, *, onto: Update | None = None, centred: bool = False) -> Tensor:
    """Return tr(P dW_a S dW_b^T) for every two of p updates of one layer, (p, p) float64: their outputs' mean products.

    updates: of one layer.
    moment: of the layer's k inputs H: S = H^T H / k is their mean second moment.
    onto: an update; P projects onto its column space, the directions in which it writes. Without it P = I.
    centred: takes S of the inputs less their mean.

    From
    (sum r) x (sum r) matrices alone: the sum of the entries of (B_a^T P B_b) * (A_a S A_b^T). The mean squared error of
    an update m in place of j, |P (dW_m - dW_j) h|^2, is [m, m] - 2 [m, j] + [j, j].
    """
    A = torch.cat([update.A.double() for update in updates])
    B = torch.cat([update.B.double() for update in updates], dim=1)
    if onto is not None:
        B = update_bases(onto)[1].T @ B
    seen = moment.seen_by(A) / max(moment.count, 1)
    if centred:
        mean = A @ moment.mean()
        seen = seen - torch.outer(mean, mean)
    member = torch.repeat_interleave(torch.tensor([update.rank for update in updates]))
    inside = torch.nn.functional.one_hot(member, len(updates)).double()
    found: Tensor = inside.T @ ((B.T @ B) * seen) @ inside
    return found


def ratio(values: Tensor) -> float:
    """Return the mean over layers and pairs i != j of [l, i, j] / [l, i, i]: response to others against to own."""
    found = ratios(values)
    return float(found.nanmean()) if not bool(found.isnan().all()) else 0.0


def ratios(values: Tensor) -> Tensor:
    """Return [l, i, j] / [l, i, i], (layers, T, T): NaN where i = j, and where an adapter answers nothing in a layer.

    0 where the response to the own is 0 alone.
    """
    own = values.diagonal(dim1=1, dim2=2)[:, :, None]
    relative = torch.where(own > 0, values / own.clamp_min(1e-300), torch.zeros_like(values))
    silent = values.amax(dim=2, keepdim=True) == 0  # it lacks the layer
    return relative.masked_fill(torch.eye(values.shape[1], dtype=torch.bool) | silent, torch.nan)


def check_cover(what: str, adapters: Mapping[str, Adapter], statistics: Mapping[str, Statistics]) -> None:
    """Raise LoraloomError, `what` first, where statistics by the adapters' names lack layers of any of the adapters."""
    problems = [f"no statistics for task {task!r}" for task in adapters if task not in statistics]
    for task in adapters:
        for other, adapter in adapters.items():
            name = task if other == task else f"{other} on the inputs of {task}"
            problems += cover_problems(name, adapter, statistics[task]) if task in statistics else []
    raise_problems(what, problems, "collect statistics on the target modules of all adapters")
