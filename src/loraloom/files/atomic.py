"""Files and folders that are whole or absent: written in a hidden folder beside their place, flushed, then renamed.

What a killed process left in such a hidden folder is removed by the next one that writes beside it; what a process at
work holds there is locked.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import socket
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from loraloom.files.hashing import text_sha256
from loraloom.files.outputs import RECORD, check_file, check_folder, read_record, record_text, write_errors

_STAGE, _PART = ".loraloom-", ".part"
_LOCK, _NEW, _OLD = "lock", "new", "old"  # within a hidden folder
_DAY = 86_400.0
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextmanager
def staged_file(
    path: Path, *, mark: bytes = b"", overwrite: bool = False, inputs: Iterable[Path] = ()
) -> Iterator[Path]:
    """Yield a temporary path with the name of `path`; on success flush it and rename it to `path`.

    A link is followed, a device is written into. Raises LoraloomError where `check_file` does, before anything else,
    and where the system cannot write (disk full, no permission); `path` is then as it was.
    """
    check_file(path, mark=mark, overwrite=overwrite, inputs=inputs)
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        with tempfile.TemporaryDirectory() as elsewhere, write_errors(path):
            yield Path(elsewhere) / target.name
            with open(Path(elsewhere) / target.name, "rb") as written, open(target, "wb") as device:
                shutil.copyfileobj(written, device)
        return
    with write_errors(path), _staging(target.parent) as stage:
        file = stage / _NEW / target.name
        yield file
        _flush(file)
        os.replace(file, target)


@contextmanager
def staged_folder(path: Path, *, kind: str, overwrite: bool = False, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield a temporary folder; on success write down its files, flush them and rename it to `path`.

    kind: what the result is, in words, by which it is known later. overwrite: whether an earlier result of this kind
    is replaced. inputs: what the result is made of, which must stay as it is. A link is followed. Raises LoraloomError
    where `check_folder` does, before anything else, and where the system cannot write; `path` is then as it was.
    """
    check_folder(path, kind=kind, overwrite=overwrite, inputs=inputs)
    target = Path(os.path.realpath(path))
    with write_errors(path), _staging(target.parent) as stage:
        folder = stage / _NEW / target.name
        folder.mkdir()
        yield folder
        (folder / RECORD).write_text(record_text(kind, folder), encoding="utf-8")
        for file in folder.rglob("*"):
            if file.is_file():
                _flush(file)
        # what came into the place while this was written
        check_folder(path, kind=kind, overwrite=overwrite, inputs=inputs)
        _publish(folder, target, stage / _OLD)


def write_text(path: Path, text: str, *, mark: bytes = b"", overwrite: bool = False) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all; see `staged_file`."""
    with staged_file(path, mark=mark, overwrite=overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8")


def add_to_record(folder: Path, names: Iterable[str]) -> None:
    """Count `names` among the files of a folder of ours into which they are about to be written."""
    record = read_record(folder)
    if record is not None:
        write_text(folder / RECORD, record_text(record.kind, folder, names), overwrite=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half-written in `folder`, and put back what one had set aside.

    Leaves alone what a process at work has locked and, since a lock may not be seen from another machine, what such a
    one wrote within a day. Warns, in one line, of what was done.
    """
    removed, restored = 0, []
    for stage in folder.glob(f"{_STAGE}*{_PART}"):
        if not _is_of_this_host(stage) and time.time() - _last_write(stage) < _DAY:
            continue
        with suppress(OSError):
            os.rmdir(stage)  # empty: its owner was killed before it had the lock, or takes another folder
            continue
        with suppress(OSError), _lock(stage, os.O_RDWR):  # it is held, or it has just gone
            removed += len(list(stage.iterdir())) > 1  # with the lock alone, its owner is about to take another
            for old in (stage / _OLD).glob("*"):
                if not os.path.lexists(folder / old.name):
                    os.rename(old, folder / old.name)
                    restored.append(old.name)
            _remove(stage)
    if removed:
        back = f", and put back {', '.join(restored)}" if restored else ""
        what = "what a killed run had" if removed == 1 else f"what {removed} killed runs had"
        warnings.warn(f"{folder}: removed {what} left half-written{back}", stacklevel=1)


def make_readable(folder: Path) -> None:
    """Let everybody read what lies in `folder`: what serves it is often another user, in a container."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


@contextmanager
def _staging(parent: Path) -> Iterator[Path]:
    """Yield a hidden folder in `parent`, locked as long as this process lives and removed at the end."""
    parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(parent)
    with ExitStack() as stack:
        while True:
            stage = Path(tempfile.mkdtemp(prefix=f"{_STAGE}{_host()}-", suffix=_PART, dir=parent))
            # until it is locked, another process may take it for a leftover
            with suppress(BlockingIOError, FileNotFoundError):
                file = stack.enter_context(_lock(stage, os.O_RDWR | os.O_CREAT))
                if os.fstat(file).st_nlink:
                    break
        try:
            (stage / _NEW).mkdir()
            yield stage
        finally:
            _remove(stage)


def _remove(stage: Path) -> None:
    """Remove a hidden folder, its lock last: what a kill leaves of it is removed by whoever gets the lock."""
    for part in (_NEW, _OLD):
        shutil.rmtree(stage / part, ignore_errors=True)
    shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def _lock(stage: Path, flags: int) -> Iterator[int]:
    """Hold the lock of a hidden folder, and yield its open file. Raises BlockingIOError where another process has it.

    Not by `filelock`, which makes the folder anew where it has just gone.
    """
    file = os.open(stage / _LOCK, flags)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError) or not flags & os.O_CREAT:
                raise  # where a file system has no locks, its own is not needed, and nobody removes leftovers
        yield file
    finally:
        os.close(file)


def _publish(folder: Path, target: Path, aside: Path) -> None:
    """Rename `folder` to `target`; what was there is then in its place, or in `aside`."""
    if not target.exists() or not any(target.iterdir()):
        os.rename(folder, target)
    elif not _exchanged(folder, target):
        aside.mkdir()
        # after a kill between these two, `remove_leftovers` puts it back
        os.rename(target, aside / target.name)
        try:
            os.rename(folder, target)
        except OSError:
            os.rename(aside / target.name, target)
            raise


def _exchanged(one: Path, two: Path) -> bool:
    """Let two paths change places at once; return False where the system or the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    swap = ctypes.c_uint(2)  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
    if hasattr(libc, "renameat2"):
        here = ctypes.c_int(-100)  # AT_FDCWD
        failed = libc.renameat2(here, os.fsencode(one), here, os.fsencode(two), swap)
    elif hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(os.fsencode(one), os.fsencode(two), swap)
    else:
        return False
    if failed and ctypes.get_errno() not in _NO_EXCHANGE:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(two))
    return not failed


def _host() -> str:
    return text_sha256(socket.gethostname())[:8]


def _is_of_this_host(stage: Path) -> bool:
    return stage.name.startswith(f"{_STAGE}{_host()}-")


def _last_write(stage: Path) -> float:
    """Return when anything in a hidden folder was last written, in seconds; now where it is just going away."""
    try:
        return max(path.lstat().st_mtime for path in (stage, *stage.rglob("*")))
    except OSError:
        return time.time()


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
