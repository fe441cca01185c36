"""adapter_config.json of strangers: told by field, never followed; and one config for several adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from peft import LoraConfig
from safetensors.torch import save_file

from loraloom.adapters.config import CONFIG, merged_config, read_config
from loraloom.adapters.peft import WEIGHTS, read_adapter
from loraloom.errors import LoraloomError

PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q", "v"]}
MODULES = [f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in "qv"]


def folder_of(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({**PLAIN, **changes}))
    shapes = {"A": (2, 5), "B": (6, 2)}
    tensors = {f"base_model.model.{m}.lora_{x}.weight": torch.ones(shapes[x]) for m in MODULES for x in "AB"}
    save_file(tensors, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lora_alpha": None}, "lora_alpha: Input should be a valid number, not None"),
        ({"lora_alpha": "x"}, "lora_alpha: Input should be a valid number, not 'x'"),
        ({"r": 0}, "r: Input should be greater than or equal to 1, not 0"),
        ({"r": 2.5}, "r: "),
        ({"r": True}, "r: Input should be a valid integer, not True"),
        ({"r": 10**30}, "r: "),
        ({"alpha_pattern": [1]}, r"alpha_pattern: Input should be a valid dictionary, not \[1\]"),
        ({"alpha_pattern": {"q": "x"}}, "alpha_pattern: 'q': Input should be a valid number, not 'x'"),
        ({"rank_pattern": {"q": None}}, "rank_pattern: 'q': "),
        ({"alpha_pattern": {"[": 4}}, r"alpha_pattern: '\[' is no regular expression"),
        ({"alpha_pattern": {"(.*)*x": 4}}, r"alpha_pattern: '\(\.\*\)\*x' cannot be matched"),
        ({"target_modules": "(.*)*x"}, "target_modules: .* cannot be matched"),
        ({"exclude_modules": "("}, "exclude_modules: .* is no regular expression"),
        ({"modules_to_save": ["(.*)*x"]}, "modules_to_save: .* cannot be matched"),
        ({"layers_pattern": ["(.*)*x"]}, "layers_pattern: .* cannot be matched"),
        ({"target_modules": 5}, "target_modules: "),
        ({"target_modules": [["q"]]}, "target_modules: "),
        ({"target_parameters": "experts"}, "target_parameters: "),
        ({"modules_to_save": {"a": 1}}, "modules_to_save: "),
        ({"use_rslora": "yes"}, "use_rslora: Input should be a valid boolean, not 'yes'"),
        ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path: "),
        ({"task_type": 3}, "task_type: "),
        ({"auto_mapping": "x"}, "auto_mapping: "),
        ({"init_lora_weights": {}}, "init_lora_weights: "),
        ({"fan_in_fan_out": "x" * 5000}, "fan_in_fan_out: "),
    ],
)
def test_a_field_of_a_wrong_type_is_told_by_name(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(LoraloomError, match=told) as caught:
        read_adapter(folder_of(tmp_path / "one", **changes))
    assert len(str(caught.value)) < 600


def test_all_fields_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(LoraloomError, match="3 problems"):
        read_config(folder_of(tmp_path / "one", r="x", lora_alpha=[], bias=1))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
FIELDS = sorted({*LoraConfig().to_dict(), "peft_type", "unknown"})


@given(changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3))
def test_any_value_in_any_field_is_read_or_told(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any"
    try:
        read_adapter(folder_of(folder, **changes))
    except LoraloomError as error:
        told = str(error)
        assert str(folder) in told


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({CONFIG: b'{"fine_tune_type": "lora", "lora_parameters": {}}', "adapters.safetensors": b""}, "of MLX"),
        ({"adapters.safetensors": b""}, "of MLX"),
        ({"pytorch_lora_weights.safetensors": b""}, "of diffusers"),
        ({CONFIG: b'{"peft_type": "IA3"}'}, "peft_type is 'IA3', not 'LORA'"),
        ({CONFIG: b"[]"}, "holds no JSON object"),
        ({"x.txt": b""}, "not an adapter folder"),
    ],
)
def test_folders_of_other_tools_are_named(files: dict[str, bytes], told: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(LoraloomError, match=told):
        read_adapter(tmp_path)


def test_a_folder_that_is_not_there_is_told_with_those_beside_it(tmp_path: Path) -> None:
    (tmp_path / "support-v2").mkdir()
    (tmp_path / "support-v2" / CONFIG).write_text("{}")
    with pytest.raises(LoraloomError, match=r"suport-v2: not an adapter folder: there is no such folder") as error:
        read_adapter(tmp_path / "suport-v2")
    assert error.value.hint == "did you mean 'support-v2'?"
    with pytest.raises(LoraloomError, match=r"elsewhere: not an adapter folder: there is no such") as error:
        read_adapter(tmp_path / "elsewhere")
    assert "did you mean" not in error.value.hint


def test_a_folder_of_the_hubs_cache_names_the_snapshot_in_it(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("ab" * 20)
    snapshot.mkdir(parents=True)
    (snapshot / CONFIG).write_text("{}")
    with pytest.raises(LoraloomError) as error:
        read_adapter(tmp_path / "models--org--name")
    assert f"snapshots/{'ab' * 20}" in error.value.hint


def test_a_whole_model_is_told_as_one(tmp_path: Path) -> None:
    save_file({"model.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LoraloomError, match=r"a whole model, not an adapter: its tensors are called model.norm.weight"):
        read_adapter(tmp_path)


# one config for several

STRANGE = {
    "megatron_config": {"x": 1},
    "megatron_core": "evil_module",
    "auto_mapping": {"base_model_class": "X", "parent_library": "evil_module"},
    "unknown_key": "u",
}
CONFIGS = st.fixed_dictionaries(
    {"target_modules": st.sampled_from([["q", "v"], ["v", "q"], "all-linear", r".*\.(q|v)", MODULES, None])},
    optional={
        "task_type": st.sampled_from(["CAUSAL_LM", "SEQ_CLS", None]),
        "revision": st.sampled_from(["main", "evil", None]),
        "lora_dropout": st.sampled_from([0.0, 0.1]),
        "fan_in_fan_out": st.booleans(),
        "base_model_name_or_path": st.sampled_from(["org/base", "/home/me/base", "ORG/base", "unsloth/base-bnb-4bit"]),
        "modules_to_save": st.sampled_from([["score"], ["classifier"], None]),
        "layers_to_transform": st.sampled_from([[0], None]),
        "exclude_modules": st.sampled_from(["(.*)*x", ["k"], None]),
        "use_rslora": st.booleans(),
        **{key: st.just(value) for key, value in STRANGE.items()},
    },
)


@given(st.lists(CONFIGS, min_size=1, max_size=4), st.randoms(), st.booleans())
def test_one_config_in_any_order_with_nothing_strange(configs: list[dict[str, Any]], chance: Any, head: bool) -> None:
    configs = [{**PLAIN, **config} for config in configs]
    config, dropped = merged_config(configs, [MODULES] * len(configs), MODULES, None, with_head=head)
    mixed = list(configs)
    chance.shuffle(mixed)
    assert merged_config(mixed, [MODULES] * len(mixed), MODULES, None, with_head=head) == (config, dropped)
    assert not set(STRANGE) & set(config)
    assert set(dropped) >= {key for one in configs for key in STRANGE if key in one}
    assert "home" not in json.dumps(config)
    assert "*" not in json.dumps(config)  # no pattern out of a file
    for field in ("task_type", "revision", "lora_dropout"):
        values = [one.get(field) for one in configs]
        agreed = all(value == values[0] for value in values)
        assert config.get(field) in ((values[0], None) if agreed else (None,))
        assert (field in dropped) == (not agreed)
    LoraConfig(**{key: value for key, value in config.items() if key != "peft_type"})  # PEFT takes it


def test_a_base_that_was_named_is_written(tmp_path: Path) -> None:
    configs = [{**PLAIN, "base_model_name_or_path": name} for name in ("org/a", "other/b")]
    for name, written in (("org/c", "org/c"), ("/srv/c", "c")):
        config, _ = merged_config(configs, [MODULES] * 2, MODULES, name, with_head=False)
        assert config["base_model_name_or_path"] == written
