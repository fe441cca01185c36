"""TRL's SFTTrainer with LoRA: one adapter for each task of a recipe, started off the others by three lines.

    python examples/trl_adapters.py tasks.yaml adapters/
    loraloom compare adapters/* --recipe tasks.yaml -o comparison/

`tasks.yaml` is a recipe with `name`, `base` and tasks of prompts and answers. Rows are read from it, so that no test or
held-out row is trained on; rank, targets, epochs and learning rate are the recipe's too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from loraloom import Generator, Recipe, base_folder, build_task, collect, initialise, task_seed

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("recipe", type=Path)
parser.add_argument("output", type=Path, help="gets a folder for each task, named for it")
parser.add_argument("--seed", type=int, default=0)
given = parser.parse_args()

recipe = Recipe.load(given.recipe)
base, lora, training = base_folder(recipe.base), recipe.lora, recipe.training
tasks = {name: build_task(name, options) for name, options in recipe.tasks.items()}
reader = Generator(base)
texts = {name: task.sample("train", recipe.statistics.texts) for name, task in tasks.items()}
seen = {name: collect(reader, rows, lora.targets, recipe.statistics) for name, rows in texts.items()}


def chats(rows: Dataset) -> Dataset:
    """Return rows as TRL takes them, with the loss on the completion alone."""
    turns = [
        {
            "prompt": [*(row["history"] or []), {"role": "user", "content": row["text_a"]}],
            "completion": [{"role": "assistant", "content": row["label"]}],
        }
        for row in rows
    ]
    return Dataset.from_list(turns)


for name, task in tasks.items():
    seed = task_seed(given.seed, name)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(**lora.for_peft(), task_type="CAUSAL_LM"),
    )
    # the three lines: A starts where the other tasks' inputs are quiet, B at 0, and a callback keeps A there
    others = {other: seen[other] for other in tasks if other != name}
    start = initialise(model, seen[name], others, seed=seed)
    callbacks = [start.callback()]
    trainer = SFTTrainer(
        model,
        SFTConfig(
            str(given.output / name),
            num_train_epochs=training.epochs,
            learning_rate=training.learning_rate,
            per_device_train_batch_size=training.batch_size,
            max_length=training.max_length,
            seed=seed,
            bf16=torch.cuda.is_available(),
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=chats(task.train),
        processing_class=reader.tokenizer,
        callbacks=callbacks,
    )
    trainer.train()
    model.save_pretrained(given.output / name)
    print(f"{given.output / name}: loss {trainer.state.log_history[-1]['train_loss']:.3f} nats per answer token")
