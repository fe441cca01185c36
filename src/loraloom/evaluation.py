"""Metrics of adapters on tasks: one base model in memory, updates and heads switched in and out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from loraloom.adapter import Update
from loraloom.base import load_classifier, load_tokenizer
from loraloom.errors import LoraloomError, did_you_mean
from loraloom.heads import Head
from loraloom.metrics import score
from loraloom.results import Score
from loraloom.tasks.encoding import Encoded, batches, encode
from loraloom.tasks.task import Task


class Evaluator:
    """One base model that answers for any adapter and any head.

    Logits are the head's last linear layer on its inputs, the features. So one forward pass gives the metric with the
    head as trained and with any head aligned later.
    """

    def __init__(self, base: str, *, max_length: int = 128, batch_size: int = 64) -> None:
        self.base = base
        self.max_length = max_length
        self.batch_size = batch_size
        self.tokenizer = load_tokenizer(base)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model: nn.Module = load_classifier(base, outputs=2)
        self.model = model.to(device).eval()

    def encode(self, task: Task, split: str) -> Encoded:
        """Return the token ids of one split, for `features`."""
        return encode(getattr(task, split), self.tokenizer, self.max_length)

    def features(self, updates: Mapping[str, Update], head: Head, encoded: Encoded) -> Tensor:
        """Return (k, d) float32: what the head's last linear layer reads for every row, with `updates` in the model.

        Raises LoraloomError where an update or the head does not fit the base model.
        """
        rows: list[Tensor] = [torch.empty(0)] * len(encoded)
        device = next(self.model.parameters()).device
        self._load_head(head)
        with torch.inference_mode(), switched_in(self.model, updates), _inputs_of(self._module(head.last)) as seen:
            for chosen, batch in batches(encoded, self.tokenizer, self.batch_size):
                batch = {name: tensor.to(device) for name, tensor in batch.items()}
                self.model(**batch)
                pooled = _pooled(seen.pop(), batch["attention_mask"]).float().cpu()
                for index, feature in zip(chosen, pooled, strict=True):
                    rows[index] = feature
        return torch.stack(rows)

    @torch.no_grad()
    def _load_head(self, head: Head) -> None:
        """Copy the head's layers before its last: the last is applied outside the model."""
        parameters = dict(self.model.named_parameters())
        for path, tensor in head.tensors.items():
            if path.startswith(f"{head.last}."):
                continue
            if path not in parameters:
                raise LoraloomError(f"{self.base}: the model has no {path} for this head", "use the adapter's own base")
            parameters[path].copy_(tensor)

    def _module(self, path: str) -> nn.Module:
        return _submodule(self.model, path, self.base)


def evaluate(
    evaluator: Evaluator, updates: Mapping[str, Update], head: Head, task: Task, *, split: str = "test"
) -> Score:
    """Return the task's metric on one split with `updates` in the base model and `head` on top."""
    features = evaluator.features(updates, head, evaluator.encode(task, split))
    return score(task.metric, head.logits(features), labels(task, split))


def labels(task: Task, split: str) -> Tensor:
    """Return the labels of one split: (k,) int64, or float32 for regression."""
    return torch.tensor(getattr(task, split)["label"], dtype=torch.int64 if task.labels else torch.float32)


@contextmanager
def switched_in(model: nn.Module, updates: Mapping[str, Update]) -> Iterator[None]:
    """Add every update's B A x to its layer's output while the context lasts; the base weights stay untouched.

    Works on any linear layer, GPT-2's Conv1D and quantised ones included.
    """
    handles = []
    try:
        for path, update in updates.items():
            layer = _submodule(model, path, "base model")
            handles.append(layer.register_forward_hook(_adding(update)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(update: Update) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    moved: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        place = (output.device, output.dtype)
        if place not in moved:
            moved[place] = (update.A.T.to(*place), update.B.T.to(*place))
        A, B = moved[place]
        return output + (inputs[0].to(A.dtype) @ A) @ B

    return hook


@contextmanager
def _inputs_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()


def _pooled(inputs: Tensor, mask: Tensor) -> Tensor:
    """Return (b, d): decoders feed every position to the head and count the last token that is not padding."""
    if inputs.ndim == 2:
        return inputs
    last = (torch.arange(mask.shape[1], device=mask.device) * mask).argmax(dim=-1)
    return inputs[torch.arange(len(last), device=inputs.device), last]


def _submodule(model: nn.Module, path: str, base: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        near = did_you_mean(path, [name for name, _ in model.named_modules()])
        raise LoraloomError(f"{base}: has no layer {path}", f"use the adapter's own base model; {near}") from error
