"""Metrics of answers against rouge-score, scipy, SQuAD's rule and brute force; standard errors against resampling."""

from __future__ import annotations

import json
import math
import random
import string
from collections import Counter
from typing import get_args

import numpy
import pytest
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import pearsonr

from loraloom.errors import LoraloomError
from loraloom.tasks.answers import (
    AnswerMetric,
    TextMetric,
    answer_problems,
    answer_resampled,
    answer_score,
    answer_values,
    loss_resampled,
    loss_score,
    number_of,
    object_of,
)

WORDS = ("the", "a", "cat", "Cat", "sat", "mat.", "on", "don't", "get_name", "10", "x-ray", "!", "")


def sentences(count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    chance = random.Random(seed)
    pairs = [[" ".join(chance.choices(WORDS, k=chance.randint(0, 12))) for _ in range(2)] for _ in range(count)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def values(metric: str, answer: str, wanted: str, tolerance: float = 0.0) -> float:
    (value,) = answer_values(metric, [answer], [wanted], tolerance)
    return float(value)


@pytest.mark.parametrize(
    ("answer", "wanted", "same"),
    [
        ("Yes", "yes", True),
        ("  new \t\n york ", "New York", True),
        ("cafe\u0301", "caf\u00e9", True),  # one letter in two code points
        ("STRASSE", "straße", True),
        ("yes.", "yes", False),
        ("get_name", "getname", False),
        ("", "  ", True),
        ("", "yes", False),
    ],
)
def test_exact_match_after_the_stated_normalisation(answer: str, wanted: str, same: bool) -> None:
    assert values("exact_match", answer, wanted) == same


def test_rouge_l_is_that_of_rouge_score_where_its_tokenizer_knows_the_letters() -> None:
    answers, expected = sentences(200)
    scorer = RougeScorer(["rougeL"])
    for found, answer, wanted in zip(answer_values("rouge_l", answers, expected), answers, expected, strict=True):
        theirs = scorer.score(wanted, answer)["rougeL"].fmeasure
        if any(letter in string.ascii_letters + string.digits for letter in answer + wanted):
            assert found == pytest.approx(theirs, abs=1e-12), (answer, wanted)


def test_rouge_l_and_token_f1_know_every_script() -> None:
    assert values("rouge_l", "день добрый", "Добрый день") == pytest.approx(0.5)
    assert values("token_f1", "день добрый", "Добрый день") == 1
    assert values("rouge_l", "日本 東京", "日本") == pytest.approx(2 / 3)


def test_token_f1_by_brute_force() -> None:
    answers, expected = sentences(200, seed=1)
    for found, answer, wanted in zip(answer_values("token_f1", answers, expected), answers, expected, strict=True):
        left, right = ("".join(c if c.isalnum() else " " for c in text.lower()).split() for text in (answer, wanted))
        common = sum(min(count, right.count(word)) for word, count in Counter(left).items())
        if left and right:
            precision, recall = common / len(left), common / len(right)
            f1 = 2 * precision * recall / (precision + recall) if common else 0.0
            assert found == pytest.approx(f1, abs=1e-12), (answer, wanted)
        else:
            assert found == (answer.split() == wanted.split())


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3.8", 3.8),
        ("The answer is 3.8.", 3.8),
        ("2 plus 3 is #### 1,234,567.5", 1234567.5),
        ("-4", -4),
        ("−4", -4),
        ("+.5", 0.5),
        ("1e-3", 1e-3),
        ("$18", 18),
        ("18km, 50%", 50),
        ("2024-01-02", 2),
        ("1, 2", 2),
        ("version v2", None),
        ("none", None),
        ("", None),
        ("1e999", None),
        ("9" * 5000, None),
    ],
)
def test_the_number_of_an_answer(text: str, number: float | None) -> None:
    assert number_of(text) == number


