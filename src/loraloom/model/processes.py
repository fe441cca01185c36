"""Several processes at one job, as `accelerate launch` or torchrun start them: each reads its part, sums are of all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from loraloom.errors import LoraloomError, raise_together

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
