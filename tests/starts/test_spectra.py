"""Spectra, and starts of all tasks, against dense `torch.linalg.eigh`, whatever the shapes, ranks and conditions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import test_subspace
import torch
from hypothesis import given, settings, strategies as st
from test_subspace import projector, rows
from torch import Tensor

from loraloom.errors import LoraloomError
from loraloom.starts import spectra
from loraloom.starts.spectra import Others, Pool, spectrum, top_directions
from loraloom.starts.subspace import Subspace, loud_directions, osrm_subspace, osrm_subspaces, subspace_off
from loraloom.statistics.moments import Moment


@contextmanager
def solvers(*, partial: bool = False, dual: bool = True) -> Iterator[None]:
    """Let the partial solvers work at the sizes of tests, or the way through K^-1 never."""
    few = (8, 2) if partial else (spectra.PARTIAL, spectra._FEW)
    with (
        patch.object(spectra, "PARTIAL", few[0]),
        patch.object(spectra, "_FEW", few[1]),
        patch.object(spectra, "_WELL", spectra._WELL if dual else 0.0),
    ):
        yield


def gram_of(moments: list[Moment]) -> Tensor:
    return sum((moment.as_gram() for moment in moments), torch.zeros(moments[0].width, moments[0].width).double())


def made(data: Tensor, form: str) -> Moment:
    """The same second moment as rows (a Gram matrix where they are n or more), as a Gram matrix, or as a factor."""
    moment = Moment.of_rows(data)
    if form == "rows" or moment.thin is None:
        return moment
    if form == "factor":
        return Moment(moment.count, moment.total, factor=moment.rows)
    return Moment(moment.count, moment.total, gram=moment.as_gram())


@st.composite
def inputs(draw: st.DrawFn) -> tuple[dict[str, Moment], int]:
    """Moments of two to four tasks and a rank: with zero rows, rows of other tasks, repeated ones, of steep spectra."""
    width = draw(st.integers(3, 40))
    decay = draw(st.sampled_from([0.0, 0.3, 13.8 / width, 27.6 / width]))  # to 1, to 12 and 24 powers of ten in energy
    shared = rows(3, 999, width=width, decay=decay)
    moments = {}
    for task in range(draw(st.integers(2, 4))):
        level = draw(st.none() | st.integers(1, width))
        data = rows(
            draw(st.integers(1, 3 * width // 2)), draw(st.integers(0, 99)), width=width, decay=decay, rank=level
        )
        data = data * draw(st.sampled_from([1.0, 1.0, 1e-3, 1e3]))
        extra = draw(st.sampled_from(["none", "zero", "shared", "repeated"]))
        added = {"none": data[:0], "zero": 0 * data[:2], "shared": shared, "repeated": data[:2]}[extra]
        moments[f"task {task}"] = made(torch.cat([data, added]), draw(st.sampled_from(["rows", "gram", "factor"])))
    return moments, draw(st.integers(1, width))


def check_optimum(found: Subspace, others: list[Moment], own: Moment, rank: int) -> None:
    """A has orthonormal rows, the least energy of the others, and of all such A the most own energy."""
    A, S, G = found.A.double(), gram_of(others), own.as_gram()
    assert (A @ A.T - torch.eye(rank)).norm() < 1e-5
    values, vectors = torch.linalg.eigh(S)
    top, optimum = float(values[-1]), float(values[:rank].clamp_min(0).sum())
    slack = 1e-11 * float(S.trace())  # A is float32, and eigh itself knows eigenvalues to 1e-15 of the largest
    energy = float(torch.trace(A @ S @ A.T))
    assert optimum * (1 - 1e-5) - slack <= energy <= optimum * (1 + 1e-5) + slack
    silent = int((values < 1e-14 * top).sum()) if top > 0 else len(values)
    clear = silent == len(values) or float(values[silent]) > 1e-9 * top
    if silent >= rank and clear:  # the others leave room, and where it is, is no matter of rounding
        null = vectors[:, :silent]
        most = float(torch.linalg.eigvalsh(null.T @ G @ null)[-rank:].clamp_min(0).sum())
        assert float(torch.trace(A @ G @ A.T)) >= most * (1 - 1e-5) - 1e-9 * float(G.trace())


@settings(max_examples=150, deadline=None)
@given(given_inputs=inputs(), partial=st.booleans(), dual=st.booleans())
def test_every_task_has_the_optimum_of_eigh(
    given_inputs: tuple[dict[str, Moment], int], partial: bool, dual: bool
) -> None:
    moments, rank = given_inputs
    with solvers(partial=partial, dual=dual):
        found = osrm_subspaces(moments, rank, energy_share=0.3)
    for task, own in moments.items():
        others = [moment for name, moment in moments.items() if name != task]
        check_optimum(found[task], others, own, rank)
        told, S = found[task].diagnostics, gram_of(others)
        values = torch.linalg.eigvalsh(S).flip(0)
        sure = (values > 1e-9 * values[0]).sum() if values[0] > 0 else 0
        assert sure <= told.numerical_rank <= (values > 1e-15 * values[0]).sum()
        seen = torch.trace(found[task].A.double() @ S @ found[task].A.double().T)
        assert told.others_energy == pytest.approx(
            float(seen / S.trace()) if S.trace() > 0 else 0.0, rel=1e-4, abs=1e-11
        )
        gap = (values[-rank - 1] - values[-rank]) / values[0] if rank < len(values) and values[0] > 0 else 0.0
        assert told.eigengap == pytest.approx(float(gap), rel=1e-6, abs=1e-11)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=2, max_size=4),
    rank=st.integers(1, 6),
    rule=st.sampled_from(["osrm", "apart"]),
    partial=st.booleans(),
    seed=st.integers(0, 99),
)
def test_all_tasks_at_once_are_each_task_alone(
    counts: list[int], rank: int, rule: str, partial: bool, seed: int
) -> None:
    moments = {f"{i}": Moment.of_rows(rows(count, seed + i, width=24, decay=0.1)) for i, count in enumerate(counts)}
    seeds = {name: 7 * int(name) + 1 for name in moments}
    with solvers(partial=partial):
        together = osrm_subspaces(moments, rank, rule=rule, energy_share=0.4, seeds=seeds)
        for name, own in moments.items():
            others = [moment for other, moment in moments.items() if other != name]
            alone = osrm_subspace(others, own, rank, rule=rule, energy_share=0.4, seed=seeds[name])
            assert (projector(together[name].A) - projector(alone.A)).norm() < 1e-4
            assert (projector(together[name].avoid.T) - projector(alone.avoid.T)).norm() < 1e-4
            assert together[name].diagnostics.numerical_rank == alone.diagnostics.numerical_rank


@pytest.mark.parametrize("decay", [0.0, 0.15])
def test_the_inverse_and_the_span_choose_the_same_rows(decay: float) -> None:
    """The fast way and the safe one: the same A, not only its space, at the level of float32."""
    moments = {str(i): Moment.of_rows(rows(6, i, width=40, decay=decay)) for i in range(4)}
    found = []
    for dual in (True, False):
        with solvers(dual=dual):
            assert (Pool(list(moments.values())).without(0).dual(3) is not None) == dual
            found.append(osrm_subspaces(moments, 3))
    for name in moments:
        assert (found[0][name].A - found[1][name].A).abs().max() < 1e-5
        assert found[0][name].diagnostics.others_energy < 1e-13


def test_the_inverse_is_exact_for_near_twins() -> None:
    """Rows that differ by 5e-4 put half the digits of K^-1 at stake, and A still sees nothing of the others."""
    twins = rows(6, 1, width=40)
    data = [rows(6, 0, width=40), twins, twins + 5e-4 * rows(6, 2, width=40)]
    moments = {str(i): Moment.of_rows(one) for i, one in enumerate(data)}
    assert Pool(list(moments.values())).without(0).dual(3) is not None
    for found in osrm_subspaces(moments, 3).values():
        assert found.diagnostics.others_energy < 1e-21


def test_ties_above_zero_with_partial_solvers() -> None:
    with solvers(partial=True):
        test_subspace.test_ties_above_zero_go_to_own_energy()


def test_loud_directions_of_few_rows_count_tasks_alike() -> None:
    """However few the rows or large the activations: what the Gram matrices give."""
    data = [rows(9, 0, decay=0.2), 100 * rows(7, 1, decay=0.2), torch.zeros(2, 24)]
    for share in (0.1, 0.5, 0.9):
        ours = loud_directions([Moment.of_rows(one) for one in data], share)
        theirs = loud_directions([made(one, "gram") for one in data], share)
        assert ours.shape == theirs.shape
        assert (projector(ours.T) - projector(theirs.T)).norm() < 1e-6


def test_a_row_of_two_tasks_goes_the_safe_way() -> None:
    """[CLS] is one row for all tasks where it has not seen other tokens: K is singular, and no direction is lost."""
    shared = rows(1, 50, width=40)
    moments = {str(i): Moment.of_rows(torch.cat([rows(6, i, width=40), shared])) for i in range(4)}
    assert Pool(list(moments.values())).without(0).dual(3) is None
    for name, found in osrm_subspaces(moments, 6).items():
        assert found.diagnostics.numerical_rank == 19
        assert (shared @ found.A.double().T).norm() < 1e-5
        assert moments[name].energy(found.A) > 0.1 * moments[name].trace()


@pytest.mark.parametrize("rule", ["osrm", "apart"])
@pytest.mark.parametrize("doubled", [False, True])
def test_no_problem_is_larger_than_the_rows(rule: str, doubled: bool) -> None:
    """And one Cholesky factorisation of K serves all tasks; dependent rows take eigenproblems of the rows' number."""
    moments = {str(i): Moment.of_rows(rows(8, i, width=300)) for i in range(5)}
    if doubled:
        moments["5"] = moments["4"]
    sizes: dict[str, list[int]] = {}

    def watched(name: str) -> Any:
        real = getattr(torch.linalg, name)

        def solver(matrix: Tensor, *arguments: Any, **options: Any) -> Any:
            sizes.setdefault(name, []).append(min(matrix.shape))
            return real(matrix, *arguments, **options)

        return patch.object(torch.linalg, name, solver)

    with watched("eigh"), watched("eigvalsh"), watched("svd"), watched("cholesky_ex"), watched("qr"):
        osrm_subspaces(moments, 4, rule=rule, energy_share=0.3)
    assert max(max(seen) for seen in sizes.values()) <= 48
    assert sizes["cholesky_ex"].count(48 if doubled else 40) == 1
    if rule == "osrm" and not doubled:
        assert sum(size > 8 for size in sizes["eigh"]) == 5  # the loud directions; A itself needs 8 x 8


