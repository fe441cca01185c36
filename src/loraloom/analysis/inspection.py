"""What files tell before a training or a merge: adapter folders, statistics, or both. For the command `inspect`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from loraloom.adapters.peft import files_by_task, read_adapter, read_provenance, task_of
from loraloom.adapters.update import Adapter
from loraloom.analysis.interference import Responses, responses
from loraloom.analysis.outlook import Outlook, outlook
from loraloom.analysis.overlap import Overlaps, overlaps
from loraloom.analysis.prediction import Prediction, predict
from loraloom.errors import raise_problems
from loraloom.statistics.file import Statistics
from loraloom.statistics.fit import cover_problems

SCALES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5)  # at which the sum's error is told


@dataclass(frozen=True)
class Inspection:
    """Facts of every file, and what they tell together; None where the files do not suffice for it.

    Adapters and statistics go by path; `own` is the statistics of an adapter's own task, where a file is.
    """

    files: dict[str, Any]
    own: dict[str, str]
    shared: Overlaps | None
    outlook: Outlook | None
    responses: Responses | None
    prediction: Prediction | None
    notes: list[str]


def inspect_paths(paths: Sequence[Path], rank: int = 8) -> Inspection:
    """Return what adapter folders and statistics files tell.

    Two or more adapters: what their spaces share. Statistics alone, two or more: the outlook for adapters of `rank`.
    Both: responses of every adapter to every task's inputs and, where each of two or more adapters has statistics of
    its own, the predicted error of their sum. Raises LoraloomError for files that cannot be read or do not fit.
    """
    adapters = {str(path): read_adapter(path) for path in paths if path.is_dir()}
    statistics = {str(path): Statistics.load(path) for path in paths if not path.is_dir()}
    files = {
        str(path): _adapter_facts(adapters[str(path)], path) if path.is_dir() else statistics[str(path)].contents()
        for path in paths
    }
    shared = overlaps(adapters) if len(adapters) > 1 else None
    if not adapters:
        expected = outlook(statistics, rank) if len(statistics) > 1 else None
        return Inspection(files, {}, shared, expected, None, None, _notes_of(expected) if expected else [])
    if not statistics:
        return Inspection(files, {}, shared, None, None, None, [])
    own = own_statistics(list(adapters), list(statistics))
    prediction, notes = _predicted(adapters, statistics, own)
    return Inspection(files, own, shared, None, _responses(adapters, statistics), prediction, notes)


def own_statistics(adapters: Sequence[str], statistics: Sequence[str]) -> dict[str, str]:
    """Return the statistics file of every adapter folder that has one: by its name or task, else by order.

    `sst2` is the task of `sst2.safetensors`, `sst2.heldout.safetensors` and `sst2.train-1a2b/statistics.safetensors`.
    Where no name fits and the numbers are equal, two or more, files stand in the order of the folders.
    """
    found = {}
    for adapter in adapters:
        names = {Path(adapter).resolve().name, task_of(Path(adapter))}
        fitting = [path for path in statistics if names & _names(Path(path))]
        if len(fitting) == 1:
            found[adapter] = fitting[0]
    if not found and len(adapters) == len(statistics) > 1:
        return dict(zip(adapters, statistics, strict=True))
    return found


def label(path: str) -> str:
    """Return a short name for a table: the file's or folder's, or its parent's where that says nothing."""
    whole = Path(path)
    stem = whole.name.removesuffix(".safetensors")
    name = whole.resolve().parent.name if stem in ("statistics", "adapter") else stem
    return re.sub(r"-[0-9a-f]{12}$", "", name)  # the key of a study's stage


def _names(path: Path) -> set[str]:
    return {label(str(path)), label(str(path)).split(".")[0]}


def _adapter_facts(adapter: Adapter, path: Path) -> dict[str, Any]:
    provenance = read_provenance(path)
    heads = {*files_by_task(path, "heads"), *([adapter.task] if adapter.head else [])}
    return {
        "base": adapter.base,
        "layers": len(adapter.updates),
        "rank": adapter.rank,
        "energy |dW|^2": round(sum(update.energy() for update in adapter.updates.values()), 6),
        "heads": sorted(heads),
        "made by": provenance.get("made_by") or provenance.get("kind", "unknown"),
    }


