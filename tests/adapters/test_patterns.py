"""Patterns match as in PEFT, and none runs for longer than a moment."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings, strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from loraloom.adapters.patterns import pattern_values, targeted
from loraloom.errors import LoraloomError

LAYERS = [f"model.layers.{i}.self_attn.{name}" for i in (0, 1, 11) for name in ("q_proj", "v_proj")] + ["q_proj"]
KEYS = [
    *("q_proj", "^q_proj", r"layers\.1\..*", "layers.1", r"(0|11)\.self_attn\.(q|v)_proj", "a|q_proj", ".*", ""),
    *("[qv]_proj", r"layers\.\d+\.self_attn\.q_proj", "proj", "_proj", "model.layers.0.self_attn.q_proj$"),
]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(KEYS), unique=True, max_size=4))
def test_values_are_those_of_the_key_that_peft_takes(keys: list[str]) -> None:
    patterns = {key: index for index, key in enumerate(keys)}
    expected = {module: patterns.get(get_pattern_key(keys, module), -1) for module in LAYERS}
    assert pattern_values(patterns, LAYERS, -1) == expected


class Config:
    """The fields of a LoraConfig by which PEFT finds its layers."""

    target_parameters = exclude_modules = layers_to_transform = layers_pattern = modules_to_save = None

    def __init__(self, targets: str | list[str]) -> None:
        self.target_modules = targets


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj"],
        ["self_attn.q_proj", "v"],
        [],
        r".*\.1\..*",
        r"(?i).*Q_PROJ",
        "q_proj",
        r"model\.layers\.(0|11)\..*v.*",
    ],
)
def test_targets_are_those_of_peft(targets: str | list[str]) -> None:
    expected = [module for module in LAYERS if check_target_module_exists(Config(targets), module)]
    assert targeted(LAYERS, targets) == expected


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("(.*)*x", "cannot be matched in 1 s"),
        (r"(\w+\.?)+!", "cannot be matched in 1 s"),
        (".*.*.*.*.*.*.*.*!", "cannot be matched in 1 s"),
        ("[", "no regular expression"),
        ("(q_proj", "no regular expression"),
        ("*", "no regular expression"),
        ("(" * 1500, "no regular expression"),
        ("a{99999999999}", "no regular expression"),
        ("x" * 3000, "a pattern of 3000 characters"),
    ],
)
def test_patterns_that_are_none_or_never_end_are_told(pattern: str, told: str) -> None:
    start = time.process_time()
    with pytest.raises(LoraloomError, match=f"alpha_pattern: .*{told}"):
        pattern_values({"q_proj": 2, pattern: 1}, LAYERS, 0, "alpha_pattern")
    with pytest.raises(LoraloomError, match=f"target_modules: .*{told}"):
        targeted(LAYERS, pattern)
    assert time.process_time() - start < 1
