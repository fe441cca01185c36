"""What a sum of adapters does to each task's outputs, from adapters and statistics: no labels, no model, no merge.

Task j's adapter writes dW_j h into a layer's output, the merged one sum_i s_i dW_i h. With G_j the mean second moment
of what a layer reads of task j, and a layer without an update of task i counting as dW_i = 0, the error is

    e_j(s) = sum_layers tr(P_j (sum_i s_i dW_i - dW_j) S_j (sum_i s_i dW_i - dW_j)^T) / tr(G_j),

told in units of own_j, which is e_j(0): 0 is as good as alone, 1 as far off as the base model.

A task that generates is answered by the base's own head, which reads whatever is written: P_j = I, S_j = G_j. A task
with a head of its own reads what it was trained on, up to a constant: P_j projects onto the column space of B_j, and
S_j is G_j less the mean. Each of the two ranks real merges of its kind and fails at the other's (docs/predict.md). A
layer's part is divided by tr(G_j), the energy that it reads, because some layers of decoders read a few tokens that are
a million times as loud as the rest and would be all that the sum tells. Layers are taken one by one, on the base
model's inputs: what a changed layer does to the inputs of those above it is not seen. Not published elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loraloom.adapters.config import writes
from loraloom.adapters.update import Adapter, Update
from loraloom.analysis.interference import check_cover, products
from loraloom.progress import Reporter
from loraloom.statistics.file import Statistics
from loraloom.statistics.moments import Moment

# singular values of the normal equations below this share of the largest are rounding: adapters that are multiples
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Prediction:
    """The errors of every sum of some adapters, as quadratic forms.

    layers: those that any of the adapters has.
    own_head: of each task, whether a head of its own answers it, so that its own output directions alone count.
    products: (L, T, T, T) float64, [layer, task j, a, b] = tr(P_j dW_a S_j dW_b^T) / tr(G_j); the methods take scales
        s, a number or a tensor that broadcasts to (L, T), one a layer and adapter.
    """

    tasks: list[str]
    layers: list[str]
    own_head: list[bool]
    products: Tensor

    @property
    def own(self) -> Tensor:
        """Return (L, T): own_j, the mean square of task j's response to its own inputs, where it counts."""
        task = torch.arange(len(self.tasks))
        return self.products[:, task, task, task]

    def errors(self, scales: float | Tensor) -> Tensor:
        """Return (L, T): e_j at `scales`."""
        s = torch.as_tensor(scales, dtype=torch.float64).expand(len(self.layers), len(self.tasks))
        merged = torch.einsum("la,ljab,lb->lj", s, self.products, s)
        return (merged - 2 * torch.einsum("la,lja->lj", s, self._with_own) + self.own).clamp_min(0)

    def by_task(self, scales: float | Tensor) -> Tensor:
        """Return (T,): the sum over layers of e_j over that of own_j; 0 for a task without a response.

        0 where the sum does to a task's inputs what its own adapter does, 1 where nothing is done (scale 0).
        """
        return self.errors(scales).sum(dim=0) * self._weights

    def uniform(self) -> float:
        """Return the one scale of least mean error, each task's in units of its own response."""
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
    def _weights(self) -> Tensor:
        """Return (T,): 1 over each task's own response, 0 where it has none."""
        own = self.own.sum(dim=0)
        return torch.where(own > 0, 1 / own, 0.0)

    @property
    def _with_own(self) -> Tensor:
        """Return (L, T, T): [layer, task j, a] the product of a with j, which lies in j's own directions as it is."""
        task = torch.arange(len(self.tasks))
        return self.products[:, task, :, task].permute(1, 0, 2)

    def _equations(self) -> tuple[Tensor, Tensor]:
        """Return M (L, T, T) and b (L, T): sum_j e_j / own_j = s^T M s - 2 b^T s + T, summed over layers."""
        M = torch.einsum("j,ljab->lab", self._weights, self.products)
        return M, torch.einsum("j,lja->la", self._weights, self._with_own)


def solve_scales(M: Tensor, b: Tensor) -> Tensor:
    """Return the least-norm s (..., T) with M s = b, for symmetric positive semi-definite M (..., T, T)."""
    solved: Tensor = (torch.linalg.pinv(M, rtol=_ROUNDING, hermitian=True) @ b[..., None])[..., 0]
    return solved


def predict(
    adapters: Mapping[str, Adapter], statistics: Mapping[str, Statistics], reporter: Reporter | None = None
) -> Prediction:
    """Return the prediction for the sums of two or more adapters.

    adapters: by task. A layer that only some of them have is a zero update of the others.
    statistics: by task, of the same names, on the layers of all adapters; of texts that chose no subspace.
    reporter: is told how far the work is.

    Raises LoraloomError naming the statistics or layers that are missing.
    """
    check_cover("output errors cannot be predicted", adapters, statistics)
    layers = list(dict.fromkeys(layer for adapter in adapters.values() for layer in adapter.shapes))
    own_head = [has_own_head(adapter) for adapter in adapters.values()]
    found = torch.zeros(len(layers), *[len(adapters)] * 3, dtype=torch.float64)
    for index, layer in enumerate((reporter or Reporter(quiet=True)).each("prediction", layers)):
        updates = {i: one.updates[layer] for i, one in enumerate(adapters.values()) if layer in one.shapes}
        there = torch.tensor(list(updates))
        for j, task in enumerate(adapters):
            if not own_head[j]:
                found[index, j, there[:, None], there] = _gains(updates.values(), statistics[task].moment(layer))
            elif j in updates:  # elsewhere it has no directions of its own
                moment = statistics[task].moment(layer)
                found[index, j, there[:, None], there] = _gains(updates.values(), moment, onto=updates[j], centred=True)
    return Prediction(list(adapters), layers, own_head, found)


def _gains(updates: Iterable[Update], moment: Moment, *, onto: Update | None = None, centred: bool = False) -> Tensor:
    """Return the `products` of the updates over the mean energy of a row in `moment`."""
    energy = moment.trace() / max(moment.count, 1)
    return products(list(updates), moment, onto=onto, centred=centred) / (energy if energy > 0 else 1.0)


def has_own_head(adapter: Adapter) -> bool:
    """Tell whether a head of its own answers the adapter's task, rather than the base's head of tokens.

    By PEFT's `task_type`; where the adapter names none, by whether it brings a head.
    """
    return not writes(adapter.config) if adapter.config.get("task_type") else bool(adapter.head)
