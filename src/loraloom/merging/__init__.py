"""Merging: rules over low-rank updates, and `merge` which turns adapters into one adapter."""

from loraloom.merging import (  # noqa: F401 (importing a family registers its rules)
    activation,
    consensus,
    entrywise,
    factors,
    learned,
    linear,
    regression,
    spectral,
    tensor,
)
from loraloom.merging.merge import Merged, merge, write_merged
from loraloom.merging.plan import Plan, make_plan
from loraloom.merging.readout import read_readout
from loraloom.merging.rules import Rule, get_rule, rule, rule_names

__all__ = [
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
