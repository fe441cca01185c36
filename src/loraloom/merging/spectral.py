"""Spectral rules: they act on the singular vectors of the updates, exactly in the factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field

from loraloom.adapter import Update
from loraloom.merging.core import NOISE, polar, svd_factors
from loraloom.merging.rules import rule


@rule(
    "tsv",
    paper="Gargiulo et al. 2025, Task Singular Vectors (TSV-M), arXiv 2412.00081",
    summary="concatenate the tasks' singular triples and make their singular vectors orthogonal",
    exact=True,
)
def tsv(
    updates: Sequence[Update],
    *,
    k: Annotated[int | None, Field(gt=0, description="singular triples kept per task; default: its rank")] = None,
) -> Update:
    """Return polar(U) S polar(V)^T, U = [U_1 ... U_T] and so on (Gargiulo et al. 2025, TSV-M, arXiv 2412.00081).

    dW_i = U_i S_i V_i^T keeps its top `k` triples and never more than its rank: the vectors of zero singular values,
    which full-space code pulls in, are arbitrary. `polar` is the nearest matrix with orthonormal columns.
    """
    triples = []
    for update in updates:
        U, S, Vh = svd_factors(update)
        signal = NOISE * S.max() < S
        kept = min(k or update.rank, int(signal.sum()))
        triples.append((U[:, :kept], S[:kept], Vh[:kept]))
    strengths = torch.cat([S for _, S, _ in triples])
    if not len(strengths):
        return updates[0]  # every update is zero
    left = polar(torch.cat([U for U, _, _ in triples], dim=1))
    right = polar(torch.cat([Vh for _, _, Vh in triples], dim=0).T)
    root = strengths.sqrt()
    return Update((left * root).float(), (root[:, None] * right.T).float())
