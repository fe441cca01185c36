"""Which way of training makes LoRA adapters that merge: forty arms on GLUE with MiniLM, scored on held-out rows.

    python experiments/training_arms.py --list
    python experiments/training_arms.py --data GLUE --out FOLDER --seed 0 plain P50 P50at
    python experiments/training_arms.py --data GLUE --out FOLDER --seed 0 --posthoc plain

GLUE holds a folder a task with train.jsonl (text_a, perhaps text_b, label), from which the held-out rows are cut too.
For each arm one adapter a task is trained, all are merged by four rules at several scales, and one row of a Markdown
table is printed; adapters and scores stay in FOLDER and are taken from there the next time. `single` is the mean score
of the adapters before merging, `ratio` the response to the others' inputs over that to the own ones (mean over layers
and pairs). A rule's cell is its best mean score @ the scale, heads as trained / aligned; `width` is how far the scales
next to the best stay within 1 point of it, for task arithmetic over the scales tried.

The scale is chosen on the rows that it is scored on, and a few points on 250 rows are noise: this is for choosing what
to study, not for results. A minute or more a task and arm on one core; the figures quoted from here were taken with
OMP_NUM_THREADS=1. `iteris` is the package's rule, which weighs a task by |dW|^2 / response; figures taken before that
rule was written weighed it by 1 / response, and differ by that alone. Heads are aligned with a ridge of 0.1.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from arms_lib import Arm, Ground, Jitter, Settings
from arms_merge import SCALES, Adapters, Pair, best, corrected, equalised, heads_by_rows, mean, retrofitted
from arms_train import Trained, train_arm

from loraloom import GLUE, Head, Update

HALF = ("share", 0.5)
GAP = ("gap", 0.0)
STEP: Jitter = ("step", 0.2, 1.0)
LAYER: Jitter = ("layer", 0.0, 1.0)
STEP_NOISY: Jitter = ("step", 0.3, 1.0)
ARMS = {
    "plain": Arm("PEFT's default", "default", False),
    "shared": Arm("PEFT's default, one A and one order of batches for all tasks", "default", False, shared=True),
    "gauss": Arm("Gaussian A, as PEFT's option", "gaussian", False),
    "gaussR": Arm("Gaussian A at the default's response", "gaussian"),
    "rand": Arm("random orthonormal A at the default's response"),
    "randunit": Arm("random orthonormal A of unit rows", response=False),
    "osrm": Arm("the paper: eigenvectors of least energy of the others, unit rows", "quiet", False),
    "osrmR": Arm("the paper's A at the default's response", "quiet"),
    "mean": Arm("the authors' code: last singular vectors of the others' mean rows, unit rows", "mean", False),
    "meanR": Arm("the authors' code at the default's response", "mean"),
    "Pmean": Arm("kept off the others' mean rows", avoid=("mean", 0), keep="projected"),
    "Ptop1": Arm("kept off the others' loudest direction", avoid=("top", 1), keep="projected"),
    "Ptop8": Arm("kept off the others' 8 loudest directions", avoid=("top", 8), keep="projected"),
    "Ptop32": Arm("kept off the others' 32 loudest directions", avoid=("top", 32), keep="projected"),
    "P30": Arm("kept off the directions of 0.3 of the others' energy", avoid=("share", 0.3), keep="projected"),
    "P50": Arm("kept off the directions of 0.5 of the others' energy", avoid=HALF, keep="projected"),
    "P70": Arm("kept off the directions of 0.7 of the others' energy", avoid=("share", 0.7), keep="projected"),
    "P85": Arm("kept off the directions of 0.85 of the others' energy", avoid=("share", 0.85), keep="projected"),
    "Pgap": Arm(
        "kept off as many as hold most of the others' and least of the own energy", avoid=GAP, keep="projected"
    ),
    "Pc50": Arm("P50 of the others' rows less their mean", avoid=("centred", 0.5), keep="projected"),
    "P50ns": Arm("P50 without [CLS] and [SEP] in the statistics", avoid=HALF, keep="projected", special=False),
    "P50all": Arm("P50 off all tasks, the own one too", avoid=HALF, off="all", keep="projected"),
    "P50at": Arm("P50 off generic text in place of the others", avoid=HALF, off="atlas", keep="projected"),
    "Ptop8at": Arm("Ptop8 off generic text in place of the others", avoid=("top", 8), off="atlas", keep="projected"),
    "P50own": Arm("P50, started at the most own energy left", "own", avoid=HALF, keep="projected"),
    "P50block": Arm("P50, started at blocks of one random basis", "block", avoid=HALF, keep="projected"),
    "block": Arm("started at blocks of one random basis, so that the A's are orthogonal", "block"),
    "own": Arm("started at the most own energy", "own"),
    "contrast": Arm("started at the most own energy against that of the others", "contrast"),
    "frozen": Arm("random orthonormal A, frozen", keep="frozen"),
    "P50frozen": Arm("started off 0.5 of the others' energy, frozen", avoid=HALF, keep="frozen"),
    "P50free": Arm("started off 0.5 of the others' energy, then let go", avoid=HALF),
    "P50atfree": Arm("started off 0.5 of generic text's energy, then let go: the default", avoid=HALF, off="atlas"),
    "P30atfree": Arm("P50atfree off 0.3 of the energy", avoid=("share", 0.3), off="atlas"),
    "P70atfree": Arm("P50atfree off 0.7 of the energy", avoid=("share", 0.7), off="atlas"),
    "P85atfree": Arm("P50atfree off 0.85 of the energy", avoid=("share", 0.85), off="atlas"),
    "P50few": Arm("P50atfree off 30 paragraphs in place of 300", avoid=HALF, off="few"),
    "P50mnli": Arm("P50atfree off 100 texts of MNLI, no task here, in place of docstrings", avoid=HALF, off="foreign"),
    "P50grad": Arm("P50 by projected gradients of A", avoid=HALF, keep="gradient"),
    "P50tight": Arm(
        "off 0.7 of the others' energy, tightened over half the training", avoid=("share", 0.7), keep="tighten"
    ),
    "pen3": Arm("plain, penalty 3 on the response to the others", "default", False, penalty=3.0),
    "pen30": Arm("plain, penalty 30 on the response to the others", "default", False, penalty=30.0),
    "plainjit": Arm("plain, the update times 0.2 to 1 at every step", "default", False, jitter=STEP),
    "plainjitl": Arm("plain, each layer's update times 0 to 1 at every step", "default", False, jitter=LAYER),
    "P50jit": Arm("P50, the update times 0.2 to 1 at every step", avoid=HALF, keep="projected", jitter=STEP),
    "Ptop8jit": Arm("Ptop8, the update times 0.2 to 1 at every step", avoid=("top", 8), keep="projected", jitter=STEP),
    "P50jn": Arm(
        "P50, the update times 0.3 to 1 and a random one beside it",
        avoid=HALF,
        keep="projected",
        jitter=STEP_NOISY,
        noise=1.0,
    ),
}


def main() -> None:
    """Train, merge and score the arms asked for, a row each; or treat one arm's adapters after training."""
    given = _arguments()
    if given.list:
        print("\n".join(f"{name:10} {arm.meaning}" for name, arm in ARMS.items()))
        return
    options = {name: getattr(given, name) for name in Settings.__dataclass_fields__}
    ground = Ground.of(Settings(**{**options, "tasks": tuple(given.tasks.split(","))}), given.data)
    if given.arms:
        print(f"| arm | seed | single | ratio | width | {' | '.join(SCALES)} |\n|{'---|' * (5 + len(SCALES))}")
    for name in given.arms:
        print(_row(name, given.seed, _measured(ground, given.out, name, given.seed)), flush=True)
    if given.posthoc:
        adapters = Adapters(ground, _trained(ground, given.out, given.posthoc, given.seed))
        print(
            f"\n{given.posthoc}, seed {given.seed}, single {100 * mean(adapters.single):.1f}, treated after training:\n"
        )
        for treat in (equalised, retrofitted, corrected, heads_by_rows):
            treat(adapters)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", metavar="ARM", help="see --list")
    parser.add_argument("--list", action="store_true", help="print the arms with what each means, and stop")
    parser.add_argument("--data", type=Path, help="folder of GLUE tasks")
    parser.add_argument("--out", type=Path, help="folder for adapters and scores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--posthoc", metavar="ARM", help="then treat this arm's adapters in the ways tried")
    parser.add_argument("--tasks", default="sst2,qqp,stsb,qnli", help="separated by commas (default: %(default)s)")
    parser.add_argument("--targets", default="query,value", help="layers trained, or all-linear (default: %(default)s)")
    numbers = {
        "rows": (1000, "training rows a task"),
        "heldout": (250, "held-out rows a task"),
        "statistics-texts": (100, "training rows a task that statistics and merging rules see"),
        "alignment-texts": (100, "training rows a task, without labels, that heads are aligned on"),
        "max-length": (48, "tokens a row"),
        "rank": (8, "of every update"),
        "epochs": (3, "of training"),
        "batch": (16, "rows a step"),
    }
    for name, (default, meaning) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default: {default})")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate (default: %(default)s)")
    given = parser.parse_args()
    unknown = sorted({*given.arms, *([given.posthoc] if given.posthoc else [])} - set(ARMS))
    if unknown:
        parser.error(f"no arm {', '.join(unknown)}; --list names them")
    if set(given.tasks.split(",")) - set(GLUE):
        parser.error(f"--tasks: choose from {', '.join(GLUE)}")
    if not given.list and not (given.data and given.out and (given.arms or given.posthoc)):
        parser.error("give --data, --out and arms, or --posthoc with one")
    return given


