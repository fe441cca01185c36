"""Where a task's A should start: linear algebra on second moments alone. No model, no file, no config.

Source: "Unraveling LoRA Interference: Orthogonal Subspaces for Robust Model Merging" (OSRM), Zhang and Zhou, ACL 2025,
arXiv 2505.22934:  min_A |A H^T|_F^2  subject to  A A^T = I_r,  H (k, n) the layer's inputs from the OTHER tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from loraloom.errors import LoraloomError, did_you_mean
from loraloom.starts.spectra import Others, Pool, orthonormal, rounding, share_seen, top_directions
from loraloom.statistics.moments import Moment

_INSIDE = 1e-12  # of the own energy: what projections leave of an input that lies inside what is stayed off is rounding


@dataclass(frozen=True)
class Diagnostics:
    """What the sample could and could not determine.

    rows_seen: rows of the other tasks.
    numerical_rank: rank of their second moment.
    determined: False where that rank is below n - r, so that many A reach the least energy and the task's own energy
        chose among them.
    eigengap: (l_(n-r) - l_(n-r+1)) / l_1, the gap below which the quiet directions begin; 0 where nothing separates
        them.
    others_energy: share of the others' energy, from 0 to 1, that an orthonormal basis of A's rows sees.
    own_energy: the same of the task's own inputs; None without them.
    avoided: how many directions are stayed off.
    notes: what is to be said, in plain sentences.
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

    A: (r, n) float32, orthonormal rows but for the rule `default`.
    avoid: (n, p) float32 with orthonormal columns, the loud directions of the other tasks; P = I - avoid avoid^T
        projects onto the low-interference space.
    diagnostics: what the sample could determine.
    """

    A: Tensor
    avoid: Tensor
    diagnostics: Diagnostics


@dataclass
class _Problem:
    """What every rule is given: the others' moments and the own one, r, the loud directions, a seed."""

    others: Others
    rank: int
    avoid: Tensor
    seed: int
    notes: list[str] = field(default_factory=list)

    @property
    def own(self) -> Moment | None:
        return self.others.own

    @property
    def width(self) -> int:
        return self.others.width


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
    """Return the start of A (r, n) for one layer of one task.

    others: a moment for each other task, all of width n.
    own: the task's own, which breaks ties inside the low-interference space; None where it is not known.
    rank: r.
    rule: `apart` (random directions off the others' loud ones), `osrm` (the paper), or a control: `mean` (the authors'
        code), `random`, `shared`, `default` (PEFT's).
    energy_share: share of the others' trace-normalised energy, in [0, 1), that the avoided directions hold.
    seed: for the random rules and for directions that no data determines; `shared` wants one seed for all tasks.
    taken: (q, n), rows to stay off as well, as the A's of earlier adapters are for a task that arrives later.

    Raises LoraloomError for an unknown rule, a rank above n, a share outside [0, 1), or unequal widths.
    """
    _check_moments([*others, own] if own else others, 1 if own else 0)
    return subspace_off(Others.of(others, own), rank, rule, energy_share, seed, taken)


def osrm_subspaces(
    moments: Mapping[str, Moment],
    rank: int,
    *,
    rule: str = "osrm",
    energy_share: float = 0.5,
    seeds: Mapping[str, int] | None = None,
) -> dict[str, Subspace]:
    """Return the start of A (r, n) for one layer of every task, each off all others, from one factorisation.

    moments: of each task's own inputs, by name, all of width n.
    seeds: one for each task by name; 0 for those that are not named.
    rank, rule, energy_share: as for `osrm_subspace`.

    Raises LoraloomError as `osrm_subspace` does, and for fewer than two tasks.
    """
    _check_moments(list(moments.values()), 1)
    pool = Pool(list(moments.values()))
    return {
        name: subspace_off(pool.without(index), rank, rule, energy_share, (seeds or {}).get(name, 0), None)
        for index, name in enumerate(moments)
    }


