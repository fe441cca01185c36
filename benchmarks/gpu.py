"""Everything at the size of Llama-3-8B on one GPU, with random weights; prints rows for docs/performance.md.

    python benchmarks/gpu.py [--layers 32] [--runs 5] [--write]
    python benchmarks/gpu.py --device cpu --tiny    # shows that it runs; the figures mean nothing

Statistics of all seven linear kinds of 8 tasks, bounded and exact, against the bare forward pass over the same batches;
the start of 8 adapters; a LoRA training step with A kept off its loud directions against the plain step; merging 8
adapters. Ratios are of medians of runs taken in turn, each waited for on the device. Without a GPU it says so and
measures nothing. --write puts the rows into docs/performance.md, in place of those of an earlier run.
"""

from __future__ import annotations

import argparse
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from loraloom import Adapter, LoraloomError, StartOptions, Statistics, Update, collect_statistics, initialise, merge

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- benchmarks/gpu.py -->", "<!-- end of benchmarks/gpu.py -->"
TASKS = 8
LLAMA = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
SMALL = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Bench:
    """What is measured on: the base model, its device, batches (samples, length) a task, runs, rank, bound."""

    model: LlamaForSequenceClassification
    device: torch.device
    shape: tuple[int, int, int]
    runs: int
    rank: int
    bound: int

    def batches(self, task: int) -> list[Batch]:
        """Return the random batches of a task, without padding."""
        count, samples, length = self.shape
        generator = torch.Generator().manual_seed(task)
        ids = torch.randint(3, self.model.config.vocab_size, (count, samples, length), generator=generator)
        return [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids.to(self.device)]

    def seconds(self, work: Callable[[], object]) -> float:
        """Return the wall-clock seconds of one call, the device's work included."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def in_turn(self, *works: Callable[[], object]) -> list[float]:
        """Return the median seconds of each of `works`, run in turn after one run that does not count."""
        rounds = [[self.seconds(work) for work in works] for _ in range(self.runs + 1)]
        return [statistics.median(side) for side in zip(*rounds[1:], strict=True)]

    def peak(self, work: Callable[[], object]) -> str:
        """Return the GB of the device that `work` holds at most, beyond what is there before; `-` on a CPU."""
        self.wait()
        if self.device.type != "cuda":
            work()
            return "-"
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return f"{(torch.cuda.max_memory_allocated() - before) / 1e9:.2f}"

    def wait(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    """Measure, print the rows, and write them where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--runs", type=int, default=5, help="runs of each side, taken in turn")
    parser.add_argument("--tiny", action="store_true", help="a model of two small layers")
    parser.add_argument("--bound", type=int, default=256, help="directions kept of an input")
    parser.add_argument("--write", action="store_true", help="put the rows into docs/performance.md")
    given = parser.parse_args()
    if given.write and given.tiny:
        parser.error("the figures of --tiny mean nothing: leave --write out")
    if given.device == "cuda" and not torch.cuda.is_available():
        print("no GPU is at hand: nothing was measured (--device cpu --tiny runs the same code small)")
        return
    device, layers = torch.device(given.device), 2 if given.tiny else given.layers
    shape, rank = ((2, 2, 16), 4) if given.tiny else ((4, 8, 512), 16)
    bench = Bench(random_llama(device, layers, tiny=given.tiny), device, shape, given.runs, rank, given.bound)
    rows = [row for part in (of_statistics, of_initialising_and_training, of_merging) for row in part(bench)]
    text = "\n".join([*head(bench, layers), "| what | seconds | against | seconds | ratio | peak on the device, GB |",
                      "|---|---|---|---|---|---|", *rows])  # fmt: skip
    print(text)
    if given.write:
        PAGE.write_text(with_section(PAGE.read_text(encoding="utf-8"), text), encoding="utf-8")


def random_llama(device: torch.device, layers: int, *, tiny: bool) -> LlamaForSequenceClassification:
    """Return a classifier shaped like Llama-3-8B with random bfloat16 weights, made on the device."""
    sizes = SMALL if tiny else LLAMA
    sizes = {**sizes, "num_hidden_layers": layers, "num_key_value_heads": sizes["num_attention_heads"] // 4}
    options: dict[str, Any] = {**sizes, "max_position_embeddings": 8192, "pad_token_id": 0, "num_labels": 2}
    torch.manual_seed(0)
    with device:
        of: Any = AutoModelForSequenceClassification
        model = of.from_config(LlamaConfig(**options), dtype=torch.bfloat16)
    return cast(LlamaForSequenceClassification, model.eval())


def of_statistics(bench: Bench) -> Iterator[str]:
    """Yield rows of collecting, bounded and exact, against the bare pass."""
    batches = bench.batches(0)

    def bare() -> None:
        with torch.no_grad():
            for batch in batches:
                bench.model.model(**batch, use_cache=False)

    def bounded() -> None:
        collect_statistics(bench.model, batches, "all-linear", directions=bench.bound)

    alone = bench.peak(bare)
    ours, theirs = bench.in_turn(bounded, bare)
    yield row(
        f"statistics of a task, all-linear, {bench.bound} directions", ours, "bare pass", theirs, bench.peak(bounded)
    )
    for name, wanted in exact_targets(bench).items():

        def exact(wanted: str | list[str] = wanted) -> None:
            collect_statistics(bench.model, batches, wanted)

        ours, theirs = bench.in_turn(exact, bare)
        yield row(f"statistics of a task, {name}, exact", ours, "bare pass", theirs, bench.peak(exact))
    yield f"| the bare pass | {theirs:.3f} | | | | {alone} |"


def exact_targets(bench: Bench) -> dict[str, str | list[str]]:
    """Return the targets whose float64 Gram matrices fit, by name: down_proj's are 12 times as large as the others'."""
    config = bench.model.config
    layers, n, wide = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    free = torch.cuda.mem_get_info()[0] if bench.device.type == "cuda" else 1 << 40
    if 8 * layers * (3 * n**2 + wide**2) < 0.8 * free:
        return {"all-linear": "all-linear"}
    return {"all but down_proj": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]}


