"""Entrywise rules that trim or drop entries: TIES, KnOTS, DARE, DELLA, Breadcrumbs, SCE.

They look at single entries, so full, core and KnOTS space are different methods; see `spaces`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from loraloom.adapters.update import Update
from loraloom.errors import LoraloomError
from loraloom.merging.registry import rule
from loraloom.merging.spaces import SPACES, Entries, SpaceOption, agree, count, elect, entries, generators, kth_largest

DivisorOption = Annotated[
    Literal["count", "weights", "one"],
    Field(description="what the sum of the agreeing entries is divided by: their number, their weights, or one"),
]


@rule(
    "ties",
    formula="trim |dWᵢ| to the largest share, elect sign(Σ), mean of those that agree",
    paper="Yadav et al. 2023, TIES-Merging, arXiv 2306.01708",
    summary="keep each task's largest entries, elect a sign, average the entries that agree",
    cost="dense, row blocks; R x R in the core",
    exact=False,
    spaces=SPACES,
)
def ties(
    updates: Sequence[Update],
    *,
    density: Annotated[float, Field(gt=0, le=1, description="share of entries kept per task and layer")] = 0.2,
    divisor: DivisorOption = "count",
    space: SpaceOption = "full",
    weights: Sequence[float] | None = None,
) -> Update | Tensor:
    """Return the TIES merge of one layer (Yadav et al. 2023, arXiv 2306.01708).

    Per task, keep the `density` share of entries of largest |dW_i|; elect s = sign(sum_i dW_i) entry by entry; average
    the kept entries whose sign is s. The published code trims over the whole task vector, here each layer is trimmed
    for itself; where the sum is zero it elects the majority sign of the layer, here nothing is and the entry is zero.

    Of weighted updates PEFT divides by the `count` of those that agree, mergekit by their `weights`, or by `one` where
    it is told not to normalise.
    """
    X = entries(updates, space)
    least = (1 - X.tie) * X.largest(count(density, X.size))[0, :, None, None]
    shares = _shares(X, divisor, weights)
    return X.merge(lambda block: agree(torch.where(block.abs() >= least, block, 0.0), X.tie, shares))


@rule(
    "knots",
    formula="TIES on S Vᵢᵀ of [dW₁ … dW_T] = U S [V₁ᵀ … V_Tᵀ]",
    paper="Stoica et al. 2024, Model merging with SVD to tie the KnOTS, arXiv 2410.19735",
    summary="ties in KnOTS space by another name: on what each task makes of the left directions that all share",
    cost="factors; R x n entries",
    exact=True,
    spaces=("knots",),
    default_scale=0.6,
)
def knots(
    updates: Sequence[Update],
    *,
    density: Annotated[float, Field(gt=0, le=1, description="share of entries kept per task and layer")] = 0.2,
) -> Update | Tensor:
    """Return KnOTS-TIES: `ties` in KnOTS space, scale 0.6 and density 0.2 as published for ViT-B/32.

    [dW_1 ... dW_T] = U S [V_1^T ... V_T^T]; TIES on the S V_i^T (the published code multiplies by S before it trims);
    multiplied back by U. Singular values below 1e-5 of the largest are dropped; the published code drops those below
    1e-5 itself, which hangs on the scale of the adapters. It trims over all layers at once, here each for itself.
    """
    return ties(updates, density=density, space="knots")


@rule(
    "dare",
    formula="Σ mᵢ ∘ dWᵢ / p, mᵢ ~ Bernoulli(p)",
    paper="Yu et al. 2024, Language Models are Super Mario (DARE), arXiv 2311.03099",
    summary="drop entries at random, divide those kept by the density, sum",
    cost="dense, row blocks",
    exact=False,
    spaces=SPACES,
    default_scale=0.3,
)
def dare(
    updates: Sequence[Update],
    *,
    density: Annotated[float, Field(gt=0, le=1, description="chance of an entry to be kept, 1 - p")] = 0.2,
    space: SpaceOption = "full",
    generator: torch.Generator,
) -> Update | Tensor:
    """Return sum_i m_i * dW_i / density, m_i ~ Bernoulli(density) (DARE with task arithmetic, Yu et al. 2024).

    The drop rate p = 1 - density = 0.8 and the scale of task arithmetic are the defaults. Each task draws from a
    generator of its own, given out by falling energy |dW_i|_F^2: the order of the updates does not matter.
    """
    X = entries(updates, space)
    drop = _dropper(X, density, generator)
    return X.merge(lambda block: drop(block).sum(dim=0))


@rule(
    "dare_ties",
    formula="DARE's mask, then sign election and mean",
    paper="Yu et al. 2024, DARE, arXiv 2311.03099, with Yadav et al. 2023, TIES-Merging, arXiv 2306.01708",
    summary="drop entries at random, divide those kept by the density, elect a sign, average the entries that agree",
    cost="dense, row blocks",
    exact=False,
    spaces=SPACES,
)
def dare_ties(
    updates: Sequence[Update],
    *,
    density: Annotated[float, Field(gt=0, le=1, description="chance of an entry to be kept, 1 - p")] = 0.2,
    divisor: DivisorOption = "count",
    space: SpaceOption = "full",
    generator: torch.Generator,
    weights: Sequence[float] | None = None,
) -> Update | Tensor:
    """Return the TIES merge of the updates dropped as in `dare`: dropping takes the place of trimming.

    So do PEFT's and mergekit's dare_ties (the latter sums the agreeing entries, divisor `one`; PEFT averages them, as
    here without it); the code of the paper trims what is left a second time.
    """
    X = entries(updates, space)
    drop = _dropper(X, density, generator)
    shares = _shares(X, divisor, weights)
    return X.merge(lambda block: agree(drop(block), X.tie, shares))


@rule(
    "della",
    formula="as DARE, keep-chance p ± ε by magnitude rank in a row, then election",
    paper="Deep et al. 2024, DELLA-Merging, arXiv 2406.11617",
    summary="drop small entries of a row more often than large ones, rescale, elect a sign, average those that agree",
    cost="dense + a sort a row",
    exact=False,
    spaces=SPACES,
)
def della(
    updates: Sequence[Update],
    *,
    density: Annotated[float, Field(gt=0, le=1, description="mean chance of an entry to be kept")] = 0.3,
    eps: Annotated[float, Field(ge=0, lt=0.5, description="chances in a row run over density +- eps")] = 0.15,
    space: SpaceOption = "full",
    generator: torch.Generator,
) -> Update | Tensor:
    """Return the DELLA merge of one layer (Deep et al. 2024, arXiv 2406.11617).

    In each row of dW_i the chance p of being kept rises evenly with the rank of |entry|, from density - eps to
    density + eps; kept entries are divided by p; then sign and mean as in `ties`. So the authors' code, where eps is
    half of `window_size`; mergekit (default 0.15, taken here) rescales each task to its former L1 norm instead.
    A row of core or KnOTS space is a shared left singular direction. Raises LoraloomError unless
    0 < density - eps and density + eps <= 1.
    """
    if not eps < density <= 1 - eps:
        raise LoraloomError(
            f"della: density {density:g} with eps {eps:g} gives chances outside (0, 1]",
            f"take an eps below {min(density, 1 - density):g}, or 0",
        )
    X = entries(updates, space)
    drawers = generators(generator, len(X.left))
    chances = torch.linspace(density - eps, density + eps, X.shape[1], dtype=torch.float64).float()

    def drop(block: Tensor) -> Tensor:
        for x, drawer in zip(block, drawers, strict=True):  # one task at a time: sorting needs the memory
            order = x.abs().argsort(dim=1)
            p = torch.empty(x.shape).scatter_(1, order, chances.expand(x.shape))
            x.copy_(torch.where(torch.rand(x.shape, generator=drawer) < p, x / p, 0.0))
        return block

    return X.merge(lambda block: agree(drop(block), X.tie))


@rule(
    "breadcrumbs",
    formula="drop the largest γ and the small, sum",
    paper="Davari and Belilovsky 2024, Model Breadcrumbs, arXiv 2312.06795",
    summary="drop each task's largest entries and its small ones, sum",
    cost="dense, row blocks",
    exact=False,
    spaces=SPACES,
    default_scale=0.3,
)
def breadcrumbs(
    updates: Sequence[Update],
    *,
    density: Annotated[float, Field(gt=0, le=1, description="share of entries kept per task and layer")] = 0.15,
    gamma: Annotated[float, Field(ge=0, lt=1, description="share of the largest entries dropped")] = 0.01,
    space: SpaceOption = "full",
) -> Update | Tensor:
    """Return the sum of the updates without their outliers and small entries (Davari and Belilovsky 2024).

    Per task and layer, drop the `gamma` share of largest |dW_i|, then keep the next `density` share. Where both
    together are more than all, fewer outliers are dropped, as in mergekit; density 1 keeps everything. The authors'
    code ranks inside each row and their paper inside each layer, as here. Defaults: theirs keep 0.15 and drop about
    0.01; scale 0.3.
    """
    X = entries(updates, space)
    kept = count(density, X.size)
    dropped = min(round(gamma * X.size), X.size - kept)
    most, least = X.largest(dropped + 1, dropped + kept)[:, :, None, None]
    most, least = (1 + X.tie) * most, (1 - X.tie) * least

    def crumbs(block: Tensor) -> Tensor:
        magnitudes = block.abs()
        return torch.where((least <= magnitudes) & (magnitudes <= most), block, 0.0).sum(dim=0)

    return X.merge(crumbs)


@rule(
    "sce",
    formula="select by variance over tasks, weigh by Σ dWᵢ², erase minority signs",
    paper="Wan et al. 2024, FuseChat (SCE), arXiv 2408.07990",
    summary="select entries on which the tasks differ most, erase minority signs, average weighted by squared size",
    cost="dense, two passes",
    exact=False,
    spaces=SPACES,
)
def sce(
    updates: Sequence[Update],
    *,
    density: Annotated[float, Field(gt=0, le=1, description="share of varying entries selected per layer")] = 0.1,
    space: SpaceOption = "full",
) -> Update | Tensor:
    """Return the SCE merge of one layer: select, calculate, erase (Wan et al. 2024, arXiv 2408.07990).

    Select the `density` share (published 0.1) of the positions where the variance over tasks is not zero, those of
    largest variance; weigh task i by the sum of its selected dW_i^2; erase entries whose sign is not that of the sum;
    return the weighted mean of what is left. As the paper and mergekit; the authors' code selects for the weights alone
    and merges all positions. With one task, or equal ones, no variance tells positions apart and all are selected
    (published: none).
    """
    X = entries(updates, space)
    spreads = X.dense(lambda block: _spread(block, X.tie))
    varying = int(spreads.count_nonzero())
    least = (1 - X.tie) * kth_largest(spreads, count(density, varying))[0]
    del spreads  # as large as the layer

    def select(block: Tensor) -> Tensor:
        return torch.where(_spread(block, X.tie) >= least, block, 0.0)

    energies = torch.stack([select(X.block(rows)).double().square().sum(dim=(1, 2)) for rows in X.blocks()]).sum(dim=0)
    weights = (energies / energies.sum().clamp_min(torch.finfo(torch.float64).tiny)).to(X.left[0].dtype)

    def erase_and_average(block: Tensor) -> Tensor:
        selected = select(block)
        agreeing = selected * elect(selected, X.tie) > 0
        counted = agreeing * weights[:, None, None]
        total = counted.sum(dim=0)
        return (counted * selected).sum(dim=0) / torch.where(total > 0, total, 1.0)

    return X.merge(erase_and_average)


def _spread(block: Tensor, tie: float) -> Tensor:
    """Return the variance over the tasks of each entry of `block` (T, rows, columns); 0 where it is but rounding."""
    spread = (block - block.mean(dim=0)).square().mean(dim=0)
    return torch.where(spread > tie * block.square().mean(dim=0), spread, 0.0)


def _shares(X: Entries, divisor: str, weights: Sequence[float] | None) -> Tensor | None:
    """Return what each of the updates in `X` counts in the divisor of a mean, (T,); None where each counts one."""
    if divisor == "count" or (divisor == "weights" and weights is None):
        return None
    # of `one` they count nothing, and a divisor of 0 divides nothing
    shares = [weights[i] if weights and divisor == "weights" else 0.0 for i in X.order]
    return torch.tensor(shares, dtype=X.left[0].dtype)


def _dropper(X: Entries, density: float, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Return what drops entries of each block (T, rows, columns); call it once a block, from the top."""
    drawers = generators(generator, len(X.left))

    def drop(block: Tensor) -> Tensor:
        kept = torch.stack([torch.rand(block.shape[1:], generator=drawer) < density for drawer in drawers])
        return block.mul_(kept).div_(density)

    return drop
