"""A task: rows with a text or a pair of texts and a label, a metric, and three splits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from pydantic import Field
from torch import Tensor

from loraloom.errors import LoraloomError
from loraloom.files.atomic import staged_folder
from loraloom.settings import Settings
from loraloom.tasks.answers import AnswerMetric
from loraloom.tasks.classify import Classify, ClassMetric
from loraloom.tasks.generate import Generate
from loraloom.tasks.regress import NumberMetric, Regress

Metric = Literal[ClassMetric, NumberMetric, AnswerMetric]
TaskKind = Classify | Regress | Generate
SPLITS = ("train", "heldout", "test")
_DROPPED = {
    "empty": "without text",
    "long": "with longer texts",
    "overlap": "also in test",
    "repeats": "also in held-out",
}  # of Task.source


class TaskOptions(Settings):
    """What a task of any source takes in a recipe."""

    train_rows: int | None = Field(None, ge=2, description="so many, drawn at random; all without")
    heldout_rows: int = Field(200, ge=2, description="cut from the training rows")
    test_rows: int | None = Field(None, ge=2)
    epochs: int | None = Field(None, ge=1, description="in place of training.epochs")

    def generates(self, name: str) -> bool:
        """Tell whether the answers of the task of this name are written, not given by a head."""
        return False


@dataclass(frozen=True)
class Task:
    """Rows, label names and metric of one task.

    Each split is a Dataset with the columns `text_a` (str), optionally `text_b` (str), and `label`: an index into
    `labels`, or a float where `labels` is None (regression). Where a task is `answering`, `text_a` is the prompt and
    `label` the answer, a str, and `history`, a list of {role, content}, what stands before the prompt in a chat, or
    None for a prompt alone; it is absent where no chat template is to be used. `heldout` is cut from the training rows:
    it picks checkpoints and scales; `test` is only ever reported. `also` names metrics of answers beside the first.
    """

    name: str
    labels: tuple[str, ...] | None
    metric: Metric
    train: datasets.Dataset
    heldout: datasets.Dataset
    test: datasets.Dataset
    description: str = ""
    source: dict[str, Any] = field(default_factory=dict)
    also: tuple[AnswerMetric, ...] = ()
    answering: Generate | None = None

    @property
    def kind(self) -> TaskKind:
        """Return what training and measuring need to know of this kind of task."""
        return self.answering or self.headed

    @property
    def headed(self) -> Classify | Regress:
        """Return the kind of a task with a head. Raises LoraloomError for a task of answers, which has none."""
        if self.answering:
            raise LoraloomError(
                f"task {self.name!r}: its answers are written, not read off a head", "see docs/generation.md"
            )
        return Classify(self.labels) if self.labels else Regress()

    @property
    def outputs(self) -> int:
        """Return the width of the task's head."""
        return self.headed.outputs

    def label_tensor(self, rows: datasets.Dataset) -> Tensor:
        """Return the labels of some rows of the task: (k,) int64, or float32 for regression."""
        return torch.tensor(rows["label"], dtype=self.headed.dtype)

    @property
    def dropped(self) -> dict[str, int]:
        """Return how many rows of the sources were left out, by why."""
        counts = {why: self.source.get(key, 0) for key, why in _DROPPED.items()}
        return {why: count for why, count in counts.items() if count}

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Return the names of the text columns, in order."""
        return tuple(column for column in ("text_a", "text_b") if column in self.train.column_names)

    def sample(self, split: str, count: int) -> datasets.Dataset:
        """Return `count` rows of a split, or all where there are fewer, the same at every call."""
        rows: datasets.Dataset = getattr(self, split)
        return rows.shuffle(seed=0).select(range(min(count, len(rows))))

    def digest(self) -> str:
        """Return the sha256 of name, labels, metric and every row of every split."""
        facts: list[Any] = [self.name, self.labels, self.metric]
        if self.answering:
            facts += [self.also, asdict(self.answering)]
        sha = hashlib.sha256(json.dumps(facts).encode())
        for split in SPLITS:
            for row in getattr(self, split):
                sha.update(json.dumps([split, row], sort_keys=True, ensure_ascii=False).encode())
        return sha.hexdigest()

    def save(self, folder: Path, *, overwrite: bool = False) -> None:
        """Write the splits as JSONL and meta.json beside them, readable by `load` and by a person.

        With `overwrite` an earlier task's folder is replaced.
        """
        with staged_folder(folder, kind="task", overwrite=overwrite) as staged:
            for split in SPLITS:
                lines = (json.dumps(row, ensure_ascii=False) for row in getattr(self, split))
                (staged / f"{split}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
            meta = {
                "name": self.name,
                "labels": self.labels,
                "metric": self.metric,
                **({"also": self.also, "answering": asdict(self.answering)} if self.answering else {}),
                "description": self.description,
                "source": self.source,
                "sha256": self.digest(),
            }
            (staged / "meta.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Task:
        """Read a task written by `save`. Raises LoraloomError where a file is missing or was changed."""
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            task = cls(
                name=meta["name"],
                labels=tuple(meta["labels"]) if meta["labels"] else None,
                metric=meta["metric"],
                also=tuple(meta.get("also", ())),
                answering=Generate(**meta["answering"]) if meta.get("answering") else None,
                description=meta["description"],
                source=meta["source"],
                **{split: _read_jsonl(folder / f"{split}.jsonl") for split in SPLITS},
            )
            sha256 = meta["sha256"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise LoraloomError(f"{folder}: not a task folder: {error}", "make it again with `loraloom run`") from error
        if task.digest() != sha256:
            raise LoraloomError(f"{folder}: rows differ from the sha256 in meta.json", "make the task again")
        return task


def answer_tokens_of(tasks: Mapping[str, Task]) -> int:
    """Return the most tokens that any task lets a model write; 1 where none are written."""
    return max((task.answering.answer_tokens for task in tasks.values() if task.answering), default=1)


def _read_jsonl(path: Path) -> datasets.Dataset:
    # Lines of the file, not splitlines(): a text may hold U+2028, which JSON leaves as it is.
    with open(path, encoding="utf-8") as file:
        return datasets.Dataset.from_list([json.loads(line) for line in file])
