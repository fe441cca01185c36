"""A file or folder is whole or absent whatever happens, and what killed processes left is removed."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loraloom.errors import LoraloomError
from loraloom.files import atomic
from loraloom.files.atomic import add_to_record, remove_leftovers, staged_file, staged_folder, write_text
from loraloom.files.outputs import RECORD, read_record


def entries(folder: Path) -> list[str]:
    """Return everything in `folder` but records."""
    paths = (path.relative_to(folder) for path in folder.rglob("*"))
    return sorted(path.as_posix() for path in paths if path.name != RECORD)


def result(path: Path, *names: str, kind: str = "result", overwrite: bool = False) -> None:
    """Write a folder of ours that holds files of these names, each with its name as text."""
    with staged_folder(path, kind=kind, overwrite=overwrite) as folder:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)


def half_file(path: Path) -> None:
    with staged_file(path, overwrite=True) as part:
        part.write_text("half")
        raise ZeroDivisionError


def half_folder(path: Path) -> None:
    with staged_folder(path, kind="result", overwrite=True) as part:
        (part / "half").write_text("x")
        raise KeyboardInterrupt


def test_a_fault_leaves_what_was_there(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    result(tmp_path / "b", "old")
    with pytest.raises(ZeroDivisionError):
        half_file(tmp_path / "a.txt")
    for place in ("b", "c"):
        with pytest.raises(KeyboardInterrupt):
            half_folder(tmp_path / place)
    assert entries(tmp_path) == ["a.txt", "b", "b/old"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "x")
        result(tmp_path / "b")
    finally:
        os.umask(mask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("exchange", [True, False])
def test_a_result_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:  # as on a file system that cannot
        monkeypatch.setattr(atomic, "_exchanged", lambda one, two: False)
    result(tmp_path / "out", "old", "deep/old")
    result(tmp_path / "out", "new", overwrite=True)
    assert entries(tmp_path) == ["out", "out/new"]
    assert read_record(tmp_path / "out") == ("result", {"new"})
    write_text(tmp_path / "file", "old")
    write_text(tmp_path / "file", "new", overwrite=True)
    assert (tmp_path / "file").read_text() == "new"


def test_what_is_whole_is_always_in_its_place(tmp_path: Path) -> None:
    """Somebody who looks all the time never finds the folder gone while it is replaced."""
    out, missing, done = tmp_path / "out", [], threading.Event()
    result(out, "file")

    def look() -> None:
        while not done.is_set():
            try:
                os.stat(out / "file")
            except FileNotFoundError:
                missing.append(time.time())

    looker = threading.Thread(target=look)
    looker.start()
    for _ in range(100):
        result(out, "file", overwrite=True)
    done.set()
    looker.join()
    if sys.platform in ("linux", "darwin"):
        assert not missing


def test_files_are_on_the_disk_before_they_take_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the power fails between the two, the old is there still."""
    flushed: list[tuple[int, bool]] = []
    places = [tmp_path / "file", tmp_path / "out"]
    monkeypatch.setattr(
        os, "fsync", lambda file: flushed.append((os.fstat(file).st_ino, any(path.exists() for path in places)))
    )
    write_text(places[0], "x")
    assert flushed == [(places[0].stat().st_ino, False)]
    places, flushed = places[1:], []
    result(places[0], "one", "deep/two")
    files = [path for path in places[0].rglob("*") if path.is_file()]
    assert len(files) == 3  # and the record
    assert sorted(flushed) == sorted((path.stat().st_ino, False) for path in files)


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    result(tmp_path / "link", "a")
    assert entries(tmp_path / "real") == ["a"]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "to come").symlink_to("elsewhere/file")
    write_text(tmp_path / "to come", "new")
    write_text(tmp_path / "to come", "newer", overwrite=True)
    assert (tmp_path / "elsewhere" / "file").read_text() == "newer"
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "to come").is_symlink()


def test_a_device_is_written_into_and_stays(tmp_path: Path) -> None:
    write_text(Path("/dev/null"), "x")
    (tmp_path / "null").symlink_to("/dev/null")
    write_text(tmp_path / "null", "x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_text(tmp_path / "pipe", "through")
    reader.join()
    assert read == ["through"]
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)
    with pytest.raises(LoraloomError, match="is a file, where a folder"):
        result(Path("/dev/null"))
    if Path("/dev/full").exists():
        with pytest.raises(LoraloomError, match="/dev/full: cannot be written: No space left"):
            write_text(Path("/dev/full"), "x")


