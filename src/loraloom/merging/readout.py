"""What each task reads of a merge that tells tasks apart: small gate files beside the merged adapter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from loraloom.adapters.lowrank import Shared
from loraloom.adapters.peft import files_by_task, read_adapter
from loraloom.adapters.update import Adapter, Update
from loraloom.errors import LoraloomError, did_you_mean
from loraloom.files.tensors import TensorFile, read_tensors

READOUTS = "readouts"
_SHARED = "shared"  # the factors that all tasks read; the gates lie in tasks/<task>


class Readouts:
    """Writes what each task reads, layer by layer: factors, which all share, at once; gates, which are small, last."""

    def __init__(self, folder: Path, modules: Iterable[str], tasks: Sequence[str]) -> None:
        self._gates: dict[str, dict[str, Tensor]] = {task: {} for task in tasks}
        (folder / READOUTS).mkdir()
        names = [f"{module}.{name}" for module in modules for name in ("left", "core", "right")]
        self._factors = TensorFile(folder / READOUTS / f"{_SHARED}.safetensors", names)

    def add(self, module: str, shared: Shared) -> None:
        """Add one layer: float32 factors, and each task's gate.

        A gate of one value and zeros (a mask times a factor) is kept as packed bits, any other as float32.
        """
        for name in ("left", "core", "right"):
            self._factors.add(f"{module}.{name}", getattr(shared, name).float())
        for gates, gate in zip(self._gates.values(), shared.gates, strict=True):
            mask = gate != 0
            factor = gate.abs().max() if float(gate.sum()) > 0 else -gate.abs().max()
            if torch.equal(gate, mask * factor):
                gates[f"{module}.mask"] = torch.from_numpy(np.packbits(mask.numpy()))
                gates[f"{module}.factor"] = factor.float()
            else:
                gates[f"{module}.gate"] = gate.float()

    def finish(self) -> dict[str, dict[str, Tensor]]:
        """Close the file of factors, and return the tasks' own tensors by their files' paths in the folder."""
        self._factors.close()
        return {f"{READOUTS}/tasks/{task}.safetensors": gates for task, gates in self._gates.items()}


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
