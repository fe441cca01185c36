"""Calibrated Gaussian noise on statistics, so that what is handed over hardly depends on any one text.

(epsilon, delta)-differential privacy of the sample: the file of k texts and that of the same k texts with any one of
them replaced are told apart no better than epsilon and delta allow, whatever else a reader knows.

Source: Balle and Wang, "Improving the Gaussian Mechanism for Differential Privacy", ICML 2018, arXiv 1805.06530. The
shrinkage of what is left: Gavish and Donoho, "Optimal Shrinkage of Singular Values", 2017, arXiv 1405.7511.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtri
from torch import Tensor

from loraloom.errors import LoraloomError, raise_problems
from loraloom.statistics.moments import Moment

if TYPE_CHECKING:
    from loraloom.statistics.file import Statistics

# What replacing one row x by y, |x|, |y| <= 1, changes in an input's Gram matrix and sum, squared: |xx' - yy'|_F^2 +
# |x - y|^2 = |x|^4 + |y|^4 - 2c^2 + |x|^2 + |y|^2 - 2c with c = x'y, largest at |x| = |y| = 1 and c = -1/2.
ONE_ROW = 4.5
_BELOW = 1 - 1e-6  # clipped norms stay under the bound whatever float32 rounds


class Noise(NamedTuple):
    """What noise is wanted: (epsilon, delta)-private, with rows clipped to the Euclidean norm `clip`."""

    epsilon: float
    delta: float
    clip: float


def clipped(rows: Tensor, clip: float) -> Tensor:
    """Return rows of which none is longer than a bound, in their dtype.

    rows: (k, n).
    clip: the bound: what is longer is scaled down to it.
    """
    norms = rows.double().norm(dim=1, keepdim=True)
    short: Tensor = rows * (clip * _BELOW / norms).clamp_max(1).to(rows.dtype)
    return short


def noise_delta(scale: float, epsilon: float, sensitivity: float) -> float:
    """Return the least delta for which noise N(0, scale^2 I) is (epsilon, delta)-private: Theorem 8 of the source.

    Phi(D / 2s - e s / D) - exp(e) Phi(-D / 2s - e s / D), with D the sensitivity and s the scale.
    """
    half, shift = sensitivity / (2 * scale), epsilon * scale / sensitivity
    return float(np.exp(log_ndtr(half - shift)) - np.exp(epsilon + log_ndtr(-half - shift)))


def noise_scale(epsilon: float, delta: float, sensitivity: float) -> float:
    """Return the least standard deviation of Gaussian noise that makes a release (epsilon, delta)-private.

    epsilon, delta: how well two neighbouring samples may be told apart; epsilon above 0, delta between 0 and 1.
    sensitivity: the largest Euclidean distance between the releases of two neighbouring samples, above 0.

    Source: Balle and Wang (2018), Theorem 8. Raises LoraloomError for values out of range.
    """
    problems = [
        f"{name} {value} is not a positive number"
        for name, value in (("epsilon", epsilon), ("sensitivity", sensitivity))
        if not (math.isfinite(value) and value > 0)
    ]
    problems += [] if 0 < delta < 1 else [f"delta {delta} is not between 0 and 1"]
    raise_problems("noise", problems, "epsilon 1 to 8 and a delta far below 1 / texts are usual")

    def excess(log_scale: float) -> float:
        return noise_delta(math.exp(log_scale), epsilon, 1.0) - delta

    low = high = 0.0
    while excess(low) <= 0:
        low -= 1
    while excess(high) > 0:
        high += 1
    # the root is known to 1e-12; 1e-9 more noise keeps it on the safe side
    return float(sensitivity * math.exp(brentq(excess, low, high, xtol=1e-12)) * (1 + 1e-9))


def add_noise(statistics: Statistics, epsilon: float, delta: float, clip: float, seed: int | None = None) -> Statistics:
    """Return statistics of which the whole file is (epsilon, delta)-private for a replaced text.

    statistics: of one row a text (kind "sample"), each `clipped` when it was collected, so that one text changes one
        row of each of L inputs: the sensitivity is sqrt(4.5 L) in units of `clip`.
    epsilon, delta: how private; 1 to 8, and far below 1 / texts, are usual.
    clip: the Euclidean norm to which rows were clipped.
    seed: None draws the noise from the operating system. A seed makes it repeatable for tests: never share such a file.

    The number of texts is taken to be public; `tokens`, which would tell a text's length, becomes 0. Rows are not kept.
    Gram matrices and sums are then made ones that rows could have given, which costs no privacy: eigenvalues below the
    noise become 0 (all of them, where the noise drowns everything) and those above it lose what the noise added.

    Raises LoraloomError for values out of range and for statistics that no noise can make private.
    """
    if not (math.isfinite(clip) and clip > 0):
        raise LoraloomError(f"noise: clip {clip} is not a positive number", "give the norm to which rows were clipped")
    scale = noise_scale(epsilon, delta, math.sqrt(ONE_ROW * max(len(statistics.moments), 1)))
    raise_problems("noise", _faults(statistics, clip), "collect kind='sample' with this clip, and add noise to that")
    source = os.urandom if seed is None else np.random.default_rng(seed).bytes
    moments = {
        name: _possible(_released(moment, clip, scale, source), clip, scale)
        for name, moment in statistics.moments.items()
    }
    facts = {"clip": clip, "epsilon": epsilon, "delta": delta}
    return replace(statistics, moments=moments, tokens=0, privacy=facts)


def _faults(statistics: Statistics, clip: float) -> list[str]:
    """Tell what keeps the sensitivity from being what `add_noise` takes it to be."""
    if statistics.kind != "sample":
        return ["a row is a token here: one text changes many rows, and no useful bound on its part is known"]
    problems = []
    if statistics.privacy != {"clip": clip}:
        problems.append(f"rows clipped to {clip:g} and no noise are needed, these have {statistics.privacy}")
    for name, moment in statistics.moments.items():
        if moment.count != statistics.texts:
            problems.append(f"{name}: {moment.count} rows of {statistics.texts} texts, not one a text")
        if moment.lost:
            problems.append(f"{name}: its rank was bounded, which one text may have changed: bound it after the noise")
        longest = 0.0 if moment.rows is None else float(moment.as_rows().norm(dim=1).max())
        if longest > clip or moment.trace() > moment.count * clip**2:
            problems.append(f"{name}: holds rows longer than the clip {clip:g}")
    return problems


def _released(moment: Moment, clip: float, scale: float, source: Callable[[int], bytes]) -> Moment:
    """Return Gram matrix and sum with noise of standard deviation `scale` in units of `clip`, as the mechanism has it.

    (Z + Z^T) / 2 is Z's part in the symmetric matrices: N(0, s^2) along each of an orthonormal basis of them, so s^2 on
    the diagonal and s^2 / 2 on each pair beside it.
    """
    noise = _normal(moment.width, moment.width, source)
    gram = moment.as_gram() + (noise + noise.T) * (scale * clip**2 / 2)
    return Moment(moment.count, moment.total + _normal(1, moment.width, source)[0] * (scale * clip), gram=gram)


def _normal(rows: int, columns: int, source: Callable[[int], bytes]) -> Tensor:
    """Return standard normal values (rows, columns) float64 from 53 random bits each; none is beyond 8.3."""
    bits = np.frombuffer(source(8 * rows * columns), dtype=np.uint64) >> np.uint64(11)
    values: Tensor = torch.from_numpy(ndtri((bits + 0.5) * 2.0**-53))
    return values.reshape(rows, columns)


def _possible(moment: Moment, clip: float, scale: float) -> Moment:
    """Return a moment near `moment` that rows could have given; it reads nothing but what was released.

    Noise of this scale alone has eigenvalues up to e = s sqrt(2 n). It lifts one of g to v = g + e^2 / 4g and turns its
    vector; along that, sqrt(v^2 - e^2) is nearest to the truth in Frobenius norm, and 0 where v is below e. The sum
    moves to the nearest t for which G - t t^T / k is positive semi-definite: t^T G^+ t <= k.
    """
    values, vectors = torch.linalg.eigh(moment.as_gram())
    edge = scale * clip**2 * math.sqrt(2 * moment.width)
    loud = values > edge
    kept, vectors = (values[loud].square() - edge**2).sqrt(), vectors[:, loud]
    along = vectors.T @ moment.total

    def beyond(multiplier: float) -> float:
        return float((kept * (along / (kept + multiplier)).square()).sum()) - moment.count

    most = math.sqrt(float((kept * along.square()).sum()) / max(moment.count, 1))
    multiplier = brentq(beyond, 0.0, most) if len(kept) and beyond(0.0) > 0 else 0.0
    total = vectors @ (along * kept / (kept + multiplier))
    gram = (vectors * kept) @ vectors.T
    return Moment(moment.count, total, gram=(gram + gram.T) / 2)