@pytest.mark.parametrize("name", ["lock", "new", "old", RECORD, "n" * 255])
def test_any_name_may_be_written(tmp_path: Path, name: str) -> None:
    write_text(tmp_path / "file" / name, "x")
    result(tmp_path / "folder" / name, "lock", "new", "old")
    assert entries(tmp_path / "folder" / name) == ["lock", "new", "old"]
    assert (tmp_path / "file" / name).read_text() == "x"


def test_files_that_are_added_later_count_as_ours(tmp_path: Path) -> None:
    result(tmp_path / "out", "a")
    add_to_record(tmp_path / "out", ["deep/b"])
    (tmp_path / "out" / "deep").mkdir()
    write_text(tmp_path / "out" / "deep" / "b", "x")
    result(tmp_path / "out", "c", overwrite=True)
    assert entries(tmp_path / "out") == ["c"]
    (tmp_path / "theirs").mkdir()
    add_to_record(tmp_path / "theirs", ["b"])
    assert entries(tmp_path / "theirs") == []


@pytest.mark.parametrize("place", ["file/x", "file/deeper/x", "n" * 300])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    told = "is a file, no folder" if place.startswith("file") else "cannot be written"
    with pytest.raises(LoraloomError, match=told):
        write_text(tmp_path / place, "x")
    with pytest.raises(LoraloomError, match=told):
        result(tmp_path / place)
    assert entries(tmp_path) == ["file"]


def test_faults_of_reading_elsewhere_pass_as_they_are(tmp_path: Path) -> None:
    elsewhere = PermissionError(errno.EACCES, "Permission denied", "/somewhere/else")
    for error in (elsewhere, FileNotFoundError(errno.ENOENT, "No such file"), RuntimeError("shape mismatch")):
        with pytest.raises(type(error)), staged_folder(tmp_path / "out", kind="result"):
            raise error


_FULL = """
import pathlib, sys, torch
from safetensors.torch import save_file
from loraloom.files.atomic import staged_file, staged_folder, write_text
from loraloom.errors import LoraloomError
out = pathlib.Path(sys.argv[1])
def safetensors(path): save_file({"a": torch.zeros(400_000)}, path)
def pickle(path): torch.save({"a": torch.zeros(400_000)}, path)
def text(path): path.write_text("a" * 1_600_000)
for write in (safetensors, pickle, text):
    try:
        with staged_folder(out / "folder", kind="result") as folder:
            write(folder / "a")
    except LoraloomError as error:
        print(error.message)
    try:
        with staged_file(out / "file") as file:
            write(file)
    except LoraloomError as error:
        print(error.message)
"""


def full(folder: Path, limit: int | None = None) -> None:
    """Write in `folder` till it is full (or files of `limit` bytes are); every way to write must say so."""

    def prepare() -> None:
        if limit:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        [sys.executable, "-c", _FULL, str(folder)], capture_output=True, text=True, preexec_fn=prepare, timeout=120
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert len(lines) == 6
    assert all("cannot be written: " in line and str(folder) in line for line in lines), lines
    assert entries(folder) == []