def _trained(ground: Ground, out: Path, name: str, seed: int) -> dict[str, Trained]:
    """Return by task the updates and the head, from `out` where they are there; else trained, and written there."""
    path, settings = out / f"{name}.s{seed}.pt", asdict(ground.settings)
    if path.exists():
        stored = torch.load(path, weights_only=True)
        _check_settings(path, stored["settings"], settings)
        return {
            task: ({layer: Update(B, A) for layer, (B, A) in updates.items()}, Head(head, "classifier"))
            for task, (updates, head) in stored["tasks"].items()
        }
    done = train_arm(ground, name, ARMS[name], seed)
    tasks = {
        task: ({layer: (update.B, update.A) for layer, update in updates.items()}, head.tensors)
        for task, (updates, head) in done.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"settings": settings, "tasks": tasks}, path)
    return done


def _measured(ground: Ground, out: Path, name: str, seed: int) -> dict[str, Any]:
    """Return the scores of an arm, from `out` where they are there; else measured, and written there."""
    path, settings = out / f"{name}.s{seed}.json", asdict(ground.settings)
    if not path.exists():
        adapters = Adapters(ground, _trained(ground, out, name, seed))
        scores = {rule: adapters.at_scales(adapters.merged(rule), scales) for rule, scales in SCALES.items()}
        found = {"settings": settings, "single": adapters.single, "ratio": adapters.ratio(), "scores": scores}
        path.write_text(json.dumps(found, indent=1), encoding="utf-8")
    measured: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    _check_settings(path, measured["settings"], settings)
    return measured


