"""Adapters that PEFT itself saved, against PEFT's own deltas and forward pass; and every refusal."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from loraloom.adapters.patterns import pattern_values, targeted
from loraloom.adapters.peft import CONFIG, WEIGHTS, adapter_sha256, read_adapter, read_provenance, write_adapter
from loraloom.adapters.together import compatibility_problems
from loraloom.adapters.update import Adapter, Update
from loraloom.errors import LoraloomError
from loraloom.merging import merge, write_merged

TOKENS = torch.arange(24).reshape(2, 12)


def bert() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=100, num_labels=3)).eval()


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, n_positions=32)).eval()


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=100, num_key_value_heads=2)).eval()


def train(base: PreTrainedModel, folder: Path, *, seed: int = 0, **settings: Any) -> dict[str, torch.Tensor]:
    """Save an adapter by PEFT with every trainable tensor drawn at random; return PEFT's own delta weights (m, n)."""
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default").detach()
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


SEQ_CLS = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
CAUSAL = {"task_type": "CAUSAL_LM"}
PATTERNS = {
    "rank_pattern": {r"layer.0.*\.query": 6, "value": 3},
    "alpha_pattern": {"value": 5, "^bert.encoder.layer.1.*query": 20},
}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "bert": (bert, SEQ_CLS),
    "rslora": (bert, {**SEQ_CLS, "use_rslora": True, "r": 4, "lora_alpha": 12}),
    "patterns": (bert, {**SEQ_CLS, **PATTERNS, "r": 4, "lora_alpha": 7}),
    "patterns and rslora": (bert, {**SEQ_CLS, **PATTERNS, "use_rslora": True}),
    "gpt2": (gpt2, {**CAUSAL, "target_modules": ["c_attn"], "fan_in_fan_out": True, "r": 3}),
    "llama": (llama, {**CAUSAL, "target_modules": "all-linear", "r": 2, "lora_alpha": 16}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_reads_what_peft_saved(kind, tmp_path) -> None:
    make, settings = KINDS[kind]
    deltas = train(make(), tmp_path, **settings)
    adapter = read_adapter(tmp_path)
    assert set(adapter.updates) == set(deltas)
    for name, delta in deltas.items():
        expected = delta.T if settings.get("fan_in_fan_out") else delta  # Conv1D keeps its weight transposed
        torch.testing.assert_close(adapter.updates[name].dense(), expected, atol=1e-6, rtol=1e-5)
    heads = {"classifier.weight", "classifier.bias"} if make is bert else set()
    assert set(adapter.head) == heads


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_gives_the_same_logits_in_peft(kind, tmp_path) -> None:
    make, settings = KINDS[kind]
    base = make()
    train(base, tmp_path / "one", **settings)
    write_adapter(read_adapter(tmp_path / "one"), tmp_path / "two", provenance={"made": "here"})
    logits = [
        PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / name))(TOKENS).logits for name in ("one", "two")
    ]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits[0], base(TOKENS).logits, atol=1e-2)
    assert read_provenance(tmp_path / "two") == {"made": "here"}
    assert adapter_sha256(tmp_path / "one") != adapter_sha256(tmp_path / "two")


def dense_sum(base: PreTrainedModel, deltas: list[dict[str, torch.Tensor]], factors: list[float]) -> PreTrainedModel:
    """Return `base` in float64 with the weighted deltas added to its weights."""
    model = copy.deepcopy(base).double()
    with torch.no_grad():
        for parts, factor in zip(deltas, factors, strict=True):
            for name, delta in parts.items():
                model.get_submodule(name).weight += factor * delta.double()
    return model


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).detach().norm() / expected.detach().norm())


