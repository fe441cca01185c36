"""The linear layers of a base model: found by path, and what each of them reads."""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.adapters.bases import public_name
from loraloom.adapters.patterns import targeted
from loraloom.errors import LoraloomError, did_you_mean
from loraloom.model.tokens import token_labels
from loraloom.model.wrappers import eager, is_sharded, peeled, plain_path, reshard


@contextmanager
def base_running(model: nn.Module) -> Iterator[None]:
    """Have `model` in eval mode, without gradients and with its adapters off; restore every flag after that."""
    modes = [(module, module.training) for module in model.modules()]
    grads = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    adapted = peeled(model)
    adapters_off = adapted.disable_adapter() if hasattr(adapted, "disable_adapter") else nullcontext()  # type: ignore[operator]
    try:
        # no_grad, not inference_mode: buffers that the model caches here must serve training afterwards
        with adapters_off, torch.no_grad(), eager():
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training
        reshard(model)
        for parameter, needed in grads:
            parameter.requires_grad_(needed)


def base_model(model: nn.Module) -> nn.Module:
    """Return the base model inside a PeftModel and whatever wraps it, or `model` itself.

    Raises LoraloomError where adapters cannot be taken off: merged into the weights, or injected without a PeftModel.
    """
    adapted = [(name, module) for name, module in model.named_modules() if hasattr(module, "base_layer")]
    if adapted and not hasattr(peeled(model), "disable_adapter"):
        raise LoraloomError(
            f"{adapted[0][0]}: has an adapter that cannot be turned off", "give a PeftModel or the base"
        )
    merged = [name for name, module in adapted if getattr(module, "merged", False)]
    if merged:
        raise LoraloomError(f"{merged[0]}: its adapter is merged into the weights", "call unmerge_adapter() first")
    return unwrapped(model)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside a PeftModel and whatever wraps either, or `model` itself."""
    model = peeled(model)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    assert isinstance(inner, nn.Module)
    return peeled(inner)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers of a base model by path, as if nothing wrapped or adapted them."""
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside) or ".modules_to_save." in name:
            continue
        layer = peeled(module)
        while isinstance(inner := getattr(layer, "base_layer", None), nn.Module):
            layer, inside = peeled(inner), (*inside, f"{name}.")
        if isinstance(layer, nn.Linear) or _is_conv1d(layer):
            found[plain_path(name.replace(".original_module", ""))] = layer
    return found


def layer_shape(layer: nn.Module) -> tuple[int, int]:
    """Return the in and out features of a linear layer."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    assert isinstance(layer.nx, int)
    assert isinstance(layer.nf, int)  # the weight itself may be a shard
    return layer.nx, layer.nf


def _is_conv1d(layer: nn.Module) -> bool:
    """Tell whether this is GPT-2's linear layer, whose weight stands transposed (in, out)."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf") and getattr(layer, "weight", None) is not None


def target_layers(model: nn.Module, targets: str | Sequence[str]) -> dict[str, nn.Module]:
    """Return linear layers of a model, by module path.

    model: any base model.
    targets: as PEFT matches them: path endings, or one regular expression; "all-linear" leaves the heads out.

    Raises LoraloomError with the nearest names where none matches.
    """
    layers = linear_layers(model)
    if targets == "all-linear":
        inside, head = set(backbone(model).modules()), _output_embeddings(model)
        return {name: layer for name, layer in layers.items() if layer in inside and layer is not head}
    found = {name: layers[name] for name in targeted(layers, targets)}
    if not found:
        wanted = [targets] if isinstance(targets, str) else list(targets)
        endings = {name.rsplit(".", 1)[-1] for name in layers}
        near = "; ".join(dict.fromkeys(did_you_mean(target, endings) for target in wanted))
        raise LoraloomError(f"target_modules {targets!r}: no linear layer of {model_name(model)} matches", near)
    return found


def backbone(model: nn.Module) -> nn.Module:
    """Return the model without its heads, or `model` itself where it has none."""
    inner = getattr(model, getattr(model, "base_model_prefix", ""), model)
    return inner if isinstance(inner, nn.Module) else model


