"""What each stage of a study computes: inputs as files, output as files in one folder. Which and when: study.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraloom.adapters.heads import Head, align_heads
from loraloom.adapters.peft import CONFIG, PROVENANCE, WEIGHTS, read_adapter
from loraloom.adapters.update import Adapter
from loraloom.analysis.interference import interference, ratio
from loraloom.files.hashing import file_sha256, text_sha256, write_json
from loraloom.merging import read_readout
from loraloom.merging.readout import READOUTS
from loraloom.model.runner import Evaluator, scored
from loraloom.results import Score
from loraloom.settings import AlignmentSettings, LoraSettings, StatisticsSettings
from loraloom.starts.initialise import initialise
from loraloom.statistics.file import Statistics
from loraloom.statistics.texts import collect
from loraloom.study.recipe import InitSettings, TaskSettings
from loraloom.tasks.builtin import BuiltinTask, builtin_task, source_versions
from loraloom.tasks.files import file_task
from loraloom.tasks.glue import GlueTask, glue_task
from loraloom.tasks.task import Task
from loraloom.training import lora_config

SCORES, FEATURES, HEADS, RESPONSES = "scores.json", "features.safetensors", "heads.safetensors", "responses.json"


def build_task(name: str, settings: TaskSettings) -> Task:
    """Return the task that a recipe names. Raises LoraloomError that tells all that is wrong with its rows."""
    if isinstance(settings, BuiltinTask):
        return builtin_task(name, settings)
    if isinstance(settings, GlueTask):
        return glue_task(name, settings)
    return file_task(name, settings)


def task_inputs(name: str, settings: TaskSettings) -> dict[str, Any]:
    """Return what the rows of a task depend on: options, and hashes of its files or versions of its packages."""
    inputs: dict[str, Any] = {"name": name, **settings.model_dump(mode="json", exclude={"epochs"})}
    if isinstance(settings, BuiltinTask):
        inputs["packages"] = source_versions()
    elif isinstance(settings, GlueTask):
        folder = settings.path and settings.path / name
        files = ("train.jsonl", "dev.jsonl", "meta.json")
        inputs["path"] = [_file_sha256(folder / file) for file in files] if folder else None
    else:
        for key in ("train", "heldout", "test"):
            path = inputs[key] and Path(inputs[key])
            inputs[key] = _file_sha256(path) if path and path.is_file() else inputs[key]
    return inputs


def sample_problems(task: Task, statistics: StatisticsSettings, alignment: AlignmentSettings) -> list[str]:
    """Return every sample of unlabelled training texts that is asked for and larger than the task's training rows."""
    asked = {"statistics.texts": statistics.texts, "alignment.texts": alignment.texts}
    return [
        f"task {task.name!r}: {option} asks for {count} texts, {len(task.train)} training rows are left"
        for option, count in asked.items()
        if count > len(task.train)
    ]


def copy_adapter(source: Path, folder: Path) -> None:
    """Copy the files of an adapter folder that count: config, weights, provenance."""
    (folder / "adapter").mkdir()
    for name in (CONFIG, WEIGHTS, PROVENANCE):
        if (source / name).is_file():
            shutil.copy2(source / name, folder / "adapter" / name)


def merged_adapters(folder: Path, scale: float, tasks: Iterable[str]) -> dict[str, Adapter]:
    """Return what each task reads of the merged adapter in `folder`, times `scale`: mostly one adapter for all."""
    if (folder / READOUTS).is_dir():
        return {name: read_readout(folder, name).scaled(scale) for name in tasks}
    return dict.fromkeys(tasks, read_adapter(folder).scaled(scale))


def make_statistics(
    folder: Path, evaluator: Evaluator, rows: Dataset, settings: StatisticsSettings, targets: list[str] | str
) -> None:
    """Collect what the base model's layers see of the texts in `rows`."""
    collect(evaluator, rows, targets, settings).save(folder / "statistics.safetensors")


def texts_sha256(rows: Dataset) -> str:
    """Return a hash of the texts in `rows`."""
    return text_sha256("\n".join(rows["text_a"]))


def read_statistics(folder: Path) -> Statistics:
    """Read what `make_statistics` wrote."""
    return Statistics.load(folder / "statistics.safetensors")


def make_init(
    folder: Path,
    own: Statistics,
    others: Mapping[str, Statistics],
    lora: LoraSettings,
    settings: InitSettings,
    seed: int,
    base: str,
) -> None:
    """Write the adapter folder that training starts from, named for base model `base`, and its mean diagnostics."""
    config = lora_config(lora, [])
    config.base_model_name_or_path = base
    done = initialise(folder / "adapter", own, others, config, settings, seed=seed)
    write_json(folder / SCORES, {"diagnostics": done.diagnostics(), "notes": done.notes()})


