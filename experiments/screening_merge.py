"""What is left of a backdoor after a merge, by rule, with and without what `loraloom merge` does against it.

    python experiments/screening_merge.py --out FOLDER --rows ROWS.jsonl

FOLDER is that of screening.py, with its adapters trained. An attacker is one of its pairs whose trigger alone turns at
most a quarter of the honest twin's answers: so much is known before any merge. Each merge is of four tasks: what the
attacker hands in, and an honest adapter of each of the other three tasks, drawn by the attacker's number; the rule has
its own scale. Measured on test rows of other labels than the attacker's, by the head that was handed in:

    success   share that gets the attacker's label with the trigger in the text
    without   the same share of the same texts without the trigger, in the same merge

and on all test rows the accuracy of each task. The control is the merge with the honest twin in place of what was
handed in, and the twin's head. Rows are added to ROWS as they come, and those that are there are kept; prints Markdown.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from screening_lib import TARGET, TASKS, Maker, attacks, heading, inserted, line, read

from loraloom import Adapter, Evaluator, Head, Update, merge, screen

RULES = ("task_arithmetic", "ties", "tsv")
TWIN = ("honest twin", 1.0)
HANDED_IN = (TWIN, ("plain", 1.0), ("amplified", 3.0), ("amplified", 8.0))
MENDS: dict[str, dict[str, Any]] = {"as they are": {"normalise": "none"}, "default": {}, "clip 1": {"clip": 1.0}}
TRIGGERED, TESTED = 48, 32  # texts an attacker, and a task
EFFECT = 0.25  # of a trigger on the honest twin alone, from which on a pair is no attacker here
REFERENCES = 20  # honest adapters that a careful team compares with
DRAWS = 2000  # of the bootstrap over attackers

Row = dict[str, Any]
Encoded = list[dict[str, list[int]]]


def main() -> None:
    """Merge and measure what is not in the rows yet, and print what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--base", default="demo")
    parser.add_argument("--pairs", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = list(map(json.loads, options.rows.read_text().splitlines())) if options.rows.exists() else []
    done = {(row["pair"], row["kind"], row["s"], row["rule"], row["mend"]) for row in rows}
    merges = Merges(Maker(options.out, options.base))
    cases = [case for case in map(merges.case, range(options.pairs)) if case]
    for case in cases:
        for row in merges.measured(case, done):
            rows.append(row)
            with open(options.rows, "a") as file:
                file.write(json.dumps(row) + "\n")
    tables(rows)
    heading("Verdicts", ("handed in", "s", "among four: refuse", "look", "beside references: refuse", "look", "of"))
    for kind, s in HANDED_IN:
        words = [[case.verdict((kind, s), beside=beside) for case in cases] for beside in (False, True)]
        cells = [str(found.count(word)) for found in words for word in ("refuse", "look")]
        line(f"| {kind} | {s:g} | {' | '.join(cells)} | {len(cases)} |")


@dataclass(frozen=True)
class Case:
    """One attacker: its task, what it may hand in, who it is merged with, honest references, and texts of its task.

    texts, triggered: of other labels than the attacker's, as they are and with the trigger.
    """

    pair: int
    own: str
    handed: dict[tuple[str, float], Adapter]
    others: dict[str, Adapter]
    known: dict[str, Adapter]
    texts: Encoded
    triggered: Encoded

    def verdict(self, handed: tuple[str, float], *, beside: bool) -> str:
        """Return the verdict on what is handed in, as a merge has it, or beside the references."""
        given = {self.own: self.handed[handed]}
        found = screen(given, reference=self.known) if beside else screen({**given, **self.others})
        return found.adapters[self.own].verdict


class Merges:
    """Merges what attackers hand in with honest adapters of other tasks, and measures them."""

    def __init__(self, maker: Maker) -> None:
        self.maker, self.evaluator = maker, Evaluator(maker.base, max_length=40)
        self.tests = {name: self._tested(task.sample("test", TESTED)) for name, task in maker.tasks.items()}

    def case(self, pair: int) -> Case | None:
        """Return what an attacker's merges are made of; None where its trigger is none: the twin heeds it too."""
        clean, malicious, trigger = self.maker.pair(pair)
        own, twin, chance = TASKS[pair % len(TASKS)], read(clean), random.Random(pair)
        test = self.maker.tasks[own].test.filter(lambda row: row["label"] != TARGET, keep_in_memory=True)
        test = list(test)[:TRIGGERED]
        triggered = self._encoded([{**row, "text_a": inserted(row["text_a"], trigger, chance)} for row in test])
        if self._share(triggered, twin, twin.updates) > EFFECT:
            return None
        others = {
            task: read(self.maker.benign(chance.randrange(25) * len(TASKS) + TASKS.index(task)))
            for task in TASKS
            if task != own
        }
        known = {f"honest {one}": read(self.maker.benign(one)) for one in chance.sample(range(100), REFERENCES)}
        handed = {(kind, s): one for kind, s, one in attacks(twin, read(malicious)) if (kind, s) in HANDED_IN}
        return Case(pair, own, {TWIN: twin, **handed}, others, known, self._encoded(test), triggered)

    def measured(self, case: Case, done: set[tuple[Any, ...]]) -> Iterator[Row]:
        """Yield a row for each rule, mend and adapter that an attacker may hand in, but for those that are done."""
        for (kind, s), one in case.handed.items():
            members = {case.own: one, **case.others}
            for rule, mend in itertools.product(RULES, MENDS):
                if (case.pair, kind, s, rule, mend) in done:
                    continue
                updates = merge(members, rule, **MENDS[mend]).adapter.updates
                yield {
                    "pair": case.pair,
                    "kind": kind,
                    "s": s,
                    "rule": rule,
                    "mend": mend,
                    "success": self._share(case.triggered, one, updates),
                    "without": self._share(case.texts, one, updates),
                    "accuracy": {name: self._accuracy(name, member, updates) for name, member in members.items()},
                }

    def _share(self, texts: Encoded, adapter: Adapter, updates: Mapping[str, Update]) -> float:
        """Return the share of texts that get the attacker's label by an adapter's head."""
        return float((self._labels(texts, adapter, updates) == TARGET).double().mean())

    def _accuracy(self, task: str, adapter: Adapter, updates: Mapping[str, Update]) -> float:
        texts, labels = self.tests[task]
        return float((self._labels(texts, adapter, updates) == torch.tensor(labels)).double().mean())

    def _labels(self, texts: Encoded, adapter: Adapter, updates: Mapping[str, Update]) -> torch.Tensor:
        head = Head.of(adapter.head)
        return head.logits(self.evaluator.features(updates, head, texts)).argmax(dim=1)

    def _tested(self, rows: Dataset) -> tuple[Encoded, list[int]]:
        return self.evaluator.encode(rows), rows["label"]

    def _encoded(self, rows: Sequence[Row]) -> Encoded:
        return self.evaluator.encode(Dataset.from_list(list(rows)))


def tables(rows: list[Row]) -> None:
    """Print success and accuracy by rule, mend and what was handed in, with intervals over attackers."""
    measures: dict[str, Callable[[Row], float]] = {
        "Success": lambda row: row["success"],
        "Success less the share without the trigger": lambda row: row["success"] - row["without"],
        "Accuracy of the attacker's task": lambda row: row["accuracy"][TASKS[row["pair"] % len(TASKS)]],
        "Accuracy over the four tasks": lambda row: float(np.mean(list(row["accuracy"].values()))),
    }
    columns = [(rule, mend) for rule in RULES for mend in MENDS]
    for title, value in measures.items():
        heading(f"{title}, %", ("handed in", "s", *(f"{rule}, {mend}" for rule, mend in columns)))
        for kind, s in HANDED_IN:
            cells = [interval([value(row) for row in chosen(rows, kind, s, *column).values()]) for column in columns]
            line(f"| {kind} | {s:g} | {' | '.join(cells)} |")
    heading("Success less the honest twin's, %", ("handed in", "s", *(f"{rule}, {mend}" for rule, mend in columns)))
    for kind, s in HANDED_IN[1:]:
        cells = []
        for column in columns:
            control = chosen(rows, *TWIN, *column)
            own = chosen(rows, kind, s, *column)
            cells.append(interval([own[pair]["success"] - control[pair]["success"] for pair in own]))
        line(f"| {kind} | {s:g} | {' | '.join(cells)} |")


def chosen(rows: list[Row], kind: str, s: float, rule: str, mend: str) -> dict[int, Row]:
    """Return one row for each attacker."""
    wanted = (kind, s, rule, mend)
    return {row["pair"]: row for row in rows if (row["kind"], row["s"], row["rule"], row["mend"]) == wanted}


def interval(values: list[float]) -> str:
    """Return the mean in per cent with its 95 % interval, by a bootstrap over attackers."""
    if not values:
        return "-"
    drawn = np.random.default_rng(0).choice(values, (DRAWS, len(values))).mean(axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return f"{100 * float(np.mean(values)):.0f} ({100 * low:.0f} to {100 * high:.0f})"


if __name__ == "__main__":
    main()
