"""Processes of their own without their start: they come from one that has imported the libraries.

An interpreter that imports torch, transformers and peft anew takes longer than most of what the tests do in it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

HEAVY = ["loraloom.study.by_hand", "loraloom.study.export", "loraloom.cli.main", "loraloom.training"]
HEAVY += ["transformers.models.bert.modeling_bert"]
multiprocessing.set_forkserver_preload(HEAVY)


def start(work: Callable[..., None], folder: Path, noise: Path, *given: Any) -> BaseProcess:
    """Start `work(*given)` within `folder` as a program of its own; what it says goes to the file `noise`."""
    process = multiprocessing.get_context("forkserver").Process(target=_be, args=(work, folder, noise, *given))
    process.start()
    return process


def start_loraloom(
    words: Sequence[str | Path], folder: Path, noise: Path, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """Start the command line with `words`, as `start` does."""
    return start(_loraloom, folder, noise, [str(word) for word in words], dict(environment or {}))


def free_port() -> int:
    """Return a port of this machine on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def launched(rank: int, size: int, port: int) -> dict[str, str]:
    """Return what `accelerate launch` and torchrun tell, in the environment, the process of a rank on one machine."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}


def _be(work: Callable[..., None], folder: Path, noise: Path, *given: Any) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background a shell has its programs ignore it
    os.chdir(folder)
    for stream in (1, 2):
        os.dup2(os.open(noise, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    work(*given)


def _loraloom(words: list[str], environment: dict[str, str]) -> None:
    from loraloom.cli.main import main

    os.environ.update(environment)
    sys.argv = ["loraloom", *words]
    main()


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
