"""How much the row spaces of adapters' A's and the column spaces of their B's have in common, pair by pair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loraloom.adapters.lowrank import update_bases
from loraloom.adapters.update import Adapter
from loraloom.errors import LoraloomError

# Trained on MiniLM (rank 8 of 384 inputs) from one and the same A, adapters keep 0.47 to 0.75 and OSRM's quiet starts
# 0.5 to 0.8; random starts end at 0.03, own-energy directions at 0.14
SAME_START = 0.25


@dataclass(frozen=True)
class Overlaps:
    """Overlap of every pair of adapters, mean over the layers that both adapt: 1 where one space holds the other.

    names: of the T adapters.
    rows, columns: (T, T) float64 from 0 to 1, of the A's row spaces and the B's column spaces; NaN where no layer is
        common.
    chance: (T, T) float64, what two random row spaces of these ranks would have, max(r_i, r_j) / n.
    """

    names: list[str]
    rows: Tensor
    columns: Tensor
    chance: Tensor

    def same_start(self) -> list[tuple[str, str, float]]:
        """Return the pairs whose A's have so much in common that they started as one or nearly so: names, overlap."""
        return [
            (self.names[i], self.names[j], float(self.rows[i, j]))
            for i in range(len(self.names))
            for j in range(i + 1, len(self.names))
            if self.rows[i, j] > max(SAME_START, 2 * float(self.chance[i, j]))
        ]


def overlaps(adapters: Mapping[str, Adapter]) -> Overlaps:
    """Return the overlap of every two adapters: |Q_i Q_j^T|_F^2 / min(r_i, r_j), Q orthonormal bases of the spaces.

    adapters: by name. A direction that an update does not use, B's column or A's row being zero, counts for nothing:
        the bases are those of dW.

    Raises LoraloomError where two adapters have a layer in different shapes.
    """
    names, count = list(adapters), len(adapters)
    tables = {key: torch.full((count, count), torch.nan, dtype=torch.float64) for key in ("rows", "columns", "chance")}
    bases = {
        name: {module: update_bases(adapter.updates[module]) for module in adapter.shapes}
        for name, adapter in adapters.items()
    }
    for i, one in enumerate(names):
        for j, two in enumerate(names[i:], start=i):
            common = [module for module in bases[one] if module in bases[two]]
            pairs = [_compared(bases[one][module], bases[two][module], (one, two, module)) for module in common]
            found = [pair for pair in pairs if pair is not None]
            if found:
                for key, values in zip(tables, zip(*found, strict=True), strict=True):
                    tables[key][i, j] = tables[key][j, i] = sum(values) / len(values)
    return Overlaps(names, **tables)


def _compared(
    one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor], where: tuple[str, str, str]
) -> tuple[float, float, float] | None:
    """Return overlap of rows, of columns, and chance; None where an update is zero."""
    if one[0].shape[0] != two[0].shape[0] or one[1].shape[0] != two[1].shape[0]:
        raise LoraloomError(f"{where[0]} and {where[1]}: {where[2]} has two shapes", "inspect adapters of one base")
    ranks = one[0].shape[1], two[0].shape[1]
    if not min(ranks):
        return None
    rows, columns = (float((a.T @ b).square().sum()) / min(ranks) for a, b in zip(one, two, strict=True))
    return rows, columns, max(ranks) / one[0].shape[0]
