"""What the statistics of several tasks tell before anything is trained: shared inputs, starts of A, ranks.

Everything is uncentred and every task counts alike: G_j / tr(G_j), the share of task j's energy in each direction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from loraloom.analysis.interference import ratio
from loraloom.errors import LoraloomError, raise_problems
from loraloom.progress import Reporter
from loraloom.starts.spectra import Pool, top_directions
from loraloom.starts.subspace import loud_directions, subspace_off
from loraloom.statistics.file import Statistics
from loraloom.statistics.fit import base_differences
from loraloom.statistics.moments import Moment

STARTS = ("apart", "osrm", "mean")  # `shared` and `default` see as much as `random`, which is chance
ENOUGH = 2.0  # own energy over others' from which a start is said to help
_RANKS = (1, 2, 4, 8, 16, 32, 64)
_NOTHING = 1e-6  # share of energy below which others are not told apart from silence
_LOUDEST = 128  # own directions among which the best A is sought


class StartFigures(NamedTuple):
    """What the A's of one start see, means over inputs and tasks.

    own, others: shares of energy. own_to_others: the mean of their ratio, worst_input: the least of any input's mean.
    interference: |A h_j| over |A h_i| to expect, inputs of equal energy.
    """

    own: float
    others: float
    own_to_others: float
    worst_input: float
    interference: float


@dataclass(frozen=True)
class Outlook:
    """Shares of energy by input (what a group of layers reads), all float64.

    shared: (L, T, T), [input, i, j] the share of task j's energy in the fewest directions that hold half of task i's;
    chance: (L, T), what that number of random directions would hold, p / n. starts: by rule (L, T, T), [input, i, j]
    the share of task j's energy that task i's A sees, rows of A taken at mean norm 1. attainable: (L, T, K), the ratio
    own / others of the best A of each of K `ranks`. rows: (L, T) int64, rows seen; widths: (L,).
    """

    tasks: list[str]
    inputs: list[str]
    rank: int
    shared: Tensor
    chance: Tensor
    starts: dict[str, Tensor]
    ranks: list[int]
    attainable: Tensor
    rows: Tensor
    widths: list[int]

    def of_start(self, rule: str) -> StartFigures:
        """Return the figures of one of `starts`."""
        own, others, relative = own_and_others(self.starts[rule])
        return StartFigures(
            own=float(own.mean()),
            others=float(others.mean()),
            own_to_others=float(relative.mean()),
            worst_input=float(relative.mean(dim=1).min()),
            interference=ratio(self.starts[rule].sqrt()),
        )

    def helped(self) -> Tensor:
        """Return (L,) bool: whether the best A of `rank` sees `ENOUGH` times more of its own, by median over tasks."""
        at: Tensor = self.attainable[:, :, self.ranks.index(self.rank)].median(dim=1).values
        return at >= ENOUGH

    def suggested_rank(self) -> int | None:
        """Return the largest power of 2 up to 64 at which the best A still sees `ENOUGH` times more of its own.

        By (lower) median over inputs and tasks; None where not even one direction does. It bounds the rank up to which
        a start can keep tasks apart; what rank a task needs to be learned, its inputs do not tell.
        """
        medians = self.attainable.flatten(0, 1).median(dim=0).values
        fitting = [r for r, value in zip(self.ranks, medians.tolist(), strict=True) if value >= ENOUGH and r in _RANKS]
        return max(fitting, default=None)

    def thin(self) -> list[str]:
        """Return the tasks whose statistics hold fewer rows than an input has features: figures of theirs flatter."""
        few = (self.rows < torch.tensor(self.widths)[:, None]).any(dim=0)
        return [task for task, is_few in zip(self.tasks, few.tolist(), strict=True) if is_few]


def outlook(statistics: Mapping[str, Statistics], rank: int, reporter: Reporter | None = None) -> Outlook:
    """Return what the statistics of two or more tasks tell of adapters to come.

    Starts are those of `osrm_subspace` at its defaults, each task with a seed of its own. They are measured on the
    statistics that chose them, which flatters where rows are few. No more than one input's moments are in memory.

    statistics: by task, on one base model.
    rank: rank of the adapters.
    reporter: is told how far the work is.

    Raises LoraloomError for fewer tasks, statistics of different bases or layers, and a rank above an input's width.
    """
    tasks = list(statistics)
    if len(tasks) < 2:
        raise LoraloomError("one task has no others to compare it with", "name the statistics of two tasks or more")
    first = statistics[tasks[0]]
    raise_problems("these statistics do not fit together", base_differences(statistics), "collect all on one base")
    inputs = list(first.moments)
    widths = [first.moments[name].width for name in inputs]
    ranks = sorted({rank, *(r for r in _RANKS if r <= min(widths))})
    found = [
        _of_input([statistics[task].moments[name] for task in tasks], rank, ranks)
        for name in (reporter or Reporter(quiet=True)).each("outlook", inputs)
    ]
    chance = (rank / torch.tensor(widths).double())[:, None, None].expand(len(inputs), len(tasks), len(tasks))
    return Outlook(
        tasks=tasks,
        inputs=inputs,
        rank=rank,
        shared=torch.stack([one.shared for one in found]),
        chance=torch.stack([one.chance for one in found]),
        starts={rule: torch.stack([one.starts[rule] for one in found]) for rule in STARTS} | {"random": chance},
        ranks=ranks,
        attainable=torch.stack([one.attainable for one in found]),
        rows=torch.tensor([one.rows for one in found]),
        widths=widths,
    )


class _OfInput(NamedTuple):
    """One input's part of an `Outlook`."""

    shared: Tensor
    chance: Tensor
    starts: dict[str, Tensor]
    attainable: Tensor
    rows: list[int]


