"""The limit of a merge on this machine, and how near every data-free rule comes to it: side by side, in one run.

    python benchmarks/limit.py                          # the size of Llama-3-8B: some 20 minutes on 2 cores
    python benchmarks/limit.py --modules 32 --repeats 3 --rules tsv knots
    python benchmarks/limit.py --adapters 100 --modules 8 --rules task_arithmetic tsv
    python benchmarks/limit.py --modules 32 --busy 2    # beside so many busy processes

No merge that records what it merged can be quicker than the limit: sha256 of every input, on all cores, and writing and
syncing an output of the size that the rule writes. Each turn runs `loraloom merge` in a process of its own and then
measures the limit, so that both meet the same machine; ratios are medians of the turns' own. `peft` rows are PEFT's
`add_weighted_adapter` on the same adapters, from files to file: PEFT neither checks nor hashes them.

The adapters have random float32 factors of rank 16, on all seven linear kinds of 32 layers, or the first `--modules` of
these 224.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from loraloom import Update, adapter_writer, get_rule, rule_names
from loraloom.files.hashing import file_sha256

RANK, LAYERS = 16, 32
KINDS = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
MODULES = {f"model.layers.{i}.{kind}": shape for i in range(LAYERS) for kind, shape in KINDS.items()}
PEFT = "peft "  # before a combination_type, in place of a rule
_BLOCK = 1 << 24  # bytes written at a time


class Run(NamedTuple):
    """Wall-clock seconds, seconds of all cores and peak memory in bytes of a process."""

    seconds: float
    cores: float
    peak: int


class Turn(NamedTuple):
    """One merge, the seconds of the limit right after it, and the bytes that it wrote."""

    run: Run
    limit: float
    size: int


def main() -> None:
    """Print a line a rule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--modules", type=int, default=len(MODULES))
    parser.add_argument("--repeats", type=int, default=1, help="turns, of which the medians count")
    parser.add_argument("--rules", nargs="+", default=[*data_free(), "peft linear", "peft cat"])
    parser.add_argument("--busy", type=int, default=0, help="processes that keep cores busy meanwhile")
    parser.add_argument("--options", nargs="*", default=[], help="further words of `loraloom merge`, as screen=off")
    given = parser.parse_args()
    versions = ", ".join(f"{name} {version(name)}" for name in ("loraloom", "torch", "peft"))
    print(f"{versions}; {os.cpu_count()} cores, {given.busy} busy processes beside")
    print(f"{given.adapters} adapters of {given.modules} modules, rank {RANK}; medians of {given.repeats} turns")
    modules = dict(list(MODULES.items())[: given.modules])
    with tempfile.TemporaryDirectory() as name, busy(given.busy):
        adapters = make_adapters(Path(name) / "in", modules, given.adapters)
        print(f"start: {statistics.median(start() for _ in range(3)):.1f} s are python's and torch's own")
        print(f"{'rule':16} {'seconds':>8} {'cores, s':>9} {'limit, s':>9} {'ratio':>6} {'peak, GB':>9} {'out, GB':>8}")
        turns: dict[str, list[Turn]] = {rule: [] for rule in given.rules}
        for _ in range(given.repeats):
            for rule in given.rules:
                turns[rule].append(turn(rule, adapters, Path(name), [f"--{word}" for word in given.options]))
        for rule, found in turns.items():
            seconds, cores, limits = (
                statistics.median(values)
                for values in zip(*[(one.run.seconds, one.run.cores, one.limit) for one in found], strict=True)
            )
            ratio = statistics.median(one.run.seconds / one.limit for one in found)
            peak, size = max(one.run.peak for one in found) / 1e9, found[0].size / 1e9
            print(f"{rule:16} {seconds:8.1f} {cores:9.1f} {limits:9.2f} {ratio:6.2f} {peak:9.2f} {size:8.2f}")


def data_free() -> list[str]:
    """Return the rules that need nothing but the adapters and work in factors."""
    rules = {name: get_rule(name) for name in rule_names()}
    return [name for name, rule in rules.items() if rule.exact and rule.needs in ((), ("seed",))]


