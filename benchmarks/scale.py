"""The constants of docs/scale.md: what a layer's statistics, start and merge and a stage's hand-over cost here.

    python benchmarks/scale.py [--parts files start merge stages store]

CPU seconds of one thread, so that a busy machine tells nearly the same. files: bytes a number that is kept, of rows, of
a bounded factor and of a Gram matrix. start: `apart` of rank 16 for 100 tasks from one factorisation, and one task's
start as a stage of a study computes it, by the width n of the input. merge: 100 adapters of rank 16, one layer of each
shape of a 70B Llama. stages: what the engine itself takes for each of N stages that do nothing, by N. store: seconds to
put a GB into a store that is a folder, hashed, and to find it again. Random rows whose variances fall as 1/i.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from loraloom import Adapter, Layer, Moment, Statistics, Update, merge, osrm_subspace, osrm_subspaces
from loraloom.progress import Reporter
from loraloom.study.engine import Context, Engine, Here, Worker, stage
from loraloom.study.store import Stage, Store

TASKS, RANK, MERGED = 100, 16, 128
SHAPES = {"k, v": (1024, 8192), "q, o": (8192, 8192), "gate, up, down": (28672, 8192)}


def main() -> None:
    """Measure, and print Markdown tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=sorted(PARTS), default=list(PARTS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}, one thread")
    for part in options.parts:
        PARTS[part]()


def files_part() -> None:
    """Bytes a number in a statistics file."""
    print("\n| kept of an input n = 2048 wide | numbers | bytes in the file | bytes a number |\n|---|---|---|---|")
    n = 2048
    kinds = {"100 rows": Moment.of_rows(rows(100, n)), "a factor of 256": Moment.of_rows(rows(1024, n)).limit_rank(256)}
    kinds["a Gram matrix"] = Moment.of_rows(rows(2 * n, n))
    for kind, moment in kinds.items():
        numbers = n * n if moment.thin is None else moment.thin.numel()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "statistics.safetensors"
            layers = {"layer": Layer("layer", n, n)}
            Statistics("random", "random", {"layer": moment}, layers, 10, moment.count, "token").save(path)
            size = path.stat().st_size
        print(f"| {kind} | {numbers:,} | {size:,} | {size / numbers:.2f} |", flush=True)


def start_part() -> None:
    """Seconds of a start by the width of the input."""
    print(f"\n{TASKS} tasks; rows of all together: 0.8 n, and 2 n.\n")
    print("| n | rows of all | all starts from one factorisation, s | one start alone, s |\n|---|---|---|---|")
    for n in (512, 1024):
        for share in (0.8, 2.0):
            moments = {str(task): Moment.of_rows(rows(int(share * n) // TASKS, n, task)) for task in range(TASKS)}
            together = seconds(lambda moments=moments: osrm_subspaces(moments, RANK, rule="apart"))  # type: ignore[misc]
            own, *others = moments.values()
            alone = seconds(lambda own=own, others=others: osrm_subspace(others, own, RANK, rule="apart"))  # type: ignore[misc]
            print(f"| {n} | {share} n | {together:.2f} | {alone:.2f} |", flush=True)


def merge_part() -> None:
    """Seconds of a merge of one layer."""
    print(f"\n{TASKS} adapters of rank {RANK}, merged to rank {MERGED}.\n")
    print("| layer (m x n) | rule | s |\n|---|---|---|")
    for name, (m, n) in SHAPES.items():
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(m + n, RANK, generator=generator) / m for _ in range(TASKS)]
        adapters = {str(task): Adapter({"layer": Update(one[:m], one[m:].T)}, {}) for task, one in enumerate(drawn)}
        for rule in ("task_arithmetic", "tsv"):
            took = seconds(lambda rule=rule, adapters=adapters: merge(adapters, rule, scale=1.0, rank=MERGED))  # type: ignore[misc]
            print(f"| {name} ({m} x {n}) | `{rule}` | {took:.1f} |", flush=True)


@stage("nothing", version=1)
def nothing(folder: Path, context: Context, *, number: int) -> None:
    """Write a file of a byte."""
    (folder / "byte").write_bytes(b"0")


def stages_part() -> None:
    """Seconds that the engine takes for each of N stages: made, and found again."""
    print("\n| stages | made, ms each | found, ms each |\n|---|---|---|")
    for count in (100, 400, 1600):
        with tempfile.TemporaryDirectory() as folder:
            took = [seconds(lambda folder=folder, count=count: ask(Path(folder), count)) for _ in "12"]  # type: ignore[misc]
        print(f"| {count} | {took[0] / count * 1e3:.2f} | {took[1] / count * 1e3:.2f} |", flush=True)


def ask(folder: Path, count: int) -> None:
    """Ask an engine for so many outputs."""
    store, reporter = Store(folder), Reporter(quiet=True)
    engine = Engine(store, reporter, Here(Worker(store), reporter))
    engine.expect(nothing, count)
    for number in range(count):
        engine.do(nothing, str(number), number=number)


def store_part() -> None:
    """Seconds to put half a GB into a store and to find it again."""
    content = torch.randint(0, 255, (1 << 29,), dtype=torch.uint8).numpy()
    one = Stage("content", "content", {})

    def write(folder: Path, scratch: Path) -> None:
        content.tofile(folder / "content")

    with tempfile.TemporaryDirectory() as folder:
        put = seconds(lambda: Store(folder).get(one, write))
        found = seconds(lambda: Store(folder).get(one, write))
    size = len(content) / 1e9
    print(f"\nA store takes {put / size:.1f} s of a CPU for a GB that is put, and {found * 1e3:.1f} ms to find it.")


def rows(count: int, n: int, seed: int = 0) -> torch.Tensor:
    """Return random rows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, n, generator=generator) * torch.arange(1, n + 1) ** -0.5


def seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds that `work` takes."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


PARTS = {"files": files_part, "start": start_part, "merge": merge_part, "stages": stages_part, "store": store_part}

if __name__ == "__main__":
    main()
