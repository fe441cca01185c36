"""What fusing costs: its throughput over that of `cp` of the same files, and its peak memory over the size of a shard.

    python benchmarks/fuse.py [--folder FOLDER] [--runs 3]

A checkpoint of Llama-like shapes with 1.0 billion bfloat16 parameters in shards of 0.5 GB, and an adapter of rank 16
on every linear layer. `cp -r` and fuse take turns, in children of their own; medians count. fuse writes to the disk
before it returns and hashes every byte, `cp` leaves its bytes in memory: hence a second column, `cp` and `sync`. The
files read were written just before, so all runs read from memory. Target: at least half the throughput of `cp`, and
less memory than two shards. Needs 5 GB of disk and 5 GB of free memory for the page cache.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file

from loraloom import Changes, Update, fuse

HIDDEN, WIDE, KEYS, LAYERS, WORDS, RANK, SHARDS = 2048, 8192, 512, 15, 32_000, 16, 4
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (WIDE, HIDDEN),
    "mlp.up_proj": (WIDE, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDE),
}
SHAPES = {f"model.layers.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in LINEAR.items()}

T = TypeVar("T")


def main() -> None:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to make the checkpoint and its copies; default: a new one")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        base = Path(folder) / "base"
        largest, total = in_child(make_checkpoint, base)
        rows = [measure(base, Path(folder)) for _ in range(options.runs)]
    copied, synced, fused, peaks = (statistics.median(column) for column in zip(*rows, strict=True))
    print(f"{total / 2e9:.2f} billion bfloat16 parameters, shards of at most {largest / 1e9:.2f} GB, rank {RANK}")
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores, {options.runs} turns"
    )
    print(f"load of the machine in the last minute: {os.getloadavg()[0]:.1f}")
    print("\n| | median, s | GB/s | fuse's throughput over it |\n|---|---|---|---|")
    for name, seconds in (("cp", copied), ("cp and sync", synced), ("fuse", fused)):
        print(f"| {name} | {seconds:.2f} | {total / seconds / 1e9:.2f} | {seconds / fused:.2f} |")
    print(f"\npeak memory of fuse: {peaks / 1e6:.0f} MB = {peaks / largest:.2f} of a shard, Python and torch included")


def make_checkpoint(base: Path) -> tuple[int, int]:
    """Write a random checkpoint in SHARDS shards; return the bytes of the largest and of all."""
    torch.manual_seed(0)
    base.mkdir()
    shapes = {"model.embed_tokens.weight": (WORDS, HIDDEN), "lm_head.weight": (WORDS, HIDDEN)}
    shapes |= {f"{module}.weight": shape for module, shape in SHAPES.items()}
    quota = sum(2 * m * n for m, n in shapes.values()) / SHARDS
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(SHARDS)]
    home, done = {}, 0
    for name, (m, n) in shapes.items():
        number = int(done // quota)
        shards[number][name] = torch.empty(m, n, dtype=torch.bfloat16).normal_(std=0.02)
        home[name] = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        done += 2 * m * n
    for number, tensors in enumerate(shards):
        save_file(tensors, base / f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors", metadata={"format": "pt"})
    index = {"metadata": {"total_size": done}, "weight_map": home}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "config.json").write_text(json.dumps({"vocab_size": WORDS, "tie_word_embeddings": False}))
    sizes = [path.stat().st_size for path in base.glob("*.safetensors")]
    return max(sizes), sum(sizes)


def measure(base: Path, folder: Path) -> tuple[float, float, float, int]:
    """Return the seconds of cp, of cp with sync and of fuse, and the peak memory of fuse in bytes."""
    copy, output = folder / "copy", folder / "fused"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    start = time.perf_counter()
    subprocess.run(["cp", "-r", base, copy], check=True)
    copied = time.perf_counter() - start
    os.sync()
    synced = time.perf_counter() - start
    shutil.rmtree(copy)
    os.sync()
    fused, peak = in_child(fuse_once, base, output)
    return copied, synced, fused, peak


def in_child(call: Callable[..., T], *words: Path) -> T:
    """Return what `call` returns in a new process: a peak of memory counts for the process, and for its children."""
    with multiprocessing.get_context("spawn").Pool(1) as child:
        return child.apply(call, words)


def fuse_once(base: Path, output: Path) -> tuple[float, int]:
    """Return the seconds that fuse took, and this process's peak memory in bytes."""
    torch.manual_seed(1)
    updates = {
        name: Update(torch.randn(m, RANK) * 0.01, torch.randn(RANK, n) * 0.01) for name, (m, n) in SHAPES.items()
    }
    start = time.perf_counter()
    fuse(base, output, Changes(SHAPES), updates.__getitem__)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return seconds, peak * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
