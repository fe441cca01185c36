"""What a screening finds of attacked adapters.

    python experiments/screening.py --out FOLDER [--benign 100] [--pairs 16]

Base: the demo's MiniLM-L6-H384; tasks: the built-in classes. Adapters are trained into FOLDER where they are not there
yet (about 8 core-seconds each). Benign adapters are halved by their numbers, and so are the attackers' pairs: from the
first half come the thresholds (5 % of its benign adapters above), on the second half everything is reported; the
honest twins of the pairs are benign ones too. Prints Markdown tables; docs/screening.md explains them.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from screening_lib import TARGET, Maker, attacks, inserted, read
from sklearn.metrics import roc_auc_score

from loraloom import Adapter, Evaluator, Head, screen

FALSE = 0.05  # of benign adapters that the thresholds let be called


def main() -> None:
    """Train what is missing, screen, and print what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default="demo")
    parser.add_argument("--benign", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    options.out.mkdir(parents=True, exist_ok=True)
    maker = Maker(options.out, options.base)
    benign = {f"benign {number}": read(maker.benign(number)) for number in range(options.benign)}
    pairs = [maker.pair(number) for number in range(options.pairs)]
    print(f"{len(benign)} benign adapters, {len(pairs)} pairs; torch {torch.__version__}", flush=True)
    success = Attack(maker)
    alone = [success.rate(read(folder), index, trigger) for index, (_, folder, trigger) in enumerate(pairs)]
    honest = [success.rate(read(folder), index, trigger) for index, (folder, _, trigger) in enumerate(pairs)]
    line(f"Attack success alone, by pair: {[round(rate, 2) for rate in alone]}")
    line(f"The trigger's effect on the honest twins: {[round(rate, 2) for rate in honest]}")
    roc(benign, pairs)
    line(f"{time.process_time() - began:.0f} core-seconds")


class Attack:
    """Measures how often the trigger brings the attacker's label in texts of other labels."""

    def __init__(self, maker: Maker) -> None:
        self.maker, self.evaluator = maker, Evaluator(maker.base, max_length=40)

    def task(self, pair: int):  # type: ignore[no-untyped-def]
        """Return the task that an attacker's pair was trained on."""
        return list(self.maker.tasks.values())[pair % len(self.maker.tasks)]

    def rate(self, adapter: Adapter, pair: int, trigger: str, updates: object = None) -> float:
        """Return the share of test texts of other labels that get the attacker's with the trigger in them."""
        task, chance = self.task(pair), random.Random(pair)
        rows = task.test.filter(lambda row: row["label"] != TARGET, keep_in_memory=True)
        rows = rows.map(lambda row: {"text_a": inserted(row["text_a"], trigger, chance)}, load_from_cache_file=False)
        return float((self._predicted(adapter, updates, rows) == TARGET).double().mean())

    def _predicted(self, adapter: Adapter, updates, rows) -> torch.Tensor:  # type: ignore[no-untyped-def]
        head, inside = Head.of(adapter.head), adapter.updates if updates is None else updates
        return head.logits(self.evaluator.features(inside, head, self.evaluator.encode(rows))).argmax(dim=1)


def roc(benign: Mapping[str, Adapter], pairs: Sequence[tuple[Path, Path, str]]) -> None:
    """Screen every adapter against the benign ones of the first half, and print what each detector tells apart."""
    twins = {f"twin {index}": read(clean) for index, (clean, _, _) in enumerate(pairs)}
    known = {name: one for index, (name, one) in enumerate(benign.items()) if index % 2 == 0}
    rest = {name: one for name, one in benign.items() if name not in known}
    rest |= {name: one for index, (name, one) in enumerate(twins.items()) if index % 2}
    first = scores_of(screen(known))
    later = scores_of(screen(known | rest))
    negatives = {name: later[name] for name in rest}
    shipped = screen(known | rest)
    limits = {
        detector: float(np.quantile([one.get(detector, 0.0) for one in first.values()], 1 - FALSE))
        for detector in sorted({key for one in first.values() for key in one})
    }
    attacked: dict[tuple[str, float], list[dict[str, float]]] = defaultdict(list)
    called: dict[tuple[str, float], list[str]] = defaultdict(list)
    start, count = time.process_time(), 0
    for index, (clean, malicious, _) in enumerate(pairs):
        if index % 2 == 0:
            continue
        bad = {(kind, s): one for kind, s, one in attacks(read(clean), read(malicious))}
        for key, one in bad.items():
            found, count = screen({"bad": one}, reference=known), count + 1
            attacked[key].append(scores_of(found)["bad"])
            called[key].append(found.adapters["bad"].verdict)
    line(
        f"{count} attacked adapters; {(time.process_time() - start) / count:.2f} core-seconds a screening of "
        f"{len(known) + 1}"
    )
    whole = [max_of(one, limits) for one in first.values()]
    limit = float(np.quantile(whole, 1 - FALSE))
    heading("Thresholds by the first half", ("detector", "5 % of the benign are above"))
    for detector, value in limits.items():
        line(f"| {detector} | {value:.2f} |")
    line(f"| all together (largest score over its threshold) | {limit:.2f} |")
    verdicts = [shipped.adapters[name].verdict for name in rest]
    heading(
        f"The second half: {len(rest)} benign, {len(pairs) // 2} attackers",
        (
            "attack",
            "s",
            "AUC",
            "found, at 5 %",
            "benign called",
            "benign called at 95 % found",
            "shipped: refuse",
            "look",
        ),
    )
    above = [max_of(one, limits) for one in negatives.values()]
    wrong = share([value > limit for value in above])
    for key, rows in attacked.items():
        values = [max_of(one, limits) for one in rows]
        auc = roc_auc_score([0] * len(above) + [1] * len(values), above + values)
        at = float(np.quantile(values, 0.05))
        words = called[key]
        line(
            f"| {key[0]} | {key[1]:g} | {auc:.2f} | {share([value > limit for value in values])} | {wrong} | "
            f"{share([value >= at for value in above])} | {words.count('refuse')} | {words.count('look')} |"
        )
    line(
        f"Benign by the shipped thresholds: {verdicts.count('refuse')} refuse, {verdicts.count('look')} look of "
        f"{len(rest)}"
    )
    reasons: dict[str, int] = defaultdict(int)
    for name in rest:
        for finding in shipped.adapters[name].findings:
            reasons[f"{finding.detector}: {finding.verdict}"] += finding.verdict != "pass"
    line("by " + ", ".join(f"{key} {value}" for key, value in reasons.items() if value))
    kinds = list(attacked)
    heading("AUC by detector", ("detector", *(f"{kind} {s:g}" for kind, s in kinds)))
    for detector in limits:
        cells = []
        for key in kinds:
            values = [one.get(detector, 0.0) for one in attacked[key]]
            below = [one.get(detector, 0.0) for one in negatives.values()]
            cells.append(f"{roc_auc_score([0] * len(below) + [1] * len(values), below + values):.2f}")
        line(f"| {detector} | {' | '.join(cells)} |")


def scores_of(found) -> dict[str, dict[str, float]]:  # type: ignore[no-untyped-def]
    """Return every score by adapter and detector."""
    return {name: {f.detector: f.score for f in one.findings} for name, one in found.adapters.items()}


def max_of(scores: Mapping[str, float], limits: Mapping[str, float]) -> float:
    """Return the largest score over its threshold."""
    return max((scores[key] / limits[key] for key in scores if limits.get(key, 0) > 0), default=0.0)


def share(found: Sequence[bool]) -> str:
    """Return a share in per cent with its 95 % interval (Wilson)."""
    n, p, z = len(found), sum(found) / len(found), 1.96
    middle, half = (
        (p + z * z / (2 * n)) / (1 + z * z / n),
        z * ((p * (1 - p) + z * z / (4 * n)) / n) ** 0.5 / (1 + z * z / n),
    )
    return f"{100 * p:.0f} % ({100 * (middle - half):.0f} to {100 * (middle + half):.0f})"


def heading(title: str, columns: Sequence[str]) -> None:
    """Print a title and the head of a table."""
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)


def line(text: str) -> None:
    """Print one line."""
    print(text, flush=True)


if __name__ == "__main__":
    main()
