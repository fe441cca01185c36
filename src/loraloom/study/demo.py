"""The embedded defaults: studies on a real base model and real text that every installation has or can make."""

from __future__ import annotations

from typing import Any

from loraloom.study.recipe import Recipe
from loraloom.tasks.builtin import ANSWERED_NAMES, LABELLED_NAMES

# the learning rate was chosen on held-out rows, never on the test rows: docs/demo.md
_INITS: dict[str, dict[str, Any]] = {
    "LoRA": {"rule": "default", "description": "plain LoRA: PEFT's default A, a seed of its own for every task"},
    "LoRA, shared seed": {
        "rule": "default",
        "seed": "shared",
        "description": "plain LoRA with one seed for all tasks, so that all start from the same A: an unfair baseline, "
        "shown because many scripts train so",
    },
    "OSRM": {
        "rule": "osrm",
        "description": "OSRM as published: A starts in the quietest directions of the other tasks, and is let go",
    },
    "apart": {
        "rule": "apart",
        "description": "loraloom's default: A starts at random off the loud half of what the base model sees of any "
        "text, responds to its inputs as PEFT's default A would, and is let go",
    },
}


# tasks, rows of each, epochs, scales a rule, and texts that heads are aligned on: both sizes run the same stages
_FULL: dict[str, Any] = {
    "tasks": LABELLED_NAMES,
    "rows": {"train_rows": 500, "heldout_rows": 120, "test_rows": 240},
    "epochs": 3,
    "scales": {"task_arithmetic": [0.3, 0.5, 1.0], "ties": [0.5, 1.0], "tsv": [0.5, 1.0]},
    "texts": 120,
}
_FAST: dict[str, Any] = {
    "tasks": ("topic", "match"),
    "rows": {"train_rows": 64, "heldout_rows": 24, "test_rows": 32},
    "epochs": 1,
    "scales": {"task_arithmetic": [0.3, 0.6], "tsv": [1.0]},
    "texts": 32,
}


_CHAT_FULL: dict[str, Any] = {
    "rows": {"train_rows": 240, "heldout_rows": 24, "test_rows": 40},
    "texts": {"texts": 40, "atlas_texts": 60},
    "scales": {"task_arithmetic": [0.3, 0.5, 0.75, 1.0], "tsv": [0.5, 1.0]},
}
_CHAT_FAST: dict[str, Any] = {
    "rows": {"train_rows": 32, "heldout_rows": 8, "test_rows": 12},
    "texts": {"texts": 16, "atlas_texts": 16},
    "scales": {"task_arithmetic": [0.5, 1.0]},
}


def demo_recipe(*, fast: bool = False) -> Recipe:
    """Return the recipe of `loraloom demo`.

    fast: a reduced size, which checks the installation and gives no result.
    """
    size = _FAST if fast else _FULL
    recipe = {
        "name": "loraloom demo (fast)" if fast else "loraloom demo",
        "base": "demo",
        "seeds": [0],
        "tasks": {name: {"source": "builtin", **size["rows"]} for name in size["tasks"]},
        "lora": {"rank": 8, "alpha": 16, "targets": ["query", "value"]},
        "statistics": {"texts": min(100, size["rows"]["train_rows"]), "kind": "token", "max_length": 48},
        "training": {"epochs": size["epochs"], "learning_rate": 5e-3, "batch_size": 16, "max_length": 48},
        "inits": _INITS,
        "merging": [{"rule": rule, "scales": scales} for rule, scales in size["scales"].items()],
        "alignment": {"texts": size["texts"]},
    }
    return Recipe.parse(recipe, "demo recipe")


def chat_demo_recipe(*, fast: bool = False) -> Recipe:
    """Return the recipe of `loraloom demo --chat`: adapters that write, on SmolLM2-135M-Instruct."""
    size = _CHAT_FAST if fast else _CHAT_FULL
    recipe = {
        "name": "loraloom demo --chat (fast)" if fast else "loraloom demo --chat",
        "base": "smollm2",
        "seeds": [0],
        "tasks": {name: {"source": "builtin", "system": "Answer briefly.", **size["rows"]} for name in ANSWERED_NAMES},
        "lora": {"rank": 16, "alpha": 32, "targets": "all-linear"},
        "statistics": {**size["texts"], "kind": "token", "max_length": 96},
        "evaluation": {"agreement": 8},  # of each candidate: more would cost minutes
        "training": {
            "epochs": 1,
            "learning_rate": 1e-3,
            "batch_size": 8,
            "max_length": 96,
            "eval_batch_size": 24,
            "precision": "bfloat16",
        },
        "inits": {"apart": _INITS["apart"]},
        "merging": [{"rule": rule, "scales": scales} for rule, scales in size["scales"].items()],
    }
    return Recipe.parse(recipe, "demo recipe")
