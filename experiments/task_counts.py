"""A study's adapters merged two, four and six at a time: does a start help more where more tasks are merged?

    python experiments/task_counts.py study/ [more/ ...] [--rules task_arithmetic,tsv] [--baseline LoRA]

Groups are cut from the tasks of the recipe in an order drawn once, the same for all inits and seeds; tasks that do not
fill a group are left out. Scales are chosen on held-out rows for each group, the heads as trained and aligned apart,
and test rows report. `kept` is the merged average over that of the same adapters alone. Nothing is trained. Relative
paths of the study's recipe start at the working folder: call it in the folder of the recipe.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from study_rows import Part
from study_tables import paired, row, table

from loraloom import Adapter, Head, align_heads, build_task, merge, read_adapter, scored

COUNTS, SCALES = (2, 4, 6), (0.3, 0.5, 0.75, 1.0)


class Run:
    """The adapters of one init and seed."""

    def __init__(self, part: Part, init: str, seed: int) -> None:
        self.part, self.label = part, f"{init}.s{seed}"
        self.tasks = {name: build_task(name, settings) for name, settings in part.recipe.tasks.items()}
        self.adapters = {name: read_adapter(part.stage("train", f"{self.label}.{name}")) for name in self.tasks}
        self.heads = {name: Head.of(adapter.head, name) for name, adapter in self.adapters.items()}
        evaluator = part.evaluator
        count = part.recipe.alignment.texts
        self.texts = {name: evaluator.encode(task.sample("train", count)) for name, task in self.tasks.items()}
        self.own = {
            name: evaluator.features(adapter.updates, self.heads[name], self.texts[name])
            for name, adapter in self.adapters.items()
        }
        self.alone = {
            one.task: 100 * one.score.value for one in part.result.singles if (one.init, one.seed) == (init, seed)
        }

    def merged(self, names: Sequence[str], rule: str) -> dict[str, float]:
        """Return by heads the average test score in points, at the scale that held-out rows choose."""
        adapter = merge({name: self.adapters[name] for name in names}, rule, scale=1.0).adapter
        at = {scale: adapter.scaled(scale) for scale in SCALES}
        heads = {scale: {"as trained": self.heads, "aligned": self._aligned(names, at[scale])} for scale in SCALES}
        heldout = {scale: self._averages(at[scale], heads[scale], names, "heldout") for scale in SCALES}
        best = {kind: max(SCALES, key=lambda scale: heldout[scale][kind]) for kind in heldout[SCALES[0]]}
        tests = {scale: self._averages(at[scale], heads[scale], names, "test") for scale in set(best.values())}
        return {kind: tests[scale][kind] for kind, scale in best.items()}

    def _aligned(self, names: Sequence[str], adapter: Adapter) -> dict[str, Head]:
        features = {
            name: self.part.evaluator.features(adapter.updates, self.heads[name], self.texts[name]) for name in names
        }
        own = {name: self.own[name] for name in names}
        heads = {name: self.heads[name] for name in names}
        return align_heads(heads, own, features, ridge=self.part.recipe.alignment.ridge)

    def _averages(
        self, adapter: Adapter, heads: Mapping[str, Mapping[str, Head]], names: Sequence[str], split: str
    ) -> dict[str, float]:
        """Return by heads the average in points; one forward pass serves all heads."""
        found: dict[str, list[float]] = defaultdict(list)
        for name in names:
            task, evaluator = self.tasks[name], self.part.evaluator
            features = evaluator.features(adapter.updates, self.heads[name], evaluator.encode(getattr(task, split)))
            for kind, chosen in heads.items():
                found[kind].append(100 * scored(task, split, chosen[name], features).value)
        return {kind: mean(values) for kind, values in found.items()}


def groups(names: Sequence[str], count: int) -> list[list[str]]:
    """Return disjoint groups of `count` tasks."""
    drawn = random.Random(0).sample(list(names), len(names))
    return [drawn[i : i + count] for i in range(0, len(drawn) - count + 1, count)]


def main() -> None:
    """Merge and count every group, and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", type=Path, nargs="+")
    parser.add_argument("--rules", default="task_arithmetic,tsv", help="separated by commas (%(default)s)")
    parser.add_argument("--baseline", default="LoRA")
    given = parser.parse_args()
    averages: dict[tuple[int, str, str], dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    alone: dict[tuple[int, str], dict[int, float]] = defaultdict(dict)
    for part in map(Part, given.studies):
        for init, seed in dict.fromkeys((one.init, one.seed) for one in part.result.singles):
            run = Run(part, init, seed)
            for count in COUNTS:
                chosen = groups(list(run.tasks), count)
                alone[count, init][seed] = mean(run.alone[name] for names in chosen for name in names)
                for rule in given.rules.split(","):
                    print(f"{run.label}: {count} tasks by {rule}", file=sys.stderr, flush=True)
                    found = [run.merged(names, rule) for names in chosen]
                    for heads in found[0]:
                        averages[count, rule, heads][init][seed] = mean(one[heads] for one in found)
    print_table(averages, alone, given.baseline)


def print_table(
    averages: Mapping[tuple[int, str, str], Mapping[str, dict[int, float]]],
    alone: Mapping[tuple[int, str], Mapping[int, float]],
    baseline: str,
) -> None:
    """Print averages over groups and seeds, and differences to the baseline within one seed."""
    table("tasks", "rule", "heads", "init", "seeds", "alone", "merged", "kept", f"against {baseline}")
    for (count, rule, heads), inits in averages.items():
        for init, seeds in inits.items():
            single, merged = mean(alone[count, init].values()), mean(seeds.values())
            told = paired(seeds, inits.get(baseline, {}))
            row(
                count,
                rule,
                heads,
                init,
                len(seeds),
                f"{single:.1f}",
                f"{merged:.1f}",
                f"{100 * merged / single:.1f} %",
                told,
            )


if __name__ == "__main__":
    main()
