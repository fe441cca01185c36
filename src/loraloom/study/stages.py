"""What each stage of a study computes of its inputs and options alone, but for tasks.py. Which there are: study.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraloom.adapters.heads import Head, align_heads
from loraloom.adapters.peft import CONFIG, PROVENANCE, read_adapter
from loraloom.adapters.stored import weight_files
from loraloom.adapters.update import Adapter
from loraloom.analysis.interference import interference as measure_interference, ratio
from loraloom.files.hashing import task_seed, write_json
from loraloom.merging import MergeOptions, make_plan, read_readout, write_merged
from loraloom.merging.distillation import Distiller
from loraloom.merging.needs import probe_of
from loraloom.merging.options import Normalise
from loraloom.merging.readout import READOUTS
from loraloom.merging.registry import Probe
from loraloom.model.objective import task_type
from loraloom.model.runner import labels, scored
from loraloom.results import Score
from loraloom.settings import Kind, LoraSettings, StatisticsSettings, TrainingSettings
from loraloom.starts.initialise import initialise
from loraloom.starts.options import StartOptions
from loraloom.statistics.file import Statistics
from loraloom.statistics.texts import collect
from loraloom.study.engine import Context, Reading, stage
from loraloom.study.inputs import Base, Local, Output, Rows, Texts
from loraloom.study.tasks import teachers
from loraloom.tasks.metrics import resampled
from loraloom.training.adapter import lora_config, train_adapter

ADAPTER, STATISTICS = "adapter", "statistics.safetensors"
SCORES, FEATURES, HEADS, RESPONSES = "scores.json", "features.safetensors", "heads.safetensors", "responses.json"
RESAMPLES = "resamples.json"


# statistics, starts, training


@stage("statistics", version=1)
def collect_statistics(
    folder: Path, context: Context, *, texts: Texts, base: Base, targets: list[str] | str, kind: Kind, reading: Reading
) -> None:
    """Collect what the base model's layers see of texts."""
    settings = StatisticsSettings(kind=kind, max_length=reading.max_length, batch_size=reading.batch_size)
    model = context.model(base, reading)
    collect(model, texts.rows, targets, settings).save(folder / STATISTICS)


def read_statistics(outputs: Mapping[str, Output]) -> dict[str, Statistics]:
    """Read what `collect_statistics` wrote, by the names of the outputs."""
    return {name: Statistics.load(output.path / STATISTICS) for name, output in outputs.items()}


@stage("init", version=1)
def start_adapter(
    folder: Path,
    context: Context,
    *,
    own: Output,
    off: Mapping[str, Output],
    base: Base,
    lora: LoraSettings,
    options: StartOptions,
    seed: int,
) -> None:
    """Write the adapter folder that training starts from, and its mean diagnostics."""
    config = lora_config(lora, [], task_type(base.folder, generates=base.generates))
    config.base_model_name_or_path = base.name
    seen = Statistics.load(own.path / STATISTICS)
    done = initialise(folder / ADAPTER, seen, read_statistics(off), config, options, seed=seed)
    write_json(folder / SCORES, {"diagnostics": done.diagnostics(), "notes": done.notes()})


def read_start(output: Output) -> dict[str, Any]:
    """Read the diagnostics and notes of a start that `start_adapter` wrote."""
    return _read_json(output.path / SCORES)


@stage("train", version=1)
def train(
    folder: Path, context: Context, *, rows: Rows, start: Output, base: Base, settings: TrainingSettings, seed: int
) -> None:
    """Train one task's adapter from its start; a killed training goes on from its last checkpoint."""
    context.unload()  # the Trainer loads a base of its own; two large ones would not fit
    train_adapter(
        base.name,
        rows.task,
        folder / ADAPTER,
        init=start.path / ADAPTER,
        settings=settings,
        seed=seed,
        checkpoints=context.scratch,
        progress=context.progress,
        reports=context.reports,
    )


@stage("adapter", version=1)
def copy_adapter(folder: Path, context: Context, *, given: Local) -> None:
    """Copy the files of a given adapter's folder that count."""
    (folder / ADAPTER).mkdir()
    for name in given.names:
        if (given.path / name).is_file():
            shutil.copy2(given.path / name, folder / ADAPTER / name)


def given_adapter(folder: Path, adapter: Adapter) -> Local:
    """Return what counts of the folder that an adapter was read from."""
    weights = [path.name for path in weight_files(folder)[0]]
    return Local.folder(folder, CONFIG, PROVENANCE, *weights, *adapter.beside.carried)


def read_adapters(outputs: Mapping[str, Output]) -> dict[str, Adapter]:
    """Read adapters by task; each is of that task, whatever a given one was trained on."""
    return {task: replace(read_adapter(output.path / ADAPTER), task=task) for task, output in outputs.items()}


def read_heads(outputs: Mapping[str, Output]) -> dict[str, Head]:
    """Read the heads of adapters as trained, by task."""
    return {task: Head.of(adapter.head, adapter.name) for task, adapter in read_adapters(outputs).items()}


