"""The stages that evaluate tasks of answers, by the loss of the right answer and by what a model writes.

Held-out rows are measured by the loss alone, which is far less noisy than whether an answer is right, and needs no
writing; test rows by every metric.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraloom.adapters.peft import read_adapter
from loraloom.adapters.update import Update
from loraloom.files.hashing import task_seed, write_json
from loraloom.model.generator import answer_task
from loraloom.results import Answers, Score
from loraloom.study.engine import Context, Reading, stage
from loraloom.study.inputs import Base, Output, Rows
from loraloom.study.stages import ADAPTER, RESAMPLES, SCORES, merged_adapters
from loraloom.tasks.answers import answer_resampled
from loraloom.tasks.generate import Generate
from loraloom.tasks.metrics import resampled_rows
from loraloom.tasks.task import Task

LOSSES, ANSWERS, TRANSCRIPT = "losses.safetensors", "answers.jsonl", "transcript.json"
TRANSCRIBED = 3  # prompts a task


@stage("base", version=1)
def evaluate_base(folder: Path, context: Context, *, rows: Rows, base: Base, reading: Reading) -> None:
    """Evaluate the base model alone on a task's test rows; keep its losses on held-out ones too."""
    _write_alone(folder, context, {}, rows, base, reading)


@stage("single", version=1)
def evaluate_single(
    folder: Path, context: Context, *, adapter: Output, rows: Rows, base: Base, reading: Reading
) -> None:
    """Evaluate a task's own adapter on its test rows; keep its losses on held-out ones too."""
    _write_alone(folder, context, read_adapter(adapter.path / ADAPTER).updates, rows, base, reading)


def alone_score(output: Output) -> Score:
    """Read the score on test rows that `evaluate_base` or `evaluate_single` wrote."""
    return Score(**_read(output)["test"])


@stage("heldout", version=1)
def evaluate_heldout(
    folder: Path,
    context: Context,
    *,
    merged: Output,
    bases: Mapping[str, Output],
    singles: Mapping[str, Output],
    rows: Mapping[str, Rows],
    base: Base,
    reading: Reading,
    scale: float,
) -> None:
    """Measure how much of each single adapter's gain in loss a merged adapter keeps on held-out rows."""
    generator = context.generator(base, reading)
    scores = {}
    for name, adapter in merged_adapters(merged.path / ADAPTER, scale, rows).items():
        losses = generator.losses(adapter.updates, generator.encode(rows[name].task.heldout))
        scores[name] = _recovered(name, bases[name], singles[name], losses, "heldout").model_dump()
    write_json(folder / SCORES, {"recovered": scores})


@stage("test", version=1)
def evaluate_test(
    folder: Path,
    context: Context,
    *,
    merged: Output,
    bases: Mapping[str, Output],
    singles: Mapping[str, Output],
    rows: Mapping[str, Rows],
    base: Base,
    reading: Reading,
    scale: float,
) -> None:
    """Evaluate a merged adapter on test rows by every metric; keep its answers."""
    generator, found = context.generator(base, reading), {}
    for name, adapter in merged_adapters(merged.path / ADAPTER, scale, rows).items():
        found[name] = answer_task(generator, adapter.updates, rows[name].task, rows[name].task.test)
        write_answers(folder / f"{name}.{ANSWERS}", rows[name].task.test, found[name].answers)
    recovered = {
        name: _recovered(name, bases[name], singles[name], one.losses, "test").model_dump()
        for name, one in found.items()
    }
    scores = {name: one.score.model_dump() for name, one in found.items()}
    write_json(folder / SCORES, {"as_trained": scores, "recovered": recovered})
    resamples = np.mean([_resampled(rows[name], one.answers) for name, one in found.items()], axis=0)
    write_json(folder / RESAMPLES, {"as_trained": [float(value) for value in resamples]})


