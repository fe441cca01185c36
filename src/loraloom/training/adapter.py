"""Fine-tune one adapter on one task with the Hugging Face Trainer: held-out checkpoints, early stopping, resume."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from accelerate import PartialState
from peft import (
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

import loraloom
from loraloom.adapters.bases import public_name
from loraloom.adapters.peft import PROVENANCE, adapter_sha256, read_adapter, read_provenance
from loraloom.errors import LoraloomError, collecting, raise_problems
from loraloom.files.atomic import staged_folder
from loraloom.files.hashing import write_json
from loraloom.files.outputs import check_folder, unfinished
from loraloom.model.load import base_sha256
from loraloom.model.objective import Objective, objective
from loraloom.model.processes import by_first, check_training, on_cpu, raise_of_all, rank_and_size, started
from loraloom.settings import LoraSettings, TrainingSettings
from loraloom.starts.keep import keep_callback
from loraloom.tasks.task import Task
from loraloom.training.runs import (
    NOT_FINITE,
    Progress,
    Reports,
    Watch,
    arguments,
    check_reports,
    clear,
    full_disk_told,
    has_stopped,
    known_arguments,
    resumable,
    state_of,
    tensorboard_in,
)

TRAINED = "trained adapter"  # the kind of result


@dataclass(frozen=True)
class Trained:
    """A trained adapter folder, its best held-out value of the task's metric, and the optimiser steps taken."""

    folder: Path
    heldout: float
    steps: int
    metric: str


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
    overwrite: bool = False,
    progress: Progress | None = None,
    reports: Reports | None = None,
) -> Trained:
    """Train one adapter and its head on `task.train`, keep the best checkpoint on `task.heldout`, write a PEFT folder.

    base: hub name or folder.
    task: rows, head's width and metric.
    output: the folder; it appears whole at the end.
    init: an adapter folder to start from, as `initialise` writes it; PEFT's own start from `lora` without.
    lora: rank, alpha and targets, where no `init` has them.
    settings: epochs, learning rate, batches, lengths.
    seed: of the head, the order of rows, dropout, and PEFT's start.
    checkpoints: where unfinished work lies. The same call after a kill goes on from the last whole checkpoint there
      (another call starts afresh), and they are removed at the end.
    overwrite: replace a folder that holds an earlier trained adapter.
    progress: is called after every optimiser step with the steps done, those in all, and the last training loss known.
    reports: where else the Trainer's curves go.

    Under `accelerate launch` or torchrun every process calls this, and they train together: a batch is shared out among
    them, the first one writes and tells its progress, all return the same. They need one file system.

    Raises LoraloomError for a base, an init or reports that cannot be used, where the loss is not finite, and for a
    full disk: in all processes the same one, but for a full disk, which the first one meets alone.
    """
    settings, lora = settings or TrainingSettings(), lora or LoraSettings()
    output = Path(output)
    checkpoints = checkpoints or unfinished(output)
    PartialState(cpu=on_cpu())  # joins the processes that a launcher started
    errors: list[LoraloomError] = []
    with collecting(errors):
        check_trained(output, base, init, overwrite)
        check_reports(reports.to if reports else ())
        check_training(settings.batch_size)
        aim = objective(base, task, settings.max_length, seed)
        model = _peft_model(aim, init, lora, seed)
        rows = {split: aim.rows(getattr(task, split)) for split in ("train", "heldout")}
        call = _call(base, task, init, lora, settings, seed)
    raise_of_all(errors)
    checkpoint = by_first(lambda: resumable(checkpoints, call))
    curves = reports.arguments() if reports else {}
    with tensorboard_in(reports):
        trainer = Trainer(
            model=model,
            args=arguments(settings, seed, checkpoints, **_by_epoch(aim, settings, checkpoint), **curves),
            train_dataset=rows["train"],
            eval_dataset=rows["heldout"],
            data_collator=aim.collator,
            compute_metrics=aim.compute,
            preprocess_logits_for_metrics=_logits,
            callbacks=_callbacks(task, settings, init, progress),
        )
    trainer.remove_callback(transformers.PrinterCallback)
    with full_disk_told(checkpoints):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    best = trainer.state.best_metric
    if best is None or not all(torch.isfinite(tensor).all() for tensor in get_peft_model_state_dict(model).values()):
        raise LoraloomError(f"task {task.name!r}: the trained weights are not finite", NOT_FINITE)
    by_first(lambda: _save(model, base, output, task, init, settings, seed, trainer.state, overwrite))
    by_first(lambda: clear(checkpoints))
    return Trained(output, float(best), int(trainer.state.global_step), _told_by(task))


def check_trained(output: Path, base: str, init: str | Path | None, overwrite: bool) -> None:
    """Raise LoraloomError where a trained adapter must not be written to `output`."""
    inputs = [Path(base), *([Path(init)] if init is not None else [])]
    check_folder(output, kind=TRAINED, overwrite=overwrite, inputs=inputs)


