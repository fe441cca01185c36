"""The noise on statistics: the mechanism's own terms by brute force and by other formulas, and what it releases."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import ndtr
from scipy.stats import norm
from torch import Tensor, nn

from loraloom.errors import LoraloomError
from loraloom.statistics import privacy
from loraloom.statistics.collect import collect_statistics
from loraloom.statistics.file import Layer, Statistics
from loraloom.statistics.moments import Moment
from loraloom.statistics.privacy import add_noise, clipped, noise_delta, noise_scale


def sample(rows: dict[str, Tensor], *, keep: bool = False, clip: float = 1.0) -> Statistics:
    """Statistics of kind "sample" with these clipped rows an input, as Gram matrices unless `keep`."""
    moments = {name: Moment.of_rows(value) for name, value in rows.items()}
    if not keep:
        moments = {name: Moment(m.count, m.total, gram=m.as_gram()) for name, m in moments.items()}
    texts = len(next(iter(rows.values())))
    layers = {name: Layer(name, value.shape[1], 4) for name, value in rows.items()}
    return Statistics("base", "print", moments, layers, texts, 7 * texts, "sample", {"clip": clip})


def unit_rows(count: int, width: int, seed: int = 0) -> Tensor:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return clipped(rows, 1.0)


def test_one_row_changes_no_more_than_is_said() -> None:
    """|xx' - yy'|^2 + |x - y|^2 on a grid of norms and cosines, from the vectors themselves."""
    one, two, cosine = np.meshgrid(np.linspace(0, 1, 41), np.linspace(0, 1, 41), np.linspace(-1, 1, 81), indexing="ij")
    x = np.stack([one, np.zeros_like(one)], axis=-1)
    y = np.stack([two * cosine, two * np.sqrt(1 - cosine**2)], axis=-1)
    products = [np.einsum("...i,...j->...ij", row, row) for row in (x, y)]
    change = ((products[0] - products[1]) ** 2).sum((-2, -1)) + ((x - y) ** 2).sum(-1)
    assert change.max() == pytest.approx(privacy.ONE_ROW, abs=1e-12)
    where = np.unravel_index(change.argmax(), change.shape)
    assert (one[where], two[where], cosine[where]) == pytest.approx((1, 1, -0.5))


def test_clipped_rows_keep_their_direction() -> None:
    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 50)[:, None]
    rows[0] = 0
    found = clipped(rows, 0.7)
    short = rows.norm(dim=1) <= 0.69
    assert torch.equal(found[short], rows[short])
    assert float(found.double().norm(dim=1).max()) <= 0.7
    assert torch.allclose(found[~short], rows[~short] / rows[~short].norm(dim=1, keepdim=True) * 0.7, rtol=1e-5)


def test_delta_is_the_hockey_stick_of_two_gaussians() -> None:
    """Theorem 8 against the integral that it stands for: sum over x of max(0, p(x) - exp(e) q(x))."""
    for scale, epsilon, sensitivity in itertools.product((0.5, 1.0, 3.0), (0.1, 1.0, 4.0), (0.7, 1.0, 2.0)):

        def excess(x: float, s: float = scale, e: float = epsilon, d: float = sensitivity) -> float:
            return max(0.0, norm.pdf(x, d, s) - math.exp(e) * norm.pdf(x, 0, s))

        # p exceeds exp(e) q to the right of this point alone
        start = sensitivity / 2 + epsilon * scale**2 / sensitivity
        integral = quad(excess, start, start + 40 * scale, epsabs=1e-13)[0]
        assert noise_delta(scale, epsilon, sensitivity) == pytest.approx(integral, rel=1e-6, abs=1e-12)


def by_algorithm_1(epsilon: float, delta: float) -> float:
    """Balle and Wang's Algorithm 1 for sensitivity 1: another way to the least scale."""
    at_zero = ndtr(0) - math.exp(epsilon) * ndtr(-math.sqrt(2 * epsilon))
    above = delta >= at_zero

    def value(v: float) -> float:
        first, second = math.sqrt(epsilon * v), -math.sqrt(epsilon * (v + 2))
        return float(ndtr(first if above else -first) - math.exp(epsilon) * ndtr(second))

    low, high = 0.0, 1.0
    while (value(high) < delta) if above else (value(high) > delta):
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        if (value(middle) < delta) == above:
            low = middle
        else:
            high = middle
    root = math.sqrt(1 + low / 2) - math.sqrt(low / 2) if above else math.sqrt(1 + low / 2) + math.sqrt(low / 2)
    return root / math.sqrt(2 * epsilon)


