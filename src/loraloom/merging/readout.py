"""What each task reads of a merge that tells tasks apart: small gate files beside the merged adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from loraloom.adapters.lowrank import Shared
from loraloom.adapters.peft import files_by_task, read_adapter
from loraloom.adapters.update import Adapter, Update
from loraloom.errors import LoraloomError, did_you_mean
from loraloom.files.tensors import read_tensors

READOUTS = "readouts"
_SHARED = "shared"  # the factors that all tasks read; the gates lie in tasks/<task>


def readout_tensors(module: str, shared: Shared, tasks: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Return one layer's tensors by file: float32 factors once, and for each task its gate.

    A gate of one value and zeros (a mask times a factor) is kept as packed bits, any other as float32.
    """
    factors = {"left": shared.left, "core": shared.core, "right": shared.right}
    files = {_SHARED: {f"{module}.{name}": tensor.float() for name, tensor in factors.items()}}
    for task, gate in zip(tasks, shared.gates, strict=True):
        mask = gate != 0
        factor = gate.abs().max() if float(gate.sum()) > 0 else -gate.abs().max()
        if torch.equal(gate, mask * factor):
            bits = torch.from_numpy(np.packbits(mask.numpy()))
            packed = {f"{module}.mask": bits, f"{module}.factor": factor.float()}
        else:
            packed = {f"{module}.gate": gate.float()}
        files[f"tasks/{task}"] = packed
    return files


def scaled_readouts(folder: Path, scale: float) -> dict[str, dict[str, Tensor]]:
    """Return the readout files of a merged adapter's folder by their paths in it, what is read times `scale`."""
    paths = sorted((folder / READOUTS).glob("**/*.safetensors"))
    files = {path.relative_to(folder).as_posix(): read_tensors(path) for path in paths}
    for tensors in files.values():
        tensors |= {name: scale * tensor for name, tensor in tensors.items() if name.endswith(".left")}
    return files


def read_readout(folder: str | Path, task: str) -> Adapter:
    """Return what `task` reads of the merged adapter in `folder`, as an ordinary adapter in memory.

    folder: of an adapter merged by a rule that tells tasks apart: emr, or cp with `per_task`.
    task: that an input was trained on; an input that shares its task with another goes by its own name.

    Raises LoraloomError where the folder tells no tasks apart, or not this one.
    """
    folder = Path(folder)
    places = files_by_task(folder, f"{READOUTS}/tasks")
    if not places:
        raise LoraloomError(
            f"{folder}: one adapter for all tasks: it holds no {READOUTS}/", "merge by emr, or cp per task"
        )
    if task not in places:
        shared = [name for name, (of, _) in places.items() if of == task]
        hint = f"several are of it: {', '.join(shared)}" if shared else did_you_mean(task, places)
        raise LoraloomError(f"{folder}: nothing is read for task {task!r}", hint)
    merged = read_adapter(folder)
    factors, gates = read_tensors(folder / READOUTS / f"{_SHARED}.safetensors"), read_tensors(places[task][1])
    updates = {}
    for module in merged.shapes:
        core = factors[f"{module}.core"]
        gate = gates.get(f"{module}.gate")
        if gate is None:
            bits = np.unpackbits(gates[f"{module}.mask"].numpy(), count=core.numel())
            gate = torch.from_numpy(bits).reshape(core.shape) * gates[f"{module}.factor"]
        updates[module] = Update(factors[f"{module}.left"] @ (core * gate), factors[f"{module}.right"])
    return Adapter(updates, merged.config, {}, merged.dtype, forms=merged.forms, copies=merged.copies)
