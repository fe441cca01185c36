"""The stages that evaluate tasks of answers, by the loss of the right answer and by what a model writes.

Held-out rows are measured by the losses of right answers alone, which are far less noisy than whether a written answer
is right; test rows by every metric.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraloom.adapters.peft import read_adapter
from loraloom.adapters.update import Update
from loraloom.files.hashing import task_seed, write_json
from loraloom.model.generator import answer_task
from loraloom.results import Answers, Score
from loraloom.settings import Kind, StatisticsSettings, Tokens
from loraloom.statistics.texts import collect
from loraloom.study.engine import Context, Reading, stage
from loraloom.study.inputs import Base, Output, Rows
from loraloom.study.stages import ADAPTER, RESAMPLES, SCORES, STATISTICS, merged_adapters
from loraloom.tasks.answers import answer_resampled
from loraloom.tasks.generate import Generate
from loraloom.tasks.metrics import resampled_rows
from loraloom.tasks.task import Task

LOSSES, ANSWERS, TRANSCRIPT = "losses.safetensors", "answers.jsonl", "transcript.json"
TRANSCRIBED = 3  # prompts a task
KNOWN = 0.02  # mean probability of right answers of which a share can be kept: that of one row in fifty


@stage("statistics", version=1)
def collect_statistics(
    folder: Path,
    context: Context,
    *,
    rows: Rows,
    split: str,
    texts: int,
    base: Base,
    targets: list[str] | str,
    kind: Kind,
    tokens: Tokens,
    reading: Reading,
) -> None:
    """Collect what the base model's layers see of prompts with their answers, of which these tokens count."""
    settings = StatisticsSettings(
        kind=kind, tokens=tokens, max_length=reading.max_length, batch_size=reading.batch_size
    )
    sample = rows.task.sample(split, texts)
    collect(context.generator(base, reading), sample, targets, settings).save(folder / STATISTICS)


@stage("base", version=2)
def evaluate_base(folder: Path, context: Context, *, rows: Rows, base: Base, reading: Reading) -> None:
    """Evaluate the base model alone on a task's test rows; keep its losses on held-out ones too."""
    _write_alone(folder, context, {}, rows, base, reading)


@stage("single", version=2)
def evaluate_single(
    folder: Path, context: Context, *, adapter: Output, rows: Rows, base: Base, reading: Reading
) -> None:
    """Evaluate a task's own adapter on its test rows; keep its losses on held-out ones too."""
    _write_alone(folder, context, read_adapter(adapter.path / ADAPTER).updates, rows, base, reading)


def alone_score(output: Output) -> Score:
    """Read the score on test rows that `evaluate_base` or `evaluate_single` wrote."""
    return Score(**_read(output)["test"])


@stage("heldout", version=2)
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
    """Measure what a merged adapter keeps of each single adapter's probability and gain in loss on held-out rows."""
    generator, losses = context.generator(base, reading), {}
    for name, adapter in merged_adapters(merged.path / ADAPTER, scale, rows).items():
        losses[name] = generator.losses(adapter.updates, generator.encode(rows[name].task.heldout))
    write_json(folder / SCORES, _shares(bases, singles, losses, "heldout"))


@stage("test", version=2)
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
    shares = _shares(bases, singles, {name: one.losses for name, one in found.items()}, "test")
    write_json(folder / SCORES, {"as_trained": {name: one.score.model_dump() for name, one in found.items()}, **shares})
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


def read_shares(output: Output) -> dict[str, dict[str, Score]]:
    """Read `kept_probability` and `recovered`, each by task, that an evaluation of a merged adapter wrote."""
    found = _read(output)
    return {
        share: {name: Score(**value) for name, value in found[share].items()}
        for share in ("kept_probability", "recovered")
    }


def is_known(single: Output) -> bool:
    """Tell whether a single adapter gives the right answers of held-out rows a probability to take a share of."""
    return float(torch.exp(-load_file(single.path / LOSSES)["heldout"][:, 0]).mean()) >= KNOWN


def kept_probability(single: Tensor, merged: Tensor, seed: int) -> Score:
    """Return mean probability of the right answers by merged / by single, with its error over rows.

    single, merged: (k, 2) float64, nats and tokens of the same right answers, as `Generator.losses` gives them.
    seed: of the resamples of rows from which the error is taken.
    """
    chances = np.stack([np.exp(-one[:, 0].numpy()) for one in (single, merged)])
    drawn = resampled_rows(chances.shape[1], seed)
    own, kept = chances.sum(axis=1)
    owns, keeps = chances[:, drawn].sum(axis=2)
    shares = np.divide(keeps, owns, out=np.zeros_like(owns), where=owns > 0)
    return Score(value=float(kept / own) if own > 0 else 0.0, stderr=float(np.std(shares, ddof=1)))


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


def _shares(
    bases: Mapping[str, Output], singles: Mapping[str, Output], losses: Mapping[str, Tensor], split: str
) -> dict[str, dict[str, Any]]:
    """Return what is kept of probability and of gain in loss, each by task, as `read_shares` reads it."""
    found: dict[str, dict[str, Any]] = {"kept_probability": {}, "recovered": {}}
    for name, merged in losses.items():
        base, single = (load_file(one[name].path / LOSSES)[split] for one in (bases, singles))
        gain = recovered(base, single, merged, seed=task_seed(0, name))
        if is_known(singles[name]):
            kept = kept_probability(single, merged, seed=task_seed(0, name))
        else:
            kept = Score(value=max(gain.value, 0.0), stderr=gain.stderr)
        found["kept_probability"][name], found["recovered"][name] = kept.model_dump(), gain.model_dump()
    return found


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
