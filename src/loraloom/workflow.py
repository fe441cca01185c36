"""Single stages by hand: files in, files out. What the commands init, train, merge, evaluate and inspect call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import datasets
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor

from loraloom.adapter import CONFIG, Adapter, read_adapter, read_provenance
from loraloom.base import base_folder
from loraloom.errors import LoraloomError, did_you_mean
from loraloom.evaluation import Evaluator, evaluate
from loraloom.heads import Head
from loraloom.initialise import Initialisation, initialise
from loraloom.interference import response
from loraloom.merging import merge, write_merged
from loraloom.progress import Reporter
from loraloom.recipe import Recipe
from loraloom.results import Score
from loraloom.stages import build_task
from loraloom.moments import Moment
from loraloom.statistics import Statistics, collect_statistics
from loraloom.store import Store
from loraloom.tasks.encoding import batches, encode
from loraloom.tasks.sources import read_table
from loraloom.tasks.task import Task
from loraloom.training import Trained, train_adapter


def collect_from_file(
    texts: str, columns: Sequence[str], base: str, targets: Sequence[str], count: int, rows: str, max_length: int
) -> Statistics:
    """Return the statistics of the first `count` texts of a file or hub data set; labels are not read.

    Raises LoraloomError for a file or column that is not there, fewer texts than asked for, or an unknown `rows`.
    """
    if rows not in get_args(Kind):
        raise LoraloomError(f"rows {rows!r} is unknown", did_you_mean(rows, get_args(Kind)))
    try:
        table = read_table(texts, "train", columns)
    except ValueError as error:
        raise LoraloomError(f"{texts}: {error}", "name a JSONL, CSV, TSV or Parquet file, or org/name") from error
    for column in columns:
        if column not in table.columns:
            raise LoraloomError(f"{texts}: has no column {column!r}", did_you_mean(column, table.columns))
    if len(table.rows) < count:
        raise LoraloomError(f"{texts}: {count} texts were asked for, it holds {len(table.rows)}", "lower --texts")
    names = ("text_a", "text_b")[: len(columns)]
    kept = [{name: str(row[column]) for name, column in zip(names, columns, strict=True)} for row in table.rows[:count]]
    evaluator = Evaluator(base_folder(base), max_length=max_length)
    encoded = encode(datasets.Dataset.from_list(kept), evaluator.tokenizer, max_length)
    fed = (batch for _, batch in batches(encoded, evaluator.tokenizer, 32))
    return collect_statistics(evaluator.model, fed, list(targets), rows=rows)  # type: ignore[arg-type]


def initialise_from_files(
    output: Path, own: Path, others: Sequence[Path], lora: Mapping[str, Any], options: Mapping[str, Any]
) -> Initialisation:
    """Write an adapter folder from statistics files; see `initialise`."""
    config = LoraConfig(
        r=lora["rank"], lora_alpha=lora["alpha"], target_modules=lora["targets"], use_rslora=lora["rslora"]
    )
    read = {path.stem: Statistics.load(path) for path in others}
    return initialise(output, Statistics.load(own), read, config, **options)


def train_from_recipe(
    recipe: Recipe, task: str, output: Path, init: Path | None, seed: int, reporter: Reporter
) -> Trained:
    """Train one task of a recipe; see `train_adapter`."""
    reporter.begin("training", 1)
    return train_adapter(
        base_folder(recipe.base),
        _task(recipe, task),
        output,
        init=init,
        lora=recipe.lora,
        settings=recipe.training,
        seed=seed,
        progress=lambda done, total: reporter.detail("training", f"{task} step {done}/{total}"),
    )


def merge_folders(
    folders: Sequence[Path],
    rule: str,
    output: Path,
    options: Mapping[str, Any],
    scale: float | None,
    weights: Sequence[float] | None,
    rank: int | None,
    seed: int,
    command: str,
) -> dict[str, Any]:
    """Merge adapter folders into `output` and return the facts to tell; see `merge`."""
    members = [read_adapter(folder) for folder in folders]
    merged = merge(members, rule, weights=weights, scale=scale, rank=rank, seed=seed, **options)
    write_merged(merged, output, command=command)
    lost = list(merged.energy_lost.values())
    return {
        "folder": str(output),
        "rule": merged.rule,
        "space": merged.space,
        "scale": merged.scale,
        "rank": merged.adapter.rank,
        "energy lost": f"{sum(lost) / len(lost):.2%} a layer on average, {max(lost):.2%} at most",
        "heads": ", ".join(merged.heads) or "none",
    }


def evaluate_folder(recipe: Recipe, folder: Path, names: Sequence[str], split: str) -> dict[str, tuple[str, Score]]:
    """Return (metric, score) by task of an adapter folder with its head, or of a merged one with its heads.

    Raises LoraloomError for an unknown task or split, and a task without a head.
    """
    if split not in ("test", "heldout"):
        raise LoraloomError(f"split {split!r} is unknown", "use test or heldout")
    adapter = read_adapter(folder)
    heads = _heads(adapter, folder)
    wanted = list(names) or [name for name in recipe.tasks if name in heads]
    missing = [name for name in wanted if name not in heads]
    if missing or not wanted:
        raise LoraloomError(
            f"{folder}: no head for task {', '.join(missing) or 'of this recipe'}", f"it has: {', '.join(heads)}"
        )
    evaluator = Evaluator(
        base_folder(recipe.base),
        max_length=recipe.training.max_length,
        batch_size=recipe.training.eval_batch_size,
    )
    scores: dict[str, tuple[str, Score]] = {}
    for name in wanted:
        task = _task(recipe, name)
        scores[name] = task.metric, evaluate(evaluator, adapter.updates, heads[name], task, split=split)
    return scores


def inspect_paths(paths: Sequence[Path]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return facts of every adapter folder and statistics file, and the responses where both are given."""
    adapters: dict[str, Adapter] = {}
    statistics: dict[str, Statistics] = {}
    facts: dict[str, Any] = {}
    for path in paths:
        if path.is_dir():
            adapters[str(path)] = adapter = read_adapter(path)
            facts[str(path)] = _adapter_facts(adapter, path)
        else:
            statistics[str(path)] = read = Statistics.load(path)
            facts[str(path)] = {
                "base": read.base,
                "fingerprint": read.fingerprint,
                "texts": read.texts,
                "tokens": read.tokens,
                "rows": read.kind,
                "layers": len(read.layers),
                "inputs": len(read.moments),
            }
    if not (adapters and statistics):
        return facts, {}
    rows = {
        name: [_response(adapter, seen, name) for seen in statistics.values()] for name, adapter in adapters.items()
    }
    return facts, {"statistics": list(statistics), "rows": rows}