EPSILONS, DELTAS = (0.01, 0.1, 0.5, 1.0, 2.0, 8.0, 32.0), (1e-10, 1e-6, 1e-5, 1e-3, 0.1, 0.6)


def test_scale_is_the_least_that_meets_the_condition() -> None:
    for epsilon, delta, sensitivity in itertools.product(EPSILONS, DELTAS, (0.3, 5.2)):
        scale = noise_scale(epsilon, delta, sensitivity)
        assert noise_delta(scale, epsilon, sensitivity) <= delta
        assert noise_delta(scale * (1 - 1e-5), epsilon, sensitivity) > delta
        assert scale == pytest.approx(sensitivity * noise_scale(epsilon, delta, 1.0), rel=1e-6)
        assert scale == pytest.approx(sensitivity * by_algorithm_1(epsilon, delta), rel=1e-5)
    # the value that others' implementations of the paper give
    assert noise_scale(1.0, 1e-5, 1.0) == pytest.approx(3.730632, abs=1e-5)
    assert math.isfinite(noise_scale(1000.0, 1e-5, 1.0))


def test_scale_falls_with_epsilon_and_delta_and_stays_under_the_classical_one() -> None:
    for delta in DELTAS:
        scales = [noise_scale(epsilon, delta, 1.0) for epsilon in EPSILONS]
        assert scales == sorted(scales, reverse=True)
        for epsilon, scale in zip(EPSILONS, scales, strict=True):
            if epsilon <= 1:
                assert scale < math.sqrt(2 * math.log(1.25 / delta)) / epsilon
    for epsilon in EPSILONS:
        scales = [noise_scale(epsilon, delta, 1.0) for delta in DELTAS]
        assert scales == sorted(scales, reverse=True)


def draws(moment: Moment, clip: float, scale: float, seed: int, count: int) -> Tensor:
    """Return (at least `count`, d) releases of `moment`, in an orthonormal basis and in units of the clip.

    Many copies along the diagonal of one wide Gram matrix are as many independent releases. In the basis, pairs beside
    the diagonal count once, times sqrt(2).
    """
    n, copies = moment.width, 40
    wide = Moment(moment.count, moment.total.repeat(copies), gram=torch.block_diag(*[moment.as_gram()] * copies))
    source = np.random.default_rng(seed).bytes
    first, second = torch.triu_indices(n, n, 1)
    found = []
    for _ in range(-(-count // copies)):
        released = privacy._released(wide, clip, scale, source)
        assert torch.equal(released.as_gram(), released.as_gram().T)
        grams = released.as_gram().reshape(copies, n, copies, n).diagonal(dim1=0, dim2=2).permute(2, 0, 1) / clip**2
        pairs = grams[:, first, second] * math.sqrt(2)
        found.append(
            torch.cat([grams.diagonal(dim1=1, dim2=2), pairs, released.total.reshape(copies, n) / clip], dim=1)
        )
    return torch.cat(found)


def test_noise_is_isometric() -> None:
    """Every coordinate of an orthonormal basis has variance s^2 (units of the clip), none goes with another."""
    drawn = draws(Moment.of_rows(torch.zeros(4, 3)), 0.5, 3.0, 0, 20_000) / 3
    covariance = drawn.T @ drawn / len(drawn)
    assert (covariance - torch.eye(9, dtype=torch.float64)).abs().max() < 5 * math.sqrt(2 / len(drawn))
    assert drawn.mean(dim=0).abs().max() < 5 / math.sqrt(len(drawn))


@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 0.05), (1.0, 0.02), (3.0, 0.01)])
def test_the_best_test_of_worst_neighbours_respects_epsilon_and_delta(epsilon: float, delta: float) -> None:
    """The likelihood-ratio test on draws of the mechanism: P(S) - exp(e) Q(S) is delta at its best S, nowhere above.

    The neighbours differ as much as they may: rows of the clip's norm at a cosine of -1/2.
    """
    clip, scale = 2.0, noise_scale(epsilon, delta, math.sqrt(privacy.ONE_ROW))
    others, x, y = unit_rows(5, 2), torch.tensor([[1.0, 0.0]]), torch.tensor([[-0.5, math.sqrt(0.75)]])
    one, two = (Moment.of_rows(torch.cat([others, row]) * clip) for row in (x, y))
    ends = [draws(moment, clip, 0.0, 0, 1)[0] for moment in (one, two)]
    apart = ends[0] - ends[1]
    assert float(apart.norm()) == pytest.approx(math.sqrt(privacy.ONE_ROW), rel=1e-6)
    seen = [(draws(m, clip, scale, seed, 40_000) - ends[1]) @ apart / apart.norm() for m, seed in ((one, 1), (two, 2))]
    best = float(apart.norm()) / 2 + epsilon * scale**2 / float(apart.norm())
    for threshold in (best, best - scale, best + scale):
        p, q = (float((values > threshold).double().mean()) for values in seen)
        error = math.sqrt((p * (1 - p) + math.exp(2 * epsilon) * q * (1 - q)) / len(seen[0]))
        assert p - math.exp(epsilon) * q <= delta + 4 * error
        assert threshold != best or p - math.exp(epsilon) * q == pytest.approx(delta, abs=4 * error)


