"""Stages side by side in processes: the same outputs as one by one, whoever is killed, and nothing lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_study
from loraloom.errors import LoraloomError
from loraloom.progress import Reporter
from loraloom.study import local, runners
from loraloom.study.engine import Context, Engine, Here, Worker, stage
from loraloom.study.export import run_study
from loraloom.study.inputs import Output
from loraloom.study.local import Processes, check_memory
from loraloom.study.recipe import Recipe
from loraloom.study.runners import Where
from loraloom.study.store import Store
from tiny_launch import HEAVY

local._PRELOADED = HEAVY  # all tests take their processes from one server


@stage("fact", version=1)
def fact(folder: Path, context: Context, *, word: str, after: dict[str, Output]) -> None:
    """Write a word, and those of the outputs read."""
    context.progress(1, 2)
    words = [(one.path / "word").read_text() for one in after.values()]
    (folder / "word").write_text(" ".join([word, *words, str(torch.get_num_threads())]))


@stage("fault", version=1)
def fault(folder: Path, context: Context, *, word: str) -> None:
    """Raise what nobody foresaw, which cannot be pickled."""

    class Odd(Exception):  # noqa: N818
        pass

    raise Odd(word)


@stage("death", version=1)
def death(folder: Path, context: Context) -> None:
    """Kill this process."""
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def engine(folder: Path, workers: int = 2) -> Iterator[Engine]:
    """Yield an engine over processes, each of which imports this file anew."""
    runner = Processes(folder, workers)
    found = Engine(Store(folder), Reporter(quiet=True), runner)
    try:
        yield found
    finally:
        runner.close()


def test_outputs_wait_for_those_they_read_and_deaths_and_faults_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "TRIES", 1)
    with engine(tmp_path) as two:
        first = [two.do(fact, f"first {word}", word=word, after={}) for word in "abc"]
        last = two.do(fact, "last", word="d", after={str(index): one for index, one in enumerate(first)})
        again = two.do(fact, "another label", word="a", after={})
        assert (last.path / "word").read_text() == "d a 1 b 1 c 1 1"
        assert again.path == first[0].path
        assert len(two.runner.processes) == 2  # type: ignore[attr-defined]
        odd = two.do(fault, "odd", word="unforeseen")
        mortal = two.do(death, "mortal")
        two.settle()
        with pytest.raises(RuntimeError, match="Odd: unforeseen") as told:
            _ = odd.path
        assert "in fault\n    raise Odd(word)" in told.value.__notes__[0]
        with pytest.raises(LoraloomError, match=r"death/mortal-\w+: the process at it ended by signal 9, 1 time"):
            _ = mortal.path
        processes = [one.process for one in two.runner.processes]  # type: ignore[attr-defined]
    assert not any(one.is_alive() for one in processes)
    assert not list(tmp_path.glob("notes/*"))
    with engine(tmp_path) as found:
        assert found.do(fact, "last", word="d", after={str(i): one for i, one in enumerate(first)}).path == last.path
        assert not found.runner.processes  # type: ignore[attr-defined]


def test_a_worker_that_is_killed_in_the_middle_of_training_does_not_lose_the_study(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two workers give every output and figure that one gives, though one is killed in the middle of training."""
    recipe = Recipe.load(finished / "recipe.yaml")
    killed: list[int] = []

    def kill() -> None:
        store = Store(tmp_path / "study" / "stages")
        while not killed:
            for note in store.notes():
                if any(store.root.glob(f"unfinished/{note['name'][-12:]}/checkpoint-*/trainer_state.json")):
                    os.kill(note["process"], signal.SIGKILL)
                    killed.append(note["process"])
                    return
            time.sleep(0.002)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    run_study(recipe, tmp_path / "study", where=Where(workers=2), reporter=Reporter())
    assert killed
    assert tiny_study.contents(tmp_path / "study") == tiny_study.contents(finished / "study")
    assert tiny_study.figures(tmp_path / "study" / "results.json") == tiny_study.figures(
        finished / "study" / "results.json"
    )
    lines = capsys.readouterr().err.splitlines()
    assert sum("  train 4 of 4: " in line for line in lines) == 1
    assert sum(line.split("  ")[-1].startswith("train: done in") for line in lines) == 1


def test_workers_that_memory_does_not_hold(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = (finished / "base" / "model.safetensors").stat().st_size
    free: Any = type("Free", (), {"available": 5 * weights})
    monkeypatch.setattr(local.psutil, "virtual_memory", lambda: free)
    check_memory(str(finished / "base"), 2)
    with pytest.raises(LoraloomError, match="3 workers hold the base model each") as told:
        check_memory(str(finished / "base"), 3)
    assert told.value.hint == "take --workers 2"


def test_one_by_one_faults_are_told_at_once(tmp_path: Path) -> None:
    here = Engine(Store(tmp_path), Reporter(quiet=True), Here(Worker(Store(tmp_path)), Reporter(quiet=True)))
    with pytest.raises(Exception, match="unforeseen"):
        here.do(fault, "odd", word="unforeseen")
    assert here.do(fact, "a", word="a", after={}).path.is_dir()


def test_ray_is_asked_for_where_it_is_not(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "find_spec", lambda name: None)
    with pytest.raises(LoraloomError, match="Ray is not installed") as told:
        run_study(Recipe.load(finished / "recipe.yaml"), tmp_path, where=Where(engine="ray"))
    assert told.value.hint == "pip install 'loraloom[ray]'"
    with pytest.raises(ValueError, match=r"engine local takes no gpus \(of engine ray\)"):
        Where(gpus=1)
