"""What a sum of adapters does to each task's outputs, from adapters and statistics: no labels, no model, no merge.

Task j's adapter writes dW_j h into a layer's output, the merged one sum_i s_i dW_i h. Both are compared where task j's
own update writes at all, and up to a constant: with P_j the projector onto the column space of B_j and S_j the mean
second moment of task j's inputs less their mean,

    e_j(s) = tr(P_j (sum_i s_i dW_i - dW_j) S_j (sum_i s_i dW_i - dW_j)^T),     own_j = tr(dW_j S_j dW_j^T).

What the other adapters write elsewhere is left out on purpose: with P_j = I the error ranks real merges the wrong way
round, because T - 1 adapters write much that no head reads (docs/predict.md). Layers are taken one by one, on the base
model's inputs: what a changed layer does to the inputs of those above it is not seen. Not published elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loraloom.adapters.update import Adapter
from loraloom.analysis.interference import check_cover, products
from loraloom.progress import Reporter
from loraloom.statistics.file import Statistics

# singular values of the normal equations below this share of the largest are rounding: adapters that are multiples
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Prediction:
    """The errors of every sum of some adapters, as quadratic forms.

    products: (L, T, T, T) float64, [layer, task j, a, b] = tr(P_j dW_a S_j dW_b^T); the methods take scales s, a number
    or a tensor that broadcasts to (L, T), one a layer and adapter.
    """

    tasks: list[str]
    layers: list[str]
    products: Tensor

    @property
    def own(self) -> Tensor:
        """Return (L, T): own_j, the mean square of task j's response to its own inputs, less its mean."""
        task = torch.arange(len(self.tasks))
        return self.products[:, task, task, task]

    def errors(self, scales: float | Tensor) -> Tensor:
        """Return (L, T): e_j at `scales`."""
        s = torch.as_tensor(scales, dtype=torch.float64).expand(len(self.layers), len(self.tasks))
        merged = torch.einsum("la,ljab,lb->lj", s, self.products, s)
        return (merged - 2 * torch.einsum("la,lja->lj", s, self._with_own) + self.own).clamp_min(0)

    def by_task(self, scales: float | Tensor) -> Tensor:
        """Return (T,): the sum over layers of e_j in units of the tasks' mean own response.

        At scale 0 it tells what each task has to lose; it is comparable between tasks, scales and rules.
        """
        unit = self.own.sum(dim=0).mean()
        return self.errors(scales).sum(dim=0) / (unit if unit > 0 else 1.0)

    def uniform(self) -> float:
        """Return the one scale of least summed error, each task's in units of its own response."""
        M, b = self._equations()
        return float(b.sum() / M.sum()) if M.sum() > 0 else 0.0

    def by_layer(self) -> Tensor:
        """Return (L, 1): the scale of least summed error, one for each layer."""
        M, b = self._equations()
        total = M.sum(dim=(1, 2))
        return (b.sum(dim=1) / torch.where(total > 0, total, torch.inf))[:, None]

    def by_layer_and_adapter(self) -> Tensor:
        """Return (L, T): the scales of least summed error, one for each layer and adapter: M s = b, least norm."""
        M, b = self._equations()
        return solve_scales(M, b)

    @property
    def _with_own(self) -> Tensor:
        """Return (L, T, T): [layer, task j, a] = tr(dW_a S_j dW_j^T); P_j dW_j = dW_j, so no projector is left."""
        task = torch.arange(len(self.tasks))
        return self.products[:, task, :, task].permute(1, 0, 2)

    def _equations(self) -> tuple[Tensor, Tensor]:
        """Return M (L, T, T) and b (L, T): sum_j e_j / own_j = s^T M s - 2 b^T s + T, summed over layers."""
        own = self.own.sum(dim=0)
        weights = torch.where(own > 0, 1 / own, 0.0)
        M = torch.einsum("j,ljab->lab", weights, self.products)
        return M, torch.einsum("j,lja->la", weights, self._with_own)


def solve_scales(M: Tensor, b: Tensor) -> Tensor:
    """Return the least-norm s (..., T) with M s = b, for symmetric positive semi-definite M (..., T, T)."""
    solved: Tensor = (torch.linalg.pinv(M, rtol=_ROUNDING, hermitian=True) @ b[..., None])[..., 0]
    return solved


def predict(
    adapters: Mapping[str, Adapter], statistics: Mapping[str, Statistics], reporter: Reporter | None = None
) -> Prediction:
    """Return the prediction for the sums of two or more adapters.

    adapters: by task, all of the same layers.
    statistics: by task, of the same names; of texts that chose no subspace.
    reporter: is told how far the work is.

    Raises LoraloomError naming the statistics or layers that are missing, and layers that not all adapters have.
    """
    tasks, layers = list(adapters), list(next(iter(adapters.values())).shapes)
    check_cover("output errors cannot be predicted", adapters, statistics)
    found = []
    for layer in (reporter or Reporter(quiet=True)).each("prediction", layers):
        updates = [adapter.updates[layer] for adapter in adapters.values()]
        moments = [statistics[task].moment(layer) for task in tasks]
        pairs = zip(updates, moments, strict=True)
        found.append(torch.stack([products(updates, moment, onto=update, centred=True) for update, moment in pairs]))
    return Prediction(tasks, layers, torch.stack(found))