def _responses(adapters: Mapping[str, Adapter], statistics: Mapping[str, Statistics]) -> Responses:
    pairs = [(name, adapter, seen) for name, adapter in adapters.items() for seen in statistics.values()]
    problems = [problem for pair in pairs for problem in cover_problems(*pair)]
    raise_problems("cannot inspect", list(dict.fromkeys(problems)), "collect them on its targets")
    return responses(adapters, statistics)


def _predicted(
    adapters: Mapping[str, Adapter], statistics: Mapping[str, Statistics], own: Mapping[str, str]
) -> tuple[Prediction | None, list[str]]:
    """Return the prediction, or why there is none."""
    if len(adapters) < 2:
        return None, []
    without = [name for name in adapters if name not in own]
    if without:
        told = "no statistics are those of its own task: all count as others"
        return None, [f"{name}: {told}" for name in without] + [
            "no sum was predicted: name statistics files like the adapter folders"
        ]
    if len({frozenset(adapter.shapes) for adapter in adapters.values()}) > 1:
        return None, ["no sum was predicted: the adapters cover different layers"]
    return predict(adapters, {name: statistics[own[name]] for name in adapters}), []


def _notes_of(expected: Outlook) -> list[str]:
    thin = expected.thin()
    return [f"{', '.join(map(label, thin))}: fewer rows than an input has features, so figures flatter"] if thin else []


def facts(found: Inspection) -> dict[str, Any]:
    """Return everything as plain values, for JSON: None where a figure does not exist."""
    return {
        "files": found.files,
        "responses": _responses_facts(found.responses, found.own) if found.responses else {},
        "overlaps": found.shared.tables() if found.shared else {},
        "outlook": _outlook_facts(found.outlook) if found.outlook else {},
        "prediction": _prediction_facts(found.prediction) if found.prediction else {},
        "notes": found.notes,
    }


def _responses_facts(found: Responses, own: Mapping[str, str]) -> dict[str, Any]:
    return {
        "statistics": found.inputs,
        "own": own,
        "rows": dict(zip(found.adapters, found.overall().tolist(), strict=True)),
        "layers": found.layers,
        "by layer": {name: _plain(found.BA[:, i]) for i, name in enumerate(found.adapters)},
        "against own": {name: _plain(found.against(name, of)) for name, of in own.items()},
    }


def _outlook_facts(found: Outlook) -> dict[str, Any]:
    return {
        "tasks": found.tasks,
        "inputs": found.inputs,
        "rank": found.rank,
        "shared": found.shared.tolist(),
        "chance": found.chance.tolist(),
        "starts": {rule: {**found.of_start(rule), "by input": found.starts[rule].tolist()} for rule in found.starts},
        "ranks": found.ranks,
        "own / others of the best A": found.attainable.tolist(),
        "a start can help": dict(zip(found.inputs, found.helped().tolist(), strict=True)),
        "suggested rank": found.suggested_rank(),
    }


def _prediction_facts(found: Prediction) -> dict[str, Any]:
    uniform = found.uniform()
    return {
        "tasks": found.tasks,
        "layers": found.layers,
        "uniform scale": uniform,
        "scale by layer": found.by_layer()[:, 0].tolist(),
        "scale by layer and adapter": found.by_layer_and_adapter().tolist(),
        "error": {name: found.by_task(scale).tolist() for name, scale in _choices(found)},
    }


def _choices(found: Prediction) -> Iterator[tuple[str, float | Tensor]]:
    yield from ((f"{scale:g}", scale) for scale in SCALES)
    uniform, by_layer, both = found.uniform(), found.by_layer(), found.by_layer_and_adapter()
    yield f"{uniform:.2f}, suggested", uniform
    yield f"{_span(by_layer)}, by layer", by_layer
    yield f"{_span(both)}, by layer and adapter", both


def _span(scales: Tensor) -> str:
    return f"{float(scales.min()):.2f} to {float(scales.max()):.2f}"


def _plain(values: Tensor) -> list[list[float | None]]:
    return [[None if math.isnan(value) else value for value in row] for row in values.tolist()]


Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]  # title, columns, rows