def model_name(model: nn.Module) -> str:
    """Return the name by which files record `model`, as `public_name` gives it; of one without a name, its class."""
    name = str(getattr(model, "name_or_path", "") or "")
    return public_name(name) or type(model).__name__.removeprefix("FSDP")  # of fully_shard


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]


class LayerReader:
    """Runs a base model and hands over what its layers read, with the side of the batch that each input belongs to.

    `model` may be wrapped; where it is sharded the wrapper is run, for weights are whole inside its own calls alone.
    Without `headed` the model's head is run only where it is one of the layers.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], *, headed: bool = False) -> None:
        base, sharded = unwrapped(model), is_sharded(model)
        self.layers = dict(layers)
        self.encoder = _encoder(base)
        self._in_encoder = set(self.encoder.modules()) if self.encoder else set()
        # a head costs time (and much memory over a large vocabulary) and shows nothing
        inside = set(layers.values()) <= set(backbone(base).modules())
        headless = not headed and not sharded and self.encoder is None and inside
        inner = backbone(base) if headless else base
        self._entry = model if sharded else inner
        self._options = inspect.signature(inner.forward).parameters
        self._encoded: Callable[[], Tensor | None] = lambda: None

    def run(self, batch: Mapping[str, Any], see: Callable[[str, Tensor], None], names: Sequence[str]) -> Any:
        """Run `batch`; `see` is given the path and the input of the layers `names` at each of their calls.

        Return what the model returns.
        """
        given: dict[str, object] = {key: value for key, value in batch.items() if key in self._options}
        if self.encoder is None or token_labels(batch) is None or "decoder_input_ids" in batch:
            given.pop("labels", None)  # only a decoder's inputs are made of labels; a loss is of no use
        if "use_cache" in self._options:
            given["use_cache"] = False
        handles = [
            self.layers[name].register_forward_pre_hook(partial(_hand_over, see, name), with_kwargs=True)
            for name in names
        ]
        if self.encoder is not None:
            handles.append(self.encoder.register_forward_hook(self._keep_output))
        try:
            return self._entry(**given)
        finally:
            for handle in handles:
                handle.remove()

    def in_encoder(self, name: str, x: Tensor) -> bool:
        """Tell whether input `x` of layer `name` has the encoder's rows: cross-attention reads the encoder's output."""
        return self.encoder is None or self.layers[name] in self._in_encoder or x is self._encoded()

    def _keep_output(self, module: nn.Module, args: object, output: Tensor | Sequence[Tensor]) -> None:
        self._encoded = weakref.ref(output if isinstance(output, Tensor) else output[0])


def _hand_over(
    see: Callable[[str, Tensor], None],
    name: str,
    module: nn.Module,
    args: tuple[Tensor, ...],
    kwargs: dict[str, Tensor],
) -> None:
    see(name, args[0] if args else next(iter(kwargs.values())))


def _encoder(model: nn.Module) -> nn.Module | None:
    """Return the encoder where `model` has a decoder beside it, else None."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    encoder, decoder = model.get_encoder(), model.get_decoder()  # type: ignore[operator]
    return None if encoder in set(decoder.modules()) else encoder


def shared_inputs(reader: LayerReader, batch: Mapping[str, Tensor]) -> dict[str, str]:
    """Return for each layer the first one that reads the very same tensors, found by running one sample of `batch`.

    Raises LoraloomError naming the layers that the forward pass does not reach.
    """
    serials = itertools.count()
    seen: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # an id is taken again once its tensor is gone
    reads: dict[str, list[int]] = {}

    def see(name: str, x: Tensor) -> None:
        known = seen.get(id(x))
        if known is None or known[0]() is not x:
            known = seen[id(x)] = (weakref.ref(x), next(serials))
        reads.setdefault(name, []).append(known[1])

    samples = max(value.shape[0] for value in batch.values() if value.ndim)
    one = {key: value[:1] if value.ndim and value.shape[0] == samples else value for key, value in batch.items()}
    reader.run(one, see, list(reader.layers))
    unreached = [name for name in reader.layers if name not in reads]
    if unreached:
        raise LoraloomError(
            f"the forward pass does not call {', '.join(unreached)}", "leave these out of target_modules"
        )
    leaders: dict[tuple[int, ...], str] = {}
    return {name: leaders.setdefault(tuple(numbers), name) for name, numbers in reads.items()}
