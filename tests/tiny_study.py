"""A tiny study as a user has it: a base model's folder, data files of two tasks, and a recipe beside them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

import tiny
from loraloom.files.hashing import file_sha256

ROWS = {"train": 40, "test": 16}


def write_rows(path: Path, task: str, count: int) -> None:
    """Write `count` rows of tiny.task as JSONL with the columns `text` and `mood`."""
    rows = tiny.task(task, rows=count).train
    lines = [json.dumps({"text": row["text_a"], "mood": ("bad", "good")[row["label"]]}) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def recipe(**changes: Any) -> dict[str, Any]:
    """Return a recipe over the files that `write_study` writes; `changes` replace its sections."""
    tasks = {
        name: {
            "source": "files",
            "train": f"{name}.train.jsonl",
            "test": f"{name}.test.jsonl",
            "text": ["text"],
            "label": "mood",
            "heldout_rows": 8,
        }
        for name in ("mood", "tone")
    }
    return {
        "name": "tiny",
        "base": "./base",
        "tasks": tasks,
        "lora": {"rank": 2, "alpha": 4, "targets": ["query", "value"]},
        "statistics": {"texts": 12, "max_length": 16},
        "training": {"epochs": 2, "learning_rate": 0.01, "batch_size": 8, "max_length": 16},
        "inits": {"LoRA": {"rule": "default"}, "OSRM, kept": {"rule": "apart", "keep": "projected"}},
        "merging": [{"rule": "task_arithmetic", "scales": [0.5, 1.0]}, {"rule": "tsv", "scales": [1.0]}],
        "alignment": {"texts": 10},
        **changes,
    }


def write_study(folder: Path, kind: str = "bert", **changes: Any) -> Path:
    """Write base model, data files and recipe.yaml into `folder`; return the recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base").is_dir():
        tiny.base_folder(kind, folder / "base")
    for task in ("mood", "tone"):
        for split, count in ROWS.items():
            write_rows(folder / f"{task}.{split}.jsonl", f"{task}.{split}", count)
    return write_recipe(folder, **changes)


def write_recipe(folder: Path, **changes: Any) -> Path:
    """Write recipe.yaml alone."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(**changes), sort_keys=False), encoding="utf-8")
    return path


def command(*words: str | Path) -> list[str]:
    """Return the command line that runs loraloom in a process of its own."""
    return [sys.executable, "-m", "loraloom", *map(str, words)]


def environment() -> dict[str, str]:
    """Return this process's environment, without a hub and with one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "80"}


def run(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run loraloom in a process of its own and return its output."""
    return subprocess.run(command(*words), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300)


def figures(results: Path) -> dict[str, Any]:
    """Return results.json without what differs between two runs of one study."""
    content = json.loads(results.read_text(encoding="utf-8"))
    return {key: value for key, value in content.items() if key not in ("created", "seconds", "command")}


def contents(study: Path) -> dict[str, str]:
    """Return the sha256 of every file of every stage but the records, which hold how long each took."""
    files = (path for path in study.glob("stages/*/*-*/**/*") if path.is_file() and path.name != "stage.json")
    return {
        path.relative_to(study).as_posix(): file_sha256(path)
        for path in files
        if path.relative_to(study).parts[1] not in ("failures", "notes", "locks")
    }
