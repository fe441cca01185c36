"""An entry of a recipe's merging: a rule over a few scales, or `auto` in place of either."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator

from loraloom.errors import did_you_mean
from loraloom.merging.options import Normalise
from loraloom.merging.registry import get_rule, rule_names
from loraloom.settings import DISTIL_TEXTS, Settings

AUTO: Literal["auto"] = "auto"  # in place of a rule or scales: those nearest to the single models, without labels
FEWEST = 2  # texts by which `auto` can choose: a single one has nothing to differ from
PROBE_TEXTS = 100  # a task, for a rule that looks at texts

_Listed = Annotated[list[float], Field(min_length=1), Tag("listed")]
_Auto = Annotated[Literal["auto"], Tag("auto")]
_Scales = Annotated[_Listed | _Auto, Discriminator(lambda given: "auto" if isinstance(given, str) else "listed")]


class MergeSettings(Settings):
    """One merging rule over a few scales, of which labels choose; with `auto`, agreement with the single models does.

    `scales: auto` tries the rule's own candidates, and `rule: auto` with it those of several rules, as `loraloom merge
    --rule auto --scale auto` does; see analysis/agreement.py.
    """

    rule: str
    scales: _Scales
    options: dict[str, Any] = Field({})
    normalise: Normalise = Field(
        "none",
        description="make adapters equally loud first: by |dW| (norm), by what each does to its own inputs "
        "(response), or as `loraloom merge` decides it (auto)",
    )
    texts: int = Field(PROBE_TEXTS, ge=1, description="training texts a task for a rule that looks at texts")

    @model_validator(mode="before")
    @classmethod
    def _texts_as_meant(cls, given: Any) -> Any:
        """Let a rule that trains by texts have as many as help it, where nobody says how many."""
        return {"texts": own_texts(given["rule"]), **given} if isinstance(given, dict) and "rule" in given else given

    @field_validator("rule")
    @classmethod
    def _known_rule(cls, rule: str) -> str:
        if rule != AUTO and rule not in rule_names():
            raise ValueError(f"no merging rule is called {rule!r}; {did_you_mean(rule, [*rule_names(), AUTO])}")
        return rule

    @field_validator("options")
    @classmethod
    def _known_options(cls, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        rule = info.data.get("rule")  # one that is unknown has been told already
        problems = get_rule(rule).check(options)[1] if rule not in (None, AUTO) else []
        if rule == AUTO and options:
            problems = [f"{', '.join(options)}: options of a rule, which `auto` leaves open"]
        if problems:
            raise ValueError("; ".join(problems))
        return options

    @model_validator(mode="after")
    def _both_open(self) -> MergeSettings:
        if self.rule == AUTO and not self.auto:
            raise ValueError("a rule that is `auto` is chosen together with its scale: write `scales: auto`")
        return self

    @property
    def auto(self) -> bool:
        """Tell whether agreement with the single models chooses, without labels."""
        return self.scales == AUTO

    @property
    def listed(self) -> list[float]:
        """Return the scales of an entry that has them."""
        assert isinstance(self.scales, list)
        return self.scales

    def tried(self) -> list[MergeSettings]:
        """Return what is tried: the entry itself; of `auto` all candidates, a rule with its scales each."""
        if not self.auto:
            return [self]
        from loraloom.analysis.agreement import candidates_of  # here, because it loads transformers

        found = candidates_of(None if self.rule == AUTO else self.rule, self.options)
        return [
            self.model_copy(update={"rule": one.rule, "scales": list(one.scales), "options": dict(one.options)})
            for one in found
        ]

    def filled(self) -> dict[str, Any]:
        """Return the rule's options with its defaults filled in."""
        return {} if self.rule == AUTO else get_rule(self.rule).check(self.options)[0]

    @property
    def way(self) -> dict[str, Any]:
        """Return what tells this entry from another of the same rule: its options, and how it normalises if it does."""
        return self.filled() | ({} if self.normalise == "none" else {"normalise": self.normalise})

    def merges_as(self, other: MergeSettings) -> bool:
        """Tell whether `other` merges by the same rule in the same way, whatever the scales."""
        return (self.rule, self.way) == (other.rule, other.way)


def own_texts(rule: Any) -> int:
    """Return how many texts a task a rule looks at, where nobody says."""
    return DISTIL_TEXTS if rule in rule_names() and get_rule(rule).distils else PROBE_TEXTS


def ways_of(entries: list[MergeSettings]) -> list[MergeSettings]:
    """Return every way to merge that any entry tries, once, with all its scales."""
    ways: list[MergeSettings] = []
    for one in (one for entry in entries for one in entry.tried()):
        known = next((at for at, way in enumerate(ways) if way.merges_as(one)), None)
        if known is None:
            ways.append(one)
        else:
            scales = list(dict.fromkeys([*ways[known].listed, *one.listed]))
            ways[known] = ways[known].model_copy(update={"scales": scales})
    return ways
