"""Tiny adapters of language models, as PEFT saves them, with random weights."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import tiny

# turns as `<user> words </s>`, in words that the tiny tokenizer knows
CHAT = (
    "{% for turn in messages %}{% if turn['role'] == 'assistant' %}the {{ turn['content'] }} </s> "
    "{% else %}a {{ turn['content'] }} {% endif %}{% endfor %}{% if add_generation_prompt %}the {% endif %}"
)


def writer_base(folder: Path, kind: str = "llama", *, chat: bool = False) -> Path:
    """Write a tiny random causal base (llama, gpt2), with a chat template where asked."""
    tiny.base_folder(kind, folder)
    if chat:
        tokenizer = tiny.tokenizer(kind)
        tokenizer.chat_template = CHAT
        tokenizer.save_pretrained(folder)
    return folder


def writer_adapter(
    base: Path, folder: Path, *, kind: str = "llama", rank: int = 2, seed: int = 0, loud: float = 0.3
) -> Path:
    """Write an adapter of a language model whose A and B are drawn from `seed`."""
    of = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    task_type = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=tiny.TARGETS[kind], task_type=task_type)
    model = get_peft_model(of.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(loud * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def prompt_rows(task: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of prompts of a few words; the answer is the `first` of them, or the `last`."""
    chance = random.Random(f"{task}{seed}")
    words = [chance.choices(tiny.GOOD + tiny.BAD + tiny.NEUTRAL, k=chance.randint(3, 6)) for _ in range(count)]
    return [{"prompt": " ".join(one), "answer": one[0 if task == "first" else -1]} for one in words]


def prompt_recipe(folder: Path, **changes: Any) -> Path:
    """Write files of two tasks of answers and recipe.yaml, on the base in `folder`; return the recipe's path."""
    for task in ("first", "last"):
        for seed, (split, count) in enumerate((("train", 60), ("test", 10))):
            lines = [json.dumps(row) for row in prompt_rows(task, count, seed)]
            (folder / f"{task}.{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tasks = {
        name: {
            "source": "prompts",
            "train": f"{name}.train.jsonl",
            "test": f"{name}.test.jsonl",
            "heldout_rows": 8,
            "answer_tokens": 3,
        }
        for name in ("first", "last")
    }
    recipe = {
        "name": "tiny answers",
        "base": str(folder / "base"),
        "tasks": tasks,
        "lora": {"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]},
        "statistics": {"texts": 12, "max_length": 24},
        "training": {"epochs": 2, "learning_rate": 0.01, "batch_size": 8, "max_length": 24},
        **changes,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return folder / "recipe.yaml"
