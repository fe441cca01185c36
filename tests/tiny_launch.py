"""Two processes as a launcher starts them, without its start: they come from one that has imported the libraries."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

HEAVY = ["loraloom.study.by_hand", "loraloom.cli.main", "transformers.models.bert.modeling_bert"]
multiprocessing.set_forkserver_preload(HEAVY)


def two_processes(work: Callable[..., None], place: object, *given: Any) -> None:
    """Run `work(rank, *given)` in two processes that meet at the new file `place`; raise what either raises."""
    options = {"nprocs": 2, "start_method": "forkserver"}
    torch.multiprocessing.start_processes(_enter, (work, str(place), *given), **options)


def _enter(rank: int, work: Callable[..., None], place: str, *given: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    work(rank, *given)
    dist.destroy_process_group()
