"""What evaluation costs beside the bare forward pass: rows a second with updates in the model over those without.

    python benchmarks/evaluation.py [BASE] [--ranks 16 96] [--rows 64] [--threads 2] [--runs 5]

BASE: an encoder, as the demo's, whose features for a head are taken, or a base that writes, whose losses of answers
are. Random updates on all linear layers, as of one adapter and of a merge of six. The way of the study (encoding,
batches sorted by length, `Evaluator.features` or `Generator.losses`) and the same layers run bare over the same padded
batches take turns. "on outputs" is how layers are updated that cannot take W + B A: in bfloat16, quantised, or with
gradients.
Target: 0.8 of the bare pass or more.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from datasets import Dataset

from loraloom import base_folder
from loraloom.adapters.heads import Head
from loraloom.adapters.update import Update
from loraloom.model import runner
from loraloom.model.generator import Generator
from loraloom.model.layers import layer_shape, target_layers
from loraloom.model.runner import Evaluator
from loraloom.model.tokens import batches
from loraloom.tasks.builtin_text import generic_texts


def main() -> None:
    """Measure, and print a Markdown table of ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", nargs="?", default="demo", help="folder or name of the base model")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 96])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5, help="alternating runs of each way")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model, bare, evaluated = ways(base_folder(options.base), options.rows)
    print(
        f"{options.base}: {options.rows} rows, all linear layers, float32, CPU; Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, {options.threads} threads, "
        f"{options.runs} alternating runs\n"
    )
    print("| rank | bare, rows a second | in weights: over bare | on outputs: over bare |\n|---|---|---|---|")
    layers = {name: layer_shape(layer) for name, layer in target_layers(model, "all-linear").items()}
    for rank in options.ranks:
        updates = {
            name: Update(0.01 * torch.randn(m, rank), torch.randn(rank, n) / n**0.5) for name, (n, m) in layers.items()
        }
        bare()
        taken = [[seconds(bare), *both(evaluated, updates)] for _ in range(options.runs)]
        inside, outside = (statistics.median(turn[0] / turn[way] for turn in taken) for way in (1, 2))
        rate = options.rows / statistics.median(turn[0] for turn in taken)
        print(f"| {rank} | {rate:.1f} | {inside:.2f} | {outside:.2f} |", flush=True)


def ways(base: str, count: int) -> tuple[Any, Callable[[], object], Callable[[dict[str, Update]], object]]:
    """Return the model, its bare pass over the rows, and their evaluation with given updates."""
    texts = generic_texts(count)
    if transformers.AutoConfig.from_pretrained(base).model_type in ("bert", "mpnet", "roberta", "deberta-v2"):
        evaluator = Evaluator(base)
        rows = Dataset.from_dict({"text_a": texts})
        last = "classifier"
        config: Any = evaluator.model.config
        shown = Head({f"{last}.weight": torch.zeros(2, config.hidden_size)}, last)
        fed = [batch for _, batch in batches(evaluator.encode(rows), evaluator.tokenizer, evaluator.batch_size)]

        def alone() -> None:
            with torch.inference_mode():
                for batch in fed:
                    evaluator.model(**batch)

        return (
            evaluator.model,
            alone,
            lambda updates: evaluator.features(updates, shown, evaluator.encode(rows)),
        )
    generator = Generator(base, max_length=256, batch_size=16)
    asked = Dataset.from_dict({"text_a": texts, "label": ["An answer of some ten words, more or less, a row."] * count})
    given = list(generator.batches(generator.encode(asked)))

    def bare() -> None:
        with torch.inference_mode():
            for _, batch in given:
                generator.said(batch)

    return generator.model, bare, lambda updates: generator.losses(updates, generator.encode(asked))


def both(evaluated: Callable[[dict[str, Update]], object], updates: dict[str, Update]) -> tuple[float, float]:
    """Return the seconds of evaluation with updates in the weights, and with all of them on the outputs."""
    inside = seconds(lambda: evaluated(updates))
    room, runner._SUMMED = runner._SUMMED, 0
    try:
        return inside, seconds(lambda: evaluated(updates))
    finally:
        runner._SUMMED = room


def seconds(run: Callable[[], object]) -> float:
    """Return the processor's seconds of one call: a busy machine does not count in them."""
    start = time.process_time()
    run()
    return time.process_time() - start


if __name__ == "__main__":
    main()