# evaluation of each adapter alone


@stage("single", version=1)
def evaluate_single(
    folder: Path, context: Context, *, adapter: Output, rows: Rows, base: Base, reading: Reading, texts: int
) -> None:
    """Evaluate a task's own adapter on held-out and test rows; keep its features of `texts` unlabelled texts."""
    evaluator, task = context.evaluator(base, reading), rows.task
    own = read_adapter(adapter.path / ADAPTER)
    head = Head.of(own.head, own.name)
    unlabelled = evaluator.features(own.updates, head, evaluator.encode(task.sample("train", texts)))
    heldout = evaluator.features(own.updates, head, evaluator.encode(task.heldout))
    test = evaluator.features(own.updates, head, evaluator.encode(task.test))
    save_file({"unlabelled": unlabelled}, folder / FEATURES)
    scores = {split: scored(task, split, head, seen) for split, seen in (("heldout", heldout), ("test", test))}
    write_json(folder / SCORES, {split: score.model_dump() for split, score in scores.items()})


def single_score(output: Output, split: str) -> Score:
    """Read a score that `evaluate_single` wrote."""
    return Score(**_read_json(output.path / SCORES)[split])


# merging


@stage("merge", version=2)
def merge(
    folder: Path,
    context: Context,
    *,
    adapters: Mapping[str, Output],
    statistics: Mapping[str, Output],
    rule: str,
    options: Mapping[str, Any],
    normalise: Normalise,
    seed: int,
) -> None:
    """Merge at scale 1 by a rule that needs no base model."""
    asked = MergeOptions(rule, options, scale=1.0, seed=seed, normalise=normalise)
    _write_merge(folder, read_adapters(adapters), statistics, asked)


@stage("merge", version=2)
def merge_by_texts(
    folder: Path,
    context: Context,
    *,
    adapters: Mapping[str, Output],
    statistics: Mapping[str, Output],
    rows: Mapping[str, Rows],
    base: Base,
    reading: Reading,
    texts: int,
    rule: str,
    options: Mapping[str, Any],
    normalise: Normalise,
    seed: int,
) -> None:
    """Merge at scale 1 by a rule that runs the base model on `texts` training texts a task."""
    members = read_adapters(adapters)
    tasks = {name: one.task for name, one in rows.items()}
    model = context.model(base, reading)
    probe = probe_of(model, members, tasks, texts, context.progress)
    asked = MergeOptions(rule, options, scale=1.0, seed=seed, normalise=normalise)
    _write_merge(folder, members, statistics, asked, probe)


@stage("merge", version=2)
def merge_by_teachers(
    folder: Path,
    context: Context,
    *,
    adapters: Mapping[str, Output],
    statistics: Mapping[str, Output],
    rows: Mapping[str, Rows],
    base: Base,
    reading: Reading,
    texts: int,
    rule: str,
    options: Mapping[str, Any],
    normalise: Normalise,
    training: TrainingSettings,
    seed: int,
) -> None:
    """Merge at scale 1 by a rule that trains on `texts` unlabelled training texts a task; a killed one goes on."""
    members, tasks = read_adapters(adapters), {name: one.task for name, one in rows.items()}
    model = context.model(base, reading)
    distiller = teachers(model, members, tasks, texts, context.scratch, training, progress=context.progress)
    asked = MergeOptions(rule, options, scale=1.0, seed=seed, normalise=normalise)
    _write_merge(folder, members, statistics, asked, distiller=distiller)


def _write_merge(
    folder: Path,
    members: Mapping[str, Adapter],
    statistics: Mapping[str, Output],
    options: MergeOptions,
    probe: Probe | None = None,
    distiller: Distiller | None = None,
) -> None:
    seen = read_statistics(statistics)
    plan = make_plan(members, options, statistics=seen, probe=probe, distiller=distiller)
    write_merged(plan, folder / ADAPTER)


def merged_adapters(folder: Path, scale: float, tasks: Iterable[str]) -> dict[str, Adapter]:
    """Return what each task reads of a merged adapter: mostly one adapter for all.

    folder: of the merged adapter.
    scale: a factor on it.
    tasks: the names by which the result is asked.
    """
    if (folder / READOUTS).is_dir():
        return {name: read_readout(folder, name).scaled(scale) for name in tasks}
    return dict.fromkeys(tasks, read_adapter(folder).scaled(scale))


# evaluation of merged adapters


