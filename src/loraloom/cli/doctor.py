"""The command doctor: what this installation has, what it lacks, and how to get that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from loraloom.cli.common import AsJson, Quiet, command
from loraloom.cli.words import listed

if TYPE_CHECKING:
    from loraloom.model.doctor import Cache, Device, Installation

_TOLD = ("torch", "transformers", "peft", "accelerate", "datasets", "huggingface-hub", "safetensors")


def doctor(quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Tell what this installation has and lacks: versions, devices, bases, extras, caches; and how to get the rest.

    Exits with 1 where something is missing without which loraloom does not work. The network is not asked.
    """
    with command(quiet, as_json) as out:
        from loraloom.model.doctor import look_around

        found = look_around()
        out.result(asdict(found), "")
        out.facts(f"loraloom {found.version}", _versions(found))
        out.facts("It computes on", _devices(found))
        out.facts("Base models that come as packages", _bases(found))
        extras = {one.name: f"missing; run: {one.get}" if one.missing else "there" for one in found.extras}
        out.facts("Extras", extras.items())
        out.facts("Caches", ((one.name, _cache(one)) for one in found.caches))
        for fault in found.faults:
            out.warn(fault)
        out.say("Something is missing: see the warnings." if found.faults else "Nothing is missing that it needs.")
        if found.faults:
            raise typer.Exit(1)


def _versions(found: Installation) -> Iterator[tuple[str, str]]:
    yield "Python", f"{found.python.version} ({found.python.executable})"
    yield "system", found.system
    versions = {one.name: one.version or "missing" for one in found.packages}
    for name in _TOLD:
        if name in versions:
            yield name, versions[name]
    rest = [one for one in found.packages if one.name not in _TOLD]
    lacking = [one.name for one in rest if one.problem]
    yield f"{len(rest)} others", f"not as they should be: {listed(lacking)}" if lacking else "as they should be"
    yield "the hub", found.hub


def _devices(found: Installation) -> Iterator[tuple[str, str]]:
    for one in found.devices:
        yield one.name, _device(one)
    threads = "" if found.threads is None else f"; torch takes {found.threads} for its threads: OMP_NUM_THREADS sets it"
    yield "cores", f"{found.cores}{threads}"


def _device(one: Device) -> str:
    from loraloom.merging.card import bytes_in_words

    return one.what if one.memory is None else f"{one.what}, {bytes_in_words(one.memory)} of memory"


def _bases(found: Installation) -> Iterator[tuple[str, str]]:
    for one in found.bases:
        yield one.name, one.place or f"{one.problem}{f': {one.get}' if one.get else ''}"


def _cache(one: Cache) -> str:
    from loraloom.merging.card import bytes_in_words

    size = f"{'at least ' if one.at_least else ''}{bytes_in_words(one.size)}"
    return f"{one.place}: {size}, {bytes_in_words(one.free)} free; {one.variable} moves it"
