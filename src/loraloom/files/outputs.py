"""Where a result may be written: nothing of anybody else's is lost, no input is touched, and faults are told.

Every folder written here holds a list of its files, RECORD, by which it is known when it is to be replaced.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from loraloom.errors import LoraloomError
from loraloom.files.hashing import json_text

RECORD = ".loraloom"
_AGAIN = "add --overwrite to replace it (overwrite=True in Python), or name another place"
_HEAD = 1 << 16  # bytes of a file in which its mark is looked for
# faults of a full or read-only place, whoever meets them while it is being written
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# faults of the place itself
_NO_PLACE = (
    *(errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.EIO),
    *(errno.ELOOP, errno.EBUSY, errno.ENOTEMPTY),
)


class Record(NamedTuple):
    """What a folder of ours says of itself: what kind of result it is, and the files that were written into it."""

    kind: str
    files: frozenset[str]


def check_folder(path: Path, *, kind: str, overwrite: bool = False, inputs: Iterable[Path] = ()) -> None:
    """Raise LoraloomError where a result of this `kind` must not be written to the folder `path`.

    It may be new or empty or, with `overwrite`, an earlier result of the same kind; never one with files in it that
    were not written here, and never one that is, holds or lies inside one of `inputs`.
    """
    with write_errors(path):
        check_apart(path, inputs)
        _check_place(path)
        if not path.exists():
            return
        if not path.is_dir():
            raise LoraloomError(f"{path}: is a file, where a folder is to be written", "name another folder")
        if os.path.ismount(os.path.realpath(path)):
            raise LoraloomError(f"{path}: is a mount point, which nothing can be renamed to", "name a folder inside it")
        record = read_record(path)
        foreign = sorted(_files(path) - (record.files | {RECORD} if record else set()))
        if foreign:
            more = f" and {len(foreign) - 3} more" if foreign[3:] else ""
            what = f"{', '.join(foreign[:3])}{more} {'is' if len(foreign) == 1 else 'are'} not ours"
            raise LoraloomError(f"{path}: {what} and would be lost", "move it away, or name another folder")
        if record and record.kind != kind:
            raise LoraloomError(f"{path}: holds a result of another kind, {record.kind}", "name another folder")
        if record and not overwrite:
            raise LoraloomError(f"{path}: holds an earlier result", _AGAIN)


def check_file(path: Path, *, mark: bytes = b"", overwrite: bool = False, inputs: Iterable[Path] = ()) -> None:
    """Raise LoraloomError where a result must not be written to the file `path`.

    It may be new, a device such as /dev/null or, with `overwrite`, a file that holds `mark` near its start, as every
    file of its kind does; never one that is one of `inputs` or lies inside it.
    """
    with write_errors(path):
        check_apart(path, inputs)
        if path.is_dir():
            raise LoraloomError(f"{path}: is a folder, where a file is to be written", "name another file")
        if path.is_file() or not path.exists():
            _check_place(path)
        if path.is_file():
            if not overwrite:
                raise LoraloomError(f"{path}: is there already", _AGAIN)
            with open(path, "rb") as file:
                if mark not in file.read(_HEAD):
                    raise LoraloomError(f"{path}: is not ours and would be lost", "move it away, or name another file")


def check_apart(path: Path, inputs: Iterable[Path], *, may_hold: bool = False) -> None:
    """Raise LoraloomError where `path` is, lies inside or, unless it `may_hold` them, holds one of `inputs`."""
    for given in inputs:
        if _within(path, given):
            what = "is an input" if _within(given, path) else f"lies inside the input {given}"
        elif _within(given, path) and not may_hold:
            what = f"holds the input {given}"
        else:
            continue
        raise LoraloomError(f"{path}: {what}, which must stay as it is", "name another place")


def _check_place(path: Path) -> None:
    """Raise LoraloomError where nothing can be made beside `path`: told now, not after hours of work."""
    parent = Path(os.path.realpath(path)).parent
    there = next(one for one in (parent, *parent.parents) if one.exists())
    if not there.is_dir():
        raise LoraloomError(f"{path}: {there} is a file, no folder", "name another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise LoraloomError(f"{path}: {there} may not be written to", "name another place, or ask for the permission")


def read_record(folder: Path) -> Record | None:
    """Return what a folder says of itself; None where it was not written here, or what it says is damaged."""
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return Record(str(found["kind"]), frozenset(map(str, found["files"])))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def record_text(kind: str, folder: Path, names: Iterable[str] = ()) -> str:
    """Return the record of a folder with the files that are in it, and with `names`."""
    return json_text({"kind": kind, "files": sorted(_files(folder).union(names) - {RECORD})})


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
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


def _files(folder: Path) -> set[str]:
    """Return the path of everything in `folder` but folders, links as what they are."""
    found: set[str] = set()

    def fail(error: OSError) -> None:
        raise error  # what cannot be listed is not known to be ours

    for place, folders, files in os.walk(folder, onerror=fail):
        names = files + [name for name in folders if os.path.islink(os.path.join(place, name))]
        found.update((Path(place) / name).relative_to(folder).as_posix() for name in names)
    return found


def _within(path: Path, other: Path) -> bool:
    """Tell whether `path` is `other`, which is there, or would lie inside it, whatever the two are called."""
    here = Path(os.path.realpath(path))
    return other.exists() and any(place.exists() and place.samefile(other) for place in (here, *here.parents))


def _write_fault(error: Exception, path: Path) -> str:
    """Return why `path` cannot be written, or an empty string where `error` is of another kind."""
    if isinstance(error, shutil.Error):
        # copytree keeps the words of what it met: a list of (from, to, why)
        return str(error.args[0][0][2])
    if isinstance(error, OSError):
        where = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else path
        here = any(where.is_relative_to(one.parent) or one.is_relative_to(where) for one in (path, path.resolve()))
        if error.errno in _FULL or (error.errno in _NO_PLACE and here):
            return error.strerror or str(error)
        return ""
    # what is written in Rust (tokenizers, safetensors) gives the system's words and number as text
    system = re.search(r"([^:(]+) \(os error (\d+)\)", str(error))
    if system and (int(system[2]) in _FULL or str(error).startswith("Error while serializing")):
        return system[1].strip()
    # torch.save has no class and no number for a write that fell short
    return "the disk is full" if re.search("inline_container|PytorchStreamWriter", str(error)) else ""


def unfinished(output: Path) -> Path:
    """Return where the checkpoints of a training whose result is to lie in `output` are, until it is done."""
    return output.with_name(f".{output.name}.checkpoints")
