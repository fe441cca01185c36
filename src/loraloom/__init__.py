"""loraloom: LoRA adapters that merge."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# name -> module; loaded when first used, so that `import loraloom` does not import torch. No name of a module is here:
# once imported, the module would hide the function
_PUBLIC = {
    "Adapter": "adapter",
    "Head": "heads",
    "KeepInSubspace": "keeping",
    "LoraloomError": "errors",
    "Moment": "moments",
    "Recipe": "recipe",
    "Statistics": "statistics",
    "StudyResult": "results",
    "Subspace": "subspace",
    "Task": "tasks.task",
    "TrainingSettings": "recipe",
    "Update": "adapter",
    "align_heads": "heads",
    "collect_statistics": "statistics",
    "evaluate": "evaluation",
    "initialise_all": "initialise",
    "make_plan": "merging",
    "merge": "merging",
    "osrm_subspace": "subspace",
    "osrm_subspaces": "subspace",
    "read_adapter": "peft_folder",
    "read_provenance": "peft_folder",
    "read_readout": "merging",
    "rule": "merging",
    "run_study": "outcome",
    "train_adapter": "training",
    "write_adapter": "peft_folder",
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
