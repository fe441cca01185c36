"""Our rules against the published code of KnOTS and of Core Space Merging: the same result, and in what time.

    git clone https://github.com/gstoica27/KnOTS              # at baa35e85768b8841820d35edc3e41b25304248c5
    git clone https://github.com/apanariello4/core-space-merging  # at 85176fab749578b0b54a027ea89495846e79757d
    python benchmarks/published.py --knots KnOTS --core core-space-merging

Nothing of theirs is kept here: their `task_merger.py` is imported from the checkouts named, with stubs for packages
which it imports and merging does not use; a repository that is not there is skipped. Eight adapters of rank 16 with
random factors, one layer, so that trimming "over all layers" and per layer are the same. Both sides are timed in turn,
from factors to the dense merged dW; the ratio is theirs over ours, of medians. Of theirs counts: KnOTS `transform` and
`merge`; Core the bases, the merge and the product, not its `matrix_rank` of the dense result, which is for a message.
A layer on which theirs would take more than `--limit` seconds, judged by the one before, is left out.

`difference` is |ours - theirs|_F / |theirs|_F by default options, `same input` what is left of it where a difference of
design is taken out; the notes below the table say which.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

import loraloom.merging  # noqa: F401 (registers the rules)
from loraloom import Update, get_rule

TASKS, RANK, DENSITY = 8, 16, 0.2
COMMITS = {
    "KnOTS": "baa35e85768b8841820d35edc3e41b25304248c5",
    "Core": "85176fab749578b0b54a027ea89495846e79757d",
}
STUBS = ("clip", "einops", "models", "models.huggingface_clip")  # imported by theirs, not used in what is called here
TIES = {"merge_method": "ties", "topK": 100 * DENSITY, "merging_type": "mean"}
SUM = {"merge_method": "tv", "topK": 100, "merging_type": "sum"}
NOTES = """
1. Their TIES keeps one entry more a task (`kthvalue` of d - k, inclusive). Same input: ours is asked for as many.
   In full space above 2^20 entries ours is float32 and takes magnitudes within 1e-6 of the threshold for equal to it:
   then rounding decides nothing, but a few entries in ten million are kept besides, which is what remains there.
2. Their core takes the singular vectors of [B_1 ... B_T] and of [A_1; ...; A_T] for its bases, ours those of
   [dW_1 ... dW_T] and [dW_1; ...; dW_T], which do not depend on how dW is split into B and A. TIES looks at entries, so
   other bases are another method. Same input: both merge their core matrices, same count as in note 1.
3. A sum, TSV and Iso-C do not depend on orthonormal bases: the rule of ours has no space, and a sum is a concatenation.
   Their TSV keeps 1/T of the core's triples a task, ours a task's rank: the same for equal ranks that together fit in
   the layer, as here.
