"""Of which text, and of how many, must an atlas be? How much of what tasks feed the base lies in its loud half.

    python benchmarks/atlas_texts.py --data GLUE [--base demo]

GLUE holds a folder a task with train.jsonl. Text is what `loraloom atlas` takes where it is given none, or the training
texts of one task, which is then left out of the tasks. `held`: share of a task's token rows' energy, 200 texts a task,
in the directions that hold half of the text's energy, mean over layers and tasks; `most`: what as many directions
chosen from the task's own rows hold. `agrees`: share of the loud half that lies in that of the most texts, mean squared
cosine. Nothing is trained; query and value of the base, 48 tokens a text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from datasets import Dataset
from torch import Tensor

from loraloom.base import base_folder
from loraloom.evaluation import Evaluator
from loraloom.spectra import share_seen, top_directions
from loraloom.stages import collect, generic_rows
from loraloom.statistics import Statistics
from loraloom.subspace import loud_directions
from loraloom.tasks.glue import GLUE

BUILT_IN, COUNTS, TASK_TEXTS, SHARE = "docstrings", (3, 10, 30, 100, 300, 1000), 200, 0.5
Loud = Mapping[str, Tensor]  # by layer's input


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of GLUE tasks")
    parser.add_argument("--base", default="demo")
    parser.add_argument("--targets", default="query,value", help="separated by commas (%(default)s)")
    parser.add_argument("--texts", default=f"{BUILT_IN},mnli,sst2", help="separated by commas (%(default)s)")
    given = parser.parse_args()
    evaluator = Evaluator(base_folder(given.base), max_length=48)

    def statistics(rows: Dataset) -> Statistics:
        return collect(evaluator, rows, given.targets.split(","), "token", 48, 32)

    tasks = {name: statistics(rows_of(given.data / name, TASK_TEXTS)) for name in GLUE}
    print("| text | texts | tokens | directions | held | most | agrees |\n|---|---|---|---|---|---|---|")
    for text in given.texts.split(","):
        found: dict[int, tuple[Statistics, Loud]] = {}
        for count in COUNTS:
            rows = generic_rows(count) if text == BUILT_IN else rows_of(given.data / text, count)
            seen = statistics(rows)
            found[count] = (seen, {name: loud_directions([one], SHARE) for name, one in seen.moments.items()})
        seen_by = [one for name, one in tasks.items() if name != text]
        for count, (seen, loud) in found.items():
            print(row(text, count, seen, loud, found[COUNTS[-1]][1], seen_by), flush=True)


def rows_of(folder: Path, count: int) -> Dataset:
    """Return the texts of the first rows of a task's training file."""
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    rows = [json.loads(line) for line in lines]
    return Dataset.from_dict({key: [row[key] for row in rows] for key in ("text_a", "text_b") if key in rows[0]})


def row(text: str, count: int, seen: Statistics, loud: Loud, full: Loud, tasks: Sequence[Statistics]) -> str:
    """Return one row of the table."""
    pairs = [(task.moments[name], V) for task in tasks for name, V in loud.items()]
    held = mean(share_seen(moment, V.T) for moment, V in pairs)
    most = mean(share_seen(moment, top_directions(moment, V.shape[1])[1].T) for moment, V in pairs)
    agrees = mean(float((full[name].T @ V).square().sum()) / V.shape[1] for name, V in loud.items())
    directions = mean(V.shape[1] for V in loud.values())
    return f"| {text} | {count} | {seen.tokens} | {directions:.1f} | {held:.2f} | {most:.2f} | {agrees:.2f} |"


if __name__ == "__main__":
    main()
