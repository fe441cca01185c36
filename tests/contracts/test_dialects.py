"""Every way in which an adapter may be written: merged, it does in PEFT what a dense float64 sum of the inputs does.

A form is a kind of layer, a style is what stands around the names of the tensors. Each must merge by every rule that
needs no data, and PEFT's own forward pass is the judge.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loraloom.adapters.peft import CONFIG, WEIGHTS, read_adapter
from loraloom.adapters.update import Adapter
from loraloom.errors import LoraloomError
from loraloom.merging import get_rule, merge, rule_names, write_merged

RULES = [name for name in rule_names() if get_rule(name).needs in ((), ("seed",))]
WORDS, WIDTH, EXPERTS = 13, 6, 3


class Experts(nn.Module):
    """Fused experts as transformers keeps them: (experts, outputs, inputs), or with inputs and outputs in turn."""

    def __init__(self, *, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        up, down = (10, WIDTH), (WIDTH, 5)
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, *(reversed(up) if is_transposed else up)))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, *(reversed(down) if is_transposed else down)))

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.gate_up_proj, self.down_proj
        if not self.is_transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        gate, value = (x[None] @ up).chunk(2, dim=-1)
        return ((gate.sigmoid() * value) @ down).sum(0)


class Net(nn.Module):
    """Every kind of layer that PEFT adapts, in one small model."""

    def __init__(self, *, is_transposed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(WORDS, WIDTH)
        self.line = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.picture = nn.Conv2d(1, 4, (2, 3), stride=2)
        self.point = nn.Conv2d(4, 4, 1)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2)])
        self.experts = Experts(is_transposed=is_transposed)
        self.score = nn.Linear(4 + WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        x = self.line(x.transpose(1, 2)).transpose(1, 2)
        for layer in self.layers:
            x = x + layer(x).tanh()
        x = x + self.experts(x.flatten(0, 1)).view_as(x)
        seen = self.point(self.picture(x[:, None])).mean((2, 3))
        return self.score(torch.cat([seen, x.mean(1)], dim=-1))


IDS = torch.arange(20).reshape(2, 10) % WORDS
EXPERT_TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
FORMS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["0", "1"]},
    "rslora": {"target_modules": ["0", "1"], "use_rslora": True, "lora_alpha": 6},
    "patterns": {"target_modules": ["0", "1"], "rank_pattern": {"0": 3}, "alpha_pattern": {r"layers\.1": 5}},
    "embedding": {"target_modules": ["words", "0"]},
    "convolution": {"target_modules": ["line", "picture", "point"]},
    "everything": {"target_modules": ["words", "line", "picture", "point", "0", "1"]},
    "experts": {"target_modules": [], "target_parameters": EXPERT_TARGETS},
    "one expert parameter": {"target_modules": ["0"], "target_parameters": EXPERT_TARGETS[1:]},
    "experts of other ranks": {
        "target_modules": ["0"],
        "target_parameters": EXPERT_TARGETS,
        "rank_pattern": {"gate_up_proj": 3, "down_proj": 3},
        "alpha_pattern": {"experts.*": 5},
    },
}


def saved(folder: Path, seed: int, *, net: Net | None = None, **settings: Any) -> PeftModel:
    """Save an adapter by PEFT with every trainable tensor drawn at random; return PEFT's own model."""
    model = get_peft_model(copy.deepcopy(net or Net()), LoraConfig(**{"r": 2, "lora_alpha": 4, **settings}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model.eval()


def deltas(model: nn.Module) -> dict[str, Tensor]:
    """Return PEFT's own update of every adapted parameter, float64."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            path = name.removeprefix("base_model.model.").replace(".base_layer", "")
            leaf = getattr(layer, "parameter_name", "weight")
            found[f"{path}.{leaf}"] = layer.get_delta_weight("default").detach().double()
    return found


def dense_sum(net: Net, models: list[PeftModel], weights: list[float]) -> Tensor:
    """Return the output of `net` in float64 with the weighted updates added to its parameters."""
    whole = copy.deepcopy(net).double().eval()
    with torch.no_grad():
        for model, weight in zip(models, weights, strict=True):
            for name, delta in deltas(model).items():
                whole.get_parameter(name).add_(weight * delta)
        return whole(IDS)


def loaded(net: Net, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(copy.deepcopy(net).double(), str(folder)).eval()


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("is_transposed", "form"),
    [*((False, form) for form in FORMS), *((True, form) for form in FORMS if "expert" in form)],  # they have two orders
)
def test_a_weighted_sum_does_in_peft_what_the_dense_sum_does(form: str, is_transposed: bool, tmp_path: Path) -> None:
    net = Net(is_transposed=is_transposed).eval()
    models = [saved(tmp_path / f"{i}", i, net=net, **FORMS[form]) for i in range(3)]
    weights = [0.5, -0.4, 1.2]
    folder = write_merged(
        merge([read_adapter(tmp_path / f"{i}") for i in range(3)], "task_arithmetic", weights=weights, scale=1.0),
        tmp_path / "merged",
    )
    with torch.no_grad():
        found = loaded(net, folder)(IDS)
        base = copy.deepcopy(net).double()(IDS)
    expected = dense_sum(net, models, weights)
    assert relative(found, expected) < 1e-6
    assert relative(base, expected) > 1e-2


# adapters of different layers, and what PEFT reads as the target modules of their union
UNIONS: dict[str, tuple[list[dict[str, Any]], Any]] = {
    "lists": ([{"target_modules": ["0"]}, {"target_modules": ["1"], "r": 5}], ["0", "1"]),
    "one in another": ([{"target_modules": ["0", "1"]}, {"target_modules": ["1"], "use_rslora": True}], ["0", "1"]),
    "a pattern": ([{"target_modules": r".*\.0"}, {"target_modules": ["1"]}], ["layers.0", "layers.1"]),
    "layers by number": (
        [{"target_modules": ["0"]}, {"target_modules": ["0", "1"], "exclude_modules": ["0"]}],
        ["layers.0", "layers.1"],
    ),
    "all linear ones": (
        [{"target_modules": "all-linear"}, {"target_modules": ["picture"]}],
        ["layers.0", "layers.1", "picture", "score"],
    ),
    "forms": (
        [FORMS["embedding"], FORMS["convolution"], FORMS["linear"]],
        ["0", "1", "line", "picture", "point", "words"],
    ),
    "experts": ([FORMS["experts of other ranks"], {"target_modules": ["1"]}, FORMS["linear"]], ["0", "1"]),
    "experts last": ([{"target_modules": ["1"]}, FORMS["experts"]], ["1"]),
}


@pytest.mark.parametrize("union", UNIONS)
def test_a_union_of_targets_does_in_peft_what_the_dense_sum_with_zeros_does(union: str, tmp_path: Path) -> None:
    net, (settings, targets) = Net().eval(), UNIONS[union]
    models = [saved(tmp_path / f"{i}", i, net=net, **one) for i, one in enumerate(settings)]
    weights = [0.5, -0.4, 1.2][: len(models)]
    members = [read_adapter(tmp_path / f"{i}") for i in range(len(models))]
    merged = merge(members, "task_arithmetic", weights=weights, scale=1.0)
    folder = write_merged(merged, tmp_path / "merged")
    assert merged.plan.config["target_modules"] == targets
    with torch.no_grad():
        host = loaded(net, folder)
        assert relative(host(IDS), dense_sum(net, models, weights)) < 1e-6
    adapted = set().union(*map(deltas, models))
    assert set(deltas(host)) == adapted  # PEFT adapts no layer more
    for module, layer in merged.merged.items():  # nothing is made wider by an adapter that lacks the layer
        assert layer.update.rank == sum(one.shapes[module].r for one in members if module in one.shapes)


def test_forms_that_differ_in_a_shared_layer_are_refused_in_a_union(tmp_path: Path) -> None:
    saved(tmp_path / "0", 0, **FORMS["linear"])
    saved(tmp_path / "1", 1, **FORMS["embedding"])
    saved(tmp_path / "2", 2, target_modules=["1"], target_parameters=EXPERT_TARGETS)
    saved(tmp_path / "3", 3, target_modules=["1"], target_parameters=EXPERT_TARGETS[1:])
    members = [read_adapter(tmp_path / f"{i}") for i in range(4)]
    words = members[1].updates["words"]
    odd = dataclasses.replace(members[0], updates={"words": words}, forms={})
    with pytest.raises(LoraloomError) as caught:
        merge({"a": members[0], "b": members[1], "c": odd, "d": members[2], "e": members[3]})
    assert f"words: {tmp_path / '1'} has it as embedding, {tmp_path / '0'} as linear layer" in str(caught.value)
    assert f"target_parameters: {tmp_path / '2'} has {sorted(EXPERT_TARGETS)}, {tmp_path / '3'} " in str(caught.value)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", ["everything", "experts"])
def test_what_a_rule_makes_of_any_form_is_what_peft_applies(form: str, rule: str, tmp_path: Path) -> None:
    for i in range(2):
        saved(tmp_path / f"{i}", i, **FORMS[form])
    merged = merge([read_adapter(tmp_path / f"{i}") for i in range(2)], rule)
    applied = deltas(loaded(Net(), write_merged(merged, tmp_path / "merged")))
    plan = merged.plan
    for module, layer in merged.merged.items():
        told = plan.forms.get(module)
        dW = layer.update.B.double() @ layer.update.A.double()
        if told and told.kind == "experts":
            leaf = "gate_up_proj" if "base_layer" in module else "down_proj"
            theirs = applied[f"experts.{leaf}"][told.index]
        else:
            theirs = applied[f"{module}.weight"]
            dW = dW.T if told and told.kind == "embedding" else dW.reshape(theirs.shape)
        torch.testing.assert_close(theirs, dW, atol=1e-6, rtol=1e-5)


# styles of keys


def renamed(change: Callable[[str], str]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        save_file({change(key): tensor for key, tensor in tensors.items()}, folder / WEIGHTS)

    return rewrite


def sharded(folder: Path) -> None:
    tensors = sorted(load_file(folder / WEIGHTS).items())
    (folder / WEIGHTS).unlink()
    places = {}
    for part in range(2):
        name = f"adapter_model-0000{part + 1}-of-00002.safetensors"
        save_file(dict(tensors[part::2]), folder / name)
        places.update({key: name for key, _ in tensors[part::2]})
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


PREFIX = "base_model.model."
STYLES: dict[str, Callable[[Path], None]] = {
    "plain": lambda folder: None,
    "compiled": renamed(lambda key: f"_orig_mod.{key}"),
    "compiled inside": renamed(lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod.")),
    "compiled by block": renamed(lambda key: key.replace("layers.0.", "layers.0._orig_mod.")),
    "DDP": renamed(lambda key: f"module.{key}"),
    "DDP of compiled": renamed(lambda key: f"module._orig_mod.{key}"),
    "FSDP": renamed(lambda key: key.replace(".layers.", ".layers._fsdp_wrapped_module.")),
    "checkpointed": renamed(lambda key: key.replace("layers.0.", "layers.0._checkpoint_wrapped_module.")),
    "doubled": renamed(lambda key: PREFIX + key),
    "no prefix": renamed(lambda key: key.removeprefix(PREFIX)),
    "adapter's name": renamed(lambda key: key.replace(".weight", ".default.weight") if "lora_" in key else key),
    "another adapter's name": renamed(
        lambda key: key.replace("lora_A.", "lora_A.my-task.").replace("B.", "B.my-task.")
    ),
    "shards": sharded,
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters as PEFT saves them, in 0 and 1."""
    folder = tmp_path_factory.mktemp("plain")
    for i in range(2):
        saved(folder / f"{i}", i, **FORMS["linear"])
        config = json.loads((folder / f"{i}" / CONFIG).read_text())
        # of a model of transformers no class is told
        (folder / f"{i}" / CONFIG).write_text(json.dumps({**config, "auto_mapping": None}))
    return folder


def styled(plain: Path, style: str, folder: Path, index: int) -> Adapter:
    shutil.copytree(plain / f"{index}", folder)
    STYLES[style](folder)
    return read_adapter(folder)


@pytest.mark.parametrize("style", STYLES)
def test_a_style_of_keys_means_the_layers_of_the_plain_one(style: str, plain: Path, tmp_path: Path) -> None:
    """Merged with a plain one, the result is that of two plain ones, to the bit, by every rule."""
    pair = [styled(plain, style, tmp_path / "one", 0), read_adapter(plain / "1")]
    wanted = [read_adapter(plain / f"{i}") for i in range(2)]
    assert pair[0].shapes == wanted[0].shapes
    for rule in RULES:
        found, expected = (merge({"a": two[0], "b": two[1]}, rule).adapter for two in (pair, wanted))
        assert found.config == expected.config
        for module, update in expected.updates.items():
            assert torch.equal(found.updates[module].B, update.B)
            assert torch.equal(found.updates[module].A, update.A)


@pytest.mark.parametrize("style", STYLES)
def test_a_style_of_keys_does_in_peft_what_the_plain_one_does(style: str, plain: Path, tmp_path: Path) -> None:
    styled(plain, style, tmp_path / "one", 0)
    folder = write_merged(merge([read_adapter(tmp_path / "one")], "weighted"), tmp_path / "merged")
    with torch.no_grad():
        outputs = [loaded(Net(), place)(IDS) for place in (plain / "0", folder)]
        assert relative(outputs[1], outputs[0]) < 1e-6
        assert relative(Net().double()(IDS), outputs[0]) > 1e-2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda key: f"thinker.{key}", "'thinker' stands before 'base_model.model.'"),
        (lambda key: key.replace("lora_A", "lora_A.x"), "holds several adapters: 'x', one without a name"),
        (lambda key: key.replace(".lora_A.weight", ".lora_down.weight"), "kohya-ss's naming"),
        (lambda key: key.replace(".lora_A.weight", ".lora.down.weight"), "diffusers' naming"),
        (lambda key: key.replace(".lora_A.weight", ".lora_a"), "MLX's naming"),
        (lambda key: key.replace("lora_A", "hada_w1_a"), "LyCORIS', and no LoRA"),
        (lambda key: key.replace("lora_B", "lora_C"), "is no factor that PEFT writes"),
        (lambda key: key.replace("layers", "lay\x1b[2Jers"), r"a name with control characters"),
    ],
)
def test_other_styles_are_told_for_what_they_are(change: Any, told: str, plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain / "0", tmp_path / "one")
    renamed(change)(tmp_path / "one")
    with pytest.raises(LoraloomError) as caught:
        read_adapter(tmp_path / "one")
    assert told in str(caught.value)
    assert str(caught.value).isprintable() or "\x1b" not in str(caught.value)