def steep_gram(n: int, powers: float) -> Tensor:
    """A Gram matrix whose eigenvalues fall evenly over `powers` powers of ten."""
    basis = torch.linalg.qr(rows(n, 3, width=n)).Q
    return (basis.T * 10 ** (-powers * torch.arange(n) / n)) @ basis


def in_groups(n: int) -> Tensor:
    """A Gram matrix of few distinct eigenvalues, each of a space of many: one Lanczos vector sees one of each."""
    basis = torch.linalg.qr(rows(n, 4, width=n)).Q
    levels = torch.ones(n, dtype=torch.float64)
    levels[:7], levels[7:12], levels[-9:] = 5.0, 3.0, 0.1
    return (basis.T * levels) @ basis


@pytest.mark.parametrize("gram", [steep_gram(560, 6), steep_gram(560, 14), in_groups(560)], ids=["6", "14", "groups"])
def test_partial_solvers_are_eigh(gram: Tensor) -> None:
    n = len(gram)
    moment = Moment(1000, torch.zeros(n).double(), gram=(gram + gram.T) / 2)
    values, vectors = torch.linalg.eigh(gram)
    for count in (5, 12, 30):
        found, top = top_directions(moment, count)
        assert (found - values.flip(0)[:count]).abs().max() < 1e-12 * values[-1]
        if values[-count] > (1 + 1e-6) * values[-count - 1]:
            assert (projector(top.T) - projector(vectors[:, -count:].T)).norm() < 1e-6
    for share in (0.02, 0.2, 0.7):
        V = loud_directions([moment], share)
        held = torch.trace(V.T @ gram @ V)
        assert held >= share * values.sum() * (1 - 1e-12)
        assert held - values[-V.shape[1]] < share * values.sum() * (1 + 1e-12)
    quiet = Others.of([moment], None).quiet(9)
    if values[0] < 1e-11 * values[-1]:
        assert quiet is None
    else:
        assert quiet is not None
        assert (quiet.values - values[:9]).abs().max() < 1e-12 * values[-1]
        assert (quiet.vectors.T @ gram @ quiet.vectors - torch.diag(quiet.values)).abs().max() < 1e-12 * values[-1]
    check_optimum(osrm_subspace([moment], Moment.of_rows(rows(20, 5, width=n)), 8), [moment], moment, 8)