def subspace_off(
    others: Others, rank: int, rule: str, energy_share: float, seed: int, taken: Tensor | None
) -> Subspace:
    """Return what `osrm_subspace` does, for callers that ask several times about the same others."""
    _check(others.width, taken, rank, rule, energy_share)
    avoid = others.loud(energy_share)
    if taken is not None:
        avoid = torch.cat([avoid, _new_directions(taken.double(), avoid)], dim=1)
    problem = _Problem(others, rank, avoid, seed)
    A = RULES[rule](problem)
    return Subspace(A.float(), avoid.float(), _diagnose(problem, A))


def loud_directions(others: Sequence[Moment], energy_share: float) -> Tensor:
    """Return (n, p) float64: the fewest top eigenvectors of sum_i G_i / tr(G_i) that hold `energy_share` of its energy.

    Each task counts alike, however many rows it has or how large its activations are.

    others: a moment of each task, all of width n.
    energy_share: in [0, 1).
    """
    return Others.of(others, None).loud(energy_share)


def _new_directions(rows: Tensor, known: Tensor) -> Tensor:
    """Return (n, p) orthonormal columns that with `known` (n, q) span the rows (k, n) too."""
    _, singular, Vh = torch.linalg.svd(project_out(rows, known), full_matrices=False)
    # what the projection leaves of a row inside `known` is rounding
    found: Tensor = Vh[singular > 1e-6 * torch.linalg.matrix_norm(rows, 2)].T
    return found


def project_out(A: Tensor, avoid: Tensor) -> Tensor:
    """Return A (I - V V^T), in A's dtype.

    A: (r, n).
    avoid: V (n, p), orthonormal columns.

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

    own: the second moment of the task's own inputs, of width n.
    A: (r, n).

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
    others, width, rank = problem.others, problem.width, problem.rank
    untouched = others.dual(rank)
    if untouched is not None:
        return _fix_signs(untouched)
    end = others.quiet(rank + 1)
    if end is not None and end.values[rank] > end.values[rank - 1] + end.floor:
        tied_from = int((end.values < end.values[rank - 1] - end.floor).sum())
        spaces = end.vectors[:, :tied_from], end.vectors[:, tied_from:rank]
        return torch.cat([_turned_to_own(problem, space) for space in spaces])
    values, vectors = others.spectrum
    floor = rounding(values)
    cut = float(values[width - rank]) if width - rank < len(values) else 0.0
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
    return orthonormal(project_out(drawn, problem.avoid))


def _mean(problem: _Problem) -> Tensor:
    """The authors' code: one mean row a task, full SVD, the last r right singular vectors. A control, not the paper.

    With T - 1 < n rows these are an arbitrary basis of a null space. Unlike that code, padding is not averaged.
    """
    means = torch.stack([moment.mean() for moment in problem.others.moments])
    problem.notes.append("rule 'mean': the last singular vectors of few mean rows are an arbitrary choice")
    basis: Tensor = torch.linalg.svd(means, full_matrices=True).Vh
    return basis[-problem.rank :]


def _random(problem: _Problem) -> Tensor:
    """Random orthonormal rows, uniform over subspaces: the control of equal norm."""
    generator = torch.Generator().manual_seed(problem.seed)
    gaussian = torch.randn(problem.width, problem.rank, generator=generator, dtype=torch.float64)
    return orthonormal(gaussian.T)


def _default(problem: _Problem) -> Tensor:
    """PEFT's default A: Kaiming-uniform with a = sqrt(5), rows not orthonormal."""
    generator = torch.Generator().manual_seed(problem.seed)
    A = torch.empty(problem.rank, problem.width, dtype=torch.float64)
    bound = 1 / math.sqrt(problem.width)
    return A.uniform_(-bound, bound, generator=generator)


RULES: dict[str, Callable[[_Problem], Tensor]] = {
    "apart": _apart,
    "osrm": _osrm,
    "mean": _mean,
    "random": _random,
    "shared": _random,
    "default": _default,
}


