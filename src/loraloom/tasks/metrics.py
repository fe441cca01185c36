"""GLUE's metrics from scikit-learn and scipy, with standard errors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor

from loraloom.errors import LoraloomError, did_you_mean
from loraloom.results import Score

_RESAMPLES = 200


def metric_value(metric: str, logits: Tensor, labels: Tensor) -> float:
    """Return one figure for logits against labels, 1 at best; 0 where a correlation is undefined.

    metric: accuracy; matthews: Matthews correlation; accuracy_f1: mean of accuracy and F1 of label 1;
      pearson_spearman: mean of both correlations.
    logits: (k, labels), or (k, 1) for regression.
    labels: (k,) int64, or float32 for regression.

    Raises LoraloomError for an unknown metric.
    """
    return _value(metric, _predictions(metric, logits), labels.numpy())


def score(metric: str, logits: Tensor, labels: Tensor) -> Score:
    """Return the metric with its standard error over rows: exact for accuracy, else from `resampled`."""
    predicted, true = _predictions(metric, logits), labels.numpy()
    value = _value(metric, predicted, true)
    if metric == "accuracy":
        return Score(value=value, stderr=math.sqrt(value * (1 - value) / len(true)))
    return Score(value=value, stderr=float(numpy.std(resampled(metric, logits, labels), ddof=1)))


def resampled(metric: str, logits: Tensor, labels: Tensor, seed: int = 0) -> NDArray[Any]:
    """Return the metric (200,) on resamples of the rows, the same for one seed and number of rows.

    So the difference of two models on one task is paired over rows.
    """
    predicted, true = _predictions(metric, logits), labels.numpy()
    drawn = resampled_rows(len(true), seed)
    if metric == "accuracy":  # the mean of what is right; scikit-learn would take a hundred times as long
        return numpy.asarray((predicted == true)[drawn].mean(axis=1))
    return numpy.array([_value(metric, predicted[chosen], true[chosen]) for chosen in drawn])


def resampled_rows(rows: int, seed: int) -> NDArray[Any]:
    """Return the places (200, rows) of rows drawn with replacement, by which every metric is resampled."""
    generator = numpy.random.default_rng(seed)
    return numpy.stack([generator.integers(0, rows, rows) for _ in range(_RESAMPLES)])


def _predictions(metric: str, logits: Tensor) -> NDArray[Any]:
    if metric == "pearson_spearman":
        return numpy.asarray(logits.float().reshape(-1).numpy())
    return numpy.asarray(logits.argmax(dim=-1).numpy())


def _value(metric: str, predicted: NDArray[Any], true: NDArray[Any]) -> float:
    if metric not in _METRICS:
        raise LoraloomError(f"metric {metric!r} is unknown", did_you_mean(metric, _METRICS))
    with warnings.catch_warnings():
        # constant predictions, or a resample of one label alone, make scikit-learn and scipy warn
        warnings.simplefilter("ignore")
        value = float(_METRICS[metric](true, predicted))
    return 0.0 if math.isnan(value) else value


def _accuracy_f1(true: NDArray[Any], predicted: NDArray[Any]) -> float:
    return float(accuracy_score(true, predicted) + f1_score(true, predicted, zero_division=0)) / 2


def _pearson_spearman(true: NDArray[Any], predicted: NDArray[Any]) -> float:
    return float(pearsonr(predicted, true)[0] + spearmanr(predicted, true)[0]) / 2


_METRICS: dict[str, Callable[[NDArray[Any], NDArray[Any]], float]] = {
    "accuracy": accuracy_score,
    "matthews": matthews_corrcoef,
    "accuracy_f1": _accuracy_f1,
    "pearson_spearman": _pearson_spearman,
}
