"""Statistics files of strangers: refused in one message, or right in everything that is made of them."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from harness import judge, many
from hypothesis import given
from peft import LoraConfig
from strategies_statistics import FORMS, as_file, malformed, parts, statistics, written

from loraloom.starts.initialise import Initialisation, initialise
from loraloom.starts.options import StartOptions
from loraloom.statistics.file import Statistics


def wrong_with(found: Statistics) -> str:
    """Tell what of accepted statistics cannot be told as JSON, used or summed; nothing where all is well."""
    json.dumps(found.contents(), allow_nan=False).encode()
    if not found.layers or set(found.moments) != {layer.input for layer in found.layers.values()}:
        return "layers and moments do not fit"
    for module, layer in found.layers.items():
        moment = found.moment(module)
        if moment.width != layer.in_features or moment.faults():
            return f"{module} has another width, or is impossible"
        if not all(map(math.isfinite, (moment.trace(), moment.lost, float(moment.total.abs().max())))):
            return f"{module} is not finite"
    summed = found + found
    if summed.texts != 2 * found.texts or any(not one.as_gram().isfinite().all() for one in summed.moments.values()):
        return "the sum is wrong"
    return ""


@pytest.mark.parametrize("form", FORMS)
def test_whole_files_are_read(form: str, tmp_path: Path) -> None:
    made = statistics(form)
    found = Statistics.load(written(as_file(*parts(made)), tmp_path / "a.safetensors"))
    assert wrong_with(found) == ""
    assert (found.layers, found.privacy, found.kind) == (made.layers, made.privacy, made.kind)
    for name, moment in made.moments.items():
        assert (found.moments[name].count, found.moments[name].lost) == (moment.count, moment.lost)
        assert torch.equal(found.moments[name].as_gram(), moment.as_gram())


def started(found: Statistics, rule: str, folder: Path) -> Initialisation:
    """Return what `initialise` makes of it, and leave no folder behind."""
    try:
        options = StartOptions(rule=rule, energy_share=0.1)
        return initialise(folder, None, {"stranger": found}, LoraConfig(r=1), options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def wrong_start(done: Initialisation) -> str:
    """Tell what is wrong with a start; nothing where all is well."""
    json.dumps(done.provenance, allow_nan=False).encode()
    return "" if all(A.isfinite().all() for A in done.A.values()) else "A is not finite"


@given(content=malformed())
@many
def test_strangers_files(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp()
    path = written(content, folder / "stranger.safetensors")
    found = judge("statistics", lambda: Statistics.load(path), check=wrong_with)
    if found is None:
        return

    for rule in ("apart", "osrm"):
        judge("starts", partial(started, found, rule, folder / "start"), check=wrong_start)
