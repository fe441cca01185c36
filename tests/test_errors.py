"""Errors say everything at once, each thing once."""

from __future__ import annotations

import pytest

from loraloom.errors import LoraloomError, did_you_mean, raise_problems, raise_together


def test_one_problem_is_one_line_and_several_are_a_list() -> None:
    raise_problems("file", [])
    with pytest.raises(LoraloomError) as one:
        raise_problems("file", ["no column"], "name it")
    assert str(one.value) == "file: no column\n  name it"
    with pytest.raises(LoraloomError) as two:
        raise_problems("file", ["no column", "no rows"])
    assert str(two.value) == "file: 2 problems\n  - no column\n  - no rows"


def test_errors_are_told_together_each_once() -> None:
    raise_together([])
    with pytest.raises(LoraloomError) as told:
        raise_together([LoraloomError("a", "x"), LoraloomError("b"), LoraloomError("a", "x"), LoraloomError("c", "y")])
    assert (told.value.message, told.value.hint) == ("a\nb\nc", "x; y")


def test_nearest_names_or_all() -> None:
    assert did_you_mean("quary", ["query", "value"]) == "did you mean 'query'?"
    assert did_you_mean("zzz", ["query", "value"]) == "known: query, value"