def test_a_missed_direction_is_noticed() -> None:
    """Lanczos that returns the second and third eigenvector, as if the first had escaped it, is not believed."""
    gram = steep_gram(560, 6)
    values, vectors = torch.linalg.eigh(gram)
    moment, flipped = Moment(1000, torch.zeros(560).double(), gram=gram), vectors.flip(1)

    def escaped(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
        found = flipped[:, 1 : count + 1]
        return (found * (gram @ found)).sum(dim=0), found

    with patch.object(spectra, "_lanczos", escaped):
        assert (top_directions(moment, 4)[0] - values.flip(0)[:4]).abs().max() < 1e-12
        V = loud_directions([moment], 0.2)
        assert (projector(V.T) - projector(vectors[:, -V.shape[1] :].T)).norm() < 1e-6


@pytest.mark.parametrize("form", ["rows", "gram", "singular", "flat"])
def test_the_ends_do_not_hang_on_what_was_asked_before(form: str) -> None:
    """To the bit: a rule that factors more, or another rank, leaves the diagnostics of the next as they are."""
    gram = {"gram": steep_gram(80, 6), "singular": steep_gram(80, 20), "flat": in_groups(80)}.get(form)
    if gram is None:
        others = [Moment.of_rows(rows(30, 1, width=80)), Moment.of_rows(rows(20, 2, width=80, rank=9))]
    else:
        others = [Moment(1000, torch.zeros(80).double(), gram=(gram + gram.T) / 2)]
    own = Moment.of_rows(rows(20, 3, width=80))
    for asked in (1, 4, 20, 80):
        with solvers(partial=True):
            fresh, used = Others.of(others, own), Others.of(others, own)
            for rule, rank in (("osrm", 30), ("osrm", asked), ("apart", 2)):
                subspace_off(used, rank, rule, 0.3, 0, None)
            assert used.spectrum[0].numel()
            assert used.ends(asked) == fresh.ends(asked)
        values = torch.linalg.eigvalsh(gram_of(others)).flip(0)
        gap = float((values[-asked - 1] - values[-asked]) / values[0]) if asked < 80 else 0.0
        rank, told = fresh.ends(asked)
        assert told == pytest.approx(gap, rel=1e-6, abs=1e-11)
        sure = int((values > 1e-9 * values[0]).sum())
        assert sure <= rank <= int((values > 1e-15 * values[0]).sum())


def test_spectrum_of_rows_leaves_rounding_out() -> None:
    data = torch.cat([rows(6, 0, width=30), rows(6, 0, width=30)])
    values, vectors = spectrum(Moment.of_rows(data))
    dense = torch.linalg.eigvalsh(data.T @ data).flip(0)
    assert len(values) == 6
    assert (values - dense[:6]).abs().max() < 1e-5 * dense[0]  # rows are float32
    assert (vectors.T @ vectors - torch.eye(6)).abs().max() < 1e-12
    faint = torch.cat([data[:1], 1e-6 * data[1:2]])  # of 1e-12 of the energy: far above rounding
    assert len(spectrum(Moment.of_rows(faint))[0]) == 2


def test_refusals() -> None:
    one = Moment.of_rows(rows(5, 0))
    with pytest.raises(LoraloomError, match="at least one other task"):
        osrm_subspaces({"alone": one}, 2)
    with pytest.raises(LoraloomError, match=r"unequal widths \[5, 24\]"):
        osrm_subspaces({"one": one, "two": Moment.of_rows(torch.ones(3, 5))}, 2)
