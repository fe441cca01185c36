"""The detector that adds up what the others see of how an adapter was made; its limit comes from honest ones alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from loraloom.analysis.detectors import Sighting, detector
from loraloom.analysis.screening_measures import Seen

FEWEST = 20  # references: of fewer no 5 % can be told
# what the factors' making leaves in them whatever the learning rate was; how loud an adapter is hangs on the rate
SIGNS = ("balance", "repeated rows", "decomposed", "tails of A", "tails of B", "same directions")
_STRONGEST = 3  # signs that count: an attack leaves some and not all
_CALLED = 0.05  # of honest references


@detector(
    "together",
    says="its three strongest signs of having been put together come to {value}; 5 % of the references are above "
    "{compared}",
    look=1.001,
    paper="own: Fisher's sum of -log p, p by ranks among honest references, as in conformal prediction",
)
def together(seen: Seen, *, scores: Mapping[str, Mapping[str, float]]) -> dict[str, Sighting]:
    """The three largest -log p of the signs, p the share of references that are as far out; over the references' 95 %.

    So 5 % of honest adapters are called, if the references are of their kind: trained by as large rates, as long, at
    such ranks. Honest ones that were trained harder than all references are called more often.
    """
    reference = [name for name in seen.names if name not in seen.members]
    rows = {name: np.array([scores[sign].get(name, -np.inf) for sign in SIGNS]) for name in seen.names}
    sums = {name: _sum(rows[name], [rows[other] for other in reference if other != name]) for name in seen.names}
    above = sorted(sums[name] for name in reference)
    limit = above[min(int(np.ceil((len(above) + 1) * (1 - _CALLED))), len(above)) - 1]
    return {name: Sighting(sums[name] / limit, sums[name], limit) for name in seen.members}


def _sum(row: np.ndarray, others: list[np.ndarray]) -> float:
    shares = (1 + (np.stack(others) >= row).sum(axis=0)) / (len(others) + 1)
    return float(np.sort(-np.log(shares))[-_STRONGEST:].sum())
