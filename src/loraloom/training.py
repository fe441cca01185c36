"""Fine-tune one adapter on one task with the Hugging Face Trainer: held-out checkpoints, early stopping, resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import peft
import torch
import transformers
from datasets import Dataset
from peft import (
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from transformers import DataCollatorWithPadding, EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

import loraloom
from loraloom.adapter import PROVENANCE, read_adapter, read_provenance
from loraloom.atomic import staged_folder, write_text
from loraloom.base import head_modules, load_classifier, load_tokenizer
from loraloom.errors import LoraloomError
from loraloom.initialise import keep_callback
from loraloom.metrics import metric_value
from loraloom.recipe import LoraSettings, TrainingSettings
from loraloom.tasks.encoding import encode
from loraloom.tasks.task import Task

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Trained:
    """A trained adapter folder and its best held-out metric."""

    folder: Path
    heldout: float
    steps: int


def train_adapter(
    base: str,
    task: Task,
    output: str | Path,
    *,
    init: str | Path | None = None,
    lora: LoraSettings | None = None,
    settings: TrainingSettings | None = None,
    seed: int = 0,
    checkpoints: Path | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train one adapter and its head on `task.train`, keep the best checkpoint on `task.heldout`, write a PEFT folder.

    base: hub name or folder. init: an adapter folder to start from, as `initialise` writes it; PEFT's own start from
    `lora` without. seed: of the head, the order of rows, dropout, and PEFT's start. checkpoints: where unfinished work
    lies; the same call after a kill goes on from the last whole checkpoint there, and the folder is removed at the
    end. progress(steps done, steps in all) is called after every optimiser step.

    Raises LoraloomError for a base or init that cannot be used, and where the loss is not finite.
    """
    settings = settings or TrainingSettings()
    output = Path(output)
    checkpoints = checkpoints or output.with_name(f".{output.name}.checkpoints")
    model = _peft_model(base, task, init, lora or LoraSettings(), seed)
    tokenizer = load_tokenizer(base)
    trainer = Trainer(
        model=model,
        args=_arguments(settings, seed, checkpoints),
        train_dataset=_dataset(task, "train", tokenizer, settings),
        eval_dataset=_dataset(task, "heldout", tokenizer, settings),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=_metrics(task),
        callbacks=_callbacks(settings, init, progress),
    )
    for callback in (transformers.PrinterCallback, transformers.ProgressCallback):
        trainer.remove_callback(callback)
    trainer.train(resume_from_checkpoint=_last_whole(checkpoints))
    best = trainer.state.best_metric
    if best is None or not all(numpy.isfinite(entry.get("loss", 0.0)) for entry in trainer.state.log_history):
        raise LoraloomError(f"task {task.name!r}: the training loss is not finite", "lower the learning rate")
    _save(model, output, task, init, settings, seed, trainer.state)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return Trained(output, float(best), int(trainer.state.global_step))


def _peft_model(base: str, task: Task, init: str | Path | None, lora: LoraSettings, seed: int) -> PeftModel:
    model = load_classifier(base, task.outputs, regression=task.labels is None, seed=seed)
    if init is None:
        torch.manual_seed(seed)
        return get_peft_model(model, lora_config(lora, head_modules(model)))
    read_adapter(init)  # for its checks
    config = LoraConfig.from_pretrained(str(init))
    config.modules_to_save, config.task_type, config.inference_mode = head_modules(model), TaskType.SEQ_CLS, False
    peft_model = get_peft_model(model, config)
    # a start has no head in its file: the fresh one stays
    tensors = {**get_peft_model_state_dict(peft_model), **load_peft_weights(str(init), device="cpu")}
    stray = set_peft_model_state_dict(peft_model, tensors).unexpected_keys
    if stray:
        raise LoraloomError(f"{init}: the base model has no layer for {stray[0]}", "start from an adapter of this base")
    return peft_model


def lora_config(lora: LoraSettings, head: list[str]) -> LoraConfig:
    """Return PEFT's config for a sequence classifier with the given head modules saved whole."""
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        use_rslora=lora.rslora,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        modules_to_save=head,
        task_type=TaskType.SEQ_CLS,
    )


def _arguments(settings: TrainingSettings, seed: int, checkpoints: Path) -> TrainingArguments:
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.eval_batch_size,
        gradient_accumulation_steps=settings.accumulate,
        gradient_checkpointing=settings.gradient_checkpointing,
        lr_scheduler_type="linear",
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        bf16=settings.precision == "bfloat16" or (settings.precision == "auto" and bf16),
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        train_sampling_strategy="group_by_length",
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
        data_seed=seed,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
    )


def _callbacks(settings: TrainingSettings, init: str | Path | None, progress: Progress | None) -> list[TrainerCallback]:
    callbacks: list[TrainerCallback] = [keep_callback(init)] if init is not None else []
    if settings.patience is not None:
        callbacks.append(EarlyStoppingCallback(settings.patience))
    if progress is not None:
        callbacks.append(_ReportProgress(progress))
    return callbacks


class _ReportProgress(TrainerCallback):  # type: ignore[misc, unused-ignore]
    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(state.global_step, state.max_steps)


def _dataset(task: Task, split: str, tokenizer: Any, settings: TrainingSettings) -> Dataset:
    rows = getattr(task, split)
    encoded = encode(rows, tokenizer, settings.max_length)
    kind = int if task.labels else float
    return Dataset.from_list(
        [{**row, "labels": kind(label)} for row, label in zip(encoded, rows["label"], strict=True)]
    )


def _metrics(task: Task) -> Callable[[Any], dict[str, float]]:
    def compute(prediction: Any) -> dict[str, float]:
        logits = prediction.predictions
        # T5 classifiers return further tensors beside the logits
        logits = logits[0] if isinstance(logits, tuple) else logits
        return {"score": metric_value(task.metric, torch.as_tensor(logits), torch.as_tensor(prediction.label_ids))}

    return compute


def _last_whole(checkpoints: Path) -> str | None:
    """Return the newest checkpoint that was written to its end (the trainer's state comes last); drop broken ones."""
    found = sorted(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    whole = [path for path in found if _is_json(path / "trainer_state.json")]
    for path in found:
        if path not in whole:
            shutil.rmtree(path, ignore_errors=True)
    return str(whole[-1]) if whole else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _save(
    model: PeftModel,
    output: Path,
    task: Task,
    init: str | Path | None,
    settings: TrainingSettings,
    seed: int,
    state: Any,
) -> None:
    provenance = {
        **(read_provenance(init) if init is not None else {}),
        "made_by": "loraloom train",
        "versions": {
            "loraloom": loraloom.__version__,
            "peft": peft.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "task": {"name": task.name, "sha256": task.digest(), "metric": task.metric, "labels": task.labels},
        "training": {**settings.model_dump(), "seed": seed},
        "heldout": {"metric": task.metric, "best": state.best_metric, "step": state.best_global_step},
    }
    with staged_folder(output) as staged:
        model.save_pretrained(str(staged))
        (staged / "README.md").unlink(missing_ok=True)
        write_text(staged / PROVENANCE, json.dumps(provenance, indent=2) + "\n")
