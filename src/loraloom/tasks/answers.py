"""Metrics of generated answers against the expected ones, row by row, with standard errors."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy
from numpy.typing import NDArray

from loraloom.errors import LoraloomError, did_you_mean, first_few, raise_problems
from loraloom.results import Score
from loraloom.tasks.metrics import resampled_rows

TextMetric = Literal["exact_match", "token_f1", "rouge_l", "number_match", "pearson", "json_f1", "parse_rate"]
TokenMetric = Literal["loss", "probability"]  # of right answers, whatever is written: `loss_score`, `probability_score`
AnswerMetric = Literal[TextMetric, TokenMetric]

_WORD = re.compile(r"[^\W_]+")
# a sign counts only where no word stands before it, so that 2024-01-02 ends with 2; commas only between thousands
_NUMBER = re.compile(r"(?<![\w.])[-+−]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d+)?")
_FENCE = re.compile(r"```\w*\n(.*)```", re.DOTALL)
_LARGEST = 1e100  # sums and squares of what is below are finite
_SLACK = 1e-9  # of what decimals lose as floats: 3.9 is within 0.1 of 3.8


def answer_values(
    metric: str, answers: Sequence[str], expected: Sequence[str], tolerance: float = 0.0
) -> NDArray[numpy.float64]:
    """Return the metric of each row (rows,), between 0 and 1; for `pearson` the number of each answer.

    metric: exact_match: 1 where the texts are the same in Unicode's form NFC, case-folded, with each run of white
        space as one blank and none around them; punctuation counts;
      token_f1: F1 of the words as multisets (Rajpurkar et al. 2016; articles count). Words are runs of letters and
        digits, case-folded;
      rouge_l: F of the longest common subsequence of these words (Lin 2004), as rouge-score computes it;
      number_match: 1 where the last number of the answer is within `tolerance` of the expected one's, 0 where there is
        no number;
      pearson: the last number of the answer; without one, the mean of the other answers' numbers, so that a share p of
        numbers takes a correlation r to about r sqrt(p);
      json_f1: F1 of the fields of a JSON object, 0 for what is none. A field is its keys and places in lists, with
        its value: numbers by value, texts as in exact_match. A code fence around the object is read past;
      parse_rate: 1 where the answer is a JSON object, if all expected ones are; else where it has a number.
    answers: what was generated, a text a row.
    expected: the right answer of each row.
    tolerance: largest difference from the expected number, in its unit; for number_match.

    Raises LoraloomError for an unknown metric, and for expected answers that it cannot measure.
    """
    _check(metric, expected)
    if metric == "pearson":
        return _filled([number_of(answer) for answer in answers])
    pairs = zip(answers, expected, strict=True)
    if metric == "number_match":
        return numpy.array([_number_match(answer, wanted, tolerance) for answer, wanted in pairs], dtype=float)
    if metric == "parse_rate":
        parse = object_of if _all_objects(expected) else number_of
        return numpy.array([parse(answer) is not None for answer in answers], dtype=float)
    by_row = _rouge_l() if metric == "rouge_l" else _BY_ROW[metric]
    return numpy.array([by_row(answer, wanted) for answer, wanted in pairs], dtype=float)


def answer_score(metric: str, answers: Sequence[str], expected: Sequence[str], tolerance: float = 0.0) -> Score:
    """Return the metric of all rows with its standard error: of a mean over rows, or from `answer_resampled`.

    Arguments and errors are those of `answer_values`. A correlation that is undefined is 0.
    """
    values = answer_values(metric, answers, expected, tolerance)
    if metric != "pearson":
        return Score(value=float(values.mean()), stderr=float(values.std()) / math.sqrt(len(values)))
    stderr = numpy.std(answer_resampled(metric, answers, expected, tolerance), ddof=1)
    return Score(value=float(_pearson(values, _filled(map(number_of, expected)))), stderr=float(stderr))


def answer_resampled(
    metric: str, answers: Sequence[str], expected: Sequence[str], tolerance: float = 0.0, seed: int = 0
) -> NDArray[numpy.float64]:
    """Return the metric (200,) on resamples of the rows, the same for one seed and number of rows.

    So the difference of two models on one task is paired over rows. Other arguments and errors are those of
    `answer_values`.
    """
    values = answer_values(metric, answers, expected, tolerance)
    drawn = resampled_rows(len(values), seed)
    if metric == "pearson":
        return _pearson(values[drawn], _filled(map(number_of, expected))[drawn])
    return numpy.asarray(values[drawn].mean(axis=1))


def loss_score(losses: Sequence[float], tokens: Sequence[int]) -> Score:
    """Return the loss in nats per answer token, with the standard error of a ratio over rows (Cochran 1977, ch. 6).

    losses: summed over the tokens of each row's answer, in nats, (rows,).
    tokens: how many each answer has, (rows,).
    """
    lost, counts = numpy.asarray(losses, dtype=float), numpy.asarray(tokens, dtype=float)
    ratio = lost.sum() / counts.sum()
    return Score(value=float(ratio), stderr=float(numpy.linalg.norm(lost - ratio * counts) / counts.sum()))


def probability_score(losses: Sequence[float]) -> Score:
    """Return the mean over rows of the probability of the whole right answer, exp(-loss), with its standard error.

    It is what exact match would be on average if answers were drawn at random, not written greedily, and each only
    counted as the tokens that are expected.

    losses: summed over the tokens of each row's answer, in nats, (rows,).
    """
    values = numpy.exp(-numpy.asarray(losses, dtype=float))
    return Score(value=float(values.mean()), stderr=float(values.std()) / math.sqrt(len(values)))


def loss_resampled(losses: Sequence[float], tokens: Sequence[int], seed: int = 0) -> NDArray[numpy.float64]:
    """Return the loss in nats per answer token (200,) on the rows that `answer_resampled` draws."""
    drawn = resampled_rows(len(losses), seed)
    lost, counts = numpy.asarray(losses, dtype=float), numpy.asarray(tokens, dtype=float)
    return numpy.asarray(lost[drawn].sum(axis=1) / counts[drawn].sum(axis=1))


def answer_problems(metric: str, expected: Sequence[str]) -> list[str]:
    """Return why `metric` cannot measure answers of which these are the right ones."""
    if metric not in _FORMS:
        return []
    if metric == "parse_rate" and _all_objects(expected):
        return []
    parse = object_of if metric == "json_f1" else number_of
    wrong = [wanted for wanted in expected if parse(wanted) is None]
    return [f"{metric}: expected answers {_FORMS[metric]} ({len(wrong)}): {first_few(wrong)}"] if wrong else []


def normalised(text: str) -> str:
    """Return a text as `exact_match` compares it."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def number_of(text: str) -> float | None:
    """Return the last number in a text (as lm-evaluation-harness reads GSM8K's answers), or None."""
    found = _NUMBER.findall(text)
    number = float(found[-1].replace(",", "").replace("−", "-")) if found else math.inf
    return number if abs(number) < _LARGEST else None


