"""What a screening finds of attacked adapters.

    python experiments/screening.py --out FOLDER [--benign 100] [--pairs 16] [--fresh 8]

Base: the demo's MiniLM-L6-H384; tasks: the built-in classes. Adapters are trained into FOLDER where they are not there
yet (about 8 core-seconds each). Every adapter is screened by itself against all benign ones, of which a benign one is
left out when it is screened: all are compared with the same. The scores are kept in FOLDER/scores.json. Then the benign
adapters are halved at random, many times: both halves with as many of each task and of ranks above and below 16, and of
neighbours by learning rate one each. Limits come from the first half alone, 5 % of which may be above; reported are the
other half and every attacker, of which no limit knows anything. Honest twins are the attackers' own B: trained as the
attackers are, harder than most benign ones. `--fresh` trains as many pairs more, and three benign adapters for each,
that no threshold and no choice of signs has seen. Prints Markdown tables; docs/screening.md explains them.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from screening_lib import AMPLIFIED, Maker, Setting, attacks, heading, line, read
from sklearn.metrics import roc_auc_score

from loraloom import Adapter, screen

FALSE = 0.05  # of benign adapters that a limit lets be called
SPLITS = 500
GROUP, DRAWS = 5, 4  # adapters of a merge, and how often its others are drawn for a fresh one
SIGNS = ("balance", "repeated rows", "decomposed", "tails of A", "tails of B", "same directions")  # of `together`

Scores = dict[str, float]
Table = NDArray[np.float64]


def main() -> None:
    """Train and screen what is missing, and print what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default="demo")
    parser.add_argument("--benign", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--fresh", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    options.out.mkdir(parents=True, exist_ok=True)
    maker = Maker(options.out, options.base)
    benign = {f"benign {number}": read(maker.benign(number)) for number in range(options.benign)}
    pairs = [[read(folder) for folder in maker.pair(number)[:2]] for number in range(options.pairs)]
    twins = {f"twin {number}": clean for number, (clean, _) in enumerate(pairs)}
    attacked: dict[tuple[str, float], dict[str, Adapter]] = defaultdict(dict)
    for number, (clean, malicious) in enumerate(pairs):
        for kind, s, one in attacks(clean, malicious):
            attacked[kind, s][f"{kind} {s:g} | {number}"] = one
    everyone = {**benign, **twins, **{name: one for group in attacked.values() for name, one in group.items()}}
    scores = scored(options.out / "scores.json", benign, everyone)
    names = {kind: list(group) for kind, group in attacked.items()}
    halves(scores, list(benign), list(twins), names)
    by_detector(scores, list(benign), list(twins), names)
    in_groups(benign, {("benign", 1.0): benign, ("honest twin", 1.0): twins, **attacked})
    if options.fresh:
        fresh(maker, benign, options.pairs, options.fresh)
    line(f"{len(benign)} benign, {len(pairs)} pairs; {time.process_time() - began:.0f} core-seconds")


def scored(file: Path, benign: Mapping[str, Adapter], everyone: Mapping[str, Adapter]) -> dict[str, Scores]:
    """Return every adapter's scores by detector, against the benign ones; those in the file are not measured again."""
    found: dict[str, Scores] = json.loads(file.read_text()) if file.exists() else {}
    for name, one in everyone.items():
        if name not in found:
            reference = {other: adapter for other, adapter in benign.items() if other != name}
            seen = screen({name: one}, reference=reference).adapters[name].findings
            found[name] = {finding.detector: finding.score for finding in seen}
            file.write_text(json.dumps(found))
    return found


def halved(count: int, chance: random.Random) -> tuple[list[int], list[int]]:
    """Return two halves of the benign adapters' numbers, alike in tasks, ranks and learning rates."""
    strata: dict[tuple[str, bool], list[tuple[float, int]]] = defaultdict(list)
    for number in range(count):
        one = Setting.drawn(number, attacker=False)
        strata[one.task, one.lora.rank >= 16].append((one.training.learning_rate, number))
    first: list[int] = []
    for _, stratum in sorted(strata.items()):
        numbers = [number for _, number in sorted(stratum)]
        for at in range(0, len(numbers), 2):
            first += [number for number in [chance.choice([*numbers, -1][at : at + 2])] if number >= 0]
    return first, [number for number in range(count) if number not in first]


def ranked(rows: Table, reference: Table, *, among: bool = False) -> Table:
    """Return -log p of every score: p is the share of references that are as far out; `among`: rows are references."""
    above = (reference[None] >= rows[:, None]).sum(axis=1) - among
    found: Table = -np.log((1 + above) / (len(reference) + 1 - among))
    return found


def strongest(rows: Table, reference: Table, *, among: bool = False) -> Table:
    """Return the sum of the three largest -log p."""
    found: Table = np.sort(ranked(rows, reference, among=among), axis=1)[:, -3:].sum(axis=1)
    return found


def largest(rows: Table, reference: Table, *, among: bool = False) -> Table:
    """Return the largest score over what 5 % of the references are above; what none of them has does not count."""
    limits = np.quantile(reference, 1 - FALSE, axis=0)
    found: Table = np.where(limits > 0, rows / np.where(limits > 0, limits, 1), 0.0).max(axis=1)
    return found


def halves(
    scores: Mapping[str, Scores],
    benign: Sequence[str],
    twins: Sequence[str],
    attacked: Mapping[tuple[str, float], Sequence[str]],
) -> None:
    """Print what is called, with limits of one half, of the other half, of the twins and of the attackers."""
    every = sorted({detector for one in scores.values() for detector in one} - {"together"})
    ways: dict[str, tuple[Sequence[str], Callable[..., Table]]] = {
        "largest score over its limit, all detectors": (every, largest),
        "three strongest of all detectors": (every, strongest),
        "three strongest signs (`together`)": (SIGNS, strongest),
    }
    for title, (detectors, combined) in ways.items():
        known, alike = table(scores, benign, detectors), table(scores, twins, detectors)
        bad = {key: table(scores, names, detectors) for key, names in attacked.items()}
        drawn = np.random.default_rng(0)
        called: dict[str, list[float]] = defaultdict(list)
        found: dict[tuple[str, float], list[list[float]]] = defaultdict(list)
        for split in range(SPLITS):
            first, second = halved(len(benign), random.Random(split))
            reference = known[first]
            null = np.sort(combined(reference, reference, among=True))
            limit = null[min(int(np.ceil((len(null) + 1) * (1 - FALSE))), len(null)) - 1]
            others = again(combined(known[second], reference), drawn)
            trained_alike = again(combined(alike, reference), drawn)
            called["benign of the other half"].append(float((others > limit).mean()))
            called["honest twins"].append(float((trained_alike > limit).mean()))
            for key, rows in bad.items():
                values = again(combined(rows, reference), drawn)
                at = float(np.quantile(values, 0.05, method="lower"))
                found[key].append(
                    [
                        auc(others, values),
                        auc(trained_alike, values),
                        float((values > limit).mean()),
                        float((others >= at).mean()),
                        float((trained_alike >= at).mean()),
                    ]
                )
        heading(
            f"{title}: limits by one half",
            ("attack", "s", "AUC", "AUC, twins", "found", "benign called at 95 % found", "twins called at 95 % found"),
        )
        for (kind, s), measured in found.items():
            first_two = [f"{np.mean(column):.2f}" for column in list(zip(*measured, strict=True))[:2]]
            rest = [percent(column) for column in list(zip(*measured, strict=True))[2:]]
            line(f"| {kind} | {s:g} | {' | '.join([*first_two, *rest])} |")
        line("Called: " + "; ".join(f"{who} {percent(values)}" for who, values in called.items()))


def by_detector(
    scores: Mapping[str, Scores],
    benign: Sequence[str],
    twins: Sequence[str],
    attacked: Mapping[tuple[str, float], Sequence[str]],
) -> None:
    """Print how well each detector alone tells attacks from benign adapters, and from honest twins."""
    every = sorted({detector for one in scores.values() for detector in one})
    heading(
        "AUC by detector: against the benign / against the twins", ("detector", *(f"{k} {s:g}" for k, s in attacked))
    )
    for detector in every:
        known, alike = (table(scores, names, [detector])[:, 0] for names in (benign, twins))
        bad = [table(scores, names, [detector])[:, 0] for names in attacked.values()]
        line(f"| {detector} | {' | '.join(f'{auc(known, one):.2f} / {auc(alike, one):.2f}' for one in bad)} |")


def in_groups(benign: Mapping[str, Adapter], groups: Mapping[tuple[str, float], Mapping[str, Adapter]]) -> None:
    """Print the shipped verdicts beside four benign adapters, drawn by name, as a merge of five has them."""
    heading(f"Shipped thresholds, in groups of {GROUP}", ("given", "s", "refuse", "look", "of"))
    shown = [key for key in groups if key[0] in ("benign", "honest twin", "plain") or key[1] in (*AMPLIFIED, 3.0)]
    for kind, s in shown:
        words = []
        for name, one in groups[kind, s].items():
            others = random.Random(name).sample([other for other in benign if other != name], GROUP - 1)
            words.append(screen({name: one, **{other: benign[other] for other in others}}).adapters[name].verdict)
        line(f"| {kind} | {s:g} | {words.count('refuse')} | {words.count('look')} | {len(words)} |")


def fresh(maker: Maker, benign: Mapping[str, Adapter], first: int, count: int) -> None:
    """Print the verdicts on adapters that nothing was chosen by: beside four benign ones, and beside half of them."""
    given: dict[str, dict[str, Adapter]] = defaultdict(dict)
    for number in range(len(benign), len(benign) + 3 * count):
        given["benign"][f"benign {number}"] = read(maker.benign(number))
    for number in range(first, first + count):
        clean, malicious = (read(folder) for folder in maker.pair(number)[:2])
        given["twin"][f"twin | {number}"] = clean
        for kind, s, one in attacks(clean, malicious):
            given[f"{kind} {s:g}"][f"{kind} {s:g} | {number}"] = one
    names = random.Random(0).sample(list(benign), len(benign) // 2)
    reference = {name: benign[name] for name in names}
    columns = (f"refuse, in groups of {GROUP}", "look", "of", "refuse, beside references", "look", "`together`", "of")
    heading("Fresh adapters", ("given", *columns))
    for kind, adapters in given.items():
        words, beside, called = list[str](), list[str](), 0
        for name, one in adapters.items():
            for draw in range(DRAWS):
                others = random.Random(f"{name} {draw}").sample(list(benign), GROUP - 1)
                words.append(screen({name: one, **{other: benign[other] for other in others}}).adapters[name].verdict)
            found = screen({name: one}, reference=reference).adapters[name]
            beside.append(found.verdict)
            called += any(each.detector == "together" and each.verdict == "look" for each in found.findings)
        counts = [*(str(words.count(word)) for word in ("refuse", "look")), str(len(words))]
        counts += [*(str(beside.count(word)) for word in ("refuse", "look")), str(called), str(len(beside))]
        line(f"| {kind} | {' | '.join(counts)} |")


def table(scores: Mapping[str, Scores], names: Sequence[str], detectors: Sequence[str]) -> Table:
    """Return scores, a row an adapter; of what a detector cannot tell the lowest."""
    return np.array([[scores[name].get(detector, -99.0) for detector in detectors] for name in names])


def again(values: Table, drawn: np.random.Generator) -> Table:
    """Return as many values, drawn with replacement."""
    found: Table = drawn.choice(values, len(values))
    return found


def auc(below: Table, above: Table) -> float:
    """Return how often one of `above` is above one of `below`."""
    return float(roc_auc_score([0] * len(below) + [1] * len(above), [*below, *above]))


def percent(values: Sequence[float]) -> str:
    """Return the mean in per cent with the 95 % interval over splits and draws."""
    low, high = np.quantile(values, (0.025, 0.975))
    return f"{100 * np.mean(values):.0f} % ({100 * low:.0f} to {100 * high:.0f})"


if __name__ == "__main__":
    main()
