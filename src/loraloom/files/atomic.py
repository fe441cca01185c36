"""Files and folders that are whole or absent: written beside their place, flushed, then renamed into it."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loraloom.errors import LoraloomError

# faults of a full or read-only place, whoever meets them while it is being written
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# faults of the place itself
_NO_PLACE = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.EIO)
# a folder that holds one of these was written here, and may be replaced
_OURS = ("loraloom.json", "stage.json", "meta.json")
_PART = ".part"


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on success flush it and rename it to `path`.

    Raises LoraloomError where the system cannot write (disk full, no permission); `path` is then as it was.
    """
    with _write_errors(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_PART, dir=_parent(path))
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            _flush(temporary)
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success flush its files and rename it to `path`.

    A folder at `path` is replaced. Raises LoraloomError where the system cannot write, and before anything else where
    `path` holds something that loraloom did not write.
    """
    check_folder(path)
    path = path.absolute()  # "." has no name of its own
    with _write_errors(path):
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_PART, dir=_parent(path)))
        try:
            yield temporary
            os.chmod(temporary, 0o777 & ~_umask())
            _publish(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_folder(path: Path) -> None:
    """Raise LoraloomError where `path` is a file, or a folder that holds something loraloom did not write."""
    with _write_errors(path):
        if path.exists() and not path.is_dir():
            raise LoraloomError(f"{path}: is a file, where a folder is to be written", "name another folder")
        if path.is_dir() and any(path.iterdir()) and not any((path / name).is_file() for name in _OURS):
            raise LoraloomError(
                f"{path}: holds files that loraloom did not write; they would be lost",
                "name a folder that is new or empty",
            )


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all."""
    with staged_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left in `folder`; nobody else may be writing there."""
    for path in folder.glob(f".*{_PART}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _publish(temporary: Path, path: Path) -> None:
    for file in temporary.rglob("*"):
        if file.is_file():
            _flush(file)
    if path.exists():
        # a folder cannot be renamed onto one that holds files
        retired = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_PART, dir=path.parent))
        os.replace(path, retired)
        os.replace(temporary, path)
        shutil.rmtree(retired, ignore_errors=True)
    else:
        os.replace(temporary, path)


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Tell a fault of writing at `path` as LoraloomError; a fault of reading elsewhere passes as it is."""
    try:
        yield
    except LoraloomError:
        raise
    except Exception as error:
        reason = _write_fault(error, path)
        if not reason:
            raise
        hint = "free some space or choose another folder; nothing was changed"
        raise LoraloomError(f"{path}: cannot be written: {reason}", hint) from error


def _write_fault(error: Exception, path: Path) -> str:
    """Return why `path` cannot be written, or an empty string where `error` is of another kind."""
    if isinstance(error, shutil.Error):
        # copytree keeps the words of what it met: a list of (from, to, why)
        return str(error.args[0][0][2])
    if isinstance(error, OSError):
        where = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else path
        here = where.is_relative_to(path.parent) or path.is_relative_to(where)
        if error.errno in _FULL or (error.errno in _NO_PLACE and here):
            return error.strerror or str(error)
        return ""
    # what is written in Rust (tokenizers, safetensors) gives the system's words and number as text
    system = re.search(r"([^:(]+) \(os error (\d+)\)", str(error))
    if system and (int(system[2]) in _FULL or str(error).startswith("Error while serializing")):
        return system[1].strip()
    # torch.save has no class and no number for a write that fell short
    return "the disk is full" if re.search("inline_container|PytorchStreamWriter", str(error)) else ""


def _parent(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
