"""Where a task's A should start: linear algebra on second moments alone. No model, no file, no config.

Source: "Unraveling LoRA Interference: Orthogonal Subspaces for Robust Model Merging" (OSRM), Zhang and Zhou, ACL 2025,
arXiv 2505.22934:  min_A |A H^T|_F^2  subject to  A A^T = I_r,  H (k, n) the layer's inputs from the OTHER tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from loraloom.errors import LoraloomError, did_you_mean
from loraloom.moments import Moment, pooled

Keep = Literal["free", "frozen", "projected"]
Scale = Literal["unit", "response"]
DEFAULT = "apart"  # the rule of docs/study-subspaces.md


@dataclass(frozen=True)
class Diagnostics:
    """What the sample could and could not determine.

    rows_seen: rows of the other tasks. numerical_rank: rank of their second moment. determined: False where that rank
    is below n - r, so that many A reach the least energy and the task's own energy chose among them.
    eigengap: (l_(n-r) - l_(n-r+1)) / l_1, the gap below which the quiet directions begin (0: nothing separates them).
    others_energy: share of the others' energy that an orthonormal basis of A's rows sees. own_energy: the same for the
    task's own inputs (None without them). avoided: number of directions in the thin factor. notes: plain sentences.
    """

    rows_seen: int
    numerical_rank: int
    determined: bool
    eigengap: float
    others_energy: float
    own_energy: float | None
    avoided: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subspace:
    """A start for A and the space it should stay in.

    A: (r, n) float32, orthonormal rows but for the rule `default`. avoid: (n, p) float32 with orthonormal columns, the
    loud directions of the other tasks; P = I - avoid avoid^T projects onto the low-interference space.
    """

    A: Tensor
    avoid: Tensor
    diagnostics: Diagnostics


@dataclass
class _Problem:
    """What every rule is given: per-task moments of the others, the own moment, r, the loud directions, a seed."""

    others: Sequence[Moment]
    own: Moment | None
    rank: int
    avoid: Tensor
    seed: int
    notes: list[str] = field(default_factory=list)

    @property
    def width(self) -> int:
        return self.others[0].width

    @cached_property
    def pooled(self) -> Moment:
        return pooled(self.others)

    @cached_property
    def pooled_spectrum(self) -> tuple[Tensor, Tensor]:
        return spectrum(self.pooled)


def osrm_subspace(
    others: Sequence[Moment],
    own: Moment | None,
    rank: int,
    *,
    rule: str = "osrm",
    energy_share: float = 0.5,
    seed: int = 0,
    taken: Tensor | None = None,
) -> Subspace:
    """Return the start of A for one layer of one task.

    others: one Moment for each other task, all of width n; own: the task's own, which breaks ties inside the
    low-interference space. rule: `apart` (random directions off the others' loud ones), `complement` (there, those of
    most own energy), `osrm` (the paper), or a control: `mean` (the authors' code), `random`, `shared`, `default`
    (PEFT's). energy_share: share of the others' trace-normalised energy that the avoided directions hold. seed: for the
    random rules and for directions that no data determines; `shared` wants the same seed for every task. taken: (q, n),
    rows to stay off as well, as the A's of earlier adapters are for a task that arrives later.

    Raises LoraloomError for an unknown rule, a rank above n, a share outside [0, 1), or unequal widths.
    """
    _check(others, own, taken, rank, rule, energy_share)
    avoid = loud_directions(others, energy_share)
    if taken is not None:
        avoid = torch.cat([avoid, _new_directions(taken.double(), avoid)], dim=1)
    problem = _Problem(others, own, rank, avoid, seed)
    A = RULES[rule](problem)
    return Subspace(A.float(), avoid.float(), _diagnose(problem, A))


def loud_directions(others: Sequence[Moment], energy_share: float) -> Tensor:
    """Return (n, p) float64: the fewest top eigenvectors of sum_i G_i / tr(G_i) that hold `energy_share` of its energy.

    Each task counts alike, however many rows it has or how large its activations are.
    """
    loud = [_weighted(moment, 1 / moment.trace()) for moment in others if moment.trace() > 0]
    if not loud or energy_share == 0:
        return torch.zeros(others[0].width, 0, dtype=torch.float64)
    values, vectors = spectrum(pooled(loud))
    held = torch.cumsum(values, 0) / values.sum()
    count = int((held < energy_share).sum()) + 1
    return vectors[:, :count]


def _new_directions(rows: Tensor, known: Tensor) -> Tensor:
    """Return (n, p) orthonormal columns that with `known` (n, q) span the rows (k, n) too."""
    _, singular, Vh = torch.linalg.svd(project_out(rows, known), full_matrices=False)
    # what the projection leaves of a row inside `known` is rounding
    found: Tensor = Vh[singular > 1e-6 * torch.linalg.matrix_norm(rows, 2)].T
    return found


def project_out(A: Tensor, avoid: Tensor) -> Tensor:
    """Return A (I - V V^T) for A (r, n) and V = avoid (n, p), in A's dtype.

    Projected twice: the first pass leaves rounding errors along V of the size of what it removed.
    """
    for _ in range(2):
        A = A - (A @ avoid) @ avoid.T
    return A


def check_room(avoid: Tensor, rank: int) -> None:
    """Raise LoraloomError where the complement of `avoid` (n, p) has fewer than `rank` directions."""
    width, avoided = avoid.shape
    if width - avoided < rank:
        raise LoraloomError(
            f"{avoided} directions to stay off leave {width - avoided} of {width}, too few for rank {rank}",
            "lower energy_share or the rank, or stay off fewer adapters",
        )


def response_scale(own: Moment, A: Tensor) -> float:
    """Return the c for which tr(cA G_own (cA)^T) equals what PEFT's default A is expected to give.

    PEFT draws A (r, n) from Kaiming-uniform with a = sqrt(5): entries of variance 1 / (3 n), so the expected response
    is r tr(G_own) / (3 n). Raises LoraloomError where A sees nothing of the task's own inputs.
    """
    rank, width = A.shape
    seen = own.energy(A)
    if seen <= 1e-12 * own.trace():
        raise LoraloomError(
            "A sees none of the inputs whose response it should match",
            "give more rows to the statistics, a lower rank, or scale='unit'",
        )
    return math.sqrt(rank * own.trace() / (3 * width) / seen)


def _osrm(problem: _Problem) -> Tensor:
    """The paper: eigenvectors of the r smallest eigenvalues of the pooled second moment of the others.

    Where eigenvalues tie at the r-th smallest (mostly at 0: directions the others leave untouched), every choice among
    the tied is optimal: those with most own energy are taken. The rows are turned to own principal directions, so the
    result does not hang on rounding.
    """
    values, vectors = problem.pooled_spectrum
    width, rank, floor = problem.width, problem.rank, _rounding(values)
    cut = float(_padded(values, width)[width - rank])
    if cut <= floor:
        return _own_directions(problem, vectors[:, values > floor], rank)
    loud, not_quiet = vectors[:, values > cut + floor], vectors[:, values >= cut - floor]
    quiet = _own_directions(problem, not_quiet, width - not_quiet.shape[1])
    tied = _own_directions(problem, torch.cat([loud, quiet.T], dim=1), rank - len(quiet))
    return torch.cat([quiet, tied])


def _apart(problem: _Problem) -> Tensor:
    """Random orthonormal rows in the complement of the loud directions: off the others, and each task elsewhere."""
    check_room(problem.avoid, problem.rank)
    drawn = _drawn_off(problem.avoid, problem.rank, problem.seed)
    # one more pass: a QR of projected rows drifts back towards `avoid` by rounding
    return _orthonormal(project_out(drawn, problem.avoid))


def _complement(problem: _Problem) -> Tensor:
    """The r directions of most own energy in the complement of the others' loud directions."""
    check_room(problem.avoid, problem.rank)
    return _own_directions(problem, problem.avoid, problem.rank)


def _mean(problem: _Problem) -> Tensor:
    """The authors' code: one mean row a task, full SVD, the last r right singular vectors. A control, not the paper.

    With T - 1 < n rows these are an arbitrary basis of a null space. Unlike that code, padding is not averaged.
    """
    means = torch.stack([moment.mean() for moment in problem.others])
    problem.notes.append("rule 'mean': the last singular vectors of few mean rows are an arbitrary choice")
    basis: Tensor = torch.linalg.svd(means, full_matrices=True).Vh
    return basis[-problem.rank :]


def _random(problem: _Problem) -> Tensor:
    """Random orthonormal rows, uniform over subspaces: the control of equal norm."""
    generator = torch.Generator().manual_seed(problem.seed)
    gaussian = torch.randn(problem.width, problem.rank, generator=generator, dtype=torch.float64)
    return _orthonormal(gaussian.T)


def _default(problem: _Problem) -> Tensor:
    """PEFT's default A: Kaiming-uniform with a = sqrt(5), rows not orthonormal."""
    generator = torch.Generator().manual_seed(problem.seed)
    A = torch.empty(problem.rank, problem.width, dtype=torch.float64)
    bound = 1 / math.sqrt(problem.width)
    return A.uniform_(-bound, bound, generator=generator)


RULES: dict[str, Callable[[_Problem], Tensor]] = {
    "apart": _apart,
    "osrm": _osrm,
    "complement": _complement,
    "mean": _mean,
    "random": _random,
    "shared": _random,
    "default": _default,
}


def meant(rule: str) -> tuple[Keep, Scale]:
    """Return how a rule's A is meant to be kept and scaled: published rules and controls are let go and unit."""
    return ("projected", "response") if rule in ("apart", "complement") else ("free", "unit")


def _own_directions(problem: _Problem, avoid: Tensor, count: int) -> Tensor:
    """Return `count` orthonormal directions off `avoid` (n, p) with most energy of the own inputs, (count, n).

    Where the own inputs hold fewer such directions, seeded random ones off both fill up.
    """
    width = problem.width
    found = torch.zeros(width, 0, dtype=torch.float64)
    if problem.own is not None:
        values, vectors = spectrum(_without(problem.own, avoid))
        # what the projection leaves of an input that lies inside `avoid` is rounding, not a direction
        floor = problem.own.trace() * 1e-12
        found = vectors[:, : min(count, int((values > floor).sum()))]
    missing = count - found.shape[1]
    if missing:
        filling = _drawn_off(torch.cat([avoid, found], dim=1), missing, problem.seed)
        found = torch.cat([found, filling.T], dim=1)
        if count < width - avoid.shape[1]:  # there is a choice
            problem.notes.append(
                f"own inputs choose {count - missing} of {count} directions; the rest is drawn by seed"
            )
    # one more pass: a QR of projected columns drifts back towards `avoid` by rounding
    return _fix_signs(_orthonormal(project_out(found.T, avoid)))


def _drawn_off(avoid: Tensor, count: int, seed: int) -> Tensor:
    """Return random orthonormal rows (count, n) off `avoid` (n, p), but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(count, avoid.shape[0], generator=generator, dtype=torch.float64)
    return _orthonormal(project_out(gaussian, avoid))


def spectrum(moment: Moment) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (p,) descending and eigenvectors (n, p) of H^T H, float64, with p = min(k, n).

    While the rows are at hand and fewer than n, an SVD of the rows spares the n x n eigenproblem.
    """
    if moment.thin is not None:
        _, singular, Vh = torch.linalg.svd(moment.as_rows(), full_matrices=False)
        return singular.square(), Vh.T
    values, vectors = torch.linalg.eigh(moment.as_gram())
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _weighted(moment: Moment, weight: float) -> Moment:
    """Return the moment whose Gram matrix is `weight` times that of `moment`."""
    if moment.thin is not None:
        return replace(moment, rows=None, factor=moment.as_rows() * math.sqrt(weight))
    return replace(moment, gram=moment.as_gram() * weight)


def _without(moment: Moment, avoid: Tensor) -> Moment:
    """Return the moment of the rows projected off `avoid` (n, p)."""
    if moment.thin is not None:
        return replace(moment, rows=None, factor=project_out(moment.as_rows(), avoid))
    half = project_out(moment.as_gram(), avoid)
    return replace(moment, gram=project_out(half.T, avoid))


def _rounding(values: Tensor) -> float:
    """Return how well the eigenvalues (descending) of a Gram matrix are known: some eps times the largest."""
    return float(values[0]) * len(values) * 10 * torch.finfo(torch.float64).eps if len(values) else 0.0


def _padded(values: Tensor, width: int) -> Tensor:
    """Return all n eigenvalues: those of fewer rows than n are followed by zeros."""
    return torch.cat([values, values.new_zeros(width - len(values))])


def _orthonormal(rows: Tensor) -> Tensor:
    """Return rows (r, n) that are orthonormal and span the same space, by QR."""
    Q: Tensor = torch.linalg.qr(rows.T).Q
    return Q.T


def _fix_signs(A: Tensor) -> Tensor:
    largest = A.abs().argmax(dim=1, keepdim=True)
    return A * A.gather(1, largest).sign()


def _diagnose(problem: _Problem, A: Tensor) -> Diagnostics:
    pooled, (values, _) = problem.pooled, problem.pooled_spectrum
    width, rank = problem.width, problem.rank
    padded = _padded(values, width)
    numerical_rank = int((values > _rounding(values)).sum())
    determined = numerical_rank >= width - rank
    if not determined:
        problem.notes.append(
            f"the sample does not determine the space: {pooled.count} rows of the others span {numerical_rank} of "
            f"{width} directions, and r = {rank} leaves {width - rank - numerical_rank} to choose"
        )
    top = float(padded[0])
    gap = float(padded[width - rank - 1] - padded[width - rank]) / top if rank < width and top > 0 else 0.0
    basis = _orthonormal(A.double())
    own = problem.own
    return Diagnostics(
        rows_seen=pooled.count,
        numerical_rank=numerical_rank,
        determined=determined,
        eigengap=max(gap, 0.0),
        others_energy=_share(pooled, basis),
        own_energy=None if own is None else _share(own, basis),
        avoided=problem.avoid.shape[1],
        notes=tuple(problem.notes),
    )


def _share(moment: Moment, basis: Tensor) -> float:
    trace = moment.trace()
    return moment.energy(basis) / trace if trace > 0 else 0.0


def _check(
    others: Sequence[Moment], own: Moment | None, taken: Tensor | None, rank: int, rule: str, energy_share: float
) -> None:
    if rule not in RULES:
        raise LoraloomError(f"subspace rule {rule!r} is unknown", did_you_mean(rule, RULES))
    if not others:
        raise LoraloomError("a subspace needs the statistics of at least one other task", "name the other tasks")
    widths = {moment.width for moment in others} | ({own.width} if own is not None else set())
    widths |= {taken.shape[1]} if taken is not None else set()
    if len(widths) > 1:
        raise LoraloomError(f"statistics of one layer have unequal widths {sorted(widths)}", "use one base model")
    width = widths.pop()
    if not 1 <= rank <= width:
        raise LoraloomError(f"rank {rank} does not fit a layer of {width} inputs", f"choose a rank from 1 to {width}")
    if not 0 <= energy_share < 1:
        raise LoraloomError(f"energy_share {energy_share} is not in [0, 1)", "0.5 avoids the louder half")
