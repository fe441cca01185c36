"""What a merging rule needs beside the adapters, made of each task's texts: all who merge ask here, and get the same.

It loads transformers, so `loraloom.merging` does not import it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

from loraloom.adapters.heads import Head
from loraloom.adapters.update import Adapter
from loraloom.errors import LoraloomError, first_few
from loraloom.merging.distillation import Distiller
from loraloom.merging.folders import Supplied
from loraloom.merging.options import Normalise
from loraloom.merging.registry import Probe, Rule
from loraloom.model.generator import Generator
from loraloom.model.probe import AnswerProbe, TaskProbe
from loraloom.model.runner import Evaluator
from loraloom.settings import StatisticsSettings
from loraloom.statistics.file import Statistics
from loraloom.statistics.texts import collect
from loraloom.tasks.task import Task


def supply(
    rule: Rule,
    adapters: Mapping[str, Adapter],
    tasks: Mapping[str, Task],
    model: Callable[[], Evaluator | Generator],
    reading: StatisticsSettings,
    texts: int,
    *,
    known: Mapping[str, Statistics] | Sequence[Statistics] = (),
    normalise: Normalise = "none",
    progress: Callable[[int, int], None] | None = None,
    distiller: Callable[[], Distiller] | None = None,
) -> Supplied:
    """Return the statistics, the probe and the distiller that `rule` needs to merge `adapters`; None where not needed.

    adapters, tasks: by adapter's name.
    model: loads the base model; it is called once, or never where nothing is to be read.
    reading: of which texts, and how, statistics are collected: of `reading.texts` training texts a task.
    texts: training texts a task, with their labels, that the probe has.
    known: statistics that are there already; they are returned as they are.
    normalise: how adapters are made equally loud; "response" takes statistics, whatever the rule.
    progress: is told of the rule's steps, those done and all.
    distiller: makes what trains a merge, for the rule that does; the training room is not known here.

    Raises LoraloomError for an adapter without a head where the rule needs a probe, and for tasks whose answers are
    written where it needs heads.
    """
    written = [name for name, task in tasks.items() if task.kind.generates]
    if rule.heads and written:
        raise LoraloomError(
            f"rule {rule.name!r} needs heads, and the answers of {first_few(written)} are written",
            "choose another rule: `loraloom rules` tells what each needs",
        )
    load = functools.cache(model)
    if reads_inputs(rule, normalise) and not known:
        # a task may read what only another's adapter changes
        targets = sorted({module for adapter in adapters.values() for module in adapter.shapes})
        known = {
            name: collect(load(), tasks[name].sample("train", reading.texts), targets, reading) for name in adapters
        }
    probe = probe_of(load(), adapters, tasks, texts, progress) if "probe" in rule.supplied else None
    return known, probe, distiller() if distiller and rule.distils else None


def reads_inputs(rule: Rule, normalise: Normalise) -> bool:
    """Tell whether a merge takes statistics of each task's inputs."""
    return "moments" in rule.supplied or normalise == "response"


def probe_of(
    model: Evaluator | Generator,
    adapters: Mapping[str, Adapter],
    tasks: Mapping[str, Task],
    texts: int,
    progress: Callable[[int, int], None] | None = None,
) -> Probe:
    """Return the probe of `texts` training texts a task, with their labels, each under the head of its adapter.

    model: the base model; of tasks whose answers are written one that writes.

    adapters, tasks: by adapter's name.

    Raises LoraloomError for an adapter without a head.
    """
    own = [tasks[name] for name in adapters]
    rows = [task.sample("train", texts) for task in own]
    if isinstance(model, Generator):
        return AnswerProbe(model, [model.encode(found) for found in rows], progress=progress)
    return TaskProbe(
        model,
        [Head.of(adapter.head, adapter.name) for adapter in adapters.values()],
        [model.encode(found) for found in rows],
        [task.label_tensor(found) for task, found in zip(own, rows, strict=True)],
        [task.headed.regression for task in own],
        progress=progress,
    )
