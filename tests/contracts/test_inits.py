"""What every start must hold: the base model exactly, an ordinary PEFT folder, A to the bit, A kept as asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

import tiny
from loraloom.adapters.peft import read_adapter
from loraloom.starts.initialise import initialise
from loraloom.starts.options import Keep, Scale, StartOptions
from loraloom.starts.subspace import RULES
from loraloom.statistics.collect import collect_statistics
from loraloom.statistics.file import Statistics

IDS = torch.arange(3, 23).reshape(2, 10)
EVERY = [(rule, keep, scale) for rule in RULES for keep in get_args(Keep) for scale in get_args(Scale)]


class Kind:
    """A base model of one kind, its folder, and the statistics of three tasks on it."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.folder = str(tiny.base_folder(kind, folder))
        self.statistics = {name: self._collect(seed) for seed, name in enumerate(("one", "two", "three"))}

    def model(self) -> PreTrainedModel:
        of = AutoModelForCausalLM if self.kind in ("llama", "gpt2") else AutoModelForSequenceClassification
        torch.manual_seed(0)
        return of.from_pretrained(self.folder).eval()

    def inputs(self, ids: Tensor) -> dict[str, Tensor]:
        if self.kind == "t5":
            ids = torch.cat([ids, torch.full((len(ids), 1), 2)], dim=1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _collect(self, seed: int) -> Statistics:
        ids = torch.randint(3, len(tiny.WORDS), (4, 6), generator=torch.Generator().manual_seed(seed))
        return collect_statistics(self.model(), [self.inputs(ids)], tiny.TARGETS[self.kind])

    def start(self, into: Any, lora: LoraConfig | None = None, **options: Any) -> Any:
        others = {name: found for name, found in self.statistics.items() if name != "one"}
        return initialise(into, self.statistics["one"], others, lora, StartOptions(**options))


@pytest.fixture(scope="module", params=["bert", "llama", "gpt2", "t5"])
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    return Kind(request.param, tmp_path_factory.mktemp(request.param) / "base")


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model.eval()(**inputs).logits.clone()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_every_start_is_the_base_model(kind: Kind) -> None:
    """All rules x keep x scale, filled in place: logits equal to the bit, A as returned, B zero."""
    base, inputs = kind.model(), kind.inputs(IDS)
    expected = logits(base, inputs)
    lora = LoraConfig(r=2, lora_alpha=16, target_modules=tiny.TARGETS[kind.kind], use_rslora=True)
    model = get_peft_model(base, lora)
    for rule, keep, scale in EVERY:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.fill_(0.1)
        assert not torch.equal(logits(model, inputs), expected)
        done = kind.start(model, rule=rule, keep=keep, scale=scale)
        assert torch.equal(logits(model, inputs), expected), (rule, keep, scale)
        state = model.state_dict()
        for module, A in done.A.items():
            assert torch.equal(state[f"base_model.model.{module}.lora_A.default.weight"], A)
            assert not state[f"base_model.model.{module}.lora_B.default.weight"].any()
            frozen = not model.get_submodule(f"base_model.model.{module}").lora_A.default.weight.requires_grad
            model.get_submodule(f"base_model.model.{module}").lora_A.default.weight.requires_grad_(True)
            assert frozen == (keep == "frozen")


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(("rule", "keep", "scale"), [EVERY[0], ("apart", "projected", "response")])
def test_the_folder_loads_in_peft_to_the_bit(kind: Kind, rule: str, keep: Keep, scale: Scale, tmp_path: Path) -> None:
    task_type = "CAUSAL_LM" if kind.kind in ("llama", "gpt2") else "SEQ_CLS"
    lora = LoraConfig(r=2, target_modules=tiny.TARGETS[kind.kind], task_type=task_type, lora_dropout=0.1)
    done = kind.start(tmp_path / "start", lora=lora, rule=rule, keep=keep, scale=scale)
    model, inputs = kind.model(), kind.inputs(IDS)
    expected = logits(model, inputs)
    loaded = PeftModel.from_pretrained(model, str(tmp_path / "start"), is_trainable=True)
    assert torch.equal(logits(loaded, inputs), expected)
    state = dict(loaded.named_parameters())
    for module, A in done.A.items():
        name = f"base_model.model.{module}.lora_A.default.weight"
        assert torch.equal(state[name], A)
        assert state[name].requires_grad
    assert {name for name in state if "lora_A" in name} == {
        f"base_model.model.{module}.lora_A.default.weight" for module in done.A
    }
    config = json.loads((tmp_path / "start" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert config["base_model_name_or_path"] == Path(kind.folder).name  # a whole path tells of somebody's disk
    told = json.loads((tmp_path / "start" / "loraloom.json").read_text())
    assert (told["init"]["rule"], told["init"]["keep"], told["init"]["scale"]) == (rule, keep, scale)
    assert told["layers"].keys() == done.A.keys()
    assert read_adapter(tmp_path / "start").updates.keys() == done.A.keys()
    assert (tmp_path / "start" / "avoid.safetensors").is_file() == (keep == "projected")
    if keep == "projected":
        avoid = load_file(tmp_path / "start" / "avoid.safetensors")
        for module, A in done.A.items():
            assert (A @ avoid[module]).norm() < 1e-6 * A.norm()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("rule", sorted(RULES))
def test_response_scale_for_every_rule(kind: Kind, rule: str, tmp_path: Path) -> None:
    """tr(A G A^T) is r tr(G) / (3 n), what PEFT's default A gives in expectation, in every layer."""
    own = kind.statistics["one"]
    lora = LoraConfig(r=3, target_modules=tiny.TARGETS[kind.kind])
    unit = kind.start(tmp_path / "unit", lora=lora, rule=rule)
    response = kind.start(tmp_path / "response", lora=lora, rule=rule, scale="response")
    for module, A in response.A.items():
        moment = own.moment(module)
        G = moment.as_gram()
        seen = float(torch.trace(A.double() @ G @ A.double().T))
        assert seen == pytest.approx(3 * float(torch.trace(G)) / (3 * moment.width), rel=1e-5)
        # one number a layer
        factor = A / unit.A[module]
        assert (factor - factor.flatten()[0]).abs().max() < 1e-4 * factor.abs().max()
