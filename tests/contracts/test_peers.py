"""Where PEFT merges wrongly, or says nothing, this must be right: each claim against PEFT's own forward pass."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import references.entrywise
import references.linear
import references.spectral
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

import tiny
from loraloom.adapters.peft import CONFIG, WEIGHTS, read_adapter
from loraloom.errors import LoraloomError
from loraloom.merging import get_rule, merge, write_merged
from loraloom.merging.options import MergeOptions
from loraloom.merging.planning import make_plan

TOKENS = torch.randint(5, len(tiny.WORDS), (4, 9), generator=torch.Generator().manual_seed(0))
REFERENCES = references.linear.REFERENCES | references.entrywise.REFERENCES | references.spectral.REFERENCES


def base(kind: str = "bert", **config: Any) -> PreTrainedModel:
    """A tiny random model, the same at every call: a classifier, or a language model where LoRA is on a decoder."""
    torch.manual_seed(0)
    settings = tiny.CONFIGS[kind]()
    for key, value in {"num_labels": 3, **config}.items():
        setattr(settings, key, value)
    of = AutoModelForCausalLM if kind in ("llama", "gpt2") else AutoModelForSequenceClassification
    model = of.from_config(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    return model


def peft_model(kind: str = "bert", *, seed: int = 0, on: PreTrainedModel | None = None, **lora: Any) -> PeftModel:
    """An adapted model as after training: all that trains has moved at random from where PEFT starts it."""
    settings = {"r": 3, "lora_alpha": 6, "target_modules": tiny.TARGETS[kind], **lora}
    torch.manual_seed(seed)
    model = get_peft_model(on or base(kind), LoraConfig(**settings)).eval()
    move(model, seed)
    return model


def move(model: PeftModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def save(folder: Path, kind: str = "bert", **settings: Any) -> Path:
    """Save a trained adapter by PEFT."""
    peft_model(kind, **settings).save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits.double()


def with_head(model: PreTrainedModel, path: Path) -> PreTrainedModel:
    """Load the tensors of a heads/*.safetensors into a model without an adapter, as a user has to."""
    model.load_state_dict(load_file(path), strict=False)
    return model


def loaded(folder: Path, kind: str = "bert", *, head: str | None = None) -> PeftModel:
    """A merged folder on a fresh base, by PEFT alone."""
    host = with_head(base(kind), folder / "heads" / f"{head}.safetensors") if head else base(kind)
    return PeftModel.from_pretrained(host, str(folder)).eval()


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def listing(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# identity

SEQ_CLS = {"task_type": "SEQ_CLS"}
CAUSAL = {"task_type": "CAUSAL_LM"}
PATTERNS = {"rank_pattern": {"layer.0.*query": 5, "value": 2}, "alpha_pattern": {"layer.1.*query": 11, "value": 7}}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("bert", SEQ_CLS),
    "rslora": ("bert", {**SEQ_CLS, "use_rslora": True, "r": 8}),
    "rank_pattern": ("bert", {**SEQ_CLS, "rank_pattern": PATTERNS["rank_pattern"]}),
    "alpha_pattern": ("bert", {**SEQ_CLS, "alpha_pattern": PATTERNS["alpha_pattern"]}),
    "patterns and rslora": ("bert", {**SEQ_CLS, **PATTERNS, "use_rslora": True}),
    "Conv1D": ("gpt2", {**CAUSAL, "fan_in_fan_out": True, "r": 4}),
    "Conv1D, wide": ("gpt2", {**CAUSAL, "fan_in_fan_out": True, "target_modules": ["c_attn", "c_fc", "c_proj"]}),
    "language model": ("llama", {**CAUSAL, "target_modules": "all-linear"}),
    "without a head": ("bert", {}),
    "a head by name": ("distilbert", {"modules_to_save": ["classifier", "pre_classifier"]}),
    "a language model's head": ("llama", {**CAUSAL, "modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("rule", ["task_arithmetic", "tsv"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_at_weight_1_is_the_identity(kind: str, rule: str, tmp_path: Path) -> None:
    """PEFT 0.21.2 is off by sqrt(r) - 1 for rsLoRA here, by linear, cat and svd alike."""
    family, settings = KINDS[kind]
    model = peft_model(family, **settings)
    model.save_pretrained(tmp_path / "one")
    folder = write_merged(merge([read_adapter(tmp_path / "one")], rule, weights=[1.0], scale=1.0), tmp_path / "merged")
    trained_whole = set(settings.get("modules_to_save", [])) - {"lm_head"}  # which stays in the adapter
    headed = settings.get("task_type") == "SEQ_CLS" or bool(trained_whole)
    assert (folder / "heads").is_dir() == headed
    head = "one" if headed else None
    assert error(logits(loaded(folder, family, head=head)), logits(model)) < 1e-5
    assert error(logits(base(family)), logits(model)) > 1e-2


@pytest.mark.parametrize("rule", ["task_arithmetic", "weighted", "svd", "tsv", "iso_c"])
def test_one_hot_weights_give_that_adapter(rule: str, tmp_path: Path) -> None:
    """By a rule that flattens the spectrum too: its result is that of the one adapter alone."""
    models = [peft_model("bert", seed=i, r=2 + i, use_rslora=i == 1, **SEQ_CLS) for i in range(3)]
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / f"task{i}")
    inputs = [read_adapter(tmp_path / f"task{i}") for i in range(3)]
    folder = write_merged(merge(inputs, rule, weights=[0, 1, 0], scale=1.0), tmp_path / "merged")
    if rule == "iso_c":
        write_merged(merge(inputs[1:2], rule, weights=[1.0], scale=1.0), tmp_path / "alone")
        expected = logits(loaded(tmp_path / "alone", head="task1"))
    else:
        expected = logits(models[1])
    assert error(logits(loaded(folder, head="task1")), expected) < 1e-5
    assert read_adapter(folder).rank == 3  # that adapter's, not the sum of all


@pytest.mark.parametrize("rule", ["task_arithmetic", "ties", "tsv", "dare"])
def test_the_order_of_the_adapters_does_not_matter(rule: str, tmp_path: Path) -> None:
    names, weights = ["a", "b", "c"], {"a": 0.9, "b": 0.3, "c": 0.6}
    for i, name in enumerate(names):
        save(tmp_path / name, seed=i, r=2 + i, **SEQ_CLS)
    found = []
    for order in (names, names[::-1], ["b", "c", "a"]):
        inputs = [read_adapter(tmp_path / name) for name in order]
        merged = merge(inputs, rule, weights=[weights[name] for name in order], scale=0.5, seed=3)
        folder = write_merged(merged, tmp_path / "merged" / "".join(order))
        found.append({name: logits(loaded(folder, head=name)) for name in names})
    for other in found[1:]:
        assert max(error(other[name], found[0][name]) for name in names) < 1e-5
    assert error(found[0]["a"], found[0]["b"]) > 1e-2  # each under its own head, whatever the order


@pytest.mark.parametrize("weights", [[], [1.0], [1.0, 1.0, 1.0]])
def test_every_adapter_needs_its_weight(weights: list[float], tmp_path: Path) -> None:
    """PEFT takes fewer weights than adapters, and counts the rest as zero."""
    inputs = [read_adapter(save(tmp_path / f"{i}", seed=i)) for i in range(2)]
    with pytest.raises(LoraloomError, match=f"{len(weights)} weights for 2 adapters: give one for each"):
        merge(inputs, "task_arithmetic", weights=weights)


# refusals: never dropped in silence


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_an_init_that_changed_the_base_is_refused_with_a_way_that_works(init: str, tmp_path: Path) -> None:
    # without a head: PEFT's conversion keeps the factors alone
    model = get_peft_model(base(), LoraConfig(r=3, target_modules=["query"], init_lora_weights=init))
    model.eval().peft_config["default"].init_lora_weights = True  # as PEFT's guide has it
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = init
    move(model, 1)
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(LoraloomError) as caught:
        merge([read_adapter(tmp_path / "trained")], "weighted")
    for part in (
        "trained",
        f"init_lora_weights: {init!r} changed the base",
        "path_initial_model_for_weight_conversion",
    ):
        assert part in str(caught.value)
    # the way that the message names
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    converted = read_adapter(tmp_path / "converted")
    assert converted.rank == 6
    folder = write_merged(merge([converted], "weighted"), tmp_path / "merged")
    assert error(logits(loaded(folder)), logits(model)) < 1e-5
    assert error(logits(loaded(folder)), logits(base())) > 1e-2


@pytest.mark.parametrize("init", ["corda", "loftq", "lora_ga"])
def test_further_inits_that_changed_the_base_are_refused(init: str, tmp_path: Path) -> None:
    save(tmp_path / "one")
    edit_config(tmp_path / "one", init_lora_weights=init)
    with pytest.raises(LoraloomError, match=f"init_lora_weights: '{init}' changed the base weights; convert it"):
        read_adapter(tmp_path / "one")


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva"])
def test_inits_that_leave_the_base_alone_are_taken(init: Any, tmp_path: Path) -> None:
    save(tmp_path / "one", r=4)
    edit_config(tmp_path / "one", init_lora_weights=init)
    folder = write_merged(merge([read_adapter(tmp_path / "one")], "weighted"), tmp_path / "merged")
    assert json.loads((folder / CONFIG).read_text())["init_lora_weights"] is True
    assert error(logits(loaded(folder)), logits(peft_model(r=4))) < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora: DoRA rescales the base weight"),
        ({"bias": "all"}, "bias: 'all': trained biases would be lost"),
        ({"bias": "lora_only"}, "bias: 'lora_only': trained biases would be lost"),
        ({"lora_bias": True}, "lora_bias: the bias of B would be lost"),
        ({"trainable_token_indices": [6, 7]}, "trainable_token_indices: trains rows of the embedding"),
    ],
)
def test_what_no_update_of_a_layer_expresses_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    save(tmp_path / "odd", **SEQ_CLS, **settings)
    save(tmp_path / "plain", **SEQ_CLS)
    with pytest.raises(LoraloomError) as caught:
        merge([read_adapter(tmp_path / name) for name in ("plain", "odd")], "weighted")
    assert message in str(caught.value)
    assert str(tmp_path / "odd") in str(caught.value)


def test_all_differences_come_in_one_message(tmp_path: Path) -> None:
    wide = base("bert", hidden_size=24, num_attention_heads=3)
    models = {
        "one": peft_model(target_modules=["query", "value"]),
        "targets": peft_model(target_modules=["query", "key"]),
        "shapes": peft_model(on=wide, target_modules=["query", "value"]),
        "base": peft_model(target_modules=["query", "value"]),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        edit_config(tmp_path / name, base_model_name_or_path="org/other" if name == "base" else "org/base")
    with pytest.raises(LoraloomError) as caught:
        merge([read_adapter(tmp_path / name) for name in models], "ties", weights=[1.0], targets="same", densty=0.1)
    one, targets, shapes, other = (str(tmp_path / name) for name in models)
    layer = "bert.encoder.layer.{}.attention.self.{}"
    for part in (
        f"base model: {one} has 'org/base', {other} has 'org/other'",
        f"{one} adapts {layer.format(0, 'value')}, {layer.format(1, 'value')}; {targets} does not",
        f"{targets} adapts {layer.format(0, 'key')}, {layer.format(1, 'key')}; {one} does not",
        *(
            f"{layer.format(i, name)}: {one} is 16 x 16, {shapes} is 24 x 24"
            for i in (0, 1)
            for name in ("query", "value")
        ),
        "1 weights for 4 adapters",
        "no option 'densty': did you mean 'density'?",
        "9 problems",
    ):
        assert part in str(caught.value)


# heads


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """Two classifiers' adapters of ranks 2 and 4."""
    for i, name in enumerate(("mood", "tone")):
        save(tmp_path / name, seed=i, r=2 + 2 * i, lora_alpha=3 + i, **SEQ_CLS)
    return tmp_path


def test_heads_are_kept_beside_the_result_and_never_averaged(pair: Path) -> None:
    inputs = [read_adapter(pair / name) for name in ("mood", "tone")]
    folder = write_merged(merge(inputs, "weighted"), pair / "merged")
    assert listing(folder / "heads") == {"mood.safetensors", "tone.safetensors"}
    for name in ("mood", "tone"):
        own = load_file(pair / name / WEIGHTS)
        kept = load_file(folder / "heads" / f"{name}.safetensors")
        assert set(kept) == {"classifier.weight", "classifier.bias"}
        assert all(torch.equal(kept[path], own[f"base_model.model.{path}"]) for path in kept)
    assert not [name for name in load_file(folder / WEIGHTS) if "lora_" not in name]
    config = json.loads((folder / CONFIG).read_text())
    assert (config.get("modules_to_save"), config["task_type"]) == (None, None)
    model, untouched = loaded(folder), base()
    for part in ("weight", "bias"):  # the base keeps the head it has
        assert torch.equal(getattr(model.base_model.model.classifier, part), getattr(untouched.classifier, part))


@pytest.mark.parametrize("weights", [None, [3.0, 1.0], [0.0, 2.0]])
def test_heads_are_averaged_where_that_is_asked_for(pair: Path, weights: list[float] | None) -> None:
    inputs = [read_adapter(pair / name) for name in ("mood", "tone")]
    folder = write_merged(merge(inputs, "weighted", weights=weights, heads="average"), pair / "merged")
    assert not (folder / "heads").exists()
    model = loaded(folder)
    shares = torch.tensor(weights or [1.0, 1.0], dtype=torch.float64)
    shares /= shares.sum()
    for part in ("weight", "bias"):
        key = f"base_model.model.classifier.{part}"
        own = [load_file(pair / name / WEIGHTS)[key].double() for name in ("mood", "tone")]
        expected = (shares[0] * own[0] + shares[1] * own[1]).float()
        torch.testing.assert_close(load_file(folder / WEIGHTS)[key], expected, atol=1e-7, rtol=1e-6)
        head = model.base_model.model.classifier.modules_to_save["default"]
        assert torch.equal(getattr(head, part), load_file(folder / WEIGHTS)[key])


def test_heads_have_no_mean_where_the_weights_add_up_to_nothing(pair: Path) -> None:
    inputs = [read_adapter(pair / name) for name in ("mood", "tone")]
    with pytest.raises(LoraloomError, match="average"):
        write_merged(merge(inputs, "weighted", weights=[1.0, -1.0], heads="average"), pair / "merged")


def test_heads_of_different_shape_cannot_be_averaged(pair: Path) -> None:
    save(pair / "wide", on=base("bert", num_labels=5), **SEQ_CLS)
    inputs = [read_adapter(pair / name) for name in ("mood", "wide")]
    with pytest.raises(LoraloomError, match=r"heads cannot be averaged: wide has .*\(5, 16\).*, mood has .*\(3, 16\)"):
        merge(inputs, "weighted", heads="average")
    folder = write_merged(merge(inputs, "weighted"), pair / "merged")
    assert load_file(folder / "heads" / "wide.safetensors")["classifier.weight"].shape == (5, 16)


# different ranks, against a dense reference


def dense_reference(folders: Sequence[Path], rule: str, weights: Sequence[float], scale: float, **asked: Any) -> Tensor:
    """Return the logits of a float64 model whose weights hold the merge of PEFT's own delta weights, by numpy."""
    deltas: list[dict[str, np.ndarray]] = []
    for folder in folders:
        model = PeftModel.from_pretrained(base().double(), str(folder)).double()
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
        deltas.append({name: layer.get_delta_weight("default").detach().numpy() for name, layer in layers.items()})
    ranks = [read_adapter(folder).rank for folder in folders]
    options = get_rule(rule).check(asked)[0]
    reference = base().double()
    for name in deltas[0]:
        weighted = [w * one[name] for w, one in zip(weights, deltas, strict=True)]
        U, S, Vh = np.linalg.svd(scale * REFERENCES[rule](weighted, ranks, options), full_matrices=False)
        kept = sum(ranks)
        with torch.no_grad():
            weight = reference.get_submodule(name.removeprefix("base_model.model.")).weight
            weight += torch.from_numpy(U[:, :kept] * S[:kept] @ Vh[:kept])
    head = {path: tensor.double() for path, tensor in read_adapter(folders[0]).head.items()}
    reference.load_state_dict(head, strict=False)
    return logits(reference)


@pytest.mark.parametrize(
    ("rule", "asked"),
    [("task_arithmetic", {}), ("tsv", {}), ("ties", {}), ("ties", {"density": 0.5, "space": "core"})],
)
def test_ranks_2_5_and_3_merge_to_the_dense_float64_reference(rule: str, asked: dict[str, Any], tmp_path: Path) -> None:
    """`ties` without a density too, where PEFT raises a TypeError and leaves a half-built adapter behind."""
    folders = [save(tmp_path / f"r{r}", seed=r, r=r, use_rslora=r == 5, lora_alpha=r + 1, **SEQ_CLS) for r in (2, 5, 3)]
    weights, scale = [0.8, 0.5, -0.4], 0.7
    merged = merge([read_adapter(folder) for folder in folders], rule, weights=weights, scale=scale, **asked)
    folder = write_merged(merged, tmp_path / "merged")
    assert merged.adapter.rank == 10
    expected = dense_reference(folders, rule, weights, scale, **asked)
    assert error(logits(loaded(folder, head="r2")), expected) < 1e-5
    assert error(logits(with_head(base(), folder / "heads" / "r2.safetensors")), expected) > 1e-2


def test_nothing_is_left_of_a_merge_that_fails(pair: Path) -> None:
    before = listing(pair)
    inputs = [read_adapter(pair / name) for name in ("mood", "tone")]

    def stop(done: int, total: int) -> None:
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_merged(make_plan(inputs, MergeOptions("ties")), pair / "merged", progress=stop)
    with pytest.raises(LoraloomError, match="density"):
        write_merged(merge(inputs, "ties", density=0), pair / "merged")
    assert listing(pair) == before


# hot-swap


@pytest.mark.parametrize("rule", ["ties", "task_arithmetic", "tsv", "cp"])
def test_a_result_of_the_members_rank_is_swapped_in_hot(rule: str, pair: Path) -> None:
    rank = 4  # the larger of the members'
    merged = merge([read_adapter(pair / name) for name in ("mood", "tone")], rule, rank=rank)
    folder = write_merged(merged, pair / "merged")
    assert set(json.loads((folder / CONFIG).read_text())["alpha_pattern"]) == set()
    model = PeftModel.from_pretrained(base(), str(pair / "tone")).eval()
    before = logits(model)
    hotswap_adapter(model, str(folder), "default", torch_device="cpu")
    assert error(logits(model), logits(loaded(folder, head="tone"))) < 1e-6
    assert error(logits(model), before) > 1e-3


def test_a_result_of_a_smaller_rank_is_swapped_into_padded_layers(pair: Path) -> None:
    merged = merge([read_adapter(pair / name) for name in ("mood", "tone")], "svd", rank=3)
    folder = write_merged(merged, pair / "merged")
    model = PeftModel.from_pretrained(base(), str(pair / "tone")).eval()
    before = logits(model)
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    assert error(logits(model), before) < 1e-6
    hotswap_adapter(model, str(folder), "default", torch_device="cpu")
    assert error(logits(model), logits(loaded(folder, head="tone"))) < 1e-6
    assert error(logits(model), before) > 1e-3


@pytest.mark.parametrize("settings", [{"rank_pattern": {"value": 2}}, {"use_rslora": True}])
def test_peft_refuses_to_swap_members_of_uneven_ranks_or_rslora_for_their_merge(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """It wants equal alpha_pattern and use_rslora; ours scales by 1 in every layer, whoever reads no patterns."""
    for i in range(2):
        save(tmp_path / f"task{i}", seed=i, r=4, **settings)
    merged = merge([read_adapter(tmp_path / f"task{i}") for i in range(2)], "cp")
    folder = write_merged(merged, tmp_path / "merged")
    assert read_adapter(folder).rank == 4
    model = PeftModel.from_pretrained(base(), str(tmp_path / "task0")).eval()
    with pytest.raises(ValueError, match=r"alpha_pattern|use_rslora"):
        hotswap_adapter(model, str(folder), "default", torch_device="cpu")


# PEFT's own merge


def weighted_by_peft(folders: Sequence[Path], weights: list[float], combination_type: str) -> Tensor:
    """Return the logits under the first one's head of PEFT's add_weighted_adapter."""
    names = [folder.name for folder in folders]
    model = PeftModel.from_pretrained(base(), str(folders[0]), adapter_name=names[0])
    for folder in folders[1:]:
        model.load_adapter(str(folder), adapter_name=folder.name)
    model.add_weighted_adapter(names, weights, "merged", combination_type=combination_type)
    model.base_model.set_adapter("merged")
    return logits(model.eval())


def test_equals_peft_where_peft_is_right(tmp_path: Path) -> None:
    folders = [save(tmp_path / f"task{i}", seed=i, r=2 + i, lora_alpha=2 + i) for i in range(3)]
    weights = [0.5, 0.2, 0.9]
    merged = merge([read_adapter(folder) for folder in folders], "task_arithmetic", weights=weights, scale=1.0)
    ours = logits(loaded(write_merged(merged, tmp_path / "merged")))
    assert error(ours, weighted_by_peft(folders, weights, "cat")) < 1e-5
    # what PEFT takes by default adds B_i A_j: that is no sum of the updates
    same = [save(tmp_path / f"same{i}", seed=i, r=3) for i in range(2)]
    merged = merge([read_adapter(folder) for folder in same], "weighted")
    ours = logits(loaded(write_merged(merged, tmp_path / "merged2")))
    assert error(ours, weighted_by_peft(same, [0.5, 0.5], "linear")) > 1e-2
    assert error(ours, weighted_by_peft(same, [0.5, 0.5], "cat")) < 1e-5


@pytest.mark.parametrize("r", [4, 9])
def test_rslora_sources_keep_their_strength(r: int, tmp_path: Path) -> None:
    """PEFT 0.21.2 scales the result anew: by sqrt(r) too much, for one adapter at weight 1 as for several."""
    folders = [save(tmp_path / f"task{i}", seed=i, r=r, use_rslora=True) for i in range(2)]
    weights = [0.6, 0.4]
    merged = merge([read_adapter(folder) for folder in folders], "task_arithmetic", weights=weights, scale=1.0)
    folder = write_merged(merged, tmp_path / "merged")
    expected = dense_reference(folders, "task_arithmetic", weights, 1.0)
    assert error(logits(loaded(folder)), expected) < 1e-5
    own = PeftModel.from_pretrained(base(), str(folder))
    assert {layer.scaling["default"] for layer in own.modules() if isinstance(layer, LoraLayer)} == {1.0}
