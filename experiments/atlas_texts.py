"""Of which text, and of how many, must an atlas be? How much of what tasks feed the base lies in its loud half.

    python experiments/atlas_texts.py --data GLUE [--base demo]

GLUE holds a folder a task with train.jsonl. Text is what `loraloom atlas` takes where it is given none, or the training
texts of one task, which is then left out of the tasks. `held`: share of a task's token rows' energy, 200 texts a task,
in the directions that hold half of the text's energy, mean over layers and tasks; `most`: what as many directions
chosen from the task's own rows hold. `agrees`: share of the loud half that lies in that of the most texts, mean squared
cosine. Nothing is trained; query and value of the base, 48 tokens a text.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from datasets import Dataset
from study_tables import row, table
from torch import Tensor

from loraloom import (
    GLUE,
    Evaluator,
    Statistics,
    StatisticsSettings,
    base_folder,
    collect,
    generic_rows,
    loud_directions,
    read_table,
    share_seen,
    top_directions,
)

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
        return collect(evaluator, rows, given.targets.split(","), StatisticsSettings(max_length=48))

    tasks = {name: statistics(texts_of(given.data, name, TASK_TEXTS)) for name in GLUE}
    table("text", "texts", "tokens", "directions", "held", "most", "agrees")
    for text in given.texts.split(","):
        most = generic_rows(COUNTS[-1]) if text == BUILT_IN else texts_of(given.data, text, COUNTS[-1])
        found: dict[int, tuple[Statistics, Loud]] = {}
        for count in COUNTS:
            seen = statistics(most.select(range(count)))
            found[count] = (seen, {name: loud_directions([one], SHARE) for name, one in seen.moments.items()})
        seen_by = [one for name, one in tasks.items() if name != text]
        for count, (seen, loud) in found.items():
            row(text, count, seen.tokens, *figures(loud, found[COUNTS[-1]][1], seen_by))


def texts_of(data: Path, task: str, count: int) -> Dataset:
    """Return the texts of the first rows of a task's training file."""
    columns = ("text_a", "text_b")[: len(GLUE[task].text)]
    rows = read_table(str(data / task / "train.jsonl"), "train", columns).rows[:count]
    return Dataset.from_list([{name: one[name] for name in columns} for one in rows])


def figures(loud: Loud, full: Loud, tasks: Sequence[Statistics]) -> tuple[str, str, str, str]:
    """Return directions, held, most and agrees, as the table tells them."""
    pairs = [(task.moments[name], V) for task in tasks for name, V in loud.items()]
    held = mean(share_seen(moment, V.T) for moment, V in pairs)
    most = mean(share_seen(moment, top_directions(moment, V.shape[1])[1].T) for moment, V in pairs)
    agrees = mean(float((full[name].T @ V).square().sum()) / V.shape[1] for name, V in loud.items())
    directions = mean(V.shape[1] for V in loud.values())
    return f"{directions:.1f}", f"{held:.2f}", f"{most:.2f}", f"{agrees:.2f}"


if __name__ == "__main__":
    main()