def test_number_match_within_a_tolerance() -> None:
    assert values("number_match", "about 3.80", "3.8") == 1
    assert values("number_match", "3.9", "3.8") == 0
    assert values("number_match", "3.9", "3.8", tolerance=0.1) == 1
    assert values("number_match", "3.91", "3.8", tolerance=0.1) == 0
    assert values("number_match", "no idea", "3.8", tolerance=9) == 0
    tenths = [(f"{a / 10:g}", f"{b / 10:g}") for a in range(-30, 31) for b in range(-30, 31)]
    left, right = ([pair[side] for pair in tenths] for side in (0, 1))
    close = [abs(a - b) <= 2 for a in range(-30, 31) for b in range(-30, 31)]  # in whole tenths, which are exact
    assert (answer_values("number_match", left, right, tolerance=0.2) == close).all()


def test_pearson_of_numbers_and_what_an_answer_without_one_costs() -> None:
    generator = numpy.random.default_rng(0)
    wanted = generator.uniform(0, 5, 400).round(1)
    found = (wanted + generator.normal(0, 1, 400)).round(2)
    expected, answers = [f"{one}" for one in wanted], [f"about {one}" for one in found]
    assert answer_score("pearson", answers, expected).value == pytest.approx(pearsonr(found, wanted)[0])
    half = [answer if row % 2 else "no idea" for row, answer in enumerate(answers)]
    filled = numpy.where(numpy.arange(400) % 2 == 1, found, found[1::2].mean())
    score = answer_score("pearson", half, expected)
    assert score.value == pytest.approx(pearsonr(filled, wanted)[0])
    assert score.value == pytest.approx(math.sqrt(0.5) * pearsonr(found[1::2], wanted[1::2])[0], abs=0.05)
    assert answer_score("parse_rate", half, expected).value == 0.5


@pytest.mark.parametrize("answer", ["0.1", "no idea"])
def test_pearson_of_answers_that_are_all_alike_is_none(answer: str) -> None:
    score = answer_score("pearson", [answer] * 7, [f"{row / 3:.2f}" for row in range(7)])
    assert (score.value, score.stderr) == (0.0, 0.0)


def test_pearson_of_wild_numbers_is_finite() -> None:
    score = answer_score("pearson", ["9" * 99, "-1" + "0" * 98, "3"], ["1", "2", "3"])
    assert math.isfinite(score.value)
    assert math.isfinite(score.stderr)


@pytest.mark.parametrize(
    ("answer", "f1"),
    [
        ('{"city": "Rome", "nights": 2, "rooms": [{"beds": 1}]}', 1.0),
        ('{"nights": 2.0, "rooms": [{"beds": 1}], "city": " rome"}', 1.0),
        ('```json\n{"city": "Rome", "nights": 2, "rooms": [{"beds": 1}]}\n```', 1.0),
        ('{"city": "Rome", "nights": 3, "rooms": [{"beds": 1}]}', 2 / 3),
        ('{"city": "Rome"}', 0.5),
        ('{"city": "Rome", "nights": 2, "rooms": [{"beds": 1}], "pets": true, "smoker": null}', 0.75),
        ('{"city": "Rome", "nights": "2", "rooms": [{"beds": true}]}', 1 / 3),
        ('{"city": "Rome", "nights": 2, "rooms": []}', 2 / 3),
        ("{}", 0.0),
        ('["Rome", 2]', 0.0),
        ('{"city": "Rome"', 0.0),
        ('Sure: {"city": "Rome"}', 0.0),
        ("", 0.0),
        ('{"a":' * 100_000, 0.0),
    ],
)
def test_json_field_f1(answer: str, f1: float) -> None:
    wanted = '{"city": "Rome", "nights": 2, "rooms": [{"beds": 1}]}'
    assert values("json_f1", answer, wanted) == pytest.approx(f1)
    assert values("parse_rate", answer, wanted) == (object_of(answer) is not None)


def test_json_of_no_fields_and_of_deep_ones() -> None:
    assert values("json_f1", "{}", " { } ") == 1
    deep = '{"a":' * 500 + "1" + "}" * 500
    assert values("json_f1", deep, deep) == 1


