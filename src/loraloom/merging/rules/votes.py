"""Entrywise rules that compare what each task wants of an entry: EMR, Consensus (TALL masks), PCB."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from loraloom.adapters.lowrank import Shared, canonical, shared_core
from loraloom.adapters.update import Update
from loraloom.merging.registry import rule
from loraloom.merging.spaces import SPACES, SpaceOption, count, elect, entries, kth_largest

_TIE = 1e-9
_CLIPPED = 1e-4  # share of entries that PCB clips at either end of the magnitudes


@rule(
    "emr",
    formula="M = sign(Σ Mᵢ) ∘ max |agreeing|; task i reads lᵢ (mᵢ ∘ M)",
    paper="Huang et al. 2024, EMR-Merging, arXiv 2405.17461",
    summary="one update of elected signs and largest sizes, and for each task a mask and a factor to read it by",
    cost="factors; R x R",
    exact=True,
    spaces=("core",),
)
def emr(updates: Sequence[Update]) -> Shared:
    """Return EMR-Merging of one layer in core space (Huang et al. 2024, arXiv 2405.17461): elect, mask, rescale.

    On the M_i of dW_i = QB M_i QA^T: M = sign(sum_i M_i) * max |entry| of those that agree; task i reads
    l_i (m_i * M), m_i where M_i agrees with M, l_i = sum |M_i| / sum |m_i * M| (published over all layers at once,
    here each for itself). Who does not know the task reads M.

    Not in full space: there the masks are m x n bits a task, more than its adapter; and the unified update has full
    rank, so that it would have to be truncated before the masks meet it. In the core all is exact in factors.
    """
    core = canonical(shared_core(updates))
    M = torch.stack(core.cores)
    elected = elect(M, _TIE)
    agreeing = M * elected > 0
    unified = elected * (M.abs() * agreeing).amax(dim=0)
    sizes, read = M.abs().sum(dim=(1, 2)), (agreeing * unified.abs()).sum(dim=(1, 2))
    factors = torch.where(read > 0, sizes / read, 0.0)
    gates = agreeing * factors[:, None, None]
    return Shared(core.QB, unified, core.QA.T, torch.ones_like(unified), tuple(gates))


@rule(
    "consensus",
    formula="Σ dWᵢ where ≥ 2 tasks have |dWᵢ| > λ |Σ − dWᵢ|",
    paper="Wang et al. 2024, Localizing Task Information (TALL masks, Consensus Merging), arXiv 2405.07813",
    summary="sum the updates where enough tasks want the entry",
    cost="dense, row blocks",
    exact=False,
    spaces=SPACES,
    default_scale=0.3,
)
def consensus(
    updates: Sequence[Update],
    *,
    strictness: Annotated[float, Field(gt=0, description="lambda: an entry is wanted above this times the rest")] = 0.4,
    tasks: Annotated[int, Field(ge=1, description="how many tasks must want an entry")] = 2,
    space: SpaceOption = "full",
) -> Update | Tensor:
    """Return the sum dW = sum_i dW_i where at least `tasks` tasks want the entry (Wang et al. 2024, arXiv 2405.07813).

    Task i wants it where |dW_i| > lambda |dW - dW_i| (its TALL mask). Published: lambda chosen for each task on
    validation data from 0.2 to 0.6, 2 tasks, and the scale tuned; here 0.4 for all and task arithmetic's 0.3. Of fewer
    updates that are not zero than `tasks`, all must want it: one alone comes back unchanged (published: as zero).
    """
    X = entries(updates, space)
    needed = min(tasks, len(X.left))

    def wanted(block: Tensor) -> Tensor:
        total = block.sum(dim=0)
        votes = (block.abs() > strictness * (total - block).abs()).sum(dim=0)
        return torch.where(votes >= needed, total, 0.0)

    return X.merge(wanted)


@rule(
    "pcb",
    formula="mean weighted by exp(T N(aᵢ)²) dWᵢ Σⱼ dWⱼ, cut to the best share",
    paper="Du et al. 2024, Parameter Competition Balancing (PCB-Merging), arXiv 2410.02396",
    summary="average weighted by a score of each entry: its size in its task times its accord with the sum",
    cost="dense, two passes",
    exact=False,
    spaces=SPACES,
)
def pcb(
    updates: Sequence[Update],
    *,
    density: Annotated[float, Field(gt=0, le=1, description="share of entries with a score per task and layer")] = 0.1,
    space: SpaceOption = "full",
) -> Update | Tensor:
    """Return the PCB merge of one layer (Du et al. 2024, arXiv 2410.02396), as the authors' code computes it.

    With a_i = |dW_i| clipped at its lowest and highest 1e-4 and N(a) = (a - min) / (max - min) over the layer:
    score_i = exp(T N(a_i)^2) * dW_i * sum_j dW_j; all but the `density` share (theirs: 0.1 or 0.05) of largest scores
    are dropped, the rest mapped to (0, 1], w_i; the result is sum_i w_i sign(dW_i) a_i / sum_i w_i.
    (The paper writes softmax for exp, and for the second factor the sum over j of softmax(N(dW_i dW_j)).)
    Their code puts tanh around dW_i * sum_j dW_j: for real updates, products far below 1e-2, that is the identity; it
    is left out, so that the scale of the adapters does not matter. They rank over the whole task vector.
    """
    X = entries(updates, space)
    left, right = torch.cat(X.left, dim=1), torch.cat(X.right, dim=0)
    balances = []
    for i in range(len(X.left)):
        balance = _Balance.of(X.task(i), len(X.left), X.tie)
        scores = [balance.score(X.left[i][rows] @ X.right[i], left[rows] @ right) for rows in X.blocks()]
        balances.append(balance.ranked(torch.cat(scores), density))

    def merge(block: Tensor) -> Tensor:
        total = block.sum(dim=0)
        weights = torch.stack([balance.weight(x, total) for balance, x in zip(balances, block, strict=True)])
        clipped = torch.stack([balance.clip(x) for balance, x in zip(balances, block, strict=True)])
        whole = weights.sum(dim=0)
        return (weights * clipped).sum(dim=0) / torch.where(whole > 0, whole, 1.0)

    return X.merge(merge)


@dataclass(frozen=True)
class _Balance:
    """How PCB weighs the entries of one task: clipped to `low` and `high`, scored, mapped from `cut`-`top` to 0-1."""

    low: float
    high: float
    tasks: int
    tie: float
    cut: float = 0.0
    top: float = 0.0

    @classmethod
    def of(cls, dW: Tensor, tasks: int, tie: float) -> _Balance:
        outside = int(_CLIPPED * dW.numel())
        low, high = kth_largest(dW.abs_(), dW.numel() - outside, outside + 1)
        return cls(low, high, tasks, tie)

    def ranked(self, scores: Tensor, density: float) -> _Balance:
        """Return the balance that gives a weight to the `density` share of largest `scores`."""
        kept = count(density, scores.numel())
        top, cut = kth_largest(scores, 1, min(kept + 1, scores.numel()))
        if kept == scores.numel():  # the last one is kept as well
            cut -= 2 * self.tie * (top - cut)
        return replace(self, cut=cut, top=top)

    def clip(self, x: Tensor) -> Tensor:
        return x.sign() * x.abs().clamp(self.low, self.high)

    def score(self, x: Tensor, total: Tensor) -> Tensor:
        size = (x.abs().clamp(self.low, self.high) - self.low) / ((self.high - self.low) or 1.0)
        return (self.tasks * (size.square() - 1)).exp() * x * total  # "- 1" scales all scores alike: no overflow

    def weight(self, x: Tensor, total: Tensor) -> Tensor:
        score = self.score(x, total)
        if self.top <= self.cut:  # all scores are equal
            return torch.ones_like(score)
        weight = ((score - self.cut) / (self.top - self.cut)).clamp_max(1)
        return torch.where(weight > self.tie, weight, 0.0)  # rounding must not lift the entry at the cut