def test_a_full_disk(tmp_path: Path) -> None:
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        full(tmp_path)
        with pytest.raises(LoraloomError, match="mount point"):
            result(tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_limit_on_file_size(tmp_path: Path) -> None:
    full(tmp_path, limit=100_000)


_KILLED = """
import os, pathlib, sys
from loraloom.files import atomic
out = pathlib.Path(sys.argv[1])
if sys.argv[2] == "writing":
    with atomic.staged_folder(out / "a", kind="result") as a, atomic.staged_file(out / "b") as b:
        (a / "half").write_text("x")
        b.write_text("x")
        os.kill(os.getpid(), 9)
atomic._exchanged = lambda one, two: False
rename = os.rename
def once(one, two):
    rename(one, two)
    os.kill(os.getpid(), 9)
os.rename = once  # set aside, and not yet replaced
with atomic.staged_folder(out / "a", kind="result", overwrite=True) as a:
    (a / "new").write_text("x")
"""


def killed(folder: Path, when: str) -> None:
    done = subprocess.run([sys.executable, "-c", _KILLED, str(folder), when], check=False)
    assert done.returncode == -signal.SIGKILL


def test_what_a_killed_process_left_is_removed_by_the_next_with_one_line(tmp_path: Path) -> None:
    killed(tmp_path, "writing")
    (tmp_path / ".kept.part").write_text("x")
    (tmp_path / ".loraloom-kept").write_text("x")
    assert len(list(tmp_path.iterdir())) == 4
    with pytest.warns(UserWarning, match=r"removed what 2 killed runs had left half-written") as told:
        write_text(tmp_path / "next", "x")
    assert len(told) == 1
    assert entries(tmp_path) == [".kept.part", ".loraloom-kept", "next"]


def test_what_was_set_aside_when_the_kill_came_is_put_back(tmp_path: Path) -> None:
    result(tmp_path / "a", "old")
    killed(tmp_path, "replacing")
    assert not (tmp_path / "a").exists()
    with pytest.warns(UserWarning, match=r"and put back a$"):
        remove_leftovers(tmp_path)
    assert entries(tmp_path) == ["a", "a/old"]
    result(tmp_path / "a", "new", overwrite=True)


_WAITS = """
import pathlib, sys
from loraloom.files.atomic import staged_folder
with staged_folder(pathlib.Path(sys.argv[1]) / "a", kind="result") as a:
    print("writing", flush=True)
    sys.stdin.read()
    (a / "whole").write_text("x")
"""


@pytest.mark.parametrize("kept", range(1, 6))
def test_what_a_kill_left_of_a_removal_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    """Whatever was removed first, and however much of it."""
    result(tmp_path / "out", "a", "b")
    removals = iter(range(1, 10))

    def dying(remove: Callable[..., None]) -> Callable[..., None]:
        def removed(*place: Any, **options: Any) -> None:
            if next(removals) == kept:
                raise KeyboardInterrupt
            remove(*place, **options)

        return removed

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", dying(os.unlink))
        patch.setattr(os, "rmdir", dying(os.rmdir))
        with pytest.raises(KeyboardInterrupt):
            result(tmp_path / "out", "new", overwrite=True)
    assert list(tmp_path.glob(".*.part"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result(tmp_path / "other")
    assert entries(tmp_path) == ["other", "out", "out/new"]


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    command = [sys.executable, "-c", _WAITS, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as living:
        assert living.stdin is not None
        assert living.stdout is not None
        assert living.stdout.readline() == "writing\n"
        remove_leftovers(tmp_path)
        write_text(tmp_path / "b", "x")
        living.stdin.close()
    assert living.returncode == 0
    assert entries(tmp_path) == ["a", "a/whole", "b"]
    assert not recwarn.list


def test_what_another_machine_wrote_today_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(tmp_path, "writing")
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    before = entries(tmp_path)
    remove_leftovers(tmp_path)
    assert entries(tmp_path) == before
    for path in tmp_path.rglob("*"):
        os.utime(path, (time.time() - 90_000,) * 2)
    for path in tmp_path.iterdir():
        os.utime(path, (time.time() - 90_000,) * 2)
    with pytest.warns(UserWarning, match="removed"):
        remove_leftovers(tmp_path)
    assert entries(tmp_path) == []


def test_without_locks_files_are_written_and_leftovers_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(tmp_path, "writing")

    def flock(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    before = entries(tmp_path)
    write_text(tmp_path / "file", "x")
    assert set(entries(tmp_path)) == {*before, "file"}


def test_many_writers_in_one_folder_do_not_take_each_others_work(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    faults: list[Exception] = []

    def write(index: int) -> None:
        try:
            for count in range(30):
                write_text(tmp_path / f"{index}.{count}", "x")
        except Exception as error:
            faults.append(error)

    writers = [threading.Thread(target=write, args=(index,)) for index in range(6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not faults
    assert len(entries(tmp_path)) == 180
    assert not recwarn.list


def test_safetensors_are_read_back(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = {"a": torch.arange(5.0)}
    with staged_file(tmp_path / "x.safetensors") as part:
        save_file(tensors, part)
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], tensors["a"])


def test_a_writer_killed_before_it_had_its_lock_leaves_nothing_that_stays(tmp_path: Path) -> None:
    with staged_file(tmp_path / "one.txt") as place:
        name = place.parent.parent.name  # of a writer at work
        place.write_text("1")
    (tmp_path / f"{name[:-12]}xxxxxxxx.part").mkdir()
    write_text(tmp_path / "two.txt", "2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.txt", "two.txt"]
