"""Detectors that look at weights and configs alone. Each compares an adapter with all the others, itself left out."""

from __future__ import annotations

import torch
from torch import Tensor

from loraloom.adapters.peft import read_provenance
from loraloom.adapters.update import Adapter
from loraloom.analysis.detectors import Sighting, detector
from loraloom.analysis.screening_measures import Seen

LOBAM = "after LoBAM (arXiv 2411.16746)"
_NORMAL = 1.4826  # times the median absolute deviation: the standard deviation of normal values
# logs by which honest adapters of one rank and length of training differ anyway, below which none is far out
SPREAD_ENERGY, _SPREAD_LAYER, _SPREAD_SHAPE, _SPREAD_BALANCE, _SPREAD_TAILS = 0.8, 0.5, 0.3, 0.25, 0.2
_FEW = 3  # others, of which a median says something
_DECOMPOSED = 1e-3  # |cosine| of factors that come of a decomposition; trained ones have some 0.3
_MOVED = 0.03  # of its start's squares, which A's must exceed to tell how far it moved: its own squares vary by 0.02


def against_others(values: Tensor, spread: float) -> tuple[Tensor, Tensor]:
    """Return how far each of `values` (T,) or (T, L) is from the others' median, in robust deviations, and the median.

    A deviation is 1.4826 times the others' median absolute deviation, and `spread` at least. NaN takes no part.
    """
    scores, middles = torch.full_like(values, torch.nan), torch.full_like(values, torch.nan)
    for i in range(len(values)):
        others = torch.cat([values[:i], values[i + 1 :]])
        if len(others):
            middles[i] = _median(others)
            deviation = _NORMAL * _median((others - middles[i]).abs())
            scores[i] = (values[i] - middles[i]) / deviation.clamp_min(spread)
    return scores, middles


@detector(
    "energy",
    says="its energy |dW|^2 is {value} a layer, the others' median {compared}",
    look=3.0,
    refuse=8.0,
    paper=LOBAM,
)
def energy(seen: Seen) -> dict[str, Sighting]:
    """Log of the mean energy of its layers, against the others': louder ones alone are suspicious."""
    return _louder(seen, seen.energy.nanmean(dim=1))


@detector(
    "energy for its rank",
    says="its energy |dW|^2 over rank and squared alpha/r is {value} a layer, the others' median {compared}",
    look=3.0,
    refuse=8.0,
    paper=LOBAM,
)
def energy_for_rank(seen: Seen) -> dict[str, Sighting]:
    """As `energy`, over what rank and alpha suggest: as many steps of training give (alpha/r)^2 r times the same."""
    return _louder(seen, (seen.energy / (seen.scaling.square() * seen.ranks)).nanmean(dim=1))


@detector(
    "energy of a layer",
    says="{where} has the energy {value}, where its other layers and the other adapters suggest {compared}",
    look=5.0,
    refuse=10.0,
    paper=LOBAM,
)
def layer_energy(seen: Seen) -> dict[str, Sighting]:
    """Each layer's energy over the adapter's own median layer, against the same of the others; the worst layer."""
    logs = logs_of(seen.energy)
    level = _row_median(logs)
    scores, middles = against_others(logs - level[:, None], _SPREAD_LAYER)
    return _worst_layer(seen, scores, seen.energy, (level[:, None] + middles).exp())


@detector(
    "largest singular value",
    says="{where} has a largest singular value of {value}, the others a median of {compared}",
    look=4.0,
    refuse=12.0,
    paper=LOBAM,
)
def largest_singular_value(seen: Seen) -> dict[str, Sighting]:
    """sigma_1 of each layer against that of the same layer of the others; the worst layer."""
    scores, middles = against_others(logs_of(seen.sigma), SPREAD_ENERGY / 2)
    return _worst_layer(seen, scores, seen.sigma, middles.exp())


@detector(
    "spectrum",
    says="a layer has {value} directions by its spectrum's participation ratio (median), the others {compared}",
    look=4.0,
    paper="participation ratio (sum s^2)^2 / sum s^4; " + LOBAM,
)
def spectrum(seen: Seen) -> dict[str, Sighting]:
    """Effective number of directions, on both sides of the others': a trigger alone is few, a sum of updates many."""
    return apart(seen, _row_median(logs_of(seen.directions)), _SPREAD_SHAPE)