def test_json_f1_by_brute_force_on_flat_objects() -> None:
    chance = random.Random(0)
    objects = [{key: chance.randint(0, 2) for key in "abcd" if chance.random() < 0.7} for _ in range(100)]
    for left, right in zip(objects, reversed(objects), strict=True):
        common = sum(right.get(key, -1) == value for key, value in left.items())
        f1 = 2 * common / (len(left) + len(right)) if left or right else 1.0
        assert values("json_f1", json.dumps(left), json.dumps(right)) == pytest.approx(f1)


@pytest.mark.parametrize("metric", get_args(TextMetric))
def test_scores_are_means_of_rows_and_resamples_those_of_the_rows_drawn(metric: str) -> None:
    chance = random.Random(2)
    expected = [json.dumps({"a": chance.randint(0, 9)}) for _ in range(40)]
    answers = [json.dumps({"a": chance.randint(0, 9)}) if chance.random() < 0.8 else "none" for _ in range(40)]
    if metric == "pearson":  # so that the mean that stands for the unparsed is the same on every resample
        answers = [answer.replace("none", "5") for answer in answers]
    score = answer_score(metric, answers, expected)
    found = answer_resampled(metric, answers, expected, seed=3)
    assert found.shape == (200,)
    drawn = numpy.random.default_rng(3)
    for value in found:
        rows = drawn.integers(0, 40, 40)
        of_drawn = answer_score(metric, [answers[row] for row in rows], [expected[row] for row in rows])
        assert value == pytest.approx(of_drawn.value, abs=1e-12)
    assert score.stderr == pytest.approx(float(numpy.std(found, ddof=1)), rel=0.2)
    if metric == "exact_match":
        assert score.stderr == pytest.approx(math.sqrt(score.value * (1 - score.value) / 40))


def test_loss_is_a_ratio_with_the_spread_of_samples() -> None:
    generator = numpy.random.default_rng(0)

    def draw(rows: int) -> tuple[list[float], list[int]]:
        tokens = generator.integers(1, 16, rows)
        return [float(generator.gamma(2, 0.5, count).sum()) for count in tokens], [int(count) for count in tokens]

    losses, tokens = draw(300)
    score = loss_score(losses, tokens)
    assert score.value == pytest.approx(sum(losses) / sum(tokens))
    fresh = [loss_score(*draw(300)).value for _ in range(300)]
    assert score.stderr == pytest.approx(float(numpy.std(fresh, ddof=1)), rel=0.2)
    resampled = loss_resampled(losses, tokens, seed=4)
    rows = numpy.random.default_rng(4).integers(0, 300, 300)
    assert resampled[0] == pytest.approx(sum(losses[row] for row in rows) / sum(tokens[row] for row in rows))
    assert score.stderr == pytest.approx(float(numpy.std(resampled, ddof=1)), rel=0.2)


def test_expected_answers_that_a_metric_cannot_measure_are_told() -> None:
    assert answer_problems("exact_match", ["yes"]) == []
    assert answer_problems("parse_rate", ['{"a": 1}', "{}"]) == []
    assert answer_problems("parse_rate", ["1", "2"]) == []
    assert answer_problems("number_match", ["1", "one", "two"]) == [
        "number_match: expected answers without a number (2): one, two"
    ]
    with pytest.raises(LoraloomError, match=r"json_f1: expected answers that are no JSON objects \(1\): Rome"):
        answer_values("json_f1", ["Rome", "{}"], ["Rome", "{}"])
    with pytest.raises(LoraloomError, match="parse_rate: expected answers that are neither"):
        answer_score("parse_rate", ["yes"], ["yes"])


def test_an_unknown_metric_is_refused() -> None:
    assert set(get_args(AnswerMetric)) == {*get_args(TextMetric), "loss", "probability"}
    with pytest.raises(LoraloomError, match="did you mean 'exact_match'"):
        answer_values("exactmatch", ["a"], ["a"])
