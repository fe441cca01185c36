"""What a merging rule needs beside the adapters, made of each task's texts: all who merge ask here, and get the same.

It loads transformers, so `loraloom.merging` does not import it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

from loraloom.adapters.heads import Head
from loraloom.adapters.update import Adapter
from loraloom.merging.registry import Rule
from loraloom.model.probe import TaskProbe
from loraloom.model.runner import Evaluator
from loraloom.settings import StatisticsSettings
from loraloom.statistics.file import Statistics
from loraloom.statistics.texts import collect
from loraloom.tasks.task import Task


def supply(
    rule: Rule,
    adapters: Mapping[str, Adapter],
    tasks: Mapping[str, Task],
    evaluator: Callable[[], Evaluator],
    reading: StatisticsSettings,
    texts: int,
    *,
    known: Mapping[str, Statistics] | Sequence[Statistics] = (),
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Mapping[str, Statistics] | Sequence[Statistics], TaskProbe | None]:
    """Return the statistics and the probe that `rule` needs to merge `adapters`; none, and None, where it needs none.

    `tasks` go by adapter's name. `evaluator` loads the base model; it is called once, or never where nothing is to be
    read. Statistics are of `reading.texts` training texts a task, unless they are `known`, which are returned as they
    are. The probe has `texts` training texts a task, with their labels; `progress` is told of the rule's steps.
    Raises LoraloomError for an adapter without a head where the rule needs a probe.
    """
    load = functools.cache(evaluator)
    if "moments" in rule.supplied and not known:
        targets = sorted(next(iter(adapters.values())).shapes)
        known = {
            name: collect(load(), tasks[name].sample("train", reading.texts), targets, reading) for name in adapters
        }
    if not rule.whole:
        return known, None
    heads = [Head.of(adapter.head, adapter.name) for adapter in adapters.values()]
    return known, _probe(load(), [tasks[name] for name in adapters], heads, texts, progress)


def _probe(
    evaluator: Evaluator,
    tasks: Sequence[Task],
    heads: Sequence[Head],
    texts: int,
    progress: Callable[[int, int], None] | None,
) -> TaskProbe:
    rows = [task.sample("train", texts) for task in tasks]
    return TaskProbe(
        evaluator,
        heads,
        [evaluator.encode(found) for found in rows],
        [task.label_tensor(found) for task, found in zip(tasks, rows, strict=True)],
        [task.kind.regression for task in tasks],
        progress=progress,
    )
