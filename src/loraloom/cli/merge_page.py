"""What a merge says on the terminal: its members in a table, its facts a line each, warnings, and what to type next."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraloom.adapters.dialects import DIALECTS, PEFT
from loraloom.adapters.servers import VLLM, ServedFacts
from loraloom.cli.terminal import Out
from loraloom.cli.words import counted
from loraloom.merging.card import agreement_lines, agreement_table, columns, member_rows, merge_lines
from loraloom.merging.choice import AgreementFacts, CandidateFacts
from loraloom.merging.facts import ForecastFacts, FusionFacts, MergedFacts, MergeFacts

if TYPE_CHECKING:
    from loraloom.results import MergeScore, StudyResult

WITH_TEXTS = (
    "with unlabelled texts of each task --rule distil --unlabelled FILE (once for each) trains it to answer as the "
    "single adapters do: six of GLUE kept 99 % so, and 87 % by TSV (docs/distil.md)"
)


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


def both_choices(result: StudyResult, facts: AgreementFacts) -> list[dict[str, Any]]:
    """Return of every rule, heads as trained, the scale that held-out labels choose and the one that agreement does.

    Each with its average on held-out rows, and its mean distance from the single models.
    """
    heldout = {(one.rule, one.scale): one.average.value for one in result.merges if _unaligned(one)}
    tried: dict[str, list[CandidateFacts]] = {}
    for candidate in facts.candidates:
        tried.setdefault(candidate.rule, []).append(candidate)
    return [
        {
            "rule": rule,
            **{
                who: {"scale": one.scale, "heldout": heldout[rule, one.scale], "distance": one.mean}
                for who, one in (
                    ("labels", max(several, key=lambda one: heldout[one.rule, one.scale])),
                    ("agreement", min(several, key=lambda one: one.mean)),
                )
            },
        }
        for rule, several in tried.items()
    ]


def both_choices_page(out: Out, rows: Sequence[dict[str, Any]]) -> None:
    """Print what `both_choices` returns, the nearest rule first."""
    cells = [
        (row["rule"], *(cell for who in ("labels", "agreement") for cell in _choice(row[who])))
        for row in sorted(rows, key=lambda row: float(row["agreement"]["distance"]))
    ]
    heads = ("rule", "by labels", "held-out", "distance", "by agreement", "held-out", "distance")
    out.table("Scales chosen with held-out labels and without, heads as trained", heads, cells)


def _choice(one: dict[str, float]) -> tuple[str, str, str]:
    return f"{one['scale']:g}", f"{100 * one['heldout']:.1f}", f"{one['distance']:.2f}"


def _unaligned(one: MergeScore) -> bool:
    return one.split == "heldout" and not one.aligned


def next_step(out: Out, facts: MergeFacts, folder: Path, align: Sequence[object]) -> None:
    """Print the command to type next: `align`, where there is one, if heads lie beside it, or else how to serve it."""
    if isinstance(facts, ForecastFacts):
        out.next("write it", "loraloom", *(word for word in sys.argv[1:] if word != "--dry-run"))
    elif isinstance(facts, FusionFacts):
        out.next("serve it", "vllm", "serve", folder)
    elif isinstance(facts, MergedFacts) and facts.served:
        serve_steps(out, facts.served, folder, facts.base)
    elif facts.dialect != PEFT.name:
        out.hint(f"in Python: {DIALECTS[facts.dialect].loading.replace('folder', repr(str(folder)))}")
    elif isinstance(facts, MergedFacts) and facts.heads and align:
        out.next("fit the heads to it, without labels", *align)
    elif isinstance(facts, MergedFacts) and facts.output_rank <= VLLM.ranks[-1]:
        rank = next(rank for rank in VLLM.ranks if rank >= facts.output_rank)
        serve_steps(out, ServedFacts(VLLM.name, rank), folder, facts.base)


def serve_steps(out: Out, served: ServedFacts, folder: Path, base: str | None) -> None:
    """Print the commands by which a server takes the adapter in `folder`; docs/serving.md tells more of them."""
    base, named = base or "BASE", f"merged={folder}"
    if served.server == "vllm":
        rank = ("--max-lora-rank", served.rank)
        out.next("serve it", "vllm", "serve", base, "--enable-lora", "--lora-modules", named, *rank)
    elif served.server == "sglang":
        launch = ("python", "-m", "sglang.launch_server", "--model-path", base)
        out.next("serve it", *launch, "--enable-lora", "--lora-paths", named)
    else:
        gguf = f"{folder.name}.gguf"
        where = ("--base", base, "--outfile", gguf)
        out.next("convert it, in llama.cpp's folder", "python", "convert_lora_to_gguf.py", folder.resolve(), *where)
        if served.server == "llamacpp":
            out.next("serve it", "llama-server", "-m", "BASE.gguf", "--lora", gguf)
        else:
            out.next(f"serve it, by a Modelfile with FROM BASE and ADAPTER ./{gguf}", "ollama", "create", "merged")
