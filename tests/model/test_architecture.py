"""What transformers makes of a config.json: names, classifiers, and configs of which it makes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

import tiny
from loraloom.model.architecture import classifier_config, names_in_model, unlikely_sizes


def test_tensors_that_transformers_joins_have_no_name_of_their_own() -> None:
    config = {**transformers.MixtralConfig(num_hidden_layers=1).to_dict(), "architectures": ["MixtralForCausalLM"]}
    experts = [f"model.layers.0.block_sparse_moe.experts.{expert}.w1.weight" for expert in range(2)]
    gate = "model.layers.0.block_sparse_moe.gate.weight"
    assert names_in_model(config, [*experts, gate]).names == {gate: "model.layers.0.mlp.gate.weight"}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "unheard-of"},
        {"model_type": ["llama"]},
        {"model_type": "llama", "num_hidden_layers": 10**9},
        {"model_type": "llama", "num_hidden_layers": "two"},
        {"model_type": "llama", "vocab_size": 10**30},
        {"model_type": "llava", "text_config": {"model_type": "llama", "num_hidden_layers": 10**9}},
        {"model_type": "llama", "architectures": {"a": 1}},
        {"model_type": "llama", "architectures": ["pipeline"], "num_hidden_layers": None},
    ],
)
def test_a_config_of_which_transformers_makes_nothing(config: Any) -> None:
    assert names_in_model(config, ["a.weight"]).names == {}
    assert classifier_config(config, {"score.weight": (2, 16)}, None, None) is None


def test_unlikely_sizes_are_named() -> None:
    assert unlikely_sizes({"text_config": {"num_hidden_layers": 10**9}}) == "num_hidden_layers is 1000000000"
    assert unlikely_sizes({"depths": [2, 10**9]}) == "depths is 1000000000"
    assert unlikely_sizes({"num_hidden_layers": 96, "vocab_size": 10**6, "layer_norm_eps": 1e-6, "layers": None}) == ""


def test_a_pooler_alone_makes_no_classifier() -> None:
    config = {**tiny.CONFIGS["bert"]().to_dict(), "architectures": ["BertForMaskedLM"]}
    pooler = {"bert.pooler.dense.weight": (16, 16), "bert.pooler.dense.bias": (16,)}
    assert classifier_config(config, pooler, "SEQ_CLS", None) is None
    assert classifier_config({**config, "architectures": ["BertForSequenceClassification"]}, pooler, None, None) == {}
