"""Linear rules: sums of updates, exact in the factors."""

from __future__ import annotations

from collections.abc import Sequence

from loraloom.adapters.lowrank import concatenate
from loraloom.adapters.update import Update
from loraloom.merging.registry import rule


@rule(
    "task_arithmetic",
    formula="λ Σ wᵢ dWᵢ",
    paper="Ilharco et al. 2023, Editing Models with Task Arithmetic, arXiv 2212.04089",
    summary="scale times the sum of the updates",
    cost="concatenation",
    exact=True,
    default_scale=0.3,
)
def task_arithmetic(updates: Sequence[Update]) -> Update:
    """Return sum_i dW_i by concatenation, rank sum r_i (Ilharco et al. 2023, arXiv 2212.04089)."""
    return concatenate(updates)


@rule(
    "weighted",
    formula="Σ wᵢ dWᵢ, wᵢ = 1/T",
    paper="Wortsman et al. 2022, Model Soups, arXiv 2203.05482; PEFT's combination_type 'cat'",
    summary="task_arithmetic by another name, with weights of 1/T and scale 1: the average of the updates",
    cost="concatenation",
    exact=True,
    default_weights="mean",
)
def weighted(updates: Sequence[Update]) -> Update:
    """Return sum_i w_i dW_i, w_i = 1/T unless given, by concatenation (Wortsman et al. 2022, arXiv 2203.05482)."""
    return concatenate(updates)


@rule(
    "svd",
    formula="rank-q truncation of Σ wᵢ dWᵢ",
    paper="Eckart and Young 1936; PEFT's combination_type 'svd'",
    summary="best low-rank approximation of the weighted average, of rank max r_i unless `rank` is given",
    cost="QR + R x R SVD",
    exact=True,
    default_weights="mean",
    output_rank="max",
)
def svd(updates: Sequence[Update]) -> Update:
    """Return sum_i w_i dW_i, which `merge` truncates to `rank` (default max r_i) from the factors (Eckart-Young)."""
    return concatenate(updates)
