"""Task heads beside a merged adapter: kept, never averaged; aligned to the merged features in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from loraloom.adapters.peft import files_by_task, read_adapter
from loraloom.errors import LoraloomError, raise_problems, reads_file
from loraloom.files.tensors import all_finite, read_tensors


@dataclass(frozen=True)
class Head:
    """A task's head: parameters by path in the model, and the path of its last linear layer."""

    tensors: dict[str, Tensor]
    last: str

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], name: str = "head") -> Head:
        """Return the head in `tensors`, as PEFT saves `modules_to_save`.

        Raises LoraloomError where there is no weight matrix, a bias that does not fit, or a value that is not finite.
        """
        spoilt = [path for path, tensor in tensors.items() if not all_finite(tensor)]
        raise_problems(name, [f"{path} holds values that are not finite" for path in spoilt], "train the head again")
        matrices = [path for path, tensor in tensors.items() if path.endswith(".weight") and tensor.ndim == 2]
        if not matrices:
            raise LoraloomError(
                f"{name}: the adapter brings no head", "train it with its classifier in modules_to_save"
            )
        # where a head has two layers (RoBERTa, T5, DistilBERT) the last is the one with as many rows as labels
        last = min(matrices, key=lambda path: (tensors[path].shape[0], not path.endswith("out_proj.weight")))
        head = cls({path: tensor.float() for path, tensor in tensors.items()}, last.removesuffix(".weight"))
        if head.bias.shape != head.weight.shape[:1]:
            shapes = f"{tuple(head.bias.shape)}, its weight {tuple(head.weight.shape)}"
            raise LoraloomError(f"{name}: the bias of {head.last} is {shapes}", "is it a head of this model?")
        return head

    @property
    def weight(self) -> Tensor:
        """Return the last layer's weight, (outputs, d)."""
        return self.tensors[f"{self.last}.weight"]

    @property
    def bias(self) -> Tensor:
        """Return the last layer's bias, (outputs,); zeros where it has none."""
        return self.tensors.get(f"{self.last}.bias", torch.zeros(self.weight.shape[0]))

    def logits(self, features: Tensor) -> Tensor:
        """Return (k, outputs) for `features` (k, d), the inputs of the last layer."""
        return features @ self.weight.T + self.bias


class TaskHead(NamedTuple):
    """A head and the name of the task that it is for."""

    task: str
    head: Head


@reads_file
def heads_by_task(folder: str | Path) -> dict[str, TaskHead]:
    """Return the heads beside a merged adapter, or the one inside a task's own, by task.

    folder: of the adapter.

    Where several inputs of a merge share a task, each goes by its own name. Raises LoraloomError that names the folder
    or file which cannot be read or holds no head.
    """
    beside = files_by_task(Path(folder), "heads")
    found = {key: TaskHead(task, Head.of(read_tensors(path), str(path))) for key, (task, path) in beside.items()}
    adapter = read_adapter(folder)
    if adapter.head:
        found[adapter.task] = TaskHead(adapter.task, Head.of(adapter.head, adapter.name))
    return found


def align_head(head: Head, own: Tensor, merged: Tensor, *, ridge: float = 1.0) -> Head:
    """Return the head with the map from merged to own features folded into its last layer, without labels.

    head: as trained, (outputs, d) in its last layer.
    own, merged: (k, d) features of the same unlabelled rows, from the task's own adapter and from the merged one.
    ridge: e below, as a share.

    With centred features, C = Fm^T Fm and e = `ridge` times the mean diagonal of C: W = (C + e I)^-1 (Fm^T Fo + e I),
    a ridge fit towards the identity; the difference of the means goes into the bias. No cost at inference. On 25 to 400
    rows of GLUE tasks a `ridge` near 1 has the least leave-one-out error. After "representation surgery" (arXiv
    2402.02705), which learns such a map by gradient.

    Raises LoraloomError where the two do not hold the same rows or are not what the head reads.
    """
    if own.shape != merged.shape:
        raise LoraloomError(f"features of {tuple(own.shape)} and {tuple(merged.shape)} are not of the same rows")
    if own.shape[1] != head.weight.shape[1]:
        raise LoraloomError(f"{head.last} reads {head.weight.shape[1]} features, {own.shape[1]} were given")
    own, merged = own.double(), merged.double()
    own_mean, merged_mean = own.mean(dim=0), merged.mean(dim=0)
    Fo, Fm = own - own_mean, merged - merged_mean
    C = Fm.T @ Fm
    e = ridge * C.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    identity = torch.eye(C.shape[0], dtype=C.dtype)
    W = torch.linalg.solve(C + e * identity, Fm.T @ Fo + e * identity)
    weight, bias = head.weight.double(), head.bias.double()
    tensors = {
        **head.tensors,
        f"{head.last}.weight": (weight @ W.T).float(),
        f"{head.last}.bias": (bias + weight @ (own_mean - W.T @ merged_mean)).float(),
    }
    return replace(head, tensors=tensors)


def align_heads(
    heads: Mapping[str, Head], own: Mapping[str, Tensor], merged: Mapping[str, Tensor], *, ridge: float = 1.0
) -> dict[str, Head]:
    """Return every task's head aligned, by task: see `align_head`.

    heads: as trained.
    own, merged: (k, d) float32 features of the same texts from each task's own adapter and from the merged one, by
      task, as `Evaluator.features` gives them.
    ridge: e as a share of the mean diagonal of C.
    """
    return {task: align_head(head, own[task], merged[task], ridge=ridge) for task, head in heads.items()}
