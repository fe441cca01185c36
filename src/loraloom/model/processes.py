"""Several processes at one job, as `accelerate launch` or torchrun start them: parts, sums, limits."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from loraloom.errors import LoraloomError, collecting, raise_problems, raise_together

T = TypeVar("T")


def started() -> int:
    """Return the number of processes that `accelerate launch` or torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined() -> Iterator[tuple[int, int]]:
    """Yield (this process's rank, number of processes), in a process group where a launcher started several.

    What is exchanged lies on the CPU, so gloo serves GPUs too. A group that is there already is used and left as it is.
    """
    several = started() > 1 and not (dist.is_available() and dist.is_initialized())
    if several:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("gloo")
    try:
        yield rank_and_size()
    finally:
        if several:
            dist.destroy_process_group()


def rank_and_size() -> tuple[int, int]:
    """Return this process's rank and the number of processes: 0 and 1 where there is no process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gathered(value: T) -> list[T]:
    """Return the `value` of every process in the order of ranks. Every process has to call this."""
    _, size = rank_and_size()
    if size == 1:
        return [value]
    found: list[T] = [value] * size
    dist.all_gather_object(found, value)
    return found


def raise_of_all(errors: list[LoraloomError]) -> None:
    """Raise together, in every process, the errors of all: one that stopped alone would leave the others waiting."""
    raise_together([error for found in gathered(errors) for error in found])


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
