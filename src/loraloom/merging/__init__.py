"""Merging: rules over low-rank updates, and `merge` which turns adapters into one adapter."""

from loraloom.merging import entrywise, linear, spectral  # noqa: F401 (importing a family registers its rules)
from loraloom.merging.merge import Merged, merge, write_merged
from loraloom.merging.rules import Rule, get_rule, rule, rule_names

__all__ = ["Merged", "Rule", "get_rule", "merge", "rule", "rule_names", "write_merged"]
