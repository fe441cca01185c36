"""Three trained adapters of unlike rank, scaling and targets: merged, each keeps half of its gain, or it is told."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from loraloom.adapters.peft import read_adapter, write_adapter
from loraloom.cli.main import app

VOCABULARY, WORDS = 40, 12
TASKS = {
    "support": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "legal": {
        "r": 8,
        "lora_alpha": 4,
        "use_rslora": True,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    },
    "sales": {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"},
}


@pytest.fixture(autouse=True)
def _loud_again() -> Iterator[None]:
    """Commands silence every library in this process; other tests want to hear them."""
    yield
    logging.disable(logging.NOTSET)


def rows(task: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Prompts of a task's own token, noise and a word; the answer tells in which half of the words that one is."""
    generator = torch.Generator().manual_seed(100 * task + seed)
    word = torch.randint(WORDS, (count,), generator=generator)
    noise = torch.randint(WORDS, (count, 3), generator=generator)
    prompts = torch.cat([torch.full((count, 1), 20 + task), noise, word[:, None]], dim=1)
    return prompts, 30 + 2 * task + (word % 2 if task % 2 else word // (WORDS // 2))


def loss(model: Any, task: int, count: int, seed: int) -> Tensor:
    prompts, answers = rows(task, count, seed)
    return torch.nn.functional.cross_entropy(model(input_ids=prompts).logits[:, -1], answers)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base/, the trained adapters, and loud/: that of legal three times as large."""
    folder = tmp_path_factory.mktemp("planted")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.3, **sizes)).save_pretrained(
        folder / "base"
    )
    for index, (name, options) in enumerate(TASKS.items()):
        torch.manual_seed(index)
        base = LlamaForCausalLM.from_pretrained(folder / "base")
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        for step in range(60):
            optimizer.zero_grad()
            loss(model, index, 32, seed=step).backward()
            optimizer.step()
        model.save_pretrained(folder / name)
    write_adapter(read_adapter(folder / "legal").scaled(3.0), folder / "loud" / "legal", provenance={})
    return folder


def kept(place: Path, merged: Path) -> dict[str, float]:
    """Return what a merged adapter keeps of each single adapter's gain in loss, on rows that nobody trained on."""
    found = {}
    for index, name in enumerate(TASKS):
        losses = []
        for folder in (None, place / name, merged):
            model = LlamaForCausalLM.from_pretrained(place / "base")
            model = PeftModel.from_pretrained(model, folder) if folder else model
            with torch.no_grad():
                losses.append(float(loss(model, index, 200, seed=999)))
        before, own, after = losses
        assert before - own > 3  # nats: each adapter has learnt its task
        found[name] = (before - after) / (before - own)
    return found


def merge(place: Path, out: Path, *words: str, legal: str = "legal") -> str:
    """Merge by the command with defaults; return what it said before the merge began."""
    folders = [place / "support", place / legal, place / "sales"]
    done = CliRunner().invoke(app, ["merge", *map(str, folders), "-o", str(out), *words], env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.stderr
    return " ".join(done.stderr.partition("merging:")[0].split())


def card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def test_with_defaults_each_keeps_more_than_half_of_what_it_gained(place: Path, tmp_path: Path) -> None:
    said = merge(place, tmp_path / "out")
    assert "likely to be lost" not in said
    assert "- normalised: no: their energies |dW|^2 differ 2.1" in card(tmp_path / "out")
    assert min(kept(place, tmp_path / "out").values()) > 0.5


def test_where_one_drowns_the_others_the_merge_says_so_before_it_writes(place: Path, tmp_path: Path) -> None:
    said = merge(place, tmp_path / "out", "--normalise", "none", legal="loud/legal")
    assert "legal has up to" in said
    assert "times the energy |dW|^2 of support, sales: " in said
    assert "what the quiet ones learnt is likely to be lost; `--normalise norm` makes all equally loud" in said
    drowned = kept(place, tmp_path / "out")
    assert max(drowned["support"], drowned["sales"]) < 0.25
    assert "likely to be lost" not in merge(place, tmp_path / "even", "--normalise", "norm", legal="loud/legal")
    even = kept(place, tmp_path / "even")
    assert even["legal"] > 0.5
    assert min(even.values()) > min(drowned.values()) + 0.25


def test_by_default_unlike_energies_are_made_equal_and_that_is_told(place: Path, tmp_path: Path) -> None:
    """Not where weights are given, which are meant as they are."""
    said = merge(place, tmp_path / "out", legal="loud/legal")
    line = (
        "- normalised: every adapter to the same |dW| in each layer, before the weights: their energies |dW|^2 differ"
    )
    assert line in card(tmp_path / "out")
    assert "likely to be lost" not in said
    merge(place, tmp_path / "asked", "--normalise", "norm", legal="loud/legal")
    found, asked = (read_adapter(tmp_path / name).updates for name in ("out", "asked"))
    for module, update in found.items():
        torch.testing.assert_close(update.dense(), asked[module].dense())
    told = json.loads((tmp_path / "out" / "loraloom.json").read_text(encoding="utf-8"))
    assert (told["normalise"], told["normalise_from"]) == ("norm", "energies")
    assert told["loudness"] == pytest.approx(max(e := [one["energy"] for one in told["inputs"]]) / min(e))
    weighted = merge(place, tmp_path / "weighted", *("--weight", "1") * 3, legal="loud/legal")
    assert "- normalised: no: the weights were given" in card(tmp_path / "weighted")
    assert "likely to be lost" in weighted