def of_initialising_and_training(bench: Bench) -> Iterator[str]:
    """Yield rows of the statistics of all tasks, of all starts from them, and of training steps."""
    seen: dict[str, Statistics] = {}

    def collect() -> None:
        for task in range(TASKS):
            seen[str(task)] = collect_statistics(bench.model, bench.batches(task), "all-linear", directions=bench.bound)

    spent: list[float] = []
    peak = bench.peak(lambda: spent.append(bench.seconds(collect)))
    yield row(f"statistics of {TASKS} tasks, {bench.bound} directions", spent[0], "", None, peak)
    lora = LoraConfig(r=bench.rank, target_modules=sorted(seen["0"].layers))

    def others(name: str) -> dict[str, Statistics]:
        return {other: found for other, found in seen.items() if other != name}

    with tempfile.TemporaryDirectory() as folder:

        def start() -> None:
            for name, own in seen.items():
                initialise(Path(folder) / name, own, others(name), lora)

        needed = bench.seconds(start)
    each = needed / TASKS / len(seen["0"].layers)
    yield row(f"start of {TASKS} adapters from them ({each:.3f} a layer)", needed, "", None, "-")

    lora.task_type = "SEQ_CLS"
    adapted = get_peft_model(bench.model, lora)
    callback = initialise(adapted, seen["0"], others("0"), options=StartOptions(keep="projected")).callback()
    adapted.train()
    optimiser = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-5)
    batch = {key: value[:4] for key, value in bench.batches(0)[0].items()}
    batch["labels"] = torch.zeros(len(batch["input_ids"]), dtype=torch.long, device=bench.device)

    def plain() -> None:
        adapted(**batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    def projected() -> None:
        plain()
        callback.project(adapted)

    ours, theirs = bench.in_turn(projected, plain)
    yield row("a training step, A projected", ours, "plain LoRA", theirs, bench.peak(projected))


def of_merging(bench: Bench) -> Iterator[str]:
    """Yield rows of merging random adapters, factors in the CPU's memory as they are read."""
    config, generator = bench.model.config, torch.Generator().manual_seed(0)
    n, wide, values = config.hidden_size, config.intermediate_size, config.hidden_size // 4
    kinds = {"q": (n, n), "k": (values, n), "v": (values, n), "o": (n, n)}
    kinds |= {"gate": (wide, n), "up": (wide, n), "down": (n, wide)}

    def adapter() -> Adapter:
        updates = {}
        for index in range(config.num_hidden_layers):
            for kind, (m, width) in kinds.items():
                B, A = (torch.randn(*size, generator=generator) for size in ((m, bench.rank), (bench.rank, width)))
                updates[f"model.layers.{index}.{kind}_proj"] = Update(B / m**0.5, A / width**0.5)
        return Adapter(updates, {"peft_type": "LORA", "base_model_name_or_path": "random"})

    adapters = {str(task): adapter() for task in range(TASKS)}
    for rule in ("svd", "tsv", "ctm"):
        spent = bench.seconds(lambda rule=rule: merge(adapters, rule))  # type: ignore[misc]
        yield row(f"merging {TASKS} adapters by `{rule}`, on the CPU", spent, "", None, "-")


def row(what: str, ours: float, against: str, theirs: float | None, peak: str) -> str:
    """Return one row of the table."""
    other = ("", "") if theirs is None else (f"{theirs:.3f}", f"{ours / theirs:.2f}")
    return f"| {what} | {ours:.3f} | {against} | {other[0]} | {other[1]} | {peak} |"


def head(bench: Bench, layers: int) -> list[str]:
    """Return what the table was measured on."""
    count, samples, length = bench.shape
    on_gpu = bench.device.type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "peft"))
    size = sum(parameter.numel() for parameter in bench.model.parameters()) / 1e9
    return [
        "## A base model of Llama-3-8B's shape",
        "",
        "    python benchmarks/gpu.py",
        "",
        f"{name}, Python {platform.python_version()}, {versions}.",
        f"Random bfloat16 weights, {layers} layers, {size:.2f} billion parameters; {count} batches of {samples} x "
        f"{length} random tokens a task,",
        f"rank {bench.rank}, medians of {bench.runs} runs in turn. The peak is beyond the model.",
        "",
    ]


def with_section(page: str, text: str) -> str:
    """Return the page with `text` between this script's marks, at its end where they are not there yet.

    Raises LoraloomError where only one of the marks is there.
    """
    if (BEGIN in page) != (END in page):
        raise LoraloomError(f"{PAGE}: has one of the marks {BEGIN} and {END}", "restore the other or remove both")
    section = f"{BEGIN}\n{text}\n{END}"
    if BEGIN in page:
        return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: section, page, flags=re.DOTALL)
    return f"{page.rstrip()}\n\n{section}\n"


if __name__ == "__main__":
    main()