@stage("transcript", version=1)
def transcribe(
    folder: Path,
    context: Context,
    *,
    merged: Output,
    adapters: Mapping[str, Output],
    rows: Mapping[str, Rows],
    base: Base,
    reading: Reading,
    scale: float,
) -> None:
    """Have the base model, every adapter alone and a merged one answer a few test prompts of every task."""
    generator = context.generator(base, reading)
    alone = {name: read_adapter(output.path / ADAPTER).updates for name, output in adapters.items()}
    found: list[Answers] = []
    for name, together in merged_adapters(merged.path / ADAPTER, scale, rows).items():
        task = rows[name].task
        shown = task.sample("test", TRANSCRIBED)
        encoded, tokens = generator.encode(shown), _kind(task).answer_tokens
        before, after = (generator.answers(updates, encoded, tokens) for updates in ({}, together.updates))
        singles = {one: generator.answers(updates, encoded, tokens) for one, updates in alone.items()}
        found += [
            Answers(
                task=name,
                prompt=row["text_a"],
                expected=row["label"],
                base=before[at],
                singles={one: written[at] for one, written in singles.items()},
                merged=after[at],
            )
            for at, row in enumerate(shown)
        ]
    write_json(folder / TRANSCRIPT, [one.model_dump() for one in found])


def read_transcript(output: Output) -> list[Answers]:
    """Read what `transcribe` wrote."""
    return [Answers(**one) for one in json.loads((output.path / TRANSCRIPT).read_text(encoding="utf-8"))]


def read_recovered(output: Output) -> dict[str, Score]:
    """Read the recovered loss by task that an evaluation of a merged adapter wrote."""
    return {name: Score(**value) for name, value in _read(output)["recovered"].items()}


def recovered(base: Tensor, single: Tensor, merged: Tensor, seed: int) -> Score:
    """Return (loss of base - loss of merged) / (loss of base - loss of single), with its error over rows.

    base, single, merged: (k, 2) float64, nats and tokens of the same right answers, as `Generator.losses` gives them.
    seed: of the resamples of rows from which the error is taken.

    Where the single adapter gained nothing there is nothing to recover, and the value is 0.
    """
    nats = np.stack([one[:, 0].numpy() for one in (base, single, merged)])
    drawn = resampled_rows(nats.shape[1], seed)
    return Score(
        value=float(_share(nats.sum(axis=1))), stderr=float(np.std(_share(nats[:, drawn].sum(axis=2)), ddof=1))
    )


def _share(nats: NDArray[Any]) -> NDArray[Any]:
    """Return the share for sums (3, ...) of base, single and merged; the tokens are the same and cancel."""
    gain = nats[0] - nats[1]
    return np.asarray(np.where(gain > 0, (nats[0] - nats[2]) / np.where(gain > 0, gain, 1.0), 0.0))


def _recovered(name: str, base: Output, single: Output, losses: Tensor, split: str) -> Score:
    before, own = (load_file(output.path / LOSSES)[split] for output in (base, single))
    return recovered(before, own, losses, seed=task_seed(0, name))


def _write_alone(
    folder: Path, context: Context, updates: Mapping[str, Update], rows: Rows, base: Base, reading: Reading
) -> None:
    generator, task = context.generator(base, reading), rows.task
    test = answer_task(generator, updates, task, task.test)
    heldout = generator.losses(updates, generator.encode(task.heldout))
    save_file({"heldout": heldout, "test": test.losses}, folder / LOSSES)
    write_answers(folder / ANSWERS, task.test, test.answers)
    write_json(folder / SCORES, {"test": test.score.model_dump()})


def write_answers(path: Path, rows: Dataset, answers: Sequence[str]) -> None:
    """Write JSONL with the prompt, the answer and the expected one of every row."""
    lines = (
        json.dumps({"prompt": row["text_a"], "answer": answer, "expected": row["label"]}, ensure_ascii=False) + "\n"
        for row, answer in zip(rows, answers, strict=True)
    )
    path.write_text("".join(lines), encoding="utf-8")


def _resampled(rows: Rows, answers: list[str]) -> NDArray[Any]:
    """Return the task's metric on resamples of its test rows, which are the same for every merge."""
    task = rows.task
    expected = list(task.test["label"])
    return answer_resampled(task.metric, answers, expected, _kind(task).tolerance, seed=task_seed(0, task.name))


def _kind(task: Task) -> Generate:
    assert task.answering is not None
    return task.answering


def _read(output: Output) -> dict[str, Any]:
    return dict(json.loads((output.path / SCORES).read_text(encoding="utf-8")))