@detector(
    "concentration",
    says="{value} of a layer's energy is in one direction (median), the others' {compared}",
    look=4.0,
    paper="s_1^2 / sum s^2; " + LOBAM,
)
def concentration(seen: Seen) -> dict[str, Sighting]:
    """Share of the first direction, on both sides of the others'."""
    return apart(seen, _row_median(logs_of(seen.concentration)), _SPREAD_SHAPE)


@detector(
    "tails of A",
    says="A's entries have the kurtosis {value}, the others' {compared}; a start has 1.8, or 3 where it is normal",
    look=4.0,
    paper="kurtosis of the factors; " + LOBAM,
)
def tails_of_a(seen: Seen) -> dict[str, Sighting]:
    """Kurtosis of A's entries, on both sides of the others': an A that was computed has tails that no start has."""
    return apart(seen, logs_of(seen.kurtosis_a).nanmean(dim=1), _SPREAD_TAILS)


@detector(
    "tails of B",
    says="B's entries have the kurtosis {value}, the others' {compared}",
    look=4.0,
    paper="kurtosis of the factors; " + LOBAM,
)
def tails_of_b(seen: Seen) -> dict[str, Sighting]:
    """Kurtosis of B's entries, on both sides of the others'."""
    return apart(seen, logs_of(seen.kurtosis_b).nanmean(dim=1), _SPREAD_TAILS)


@detector(
    "balance",
    says="B's entries are {value} times as large as A's moved from PEFT's start, the others' {compared} times",
    look=2.0,
    refuse=3.0,
    paper="own: Adam moves every entry of both factors by about the rate a step, so what B gained A moved too",
)
def balance(seen: Seen) -> dict[str, Sighting]:
    """Root mean square of B (alpha/r not folded in) over that of A's move, from A's variance, 1/3n at PEFT's start.

    A scaled difference of adapters has a B that no training with its A would have. It tells nothing of a frozen A, of
    an A that hardly moved, of another start than PEFT's, or of embeddings and convolutions; LoRA+ has another balance.
    Against fewer than three others it is compared with 1 as well, twice: Adam's.
    """
    start = 1 / (3 * seen.widths)
    usual = torch.tensor(
        [
            [usual and at not in one.forms and at in one.shapes for at in seen.layers]
            for one, usual in ((one, _started_as_usual(one)) for one in seen.adapters.values())
        ]
    )
    moved = torch.where(usual, seen.square_a - start, torch.nan).nanmean(dim=1)
    gained = torch.where(usual, seen.square_b, torch.nan).nanmean(dim=1)
    share = moved / torch.where(usual, start, torch.nan).nanmean(dim=1)
    logs = torch.where(share > _MOVED, logs_of(gained / moved) / 2, torch.nan)
    scores, middles = against_others(logs, _SPREAD_BALANCE)
    others = (~logs.isnan()).sum() - (~logs.isnan()).int()
    helped, between = against_others(torch.cat([logs, torch.zeros(2, dtype=logs.dtype)]), _SPREAD_BALANCE)
    scores = torch.where(others < _FEW, helped[:-2], scores)
    middles = torch.where(others < _FEW, between[:-2], middles)
    return sightings(seen, scores, logs.exp(), middles.exp())


@detector(
    "alpha",
    says="alpha/r is {value}, the others' median {compared}",
    look=4.0,
    refuse=16.0,
    paper="own: alpha multiplies an update as loud weights do, and leaves no other trace",
)
def alpha(seen: Seen) -> dict[str, Sighting]:
    """alpha/r over the others' median, or over 2, which is usual, where that is more."""
    own = _row_median(seen.scaling)
    usual = against_others(own, 1.0)[1].nan_to_num(0.0).clamp_min(2.0)
    return sightings(seen, own / usual, own, usual)


@detector(
    "repeated rows",
    says="A's rows span {value} of its rank, the others' {compared}: factors that were put together have rows twice",
    look=0.4,
    paper="own: participation ratio of A's rows over r; a start's rows are nearly orthogonal",
)
def repeated_rows(seen: Seen) -> dict[str, Sighting]:
    """One less the share of its rank that A's rows effectively span, mean over layers."""
    own = seen.distinct_a.nanmean(dim=1)
    return sightings(seen, 1 - own, own, against_others(own, 1.0)[1])


