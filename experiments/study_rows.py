"""A study's adapters on more dev rows than it counted: averages with standard errors paired over seeds and over rows.

    python experiments/study_rows.py study/ [more/ ...] --out rows/ [--rows 500] [--rules task_arithmetic,tsv]

A study counts few test rows, so that many merges can be counted. This takes its trained and merged adapters at the
scales that its held-out rows chose, and counts the first --rows dev rows of every task (fewer where it has fewer) that
are not among its training rows. Logits stay in --out and are taken from there the next time. Relative paths of the
study's recipe start at the working folder: call it in the folder of the recipe.

A difference to the baseline is taken within one seed. Its first error is that of the mean over seeds (the same rows,
adapters trained anew), its second that over rows: the spread of the same mean under 200 resamples of every task's rows,
the same rows for all inits and seeds. They are not to be added up: seeds differ by rows too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import mean

import numpy
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from study_tables import paired, row, table
from torch import Tensor

from loraloom import (
    Adapter,
    Evaluator,
    Head,
    Recipe,
    StudyResult,
    Task,
    align_heads,
    base_folder,
    build_task,
    labels,
    merged_adapters,
    metric_value,
    read_adapter,
)

RESAMPLES = 200
ALONE = "alone"


@dataclass(frozen=True)
class Cell:
    """What one row of a table is about, for one seed. A `rule` of ALONE is the single-task adapters."""

    init: str
    seed: int
    rule: str
    aligned: bool

    @property
    def file(self) -> str:
        """Return the name of the file that holds its logits by task."""
        return f"{self.init}.s{self.seed}.{self.rule}.{'aligned' if self.aligned else 'as-trained'}.safetensors"


class Part:
    """One study folder: its adapters of one init and seed or more, on one base model."""

    def __init__(self, folder: Path, rows: int | None = None) -> None:
        self.folder, self.rows = folder, rows
        self.result = StudyResult.load(folder / "results.json")
        self.recipe = Recipe.model_validate(self.result.recipe)
        self._features: dict[tuple[str, str], dict[str, Tensor]] = {}

    @cached_property
    def evaluator(self) -> Evaluator:
        """The base model."""
        return Evaluator(base_folder(self.recipe.base), max_length=self.recipe.training.max_length)

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """The tasks as trained, but with other test rows: dev rows, less those that were trained on."""
        found = {}
        for name, settings in self.recipe.tasks.items():
            task = build_task(name, settings)
            dev = build_task(name, settings.model_copy(update={"test_rows": None})).test
            columns = task.text_columns
            seen = set(zip(*(task.train[column] for column in columns), strict=True))
            texts = zip(*(dev[column] for column in columns), strict=True)
            fresh = [index for index, text in enumerate(texts) if text not in seen]
            found[name] = replace(task, test=dev.select(fresh[: self.rows]))
        return found

    def cells(self, rules: list[str]) -> Iterator[tuple[Cell, float]]:
        """Yield what to count, with the scale that held-out rows chose."""
        for init, seed in dict.fromkeys((one.init, one.seed) for one in self.result.singles):
            yield Cell(init, seed, ALONE, False), 1.0
            for one in self.result.merges:
                if (one.init, one.seed, one.split) == (init, seed, "test") and one.rule in rules:
                    yield Cell(init, seed, one.rule, one.aligned), one.scale

    def stage(self, kind: str, label: str) -> Path:
        """Return the adapter that the study made, the only one of this name."""
        (found,) = (self.folder / "stages" / kind).glob(f"{label}-*")
        return found / "adapter"

    def count(self, cell: Cell, scale: float) -> dict[str, Tensor]:
        """Return by task the logits (k, outputs) of the test rows."""
        label = f"{cell.init}.s{cell.seed}"
        single = {name: read_adapter(self.stage("train", f"{label}.{name}")) for name in self.tasks}
        heads = {name: Head.of(adapter.head, name) for name, adapter in single.items()}
        if cell.rule == ALONE:
            features = self.features(label, single, heads, "test")
            return {name: heads[name].logits(features[name]) for name in self.tasks}
        merged = merged_adapters(self.stage("merge", f"{label}.{cell.rule}"), scale, self.tasks)
        key = f"{label}.{cell.rule}.x{scale:g}"
        features = self.features(key, merged, heads, "test")
        if cell.aligned:
            own = self.features(label, single, heads, "unlabelled")
            shifted = self.features(key, merged, heads, "unlabelled")
            heads = align_heads(heads, own, shifted, ridge=self.recipe.alignment.ridge)
        return {name: heads[name].logits(features[name]) for name in self.tasks}

    def features(
        self, key: str, adapters: Mapping[str, Adapter], heads: Mapping[str, Head], split: str
    ) -> dict[str, Tensor]:
        """Return by task what its head reads of test rows, or of the texts to align on; once for every `key`."""
        if (key, split) not in self._features:
            found = {}
            for name, task in self.tasks.items():
                rows = task.test if split == "test" else task.sample("train", self.recipe.alignment.texts)
                texts = self.evaluator.encode(rows)
                found[name] = self.evaluator.features(adapters[name].updates, heads[name], texts)
            self._features[key, split] = found
        return self._features[key, split]


def main() -> None:
    """Count what is not counted yet, and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=500, help="of every task (%(default)s)")
    parser.add_argument("--rules", default="task_arithmetic,ties,tsv", help="separated by commas (%(default)s)")
    parser.add_argument("--baseline", default="LoRA")
    given = parser.parse_args()
    parts = [Part(folder, given.rows) for folder in given.studies]
    if len({part.result.content_sha256 for part in parts}) > 1:
        parser.error("these studies are not of the same rows")
    samples = {}
    for part in parts:
        for cell, scale in part.cells(given.rules.split(",")):
            path = given.out / str(given.rows) / cell.file
            if not path.exists():
                logits = part.count(cell, scale)
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file(logits, path)
            samples[cell] = resampled(parts[0].tasks, load_file(path))
    print_counts(parts[0].tasks)
    print_table(samples, given.baseline)


