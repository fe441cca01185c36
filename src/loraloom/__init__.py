"""loraloom: LoRA adapters that merge."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# name -> module; loaded when first used, so that `import loraloom` does not import torch. No name of a module is here:
# once imported, the module would hide the function
_PUBLIC = {
    "Adapter": "adapters.update",
    "Head": "adapters.heads",
    "KeepInSubspace": "starts.keep",
    "LoraSettings": "settings",
    "LoraloomError": "errors",
    "MergeOptions": "merging",
    "Moment": "statistics.moments",
    "Recipe": "study.recipe",
    "StartOptions": "starts.options",
    "Statistics": "statistics.file",
    "StudyResult": "results",
    "Subspace": "starts.subspace",
    "Task": "tasks.task",
    "TrainingSettings": "settings",
    "Update": "adapters.update",
    "align_heads": "adapters.heads",
    "collect_statistics": "statistics.collect",
    "evaluate": "model.runner",
    "initialise": "starts.initialise",
    "initialise_all": "starts.initialise",
    "keep_callback": "starts.keep",
    "make_plan": "merging",
    "merge": "merging",
    "osrm_subspace": "starts.subspace",
    "osrm_subspaces": "starts.subspace",
    "read_adapter": "adapters.peft",
    "read_provenance": "adapters.peft",
    "read_readout": "merging",
    "rule": "merging",
    "run_study": "study.export",
    "train_adapter": "training",
    "write_adapter": "adapters.peft",
    "write_merged": "merging",
    "write_report": "report",
}
__all__ = [*sorted(_PUBLIC), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'loraloom' has no attribute {name!r}")
    return getattr(importlib.import_module(f"loraloom.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
