"""What files tell before a training or a merge: adapter folders, statistics, or both. For the command `inspect`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraloom.adapters.peft import files_by_task, read_adapter, read_provenance, task_of
from loraloom.adapters.update import Adapter
from loraloom.analysis.interference import Responses, responses
from loraloom.analysis.outlook import Outlook, outlook
from loraloom.analysis.overlap import Overlaps, overlaps
from loraloom.analysis.prediction import Prediction, predict
from loraloom.errors import raise_problems
from loraloom.progress import Reporter
from loraloom.statistics.file import Statistics
from loraloom.statistics.fit import cover_problems


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter folder holds.

    base: name of its base model.
    layers: layers with an update.
    rank: the largest rank of an update.
    energy: the squared Frobenius norm of all updates together, |dW|^2.
    heads: the tasks that it has a head for.
    made_by: what wrote it, as loraloom.json tells; None where nothing does.
    """

    base: str
    layers: int
    rank: int
    energy: float
    heads: list[str]
    made_by: str | None


@dataclass(frozen=True)
class Inspection:
    """Facts of every file, and what they tell together; None where the files do not suffice for it.

    adapters, statistics: by path, in the order given; of statistics, `Statistics.contents`.
    own: the path of the statistics of an adapter's own task, by the adapter's, where a file is.
    shared: overlaps of two or more adapters. outlook: of two or more statistics, where there is no adapter.
    responses: of adapters to statistics. prediction: of the sum of two or more adapters; None too where an adapter has
    no statistics of its own.
    """

    adapters: dict[str, AdapterFacts]
    statistics: dict[str, dict[str, Any]]
    own: dict[str, str]
    shared: Overlaps | None
    outlook: Outlook | None
    responses: Responses | None
    prediction: Prediction | None

    def energy_shares(self) -> dict[str, float]:
        """Return each adapter's share of the sum of all their energies, by path."""
        total = sum(one.energy for one in self.adapters.values()) or 1.0
        return {path: one.energy / total for path, one in self.adapters.items()}

    def without_own(self) -> list[str]:
        """Return the adapters for which no statistics given are those of their own task; all are others to these."""
        return [name for name in self.adapters if self.statistics and name not in self.own]


def inspect_paths(paths: Sequence[str | Path], rank: int = 8, reporter: Reporter | None = None) -> Inspection:
    """Return what adapter folders and statistics files tell.

    Two or more adapters: what their spaces share. Statistics alone, two or more: the outlook for adapters to come.
    Both: responses of every adapter to every task's inputs and, where each of two or more adapters has statistics of
    its own, the predicted error of their sum.

    paths: adapter folders and statistics files, in any order.
    rank: rank of the adapters to come, for statistics alone.
    reporter: is told how far the work is.

    Raises LoraloomError for files that cannot be read or do not fit.
    """
    shown = reporter or Reporter(quiet=True)
    given = [Path(path) for path in paths]
    folders = [path for path in given if path.is_dir()]
    adapters = {str(path): read_adapter(path) for path in folders}
    statistics = {str(path): Statistics.load(path) for path in given if path not in folders}
    own = own_statistics(list(adapters), list(statistics))
    return Inspection(
        adapters={str(path): _adapter_facts(adapters[str(path)], path) for path in folders},
        statistics={name: seen.contents() for name, seen in statistics.items()},
        own=own,
        shared=overlaps(adapters) if len(adapters) > 1 else None,
        outlook=outlook(statistics, rank, shown) if not adapters and len(statistics) > 1 else None,
        responses=_responses(adapters, statistics, shown) if adapters and statistics else None,
        prediction=_predicted(adapters, statistics, own, shown),
    )


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


def _adapter_facts(adapter: Adapter, path: Path) -> AdapterFacts:
    provenance = read_provenance(path)
    heads = {*files_by_task(path, "heads"), *([adapter.task] if adapter.head else [])}
    return AdapterFacts(
        base=adapter.base,
        layers=len(adapter.updates),
        rank=adapter.rank,
        energy=sum(update.energy() for update in adapter.updates.values()),
        heads=sorted(heads),
        made_by=provenance.get("made_by") or provenance.get("kind"),
    )


def _responses(adapters: Mapping[str, Adapter], statistics: Mapping[str, Statistics], reporter: Reporter) -> Responses:
    pairs = [(name, adapter, seen) for name, adapter in adapters.items() for seen in statistics.values()]
    problems = [problem for pair in pairs for problem in cover_problems(*pair)]
    raise_problems("cannot inspect", list(dict.fromkeys(problems)), "collect them on the targets of all adapters")
    return responses(adapters, statistics, reporter)


def _predicted(
    adapters: Mapping[str, Adapter], statistics: Mapping[str, Statistics], own: Mapping[str, str], reporter: Reporter
) -> Prediction | None:
    if len(adapters) < 2 or len(own) < len(adapters):
        return None
    return predict(adapters, {name: statistics[own[name]] for name in adapters}, reporter)