def make_adapters(folder: Path, modules: Mapping[str, tuple[int, int]], count: int = 8, rank: int = RANK) -> list[Path]:
    """Write adapters with random factors and return their folders."""
    generator = torch.Generator().manual_seed(0)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "meta-llama/Meta-Llama-3-8B",
        "target_modules": [kind.split(".")[1] for kind in KINDS],
    }
    for task in range(count):
        with adapter_writer(folder / f"task{task}", config, torch.float32, modules) as out:
            for module, (m, n) in modules.items():
                B = torch.randn(m, rank, generator=generator) / m**0.5
                out.add(module, Update(B, torch.randn(rank, n, generator=generator) / n**0.5))
            out.finish({"kind": "random factors of a benchmark"})
    return [folder / f"task{task}" for task in range(count)]


def turn(rule: str, adapters: list[Path], folder: Path, options: list[str]) -> Turn:
    """Merge once, and measure the limit right after it."""
    output = folder / "out"
    if rule.startswith(PEFT):
        words = [sys.executable, __file__, *map(str, adapters), str(output), rule.removeprefix(PEFT)]
        run = child(words)
    else:
        run = child([*command(adapters, rule, output), *options])
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    shutil.rmtree(output)
    return Turn(run, limit(adapters, folder / "written", size), size)


def by_peft(adapters: list[str], output: str, way: str) -> None:
    """Merge by PEFT's `add_weighted_adapter` of this `combination_type`, from files to a file, weights of 1."""
    from peft import PeftModel
    from safetensors import safe_open

    model = nn.Module()
    with safe_open(Path(adapters[0]) / "adapter_model.safetensors", framework="pt") as file:
        modules = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in file.keys()}  # noqa: SIM118 (a handle, no mapping)
    for module in modules:
        m, n = MODULES[module]
        *path, last = module.split(".")
        at = model
        for part in path:
            if not hasattr(at, part):
                at.add_module(part, nn.Module())
            at = getattr(at, part)
        with torch.device("meta"):
            linear = nn.Linear(n, m, bias=False)
        at.add_module(last, linear.to_empty(device="cpu"))  # its weight is never touched, so it takes no memory
    model = PeftModel.from_pretrained(model, adapters[0], "0")
    for i, adapter in enumerate(adapters[1:], 1):
        model.load_adapter(adapter, str(i))
    names = [str(i) for i in range(len(adapters))]
    model.base_model.add_weighted_adapter(names, [1.0] * len(names), "merged", combination_type=way)
    model.save_pretrained(output, selected_adapters=["merged"])


def command(adapters: list[Path], rule: str, output: Path) -> list[str]:
    """Return the words of a merge."""
    folders = [str(adapter) for adapter in adapters]
    return [sys.executable, "-m", "loraloom", "merge", *folders, "--rule", rule, "-o", str(output), "--quiet"]


def limit(adapters: list[Path], place: Path, size: int) -> float:
    """Return the seconds to hash the adapters on all cores, then to write and sync `size` bytes."""
    files = [file for adapter in adapters for file in adapter.iterdir()]
    begun = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as cores:
        list(cores.map(file_sha256, files))
    block = bytes(_BLOCK)
    with open(place, "wb") as file:
        for at in range(0, size, _BLOCK):
            file.write(block[: size - at])
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - begun
    place.unlink()
    return seconds


def start() -> float:
    """Return the seconds that python takes to import torch and end."""
    return child([sys.executable, "-c", "import torch"]).seconds


def child(words: list[str]) -> Run:
    """Run a process. Raises CalledProcessError where it fails."""
    begun = time.perf_counter()
    with subprocess.Popen(words) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, words)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Run(time.perf_counter() - begun, usage.ru_utime + usage.ru_stime, peak)


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep `count` processes at work on nothing."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    if len(sys.argv) > 3 and not sys.argv[1].startswith("-"):
        by_peft(sys.argv[1:-2], sys.argv[-2], sys.argv[-1])
    else:
        main()
