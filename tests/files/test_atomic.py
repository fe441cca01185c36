"""A file or folder is whole or absent, and a place that cannot be written is told in one line."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loraloom.errors import LoraloomError
from loraloom.files.atomic import check_folder, remove_leftovers, staged_file, staged_folder, write_text


def entries(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def half_file(path: Path) -> None:
    with staged_file(path) as part:
        part.write_text("half")
        raise ZeroDivisionError


def half_folder(path: Path) -> None:
    with staged_folder(path) as part:
        (part / "half").write_text("x")
        raise KeyboardInterrupt


def test_a_fault_leaves_what_was_there(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(ZeroDivisionError):
        half_file(tmp_path / "a.txt")
    with pytest.raises(KeyboardInterrupt):
        half_folder(tmp_path / "b")
    assert entries(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "x")
        with staged_folder(tmp_path / "b"):
            pass
    finally:
        os.umask(mask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o750


def test_a_folder_of_ours_is_replaced_whole(tmp_path: Path) -> None:
    for name in ("old", "new"):
        with staged_folder(tmp_path / "out") as folder:
            (folder / "loraloom.json").write_text("{}")
            (folder / name).write_text("x")
    assert entries(tmp_path / "out") == ["loraloom.json", "new"]
    assert entries(tmp_path) == ["out", "out/loraloom.json", "out/new"]


def test_nobody_elses_files_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("thesis")
    with pytest.raises(LoraloomError, match="did not write"), staged_folder(tmp_path / "mine"):
        pytest.fail("work must not begin")
    with pytest.raises(LoraloomError, match="is a file"):
        check_folder(tmp_path / "mine" / "README.md")
    assert entries(tmp_path) == ["mine", "mine/README.md"]
    (tmp_path / "empty").mkdir()
    with staged_folder(tmp_path / "empty") as folder:
        (folder / "a").write_text("x")
    assert entries(tmp_path / "empty") == ["a"]


@pytest.mark.parametrize("place", ["file/x", "file/deeper/x", "n" * 300])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(LoraloomError, match="cannot be written"):
        write_text(tmp_path / place, "x")
    with pytest.raises(LoraloomError, match="cannot be written"), staged_folder(tmp_path / place):
        pass
    assert entries(tmp_path) == ["file"]


def test_a_file_does_not_replace_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(LoraloomError, match="cannot be written: Is a directory"):
        write_text(tmp_path / "out", "x")
    assert entries(tmp_path) == ["out"]


def test_faults_of_reading_elsewhere_pass_as_they_are(tmp_path: Path) -> None:
    elsewhere = PermissionError(errno.EACCES, "Permission denied", "/somewhere/else")
    with pytest.raises(PermissionError), staged_folder(tmp_path / "out"):
        raise elsewhere
    with pytest.raises(FileNotFoundError), staged_folder(tmp_path / "out"):
        raise FileNotFoundError(errno.ENOENT, "No such file", str(tmp_path / "x"))
    with pytest.raises(RuntimeError, match="shape"), staged_folder(tmp_path / "out"):
        raise RuntimeError("shape mismatch")


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
        with staged_folder(out / "folder") as folder:
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
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_limit_on_file_size(tmp_path: Path) -> None:
    full(tmp_path, limit=100_000)


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, sys\n"
        "from loraloom.files.atomic import staged_file, staged_folder\n"
        "out = pathlib.Path(sys.argv[1])\n"
        "with staged_folder(out / 'a') as a, staged_file(out / 'b') as b:\n"
        "    (a / 'half').write_text('x')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "kept.part").write_text("x")
    (tmp_path / ".kept").write_text("x")
    remove_leftovers(tmp_path)
    assert entries(tmp_path) == [".kept", "kept.part"]


def test_safetensors_are_read_back(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = {"a": torch.arange(5.0)}
    with staged_file(tmp_path / "x.safetensors") as part:
        save_file(tensors, part)
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], tensors["a"])
