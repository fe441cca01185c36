"""What keeps A inside its space, or as it is, while an adapter trains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from loraloom.adapters.peft import read_provenance
from loraloom.errors import LoraloomError, raise_problems
from loraloom.model.wrappers import assign, each_weight, plain_path, whole
from loraloom.starts.options import Keep
from loraloom.starts.subspace import project_out

AVOID = "avoid.safetensors"


def keep_callback(folder: str | Path, adapter_name: str = "default") -> KeepInSubspace:
    """Return the callback for an adapter folder that `initialise` wrote; add it to Trainer or SFTTrainer."""
    folder = Path(folder)
    init = read_provenance(folder).get("init")
    keep: Keep = init.get("keep", "free") if isinstance(init, dict) else "free"
    path = folder / AVOID
    if keep == "projected" and not path.is_file():
        raise LoraloomError(f"{path}: missing, so A cannot be kept inside its space", "run `loraloom init` again")
    try:
        avoid = load_file(path) if keep == "projected" else {}
    except SafetensorError as error:
        raise LoraloomError(f"{path}: cannot be read ({error})", "run `loraloom init` again") from error
    return KeepInSubspace(keep, avoid, adapter_name)


class KeepInSubspace(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Keeps A fixed (`frozen`) or, after every optimiser step, off the loud directions V: A <- A (I - V V^T).

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
        """Project every A of the adapter off its loud directions, in place; nothing unless `projected`."""
        if self.keep != "projected":
            return
        layers = lora_layers(model, self.adapter_name)
        without = sorted(layers.keys() - self.avoid.keys())
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