@stage("heldout", version=1)
def evaluate_heldout(
    folder: Path,
    context: Context,
    *,
    merged: Output,
    adapters: Mapping[str, Output],
    singles: Mapping[str, Output],
    rows: Mapping[str, Rows],
    base: Base,
    reading: Reading,
    scale: float,
    texts: int,
    ridge: float,
) -> None:
    """Evaluate a merged adapter on held-out rows with the heads as trained and as aligned; keep the latter.

    `singles` hold what each task's own adapter makes of its `texts` unlabelled texts. One forward pass over these and
    the held-out rows together serves both.
    """
    evaluator, heads = context.evaluator(base, reading), read_heads(adapters)
    unlabelled, heldout = {}, {}
    for name, adapter in merged_adapters(merged.path / ADAPTER, scale, rows).items():
        task = rows[name].task
        first = evaluator.encode(task.sample("train", texts))
        features = evaluator.features(adapter.updates, heads[name], first + evaluator.encode(task.heldout))
        unlabelled[name], heldout[name] = features[: len(first)], features[len(first) :]
    own = {name: load_file(output.path / FEATURES)["unlabelled"] for name, output in singles.items()}
    aligned = align_heads(heads, own, unlabelled, ridge=ridge)
    tensors = {f"{name}/{path}": tensor for name, head in aligned.items() for path, tensor in head.tensors.items()}
    save_file(tensors, folder / HEADS)
    _write_scores(folder, rows, "heldout", heldout, heads, aligned)


@stage("test", version=2)
def evaluate_test(
    folder: Path,
    context: Context,
    *,
    merged: Output,
    adapters: Mapping[str, Output],
    heldout: Output,
    rows: Mapping[str, Rows],
    base: Base,
    reading: Reading,
    scale: float,
) -> None:
    """Evaluate a merged adapter on test rows with the heads as trained and as `evaluate_heldout` aligned them."""
    evaluator, heads = context.evaluator(base, reading), read_heads(adapters)
    features = {
        name: evaluator.features(adapter.updates, heads[name], evaluator.encode(rows[name].task.test))
        for name, adapter in merged_adapters(merged.path / ADAPTER, scale, rows).items()
    }
    aligned = read_aligned(heldout, heads)
    _write_scores(folder, rows, "test", features, heads, aligned)
    pairs = {"as_trained": heads, "aligned": aligned}
    write_json(folder / RESAMPLES, {kind: _resampled(rows, features, chosen) for kind, chosen in pairs.items()})


def _resampled(rows: Mapping[str, Rows], features: Mapping[str, Tensor], heads: Mapping[str, Head]) -> list[float]:
    """Return the average over tasks on resamples of their test rows, which are the same for every merge."""
    found = []
    for name, one in rows.items():
        logits, true = heads[name].logits(features[name]), labels(one.task, "test")
        found.append(resampled(one.task.metric, logits, true, seed=task_seed(0, name)))
    return [float(value) for value in np.mean(found, axis=0)]


def read_resamples(output: Output, aligned: bool) -> list[float]:
    """Read what `evaluate_test` kept of the resamples."""
    found = json.loads((output.path / RESAMPLES).read_text(encoding="utf-8"))
    return list(found["aligned" if aligned else "as_trained"])


def read_aligned(heldout: Output, heads: Mapping[str, Head]) -> dict[str, Head]:
    """Read the aligned heads that `evaluate_heldout` kept."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(heldout.path / HEADS).items():
        name, path = key.split("/", 1)
        found.setdefault(name, {})[path] = tensor
    return {name: Head(found[name], head.last) for name, head in heads.items()}


def read_scores(output: Output, aligned: bool) -> dict[str, Score]:
    """Read the scores by task that an evaluation of a merged adapter wrote."""
    scores = json.loads((output.path / SCORES).read_text(encoding="utf-8"))["aligned" if aligned else "as_trained"]
    return {name: Score(**value) for name, value in scores.items()}


def _write_scores(
    folder: Path,
    rows: Mapping[str, Rows],
    split: str,
    features: Mapping[str, Tensor],
    heads: Mapping[str, Head],
    aligned: Mapping[str, Head],
) -> None:
    """Write the scores by task of the heads as trained and as aligned, both reading the same features."""
    scores = {
        kind: {name: scored(one.task, split, chosen[name], features[name]).model_dump() for name, one in rows.items()}
        for kind, chosen in (("as_trained", heads), ("aligned", aligned))
    }
    write_json(folder / SCORES, scores)


# interference


@stage("interference", version=1)
def measure(
    folder: Path,
    context: Context,
    *,
    starts: Mapping[str, Output],
    adapters: Mapping[str, Output],
    heldout: Mapping[str, Output],
) -> None:
    """Measure every adapter's response to every task's held-out inputs; before training too where starts are given."""
    seen = read_statistics(heldout)
    after = measure_interference(read_adapters(adapters), seen)
    tables = [("after", "A", after.A), ("after", "BA", after.BA)]
    if starts:
        tables.insert(0, ("before", "A", measure_interference(read_adapters(starts), seen).A))
    rows = [
        {"when": when, "quantity": quantity, "values": values.tolist(), "ratio": ratio(values)}
        for when, quantity, values in tables
    ]
    write_json(folder / RESPONSES, {"tasks": after.adapters, "layers": after.layers, "tables": rows})


def read_responses(output: Output) -> dict[str, Any]:
    """Read what `measure` wrote: tasks, layers, and tables of responses."""
    return _read_json(output.path / RESPONSES)


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))
