"""What a merge says on the terminal: its members in a table, its facts a line each, warnings, and what to type next."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from loraloom.cli.terminal import Out
from loraloom.cli.words import counted
from loraloom.merging.card import COLUMNS, agreement_table, member_rows, merge_lines
from loraloom.merging.facts import ForecastFacts, FusionFacts, MergedFacts, MergeFacts

_SERVED = (8, 16, 32, 64, 128, 256, 320, 512)  # values of vLLM's --max-lora-rank


def merge_page(out: Out, facts: MergeFacts, folder: Path) -> None:
    """Print what was merged into `folder`, or would be."""
    count = len(facts.inputs)
    shares = "" if isinstance(facts, ForecastFacts) else ", each with its share of the energy"
    out.table((f"{count} adapters" if count > 1 else "One adapter") + shares, COLUMNS, member_rows(facts))
    out.facts(f"{folder}, not written" if isinstance(facts, ForecastFacts) else str(folder), merge_lines(facts))
    if facts.agreement:
        columns, rows = agreement_table(facts.agreement)
        title = f"{counted(len(rows), 'candidate')}: distance from the single models; 1 knows nothing of the task"
        out.table(title, columns, rows)
    for warning in facts.warnings:
        out.warn(warning)


def next_step(out: Out, facts: MergeFacts, folder: Path, align: Sequence[object]) -> None:
    """Print the command to type next: `align` where heads lie beside the result, or else how to serve it."""
    if isinstance(facts, ForecastFacts):
        out.next("write it", "loraloom", *(word for word in sys.argv[1:] if word != "--dry-run"))
    elif isinstance(facts, FusionFacts):
        out.next("serve it", "vllm", "serve", folder)
    elif isinstance(facts, MergedFacts) and facts.heads:
        out.next("fit the heads to it, without labels", *align)
    elif isinstance(facts, MergedFacts) and facts.output_rank <= _SERVED[-1]:
        rank = next(rank for rank in _SERVED if rank >= facts.output_rank)
        lora = ("--enable-lora", "--lora-modules", f"merged={folder}", "--max-lora-rank", rank)
        out.next("serve it", "vllm", "serve", facts.base or "BASE", *lora)
