"""What a launcher's processes do together beyond sums: one works while the others wait; and what they may not do."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from loraloom.errors import LoraloomError, collecting, raise_problems, raise_together
from loraloom.model.processes import gathered, rank_and_size, started

T = TypeVar("T")


def by_first(work: Callable[[], T]) -> T:
    """Do `work` in the first process while the others wait; return its result, or raise its LoraloomError, in all."""
    errors: list[LoraloomError] = []
    done: list[T] = []
    if rank_and_size()[0] == 0:
        with collecting(errors):
            done.append(work())
    done, errors = gathered((done, errors))[0]
    raise_together(errors)
    return done[0]


def on_cpu() -> bool:
    """Tell whether several processes train on the CPU; accelerate has to be told, or each would train alone."""
    # what torch was built for is told even where there is none
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return started() > 1 and (kind is None or kind.type == "mps" or _asked("CPU"))


def check_training(batch_size: int) -> None:
    """Raise LoraloomError where the processes that were started cannot train one adapter together."""
    processes = rank_and_size()[1]
    problems = [f"{name} spreads the weights over processes" for name in ("FSDP", "DEEPSPEED") if _asked(name)]
    if batch_size % processes:
        problems.append(f"training.batch_size {batch_size} cannot be shared out among {processes} processes")
    if processes != started():
        problems.append(f"{started()} were started, {processes} found together")
    hint = "use accelerate launch --multi_gpu, with a batch_size that the number of processes divides"
    raise_problems("cannot train in several processes", problems, hint)


def leave() -> None:
    """Part from the other processes, where a launcher started some: at the end of a command."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def check_alone(what: str) -> None:
    """Raise LoraloomError where a launcher started several processes for `what`, which takes one."""
    if started() > 1:
        raise LoraloomError(
            f"{what} runs in one process, and {started()} were started",
            "run it without the launcher; statistics, atlas and train are what runs under one",
        )


def _asked(what: str) -> bool:
    """Tell whether accelerate's launcher was asked for `what`."""
    return os.environ.get(f"ACCELERATE_USE_{what}", "false").lower() in ("true", "1", "yes", "y", "t", "on")
