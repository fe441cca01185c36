"""What is asked of a merge: the options that travel together from a command, a recipe or a call to the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from loraloom.adapters.together import Targets
from loraloom.merging.choice import AgreementFacts
from loraloom.merging.mends import ScreenFacts

Heads = Literal["keep", "average"]
Normalise = Literal["auto", "none", "norm", "response"]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class MergeOptions:
    """How adapters are merged. Nothing is checked here: `make_plan` tells all that is wrong at once.

    rule: name of the merging rule; `rule_names()` has all.
    options: the rule's own options by name; what is left out takes the rule's default.
    weights: one for each adapter, in their order, on its update before the rule; None takes the rule's own.
    scale: factor on the rule's result; None takes the rule's own.
    rank: the largest rank of the result, for any rule; None leaves it to the rule.
    seed: for rules that draw at random; each layer draws its own from it.
    heads: "keep" leaves each adapter's head to itself; "average" puts their weighted mean into the merged adapter.
    base: the name of the base model of all, where their configs spell it in ways that are not known to be one.
    agreement: what chose the rule or the scale, for the record; see `analysis.agreement`.
    targets: the layers of the result: the "union" of those that the adapters have, one that lacks a layer leaving it as
      it is; their "intersection"; or "same", which refuses adapters of different layers.
    stack: whether they were trained one on top of the other, in this order: their sum on the first one's base, whole.
    normalise: what is made equal of all adapters, layer by layer, before the weights: "norm", |dW|_F; "response", what
        each does to its own inputs, which takes statistics; "auto" is "norm" where the energies differ more than 3-fold
        and no weights were given, for rules that see nothing but updates, and else "none"; see `merging.normalise`.
    to: the tool that the result is written for, by the name of its dialect: see `adapters.dialects`; None takes that of
        the adapters.
    clip: brings the energy |dW|^2 of each adapter in each layer to at most so many times the adapters' median there.
    screening: what a screening found before, for the record; see `analysis.screening`.
    server: what the result is written for: a name of `adapters.servers.SERVERS`; None for none of them.
    dtype: of the result's weights; None takes the widest of the adapters'.
    """

    rule: str = "tsv"
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: Sequence[float] | None = None
    scale: float | None = None
    rank: int | None = None
    seed: int = 0
    heads: Heads = "keep"
    base: str | None = None
    agreement: AgreementFacts | None = None
    targets: Targets = "union"
    stack: bool = False
    normalise: Normalise = "auto"
    to: str | None = None
    clip: float | None = None
    server: str | None = None
    screening: ScreenFacts | None = None
    dtype: Dtype | None = None