def _of_input(moments: Sequence[Moment], rank: int, ranks: Sequence[int]) -> _OfInput:
    shared, chance = _shared(moments)
    rows = [moment.count for moment in moments]
    return _OfInput(shared, chance, _starts(moments, rank), _attainable(moments, ranks), rows)


def own_and_others(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return of (L, T, T) the diagonal, the mean of the rest of its row, and their ratio, all (L, T)."""
    own = values.diagonal(dim1=1, dim2=2)
    others = (values.sum(dim=2) - own) / (values.shape[1] - 1)
    return own, others, own / others.clamp_min(1e-300)


def best_starts(own: Moment, others: Sequence[Moment], ranks: Sequence[int]) -> list[Tensor]:
    """Return for each rank A (r, n) with orthonormal rows that sees most of `own` for what it sees of `others`.

    max_A tr(A G_own A^T) / tr(A (G_others + I / n) A^T), G_own of trace 1 and G_others the mean of matrices of trace 1:
    the trace ratio, by Dinkelbach's iteration q <- ratio at the top eigenvectors of G_own - q (G_others + I / n), which
    climbs to the optimum (Wang et al. 2007, Trace Ratio vs. Ratio Trace). I / n, what a random direction holds, keeps A
    from directions that nobody uses. A is sought among the 128 loudest directions of the own inputs, and has
    fewer rows where they hold fewer.
    """
    V = top_directions(own, _LOUDEST)[1]
    mine = _within(own, V)
    floor = torch.eye(len(mine), dtype=torch.float64) / own.width
    theirs = torch.stack([_within(other, V) for other in others]).mean(dim=0) + floor
    return [(V @ _trace_ratio(mine, theirs, rank)).T for rank in ranks]


def _trace_ratio(X: Tensor, Y: Tensor, rank: int) -> Tensor:
    """Return W (p, r) with orthonormal columns that maximises tr(W^T X W) / tr(W^T Y W), Y positive definite."""
    q = 0.0
    while True:
        W: Tensor = torch.linalg.eigh(X - q * Y).eigenvectors[:, -rank:]
        before, q = q, float((W * (X @ W)).sum() / (W * (Y @ W)).sum())
        if q <= before * (1 + 1e-9) + 1e-300:  # the ratio never falls from step to step
            return W


def share(moment: Moment, A: Tensor) -> float:
    """Return tr(A G A^T) / tr(G), times r / |A|_F^2: what of the energy rows of mean norm 1 see."""
    trace, norm = moment.trace(), float(A.double().square().sum())
    return moment.energy(A) / trace * len(A) / norm if trace > 0 and norm > 0 else 0.0


def _within(moment: Moment, V: Tensor) -> Tensor:
    """Return V^T G V / tr(G), (p, p), for V (n, p)."""
    return moment.seen_by(V.T) / max(moment.trace(), 1e-300)


def _shared(moments: Sequence[Moment]) -> tuple[Tensor, Tensor]:
    """Return (T, T) shares of the tasks' energies in each one's loud directions, and (T,) those of random ones."""
    loud = [loud_directions([moment], 0.5).T for moment in moments]
    values = [[share(moment, V) if len(V) else 0.0 for moment in moments] for V in loud]
    chance = [len(V) / moment.width for V, moment in zip(loud, moments, strict=True)]
    return torch.tensor(values, dtype=torch.float64), torch.tensor(chance, dtype=torch.float64)


def _starts(moments: Sequence[Moment], rank: int) -> dict[str, Tensor]:
    """Return by rule (T, T): the share of task j's energy that the A of task i's start sees."""
    pool = Pool(moments)
    others = [pool.without(i) for i in range(len(moments))]
    found: dict[str, Tensor] = {}
    for rule in STARTS:
        starts = [subspace_off(one, rank, rule, 0.5, seed, None).A for seed, one in enumerate(others)]
        found[rule] = torch.tensor([[share(moment, A) for moment in moments] for A in starts], dtype=torch.float64)
    return found


def _attainable(moments: Sequence[Moment], ranks: Sequence[int]) -> Tensor:
    """Return (T, K): own over others' mean share for the best A of every rank; 0 where the own has fewer directions."""
    found = []
    for i, own in enumerate(moments):
        others = [moment for j, moment in enumerate(moments) if j != i]
        row = []
        for rank, A in zip(ranks, best_starts(own, others, ranks), strict=True):
            theirs = sum(share(other, A) for other in others) / len(others)
            row.append(share(own, A) / max(theirs, _NOTHING) if len(A) == rank else 0.0)
        found.append(row)
    return torch.tensor(found, dtype=torch.float64)
