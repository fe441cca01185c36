"""Merging: rules over low-rank updates, and `merge` which turns adapters into one adapter."""

from loraloom.merging.merger import Merged, merge, write_merged
from loraloom.merging.options import MergeOptions
from loraloom.merging.plan import Plan
from loraloom.merging.planning import make_plan
from loraloom.merging.readout import read_readout
from loraloom.merging.registry import Rule, get_rule, rule, rule_names
from loraloom.merging.rules import (  # noqa: F401 (importing a family registers its rules)
    distilled,
    entrywise,
    factors,
    fisher,
    learned,
    linear,
    regression,
    spectral,
    tensor,
    votes,
)

__all__ = [
    "MergeOptions",
    "Merged",
    "Plan",
    "Rule",
    "get_rule",
    "make_plan",
    "merge",
    "read_readout",
    "rule",
    "rule_names",
    "write_merged",
]
