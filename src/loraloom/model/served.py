"""Adapters in a base model as a server that uses PEFT has them, and the same updates added to its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from loraloom.adapters.update import Adapter
from loraloom.errors import LoraloomError, first_line, raise_problems
from loraloom.model.runner import replaced


class Served:
    """A base model with several adapters in it, swapped by PEFT's `set_adapter`. The model is PEFT's from now on."""

    def __init__(self, model: Any, folders: Mapping[str, Path]) -> None:
        self._names = {name: f"adapter{index}" for index, name in enumerate(folders)}  # PEFT takes no dots in a name
        for name, folder in folders.items():
            inner = self._names[name]
            try:
                if isinstance(model, PeftModel):
                    model.load_adapter(str(folder), adapter_name=inner)
                else:
                    model = PeftModel.from_pretrained(model, str(folder), adapter_name=inner)
            except (ValueError, RuntimeError, KeyError, TypeError, OSError) as error:
                hint = "use the adapter's own base model, or save the adapter again"
                raise LoraloomError(f"{folder}: PEFT does not load it: {first_line(error)}", hint) from error
        self.model: Any = model.eval()

    @contextmanager
    def switched_to(self, name: str | None) -> Iterator[None]:
        """Have this adapter answer while the context lasts; None for the base model alone."""
        if name is None:
            with self.model.disable_adapter():
                yield
        else:
            self.model.set_adapter(self._names[name])
            yield


@contextmanager
def fused(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """Have W + dW in place of every adapted weight while the context lasts; summed in float64.

    Raises LoraloomError that tells every layer that the model lacks or has in another shape.
    """
    weights: dict[str, Tensor] = {}
    problems: list[str] = []
    for path, update in adapter.updates.items():
        form = adapter.forms.get(path)
        if form is not None and form.kind == "experts":
            problems.append(f"{path}: experts whose weights are one tensor cannot be checked here")
            continue
        try:
            layer = model.get_submodule(path)
        except AttributeError:
            problems.append(f"the base model has no layer {path}")
            continue
        weight = layer.get_parameter("weight")
        # of an embedding and of GPT-2's Conv1D the weight stands transposed
        turned = isinstance(layer, nn.Embedding) or type(layer).__name__ == "Conv1D"
        dW = update.B.double() @ update.A.double()
        dW = dW.T if turned else dW
        if dW.numel() != weight.numel() or dW.shape[0] != weight.shape[0]:
            shapes = f"{tuple(dW.shape)}, the base model's layer {tuple(weight.shape)}"
            problems.append(f"{path}: the update is {shapes}")
            continue
        whole = weight.detach().double() + dW.reshape(weight.shape).to(weight.device)
        weights[f"{path}.weight"] = whole.to(weight.dtype)  # now, so that one at a time is as wide as the sum
    raise_problems(adapter.name, problems, "use the adapter's own base model")
    with replaced(model, weights):
        yield
