"""Stages as tasks of a Ray cluster, each with the CPUs, the GPUs and the memory that it is declared to need.

The machines share the study's store, and the base model's and the recipe's files at the same paths, and nothing else.
"""

from __future__ import annotations

import functools
import io
import logging
import os
import socket
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout, suppress
from typing import Any

import ray
import torch

import loraloom
from loraloom.errors import LoraloomError, first_line
from loraloom.study.engine import Call, Worker
from loraloom.study.inputs import Base, Local
from loraloom.study.remote import is_address
from loraloom.study.store import Store

TRIES = 3  # of a stage whose worker or machine dies
_PATIENCE = 10.0  # seconds in which a cluster's machine takes a connection
_START = "start one with `ray start --head`, or name it by --address"
_SHARED = (
    "the machines of a cluster share the study's folder, the base model's and the recipe's files at the same paths"
)


class Cluster:
    """Runs every stage as one task of a Ray cluster, where there is room.

    A stage whose worker or machine is gone is begun again elsewhere, from what it left to go on from in the store.

    address: as `ray.init` takes it; a cluster that this process is in already is used as it is, and not left.
    cpus: threads of a stage. memory: GB that Ray keeps free for one. gpus: those of a stage that reads the base model.

    Raises LoraloomError where no cluster answers.
    """

    def __init__(
        self, store: Store, address: str, cpus: int, gpus: float, memory: float, report_to: Sequence[str] = ()
    ) -> None:
        self.leave = ExitStack()
        if not ray.is_initialized():
            try:
                _check_answers(address)
                ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
            except (OSError, RuntimeError, ValueError) as error:
                raise LoraloomError(f"no Ray cluster at {address!r}: {first_line(error)}", _START) from error
            self.leave.callback(ray.shutdown)
        # Ray prints there what befell its machines, among the command's results
        self.leave.enter_context(redirect_stdout(io.StringIO()))
        store.root.mkdir(parents=True, exist_ok=True)
        self.given = (loraloom.__version__, os.getcwd(), store.place, tuple(report_to), cpus)
        needs: dict[str, Any] = {"num_cpus": cpus, "memory": int(memory * 1e9) or None, "max_retries": TRIES - 1}
        self.plain = ray.remote(**needs)(_answer)
        self.with_base = ray.remote(**needs, num_gpus=gpus)(_answer)  # with GPUs, in a process that ends with it
        self.running: dict[Any, Call] = {}
        _check_room({"CPU": cpus, "GPU": gpus, "memory": memory * 1e9})

    def submit(self, call: Call) -> None:
        """Have a stage run as soon as a machine of the cluster has room for it."""
        task = self.with_base if any(isinstance(one, Base) for one in call.inputs) else self.plain
        self.running[task.remote(*self.given, call)] = call

    def wait(self, seconds: float) -> list[tuple[str, Exception | None]]:
        """Return the keys of stages that have ended since, each with its failure; wait so long for a first one."""
        if not self.running:
            return []
        ended, _ = ray.wait(list(self.running), timeout=seconds)
        return [(self.running[one].stage.key, _failure(one, self.running.pop(one))) for one in ended]

    def close(self) -> None:
        """End all tasks, and leave the cluster; what they were at can be gone on with."""
        for one in self.running:
            ray.cancel(one, force=True)
        self.running.clear()
        self.leave.close()


def _check_answers(address: str) -> None:
    """Raise OSError where nobody answers at a host and a port; Ray would try for minutes."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()


def _check_room(needs: dict[str, float]) -> None:
    """Warn where no machine that is in the cluster now has room for a stage; one that has may still come."""
    machines = [one["Resources"] for one in ray.nodes() if one["Alive"]]
    if not any(all(one.get(name, 0) >= count for name, count in needs.items()) for one in machines):
        told = f"{needs['CPU']} CPUs, {needs['GPU']:g} GPUs and {needs['memory'] / 1e9:g} GB"
        warnings.warn(f"no machine of the cluster has {told}: stages wait until one comes", stacklevel=2)


def _failure(ended: Any, call: Call) -> Exception | None:
    """Return the failure of a task that has ended."""
    try:
        failure: Exception | None = ray.get(ended)
    except ray.exceptions.RayTaskError as error:
        hint = f"install loraloom {loraloom.__version__} on every machine of the cluster"
        failure = LoraloomError(f"{call.stage.name}: cannot begin on the cluster: {first_line(error.cause)}", hint)
    except ray.exceptions.RayError as error:
        message = f"{call.stage.name}: its worker ended {TRIES} times: {first_line(error)}"
        hint = "where memory is short, declare what a stage needs by --memory; the same command goes on from here"
        failure = LoraloomError(message, hint)
    return failure


def _answer(
    version: str, here: str, store: str, report_to: Sequence[str], threads: int, call: Call
) -> Exception | None:
    """Run a stage in a process of the cluster; return its failure."""
    host = socket.gethostname()
    if version != loraloom.__version__:
        told = f"{host}, a machine of the cluster, has loraloom {loraloom.__version__}, where the study has {version}"
        return LoraloomError(told, "install the same on every machine")
    with suppress(OSError):
        os.chdir(here)  # relative paths are meant from there
    read = [one.folder if isinstance(one, Base) else one.path for one in call.inputs if isinstance(one, Base | Local)]
    shared = [] if is_address(store) else [store]
    missing = [path for path in (*shared, *read) if not os.path.exists(path)]
    if missing:
        return LoraloomError(f"{host}, a machine of the cluster, has no {missing[0]}", _SHARED)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    return _worker(store, report_to).answer(call)


@functools.cache
def _worker(store: str, report_to: Sequence[str]) -> Worker:
    """Return the worker of this process, which keeps the base model from one stage to the next."""
    return Worker(Store(store), report_to)
