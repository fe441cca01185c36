"""How the time and memory of a merge grow with adapters, rank, width and layers: tables, each with its exponent.

    python benchmarks/growth.py                            # some 5 minutes of one core
    python benchmarks/growth.py --rules tsv --vary adapters

Merges in memory, by random float32 factors, on one thread; seconds are the processor's, which other processes on the
machine hardly change. Memory is the peak beyond what the process held before (Linux alone). Exponents are fitted to the
last three points, on logarithms: below them, what does not grow counts too.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

from loraloom import Adapter, Update, merge

RULES = (
    *("task_arithmetic", "svd", "tsv", "iso_c", "iso_cts", "wudi", "robust", "lego"),
    *("emr", "knots", "ctm", "cp"),
)


class Size(NamedTuple):
    """What is merged."""

    adapters: int
    rank: int
    width: int
    layers: int


# what varies, and beside what: all ranks together stay below the width
SIZES = {
    "adapters": [Size(count, 2, 1024, 1) for count in (2, 10, 50, 200)],
    "rank": [Size(4, rank, 2048, 1) for rank in (4, 16, 64, 128)],
    "width": [Size(8, 8, width, 1) for width in (1024, 2048, 4096, 8192)],
    "layers": [Size(4, 8, 512, layers) for layers in (2, 8, 32, 128)],
}


def main() -> None:
    """Print a table for each thing that varies: seconds and megabytes of every rule, and their exponents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", default=list(RULES))
    parser.add_argument("--vary", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the quickest counts")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"loraloom {version('loraloom')}, torch {torch.__version__}, one thread, quickest of {given.repeats}")
    merge(adapters(Size(2, 2, 8, 1)), "tsv")  # what is imported when it is used first
    for name in given.vary:
        sizes = SIZES[name]
        fixed = ", ".join(f"{one} {value}" for one, value in sizes[0]._asdict().items() if one != name)
        values = [getattr(size, name) for size in sizes]
        print(f"\n{name} ({fixed})\n| rule | {' | '.join(map(str, values))} | time | memory |")
        print("|---" * (len(values) + 3) + "|")
        for rule in given.rules:
            found = [measured(rule, size, given.repeats) for size in sizes]
            cells = [f"{seconds:.3f} s, {peak:.0f} MB" for seconds, peak in found]
            exponents = [exponent(values, [one[part] for one in found]) for part in (0, 1)]
            print(f"| `{rule}` | {' | '.join(cells)} | {' | '.join(f'{one:.1f}' for one in exponents)} |", flush=True)


def adapters(size: Size) -> dict[str, Adapter]:
    """Return adapters with random factors."""
    generator, root = torch.Generator().manual_seed(0), size.width**-0.5
    return {
        f"task{task}": Adapter(
            {
                f"layer.{at}": Update(
                    root * torch.randn(size.width, size.rank, generator=generator),
                    root * torch.randn(size.rank, size.width, generator=generator),
                )
                for at in range(size.layers)
            },
            {},
        )
        for task in range(size.adapters)
    }


def measured(rule: str, size: Size, repeats: int) -> tuple[float, float]:
    """Return the processor's seconds of the quickest run, and the peak beyond the start in megabytes."""
    given, seconds, peaks = adapters(size), [], []
    for _ in range(repeats):
        before = resident(reset=True)
        start = time.process_time()
        merge(given, rule, normalise="none")
        seconds.append(time.process_time() - start)
        peaks.append(resident() - before)
    return min(seconds), max(peaks) / 1e6


def resident(*, reset: bool = False) -> float:
    """Return the most bytes of memory since the last `reset`, which gives back what is free; NaN beside Linux."""
    if not sys.platform.startswith("linux"):
        return math.nan
    if reset:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024.0 * int(status.partition("VmHWM:")[2].split()[0])


def exponent(sizes: list[int], values: list[float]) -> float:
    """Return the slope of the logarithms over the last three points."""
    points = [(math.log(size), math.log(max(value, 1e-9))) for size, value in zip(sizes, values, strict=True)][-3:]
    x, y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    return float(sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points))


if __name__ == "__main__":
    main()