def object_of(text: str) -> dict[str, Any] | None:
    """Return the JSON object that a text is, with or without a code fence around it, or None."""
    fenced = _FENCE.fullmatch(text.strip())
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _check(metric: str, expected: Sequence[str]) -> None:
    known = {*_BY_ROW, *_FORMS, "rouge_l"}
    if metric not in known:
        raise LoraloomError(f"metric {metric!r} of answers is unknown", did_you_mean(metric, known))
    raise_problems("the answers cannot be measured", answer_problems(metric, expected), "choose another metric")


def _all_objects(expected: Sequence[str]) -> bool:
    return all(object_of(wanted) is not None for wanted in expected)


def _exact_match(answer: str, wanted: str) -> float:
    return float(normalised(answer) == normalised(wanted))


def _words(text: str) -> list[str]:
    return _WORD.findall(normalised(text))


def _token_f1(answer: str, wanted: str) -> float:
    found, right = _words(answer), _words(wanted)
    if not found or not right:  # as for SQuAD's questions without an answer
        return _exact_match(answer, wanted)
    return _f1(Counter(found), Counter(right))


def _f1(found: Counter[Any], right: Counter[Any]) -> float:
    return 2 * (found & right).total() / (found.total() + right.total())


def _rouge_l() -> Callable[[str, str], float]:
    from rouge_score.rouge_scorer import RougeScorer  # seconds to import, for what few tasks ask
    from rouge_score.tokenizers import Tokenizer

    class Words(Tokenizer):  # type: ignore[misc]
        """Words of every script; rouge-score's own tokenizer knows a to z alone, and equals this one there."""

        def tokenize(self, text: str) -> list[str]:
            return _words(text)

    scorer = RougeScorer(["rougeL"], tokenizer=Words())

    def rouge_l(answer: str, wanted: str) -> float:
        if not _words(answer) or not _words(wanted):
            return _exact_match(answer, wanted)
        return float(scorer.score(wanted, answer)["rougeL"].fmeasure)

    return rouge_l