def test_merged_classifier_has_the_logits_of_the_dense_reference(tmp_path) -> None:
    base = bert()
    kinds = ["bert", "rslora", "patterns"]
    deltas = [train(base, tmp_path / kind, seed=i, **KINDS[kind][1]) for i, kind in enumerate(kinds)]
    inputs = {kind: read_adapter(tmp_path / kind) for kind in kinds}
    weights = [0.5, -0.3, 0.8]
    merged = merge(inputs, "task_arithmetic", weights=weights, scale=0.7)
    folder = write_merged(merged, tmp_path / "merged")
    assert json.loads((folder / CONFIG).read_text())["rank_pattern"]  # the layers' ranks differ
    for kind in kinds:
        reference = dense_sum(base, deltas, [0.7 * w for w in weights])
        host = copy.deepcopy(base).double()
        head = load_file(folder / "heads" / f"{kind}.safetensors")
        own = load_file(tmp_path / kind / WEIGHTS)
        for name in ("weight", "bias"):
            assert torch.equal(head[f"classifier.{name}"], own[f"base_model.model.classifier.{name}"])
            getattr(reference.classifier, name).data.copy_(head[f"classifier.{name}"])
            getattr(host.classifier, name).data.copy_(head[f"classifier.{name}"])
        logits = PeftModel.from_pretrained(host, str(folder)).eval()(TOKENS).logits
        assert relative(logits, reference(TOKENS).logits) < 1e-5
        assert relative(logits, host(TOKENS).logits) < 1e-9  # PEFT changed `host` in place
        assert relative(logits, dense_sum(base, [], [])(TOKENS).logits) > 1e-2


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_merged_language_model_has_the_logits_of_the_dense_reference(kind, tmp_path) -> None:
    make, settings = KINDS[kind]
    base = make()
    deltas = [train(base, tmp_path / f"{i}", seed=i, **settings) for i in range(2)]
    merged = merge([read_adapter(tmp_path / f"{i}") for i in range(2)], "weighted")
    folder = write_merged(merged, tmp_path / "merged")
    logits = PeftModel.from_pretrained(copy.deepcopy(base).double(), str(folder)).eval()(TOKENS).logits
    assert relative(logits, dense_sum(base, deltas, [0.5, 0.5])(TOKENS).logits) < 1e-5


# refusals


@pytest.fixture
def saved(tmp_path) -> Path:
    train(bert(), tmp_path / "saved", **SEQ_CLS)
    return tmp_path / "saved"


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def edit_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora: DoRA rescales the base weight"),
        ({"bias": "lora_only"}, "bias: 'lora_only': trained biases would be lost"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changed the base weights; convert it"),
        ({"init_lora_weights": "olora"}, "'olora' changed the base weights"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens: acts on some tokens only"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', not 'LORA'"),
    ],
)
def test_refuses_configs_that_no_update_expresses(saved, changes, message) -> None:
    edit_config(saved, **changes)
    with pytest.raises(LoraloomError, match=message):
        read_adapter(saved)


def test_refuses_a_real_dora_adapter(tmp_path) -> None:
    train(bert(), tmp_path, **SEQ_CLS, use_dora=True)
    with pytest.raises(LoraloomError, match="use_dora"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{QUERY}.lora_B.weight"), "layer.0.attention.self.query has lora_A alone"),
        (
            lambda t: t[f"{QUERY}.lora_A.weight"].fill_(float("nan")),
            "query.lora_A.weight holds values that are not",
        ),
        (lambda t: t.update({f"{QUERY}.lora_A.weight": torch.ones(3, 32)}), r"\(3, 32\) .* do not multiply"),
        (
            lambda t: t.update({f"{QUERY}.lora_embedding_A": torch.ones(3, 32)}),
            "query has lora_A and lora_B and lora_embedding_A alone",
        ),
        (lambda t: [t.pop(key) for key in list(t) if "lora" in key], "holds no lora_A and lora_B"),
    ],
)
def test_refuses_tensors_that_are_no_updates(saved, change, message) -> None:
    edit_tensors(saved, change)
    with pytest.raises(LoraloomError, match=message):
        read_adapter(saved)


def test_all_that_is_wrong_is_told_at_once(saved) -> None:
    edit_config(saved, use_dora=True, bias="all")
    edit_tensors(saved, lambda t: t.pop(f"{QUERY}.lora_B.weight"))
    with pytest.raises(LoraloomError, match="3 problems") as caught:
        read_adapter(saved)
    for part in (str(saved), "use_dora", "bias: 'all'", "has lora_A alone"):
        assert part in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_refuses_a_truncated_file(saved, share) -> None:
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(content[: int(share * len(content))])
    with pytest.raises(LoraloomError, match=rf"{WEIGHTS} cannot be read .*half-written"):
        read_adapter(saved)


