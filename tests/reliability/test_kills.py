"""A few of the kills that kills.py tries by the dozen; a study's take too long for every run of the tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_launch import start


def _try_kills() -> None:
    import kills

    sys.argv = ["kills.py", "--merge", "2", "--fuse", "2", "--study", "0", "--seed", "5"]
    kills.main()


def test_kills_of_merges_and_fusions_are_survived(tmp_path: Path) -> None:
    run = start(_try_kills, tmp_path, tmp_path / "noise.txt")
    run.join(600)
    said = (tmp_path / "noise.txt").read_text()
    assert run.exitcode == 0, said
    assert "merge: 2 tried" in said
    assert "fuse: 2 tried" in said


_STOPPED = """
import pathlib, time, typer
from loraloom.cli.common import command, stop_at_signals
from loraloom.files.atomic import staged_folder
def work(place: pathlib.Path):
    with command(True, False), staged_folder(place / "out", kind="result") as folder:
        (folder / "half").write_text("x")
        print("writing", flush=True)
        time.sleep(60)
stop_at_signals()
typer.run(work)
"""


def stopped(folder: Path, number: signal.Signals, *, ignored: signal.Signals | None = None) -> tuple[int, str]:
    """Send a signal to a command at work; return its exit code and what it said on stderr."""

    def prepare() -> None:
        for own in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):  # whatever the tests were started by ignores
            signal.signal(own, signal.SIG_DFL)
        if ignored is not None:  # as nohup does
            signal.signal(ignored, signal.SIG_IGN)

    words = [sys.executable, "-c", _STOPPED, str(folder)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, preexec_fn=prepare, text=True, **streams) as running:  # type: ignore[call-overload]
        assert running.stdout.readline() == "writing\n"
        if ignored is not None:
            os.kill(running.pid, ignored)
        os.kill(running.pid, number)
        _, said = running.communicate(timeout=60)
    return running.returncode, said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_a_command_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    assert stopped(tmp_path, number) == (128 + number, "")
    assert not list(tmp_path.iterdir())


def test_a_command_under_nohup_outlives_the_terminal(tmp_path: Path) -> None:
    assert stopped(tmp_path, signal.SIGTERM, ignored=signal.SIGHUP) == (143, "")