def _number_match(answer: str, wanted: str, tolerance: float) -> bool:
    found, right = number_of(answer), number_of(wanted)
    if found is None or right is None:
        return False
    return abs(found - right) <= tolerance + _SLACK * (tolerance + abs(right))


def _filled(numbers: Any) -> NDArray[numpy.float64]:
    """Return numbers as an array, with the mean of the others in place of None."""
    values = numpy.array([math.nan if number is None else number for number in numbers], dtype=float)
    missing = numpy.isnan(values)
    return numpy.where(missing, values[~missing].mean() if not missing.all() else 0.0, values)


def _pearson(values: NDArray[numpy.float64], wanted: NDArray[numpy.float64]) -> NDArray[numpy.float64]:
    """Return the correlation over the last axis, 0 where one side is constant."""
    left = values - values.mean(axis=-1, keepdims=True)
    right = wanted - wanted.mean(axis=-1, keepdims=True)
    products = (left * right).sum(axis=-1)
    norms = numpy.linalg.norm(left, axis=-1) * numpy.linalg.norm(right, axis=-1)
    varied = (numpy.ptp(values, axis=-1) > 0) & (numpy.ptp(wanted, axis=-1) > 0) & (norms > 0)
    return numpy.asarray(numpy.divide(products, norms, out=numpy.zeros_like(products), where=varied))


def _json_f1(answer: str, wanted: str) -> float:
    found, right = object_of(answer), object_of(wanted)
    if found is None or right is None:
        return 0.0
    if not found and not right:
        return 1.0
    return _f1(Counter(_fields(found)), Counter(_fields(right)))


def _fields(value: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """Yield each leaf of a JSON object with its path and type; an empty list or object inside is a leaf."""
    left: list[tuple[tuple[str | int, ...], Any]] = [((), value)]
    while left:  # not by recursion: a model may open a thousand brackets
        path, one = left.pop()
        if isinstance(one, dict | list) and one:
            inside = one.items() if isinstance(one, dict) else enumerate(one)
            left += [((*path, key), part) for key, part in inside]
        elif isinstance(one, int | float) and not isinstance(one, bool):
            yield (*path, "number", one)
        else:
            yield (*path, type(one).__name__, normalised(str(one)))


_BY_ROW: dict[str, Callable[[str, str], float]] = {
    "exact_match": _exact_match,
    "token_f1": _token_f1,
    "json_f1": _json_f1,
}
_FORMS = {  # what an expected answer is that a metric cannot measure
    "number_match": "without a number",
    "pearson": "without a number",
    "json_f1": "that are no JSON objects",
    "parse_rate": "that are neither JSON objects nor have a number",
}
