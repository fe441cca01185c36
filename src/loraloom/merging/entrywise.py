"""Entrywise rules: they look at single entries of dW, so full and core space are different methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from loraloom.adapter import Update
from loraloom.merging.core import canonical, from_core, shared_core
from loraloom.merging.rules import rule

# Entries that differ by less than this share are equal: float rounding must not decide a sign or a threshold.
TIE = 1e-9
_BLOCK = 1 << 22  # entries of one row block over all tasks: 32 MB in float64


@rule(
    "ties",
    paper="Yadav et al. 2023, TIES-Merging, arXiv 2306.01708; in the core: Core Space Merging, arXiv 2509.17786",
    summary="keep each task's largest entries, elect a sign, average the entries that agree",
    exact=False,
    spaces=("full", "core"),
)
def ties(
    updates: Sequence[Update],
    *,
    density: Annotated[float, Field(gt=0, le=1, description="share of entries kept per task and layer")] = 0.2,
    space: Annotated[Literal["full", "core"], Field(description="where entries are compared")] = "full",
) -> Update | Tensor:
    """Return the TIES merge of one layer (Yadav et al. 2023, arXiv 2306.01708).

    Per task, keep the `density` share of entries of largest |dW_i|, trimmed per layer (not over the whole task
    vector); elect s = sign(sum_i dW_i) entry by entry; average the kept entries whose sign is s. Where the sum is
    zero nothing is elected and the entry is zero.

    full: on dW itself, streamed in row blocks; the result is a dense (m, n) float64 tensor. core: on the M_i of
    dW_i = QB M_i QA^T (Panariello et al. 2025, arXiv 2509.17786), here in the canonical bases, so that neither the
    order of the updates nor the split into B and A matters, as it does in the published bases; an Update.
    """
    if space == "core":
        core = canonical(shared_core(updates))
        thresholds = torch.stack([_threshold(M, density) for M in core.cores])
        return from_core(core, _agree(torch.stack(core.cores), thresholds))
    wide = [Update(update.B.double(), update.A.double()) for update in updates]
    thresholds = torch.stack([_threshold(update.dense(), density) for update in wide])
    rows, columns = wide[0].B.shape[0], wide[0].A.shape[1]
    step = max(1, _BLOCK // (len(wide) * columns))
    blocks = [
        _agree(torch.stack([u.B[start : start + step] @ u.A for u in wide]), thresholds)
        for start in range(0, rows, step)
    ]
    return torch.cat(blocks)


def _threshold(dW: Tensor, density: float) -> Tensor:
    """Return the magnitude of the last entry kept when the `density` share of `dW` is kept, at least one."""
    kept = max(1, round(density * dW.numel()))
    return dW.abs().flatten().kthvalue(dW.numel() - kept + 1).values


def _agree(deltas: Tensor, thresholds: Tensor) -> Tensor:
    """Return trim, elect and mean of `deltas` (T, rows, n) with `thresholds` (T,): (rows, n)."""
    kept = torch.where(deltas.abs() >= (1 - TIE) * thresholds[:, None, None], deltas, 0.0)
    total, size = kept.sum(dim=0), kept.abs().sum(dim=0)
    elected = torch.where(total.abs() > TIE * size, total.sign(), 0.0)
    agreeing = kept.sign() == elected
    return (kept * agreeing).sum(dim=0) / agreeing.sum(dim=0).clamp_min(1)