def test_all_inputs_are_released_together() -> None:
    """L inputs share one guarantee: their noise is that of a release which changes by sqrt(4.5 L)."""
    rows = unit_rows(400, 4)
    for count in (1, 6):
        found = sample({str(i): rows for i in range(count)})
        scale = noise_scale(1.0, 1e-3, math.sqrt(4.5 * count))
        noised = [add_noise(found, 1.0, 1e-3, 1.0, seed=seed) for seed in range(100)]
        off = torch.stack([m.total - found.moments[k].total for s in noised for k, m in s.moments.items()])
        assert float(off.square().mean().sqrt()) == pytest.approx(scale, rel=0.15)


def test_what_comes_out_is_what_rows_could_have_given(tmp_path: Path) -> None:
    """From noise that drowns everything to noise that changes nothing: the checks of files from others pass."""
    for epsilon, count in itertools.product((0.1, 1.0, 30.0, 1e6), (1, 5, 60)):
        found = sample({"a": unit_rows(count, 12) * 3, "b": unit_rows(count, 7, 1) * 2}, keep=True, clip=3.0)
        noised = add_noise(found, epsilon, 1e-5, 3.0, seed=count)
        assert [moment.faults() for moment in noised.moments.values()] == [[], []]
        assert all(moment.gram is not None for moment in noised.moments.values())
        assert (noised.texts, noised.tokens, noised.kind) == (count, 0, "sample")
        noised.save(tmp_path / "a.safetensors", overwrite=True)
        assert Statistics.load(tmp_path / "a.safetensors").privacy == {"clip": 3.0, "epsilon": epsilon, "delta": 1e-5}
        if epsilon == 1e6:
            for name, moment in noised.moments.items():
                truth = found.moments[name]
                assert (moment.as_gram() - truth.as_gram()).norm() <= 0.2 * truth.as_gram().norm()
                assert (moment.total - truth.total).norm() <= 0.2 * truth.total.norm()


def test_noise_differs_unless_seeded() -> None:
    found = sample({"a": unit_rows(2000, 6)})
    drawn = [add_noise(found, 8.0, 1e-3, 1.0, seed=seed).moments["a"].total for seed in (None, None, 3, 3)]
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[2], drawn[3])