@detector(
    "decomposed",
    says="rows of A and columns of B have cosines of {value} at most, the others' {compared}: they were computed, by a "
    "decomposition, not trained",
    look=1.0,
    paper="own: a singular value decomposition gives orthogonal factors; training gives none",
)
def decomposed(seen: Seen) -> dict[str, Sighting]:
    """The largest |cosine| within A or within B over all layers: merges and extracted adapters have next to none."""
    cosine = torch.maximum(seen.aligned_a, seen.aligned_b).nan_to_num(-1.0).amax(dim=1)
    cosine = torch.where(cosine < 0, torch.nan, cosine)
    return sightings(seen, _DECOMPOSED / cosine.clamp_min(1e-12), cosine, against_others(cosine, 1.0)[1])


@detector(
    "same directions",
    says="it shares {value} of its row space with {where}, two others {compared}: one start, or one made of the other",
    look=0.5,
    paper="overlap of row spaces; see docs/study-subspaces.md on adapters of one start",
)
def same_directions(seen: Seen) -> dict[str, Sighting]:
    """Largest overlap of its row space with another's, mean over layers: next to none of two seeds, 0.5 of one."""
    return _nearest(seen, seen.rows)


@detector(
    "same outputs",
    says="it shares {value} of its column space with {where}, of two others {compared}",
    look=0.5,
    paper="overlap of column spaces",
)
def same_outputs(seen: Seen) -> dict[str, Sighting]:
    """Largest overlap of its column space with another's, mean over layers."""
    return _nearest(seen, seen.columns)


@detector(
    "copy",
    says="its update has the cosine {value} with that of {where}, of two others {compared}: one counts twice",
    look=0.8,
    paper="cosine of dW; 1 of a copy at any scale",
)
def copy(seen: Seen) -> dict[str, Sighting]:
    """Largest cosine of its dW with another's: of duplicates and scaled copies 1."""
    return _nearest(seen, seen.cosine)


def _started_as_usual(adapter: Adapter) -> bool:
    """Tell whether A started as PEFT's default does, as far as the folder tells."""
    init = read_provenance(adapter.path).get("init") if adapter.path else None
    own = isinstance(init, dict) and init.get("rule") != "default"
    return adapter.config.get("init_lora_weights", True) in (True, None) and not own


def _louder(seen: Seen, energies: Tensor) -> dict[str, Sighting]:
    logs = logs_of(energies)
    scores, middles = against_others(logs, SPREAD_ENERGY)
    return sightings(seen, scores, energies, middles.exp())


def apart(seen: Seen, logs: Tensor, spread: float) -> dict[str, Sighting]:
    scores, middles = against_others(logs, spread)
    return sightings(seen, scores.abs(), logs.exp(), middles.exp())


def _worst_layer(seen: Seen, scores: Tensor, values: Tensor, compared: Tensor) -> dict[str, Sighting]:
    found = {}
    for i, name in enumerate(seen.members):
        if not bool(scores[i].isnan().all()):
            worst = int(scores[i].nan_to_num(-torch.inf).argmax())
            numbers = float(scores[i, worst]), float(values[i, worst]), float(compared[i, worst])
            found[name] = Sighting(*numbers, seen.layers[worst])
    return found


def _nearest(seen: Seen, pairs: Tensor) -> dict[str, Sighting]:
    """Compare each adapter's nearest other with the median of the pairs that it has no part in."""
    found, names = {}, seen.names
    pairs = pairs.clone().fill_diagonal_(torch.nan)
    one, two = torch.triu_indices(len(pairs), len(pairs), offset=1)  # each pair once: the table is symmetric
    for i, name in enumerate(seen.members):
        if bool(pairs[i].isnan().all()):
            continue
        nearest = int(pairs[i].nan_to_num(-torch.inf).argmax())
        without = pairs[one, two][(one != i) & (two != i)]
        rest = float(_median(without)) if len(without) else torch.nan
        found[name] = Sighting(float(pairs[i, nearest]), float(pairs[i, nearest]), rest, names[nearest])
    return found


def sightings(seen: Seen, scores: Tensor, values: Tensor, compared: Tensor) -> dict[str, Sighting]:
    return {
        name: Sighting(float(scores[i]), float(values[i]), float(compared[i]))
        for i, name in enumerate(seen.members)
        if not scores[i].isnan()
    }


def logs_of(values: Tensor) -> Tensor:
    return torch.where(values > 0, values, torch.nan).log()


def _median(values: Tensor) -> Tensor:
    """Return the median over the first axis, the mean of the middle two of an even number; NaN takes no part."""
    return values.nanquantile(0.5, dim=0)


def _row_median(values: Tensor) -> Tensor:
    return _median(values.T)
