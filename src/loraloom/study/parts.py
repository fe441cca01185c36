"""What a study makes: the adapters of an init and seed, their merges, and each of these evaluated at a scale."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from loraloom.adapters.peft import read_provenance
from loraloom.study import stages
from loraloom.study.entries import MergeSettings
from loraloom.study.inputs import Output
from loraloom.study.recipe import slug

GIVEN = "given adapters"  # the init of a recipe that brings its adapters


@dataclass(frozen=True)
class Trained:
    """The adapters of one init and seed, by task: as they start, as trained, evaluated alone, and what they answer.

    own: their answers to the few texts by which merges are compared with them; empty where none are.
    """

    init: str
    seed: int
    starts: dict[str, Output] = field(default_factory=dict)
    adapters: dict[str, Output] = field(default_factory=dict)
    singles: dict[str, Output] = field(default_factory=dict)
    own: dict[str, Output] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Return the name of this init and seed in stages and folders."""
        return f"{slug(self.init)}.s{self.seed}"

    def merged_by(self, rule: str) -> str:
        """Return the name of their merge by a rule in stages."""
        return f"{self.label}.{rule}"


@dataclass(frozen=True)
class Merges:
    """The adapters of one init and seed merged in one way; by scale, their held-out evaluation and agreement."""

    trained: Trained
    settings: MergeSettings
    merged: Output
    heldout: dict[float, Output] = field(default_factory=dict)
    distances: dict[float, Output] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Return the name of this merge in stages."""
        return self.trained.merged_by(self.settings.rule)


@dataclass(frozen=True)
class Choice:
    """A rule and scale chosen for an entry of the recipe, for heads as trained or aligned."""

    entry: MergeSettings
    aligned: bool

    @property
    def by(self) -> Literal["labels", "agreement"] | None:
        """Return who chose: nobody where the entry leaves nothing open."""
        if self.entry.auto:
            return "agreement"
        return "labels" if len(self.entry.listed) > 1 else None


@dataclass(frozen=True)
class Evaluated:
    """One merged adapter at one scale: at scale 1, its held-out and, where chosen, test evaluation; its agreement.

    chosen: what of the recipe it is the answer to; empty where it was tried alone.
    """

    merged: Output
    settings: MergeSettings
    scale: float
    heldout: Output
    test: Output | None
    chosen: tuple[Choice, ...]
    distances: Output | None = None


def merged_facts(merged: Output) -> dict[str, Any]:
    """Return rule, space, options and output rank of a merged adapter; normalising counts as an option.

    What `auto` came to stands beside it: the same recipe may ask for that by name too.
    """
    facts = read_provenance(merged.path / stages.ADAPTER)
    ranks = [layer["rank"] for layer in facts["layers"].values()]
    way = facts["normalise"] if facts.get("normalise_from", "asked") == "asked" else f"auto: {facts['normalise']}"
    options = facts["options"] | ({} if way == "none" else {"normalise": way})
    return {"rule": facts["rule"], "space": facts["space"], "options": options, "output_rank": max(ranks)}