@pytest.mark.parametrize(
    ("epsilon", "delta", "clip", "message"),
    [
        (0.0, 1e-5, 1.0, "epsilon 0.0 is not a positive number"),
        (math.inf, 1e-5, 1.0, "epsilon inf"),
        (math.nan, 2.0, 1.0, "2 problems"),
        (1.0, 0.0, 1.0, "delta 0.0 is not between 0 and 1"),
        (1.0, 1.0, 1.0, "delta 1.0"),
        (1.0, 1e-5, -1.0, "clip -1.0 is not a positive number"),
        (1.0, 1e-5, 0.5, "a: holds rows longer than the clip 0.5"),
    ],
)
def test_values_out_of_range(epsilon: float, delta: float, clip: float, message: str) -> None:
    for keep in (True, False):
        with pytest.raises(LoraloomError, match=message):
            add_noise(sample({"a": unit_rows(3, 6)}, keep=keep, clip=clip), epsilon, delta, clip)


def test_statistics_that_no_noise_makes_private() -> None:
    found = sample({"a": unit_rows(3, 6)})
    with pytest.raises(LoraloomError, match="a row is a token here"):
        add_noise(replace(found, kind="token"), 1.0, 1e-5, 1.0)
    with pytest.raises(LoraloomError, match="a: 3 rows of 2 texts, not one a text"):
        add_noise(replace(found, texts=2), 1.0, 1e-5, 1.0)
    with pytest.raises(LoraloomError, match=r"rows clipped to 2 and no noise are needed, these have {'clip': 1.0}"):
        add_noise(found, 1.0, 1e-5, 2.0)
    with pytest.raises(LoraloomError, match="these have None"):
        add_noise(replace(found, privacy=None), 1.0, 1e-5, 1.0)
    noised = add_noise(found, 1.0, 1e-5, 1.0)
    with pytest.raises(LoraloomError, match=r"these have {'clip': 1.0, 'epsilon': 1.0"):
        add_noise(noised, 1.0, 1e-5, 1.0)
    bounded = Moment(3, found.moments["a"].total, factor=unit_rows(2, 6) / 2, lost=0.1)
    with pytest.raises(LoraloomError, match="a: its rank was bounded"):
        add_noise(replace(found, moments={"a": bounded}), 1.0, 1e-5, 1.0)


def test_facts_go_with_the_statistics() -> None:
    found = sample({"a": unit_rows(30, 6)})
    noised = add_noise(found, 1.0, 1e-5, 1.0)
    assert (found + found).privacy == {"clip": 1.0}
    assert (
        (noised + noised).privacy
        == noised.limit_directions(2).privacy
        == noised.contents()["privacy"]
        == noised.privacy
    )
    with pytest.raises(LoraloomError, match=r"privacy: base \(30 texts\) has {'clip': 1.0, 'eps"):
        noised + found
    with pytest.raises(LoraloomError, match="noise was added, which no difference takes off"):
        noised - noised


def test_rows_are_clipped_as_they_are_collected() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layer = nn.Embedding(50, 6), nn.Linear(6, 4)

        def forward(self, input_ids: Tensor) -> Tensor:
            out: Tensor = self.layer(self.embed(input_ids))
            return out

    torch.manual_seed(0)
    model, ids = Plain(), torch.randint(50, (40, 5))
    batches = [{"input_ids": part} for part in ids.split(8)]
    means = model.embed(ids).detach().mean(dim=1)
    clip = float(means.norm(dim=1).median())
    found = collect_statistics(model, batches, ["layer"], kind="sample", clip=clip)
    rows = clipped(means, clip).double()
    assert torch.allclose(found.moments["layer"].as_gram(), rows.T @ rows, rtol=1e-5, atol=1e-5)
    noised = add_noise(found, 1.0, 1e-5, clip)
    assert (noised.privacy, noised.texts) == ({"clip": clip, "epsilon": 1.0, "delta": 1e-5}, 40)
    unclipped = collect_statistics(model, batches, ["layer"], kind="sample")
    with pytest.raises(LoraloomError, match=r"these have None(.|\n)*holds rows longer than"):
        add_noise(unclipped, 1.0, 1e-5, clip)