def make_single(folder: Path, evaluator: Evaluator, adapter: Adapter, task: Task, alignment: AlignmentSettings) -> None:
    """Evaluate a task's own adapter on held-out and test rows; keep its features of the unlabelled texts."""
    head = Head.of(adapter.head, adapter.name)
    unlabelled = evaluator.encode(task.sample("train", alignment.texts))
    features = {
        "unlabelled": evaluator.features(adapter.updates, head, unlabelled),
        "heldout": evaluator.features(adapter.updates, head, evaluator.encode(task.heldout)),
        "test": evaluator.features(adapter.updates, head, evaluator.encode(task.test)),
    }
    save_file({"unlabelled": features["unlabelled"]}, folder / FEATURES)
    scores = {split: scored(task, split, head, features[split]).model_dump() for split in ("heldout", "test")}
    write_json(folder / SCORES, scores)


def own_features(folder: Path) -> Tensor:
    """Read the features that `make_single` kept."""
    return load_file(folder / FEATURES)["unlabelled"]


def make_heldout_evaluation(
    folder: Path,
    evaluator: Evaluator,
    merged: Mapping[str, Adapter],
    heads: Mapping[str, Head],
    own: Mapping[str, Tensor],
    tasks: Mapping[str, Task],
    alignment: AlignmentSettings,
) -> None:
    """Evaluate a merged adapter, by task, on held-out rows with the heads as trained and aligned; keep the latter.

    One forward pass over unlabelled and held-out rows together serves both.
    """
    unlabelled, heldout = {}, {}
    for name, task in tasks.items():
        first = evaluator.encode(task.sample("train", alignment.texts))
        features = evaluator.features(merged[name].updates, heads[name], first + evaluator.encode(task.heldout))
        unlabelled[name], heldout[name] = features[: len(first)], features[len(first) :]
    aligned = align_heads(heads, own, unlabelled, ridge=alignment.ridge)
    save_file(
        {f"{name}/{path}": tensor for name, head in aligned.items() for path, tensor in head.tensors.items()},
        folder / HEADS,
    )
    write_json(folder / SCORES, _both(heads, aligned, heldout, tasks, "heldout"))


def make_test_evaluation(
    folder: Path,
    evaluator: Evaluator,
    merged: Mapping[str, Adapter],
    heads: Mapping[str, Head],
    aligned: Mapping[str, Head],
    tasks: Mapping[str, Task],
) -> None:
    """Evaluate a merged adapter, by task, on test rows with the heads as trained and as aligned before."""
    features = {
        name: evaluator.features(merged[name].updates, heads[name], evaluator.encode(task.test))
        for name, task in tasks.items()
    }
    write_json(folder / SCORES, _both(heads, aligned, features, tasks, "test"))


def read_aligned(folder: Path, heads: Mapping[str, Head]) -> dict[str, Head]:
    """Read the aligned heads that `make_heldout_evaluation` kept."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / HEADS).items():
        name, path = key.split("/", 1)
        found.setdefault(name, {})[path] = tensor
    return {name: Head(found[name], head.last) for name, head in heads.items()}


def read_scores(folder: Path, aligned: bool) -> dict[str, Score]:
    """Read the scores by task that an evaluation wrote."""
    scores = json.loads((folder / SCORES).read_text(encoding="utf-8"))["aligned" if aligned else "as_trained"]
    return {name: Score(**value) for name, value in scores.items()}


def make_interference(
    folder: Path, start: Mapping[str, Path], trained: Mapping[str, Path], heldout: Mapping[str, Path]
) -> None:
    """Measure every adapter's response to every task's held-out inputs; before training too where `start` is given."""
    seen = {name: read_statistics(path) for name, path in heldout.items()}
    after = interference({name: read_adapter(path) for name, path in trained.items()}, seen)
    tables = [("after", "A", after.A), ("after", "BA", after.BA)]
    if start:
        before = interference({name: read_adapter(path) for name, path in start.items()}, seen)
        tables.insert(0, ("before", "A", before.A))
    rows = [
        {"when": when, "quantity": quantity, "values": values.tolist(), "ratio": ratio(values)}
        for when, quantity, values in tables
    ]
    write_json(folder / RESPONSES, {"tasks": after.adapters, "layers": after.layers, "tables": rows})


def _both(
    heads: Mapping[str, Head],
    aligned: Mapping[str, Head],
    features: Mapping[str, Tensor],
    tasks: Mapping[str, Task],
    split: str,
) -> dict[str, dict[str, dict[str, float]]]:
    return {
        kind: {name: scored(task, split, chosen[name], features[name]).model_dump() for name, task in tasks.items()}
        for kind, chosen in (("as_trained", heads), ("aligned", aligned))
    }


def _file_sha256(path: Path) -> str:
    return file_sha256(path) if path.is_file() else f"missing: {path.name}"
