"""What keeps A inside its space, or as it is, while an adapter trains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import TrainerCallback

from loraloom.adapters.peft import PROVENANCE, read_provenance
from loraloom.errors import LoraloomError, raise_problems
from loraloom.files.tensors import read_tensors
from loraloom.model.wrappers import assign, each_weight, plain_path, whole
from loraloom.starts.options import Keep
from loraloom.starts.subspace import project_out

AVOID = "avoid.safetensors"
_AGAIN = "run `loraloom init` again"
_ORTHONORMAL = 1e-3  # of float32 columns: far above rounding


def keep_callback(folder: str | Path, adapter_name: str = "default") -> KeepInSubspace:
    """Return the callback for a start: add it to Trainer or SFTTrainer. It does nothing where A is let go.

    folder: the adapter folder that `initialise` wrote; one that it did not write lets A go.
    adapter_name: the adapter of the PeftModel that trains.

    Raises LoraloomError where what the folder says of A cannot be read or kept.
    """
    folder = Path(folder)
    init = read_provenance(folder).get("init", {"keep": "free"})
    given = init.get("keep") if isinstance(init, dict) else None
    if given not in get_args(Keep):
        wrong = f"keep is {given!r}" if isinstance(init, dict) else "init is no JSON object"
        raise LoraloomError(f"{folder / PROVENANCE}: {wrong}, so what A is kept to is not known", _AGAIN)
    keep = cast(Keep, given)
    return KeepInSubspace(keep, _read_avoid(folder / AVOID) if keep == "projected" else {}, adapter_name)


def _read_avoid(path: Path) -> dict[str, Tensor]:
    """Return the directions to stay off by module path, each (n, p) float32 with orthonormal columns."""
    if not path.is_file():
        raise LoraloomError(f"{path}: missing, so A cannot be kept inside its space", _AGAIN)
    found = read_tensors(path)
    problems = [
        f"{module}: {fault}" for module, directions in found.items() if (fault := _fault_of_directions(directions))
    ]
    raise_problems(str(path), problems, _AGAIN)
    return found


def _fault_of_directions(directions: Tensor) -> str:
    if directions.ndim != 2 or directions.dtype != torch.float32 or directions.shape[1] > directions.shape[0]:
        return f"{directions.dtype} {tuple(directions.shape)} are no directions"
    off = directions.T @ directions - torch.eye(directions.shape[1])
    return "" if bool((off.abs() < _ORTHONORMAL).all()) else "its columns are not orthonormal"


class KeepInSubspace(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Keeps A fixed (`frozen`) or, after every optimiser step, off the loud directions V: A <- A (I - V V^T).

    keep: what is done to A; nothing where it is `free`.
    avoid: V (n, p) float32 with orthonormal columns, by module path of the base model; for `projected` alone.
    adapter_name: the adapter of the PeftModel that trains.

    Works with the HF Trainer, TRL's SFTTrainer, and gradient accumulation (an optimiser step is what counts).
    """

    def __init__(self, keep: Keep, avoid: Mapping[str, Tensor], adapter_name: str = "default") -> None:
        self.keep = keep
        self.avoid = dict(avoid)
        self.adapter_name = adapter_name

    def on_init_end(self, args: Any, state: Any, control: Any, *, model: Any = None, **kwargs: Any) -> None:
        """Freeze A before the optimiser is made."""
        self.freeze(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any = None, **kwargs: Any) -> None:
        """Freeze A where the callback was added later, and put A inside its space before the first step."""
        self.freeze(model)
        if not state.global_step:  # a resumed A is inside; once more would change its last bits
            self.project(model)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any = None, **kwargs: Any) -> None:
        """Project A back into its space."""
        self.project(model)

    @torch.no_grad()
    def project(self, model: torch.nn.Module) -> None:
        """Project every A of the adapter off its loud directions, in place; nothing unless `projected`.

        Raises LoraloomError for layers whose directions are not known, or are of another width.
        """
        if self.keep != "projected":
            return
        layers = lora_layers(model, self.adapter_name)
        without = [
            module
            for module, layer in sorted(layers.items())
            if module not in self.avoid
            or len(self.avoid[module]) != getattr(layer.lora_A[self.adapter_name], "in_features", None)
        ]
        raise_problems("no space is known for these layers", without, "train the adapter that `initialise` made")
        factors = {module: layer.lora_A[self.adapter_name] for module, layer in layers.items()}
        for module, weight in each_weight(model, factors, write=True):
            if self.avoid[module].device != weight.device:
                self.avoid[module] = self.avoid[module].to(weight.device)
            assign(weight, project_out(whole(weight).float(), self.avoid[module]))

    def freeze(self, model: torch.nn.Module) -> None:
        """Let no optimiser move A; nothing unless `frozen`."""
        if self.keep == "frozen":
            for layer in lora_layers(model, self.adapter_name).values():
                layer.lora_A[self.adapter_name].weight.requires_grad_(False)


def lora_layers(model: torch.nn.Module, adapter_name: str) -> dict[str, Any]:
    """Return the LoRA layers of the adapter by module path of the base model, whatever wraps the PeftModel."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A:
            layers[plain_path(name).split("base_model.model.", 1)[-1]] = module
    if not layers:
        raise LoraloomError(f"no LoRA layer of adapter {adapter_name!r} was found in the model", "give a PeftModel")
    return layers
