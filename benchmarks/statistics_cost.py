"""What collecting statistics costs: median time of a forward pass with collection over that of the bare pass.

    python benchmarks/statistics_cost.py [--base FOLDER] [--threads 2] [--runs 7]

Real English text (long docstrings of Python's standard library, so that nearly every token counts: the dear case),
batch 32, length 64. The two passes alternate over the same batches. Target: at most 1.25 for query and value. Not
called statistics.py, which would hide the standard library's module from every script in this folder.
"""

from __future__ import annotations

import argparse
import ast
import platform
import statistics
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from loraloom import collect_statistics, demo_base

BATCH, LENGTH = 32, 64
LONG = 350  # characters that fill 64 tokens, nearly always
TARGETS: dict[str, str | Sequence[str]] = {"query, value": ["query", "value"], "all-linear": "all-linear"}


def main() -> None:
    """Measure, and print a Markdown table of ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--base", help="folder or name of a BERT-like model; default: MiniLM-L6-H384 of the demo package"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=7, help="alternating runs of each pass")
    parser.add_argument("--batches", type=int, default=4, help="batches a run")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = options.base or str(demo_base())
    model = AutoModel.from_pretrained(base, dtype=torch.float32).eval()
    batches = text_batches(base, options.batches)
    counted = sum(int(batch["attention_mask"].sum()) for batch in batches)
    print(f"{base}: {options.batches} batches of {BATCH} x {LENGTH}, {counted} tokens that count, float32, CPU")
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{options.threads} threads, {options.runs} alternating runs, {platform.machine()}"
    )
    print("\n| targets | forward, s | with collection, s | ratio of medians | lowest | highest |")
    print("|---|---|---|---|---|---|")
    for name, targets in TARGETS.items():
        bare, full = alternate(model, batches, targets, options.runs)
        ratios = [one / other for one, other in zip(full, bare, strict=True)]
        medians = statistics.median(bare), statistics.median(full)
        print(
            f"| {name} | {medians[0]:.3f} | {medians[1]:.3f} | {medians[1] / medians[0]:.2f} "
            f"| {min(ratios):.2f} | {max(ratios):.2f} |"
        )


def text_batches(base: str, count: int) -> list[dict[str, Tensor]]:
    """Return `count` tokenized batches of docstrings, always the same for one Python version."""
    texts: list[str] = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8", errors="replace"))
        kinds = (ast.FunctionDef, ast.ClassDef, ast.Module)
        found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
        texts += [text for text in found if len(text) >= LONG]
        if len(texts) >= count * BATCH:
            break
    tokenizer = AutoTokenizer.from_pretrained(base)
    starts = range(0, count * BATCH, BATCH)
    return [
        dict(
            tokenizer(
                texts[i : i + BATCH], padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
            )
        )
        for i in starts
    ]


def alternate(
    model: PreTrainedModel, batches: list[dict[str, Tensor]], targets: str | Sequence[str], runs: int
) -> tuple[list[float], list[float]]:
    """Return the seconds of `runs` bare passes and of `runs` passes with collection, taken in turn."""

    def bare() -> None:
        with torch.no_grad():
            for batch in batches:
                model(**batch)

    def full() -> None:
        collect_statistics(model, batches, targets)

    bare()
    full()
    pairs = [(seconds(bare), seconds(full)) for _ in range(runs)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def seconds(run: Callable[[], None]) -> float:
    """Return the wall-clock seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
