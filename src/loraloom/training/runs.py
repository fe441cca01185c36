"""What every run of the Hugging Face Trainer shares: its arguments, checkpoints of one call, a watch, a full disk."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils

from loraloom.errors import LoraloomError, did_you_mean, raise_problems
from loraloom.files.atomic import write_text
from loraloom.model.processes import on_cpu
from loraloom.model.runner import in_bfloat16
from loraloom.settings import TrainingSettings

NOT_FINITE = "lower the learning rate, or train in float32"
_STATE = "trainer_state.json"  # the Trainer writes it last of a checkpoint's files
_CALL = "call.json"  # what the checkpoints beside it are of
_KNOWN_REPORTS = frozenset(integration_utils.INTEGRATION_TO_CALLBACK)
_TENSORBOARD = "TENSORBOARD_LOGGING_DIR"  # where the Trainer's callback looks for its folder


class Progress(Protocol):
    """Is told how many steps of all are done, and the training loss where there is one."""

    def __call__(self, done: int, total: int, loss: float | None = None, /) -> None: ...


@dataclass(frozen=True)
class Reports:
    """Where the Trainer's curves go, beside our own progress: its integrations, as `tensorboard` or `wandb`.

    folder: for those that write files, as TensorBoard. Its name is the run's name for the others.
    """

    to: Sequence[str]
    folder: Path

    def arguments(self) -> dict[str, Any]:
        """Return the Trainer's arguments for them."""
        return {"report_to": list(self.to), "run_name": self.folder.name}


def check_reports(to: Sequence[str]) -> None:
    """Raise LoraloomError that tells every integration of the Trainer that is unknown or not installed."""
    installed = integration_utils.get_available_reporting_integrations()  # type: ignore[no-untyped-call, unused-ignore]
    problems = [f"{name!r}: {did_you_mean(name, sorted(_KNOWN_REPORTS))}" for name in to if name not in _KNOWN_REPORTS]
    problems += [f"{name} is not installed" for name in to if name in _KNOWN_REPORTS and name not in installed]
    raise_problems("reports of training", problems, "install it with pip, or leave it out")


@contextmanager
def tensorboard_in(reports: Reports | None) -> Iterator[None]:
    """Let the Trainer's TensorBoard write into the folder of the reports, unless the environment names one."""
    if reports is None or _TENSORBOARD in os.environ:
        yield
        return
    os.environ[_TENSORBOARD] = str(reports.folder)
    try:
        yield
    finally:
        del os.environ[_TENSORBOARD]


def arguments(settings: TrainingSettings, seed: int, checkpoints: Path, **more: Any) -> TrainingArguments:
    """Return the Trainer's arguments: a falling rate, the best checkpoint loaded at the end, nothing printed or sent.

    settings: its rate, warmup, weight decay and precision.
    more: batches, epochs or steps, the metric of the best, and where curves go (`Reports.arguments`).
    """
    by_version: dict[str, Any] = {}  # an option that transformers 5 renamed on its way
    if settings.gradient_checkpointing:
        new, old = "activation_checkpointing", "gradient_checkpointing"
        by_version[new if new in known_arguments() else old] = True
    found = TrainingArguments(
        output_dir=str(checkpoints),
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        use_cpu=on_cpu() or not torch.accelerator.is_available(),  # told, or it refuses bfloat16 there
        bf16=in_bfloat16(settings.precision),
        logging_nan_inf_filter=False,  # it would hide a loss that is not finite
        save_total_limit=1,
        load_best_model_at_end=True,
        restore_callback_states_from_checkpoint=True,  # early stopping counts on
        seed=seed,
        data_seed=seed,
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        ddp_find_unused_parameters=False,  # every trained one is used; looking costs time, and fails where layers rerun
        **{"report_to": [], **by_version, **more},
    )
    found._n_gpu = min(found.n_gpu, 1)  # a lone process would take a batch of this size to every GPU
    return found


def known_arguments() -> set[str]:
    """Return the names of the arguments that the installed version of the Trainer takes."""
    return {field.name for field in fields(TrainingArguments)}


class Watch(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Reports progress, and stops at the first loss logged that is not finite; `what` is named then."""

    def __init__(self, what: str, progress: Progress | None) -> None:
        self.what = what
        self.progress = progress
        self.loss: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the step."""
        if self.progress is not None:
            self.progress(state.global_step, state.max_steps, self.loss)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have a loss logged: the last one of an epoch says whether its checkpoint is of use."""
        control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the loss. Raise LoraloomError for one that is not finite."""
        self.loss = kwargs["logs"].get("loss", self.loss)
        if self.loss is not None and not math.isfinite(self.loss):
            raise LoraloomError(f"{self.what}: the training loss is not finite at step {state.global_step}", NOT_FINITE)


def resumable(checkpoints: Path, call: str) -> Path | None:
    """Return the newest checkpoint of this very `call` that was written to its end; remove all that is of no use.

    call: what the result hangs on, as JSON: a checkpoint of another call must not be gone on from.
    """
    record, found = checkpoints / _CALL, _checkpoints(checkpoints)
    if found and not record.is_file():
        raise LoraloomError(f"{checkpoints}: holds checkpoints of some other training", "name another folder")
    if found and record.read_text(encoding="utf-8") != call:
        clear(checkpoints)
        found = []
    write_text(record, call, overwrite=True)
    whole = [path for path in found if state_of(path)]
    for path in found:
        if path not in whole:
            shutil.rmtree(path)
    return whole[-1] if whole else None


def clear(folder: Path) -> None:
    """Remove what training left in a folder, and the folder where nothing else is in it."""
    for path in _checkpoints(folder):
        shutil.rmtree(path, ignore_errors=True)
    (folder / _CALL).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def state_of(checkpoint: Path | None) -> Mapping[str, Any]:
    """Return what the Trainer wrote down of a checkpoint; nothing where there is none that is whole."""
    try:
        return dict(json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))) if checkpoint else {}
    except (OSError, ValueError):
        return {}


def has_stopped(state: Mapping[str, Any]) -> bool:
    """Tell whether the training of a checkpoint in this state had already been stopped early."""
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {})
    return bool(control.get("args", {}).get("should_training_stop"))


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rsplit("-", 1)[1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))


@contextmanager
def full_disk_told(folder: Path) -> Iterator[None]:
    """Turn what Python, safetensors and torch each raise on a full disk into a LoraloomError."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        # torch tells no more than the place in its own code
        told = any(
            sign in str(error)
            for sign in ("os error 28", "No space left", "inline_container", "PytorchStream", "iostream error")
        )
        if not full and not told:
            raise
        raise LoraloomError(
            f"{folder}: a checkpoint cannot be written: is the disk full? ({error})",
            "free some space and run the same again: it goes on from the last whole checkpoint",
        ) from error
