"""What is asked of a start: the options that travel together from a command, a recipe or a call to each layer's A."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from loraloom.errors import did_you_mean
from loraloom.settings import Settings

StartRule = Literal["apart", "osrm", "mean", "random", "shared", "default"]
Keep = Literal["free", "frozen", "projected"]
Scale = Literal["unit", "response"]
DEFAULT = "apart"  # the rule of docs/study-subspaces.md


class StartOptions(Settings):
    """How A starts and how it is kept. The defaults are those of docs/study-subspaces.md.

    rule: where A starts: `apart` (random directions off the loud ones), `osrm` (the paper), or a control: `mean`,
        `random`, `shared`, `default`; see `osrm_subspace`.
    keep: while A trains, let it go, fix it, or keep it off the loud directions by the callback.
    scale: `unit` leaves A as the rule gives it; `response` multiplies A by one number a layer, so that it responds to
        the own inputs as PEFT's default A would. None takes what the rule is meant with: published rules and controls
        have rows of norm 1.
    energy_share: share of the others' energy, in [0, 1), that the loud directions hold.

    Raises pydantic's ValidationError that tells every wrong option.
    """

    rule: str = Field(DEFAULT, description="apart, osrm (the paper), mean, random, shared or default")
    keep: Keep = Field(
        "free", description="let A go, fix it, or keep it off the loud directions after every optimiser step"
    )
    scale: Scale | None = Field(
        None, description="leave A as the rule gives it, or match the response of PEFT's default A; by rule without"
    )
    energy_share: float = Field(0.5, ge=0, lt=1, description="share of the energy that the loud directions hold")

    @model_validator(mode="before")
    @classmethod
    def _scaled_as_meant(cls, given: Any) -> Any:
        """Fill in the scale that the rule is meant with, so that every record tells it."""
        if not isinstance(given, dict) or given.get("scale") is not None:
            return given
        return {**given, "scale": "response" if given.get("rule", DEFAULT) == "apart" else "unit"}

    @field_validator("rule")
    @classmethod
    def _known_rule(cls, rule: str) -> str:
        if rule not in get_args(StartRule):
            raise ValueError(f"subspace rule {rule!r} is unknown; {did_you_mean(rule, get_args(StartRule))}")
        return rule
