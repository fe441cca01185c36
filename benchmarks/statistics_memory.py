"""What bounded statistics of an 8B base cost for eight tasks: memory beyond the start, seconds, error, file sizes.

    python benchmarks/statistics_memory.py [--rank 128 256] [--tasks 8] [--tokens 2048] [--threads 2] [--real]

32 layers of inputs 4096 (q/k/v), 4096 (o), 4096 (gate/up) and 14336 (down) wide, as Llama-3-8B has them. Each task's
rows go once past sums of all 128 inputs at the same time, as in a forward pass; its file is written before the next
task begins. Then all files are opened and checked, and for every layer the other tasks' moments are pooled, which is
what `initialise` reads. Rows are random, their eigenvalues fall as 1 / q. With --real they come from a
LlamaForCausalLM with random weights whose 32 layers share those of one, so that it fits; the peak is then that beyond
the model. Target: 8 GB.
"""

from __future__ import annotations

import argparse
import copy
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from loraloom import Layer, RowSum, Statistics, collect_statistics, pooled

T = TypeVar("T")
LAYERS, HIDDEN, WIDE, BATCH = 32, 4096, 14336, 512
INPUTS = {"self_attn.q_proj": HIDDEN, "self_attn.o_proj": HIDDEN, "mlp.gate_proj": HIDDEN, "mlp.down_proj": WIDE}
WIDTHS = {f"model.layers.{index}.{name}": width for index in range(LAYERS) for name, width in INPUTS.items()}


def main() -> None:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rank", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048, help="rows of a task")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--real", action="store_true", help="rows of a model in place of random ones")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = shared_llama().to(device) if options.real else None
    start = resident()
    print(f"{options.tasks} tasks of {options.tokens} rows, {len(WIDTHS)} inputs, {device}, {options.threads} threads")
    print(f"Python {platform.python_version()}, torch {torch.__version__}; {start / 1e9:.2f} GB at the start\n")
    print("| rank | collect a task, s | save, s | file, GB | open and check all, s | pool all layers, s "
          "| lost, of the largest eigenvalue: mean, most | peak beyond the start, GB | on the GPU, GB |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    for rank in options.rank:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with tempfile.TemporaryDirectory(dir=".") as folder:
            row = measured(Path(folder), rank, options.tasks, options.tokens, model, device)
        on_gpu = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
        print(f"| {rank} | {row} | {(peak() - start) / 1e9:.2f} | {on_gpu:.2f} |", flush=True)


def measured(folder: Path, rank: int, tasks: int, tokens: int, model: nn.Module | None, device: str) -> str:
    """Collect, save, open and pool; return the cells of one row."""
    collecting = saving = 0.0
    paths = [folder / f"{task}.safetensors" for task in range(tasks)]
    for seed, path in enumerate(paths):
        if model is None:
            found, seconds = timed(lambda seed=seed: streamed(rank, tokens, seed, device))  # type: ignore[misc]
        else:
            found, seconds = timed(lambda seed=seed: seen(model, rank, tokens, seed))  # type: ignore[misc]
        collecting += seconds
        saving += timed(lambda found=found, path=path: found.save(path))[1]  # type: ignore[misc]
        del found
    size = paths[0].stat().st_size / 1e9
    opened, opening = timed(lambda: [Statistics.load(path) for path in paths])
    shares, pooling = timed(lambda: list(pooled_shares(opened)))
    return (
        f"{collecting / tasks:.1f} | {saving / tasks:.1f} | {size:.2f} | {opening:.1f} | {pooling:.1f} "
        f"| {sum(shares) / len(shares):.2g}, {max(shares):.2g}"
    )


def streamed(rank: int, tokens: int, seed: int, device: str) -> Statistics:
    """Return bounded statistics of random rows, which go past all inputs batch by batch."""
    generator = torch.Generator(device).manual_seed(seed)
    sums = {name: RowSum(width, rank) for name, width in WIDTHS.items()}
    for start in range(0, tokens, BATCH):
        for name, width in WIDTHS.items():
            rows = torch.randn(min(BATCH, tokens - start), width, generator=generator, device=device)
            sums[name].add(rows * torch.arange(1, width + 1, device=device) ** -0.5)
    layers = {name: Layer(name, width, HIDDEN) for name, width in WIDTHS.items()}
    moments = {name: sums.pop(name).moment() for name in WIDTHS}
    return Statistics("8B-shaped", "random", moments, layers, tokens // 64, tokens, "token")


def seen(model: nn.Module, rank: int, tokens: int, seed: int) -> Statistics:
    """Return bounded statistics of what the layers of `model` read of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.split(torch.randint(1000, (tokens // 64, 64), generator=generator), BATCH // 64)
    return collect_statistics(model, ({"input_ids": one} for one in ids), "all-linear", directions=rank)


def shared_llama() -> nn.Module:
    """Return a Llama of the 8B shape in bfloat16, its layers with the weights of the first, its vocabulary small."""
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(config)
    model.bfloat16()
    layers = model.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    weights: dict[int, Tensor] = {id(weight): weight for weight in layers[0].parameters()}
    layers.extend(copy.deepcopy(layers[0], dict(weights)) for _ in range(LAYERS - 1))
    model.config.num_hidden_layers = LAYERS  # type: ignore[union-attr]
    return model


def pooled_shares(opened: list[Statistics]) -> Iterator[float]:
    """Pool each layer's moments of all tasks but the first; yield `lost` of each over its largest eigenvalue."""
    for name in opened[0].moments:
        moments = [one.moments[name] for one in opened]
        together = pooled(moments[1:] or moments)
        assert together.thin is not None or together.width == HIDDEN
        yield moments[0].lost / moments[0].largest()


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """Return what `work` returns and its seconds."""
    start = time.perf_counter()
    found = work()
    return found, time.perf_counter() - start


def resident() -> int:
    """Return the resident bytes of this process, where /proc tells them; else the peak so far."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * resource.getpagesize() if status.is_file() else peak()


def peak() -> int:
    """Return the most bytes that were ever resident, mapped files included."""
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * 1024


if __name__ == "__main__":
    main()
