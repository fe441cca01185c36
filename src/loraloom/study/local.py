"""Stages side by side in processes on this machine, each with its share of the threads and a base model of its own."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import torch

from loraloom.errors import LoraloomError
from loraloom.study.engine import Call, Worker
from loraloom.study.store import Store

TRIES = 3  # of a stage whose process dies
_GRACE = 10.0  # seconds that a process has to clean up before it is killed
_PRELOADED = [
    "loraloom.study.stages",
    "loraloom.study.answers",
    "loraloom.study.agreement",
]  # what a new process need not import again


@dataclass
class _Process:
    """A process, this end of the pipe to it, its place among the workers, and what it is at."""

    process: BaseProcess
    pipe: Connection
    place: int
    call: Call | None = None


class Processes:
    """Runs as many stages at a time as there are workers, started when they are needed and kept to the end.

    A stage whose process is killed is begun again, by a new one, from what it left to go on from.
    """

    def __init__(self, store: str | Path, workers: int, report_to: Sequence[str] = ()) -> None:
        self.store = store
        self.workers = workers
        self.report_to = report_to
        self.queue: list[Call] = []
        self.processes: list[_Process] = []
        self.deaths: Counter[str] = Counter()
        self.ended: list[tuple[str, Exception | None]] = []

    def submit(self, call: Call) -> None:
        """Have a stage run by the first worker that is free."""
        self.queue.append(call)
        self._hand_out()

    def wait(self, seconds: float) -> list[tuple[str, Exception | None]]:
        """Return the keys of stages that have ended since, each with its failure; wait so long for a first one."""
        at_work = {one.pipe: one for one in self.processes if one.call}
        for pipe in wait(list(at_work), seconds):
            one = at_work[pipe]  # type: ignore[index]
            call, one.call = one.call, None
            assert call is not None
            try:
                failure = one.pipe.recv()
            except (EOFError, OSError):
                self._bury(one, call)
                continue
            self.ended.append((call.stage.key, failure))
        self._hand_out()
        ended, self.ended = self.ended, []
        return ended

    def close(self) -> None:
        """End all processes, which clean up; what they were at can be gone on with."""
        self.queue.clear()
        for one in self.processes:
            one.process.terminate()
            one.pipe.close()
        for one in self.processes:
            one.process.join(_GRACE)
            one.process.kill()
            one.process.join()
        self.processes.clear()

    def _hand_out(self) -> None:
        while self.queue:
            free = next((one for one in self.processes if not one.call), None)
            if free is None and len(self.processes) == self.workers:
                return
            free = free or self._started()
            free.call = self.queue.pop(0)
            try:
                free.pipe.send(free.call)
            except OSError:  # it died while it had nothing to do
                call, free.call = free.call, None
                self._bury(free, call)

    def _bury(self, one: _Process, call: Call) -> None:
        """Take a process that died out of the ranks, and have its stage run again, unless it died of it too often."""
        self.processes.remove(one)
        one.pipe.close()
        one.process.join()
        self.deaths[call.stage.key] += 1
        if self.deaths[call.stage.key] < TRIES:
            self.queue.insert(0, call)
            return
        code = one.process.exitcode or 0
        how = f"by signal {-code}" if code < 0 else f"with status {code}"
        hint = (
            "where memory is short, the system kills: take fewer --workers; the same command goes on where this stopped"
        )
        message = f"{call.stage.name}: the process at it ended {how}, {TRIES} time{'s' if TRIES > 1 else ''}"
        self.ended.append((call.stage.key, LoraloomError(message, hint)))

    def _started(self) -> _Process:
        """Start a process in a place that nobody has: the places share out this machine's threads and GPUs."""
        place = min(set(range(self.workers)) - {one.place for one in self.processes})
        threads = max(1, torch.get_num_threads() // self.workers)
        gpu = _gpus()[place % len(_gpus())] if torch.cuda.is_available() else None
        multiprocessing.set_forkserver_preload(_PRELOADED)
        server = multiprocessing.get_context("forkserver")  # a fork of this process would share what torch has begun
        ours, theirs = server.Pipe()
        tone = logging.root.manager.disable
        given = (theirs, self.store, self.report_to, threads, gpu, tone)
        process = server.Process(target=_serve, args=given, daemon=True)
        process.start()
        theirs.close()  # so that its death closes the pipe
        self.processes.append(_Process(process, ours, place))
        return self.processes[-1]


def check_memory(base: str, workers: int) -> None:
    """Raise LoraloomError where the free memory does not hold the base model in this folder once for each worker."""
    weights = sum(file.stat().st_size for file in Path(base).glob("*.safetensors"))
    needed, free = workers * 2 * weights, psutil.virtual_memory().available  # files of 16 bits are read as 32
    if needed > free:
        fit = max(1, int(free // (2 * weights)))
        told = f"{workers} workers hold the base model each: {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        raise LoraloomError(told, f"take --workers {fit}")


def _serve(
    pipe: Connection, store: str | Path, report_to: Sequence[str], threads: int, gpu: str | None, tone: int
) -> None:
    """Run the stages that come through the pipe, and answer each with its failure or None."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # nothing has looked at the GPUs yet
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that has these, which ends them
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    threading.Thread(target=_die_with_parent, daemon=True).start()
    logging.disable(tone)
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    worker = Worker(Store(store), report_to)
    with suppress(EOFError):
        while True:
            call = pipe.recv()
            pipe.send(worker.answer(call))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _gpus() -> list[str]:
    """Return the names of the GPUs that this process sees, as CUDA_VISIBLE_DEVICES has them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]