4. Their Core multiplies back in float64, ours in float32: part of the ratio."""


@dataclass(frozen=True)
class Case:
    """One rule of ours and what theirs is; `same_input` returns what remains where both are fed the same thing."""

    rule: str
    space: str
    source: str
    theirs: Callable[[Any, Sequence[Update]], Tensor]
    same_input: Callable[[Any, Sequence[Update], Tensor], float] | None = None
    note: str = ""

    def ours(self, updates: Sequence[Update]) -> Tensor:
        """Return the dense dW that our rule makes of `updates` with scale 1."""
        return _ours(self.rule, updates, **({"density": DENSITY, "space": self.space} if self.rule == "ties" else {}))


def main() -> None:
    """Print versions, a Markdown table of both sides, and why the rest differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--knots", type=Path, help="checkout of gstoica27/KnOTS")
    parser.add_argument("--core", type=Path, help="checkout of apanariello4/core-space-merging")
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 4096], help="layers of width x width")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side, of which the median counts")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds above which theirs is left out")
    given = parser.parse_args()
    print(
        f"loraloom {version('loraloom')}, torch {torch.__version__} on {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores; "
        f"{TASKS} adapters of rank {RANK}, medians of {given.repeats} alternating runs"
    )
    checkouts = {"KnOTS": given.knots, "Core": given.core}
    present = {name: path for name, path in checkouts.items() if path and (path / "task_merger.py").is_file()}
    for name in checkouts:
        print(f"{name}: {_commit(name, present[name]) if name in present else 'no checkout, skipped'}")
    if not present:
        return
    print("\n| layer | rule | space | published code | ours, s | theirs, s | ratio | difference | same input | note |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, path in present.items():
        with imported(path) as theirs:
            for case in CASES[name]:
                compare(case, theirs, given.widths, given.repeats, given.limit)
    print(NOTES)
    if "Core" in present:
        with imported(present["Core"]) as theirs:
            split_dependence(theirs, given.widths[0])


def compare(case: Case, theirs: Any, widths: Sequence[int], repeats: int, limit: float) -> None:
    """Print a row for every width, from narrow to wide."""
    before: tuple[int, float] | None = None
    for width in sorted(widths):
        start = f"| {width} x {width} | {case.rule} | {case.space} | {case.source} |"
        growth = 3 if case.space == "knots" else 2  # of an SVD of [dW_1 ... dW_T], of entries
        foreseen = before[1] * (width / before[0]) ** growth if before else 0.0
        if foreseen > limit:
            print(f"{start} | left out: about {foreseen:.0f} | | | | |", flush=True)
            continue
        updates = factors(width)
        seconds: tuple[list[float], list[float]] = [], []
        for _ in range(repeats):
            ours = _timed(lambda: case.ours(updates), seconds[0])  # noqa: B023 (called at once)
            other = _timed(lambda: case.theirs(theirs, updates), seconds[1])  # noqa: B023
        our_time, their_time = (statistics.median(times) for times in seconds)
        left = f"{case.same_input(theirs, updates, other):.1e}" if case.same_input else ""
        print(
            f"{start} {our_time:.3f} | {their_time:.3f} | {their_time / our_time:.1f} | "
            f"{distance(ours, other):.1e} | {left} | {case.note} |",
            flush=True,
        )
        before = width, their_time


def split_dependence(theirs: Any, width: int) -> None:
    """Print how far TIES in the core moves where the same dW come as B_i 3^i and A_i 3^-i."""
    updates = factors(width)
    split = [Update(u.B * 3.0**i, u.A / 3.0**i) for i, u in enumerate(updates)]
    ours = [_ours("ties", given, density=DENSITY, space="core") for given in (updates, split)]
    other = [core_merge(theirs, given, TIES) for given in (updates, split)]
    print(
        f"\nThe same dW_i from factors B_i 3^i and A_i 3^-i, width {width}: TIES in the core moves by "
        f"{distance(*ours):.1e} in ours and by {distance(*other):.1e} in theirs."
    )


def factors(width: int) -> list[Update]:
    """Return the updates of a layer (width, width) with random factors."""
    generator = torch.Generator().manual_seed(0)
    scale = width**-0.5
    return [
        Update(
            torch.randn(width, RANK, generator=generator) * scale, torch.randn(RANK, width, generator=generator) * scale
        )
        for _ in range(TASKS)
    ]


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Return |ours - theirs|_F / |theirs|_F."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@contextlib.contextmanager
def imported(checkout: Path) -> Iterator[tuple[Any, Any]]:
    """Yield `task_merger` and `ft_handlers` of a checkout; then forget its modules: both repositories share names."""
    folder = checkout.resolve()
    for name in STUBS:
        sys.modules[name] = MagicMock()
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module("task_merger"), importlib.import_module("ft_handlers")
    finally:
        sys.path.remove(str(folder))
        for name, module in list(sys.modules.items()):
            if name in STUBS or folder in Path(getattr(module, "__file__", None) or "").parents:
                del sys.modules[name]


def knots_merge(theirs: Any, updates: Sequence[Update], config: dict[str, Any], kind: str) -> Tensor:
    """Return the dW (m, n) of KnOTS' merger of one `kind`, "svd-vector" (KnOTS space) or "vector" (full space)."""
    merger_module, handlers = theirs
    base = _model(Update(torch.zeros_like(updates[0].B), torch.zeros_like(updates[0].A)))
    base["layer"].weight = nn.Parameter(updates[0].B.new_zeros(updates[0].shape[:2]), requires_grad=False)
    make = merger_module.get_merge_handler(kind)
    merger = make([_model(update) for update in updates], base, handlers.LoRAHandler, device="cpu")
    merger.transform(config)
    merged: Tensor = merger.merge(config).state_dict()["layer.weight"]
    return merged


def core_parts(
    theirs: Any, updates: Sequence[Update], config: dict[str, Any]
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Return their core matrices (R, R), the left basis (m, R), their merged core (R, R) and right basis (R, n)."""
    merger_module, handlers = theirs
    models = [_model(update).state_dict() for update in updates]
    merger = merger_module.MatrixPerLayerMerger(models, nn.Module(), handlers.LoRAHandler, device="cpu")
    parameters = [handler.get_ft_ab_parameters() for handler in merger.ftms_params]
    cores, left, right = merger.get_core_matrices(parameters, "layer.weight", config)
    merged = merger._merge_tensors(cores, config)
    if config.get("isotropize"):
        merged = merger_module.isotropize_matrix(merged)
    return cores, left, merged, right


def core_merge(theirs: Any, updates: Sequence[Update], config: dict[str, Any]) -> Tensor:
    """Return the dW (m, n) of Core Space Merging."""
    _, left, merged, right = core_parts(theirs, updates, config)
    return left @ merged @ right


def as_many_entries(space: str) -> Callable[[Any, Sequence[Update], Tensor], float]:
    """Return the distance of our TIES in `space` from theirs where both keep as many entries."""

    def left_over(theirs: Any, updates: Sequence[Update], other: Tensor) -> float:
        m, n, _ = updates[0].shape
        rows = m if space == "full" else min(m, sum(update.rank for update in updates))
        return distance(_ours("ties", updates, density=_density(rows * n), space=space), other)

    return left_over


def in_their_core(theirs: Any, updates: Sequence[Update], other: Tensor) -> float:
    """Return the distance of our TIES from theirs where both merge their core matrices and keep as many entries."""
    cores, _, merged, _ = core_parts(theirs, updates, TIES)
    one = torch.eye(cores[0].shape[1], dtype=torch.float64)
    given = [Update(core, one) for core in cores]
    return distance(_ours("ties", given, density=_density(cores[0].numel()), space="full"), merged)


def _density(size: int) -> float:
    """Return the share of `size` entries that their TIES keeps at DENSITY."""
    return (int(size * DENSITY) + 1) / size


def _ours(name: str, updates: Sequence[Update], **options: Any) -> Tensor:
    rule = get_rule(name)
    checked, problems = rule.check(options)
    assert not problems, problems
    merged = rule.layer(updates, checked)
    if isinstance(merged, Tensor):
        return merged
    assert isinstance(merged, Update)
    return merged.dense()


def _model(update: Update) -> nn.ModuleDict:
    """Return a model of one layer that holds an adapter under PEFT's names."""
    layer = nn.Module()
    for name, factor in (("lora_A", update.A), ("lora_B", update.B)):
        linear = nn.Linear(factor.shape[1], factor.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(factor, requires_grad=False)
        layer.add_module(name, nn.ModuleDict({"default": linear}))
    return nn.ModuleDict({"layer": layer})


def _timed(run: Callable[[], Tensor], seconds: list[float]) -> Tensor:
    """Return what `run` does and append its seconds; what it prints is dropped."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return result


def _commit(name: str, checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown commit"
    return found if found == COMMITS[name] else f"{found}, but this script was written for {COMMITS[name]}"


CASES = {
    "KnOTS": [
        Case("task_arithmetic", "knots", "KnOTS", lambda t, u: knots_merge(t, u, SUM, "svd-vector"), note="3"),
        Case(
            "ties", "knots", "KnOTS", lambda t, u: knots_merge(t, u, TIES, "svd-vector"), as_many_entries("knots"), "1"
        ),
        Case("ties", "full", "KnOTS", lambda t, u: knots_merge(t, u, TIES, "vector"), as_many_entries("full"), "1"),
    ],
    "Core": [
        Case("task_arithmetic", "core", "Core", lambda t, u: core_merge(t, u, SUM), note="3, 4"),
        Case("ties", "core", "Core", lambda t, u: core_merge(t, u, TIES), in_their_core, "1, 2, 4"),
        Case("tsv", "core", "Core", lambda t, u: core_merge(t, u, {"merge_method": "tsv"}), note="3, 4"),
        Case("iso_c", "core", "Core", lambda t, u: core_merge(t, u, {**SUM, "isotropize": True}), note="3, 4"),
    ],
}


if __name__ == "__main__":
    main()
