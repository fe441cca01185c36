"""Merging at the size of Llama-3-8B: whole rules in time and memory, and single layers against PEFT.

    python benchmarks/merging.py                    # everything: some 25 minutes on 2 cores
    python benchmarks/merging.py --parts whole      # one of: whole, dry-run, svd, ties, memory

Eight rank-16 adapters with random factors (float32, as PEFT saves them) on all seven linear kinds of 32 layers, 224
modules, made in a temporary folder of 1.4 GB. `whole` runs `loraloom merge` in a process of its own for each rule that
works in factors, and prints wall-clock seconds and peak memory. `svd` and `ties` merge one 4096 x 4096 layer by PEFT's
`add_weighted_adapter` and by `loraloom.merge` in turn, in one process, and print the ratio of the medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from loraloom import Adapter, Update, adapter_writer, get_rule, merge, rule_names

TASKS, RANK, LAYERS = 8, 16, 32
KINDS = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
WIDTH = 4096  # of the single layer


def main() -> None:
    """Run the parts asked for and print a line a measurement."""
    parts: dict[str, Callable[[list[Path], Path, int], None]] = {
        "dry-run": dry_run,
        "whole": whole,
        "svd": against_svd,
        "ties": against_ties,
        "memory": memory_of_ties,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(parts), default=list(parts))
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side, of which the median counts")
    given = parser.parse_args()
    versions = ", ".join(f"{name} {version(name)}" for name in ("loraloom", "torch", "peft"))
    print(f"{versions}; {os.cpu_count()} cores, torch on {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        every = {f"model.layers.{i}.{kind}": shape for i in range(LAYERS) for kind, shape in KINDS.items()}
        adapters = make_adapters(folder / "in", every) if {"whole", "dry-run"} & set(given.parts) else []
        for part in given.parts:
            parts[part](adapters, folder / "out", given.repeats)


def make_adapters(folder: Path, modules: dict[str, tuple[int, int]]) -> list[Path]:
    """Write the adapters with random factors and return their folders."""
    generator = torch.Generator().manual_seed(0)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "meta-llama/Meta-Llama-3-8B",
        "target_modules": [kind.split(".")[1] for kind in KINDS],
    }
    for task in range(TASKS):
        with adapter_writer(folder / f"task{task}", config, torch.float32, modules) as out:
            for module, (m, n) in modules.items():
                B = torch.randn(m, RANK, generator=generator) / m**0.5
                out.add(module, Update(B, torch.randn(RANK, n, generator=generator) / n**0.5))
            out.finish({"kind": "random factors of a benchmark"})
    return [folder / f"task{task}" for task in range(TASKS)]


def dry_run(adapters: list[Path], output: Path, repeats: int) -> None:
    """Print the seconds of `loraloom merge --dry-run` on the adapters."""
    command = [*_command(adapters, "tsv", output), "--dry-run"]
    seconds = statistics.median(_child(command)[0] for _ in range(repeats))
    print(f"dry-run of {TASKS} adapters: {seconds:.2f} s, median of {repeats}")


def whole(adapters: list[Path], output: Path, repeats: int) -> None:
    """Print seconds and peak memory of every rule that needs nothing and works in factors, one run each."""
    for name in rule_names():
        rule = get_rule(name)
        if rule.exact and rule.needs in ((), ("seed",)):
            seconds, peak = _child(_command(adapters, name, output))
            print(f"whole {name:16} {seconds:6.1f} s, peak memory {peak / 1e9:.2f} GB", flush=True)


def against_svd(adapters: list[Path], output: Path, repeats: int) -> None:
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


def against_ties(adapters: list[Path], output: Path, repeats: int) -> None:
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


def memory_of_ties(adapters: list[Path], output: Path, repeats: int) -> None:
    """Print seconds and peak memory of `ties` and `dare_ties` in full space on the largest kind of layer alone."""
    kind = "mlp.gate_proj"
    folders = make_adapters(output.parent / "one", {f"model.layers.0.{kind}": KINDS[kind]})
    for rule in ("ties", "dare_ties"):
        seconds, peak = _child(_command(folders, rule, output))
        print(f"{rule}, full space, one {KINDS[kind]} layer, whole command: {seconds:.1f} s, peak {peak / 1e9:.2f} GB")


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


def _command(adapters: list[Path], rule: str, output: Path) -> list[str]:
    folders = [str(adapter) for adapter in adapters]
    return [sys.executable, "-m", "loraloom", "merge", *folders, "--rule", rule, "-o", str(output), "--quiet"]


def _child(command: list[str]) -> tuple[float, int]:
    """Return wall-clock seconds and peak memory in bytes of a process. Raises CalledProcessError where it fails."""
    start = time.perf_counter()
    with subprocess.Popen(command) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.perf_counter() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
