"""Stage outputs at an address of fsspec's (s3://, gs://), beside the store that keeps them in a folder of this machine.

A bucket has neither locks nor renames, so none is needed: files go to a prefix that nobody else writes to, and a marker
goes last, to a name that the output's key alone makes. Without the marker there is no output. Of two machines that make
one output at a time the first to put its marker wins; the other takes its own files away.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from loraloom.errors import LoraloomError, first_line
from loraloom.files.atomic import staged_folder
from loraloom.files.hashing import file_sha256, json_text, text_sha256

MARKERS, NOTES = "done", "notes"
_EVERY = 10.0  # seconds between two notes of one stage that are put, or got: each is a request that is paid for
_EXTRAS = {"s3": "s3", "s3a": "s3"}  # by protocol, what of loraloom's extras brings its file system
_SHORT = 12  # characters of a key in the names of notes


def is_address(place: str | Path) -> bool:
    """Tell whether a place is an address of fsspec's, as s3://bucket/study, and no folder."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", str(place)) is not None


def local_copy(address: str) -> Path:
    """Return the folder of this machine that holds what lies at an address; it can be removed, and is filled again."""
    from loraloom.model.packaged import cache_folder  # it brings transformers, which a store needs nowhere else

    address = address.rstrip("/")
    return cache_folder() / "studies" / f"{address.rpartition('/')[2]}-{text_sha256(address)[:8]}"


class Remote:
    """What a study's stages left at `address`, for all machines that read and write there.

    Raises LoraloomError where the address cannot be used, from every method.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        with self._told():
            from fsspec.core import url_to_fs

            self.files, self.root = url_to_fs(self.address, use_listings_cache=False)
        self.there: set[str] = set()  # keys of outputs that are known to be whole there
        self.noted: dict[str, tuple[float, dict[str, Any] | None]] = {}  # what was put or got last, and when

    def get(self, key: str, folder: Path) -> Path | None:
        """Bring an output into its place below `folder`, and return where; None where there is no whole one.

        Every file is held against its sha256. An output of which something is missing or changed is told and forgotten.
        """
        marker = self._marker(key)
        if marker is None:
            return None
        place = folder / str(marker["kind"]) / str(marker["name"])
        try:
            with staged_folder(place, kind=marker["kind"], overwrite=True) as staged:
                self._read(marker, staged)
        except _Damaged as error:
            warnings.warn(f"{self.address}: {marker['kind']}/{marker['name']} is made again: {error}", stacklevel=2)
            with self._told():
                self.files.rm_file(self._at(MARKERS, f"{key}.json"))
            return None
        self.there.add(key)
        return place

    def put(self, key: str, folder: Path, record: Mapping[str, Any]) -> None:
        """Put a whole output there where it is not, its marker last. `record`: what its stage.json says."""
        if key in self.there or self._marker(key) is not None:
            self.there.add(key)
            return
        at = f"{record['kind']}/{folder.name}/{secrets.token_hex(4)}"
        names = list(record["files"])
        marker = {"kind": record["kind"], "name": folder.name, "at": at, "record": dict(record)}
        with self._told():
            if names:
                self.files.put([str(folder / name) for name in names], [self._at(at, name) for name in names])
            try:
                self.files.pipe_file(self._at(MARKERS, f"{key}.json"), json_text(marker).encode(), mode="create")
            except FileExistsError:  # another machine was quicker
                self.files.rm(self._at(at), recursive=True)
        self.there.add(key)

    def put_results(self, folder: Path) -> None:
        """Put what a finished study left in its folder there, but for its stages and logs; results.json goes last."""
        found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        names = [path.relative_to(folder).as_posix() for path in found]
        names = [name for name in names if name.split("/")[0] not in ("stages", "logs", "results.json")]
        above = self.root.rpartition("/")[0]  # the stages lie in the study
        with self._told():
            self.files.put([str(folder / name) for name in names], [f"{above}/{name}" for name in names])
            self.files.put_file(str(folder / "results.json"), f"{above}/results.json")

    def note(self, key: str, said: dict[str, Any]) -> None:
        """Keep a note of how far a stage is, unless one was kept a moment ago."""
        if self._is_due(key):
            self.noted[key] = time.monotonic(), said
            with suppress(LoraloomError), self._told():  # the next one may get there
                self.files.pipe_file(self._at(NOTES, f"{key[:_SHORT]}.json"), json.dumps(said).encode())

    def read_note(self, key: str) -> dict[str, Any] | None:
        """Return the note of a stage at work on whatever machine, if there is one, as it was a moment ago at most."""
        if self._is_due(key):
            said = None
            with suppress(LoraloomError, ValueError), self._told():
                said = dict(json.loads(self._read_text(NOTES, f"{key[:_SHORT]}.json") or "null") or {}) or None
            self.noted[key] = time.monotonic(), said
        return self.noted[key][1]

    def forget(self, key: str) -> None:
        """Remove the note of a stage that is no longer at work."""
        self.noted.pop(key, None)
        with suppress(LoraloomError, FileNotFoundError), self._told():
            self.files.rm_file(self._at(NOTES, f"{key[:_SHORT]}.json"))

    def _is_due(self, key: str) -> bool:
        return key not in self.noted or time.monotonic() - self.noted[key][0] > _EVERY

    def _at(self, *parts: str) -> str:
        return "/".join((self.root, *parts))

    def _marker(self, key: str) -> dict[str, Any] | None:
        with self._told():
            text = self._read_text(MARKERS, f"{key}.json")
        return None if text is None else dict(json.loads(text))

    def _read_text(self, *parts: str) -> str | None:
        try:
            return bytes(self.files.cat_file(self._at(*parts))).decode("utf-8")
        except FileNotFoundError:
            return None

    def _read(self, marker: Mapping[str, Any], folder: Path) -> None:
        """Write an output's files and its record into a folder. Raises _Damaged where they are not what was put."""
        record = marker["record"]
        names = list(record["files"])
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with self._told():
            try:
                if names:
                    self.files.get(
                        [self._at(marker["at"], name) for name in names], [str(folder / name) for name in names]
                    )
            except FileNotFoundError as error:
                raise _Damaged(f"{first_line(error)} is missing") from error
        for name, file in record["files"].items():
            if file_sha256(folder / name) != file["sha256"]:
                raise _Damaged(f"{name} was changed")
            os.utime(folder / name, ns=(record["written"], record["written"]))
        (folder / "stage.json").write_text(json_text(record), encoding="utf-8")

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Tell whatever a file system raises, which is of many kinds, as a fault of the address."""
        try:
            yield
        except (LoraloomError, _Damaged):
            raise
        except ImportError as error:
            extra = _EXTRAS.get(self.address.partition("://")[0].lower())
            hint = f"pip install 'loraloom[{extra}]'" if extra else "install what it names"
            raise LoraloomError(f"{self.address}: {first_line(error)}", hint) from error
        except Exception as error:
            hint = "check the address, that the bucket is there, and your rights and keys to it"
            raise LoraloomError(f"{self.address}: cannot be used: {first_line(error)}", hint) from error


class _Damaged(Exception):  # noqa: N818
    """An output of which the files are not what its marker says."""
