"""A study of two tasks of answers on a tiny random language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

import tiny

TARGETS = {"llama": ["q_proj", "v_proj", "up_proj"], "t5": ["q", "v", "wi"]}


def write_rows(path: Path, name: str, count: int) -> None:
    rows = tiny.asked(name, rows=count).train
    lines = [json.dumps({"prompt": row["text_a"], "answer": row["label"]}) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_study(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    """Write a base with a chat template, rows of two tasks and a recipe; the tasks differ in their prompts' words."""
    folder.mkdir(parents=True, exist_ok=True)
    base = tiny.base_folder(kind, folder / "base")
    if kind == "llama":
        (base / "chat_template.jinja").write_text(tiny.CHAT, encoding="utf-8")
    tasks = {}
    for name in ("mood", "tone"):
        for split, count in (("train", 40), ("test", 16)):
            write_rows(folder / f"{name}.{split}.jsonl", f"{name}.{split}", count)
        sources = {split: f"{name}.{split}.jsonl" for split in ("train", "test")}
        tasks[name] = {"source": "prompts", **sources, "heldout_rows": 8, "answer_tokens": 4}
        tasks[name]["metric"] = ["token_f1", "exact_match", "loss"]
    recipe = {
        "name": "written",
        "base": "./base",
        "tasks": tasks,
        "lora": {"rank": 2, "alpha": 4, "targets": TARGETS[kind]},
        "statistics": {"texts": 12, "max_length": 16, "atlas_texts": 12},
        "training": {"epochs": 2, "learning_rate": 0.02, "batch_size": 8, "max_length": 32},
        "inits": {"LoRA": {"rule": "default"}, "apart": {"rule": "apart"}},
        "merging": [{"rule": "task_arithmetic", "scales": [0.5, 1.0]}, {"rule": "regmean", "scales": [1.0]}],
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path
