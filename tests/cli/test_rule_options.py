"""Options of merging rules as words of a command line, against the rules' own schemas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loraloom.cli.rule_options import number_list, options_help, split_arguments
from loraloom.errors import LoraloomError
from loraloom.merging import get_rule, rule_names

OWN = ["--rule", "--output", "--scale", "--weights", "--rank", "--seed", "--heads", "--dry-run"]


@pytest.mark.parametrize(
    ("words", "rule", "paths", "options"),
    [
        ("a b", "ties", ["a", "b"], {}),
        ("a --density 0.5 b", "ties", ["a", "b"], {"density": 0.5}),
        ("--density=0.5 a --space core", "ties", ["a"], {"density": 0.5, "space": "core"}),
        ("a --per-task b", "cp", ["a", "b"], {"per_task": True}),
        ("a --per_task b", "cp", ["a", "b"], {"per_task": True}),
        ("a --per-task=false b", "cp", ["a", "b"], {"per_task": False}),
        ("a --k 3 b", "tsv", ["a", "b"], {"k": 3}),
        ("a --k null", "tsv", ["a"], {"k": None}),
        ("a --k=-3", "tsv", ["a"], {"k": -3}),  # the rule tells that it is out of range
        ("a --density 1e-1", "ties", ["a"], {"density": 0.1}),
        ("a --merge dare_ties --beta 1", "ctm", ["a"], {"merge": "dare_ties", "beta": 1}),
        ("a --space=x=y", "ties", ["a"], {"space": "x=y"}),
        ("a --space=", "ties", ["a"], {"space": ""}),
        ("a --densty 1", "ties", ["a"], {"densty": 1}),  # as above
        ("a --density 1", "tiess", ["a"], {"density": 1}),
    ],
)
def test_paths_and_options(words: str, rule: str, paths: list[str], options: dict[str, Any]) -> None:
    found, given = split_arguments(words.split(), rule, OWN)
    assert found == [Path(path) for path in paths]
    assert given == options
    assert {name: type(value) for name, value in given.items()} == {n: type(v) for n, v in options.items()}


def test_every_option_of_every_rule_comes_through() -> None:
    """Written out with its default it is what the rule takes without it."""
    for rule in rule_names():
        found = get_rule(rule)
        defaults, _ = found.check({})
        words = ["a"]
        for name, value in defaults.items():
            text = {True: "true", False: "false", None: "null"}[value] if value in (True, False, None) else str(value)
            words += [f"--{name.replace('_', '-')}={text if not isinstance(value, float) else value}"]
        paths, options = split_arguments([*words, "b"], rule, OWN)
        assert paths == [Path("a"), Path("b")]
        assert found.check(options) == (defaults, [])


def test_a_value_is_needed() -> None:
    with pytest.raises(LoraloomError, match="--density has no value") as caught:
        split_arguments(["a", "--density"], "ties", OWN)
    assert caught.value.hint == "write it as --density VALUE"


@pytest.mark.parametrize(
    ("word", "meant"),
    [("--weight", "--weights"), ("--scael", "--scale"), ("--ouput", "--output"), ("--dry_run", "--dry-run")],
)
def test_a_slip_in_an_option_of_the_command_is_told(word: str, meant: str) -> None:
    with pytest.raises(LoraloomError, match=f"no option {word}") as caught:
        split_arguments(["a", word, "1"], "ties", OWN)
    assert f"did you mean '{meant}'" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "numbers"),
    [(None, None), ("1", [1.0]), ("0.5,-0.3, 2e-1", [0.5, -0.3, 0.2]), ("0,0", [0.0, 0.0])],
)
def test_number_list(text: str | None, numbers: list[float] | None) -> None:
    assert number_list(text, "--weights") == numbers


@pytest.mark.parametrize("text", ["", "a", "1,,2", "1;2", "1,"])
def test_number_list_refuses(text: str) -> None:
    with pytest.raises(LoraloomError) as caught:
        number_list(text, "--weights")
    assert f"--weights {text!r}: not numbers" in str(caught.value)
    assert caught.value.hint == "write it as --weights 0.5,0.5"


def test_the_help_holds_every_option_once_under_its_rule() -> None:
    sections = options_help().split("\n\n  ")
    assert sections[0] == "Options of the rules:"
    found = {section.split("\n")[0]: section.split("\n")[1:] for section in sections[1:]}
    options = {rule: list(get_rule(rule).options.model_fields) for rule in rule_names()}
    assert list(found) == [rule for rule in rule_names() if options[rule]]
    for rule, lines in found.items():
        assert [line.split()[0] for line in lines] == [f"--{name.replace('_', '-')}" for name in options[rule]]
    assert (
        found["ties"][0].strip()
        == "--density (float, default 0.2, > 0, <= 1): share of entries kept per task and layer"
    )
