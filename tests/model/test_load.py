"""Base models that cannot be used: each is told with the file and the next step; and what loading promises."""

from __future__ import annotations

import ast
import io
import json
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny
from loraloom.errors import LoraloomError
from loraloom.model import load as base_module
from loraloom.model.load import (
    base_folder,
    base_sha256,
    head_modules,
    load_backbone,
    load_classifier,
    load_tokenizer,
)
from loraloom.statistics.collect import collect_statistics, fingerprint


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


# --- without a head ------------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TOKENS = {"vocab_size": 27, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def granite() -> transformers.PreTrainedModel:
    config = transformers.GraniteConfig(**SMALL, **TOKENS, num_key_value_heads=1)
    return transformers.GraniteForCausalLM(config)


def pegasus() -> transformers.PreTrainedModel:
    layers = {
        f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in (("layers", 1), ("ffn_dim", 24))
    }
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.PegasusConfig(**TOKENS, **layers, **heads, d_model=16, decoder_start_token_id=0)
    return transformers.PegasusForConditionalGeneration(config)


@pytest.mark.parametrize("kind", [granite, pegasus])
def test_a_base_that_no_classifier_knows_has_the_layers_of_its_own_adapters(kind: Any, tmp_path: Path) -> None:
    whole = kind().eval()
    whole.save_pretrained(tmp_path)
    tiny.tokenizer("t5" if kind is pegasus else "llama").save_pretrained(tmp_path)
    refused(lambda: load_classifier(str(tmp_path), 2), "sequence classifier")
    backbone = load_backbone(str(tmp_path))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    batch = {"input_ids": torch.tensor([[5, 6, 7, 2], [8, 9, 2, 0]]), "attention_mask": mask}
    shifted = {"decoder_input_ids": torch.tensor([[0, 5, 6, 7], [0, 8, 9, 2]]), "decoder_attention_mask": mask}
    targets = ["q_proj", "v_proj"]
    seen = collect_statistics(backbone, [batch], targets)
    want = collect_statistics(whole, [{**batch, **(shifted if kind is pegasus else {})}], targets)
    assert seen.layers == want.layers
    assert seen.fingerprint == want.fingerprint == fingerprint(whole, seen.layers)
    assert seen.tokens == want.tokens
    for name, moment in want.moments.items():
        torch.testing.assert_close(seen.moments[name].as_gram(), moment.as_gram())


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama", "gpt2", "t5"])
def test_a_base_that_can_classify_has_the_layers_of_its_classifier(kind: str, tmp_path: Path) -> None:
    folder = str(tiny.base_folder(kind, tmp_path))
    layers = [name for name, _ in load_backbone(folder).named_modules() if name.endswith(tuple(tiny.TARGETS[kind]))]
    assert fingerprint(load_backbone(folder), layers) == fingerprint(load_classifier(folder, 3), layers)


def test_a_backbone_whose_weights_are_of_another_model(tmp_path: Path) -> None:
    granite().save_pretrained(tmp_path)
    tiny.tokenizer("llama").save_pretrained(tmp_path)
    save_file({"other.weight": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused(lambda: load_backbone(str(tmp_path)), "its weights lack", "not of one model")


# --- bases that cannot be used -------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [load_backbone, load_tokenizer, lambda base: load_classifier(base, 2)])
def test_code_that_comes_with_a_base_never_runs(load: Any, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("the person at the terminal was asked"))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\ny\n"))
    mark = bert / "it-ran"
    (bert / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\nfrom transformers import BertConfig as Own\n")
    config = json.loads((bert / "config.json").read_text())
    classes = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForSequenceClassification"), "own.Own")
    own = {"auto_map": {**classes, "AutoTokenizer": ["own.Own", None]}}
    (bert / "config.json").write_text(json.dumps({**config, **own}))
    load(str(bert))  # transformers knows this architecture, and uses its own code
    (bert / "config.json").write_text(json.dumps({**config, **own, "model_type": "unheard-of"}))
    (bert / "tokenizer_config.json").write_text(json.dumps(own))
    refused(lambda: load(str(bert)), str(bert), "needs code of its own", "does not run")
    assert not mark.exists()


def test_every_load_forbids_code_that_comes_with_a_base() -> None:
    """LoraConfig is read from JSON alone, PeftModel lays an adapter over a model that is there."""
    source = Path(base_module.__file__).parent.parent
    calls = [
        (path.name, call)
        for path in source.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
        if call.func.attr in ("from_pretrained", "from_config")
        and ast.unparse(call.func.value) not in ("LoraConfig", "PeftModel")
    ]
    allowing = [name for name, call in calls if "trust_remote_code=False" not in ast.unparse(call)]
    assert len(calls) >= 4
    assert not allowing


def test_an_adapter_is_no_base(bert: Path) -> None:
    (bert / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    for load in (base_folder, base_sha256, load_tokenizer, load_backbone):
        refused(lambda load=load: load(str(bert)), str(bert), "adapter_config.json", "name the base")


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


@pytest.mark.parametrize(
    ("kind", "change", "told"),
    [
        ("bert", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, which no model has"),
        ("bert", {"vocab_size": 10**8}, "a model of 1.6e+09 values"),
        ("bert", {"max_position_embeddings": 10**12}, "describes a model of"),
        ("gpt2", {"n_positions": 10**8}, "a model of 1.6e+09 values"),
        ("llama", {"hidden_size": 2**40}, "its weights have"),
        ("llama", {"vocab_size": 10**30}, "cannot be loaded"),
    ],
)
def test_a_config_of_absurd_size_takes_neither_time_nor_memory(
    kind: str, change: Any, told: str, tmp_path: Path
) -> None:
    folder = tiny.base_folder(kind, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    refused(lambda: load_backbone(str(folder)), str(folder), told)
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/tmp/model.safetensors", ["x"], 5, ""])
def test_an_index_that_leads_out_of_the_folder(name: Any, bert: Path) -> None:
    weights = bert / "model.safetensors"
    (bert.parent / "other").mkdir()
    weights.rename(bert.parent / "other" / "model.safetensors")
    index = {"weight_map": dict.fromkeys(load_file(bert.parent / "other" / "model.safetensors"), name)}
    (bert / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(lambda: load_backbone(str(bert)), str(bert))
    for content in ("[" * 100_000, "5", '{"weight_map": 5}'):
        (bert / "model.safetensors.index.json").write_text(content)
        refused(lambda: load_classifier(str(bert), 2), str(bert), "model.safetensors.index.json")


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
