"""`loraloom serve-check`: its differences against PEFT's own forward pass, and what it finds wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny
from commands import call, page, refused, said
from tiny_writers import writer_adapter, writer_base

PROMPTS = ("--prompt", "the film was good", "--prompt", "tea", "--tokens", 5)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two adapters of it, and their merge beside them."""
    place = tmp_path_factory.mktemp("served")
    writer_base(place / "base")
    for seed, name in enumerate(("one", "two")):
        writer_adapter(place / "base", place / name, seed=seed)
    said("merge", place / "one", place / "two", "--for", "vllm", "-o", place / "merged")
    return place


def test_merge_and_members_are_served_as_they_are(place: Path) -> None:
    told = said("serve-check", place / "merged", "--base", place / "base", *PROMPTS)
    assert [one["adapter"] for one in told["adapters"]] == ["merged", "one", "two", "base"]
    assert told["fine"] is True
    assert told["absent"] == []
    for one in told["adapters"]:
        assert one["difference"] <= one["rounding"] < 0.01
        assert one["again"] == 0
        assert one["effect"] is None or one["effect"] > 0.1
    # the effect and the answers, by PEFT and transformers alone
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    ids = torch.tensor([tiny.tokenizer("llama")("tea")["input_ids"]])
    with torch.no_grad():
        plain = base.eval()(ids).logits[:, -1]
        model = PeftModel.from_pretrained(base, str(place / "merged")).eval()
        served = model(ids).logits[:, -1]
        expected = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert told["adapters"][0]["effect"] >= float((served - plain).abs().max()) - 1e-4
    (answer,) = (one["answer"] for one in told["answers"] if (one["prompt"], one["adapter"]) == ("tea", "merged"))
    assert answer == tiny.tokenizer("llama").decode(expected, skip_special_tokens=True).strip()


def test_an_adapter_that_peft_does_not_see_is_told_and_exits_with_1(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "one", tmp_path / "one")
    weights = tmp_path / "one" / "adapter_model.safetensors"
    renamed = {key.replace("model.layers", "model._orig_mod.layers"): one for key, one in load_file(weights).items()}
    save_file(renamed, weights)  # as torch.compile's; read here, and left out by PEFT
    words = ("serve-check", tmp_path / "one", place / "two", "--base", place / "base", *PROMPTS)
    done = call(*words, "--json")
    assert done.exit_code == 1
    rows = {one["adapter"]: one for one in json.loads(done.stdout)["adapters"]}
    assert {name: one["fine"] for name, one in rows.items()} == {"one": False, "two": True, "base": True}
    assert rows["one"]["difference"] == pytest.approx(rows["one"]["effect"], rel=1e-3)
    done = call(*words)
    assert "PEFT serves one as something else" in " ".join(done.stderr.split())
    said("export", tmp_path / "one", "--for", "vllm", "-o", tmp_path / "mended")
    shown = page("serve-check", tmp_path / "mended", place / "two", "--base", place / "base", *PROMPTS)
    assert "> tea" in shown


def test_another_base_is_refused(place: Path, tmp_path: Path) -> None:
    writer_base(tmp_path / "gpt2", "gpt2")
    told = refused("serve-check", place / "one", "--base", tmp_path / "gpt2", *PROMPTS)
    assert "the base model has no layer model.layers.0.self_attn.q_proj" in told
    assert "use the adapter's own base model" in told


def test_transposed_layers_of_gpt2(tmp_path: Path) -> None:
    writer_base(tmp_path / "base", "gpt2")
    writer_adapter(tmp_path / "base", tmp_path / "one", kind="gpt2")
    assert said("serve-check", tmp_path / "one", "--base", tmp_path / "base", *PROMPTS)["fine"] is True