def study_store(folder: Path) -> Store:
    """Return the store of a study folder. Raises LoraloomError where there is none."""
    if not (folder / "stages").is_dir():
        raise LoraloomError(f"{folder}: not a study folder: it has no stages/", "name the folder of `loraloom run`")
    return Store(folder / "stages")


def _task(recipe: Recipe, name: str) -> Task:
    if name not in recipe.tasks:
        raise LoraloomError(f"the recipe has no task {name!r}", did_you_mean(name, recipe.tasks))
    return build_task(name, recipe.tasks[name])


def _heads(adapter: Adapter, folder: Path) -> dict[str, Head]:
    """Return heads by task: those beside a merged adapter, or the one inside a task's own."""
    beside = {path.stem: load_file(path) for path in sorted((folder / "heads").glob("*.safetensors"))}
    found: dict[str, dict[str, Tensor]] = {name: _unprefixed(tensors) for name, tensors in beside.items()}
    if adapter.head:
        task = read_provenance(folder).get("task", {}).get("name", folder.name)
        found[task] = adapter.head
    return {name: Head.of(tensors, name) for name, tensors in found.items()}


def _unprefixed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {path.removeprefix("base_model.model."): tensor for path, tensor in tensors.items()}


def _adapter_facts(adapter: Adapter, path: Path) -> dict[str, Any]:
    energies = torch.tensor([float(update.dense().square().sum()) for update in adapter.updates.values()])
    return {
        "base": adapter.base,
        "layers": len(adapter.updates),
        "rank": adapter.rank,
        "energy |dW|^2": round(float(energies.sum()), 6),
        "head": sorted(adapter.head) or "none",
        "config": str(path / CONFIG),
        "made by": read_provenance(path).get("made_by", "unknown"),
    }


def _response(adapter: Adapter, seen: Statistics, name: str) -> float:
    missing = sorted(set(adapter.updates) - set(seen.layers))
    if missing:
        raise LoraloomError(
            f"{name}: adapts {missing[0]}, which the statistics do not cover", "collect them on its targets"
        )
    squares = [response(update, seen.moment(module))[1] ** 2 for module, update in adapter.updates.items()]
    return float((sum(squares) / len(squares)) ** 0.5)
