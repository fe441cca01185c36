"""The trainings of docs/trainers.md, run as they stand there: each trains a start of ours and saves what merges."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from commands import call, refused
from loraloom.adapters.peft import CONFIG, read_adapter
from loraloom.merging import merge, write_merged
from loraloom.statistics.collect import collect_statistics
from tiny import TARGETS, WORDS
from tiny_writers import prompt_rows, writer_base

PAGE = (Path(__file__).parent.parent / "docs" / "trainers.md").read_text(encoding="utf-8")


def block(title: str) -> str:
    """Return the first code block below a title."""
    found = re.search(rf"^## {re.escape(title)}\n.*?^```\w+\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert found, title
    return found[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, and starts of two tasks as `loraloom init` writes them."""
    folder = tmp_path_factory.mktemp("trainers")
    base = writer_base(folder / "base", chat=True)
    model = AutoModelForCausalLM.from_pretrained(base)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, len(WORDS), (4, 8), generator=generator) for _ in range(3)]
    batches = [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]
    collect_statistics(model, batches, TARGETS["llama"]).save(folder / "atlas.safetensors")
    for name in ("support-start", "legal-start"):
        words = ("--atlas", folder / "atlas.safetensors", "--rank", "2", "--task-type", "CAUSAL_LM")
        assert call("init", *words, "-o", folder / name).exit_code == 0
    return folder


def trained(place: Path, title: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a block of the page in a folder that holds the start, with tiny data under the names that the page has."""
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    texts = [f"{row['prompt']} {row['answer']}" for row in prompt_rows("first", 8)]
    tokens = [tokenizer(text, max_length=6, padding="max_length", truncation=True)["input_ids"] for text in texts]
    turns = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}]
        for row in prompt_rows("first", 8)
    ]
    names: dict[str, Any] = {"base": place / "base", "chats": Dataset.from_list([{"messages": one} for one in turns])}
    names["rows"] = Dataset.from_list([{"input_ids": one, "labels": one} for one in tokens])
    (folder / "support-start").symlink_to(place / "support-start")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    exec(compile(block(title), title, "exec"), names)


@pytest.mark.parametrize("title", ["PyTorch alone", "Hugging Face Trainer", "TRL's SFTTrainer"])
def test_a_start_is_trained_as_the_page_says_and_merges(
    title: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "TRL" in title:
        pytest.importorskip("trl")
    assert "loraloom" not in block(title)
    trained(place, title, tmp_path, monkeypatch)
    start, found = read_adapter(place / "support-start"), read_adapter(tmp_path / "support")
    assert found.shapes == start.shapes
    assert all(not start.updates[module].B.any() for module in start.shapes)
    assert all(found.updates[module].B.any() for module in start.shapes)
    for module in start.shapes:  # it went on from A, and did not draw its own
        moved = (found.updates[module].A - start.updates[module].A).norm() / start.updates[module].A.norm()
        assert float(moved) < 0.5
    other = legal(place, tmp_path / "legal")
    folder = write_merged(merge([found, other], "weighted", scale=1.0, normalise="none"), tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    model = PeftModel.from_pretrained(base, str(folder))
    for module in found.shapes:
        layer = model.get_submodule(f"base_model.model.{module}")
        expected = 0.5 * (found.updates[module].dense() + other.updates[module].dense())
        torch.testing.assert_close(layer.get_delta_weight("default").detach(), expected)


def legal(place: Path, folder: Path) -> Any:
    """Return an adapter of another task, as PEFT alone makes it."""
    torch.manual_seed(1)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(place / "base"), config).save_pretrained(folder)
    return read_adapter(folder)


def test_each_task_starts_elsewhere(place: Path) -> None:
    one, other = (load_file(place / f"{name}-start" / "adapter_model.safetensors") for name in ("support", "legal"))
    assert all(not torch.equal(one[key], other[key]) for key in one if "lora_A" in key)


def test_a_start_says_what_its_base_does_where_that_is_asked_for(place: Path, tmp_path: Path) -> None:
    assert json.loads((place / "support-start" / CONFIG).read_text())["task_type"] == "CAUSAL_LM"
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(place / "base"), str(place / "support-start"), is_trainable=True
    )
    assert type(model).__name__ == "PeftModelForCausalLM"  # Unsloth takes no other
    words = ("init", "--atlas", place / "atlas.safetensors", "--task-type", "SEQ_CLS", "-o", tmp_path / "start")
    assert "task type 'SEQ_CLS': no base without a head" in refused(*words)
    assert not (tmp_path / "start").exists()


@pytest.mark.parametrize(("tool", "key"), [("axolotl", "lora_model_dir"), ("LLaMA-Factory", "adapter_name_or_path")])
def test_the_recipes_of_other_trainers_are_yaml_that_names_the_start(tool: str, key: str) -> None:
    assert yaml.safe_load(block(tool))[key] == "support-start"
