"""Options of a start: filled in as the rule is meant, all that is wrong told at once, and one set for all who ask."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import ValidationError

from loraloom.errors import LoraloomError
from loraloom.settings import checked
from loraloom.starts.options import StartOptions, StartRule
from loraloom.starts.subspace import RULES
from loraloom.study.recipe import InitSettings


def test_every_rule_may_be_asked_for() -> None:
    assert set(get_args(StartRule)) == RULES.keys()


@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_scale_that_is_not_given_is_the_one_the_rule_is_meant_with(rule: str) -> None:
    meant = "response" if rule == "apart" else "unit"
    assert StartOptions(rule=rule).scale == StartOptions(rule=rule, scale=None).scale == meant
    assert StartOptions(rule=rule, scale="unit").scale == "unit"
    assert StartOptions().scale == "response"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"rule": "osmr"}, "init: rule: subspace rule 'osmr' is unknown; did you mean 'osrm'?"),
        ({"keep": "frozn"}, "init: keep: Input should be 'free', 'frozen' or 'projected' (given 'frozn')"),
        ({"energy_share": 1.0}, "init: energy_share: Input should be less than 1 (given 1.0)"),
        ({"energy_share": float("nan")}, "init: energy_share: Input should be a finite number"),
        ({"rule": "x", "keep": "x", "scale": "x", "energy_share": -1}, "init: 4 problems"),
    ],
)
def test_all_that_is_wrong_is_told_at_once(given: dict[str, Any], told: str) -> None:
    with pytest.raises(LoraloomError) as error:
        checked(StartOptions, "init", given)
    assert told in str(error.value)
    with pytest.raises(ValidationError):
        StartOptions(**given)


def test_options_never_change_and_refuse_unknown_names() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        StartOptions().keep = "frozen"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs"):
        StartOptions(kepe="free")  # type: ignore[call-arg]


def test_an_init_of_a_recipe_is_the_options_of_its_start() -> None:
    """A new option is one field: what a recipe's init adds says what to stay off, and how its seeds are drawn."""
    settings = InitSettings(rule="osrm", keep="frozen", off="atlas")
    assert isinstance(settings, StartOptions)
    assert InitSettings.model_fields.keys() - StartOptions.model_fields == {"off", "seed", "description"}