def resampled(tasks: Mapping[str, Task], logits: Mapping[str, Tensor]) -> NDArray[numpy.float64]:
    """Return (1 + RESAMPLES,) averages over tasks in points: of all rows, then of rows drawn with replacement."""
    found = numpy.zeros(1 + RESAMPLES)
    for name, task in tasks.items():
        true, given = labels(task, "test"), logits[name]
        draw = torch.Generator().manual_seed(0)
        for index in range(1 + RESAMPLES):
            rows = torch.randint(len(true), (len(true),), generator=draw) if index else torch.arange(len(true))
            found[index] += 100 * metric_value(task.metric, given[rows], true[rows]) / len(tasks)
    return found


def print_counts(tasks: Mapping[str, Task]) -> None:
    """Print how many rows are counted."""
    print(f"Rows: {', '.join(f'{name} {len(task.test)}' for name, task in tasks.items())}.\n")


def print_table(samples: Mapping[Cell, NDArray[numpy.float64]], baseline: str) -> None:
    """Print averages over seeds, shares of the single-task average, and differences to the baseline."""
    table("rule", "heads", "init", "seeds", "average", "kept", f"against {baseline}: seeds", "rows")
    for init, rule, aligned in _in_order(samples):
        seeds = {
            cell.seed: values
            for cell, values in samples.items()
            if (cell.init, cell.rule, cell.aligned) == (init, rule, aligned)
        }
        base = {seed: samples[cell] for seed in seeds if (cell := Cell(baseline, seed, rule, aligned)) in samples}
        average = mean(values[0] for values in seeds.values())
        alone = mean(samples[Cell(init, seed, ALONE, False)][0] for seed in seeds)
        told, spread = "", ""
        if base and init != baseline:
            told = paired({seed: seeds[seed][0] for seed in base}, {seed: values[0] for seed, values in base.items()})
            resamples = numpy.mean([seeds[seed][1:] - values[1:] for seed, values in base.items()], axis=0)
            spread = f"±{resamples.std(ddof=1):.1f}"
        heads = "aligned" if aligned else "as trained"
        row(rule, heads, init, len(seeds), f"{average:.1f}", f"{100 * average / alone:.1f} %", told, spread)


def _in_order(samples: Mapping[Cell, NDArray[numpy.float64]]) -> list[tuple[str, str, bool]]:
    """Return init, rule and heads of every row of the table: by rule, heads, and the order of the inits."""
    inits, rules = (list(dict.fromkeys(getattr(cell, name) for cell in samples)) for name in ("init", "rule"))
    found = {(cell.init, cell.rule, cell.aligned) for cell in samples}
    return sorted(found, key=lambda key: (rules.index(key[1]), key[2], inits.index(key[0])))


if __name__ == "__main__":
    main()
