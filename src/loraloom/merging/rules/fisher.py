"""Fisher-weighted averaging: entries count by how much each task's predictions depend on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from loraloom.adapters.update import Update
from loraloom.merging.registry import Probe, Result, rule

# share of a task's root mean square Fisher below which its entries do not fall
_FLOOR = 1e-6


@rule(
    "fisher",
    formula="Σ Fᵢ ∘ dWᵢ / Σ Fᵢ, Fᵢ diagonal",
    paper="Matena and Raffel 2022, Merging Models with Fisher-Weighted Averaging, arXiv 2111.09832",
    summary="average of the updates, entry by entry, weighted by how much each task's predictions depend on the entry",
    cost="a backward pass a text; four dense copies a layer",
    exact=False,
    heads=True,
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