def tables(found: Inspection) -> Iterator[Table]:
    """Yield what is known as tables for people."""
    if found.responses:
        yield _responses_table(found.responses, found.own)
    if found.shared:
        names = _labels(found.shared.names)
        for title, table in found.shared.tables().items():
            yield f"overlap of the {title}, mean over layers", ("adapter", *names), _cells(names, table)
    if found.outlook:
        yield from _outlook_tables(found.outlook)
    if found.prediction:
        names = _labels(found.prediction.tasks)
        rows = [(name, found.prediction.by_task(scale)) for name, scale in _choices(found.prediction)]
        cells = [(name, *(f"{value:.2f}" for value in row), f"{row.mean():.2f}") for name, row in rows]
        title = "predicted error of the sum in each task's own output directions; 0: what it has to lose"
        yield title, ("scale", *names, "mean"), cells


def sentences(found: Inspection) -> list[str]:
    """Return what follows from the tables, in words."""
    told = list(found.notes)
    for one, two, value in found.shared.same_start() if found.shared else ():
        told.append(
            f"{one} and {two} started from nearly the same A (overlap {value:.2f}) and merge worse than "
            "adapters of a seed each: train one again from `loraloom init` with another seed"
        )
    if found.outlook:
        told += _verdict(found.outlook)
    if found.prediction:
        told.append(
            f"suggested scale of a sum: {found.prediction.uniform():.2f}; it is where the predicted error is least, "
            "and no promise of the best score: hold out rows to choose"
        )
    return told


def _verdict(found: Outlook) -> list[str]:
    helped, best = int(found.helped().sum()), found.attainable[:, :, found.ranks.index(found.rank)]
    rank, count = found.suggested_rank(), len(found.inputs)
    return [
        f"a start of rank {found.rank} chosen by these statistics can help in {helped} of {count} layer inputs: "
        f"the best A sees {best.min():.1f} to {best.max():.1f} times as much of its own inputs as of the others' "
        "(random: 1; helping: 2)",
        f"suggested rank: {rank}, the largest up to 64 at which that still holds"
        if rank
        else "no rank keeps these tasks apart: their inputs are alike, choose the rank for learning alone",
    ]


def _responses_table(found: Responses, own: Mapping[str, str]) -> Table:
    title = "|B A h|, root mean square over rows and layers; others / own: mean over layers"
    columns = ("adapter", *_labels(found.inputs), "others / own", "worst layer")
    rows = []
    for name, overall in zip(found.adapters, found.overall(), strict=True):
        mean = worst = "-"
        if name in own and len(found.inputs) > 1:
            by_layer = found.against(name, own[name]).nanmean(dim=1)
            mean = f"{by_layer.nanmean():.2f}"
            top = int(by_layer.nan_to_num(-1).argmax())
            worst = f"{by_layer[top]:.2f} {_short(found.layers[top])}"
        rows.append((label(name), *(f"{value:.3g}" for value in overall.tolist()), mean, worst))
    return title, columns, rows


def _outlook_tables(found: Outlook) -> Iterator[Table]:
    names = _labels(found.tasks)
    chance = float(found.chance.mean())
    title = f"share of a column's energy in the directions that hold half of a row's; by chance {chance:.2f}"
    yield title, ("task", *names), _cells(names, found.shared.mean(dim=0).tolist())
    columns = ("start", "own", "others", "own/others", "worst", "interference")
    rows = [
        (rule, *(f"{value:.2g}" if index < 2 else _times(value) for index, value in enumerate(values)))
        for rule, values in ((rule, found.of_start(rule).values()) for rule in found.starts)
    ]
    yield f"energy that A of rank {found.rank} sees before training; |A h| of others / own", columns, rows


def _times(ratio: float) -> str:
    """Return a ratio to show; where the others are left untouched it is as large as rounding makes it."""
    return f"{ratio:.2f}" if ratio < 1000 else "> 1000"


def _cells(names: Sequence[str], table: Sequence[Sequence[float | None]]) -> list[tuple[str, ...]]:
    return [
        (name, *("-" if value is None else f"{value:.2f}" for value in row))
        for name, row in zip(names, table, strict=True)
    ]


def _labels(paths: Sequence[str]) -> list[str]:
    """Return names for the columns of a table: up to their first dot where that keeps them apart."""
    names = [label(path) for path in paths]
    short = [name.split(".")[0] for name in names]
    return short if len(set(short)) == len(short) else names


def _short(layer: str) -> str:
    """Return number and last part of a module path: 3.query."""
    parts = layer.split(".")
    return ".".join([*[part for part in parts if part.isdigit()][:1], parts[-1]])