def _check_settings(path: Path, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    differ = [name for name, value in asked.items() if json.dumps(stored.get(name)) != json.dumps(value)]
    if differ:
        raise SystemExit(f"{path} was made with other settings: {', '.join(differ)}. Name another --out.")


def _row(name: str, seed: int, found: Mapping[str, Any]) -> str:
    """Return one row of the Markdown table; scores in points."""
    cells = [name, str(seed), f"{100 * mean(found['single']):.1f}", f"{found['ratio']:.2f}"]
    curves = {rule: {float(scale): tuple(pair) for scale, pair in found["scores"][rule].items()} for rule in SCALES}
    cells.append(" / ".join(f"{_width(curves['task arithmetic'], head):.1f}" for head in (0, 1)))
    cells += [best(curve) for curve in curves.values()]
    return f"| {' | '.join(cells)} |"


def _width(curve: Mapping[float, Pair], head: int) -> float:
    """Return how far apart the outermost scales are between which no score is more than 1 point below the best."""
    scales = sorted(curve)
    near = [100 * (max(pair[head] for pair in curve.values()) - curve[scale][head]) <= 1 for scale in scales]
    low = high = max(range(len(scales)), key=lambda i: curve[scales[i]][head])
    while low and near[low - 1]:
        low -= 1
    while high + 1 < len(scales) and near[high + 1]:
        high += 1
    return scales[high] - scales[low]


if __name__ == "__main__":
    main()