def _own_directions(problem: _Problem, avoid: Tensor, count: int) -> Tensor:
    """Return `count` orthonormal directions off `avoid` (n, p) with most energy of the own inputs, (count, n).

    Where the own inputs hold fewer such directions, seeded random ones off both fill up.
    """
    found, own = avoid.new_zeros(problem.width, 0), problem.own
    if own is not None:
        values, vectors = top_directions(_without(own, avoid), count)
        found = vectors[:, values > own.trace() * _INSIDE]
    missing = count - found.shape[1]
    if missing:
        filling = _drawn_off(torch.cat([avoid, found], dim=1), missing, problem.seed)
        found = torch.cat([found, filling.T], dim=1)
        if count < problem.width - avoid.shape[1]:  # there is a choice
            problem.notes.append(
                f"own inputs choose {count - missing} of {count} directions; the rest is drawn by seed"
            )
    # one more pass: a QR of projected columns drifts back towards `avoid` by rounding
    return _fix_signs(orthonormal(project_out(found.T, avoid)))


def _turned_to_own(problem: _Problem, space: Tensor) -> Tensor:
    """Return orthonormal rows (p, n) that span `space` (n, p), own principal directions first, then seeded ones."""
    found, own = space[:, :0], problem.own
    if own is not None:
        values, turn = torch.linalg.eigh(own.seen_by(space.T))
        found = space @ turn.flip(1)[:, values.flip(0) > own.trace() * _INSIDE]
    drawn = _drawn(problem.width, space.shape[1] - found.shape[1], problem.seed)
    filling = orthonormal(project_out(drawn @ space @ space.T, found))
    return _fix_signs(orthonormal(torch.cat([found.T, filling]) @ space @ space.T))


def _drawn(width: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64)


def _drawn_off(avoid: Tensor, count: int, seed: int) -> Tensor:
    """Return random orthonormal rows (count, n) off `avoid` (n, p), but for rounding."""
    return orthonormal(project_out(_drawn(avoid.shape[0], count, seed), avoid))


def _without(moment: Moment, avoid: Tensor) -> Moment:
    """Return the moment of the rows projected off `avoid` (n, p)."""
    if moment.thin is not None:
        return replace(moment, rows=None, factor=project_out(moment.as_rows(), avoid))
    half = project_out(moment.as_gram(), avoid)
    return replace(moment, gram=project_out(half.T, avoid))


def _fix_signs(A: Tensor) -> Tensor:
    largest = A.abs().argmax(dim=1, keepdim=True)
    return A * A.gather(1, largest).sign()


def _diagnose(problem: _Problem, A: Tensor) -> Diagnostics:
    others, own, width, rank = problem.others, problem.own, problem.width, problem.rank
    numerical_rank, gap = others.ends(rank)
    determined = numerical_rank >= width - rank
    if not determined:
        problem.notes.append(
            f"the sample does not determine the space: {others.count} rows of the others span {numerical_rank} of "
            f"{width} directions, and r = {rank} leaves {width - rank - numerical_rank} to choose"
        )
    basis = orthonormal(A.double())
    return Diagnostics(
        rows_seen=others.count,
        numerical_rank=numerical_rank,
        determined=determined,
        eigengap=gap,
        others_energy=others.share_seen(basis),
        own_energy=None if own is None else share_seen(own, basis),
        avoided=problem.avoid.shape[1],
        notes=tuple(problem.notes),
    )


def _check_moments(moments: Sequence[Moment], own: int) -> None:
    """Raise LoraloomError unless there is a moment besides `own` own ones, and all are of one width."""
    if len(moments) <= own:
        raise LoraloomError("a subspace needs the statistics of at least one other task", "name the other tasks")
    _check_widths({moment.width for moment in moments})


def _check_widths(widths: set[int]) -> None:
    if len(widths) > 1:
        raise LoraloomError(f"statistics of one layer have unequal widths {sorted(widths)}", "use one base model")


def _check(width: int, taken: Tensor | None, rank: int, rule: str, energy_share: float) -> None:
    if rule not in RULES:
        raise LoraloomError(f"subspace rule {rule!r} is unknown", did_you_mean(rule, RULES))
    if taken is not None:
        _check_widths({width, taken.shape[1]})
    if not 1 <= rank <= width:
        raise LoraloomError(f"rank {rank} does not fit a layer of {width} inputs", f"choose a rank from 1 to {width}")
    if not 0 <= energy_share < 1:
        raise LoraloomError(f"energy_share {energy_share} is not in [0, 1)", "0.5 avoids the louder half")
