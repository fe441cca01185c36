"""Hashes and seeds keep their values from version to version: finished work is found, and starts are drawn, by them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from loraloom.adapters.peft import adapter_sha256
from loraloom.errors import LoraloomError
from loraloom.files.hashing import file_sha256, json_sha256, json_text, layer_seed, task_seed, write_json
from loraloom.model.load import base_sha256


def test_values_are_those_of_earlier_versions(tmp_path: Path) -> None:
    assert task_seed(0, "cola") == 153668280
    assert task_seed(7, "été") == 139588270
    assert layer_seed(3, "layer.0.query") == 38870659373231135
    content = ["evaluate", {"a": 1, "b": [0.5, None, "é"]}, {}]
    assert json_sha256(content) == "ed9d318677e12ae99b804b32240e18d4988736ebfc1e81901ba715f3e4aa46ec"
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 300_000)
    assert base_sha256(str(tmp_path)) == "0de94ea92268eabaa70e6cd281ccd921921b029742ed8628bf542a203f9ddf60"
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}\n')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"abc" * 700_000)
    assert adapter_sha256(tmp_path) == "1a2cd581a42e084f9c7af9bbd06b4946e05fa8558d9af90399b834d2b885b968"


def test_a_file_is_hashed_as_sha256sum_does(tmp_path: Path) -> None:
    content = b"0123456789" * 250_000  # more than one block
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(b"")
    assert file_sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()
    assert file_sha256(tmp_path / "a", tmp_path / "b", tmp_path / "a") == hashlib.sha256(2 * content).hexdigest()


def test_the_order_of_keys_does_not_count() -> None:
    assert json_sha256({"a": 1, "b": {"c": 2, "d": 3}}) == json_sha256({"b": {"d": 3, "c": 2}, "a": 1})
    assert json_sha256({"a": 1}) != json_sha256({"a": 1.5})
    with pytest.raises(ValueError, match="JSON"):
        json_sha256(float("nan"))


def test_a_number_that_is_not_finite_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    content = {"rule": "ties", "layers": {"layer.0": {"ranks": [1, float("inf")]}}}
    with pytest.raises(LoraloomError, match=r"layers\.layer\.0\.ranks\.1 is inf: not finite"):
        write_json(tmp_path / "loraloom.json", content)
    assert not (tmp_path / "loraloom.json").exists()


def test_text_is_read_back() -> None:
    content = {"b": "é\ud800", "a": [1, 2.5, None, True]}
    assert json.loads(json_text(content)) == content
    assert json_text({"b": 1, "a": 2}, sort_keys=True).index("a") < json_text({"b": 1, "a": 2}).index("a")
