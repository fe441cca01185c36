"""Options of merging rules as words of a command line, against the rules' own schemas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from loraloom.cli.main import app
from loraloom.cli.rule_options import former_weights, one_rule, options_help, rule_list, split_arguments
from loraloom.errors import LoraloomError
from loraloom.merging import get_rule, rule_names
from loraloom.merging.registry import TAKEN, option_flag

OWN = ["--rule", "--output", "--scale", "--weight", "--rank", "--seed", "--heads", "--dry-run"]


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
    [("--weihgt", "--weight"), ("--scael", "--scale"), ("--ouput", "--output"), ("--dry_run", "--dry-run")],
)
def test_a_slip_in_an_option_of_the_command_is_told(word: str, meant: str) -> None:
    with pytest.raises(LoraloomError, match=f"no option {word}") as caught:
        split_arguments(["a", word, "1"], "ties", OWN)
    assert f"did you mean '{meant}'" in caught.value.hint


@pytest.mark.parametrize("words", ["--weights 0.5,0.3", "--weights=0.5,0.3"])
def test_a_list_is_told_as_an_option_for_each(words: str) -> None:
    with pytest.raises(LoraloomError, match="no option --weights") as caught:
        split_arguments(["a", *words.split()], "ties", OWN)
    assert caught.value.hint == "did you mean --weight 0.5 --weight 0.3?"


def test_no_option_of_a_rule_is_one_of_the_command() -> None:
    """A rule's option would never reach it: the command would take it, or refuse its value."""
    group = typer.main.get_command(app)
    merge = group.commands["merge"]  # type: ignore[attr-defined]
    own = {flag for parameter in merge.params for flag in parameter.opts if flag.startswith("--")} | {"--help"}
    assert own <= {option_flag(name) for name in TAKEN}, "the registry must refuse these names to the rules of plugins"
    for rule in rule_names():
        assert not {option_flag(name) for name in get_rule(rule).options.model_fields} & own, rule


@pytest.mark.parametrize(
    ("rule", "words", "options"), [("consensus", "--tasks 1", {"tasks": 1}), ("fisher", "--texts 7", {"texts": 7})]
)
def test_options_that_commands_once_took(rule: str, words: str, options: dict[str, Any]) -> None:
    assert split_arguments(["a", *words.split(), "b"], rule, OWN)[1] == options


def test_every_page_of_rules_fits_a_terminal() -> None:
    every = [get_rule(name) for name in rule_names()]
    for page in (rule_list(every), options_help(), *map(one_rule, every)):
        assert max(map(len, page.splitlines())) <= 80


def test_the_list_of_rules_has_each_once() -> None:
    page = rule_list([get_rule(name) for name in rule_names()]).split("\n\n")[0]
    first = [line.split()[0] for line in page.splitlines() if not line.startswith(" ")]
    assert first == list(rule_names())


def test_one_rule_is_told_whole() -> None:
    page = " ".join(one_rule(get_rule("cp")).split())
    for part in (
        "cp: one CP decomposition",
        "formula U diag(Σ cᵢ) Vᵀ",
        "paper after Tensorized",
        "needs nothing beside the adapters",
        "cost factors; ALS",
        "rank the largest of the adapters' ranks",
        "weights 1/T each by default",
        "--per-task keep what each task reads",
        "by TensorLy's alternating least squares",
    ):
        assert part in page
    assert "--k INTEGER singular triples kept per task; default: its rank (above 0)" in " ".join(
        one_rule(get_rule("tsv")).split()
    )
    assert "--space full|core|knots where entries are compared (full by default)" in " ".join(
        one_rule(get_rule("ties")).split()
    )


def test_the_help_holds_every_option_once_under_its_rule() -> None:
    sections = options_help().split("\n\n  ")
    assert sections[0] == "Options of the rules:"
    found = {section.split("\n")[0]: section.split("\n")[1:] for section in sections[1:]}
    options = {rule: list(get_rule(rule).options.model_fields) for rule in rule_names()}
    assert list(found) == [rule for rule in rule_names() if options[rule]]
    for rule, lines in found.items():
        first = [line.split()[0].rstrip(":") for line in lines if line.startswith("    --")]
        assert first == [option_flag(name) for name in options[rule]]
    density = "--density NUMBER: share of entries kept per task and layer (above 0, at most 1, 0.2 by default)"
    assert " ".join(" ".join(found["ties"]).split()).startswith(density)


def test_weights_in_one_list_are_read_as_before_and_not_beside_the_new_form() -> None:
    assert former_weights("0.5,-0.3", None) == [0.5, -0.3]
    assert former_weights(None, [0.5, 1.0]) == [0.5, 1.0]
    with pytest.raises(LoraloomError, match="two forms of one option"):
        former_weights("0.5,0.3", [1.0])
    with pytest.raises(LoraloomError, match="not numbers parted by commas") as caught:
        former_weights("0.5;0.3", None)
    assert "--weight 0.5;0.3" in caught.value.hint