def test_a_prefix_of_the_model_is_kept_and_told_where_it_differs(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain / "0", tmp_path / "one")
    renamed(lambda key: key.replace(PREFIX, f"{PREFIX}thinker."))(tmp_path / "one")
    inside = read_adapter(tmp_path / "one")
    assert all(module.startswith("thinker.") for module in inside.shapes)
    for pair in ([inside, read_adapter(plain / "1")], [read_adapter(plain / "1"), inside]):
        with pytest.raises(LoraloomError, match=r"under 'thinker\.': they were trained in two classes"):
            merge(pair, "weighted")


def test_a_class_of_the_trainers_own_may_call_its_modules_as_wrappers_do(plain: Path, tmp_path: Path) -> None:
    for style in ("module.", "base_model.model."):
        folder = tmp_path / style
        shutil.copytree(plain / "0", folder)
        renamed(lambda key, style=style: key.replace(PREFIX, PREFIX + style))(folder)
        config = json.loads((folder / CONFIG).read_text())
        own = {"base_model_class": "Reward", "parent_library": "mine.models"}
        (folder / CONFIG).write_text(json.dumps({**config, "auto_mapping": own}))
        assert all(module.startswith(f"{style}layers.") for module in read_adapter(folder).shapes)


HEADS = {
    "as PEFT saves it": {"score.weight": 1.0, "score.bias": 2.0},
    "with the adapter's name": {
        "score.modules_to_save.default.weight": 1.0,
        "score.modules_to_save.default.bias": 2.0,
        "score.original_module.weight": 9.0,
        "score.original_module.bias": 9.0,
    },
    "of older files": {"score.modules_to_save.weight": 1.0, "score.modules_to_save.bias": 2.0},
    "compiled": {"score._orig_mod.weight": 1.0, "score._orig_mod.bias": 2.0},
}


@pytest.mark.parametrize("style", HEADS)
def test_a_head_is_read_by_its_path_in_the_model(style: str, plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain / "0", tmp_path / "one")
    shapes = {"weight": (3, 10), "bias": (3,)}
    head = {PREFIX + key: torch.full(shapes[key.rsplit(".", 1)[1]], value) for key, value in HEADS[style].items()}
    save_file({**load_file(tmp_path / "one" / WEIGHTS), **head}, tmp_path / "one" / WEIGHTS)
    adapter = read_adapter(tmp_path / "one")
    assert {name: float(tensor.mean()) for name, tensor in adapter.head.items()} == HEADS["as PEFT saves it"]
    told = [name for name in adapter.beside.left_out if "original_module" in name]
    assert len(told) == (2 if style == "with the adapter's name" else 0)


def test_a_head_with_modules_of_its_own_keeps_their_names(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain / "0", tmp_path / "one")
    head = {f"{PREFIX}classifier.modules_to_save.dense.weight": torch.ones(3, 10)}
    save_file({**load_file(tmp_path / "one" / WEIGHTS), **head}, tmp_path / "one" / WEIGHTS)
    assert set(read_adapter(tmp_path / "one").head) == {"classifier.dense.weight"}
