"""Merging single layers of the size of Llama-3-8B's against PEFT; benchmarks/limit.py measures whole adapters.

    python benchmarks/merging.py                    # everything: some 5 minutes on 2 cores
    python benchmarks/merging.py --parts svd        # one of: svd, ties, memory
    python benchmarks/merging.py --parts svd --busy 2

Eight rank-16 adapters with random factors (float32, as PEFT saves them). `svd` and `ties` merge one 4096 x 4096 layer
by PEFT's `add_weighted_adapter` and by `loraloom.merge` in turn, in one process, and print the ratio of the medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from limit import KINDS, RANK, busy, child, command, make_adapters
from peft import LoraConfig, get_peft_model
from torch import nn

from loraloom import Adapter, Update, merge

TASKS = 8
WIDTH = 4096  # of the single layer


def main() -> None:
    """Run the parts asked for and print a line a measurement."""
    parts: dict[str, Callable[[Path, int], None]] = {
        "svd": against_svd,
        "ties": against_ties,
        "memory": memory_of_ties,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(parts), default=list(parts))
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side, of which the median counts")
    parser.add_argument("--busy", type=int, default=0, help="processes that keep cores busy meanwhile")
    given = parser.parse_args()
    versions = ", ".join(f"{name} {version(name)}" for name in ("loraloom", "torch", "peft"))
    print(f"{versions}; {os.cpu_count()} cores, torch on {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as name, busy(given.busy):
        for part in given.parts:
            parts[part](Path(name), given.repeats)


def against_svd(folder: Path, repeats: int) -> None:
    """Print the ratio to PEFT's `svd` on one layer, and how near both come to the best rank-16 approximation."""
    updates = _layer()
    theirs, their_seconds = _timed(partial(_peft, _peft_model(updates), "svd", svd_rank=RANK), 1)
    ours, our_seconds = _timed(partial(_ours, updates, "svd", rank=RANK), repeats)
    total = torch.stack([update.dense().double() for update in updates]).mean(dim=0)
    errors = [float((merged.dense().double() - total).norm() / total.norm()) for merged in (ours, theirs)]
    print(
        f"svd, one {WIDTH} x {WIDTH} layer: loraloom {our_seconds:.3f} s (median of {repeats}), "
        f"PEFT {their_seconds:.1f} s (one run), ratio {their_seconds / our_seconds:.0f}; "
        f"relative distance from the mean {errors[0]:.6f} and {errors[1]:.6f}"
    )


def against_ties(folder: Path, repeats: int) -> None:
    """Print the ratio to PEFT's `ties_svd` and `dare_ties_svd` on one layer in full space, from factors to factors."""
    updates = _layer()
    model = _peft_model(updates)
    for rule in ("ties", "dare_ties"):
        _, theirs = _timed(partial(_peft, model, f"{rule}_svd", svd_rank=RANK, density=0.2), 1)
        for rank in (RANK, TASKS * RANK):
            _, ours = _timed(partial(_ours, updates, rule, rank=rank, density=0.2), repeats)
            print(
                f"{rule}, full space, one {WIDTH} x {WIDTH} layer to rank {rank}: loraloom {ours:.2f} s "
                f"(median of {repeats}), PEFT to rank {RANK} {theirs:.1f} s (one run), ratio {theirs / ours:.1f}",
                flush=True,
            )


def memory_of_ties(folder: Path, repeats: int) -> None:
    """Print seconds and peak memory of `ties` and `dare_ties` in full space on the largest kind of layer alone."""
    kind = "mlp.gate_proj"
    adapters = make_adapters(folder / "one", {f"model.layers.0.{kind}": KINDS[kind]}, TASKS)
    for rule in ("ties", "dare_ties"):
        run = child(command(adapters, rule, folder / "out"))
        told = f"{run.seconds:.1f} s, peak {run.peak / 1e9:.2f} GB"
        print(f"{rule}, full space, one {KINDS[kind]} layer, whole command: {told}")


def _layer() -> list[Update]:
    generator = torch.Generator().manual_seed(0)
    scale = WIDTH**-0.5
    return [
        Update(
            torch.randn(WIDTH, RANK, generator=generator) * scale, torch.randn(RANK, WIDTH, generator=generator) * scale
        )
        for _ in range(TASKS)
    ]


def _ours(updates: list[Update], rule: str, **options: Any) -> Update:
    adapters = {f"task{i}": Adapter({"layer": update}, {}) for i, update in enumerate(updates)}
    return merge(adapters, rule, weights=[1 / TASKS] * TASKS, scale=1.0, **options).adapter.updates["layer"]


def _peft_model(updates: list[Update]) -> Any:
    """Return a PEFT model of one layer that holds the same factors."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["layer"])
    wrapped = get_peft_model(
        nn.ModuleDict({"layer": nn.Linear(WIDTH, WIDTH, bias=False)}), config, adapter_name="task0"
    )
    layer: Any = wrapped.base_model.model["layer"]
    for i, update in enumerate(updates):
        if i:
            wrapped.add_adapter(f"task{i}", config)
        layer.lora_A[f"task{i}"].weight.data = update.A.clone()
        layer.lora_B[f"task{i}"].weight.data = update.B.clone()
    return wrapped.base_model


def _peft(model: Any, kind: str, **options: Any) -> Update:
    """Return what PEFT merges, mean weights."""
    names = [f"task{i}" for i in range(TASKS)]
    model.add_weighted_adapter(names, [1 / TASKS] * TASKS, kind, combination_type=kind, **options)
    layer = model.model["layer"]
    return Update(layer.lora_B[kind].weight.detach() * layer.scaling[kind], layer.lora_A[kind].weight.detach())


def _timed(run: Callable[[], Update], repeats: int) -> tuple[Update, float]:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return result, statistics.median(seconds)


if __name__ == "__main__":
    main()