def test_refuses_a_missing_or_pickled_file(saved) -> None:
    (saved / WEIGHTS).unlink()
    with pytest.raises(LoraloomError, match=f"{WEIGHTS} is missing"):
        read_adapter(saved)
    (saved / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(LoraloomError, match=r"adapter_model\.bin is a pickle"):
        read_adapter(saved)


def test_refuses_broken_json_and_points_into_sub_folders(saved) -> None:
    with pytest.raises(LoraloomError, match="name one of its sub-folders: saved"):
        read_adapter(saved.parent)
    with pytest.raises(LoraloomError, match="nowhere: not an adapter folder: there is no such folder"):
        read_adapter(saved / "nowhere")
    (saved / CONFIG).write_text('{"peft_type": "LO')
    with pytest.raises(LoraloomError, match="not valid JSON"):
        read_adapter(saved)
    (saved / "loraloom.json").write_text("{")
    with pytest.raises(LoraloomError, match="not valid JSON"):
        read_provenance(saved)


# compatibility, dtypes, patterns


def adapter(shapes: dict[str, tuple[int, int]], base: str, path: str, **facts: Any) -> Adapter:
    updates = {name: Update(torch.ones(m, 2), torch.ones(2, n)) for name, (m, n) in shapes.items()}
    return Adapter(updates, {"peft_type": "LORA", "base_model_name_or_path": base}, path=Path(path), **facts)


def test_every_difference_is_told() -> None:
    one = adapter({"q": (4, 4), "v": (4, 4), "k": (4, 4)}, "base/a", "one")
    two = adapter({"q": (4, 4), "v": (4, 8), "up": (4, 4)}, "base/b", "two")
    three = adapter({"q": (9, 4), "v": (4, 4), "k": (4, 4)}, "base/a", "three")
    found = compatibility_problems([one, two, three], targets="same")
    assert found[0].startswith("base model: one has 'base/a', two has 'base/b'")
    assert found[1:] == [
        "one adapts k; two does not",
        "two adapts up; one does not",
        "v: one is 4 x 4, two is 4 x 8",
        "q: one is 4 x 4, three is 9 x 4",
    ]
    assert compatibility_problems([one, one]) == []


def test_one_base_in_two_folders_is_one_base(tmp_path) -> None:
    def written(name: str, base: str, fingerprint: str | None) -> Adapter:
        provenance = {"base_fingerprint": fingerprint} if fingerprint else {}
        return read_adapter(write_adapter(adapter({"q": (4, 4)}, base, name), tmp_path / name, provenance=provenance))

    assert not compatibility_problems([written("a", "/home/a/base", None), written("b", "/srv/base", None)])
    assert not compatibility_problems([written("c", "org/base", "f1"), written("d", "/srv/base", "f1")])
    for one, two in ((("e", "/x/base", "f1"), ("f", "/x/base", "f2")), (("g", "org/a", "f1"), ("h", "org/b", None))):
        (found,) = compatibility_problems([written(*one), written(*two)])
        assert found.startswith("base model: ")


def test_dtypes_are_kept_and_overflow_is_refused(tmp_path) -> None:
    head = {"classifier.weight": torch.ones(2, 4)}
    half = adapter({"q": (4, 4)}, "base", "half", head=head, dtype=torch.float16)
    write_adapter(half, tmp_path / "half", provenance={})
    tensors = load_file(tmp_path / "half" / WEIGHTS)
    assert tensors["base_model.model.q.lora_B.weight"].dtype == torch.float16
    assert tensors["base_model.model.classifier.weight"].dtype == torch.float32
    assert read_adapter(tmp_path / "half").dtype == torch.float16
    with pytest.raises(LoraloomError, match=r"q.lora_B.weight: overflows torch.float16"):
        write_adapter(half.scaled(1e12), tmp_path / "big", provenance={})
    assert not (tmp_path / "big").exists()


def test_ranks_of_modules_whose_path_ends_anothers(tmp_path) -> None:
    """PEFT matches the patterns from the end of the path; "q" must not set the rank of "deep.q"."""
    updates = {
        name: Update(torch.full((4, rank), float(rank)), torch.ones(rank, 4))
        for name, rank in (("q", 3), ("deep.q", 2), ("deep.v", 2))
    }
    write_adapter(Adapter(updates, {"peft_type": "LORA"}), tmp_path / "one", provenance={})
    config = json.loads((tmp_path / "one" / CONFIG).read_text())
    assert pattern_values(config["rank_pattern"], list(updates), config["r"]) == {"q": 3, "deep.q": 2, "deep.v": 2}
    for name, update in read_adapter(tmp_path / "one").updates.items():
        assert torch.equal(update.dense(), updates[name].dense())


def test_targets_match_as_in_peft() -> None:
    layers = ["encoder.layer.0.query", "encoder.layer.0.subquery"]
    assert targeted(layers, ["query"]) == layers[:1]
    assert targeted(layers, r".*\.0\.(query|value)") == layers[:1]
    assert targeted(layers, r"\.0\.query") == []
