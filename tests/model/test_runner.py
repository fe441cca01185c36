"""Features and logits against PEFT's own forward pass, for every kind of base model; and every refusal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import GraniteConfig, GraniteForCausalLM

import tiny
from loraloom.adapters.heads import Head
from loraloom.adapters.peft import read_adapter
from loraloom.adapters.update import Adapter, Update
from loraloom.errors import LoraloomError
from loraloom.model.layers import layer_shape, linear_layers
from loraloom.model.load import head_modules, load_classifier, load_tokenizer
from loraloom.model.runner import Evaluator, evaluate, labels, switched_in
from loraloom.model.tokens import batches, encode
from loraloom.settings import StatisticsSettings
from loraloom.statistics.collect import fingerprint
from loraloom.statistics.texts import make_atlas
from loraloom.tasks.metrics import metric_value
from loraloom.tasks.task import Task

TASK = tiny.task(rows=24)


def adapter_folder(base: str, kind: str, folder: Path, *, seed: int = 0, outputs: int = 2) -> Path:
    """Save a PEFT adapter with random factors and a random head, as training would leave it."""
    model = load_classifier(base, outputs, seed=seed)
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=tiny.TARGETS[kind],
        use_rslora=True,
        fan_in_fan_out=kind == "gpt2",
        modules_to_save=head_modules(model),
        task_type="SEQ_CLS",
    )
    peft_model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    peft_model.save_pretrained(folder)
    return folder


def peft_logits(base: str, folder: Path, texts: list[str], *, outputs: int = 2) -> Tensor:
    """One text at a time, so without any padding; the backbone of another seed, as a user would load it."""
    model: Any = PeftModel.from_pretrained(load_classifier(base, outputs, seed=99), str(folder)).eval()
    tokenizer = load_tokenizer(base)
    with torch.no_grad():
        return torch.cat([model(**tokenizer([text], return_tensors="pt")).logits for text in texts])


KINDS = [(kind, side) for kind in tiny.CONFIGS for side in ("right", "left") if side == "right" or kind in "llama gpt2"]


@pytest.mark.parametrize(("kind", "side"), KINDS)
def test_logits_are_those_of_peft(kind: str, side: str, tmp_path: Path) -> None:
    base = str(tiny.base_folder(kind, tmp_path / "base", padding_side=side))
    evaluator = Evaluator(base, batch_size=5)
    before = {name: tensor.clone() for name, tensor in evaluator.model.named_parameters()}
    encoded = evaluator.encode(TASK.test)
    assert len({len(row["input_ids"]) for row in encoded}) > 3
    # GPT-2 counts padding into its positions, so left-padded texts are only what they are when batched alone
    if (kind, side) == ("gpt2", "left"):
        evaluator.batch_size = 1
    for seed in (1, 2):  # the second must not see the first
        folder = adapter_folder(base, kind, tmp_path / str(seed), seed=seed)
        adapter = read_adapter(folder)
        head = Head.of(adapter.head)
        features = evaluator.features(adapter.updates, head, encoded)
        found = head.logits(features)
        expected = peft_logits(base, folder, list(TASK.test["text_a"]))
        assert (found - expected).norm() < 1e-5 * expected.norm()
        assert expected.std(0).min() > 1e-3  # texts do differ
        value = evaluate(evaluator, adapter.updates, head, TASK).value
        assert value == metric_value("accuracy", expected, labels(TASK, "test"))
    _unchanged(evaluator, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in evaluator.model.modules())


def _unchanged(evaluator: Evaluator, before: dict[str, Tensor]) -> None:
    after = dict(evaluator.model.named_parameters())
    assert list(after) == list(before)
    assert not [name for name, tensor in before.items() if not torch.equal(after[name], tensor)]


@pytest.mark.parametrize("kind", ["roberta", "t5"])
def test_the_models_own_head_comes_back_and_gradients_outlive_it(kind: str, tmp_path: Path) -> None:
    """Heads of two layers, of which the first stands in the model while it runs: also after an error."""
    base = str(tiny.base_folder(kind, tmp_path / "base"))
    evaluator = Evaluator(base)
    before = {name: tensor.clone() for name, tensor in evaluator.model.named_parameters()}
    adapters = [read_adapter(adapter_folder(base, kind, tmp_path / str(seed), seed=seed)) for seed in (1, 2)]
    batch = dict(next(batches(evaluator.encode(TASK.test), evaluator.tokenizer, 4))[1])

    def slope(adapter: Adapter, in_between: Callable[[], object]) -> float:
        scale = torch.ones((), requires_grad=True)
        scaled = {path: Update(scale * update.B, update.A) for path, update in adapter.updates.items()}
        with evaluator.running(scaled, Head.of(adapter.head)) as run:
            features = run(batch)
        in_between()
        features.square().sum().backward()
        return float(scale.grad)  # type: ignore[arg-type]

    alone = slope(adapters[0], lambda: None)
    assert slope(adapters[0], lambda: slope(adapters[1], lambda: None)) == alone != 0
    with pytest.raises(KeyError), evaluator.running({}, Head.of(adapters[1].head)):
        raise KeyError
    _unchanged(evaluator, before)


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_statistics_are_of_the_layers_that_adapters_of_a_classifier_have(kind: str, tmp_path: Path) -> None:
    base = str(tiny.base_folder(kind, tmp_path / "base"))
    adapter = read_adapter(adapter_folder(base, kind, tmp_path / "adapter"))
    seen = make_atlas(base, tiny.TARGETS[kind], StatisticsSettings(atlas_texts=3, max_length=16))
    assert sorted(seen.layers) == sorted(adapter.updates)
    assert seen.fingerprint == fingerprint(load_classifier(base, 3, seed=5), seen.layers)


def test_a_base_that_cannot_classify_gets_its_statistics_and_no_metric(tmp_path: Path) -> None:
    config = GraniteConfig(
        vocab_size=len(tiny.WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    whole = GraniteForCausalLM(config)
    whole.save_pretrained(tmp_path)
    tiny.tokenizer("llama").save_pretrained(tmp_path)
    seen = make_atlas(str(tmp_path), ["q_proj", "v_proj"], StatisticsSettings(atlas_texts=3, max_length=16))
    assert "model.layers.1.self_attn.v_proj" in seen.layers
    assert seen.fingerprint == fingerprint(whole, seen.layers)
    evaluator = Evaluator(str(tmp_path))
    with pytest.raises(LoraloomError, match="has no layer score"):
        evaluator.features({}, Head.of({"score.weight": torch.ones(2, 16)}), evaluator.encode(TASK.test))


def test_a_padding_token_within_the_text(tmp_path: Path) -> None:
    """Where the end token pads, transformers takes the last token that is another: so do the features."""
    base = tiny.base_folder("llama", tmp_path / "base")
    config = base / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"pad_token": "<pad>"', '"pad_token": "</s>"'))
    folder = adapter_folder(str(base), "llama", tmp_path / "adapter")
    adapter, evaluator = read_adapter(folder), Evaluator(str(base), batch_size=2)
    assert evaluator.tokenizer.pad_token_id == 2
    encoded = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in ([5, 6, 2], [7, 8, 9, 10, 2])]
    head = Head.of(adapter.head)
    found = head.logits(evaluator.features(adapter.updates, head, encoded))
    model: Any = PeftModel.from_pretrained(load_classifier(str(base), 2), str(folder)).eval()
    with torch.no_grad():
        expected = torch.cat([model(input_ids=torch.tensor([row["input_ids"]])).logits for row in encoded])
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_a_fresh_pooler_goes_with_the_adapter(tmp_path: Path) -> None:
    """A base without pooler weights: another load draws another pooler, so the adapter must bring its own."""
    from safetensors.torch import load_file, save_file

    base = tiny.base_folder("bert", tmp_path / "base")
    weights = {k: v for k, v in load_file(base / "model.safetensors").items() if "pooler" not in k}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    folder = adapter_folder(str(base), "bert", tmp_path / "adapter", seed=4)
    adapter = read_adapter(folder)
    assert "bert.pooler.dense.weight" in adapter.head
    head, evaluator = Head.of(adapter.head), Evaluator(str(base))
    found = head.logits(evaluator.features(adapter.updates, head, evaluator.encode(TASK.test)))
    expected = peft_logits(str(base), folder, list(TASK.test["text_a"]))
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_pairs_regression_and_an_empty_update(tmp_path: Path) -> None:
    base = str(tiny.base_folder("bert", tmp_path / "base"))
    plain = tiny.task("level", regression=True)
    pairs = {split: getattr(plain, split).add_column("text_b", ["tea was good"] * len(getattr(plain, split)))
             for split in ("train", "heldout", "test")}  # fmt: skip
    task = Task("level", None, "pearson_spearman", **pairs)
    folder = adapter_folder(base, "bert", tmp_path / "adapter", outputs=1)
    adapter, evaluator = read_adapter(folder), Evaluator(base)
    head = Head.of(adapter.head)
    model: Any = PeftModel.from_pretrained(load_classifier(base, 1), str(folder)).eval()
    coded = load_tokenizer(base)(
        list(task.test["text_a"]), list(task.test["text_b"]), padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = model(**coded).logits
        with model.disable_adapter():
            assert not torch.allclose(model(**coded).logits, expected)
    found = evaluate(evaluator, adapter.updates, head, task)
    assert found.value == pytest.approx(metric_value("pearson_spearman", expected, labels(task, "test")), abs=1e-6)
    assert labels(task, "test").dtype == torch.float32
    bare = evaluator.features({}, head, evaluator.encode(task.test))
    zero = {path: Update(0 * update.B, update.A) for path, update in adapter.updates.items()}
    assert torch.equal(bare, evaluator.features(zero, head, evaluator.encode(task.test)))


def test_refusals(tmp_path: Path) -> None:
    base = str(tiny.base_folder("roberta", tmp_path / "base"))
    adapter = read_adapter(adapter_folder(base, "roberta", tmp_path / "adapter"))
    evaluator, head = Evaluator(base), Head.of(adapter.head)
    encoded = evaluator.encode(TASK.test)
    query = "roberta.encoder.layer.0.attention.self.query"
    good = adapter.updates[query]
    updates = [
        ({query.replace("query", "qeury"): good}, "has no layer .*qeury"),
        ({"roberta.encoder": good}, "has no layer roberta.encoder"),
        ({query: Update(good.B, good.A[:, :7])}, "update is 16 x 7, the base model's layer 16 x 16"),
    ]
    for wrong, message in updates:
        with pytest.raises(LoraloomError, match=message):
            evaluator.features({**adapter.updates, **wrong}, head, encoded)
        assert not any(module._forward_hooks for module in evaluator.model.modules())
    dense = "classifier.dense.weight"
    heads = [
        (Head.of({"score.weight": torch.ones(2, 16)}), "has no layer score"),
        (Head({**head.tensors, "classifier.odd.weight": torch.ones(3)}, head.last), "has no classifier.odd.weight"),
        (Head({**head.tensors, dense: torch.ones(1, 16)}, head.last), r"dense.weight is \(1, 16\)"),
        (Head({**head.tensors, f"{head.last}.weight": torch.ones(2, 9)}, head.last), "reads 9 features, the model's"),
    ]
    for wrong_head, message in heads:
        with pytest.raises(LoraloomError, match=message):
            evaluator.features({}, wrong_head, encoded)


def test_switched_in_leaves_again_after_an_error(tmp_path: Path) -> None:
    model = load_classifier(str(tiny.base_folder("bert", tmp_path / "base")), 2).eval()
    ids = torch.arange(3, 13).reshape(2, 5)
    layer = "bert.encoder.layer.1.output.dense"
    B, A = torch.randn(16, 2), torch.randn(2, 24)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with switched_in(model, {layer: Update(B, A)}):
            inside = model(input_ids=ids).logits
        with pytest.raises(KeyError), switched_in(model, {layer: Update(B, A)}):
            raise KeyError
        assert torch.equal(model(input_ids=ids).logits, before)
        model.get_parameter(f"{layer}.weight").add_(B @ A)
        assert (model(input_ids=ids).logits - inside).norm() < 1e-5 * inside.norm()
        assert not torch.allclose(inside, before)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_without_gradients_weights_take_updates_of_any_rank_and_come_back(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal to the update on the output to float32 rounding, and told apart by the hooks; the rest keep hooks."""
    model = load_classifier(str(tiny.base_folder(kind, tmp_path / "base")), 2).eval()
    ids = torch.arange(3, 13).reshape(2, 5)
    layers = {name: layer for name, layer in linear_layers(model).items() if "layer.1." in name or ".h.1." in name}
    updates = {
        name: Update(0.1 * torch.randn(m, 12), torch.randn(12, n))
        for name, (n, m) in ((name, layer_shape(layer)) for name, layer in layers.items())
    }
    own = {name: layer.weight for name, layer in layers.items()}

    def ask() -> tuple[torch.Tensor, int]:
        with switched_in(model, updates):
            hooks = sum(bool(layer._forward_hooks) for layer in layers.values())
            return model(input_ids=ids).logits.detach(), hooks

    outside, hooked = ask()
    assert hooked == len(layers) >= 4
    with torch.inference_mode():
        inside, hooked = ask()
    assert hooked == 0
    assert 0 < (inside - outside).norm() < 1e-5 * outside.norm()
    assert all(layer.weight is own[name] for name, layer in layers.items())

    with monkeypatch.context() as patched, torch.no_grad():  # no memory for more than the first
        patched.setattr("loraloom.model.runner._SUMMED", 4 * next(iter(own.values())).numel())
        some, hooked = ask()
    assert hooked == len(layers) - 1
    assert (some - outside).norm() < 1e-5 * outside.norm()
    model.bfloat16()
    with torch.inference_mode():
        rounded, hooked = ask()
    assert hooked == len(layers)
    assert (rounded.float() - outside).norm() < 0.1 * outside.norm()


def test_a_text_is_cut_to_what_the_base_has_positions_for(tmp_path: Path) -> None:
    base = tiny.base_folder("bert", tmp_path)  # which has 40
    tokenizer = load_tokenizer(str(base))
    tokenizer.model_max_length = 40
    rows = Dataset.from_list([{"text_a": "tea " * 100}])
    assert [len(row["input_ids"]) for row in encode(rows, tokenizer, 128)] == [40]
    assert [len(row["input_ids"]) for row in encode(rows, tokenizer, 16)] == [16]