def _peft_model(aim: Objective, init: str | Path | None, lora: LoraSettings, seed: int) -> PeftModel:
    if init is None:
        torch.manual_seed(seed)
        return _wrapped(aim.model, lora_config(lora, aim.head, aim.task_type))
    read_adapter(init)  # for its checks
    config = LoraConfig.from_pretrained(str(init))
    config.modules_to_save, config.task_type, config.inference_mode = aim.head or None, aim.task_type, False
    config.base_model_name_or_path = None  # PEFT warns where this is another spelling of the same base
    peft_model = _wrapped(aim.model, config)
    fresh, start = get_peft_model_state_dict(peft_model), load_peft_weights(str(init), device="cpu")
    problems = [f"the base model has no layer for {name}" for name in sorted(start.keys() - fresh.keys())]
    for name in sorted(fresh.keys() & start.keys()):
        if fresh[name].shape != start[name].shape:
            problems.append(f"{name} is {tuple(start[name].shape)}, in the model {tuple(fresh[name].shape)}")
    problems += [f"it lacks {name}" for name in sorted(fresh.keys() - start.keys()) if ".lora_" in name]
    raise_problems(str(init), problems, "start from an adapter of this base model")
    # a start has no head in its file: the fresh one stays
    set_peft_model_state_dict(peft_model, {**fresh, **start})
    return peft_model


def _wrapped(model: transformers.PreTrainedModel, config: LoraConfig) -> PeftModel:
    with warnings.catch_warnings():
        # PEFT mends fan_in_fan_out for GPT-2 by itself, and asks transformers for a name it has deprecated
        warnings.filterwarnings("ignore", message="fan_in_fan_out|.*gradient_checkpointing")
        return get_peft_model(model, config)


def lora_config(lora: LoraSettings, head: list[str], task_type: TaskType = TaskType.SEQ_CLS) -> LoraConfig:
    """Return PEFT's config of an adapter to train.

    lora: its shape.
    head: modules that are trained and saved whole, if any.
    task_type: PEFT's, of the model.
    """
    return LoraConfig(**lora.for_peft(), modules_to_save=head or None, task_type=task_type)


def _by_epoch(aim: Objective, settings: TrainingSettings, checkpoint: Path | None) -> dict[str, Any]:
    """Return the Trainer's arguments of a training in epochs over rows of one task."""
    state = state_of(checkpoint)
    new = "train_sampling_strategy" in known_arguments()  # transformers 5 renamed it on its way
    return {
        "num_train_epochs": round(state["epoch"]) if has_stopped(state) else settings.epochs,
        "per_device_train_batch_size": settings.batch_size // started(),
        "per_device_eval_batch_size": settings.eval_batch_size,
        "gradient_accumulation_steps": settings.accumulate,
        **({"train_sampling_strategy": "group_by_length"} if new else {"group_by_length": True}),
        **dict.fromkeys(("eval_strategy", "save_strategy"), "epoch"),
        "logging_steps": 0.01,  # a share of all; each is a wait for the GPU
        "metric_for_best_model": aim.metric,
        "greater_is_better": aim.greater,
        "prediction_loss_only": aim.compute is None,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def _callbacks(
    task: Task, settings: TrainingSettings, init: str | Path | None, progress: Progress | None
) -> list[TrainerCallback]:
    callbacks: list[TrainerCallback] = [Watch(f"task {task.name!r}", progress if rank_and_size()[0] == 0 else None)]
    if init is not None:
        callbacks.append(keep_callback(init))
    if settings.patience is not None:
        callbacks.append(EarlyStoppingCallback(settings.patience))
    return callbacks


def _told_by(task: Task) -> str:
    """Return the metric by which held-out rows pick a checkpoint; the loss where answers would have to be written."""
    return "loss" if task.kind.generates else task.metric


def _logits(outputs: Any, _: Any) -> Any:
    """Return the logits alone: T5 and decoders return further tensors beside them."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def _call(
    base: str, task: Task, init: str | Path | None, lora: LoraSettings, settings: TrainingSettings, seed: int
) -> str:
    """Return what the result hangs on, as JSON: a checkpoint of another call must not be gone on from."""
    start = lora.model_dump() if init is None else [adapter_sha256(init), read_provenance(init).get("init")]
    content = [base_sha256(base), task.digest(), start, settings.model_dump(), seed, transformers.__version__]
    content += [started()] if started() > 1 else []  # each process has a state of its own beside the checkpoint
    return json.dumps(content, sort_keys=True)


def _save(
    model: PeftModel,
    base: str,
    output: Path,
    task: Task,
    init: str | Path | None,
    settings: TrainingSettings,
    seed: int,
    state: Any,
    overwrite: bool,
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
        "heldout": {"metric": _told_by(task), "best": state.best_metric, "step": state.best_global_step},
    }
    with staged_folder(output, kind=TRAINED, overwrite=overwrite) as staged:
        config = model.peft_config["default"]
        config.base_model_name_or_path = public_name(base)  # a folder means nothing on another machine
        if isinstance(config.target_modules, set):  # which every process would write in an order of its own
            config.target_modules = sorted(config.target_modules)
        model.save_pretrained(str(staged), save_embedding_layers=False)
        (staged / "README.md").unlink(missing_ok=True)
        write_json(staged / PROVENANCE, provenance)
