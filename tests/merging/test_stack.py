"""Adapters trained one on top of the other: their exact sum on the first one's base, and what is known of the bases."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

import tiny
from commands import call, hints, refused, said
from loraloom.adapters.peft import CONFIG, read_adapter
from loraloom.adapters.update import Update
from loraloom.errors import LoraloomError
from loraloom.merging import merge, write_merged

TOKENS = torch.randint(5, len(tiny.WORDS), (4, 9), generator=torch.Generator().manual_seed(0))
SFT: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
DPO: dict[str, Any] = {"r": 2, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}


def train(base: PreTrainedModel, folder: Path, seed: int, name: str, **lora: Any) -> PreTrainedModel:
    """Save an adapter of `base` as after training, by PEFT; return the base with it merged in, by PEFT, float64."""
    model = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", **lora))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.peft_config["default"].base_model_name_or_path = name
    model.save_pretrained(folder)
    return model.double().merge_and_unload()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `sft` on it, and what SFT's result gives in `logits.pt` once dpo is trained on it too."""
    folder = tmp_path_factory.mktemp("stack")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(tiny.CONFIGS["llama"]()).eval()
    base.save_pretrained(folder / "base")
    first = train(base, folder / "sft", 1, "org/base", **SFT)
    second = train(first, folder / "dpo", 2, "outputs/sft-merged", **DPO)
    third = train(second, folder / "grpo", 3, "outputs/dpo-merged", **SFT)
    with torch.no_grad():
        torch.save([model(TOKENS).logits for model in (base.double(), first, second, third)], folder / "logits.pt")
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    for name in ("base", "sft", "dpo"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def rename(folder: Path, base: str) -> Path:
    config = json.loads((folder / CONFIG).read_text())
    if config["base_model_name_or_path"] != base:  # the bytes of a file count
        (folder / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": base}))
    return folder


@pytest.mark.parametrize("count", [2, 3])
def test_the_stack_does_on_the_base_what_the_last_does_on_what_lies_below(
    made: Path, count: int, tmp_path: Path
) -> None:
    folders = [made / name for name in ("sft", "dpo", "grpo")[:count]]
    merged = merge([read_adapter(folder) for folder in folders], stack=True)
    folder = write_merged(merged, tmp_path / "one")
    base = AutoModelForCausalLM.from_pretrained(made / "base").double()
    with torch.no_grad():
        found = PeftModel.from_pretrained(base, str(folder)).eval()(TOKENS).logits
    logits = torch.load(made / "logits.pt")
    assert float((found - logits[count]).norm() / logits[count].norm()) < 1e-6
    assert float((logits[count - 1] - logits[count]).norm() / logits[count].norm()) > 1e-2
    plan = merged.plan
    assert (plan.rule.name, plan.scale, plan.scale_from) == ("task_arithmetic", 1.0, "stack")
    assert json.loads((folder / CONFIG).read_text())["base_model_name_or_path"] == "org/base"


def test_what_is_asked_beside_a_stack_is_refused(made: Path) -> None:
    pair = [read_adapter(made / name) for name in ("sft", "dpo")]
    with pytest.raises(LoraloomError) as caught:
        merge(pair, "ties", stack=True, scale=0.5, weights=[1, 1], targets="intersection", density=0.3)
    for what in ("rule 'ties'", "options density", "weights", "a scale", "targets 'intersection'"):
        assert f"a stack sums the adapters whole: leave out {what}" in str(caught.value)
    with pytest.raises(LoraloomError, match="one adapter is no stack"):
        merge(pair[:1], stack=True)
    merge(pair, stack=True, rank=2)  # its loss is told, as of any merge
    words = ("merge", made / "sft", made / "dpo", "--stack", "-o", made / "never")
    assert "leave out --rule" in refused(*words, "--rule", "tsv")
    assert "--stack sums the adapters whole: leave out --drop-refused" in refused(*words, "--drop-refused")
    assert "--rule distil" not in hints(
        *words[:-1], made / "stacked", "--dry-run"
    )  # nothing brings a sum nearer to itself
    assert "leave out --scale and --weight" in refused(*words, "--scale", "auto", "--weight", "1")
    assert "leave out options density" in refused(*words, "--density", "0.3")


# the bases


def told(place: Path, base: str | Path, first: str = "org/base") -> tuple[list[str], list[str]]:
    """Return warnings and what is known of sft and dpo with these bases."""
    rename(place / "sft", first)
    rename(place / "dpo", str(base))
    plan = merge([read_adapter(place / name) for name in ("sft", "dpo")], stack=True).plan
    assert plan.stack
    return plan.warnings, plan.stack.known


def test_names_tell_what_they_can(place: Path) -> None:
    assert told(place, "org/base") == ([], ["dpo names the base of sft: sft must have been in it when it was trained"])
    assert told(place, "me/sft-merged")[0] == [
        "dpo: trained on me/sft-merged, sft on org/base: the sum is right only where the former is the latter with sft "
        "in it, whole"
    ]
    for odd in ("", "x" * 9000, "a\0b"):
        assert told(place, odd)[0][0].startswith("dpo: trained on ")
    assert "a base without a name" in told(place, "")[0][0]
    warnings, _ = told(place, "/home/me/secret/sft-merged")
    assert "trained on sft-merged, sft on org/base" in warnings[0]
    assert "secret" not in warnings[0]
    assert told(place, place / "sft") == ([], ["dpo was trained on sft, which holds sft"])


def test_what_loraloom_trained_on_the_plain_base_is_no_stack(place: Path) -> None:
    for first, second, fingerprints in (("org/base", "ORG/base", None), ("/a/one", "/a/two", ("f", "f"))):
        for name, base, index in (("sft", first, 0), ("dpo", second, 1)):
            rename(place / name, base)
            known = {"base_fingerprint": fingerprints[index]} if fingerprints else {}
            (place / name / "loraloom.json").write_text(json.dumps({"made_by": "loraloom train", **known}))
        with pytest.raises(LoraloomError, match=r"dpo: loraloom trained it on .*, without sft in it: merge without"):
            merge([read_adapter(place / name) for name in ("sft", "dpo")], stack=True)


def fused(place: Path, name: str, *words: object) -> Path:
    said("merge", *words, "--fuse-into", place / "base", "-o", place / name)
    return place / name


def test_a_fused_checkpoint_tells_what_is_in_it(place: Path) -> None:
    whole = fused(place, "whole", place / "sft")
    assert told(place, whole) == ([], ["dpo was trained on whole, which holds sft"])


def test_a_base_that_holds_something_else_is_refused(place: Path) -> None:
    shutil.copytree(place / "dpo", place / "other")
    rename(place / "other", "org/base")
    for name, words, expected in (
        ("loud", (place / "sft", "--scale", "0.75"), "holds sft by tsv at scale 0.75 and weight 1.0: not the sum"),
        ("strange", (place / "other",), "which holds other, not sft"),
        ("both", (place / "sft", place / "other"), "which holds sft, other, not sft"),
        ("cut", (place / "sft", "--rank", "1"), "holds sft by tsv at scale 1.0"),
    ):
        base = fused(place, name, *words)
        with pytest.raises(LoraloomError, match=expected):
            told(place, base)


def test_the_wrong_order_is_told(place: Path) -> None:
    rename(place / "dpo", str(fused(place, "whole", place / "sft")))
    with pytest.raises(
        LoraloomError, match="dpo: trained on whole, which holds sft: give the one trained first, first"
    ):
        merge([read_adapter(place / name) for name in ("dpo", "sft")], stack=True)


def test_files_that_changed_since_are_told(place: Path) -> None:
    whole = fused(place, "whole", place / "sft")
    (warning,) = told(place, whole, first="org/renamed")[0]
    assert warning == "dpo: trained on whole, which holds an adapter called sft, of other files"


def test_an_adapter_that_was_trained_on_from_the_other_is_told(place: Path) -> None:
    sft, dpo = read_adapter(place / "sft"), read_adapter(rename(place / "dpo", "org/base"))
    moved = {
        name: Update(torch.cat([0.9 * update.B, 0.1 * update.B.flip(0)], 1), torch.cat([update.A, update.A.flip(1)]))
        for name, update in sft.updates.items()
    }
    dense = [torch.cat([one[name].dense().double().flatten() for name in sft.updates]) for one in (sft.updates, moved)]
    cosine = torch.nn.functional.cosine_similarity(*dense, dim=0)
    (warning,) = merge({"sft": sft, "dpo": replace(sft, updates=moved, path=None)}, stack=True).plan.warnings
    assert warning.startswith(f"dpo: its updates are like those of sft (cosine {cosine:.2f})")
    assert merge({"sft": sft, "dpo": dpo}, stack=True).plan.warnings == []


def test_a_stack_is_a_base_of_the_next(place: Path, made: Path) -> None:
    """Fused as a stack, and the next one trained on that."""
    words = (place / "sft", place / "dpo", "--stack")
    whole = fused(place, "whole", *words)
    shutil.copytree(made / "grpo", place / "grpo")
    rename(place / "grpo", str(whole))
    members = [read_adapter(place / name) for name in ("sft", "dpo", "grpo")]
    plan = merge(members, stack=True).plan
    assert plan.stack
    assert plan.stack.known == ["grpo was trained on whole, which holds sft and dpo"]
    page = " ".join(call("merge", *words, "-o", place / "out").output.split())
    assert "sft, then dpo" in page
    assert "1, a stack is summed whole" in page
