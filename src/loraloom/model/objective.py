"""What training an adapter hangs on by the kind of its task: model, head, rows, padding, and what picks checkpoints."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import TaskType
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedModel

from loraloom.adapters.heads import Head
from loraloom.model.load import context_of, head_modules, is_two_sided, load_classifier, load_generator, load_tokenizer
from loraloom.model.prompts import encode_prompts
from loraloom.model.tokens import IGNORED, encode
from loraloom.tasks.metrics import metric_value
from loraloom.tasks.task import Task


@dataclass(frozen=True)
class Objective:
    """How adapters of one task are trained.

    model: the base, with a fresh head where the task has one. head: the modules of it that are the task's own.
    task_type: PEFT's. rows: encodes a split. collator: pads a batch. compute: of held-out logits, the `best` metric;
    None where the loss is enough. metric: by which the best checkpoint is told; `greater` is better or worse.
    """

    model: PreTrainedModel
    head: list[str]
    task_type: TaskType
    rows: Callable[[Dataset], Dataset]
    collator: Any
    compute: Callable[[Any], dict[str, float]] | None
    metric: str
    greater: bool


def objective(base: str, task: Task, max_length: int, seed: int) -> Objective:
    """Return how adapters of `task` are trained on `base`; a fresh head is drawn from `seed`.

    Raises LoraloomError for a base that cannot do what the task asks for.
    """
    return _writing(base, max_length) if task.kind.generates else _with_head(base, task, max_length, seed)


def task_type(base: str, *, generates: bool) -> TaskType:
    """Return PEFT's name for what adapters on `base` do. Raises LoraloomError for a base that writes no text."""
    if not generates:
        return TaskType.SEQ_CLS
    return TaskType.SEQ_2_SEQ_LM if is_two_sided(base) else TaskType.CAUSAL_LM


def _writing(base: str, max_length: int) -> Objective:
    model, tokenizer, two_sided = load_generator(base), load_tokenizer(base), is_two_sided(base)

    def rows(split: Dataset) -> Dataset:
        asked = encode_prompts(split, tokenizer, max_length, two_sided=two_sided, context=context_of(model.config))
        return Dataset.from_list([one.row(two_sided=two_sided) for one in asked])

    return Objective(
        model=model,
        head=[],
        task_type=task_type(base, generates=True),
        rows=rows,
        collator=DataCollatorForSeq2Seq(tokenizer, model=model) if two_sided else _AtTheEnd(model, tokenizer),
        compute=None,
        metric="loss",
        greater=False,
    )


class _AtTheEnd:
    """Pads a decoder's rows on the left: answers then stand at the right end, and no other logits are computed.

    A prompt's logits are most of a batch, and with a large vocabulary most of the memory of training.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        tokenizer.padding_side = "left"
        self.pad = DataCollatorForSeq2Seq(tokenizer)
        self.takes = inspect.signature(model.forward).parameters

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = dict(self.pad(rows))
        if "position_ids" in self.takes:
            batch["position_ids"] = (batch["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)
        if "logits_to_keep" in self.takes:
            # the logits before an answer's first token say it
            kept = int((batch["labels"] != IGNORED).sum(dim=1).max()) + 1
            batch |= {"labels": batch["labels"][:, -kept:], "logits_to_keep": kept}
        return batch


def _with_head(base: str, task: Task, max_length: int, seed: int) -> Objective:
    kind, tokenizer = task.headed, load_tokenizer(base)

    def rows(split: Dataset) -> Dataset:
        encoded = encode(split, tokenizer, max_length)
        labels = task.label_tensor(split).tolist()
        return Dataset.from_list([{**row, "labels": label} for row, label in zip(encoded, labels, strict=True)])

    def compute(prediction: Any) -> dict[str, float]:
        logits, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
        return {"score": metric_value(task.metric, logits, labels)}

    model = load_classifier(base, task.outputs, regression=kind.regression, seed=seed)
    bias = kind.head_bias(task.train["label"])
    if bias is not None:
        _set_head_bias(model, bias)
    return Objective(
        model=model,
        head=head_modules(model),
        task_type=TaskType.SEQ_CLS,
        rows=rows,
        collator=DataCollatorWithPadding(tokenizer),
        compute=compute,
        metric="score",
        greater=True,
    )


def _set_head_bias(model: PreTrainedModel, value: float) -> None:
    """Let the last layer of a fresh head start with this bias, where it has one."""
    parameters = dict(model.named_parameters())
    head = {path: p for path, p in parameters.items() if path.startswith(tuple(f"{n}." for n in head_modules(model)))}
    bias = f"{Head.of(head).last}.bias"
    if bias in head:
        torch.nn.init.constant_(head[bias], value)
