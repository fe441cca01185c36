"""Metrics against scikit-learn and scipy called directly, and standard errors against repeated sampling."""

from __future__ import annotations

import math
import warnings

import numpy
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from loraloom.errors import LoraloomError
from loraloom.results import Score, average
from loraloom.tasks.metrics import metric_value, resampled, score

CLASSES = ["accuracy", "matthews", "accuracy_f1"]


def classes(count: int = 60, labels: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    true = torch.randint(0, labels, (count,), generator=generator)
    logits = torch.randn(count, labels, generator=generator)
    logits[torch.arange(count), true] += 1
    return logits, true


def levels(count: int = 60, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    true = torch.randint(0, 6, (count,), generator=generator).float()  # ties, as STS-B has
    return (true + torch.randn(count, generator=generator))[:, None], true


def test_against_sklearn_and_scipy() -> None:
    for seed in range(5):
        logits, true = classes(seed=seed)
        predicted = logits.argmax(-1)
        assert metric_value("accuracy", logits, true) == accuracy_score(true, predicted)
        assert metric_value("matthews", logits, true) == matthews_corrcoef(true, predicted)
        both = (accuracy_score(true, predicted) + f1_score(true, predicted)) / 2
        assert metric_value("accuracy_f1", logits, true) == both
        three, labels = classes(labels=3, seed=seed)
        assert metric_value("accuracy", three, labels) == accuracy_score(labels, three.argmax(-1))
        assert metric_value("matthews", three, labels) == matthews_corrcoef(labels, three.argmax(-1))
        value, wanted = levels(seed=seed)
        both = (pearsonr(value[:, 0], wanted)[0] + spearmanr(value[:, 0], wanted)[0]) / 2
        assert metric_value("pearson_spearman", value, wanted) == pytest.approx(both, abs=1e-6)


@pytest.mark.parametrize("side", [0, 1])
def test_constant_predictions(side: int) -> None:
    _, true = classes()
    logits = torch.zeros(60, 2)
    logits[:, side] = 1
    share = float((true == side).double().mean())
    f1 = 0.0 if side == 0 else 2 * share / (1 + share)
    expected = {"accuracy": share, "matthews": 0.0, "accuracy_f1": (share + f1) / 2}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for metric, value in expected.items():
            assert metric_value(metric, logits, true) == pytest.approx(value)
            assert math.isfinite(score(metric, logits, true).stderr)
        flat = score("pearson_spearman", torch.ones(60, 1), levels()[1])
    assert (flat.value, flat.stderr) == (0.0, 0.0)


@pytest.mark.parametrize("side", [0, 1])
def test_labels_of_one_class_alone(side: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for metric in CLASSES:
            found = score(metric, torch.eye(2)[[side] * 7], torch.full((7,), side))
            assert math.isfinite(found.value)
            assert found.stderr == 0.0


def test_accuracy_has_the_binomial_standard_error() -> None:
    logits, true = classes(50)
    p = accuracy_score(true, logits.argmax(-1))
    assert score("accuracy", logits, true) == Score(value=p, stderr=math.sqrt(p * (1 - p) / 50))


@pytest.mark.parametrize("metric", ["matthews", "accuracy_f1", "pearson_spearman"])
def test_bootstrap_is_deterministic_and_near_the_spread_of_samples(metric: str) -> None:
    make = levels if metric == "pearson_spearman" else classes
    logits, true = make(200)
    first = score(metric, logits, true)
    numpy.random.seed(5)
    torch.manual_seed(5)
    assert score(metric, logits, true) == first
    assert first.value == metric_value(metric, logits, true)
    fresh = [metric_value(metric, *make(200, seed=seed)) for seed in range(300)]
    assert first.stderr == pytest.approx(float(numpy.std(fresh, ddof=1)), rel=0.35)


def test_average_over_tasks() -> None:
    found = average([Score(value=0.5, stderr=0.03), Score(value=0.7, stderr=0.04)])
    assert found.value == pytest.approx(0.6)
    assert found.stderr == pytest.approx(0.025)


def test_half_precision_logits() -> None:
    logits, true = levels()
    low = metric_value("pearson_spearman", logits.bfloat16(), true)
    assert low == pytest.approx(metric_value("pearson_spearman", logits.bfloat16().float(), true))


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(LoraloomError, match="did you mean 'accuracy'"):
        metric_value("acuracy", *classes())


@pytest.mark.parametrize("metric", ["accuracy", "matthews"])
def test_resamples_are_the_same_rows_for_every_model_and_others_for_another_seed(metric: str) -> None:
    """Against a loop over the rows drawn; two models that differ in one row differ on few resamples' worth of it."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (60,), generator=generator)
    logits = torch.randn(60, 2, generator=generator)
    found, again = (resampled(metric, logits, labels, seed=seed) for seed in (5, 5))
    assert (found == again).all()
    assert (found != resampled(metric, logits, labels, seed=6)).any()
    drawn = numpy.random.default_rng(5)
    for value in found:
        rows = torch.from_numpy(drawn.integers(0, 60, 60))
        assert value == pytest.approx(metric_value(metric, logits[rows], labels[rows]))
    one_row = logits.clone()
    one_row[7] = one_row[7].flip(0)
    apart = numpy.std(found - resampled(metric, one_row, labels, seed=5), ddof=1)
    assert 0 < apart < numpy.std(found, ddof=1) / 2
