"""Metrics of adapters on tasks: one base model in memory, updates and heads switched in and out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from datasets import Dataset
from torch import Tensor, nn

from loraloom.adapters.heads import Head
from loraloom.adapters.update import Update
from loraloom.errors import LoraloomError, did_you_mean, raise_problems
from loraloom.model.layers import LayerReader, layer_shape
from loraloom.model.load import load_backbone, load_tokenizer
from loraloom.model.tokens import Encoded, batch_sides, batches, encode
from loraloom.results import Score
from loraloom.settings import Precision
from loraloom.tasks.metrics import score
from loraloom.tasks.task import Task

_SUMMED = 2 << 30  # bytes of weights with their updates in them, beside those without


class Evaluator:
    """One base model that answers for any adapter and any head.

    Logits are the head's last linear layer on its inputs, the features. So one forward pass gives the metric with the
    head as trained and with any head aligned later. The model itself stays as it was loaded.
    """

    def __init__(self, base: str, *, max_length: int = 128, batch_size: int = 64) -> None:
        self.base = base
        self.max_length = max_length
        self.batch_size = batch_size
        self.tokenizer = load_tokenizer(base)
        self.model = load_backbone(base).to(device()).eval().requires_grad_(False)

    def encode(self, rows: Dataset) -> Encoded:
        """Return the token ids of the texts in `rows`, a split of a task or a sample of one, for `features`."""
        return encode(rows, self.tokenizer, self.max_length)

    def features(
        self, updates: Mapping[str, Update], head: Head, encoded: Encoded, *, batch_size: int | None = None
    ) -> Tensor:
        """Return (k, d) float32: what the head's last linear layer reads for every row, with `updates` in the model.

        batch_size: in place of the evaluator's own.

        Raises LoraloomError where an update or the head does not fit the base model.
        """
        rows: list[Tensor] = [torch.empty(0)] * len(encoded)
        with torch.inference_mode(), self.running(updates, head) as run:
            for chosen, batch in batches(encoded, self.tokenizer, batch_size or self.batch_size):
                for index, feature in zip(chosen, run(batch), strict=True):
                    rows[index] = feature
        return torch.stack(rows)

    @contextmanager
    def running(
        self, updates: Mapping[str, Update], head: Head, see: Callable[[str, Tensor], None] | None = None
    ) -> Iterator[ForwardPass]:
        """Yield f(batch) -> (k, d) float32 on the CPU: the `features` of one padded batch, differentiable in `updates`.

        `see(path, rows)` is given what every updated layer reads, in the order in which the layers run: (tokens, n)
        float32 on the CPU, padding left out, differentiable too. Raises LoraloomError as `features` does.
        """
        last = self._check_head(head)
        before_last = {path: tensor for path, tensor in head.tensors.items() if not path.startswith(f"{head.last}.")}
        with replaced(self.model, before_last), switched_in(self.model, updates):
            watched = {path: _submodule(self.model, path, self.base) for path in updates} if see else {}
            reader = LayerReader(self.model, {**watched, head.last: last})
            yield ForwardPass(reader, head.last, self.tokenizer.pad_token_id, see)

    def _check_head(self, head: Head) -> nn.Module:
        """Return the model's layer in the place of the head's last. Raises LoraloomError where the two do not fit."""
        parameters = dict(self.model.named_parameters())
        problems = []
        for path, tensor in head.tensors.items():
            if path.startswith(f"{head.last}."):  # applied outside the model, so it may have any number of outputs
                continue
            if path not in parameters:
                problems.append(f"the model has no {path}")
            elif parameters[path].shape != tensor.shape:
                problems.append(f"{path} is {tuple(tensor.shape)}, the model's is {tuple(parameters[path].shape)}")
        last = _submodule(self.model, head.last, self.base)
        width, reads = layer_shape(last)[0], head.weight.shape[1]
        if width != reads:
            problems.append(f"{head.last} reads {reads} features, the model's reads {width}")
        raise_problems(f"{self.base}: this head does not fit", problems, "use the adapter's own base model")
        return last


class ForwardPass:
    """The features of one batch after another, as `Evaluator.running` sets the model up for them."""

    def __init__(
        self, reader: LayerReader, last: str, pad: int, see: Callable[[str, Tensor], None] | None = None
    ) -> None:
        self._reader, self._last, self._pad, self._see = reader, last, pad, see

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return (k, d) float32 on the CPU: what the head's last layer reads of each row."""
        batch = {name: tensor.to(device()) for name, tensor in batch.items()}
        two_sided = self._reader.encoder is not None
        self._sides = batch_sides(batch, two_sided=two_sided, pad=self._pad)
        self._reader.run(batch, self._hand_over, list(self._reader.layers))
        return _pooled(self._read_by_head, batch["input_ids"] != self._pad).float().cpu()

    def _hand_over(self, path: str, x: Tensor) -> None:
        """Keep what the head reads; show what an updated layer reads."""
        if path == self._last:
            self._read_by_head = x
        elif self._see is not None:
            encoder, decoder = self._sides
            side = encoder if self._reader.in_encoder(path, x) else decoder
            self._see(path, side.rows(x, "token").cpu())


def evaluate(
    evaluator: Evaluator, updates: Mapping[str, Update], head: Head, task: Task, *, split: str = "test"
) -> Score:
    """Return the task's metric on one split with `updates` in the base model and `head` on top.

    evaluator: the base model.
    updates: dW = B A by module path; a module without one stays as the base has it.
    head: as trained, or aligned.
    split: test, heldout or train.

    Raises LoraloomError where an update or the head does not fit the base model.
    """
    features = evaluator.features(updates, head, evaluator.encode(getattr(task, split)))
    return scored(task, split, head, features)


