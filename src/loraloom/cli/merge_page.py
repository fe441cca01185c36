"""What a merge says on the terminal: its members in a table, its facts a line each, warnings, and what to type next."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loraloom.cli.terminal import Out
from loraloom.cli.words import counted
from loraloom.merging.card import agreement_lines, agreement_table, columns, member_rows, merge_lines
from loraloom.merging.choice import AgreementFacts
from loraloom.merging.facts import ForecastFacts, FusionFacts, MergedFacts, MergeFacts

_SERVED = (8, 16, 32, 64, 128, 256, 320, 512)  # values of vLLM's --max-lora-rank


def plan_page(out: Out, facts: MergeFacts) -> None:
    """Print what is to be merged, and what speaks against it: before anything is written."""
    count = len(facts.inputs)
    title = f"{count} adapters; energy is |dW|^2, share its part in the merge" if count > 1 else "One adapter"
    out.table(title, columns(facts), member_rows(facts))
    if facts.agreement:
        heads, rows = agreement_table(facts.agreement)
        title = f"{counted(len(rows), 'candidate')}: distance from the single models; 1 knows nothing of the task"
        out.table(title, heads, rows)
    for warning in facts.warnings:
        out.warn(warning)


def result_page(out: Out, facts: MergeFacts, folder: Path, told: Sequence[str]) -> None:
    """Print what was merged into `folder`, or would be; of the warnings those that were not `told` before."""
    out.facts(f"{folder}, not written" if isinstance(facts, ForecastFacts) else str(folder), merge_lines(facts))
    for warning in facts.warnings:
        if warning not in told:
            out.warn(warning)


def unlabelled_page(out: Out, facts: AgreementFacts, written: Path) -> None:
    """Print the nearest candidate of every rule, the nearest rule first."""
    every = sorted(facts.candidates, key=lambda one: one.mean)
    nearest = {(one.rule, str(one.options)): one for one in reversed(every)}.values()
    heads, rows = agreement_table(replace(facts, candidates=sorted(nearest, key=lambda one: one.mean)))
    out.table("Every rule at its nearest scale: distance from the single models; 1 knows nothing", heads, rows)
    out.facts(str(written), agreement_lines(facts))
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
