"""What the start of A costs a layer: all tasks from one factorisation against `torch.linalg.eigh` for each task.

    python benchmarks/subspace.py [--parts rows memory gram] [--threads 2] [--runs 3]

rows: 8 tasks of 100 rows, n = 1024 and 4096; the reference is eigh of the n x n Gram matrix of the other tasks' rows,
measured `--references` times for one task and counted 8 times, the making of the matrix left out. memory: n = 14336,
in a process of its own, without the reference. gram: one task whose others have 2n rows, so that their Gram matrix has
full rank. Gaussian rows whose variances fall as 1/i. Targets: 100 times at n = 4096; 5 s and 4 GB at n = 14336.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import scipy
import torch
from torch import Tensor

from loraloom import Moment, osrm_subspace, osrm_subspaces, pooled

TASKS, ROWS, RANK = 8, 100, 8
RULES = ("osrm", "apart")


def main() -> None:
    """Measure, and print Markdown tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=sorted(PARTS), default=list(PARTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=7, help="runs of ours; the median counts")
    parser.add_argument("--references", type=int, default=1, help="runs of eigh")
    parser.add_argument("--alone", nargs=2, metavar=("N", "RULE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.alone:
        alone(int(options.alone[0]), options.alone[1], options.runs)
        return
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, scipy {scipy.__version__}, "
        f"{options.threads} threads, {platform.machine()}; rank {RANK}, medians of {options.runs} runs, eigh of "
        f"{options.references}"
    )
    for part in options.parts:
        PARTS[part](options)


def rows_part(options: argparse.Namespace) -> None:
    """All tasks while their rows are fewer than n."""
    print(f"\n{TASKS} tasks, {ROWS} rows a task. eigh: seconds of one task's, times {TASKS}.\n")
    print("| n | rule | eigh, s | ours, all tasks, s | ratio |\n|---|---|---|---|---|")
    for n in (1024, 4096):
        tasks = moments(n)
        others = pooled(list(tasks.values())[1:]).as_gram()
        reference = TASKS * median(partial(torch.linalg.eigh, others), options.references)
        for rule in RULES:
            ours = median(partial(osrm_subspaces, tasks, RANK, rule=rule), options.runs)
            print(f"| {n} | `{rule}` | {reference:.2f} | {ours:.3f} | {reference / ours:.0f} |", flush=True)


def memory_part(options: argparse.Namespace) -> None:
    """The widest layer of an 8B model, each rule in its own process."""
    print(f"\nn = 14336, {TASKS} tasks, {ROWS} rows a task, Python and torch included in the memory.\n")
    print("| rule | seconds | peak memory, GB |\n|---|---|---|")
    for rule in RULES:
        command = [sys.executable, __file__, "--alone", "14336", rule]
        command += ["--threads", str(options.threads), "--runs", str(options.runs)]
        print(subprocess.run(command, check=True, capture_output=True, text=True).stdout, end="", flush=True)


def gram_part(options: argparse.Namespace) -> None:
    """One task whose others have more rows than n."""
    print("\nOne task, the others' Gram matrix of 2n rows against one eigh of it.\n")
    print("| n | rule | eigh, s | ours, s | ratio |\n|---|---|---|---|---|")
    for n in (1024, 2048, 4096):
        others, own = Moment.of_rows(rows(2 * n, n, 0)), Moment.of_rows(rows(ROWS, n, 1))
        reference = median(partial(torch.linalg.eigh, others.as_gram()), options.references)
        for rule in RULES:
            ours = median(partial(osrm_subspace, [others], own, RANK, rule=rule), options.runs)
            print(f"| {n} | `{rule}` | {reference:.2f} | {ours:.3f} | {reference / ours:.1f} |", flush=True)


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {"rows": rows_part, "memory": memory_part, "gram": gram_part}


def alone(n: int, rule: str, runs: int) -> None:
    """Print one line of the memory table for this process."""
    tasks = moments(n)
    seconds = median(lambda: osrm_subspaces(tasks, RANK, rule=rule), runs)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"| `{rule}` | {seconds:.2f} | {peak / 1e9:.2f} |")


def moments(n: int) -> dict[str, Moment]:
    """Return the moments of all tasks, seeded."""
    return {f"task {seed}": Moment.of_rows(rows(ROWS, n, seed)) for seed in range(TASKS)}


def rows(count: int, n: int, seed: int) -> Tensor:
    """Return Gaussian rows (count, n), float32, the i-th column of variance 1/i."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, n, generator=generator) / torch.arange(1, n + 1).sqrt()


def median(run: Callable[[], object], runs: int) -> float:
    """Return the median wall-clock seconds of `runs` calls."""
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