def scored(task: Task, split: str, head: Head, features: Tensor) -> Score:
    """Return the task's metric, with its standard error, where `head` reads `features` of the rows of one split.

    task: whose metric and labels they are.
    split: "train", "heldout" or "test".
    head: as trained, or aligned.
    features: (k, d) float32, one row a row of the split, as `Evaluator.features` gives them.
    """
    return score(task.metric, head.logits(features), labels(task, split))


def labels(task: Task, split: str) -> Tensor:
    """Return the labels of one split: (k,) int64, or float32 for regression.

    task: of classes or numbers.
    split: "train", "heldout" or "test".
    """
    return task.label_tensor(getattr(task, split))


def device() -> str:
    """Return where base models run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def in_bfloat16(precision: Precision) -> bool:
    """Tell whether `precision` is bfloat16 on this machine."""
    return precision == "bfloat16" or (
        precision == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    )


@contextmanager
def replaced(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Have `tensors`, by path, in place of the model's own parameters while the context lasts.

    The parameters change places rather than values, so gradients through `tensors` may be taken after it too.
    """
    own = {path: model.get_parameter(path) for path in tensors}
    try:
        for path, tensor in tensors.items():
            _set_parameter(model, path, nn.Parameter(tensor.to(own[path]), requires_grad=False))
        yield
    finally:
        for path, parameter in own.items():
            _set_parameter(model, path, parameter)


def _set_parameter(model: nn.Module, path: str, parameter: nn.Parameter) -> None:
    module, _, name = path.rpartition(".")
    setattr(model.get_submodule(module), name, parameter)


@contextmanager
def switched_in(model: nn.Module, updates: Mapping[str, Update]) -> Iterator[None]:
    """Have every update's B A x added to what its layer makes of x while the context lasts.

    Where no gradients are taken, float32 weights give place to W + B A for that time, 2 GiB of them at most: then an
    update costs nothing more, whatever its rank. All others are added to the output: with gradients, in bfloat16, whose
    weights would round most of an update off, and to quantised layers. Either way the model is as it was after that.
    """
    layers = {path: _fitting(model, path, update) for path, update in updates.items()}
    summed: dict[str, Tensor] = {}
    room = 0 if torch.is_grad_enabled() else _SUMMED
    for path, layer in layers.items():
        if _takes_sums(layer) and (room := room - 4 * layer.weight.numel()) >= 0:  # type: ignore[operator]
            summed[path] = _sum(layer, updates[path])
    handles = []
    with replaced(model, {f"{path}.weight": weight for path, weight in summed.items()}):
        try:
            for path, layer in layers.items():
                if path not in summed:
                    handles.append(layer.register_forward_hook(_adding(updates[path])))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _fitting(model: nn.Module, path: str, update: Update) -> nn.Module:
    """Return the layer of an update. Raises LoraloomError where there is none, or one of another shape."""
    layer = _submodule(model, path, "base model")
    shape, given = layer_shape(layer), (update.A.shape[1], update.B.shape[0])
    if shape != given:
        raise LoraloomError(
            f"{path}: the update is {given[1]} x {given[0]}, the base model's layer {shape[1]} x {shape[0]}",
            "use the adapter's own base model",
        )
    return layer


def _takes_sums(layer: nn.Module) -> bool:
    """Tell whether a layer multiplies by a plain float32 weight of its own, and nothing else."""
    weight = layer.weight
    plain = type(layer) is nn.Linear or type(layer).__name__ == "Conv1D"
    return plain and type(weight) is nn.Parameter and weight.dtype == torch.float32 and not weight.is_meta


def _sum(layer: nn.Module, update: Update) -> Tensor:
    """Return W + B A, as the layer stores it."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    A, B = update.A.detach().to(weight), update.B.detach().to(weight)
    return torch.addmm(weight, B, A) if isinstance(layer, nn.Linear) else torch.addmm(weight, A.T, B.T)


def _adding(update: Update) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    moved: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        place = (output.device, output.dtype)
        if place not in moved:
            moved[place] = (update.A.T.to(*place), update.B.T.to(*place))
        A, B = moved[place]
        low = inputs[0].to(A.dtype).flatten(0, -2) @ A
        return torch.addmm(output.flatten(0, -2), low, B).view(output.shape)  # in bfloat16 it rounds once

    return hook


def _pooled(inputs: Tensor, kept: Tensor) -> Tensor:
    """Return (b, d): decoders feed every position to the head and count the last that is `kept` (not padding)."""
    if inputs.ndim == 2:
        return inputs
    last = (torch.arange(kept.shape[1], device=kept.device) * kept).argmax(dim=-1)
    return inputs[torch.arange(len(last), device=inputs.device), last]


def _submodule(model: nn.Module, path: str, base: str) -> nn.Module:
    try:
        layer = model.get_submodule(path)  # at once: this is asked of every layer at every pass
    except AttributeError:
        layer = None
    if layer is not None and hasattr(layer, "weight"):
        return layer
    layers = [name for name, module in model.named_modules() if hasattr(module, "weight")]
    raise LoraloomError(f"{base}: has no layer {path}", f"use the adapter's base model; {did_you_mean(path, layers)}")
