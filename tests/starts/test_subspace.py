"""Subspaces against torch.linalg.eigh on dense float64 matrices, brute-force search, and PEFT's own start."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from loraloom.errors import LoraloomError
from loraloom.starts.subspace import RULES, loud_directions, osrm_subspace, project_out, response_scale
from loraloom.statistics.moments import Moment

N, R = 24, 4


def rows(count: int, seed: int, *, width: int = N, decay: float = 0.0, rank: int | None = None) -> Tensor:
    """Gaussian rows whose coordinates, in a random basis, fall off by exp(-decay) each; of `rank` if given."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    levels = torch.exp(-decay * torch.arange(width, dtype=torch.float64))
    if rank is not None:
        levels[rank:] = 0
    return torch.randn(count, width, generator=generator, dtype=torch.float64) * levels @ basis


def dense(moments: list[Moment]) -> Tensor:
    return sum((moment.as_gram() for moment in moments), torch.zeros(N, N, dtype=torch.float64))


def projector(A: Tensor) -> Tensor:
    return A.double().T @ A.double()


def orthonormal(A: Tensor) -> bool:
    return bool((A.double() @ A.double().T - torch.eye(len(A), dtype=torch.float64)).norm() < 1e-5)


@pytest.mark.parametrize("counts", [(5, 4), (6, 14), (11, 12), (40, 30), (500, 7)])
@pytest.mark.parametrize("decay", [0.0, 0.4])
def test_covariance_is_the_optimum_of_eigh(counts: tuple[int, int], decay: float) -> None:
    others = [Moment.of_rows(rows(count, index, decay=decay)) for index, count in enumerate(counts)]
    found = osrm_subspace(others, Moment.of_rows(rows(50, 9)), R)
    S = dense(others)
    values = torch.linalg.eigvalsh(S)
    energy, optimum = float(torch.trace(found.A.double() @ S @ found.A.double().T)), float(values[:R].sum())
    # A is float32: its rounding alone sees 1e-14 of the loudest direction
    assert energy <= optimum * (1 + 1e-5) + 1e-13 * float(values[-1])
    assert energy >= optimum * (1 - 1e-5) - 1e-13 * float(values[-1])
    assert orthonormal(found.A)


def test_ill_conditioned_and_repeated_rows() -> None:
    """Thirteen powers of ten between the loudest and the quietest; and the same row a hundred times."""
    steep = Moment.of_rows(rows(300, 0, decay=0.65))
    found = osrm_subspace([steep], Moment.of_rows(rows(50, 9)), R)
    values = torch.linalg.eigvalsh(steep.as_gram())
    assert steep.energy(found.A) <= float(values[:R].sum()) + 1e-12 * float(values[-1])
    repeated = Moment.of_rows(rows(1, 1).repeat(100, 1))
    found = osrm_subspace([repeated], Moment.of_rows(rows(50, 9)), R)
    assert found.diagnostics.numerical_rank == 1
    assert repeated.energy(found.A) < 1e-11 * repeated.trace()


def test_no_search_finds_less_energy() -> None:
    others = [Moment.of_rows(rows(60, 0, decay=0.2))]
    best = others[0].energy(osrm_subspace(others, None, R).A)
    generator = torch.Generator().manual_seed(0)
    start = osrm_subspace(others, None, R).A.double()
    for step in (0.01, 0.1, 1.0, 100.0):
        for _ in range(100):
            moved = start + step * torch.randn(R, N, generator=generator, dtype=torch.float64)
            assert others[0].energy(torch.linalg.qr(moved.T).Q.T) >= best * (1 - 1e-6)


def test_ties_go_to_own_energy() -> None:
    """With few rows every A in the null space is optimal: the own directions of most energy in it, found by hand."""
    others = [Moment.of_rows(rows(6, 0)), Moment.of_rows(rows(5, 1))]
    own = Moment.of_rows(rows(200, 2, decay=0.1))
    found = osrm_subspace(others, own, R)
    null = torch.linalg.svd(torch.cat([moment.as_rows() for moment in others]), full_matrices=True).Vh[11:]
    within = torch.linalg.eigh(null @ own.as_gram() @ null.T).eigenvectors[:, -R:].T @ null
    assert (projector(found.A) - projector(within)).norm() < 1e-5
    assert sum(moment.energy(found.A) for moment in others) < 1e-12 * own.trace()


def test_ties_above_zero_go_to_own_energy() -> None:
    """Eigenvalues 1, 1, 1, then 2 six times, then 3: of rank 5 are the three quiet ones and two of the six."""
    basis = torch.linalg.qr(rows(N, 3)).Q.T
    levels = torch.tensor([1.0] * 3 + [2.0] * 6 + [3.0] * (N - 9), dtype=torch.float64)
    gram = basis.T @ torch.diag(levels) @ basis
    other = Moment(1000, torch.zeros(N, dtype=torch.float64), gram=gram)
    own = Moment.of_rows(rows(200, 4, decay=0.1))
    found = osrm_subspace([other], own, 5)
    tied = basis[3:9]
    chosen = torch.linalg.eigh(tied @ own.as_gram() @ tied.T).eigenvectors[:, -2:].T @ tied
    assert (projector(found.A) - projector(torch.cat([basis[:3], chosen]))).norm() < 1e-5
    assert abs(other.energy(found.A) - 7.0) < 1e-5


@pytest.mark.parametrize("counts", [(5, 4), (40, 30)])
def test_deterministic_in_order_form_and_last_bits(counts: tuple[int, int]) -> None:
    """The same data in another order, as a Gram matrix, or off by rounding gives the same A, not only its space."""
    data = [rows(count, index, decay=0.1) for index, count in enumerate(counts)]
    own = Moment.of_rows(rows(200, 9, decay=0.1))
    first = osrm_subspace([Moment.of_rows(one) for one in data], own, R).A
    again = osrm_subspace([Moment.of_rows(one) for one in data], own, R).A
    assert torch.equal(first, again)
    turned = osrm_subspace([Moment.of_rows(one.flip(0)) for one in reversed(data)], own, R).A
    as_gram = [Moment(len(one), one.sum(0), gram=one.T @ one) for one in data]
    assert (turned - first).abs().max() < 1e-5
    assert (osrm_subspace(as_gram, own, R).A - first).abs().max() < 1e-4
    shaken = osrm_subspace([Moment.of_rows(one * (1 + 1e-7)) for one in data], own, R, seed=5).A
    assert (shaken - first).abs().max() < 1e-4


def test_own_inputs_of_too_low_rank_are_filled_up_by_seed() -> None:
    others, own = [Moment.of_rows(rows(6, 0))], Moment.of_rows(rows(50, 1, rank=2))
    first, second = osrm_subspace(others, own, R, seed=1), osrm_subspace(others, own, R, seed=2)
    assert any("own inputs choose 2 of 4" in note for note in first.diagnostics.notes)
    assert (first.A[:2] - second.A[:2]).abs().max() < 1e-6
    assert (first.A[2:] - second.A[2:]).abs().max() > 0.1
    assert orthonormal(first.A)
    assert others[0].energy(first.A) < 1e-11


def test_mean_rule_is_the_authors_svd() -> None:
    data = [rows(30, seed) + seed for seed in range(3)]
    found = osrm_subspace([Moment.of_rows(one) for one in data], None, R, rule="mean")
    means = torch.stack([one.mean(0) for one in data])
    assert (means @ found.A.double().T).abs().max() < 1e-5
    assert orthonormal(found.A)
    reference = torch.linalg.svd(means.float(), full_matrices=True).Vh[-R:]
    assert (projector(found.A) - projector(reference)).norm() < 1e-4
    assert any("arbitrary" in note for note in found.diagnostics.notes)


def test_random_and_shared() -> None:
    own = Moment.of_rows(rows(50, 9))
    one, two = [Moment.of_rows(rows(40, 0))], [Moment.of_rows(rows(40, 1))]
    for rule in ("random", "shared"):
        first = osrm_subspace(one, own, R, rule=rule, seed=1).A
        assert orthonormal(first)
        assert torch.equal(first, osrm_subspace(two, None, R, rule=rule, seed=1).A)
        assert (projector(first) - projector(osrm_subspace(one, own, R, rule=rule, seed=2).A)).norm() > 0.5
    # uniform over subspaces: the mean projector is r/n times the identity
    mean = torch.stack([projector(osrm_subspace(one, None, R, rule="random", seed=s).A) for s in range(400)]).mean(0)
    assert (mean - R / N * torch.eye(N, dtype=torch.float64)).abs().max() < 0.08


def test_default_rule_has_pefts_distribution() -> None:
    """Range, variance and shape of PEFT's own reset, over many draws of both."""
    base = nn.Sequential(nn.Linear(N, 5))
    config = LoraConfig(r=R, target_modules=["0"])
    torch.manual_seed(0)
    layer = get_peft_model(base, config).base_model.model[0]
    theirs, ours = [], []
    for seed in range(300):
        layer.reset_lora_parameters("default", init_lora_weights=True)
        theirs.append(layer.lora_A["default"].weight.detach().clone())
        ours.append(osrm_subspace([Moment.of_rows(rows(40, 0))], None, R, rule="default", seed=seed).A)
    one, two = torch.stack(theirs).flatten(), torch.stack(ours).flatten()
    assert one.shape == two.shape
    bound = 1 / math.sqrt(N)
    assert two.abs().max() <= bound
    assert abs(float(two.abs().max() / one.abs().max()) - 1) < 1e-3
    assert abs(float(two.var()) / (bound**2 / 3) - 1) < 0.02
    # Kolmogorov-Smirnov distance of the two samples; 1 % critical value
    grid = torch.linspace(-bound, bound, 200)
    gap = ((one[:, None] <= grid).double().mean(0) - (two[:, None] <= grid).double().mean(0)).abs().max()
    assert gap < 1.63 * math.sqrt(2 / len(one))


def test_loud_directions_hold_the_share_and_count_tasks_alike() -> None:
    data = [rows(40, 0, decay=0.2), 100 * rows(7, 1, decay=0.2)]
    summed = sum((one.T @ one / one.square().sum() for one in data), torch.zeros(N, N, dtype=torch.float64))
    for share in (0.1, 0.5, 0.9):
        V = loud_directions([Moment.of_rows(one) for one in data], share)
        values, vectors = torch.linalg.eigh(summed)
        p = V.shape[1]
        assert (projector(V.T) - projector(vectors[:, N - p :].T)).norm() < 1e-6
        assert values[N - p :].sum() >= share * values.sum() > values[N - p + 1 :].sum()
    assert loud_directions([Moment.of_rows(data[0])], 0.0).shape == (N, 0)


def taken_rows(kind: str, count: int, loud: Tensor, seed: int) -> Tensor:
    """Rows as an adapter's file holds them: anywhere, in or partly in the loud directions, or each twice."""
    anywhere = rows(count, seed + 100)
    inside = rows(count, seed + 200, width=loud.shape[1]) @ loud.T if loud.shape[1] else torch.zeros(count, N)
    if kind == "inside":
        return inside.float()
    if kind == "partly":
        return torch.cat([inside, inside + anywhere])[:count].float()
    if kind == "dependent":
        return torch.cat([anywhere, -2 * anywhere, anywhere.sum(0, keepdim=True)])[: count + 2].float()
    return anywhere.float()


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["anywhere", "inside", "partly", "dependent"]),
    count=st.integers(1, N),
    size=st.sampled_from([1e-3, 1.0, 1e3]),
    share=st.sampled_from([0.0, 0.3, 0.8]),
    rank=st.integers(1, 6),
    seed=st.integers(0, 20),
)
def test_taken_rows_are_stayed_off(kind: str, count: int, size: float, share: float, rank: int, seed: int) -> None:
    others = [Moment.of_rows(rows(40, seed, decay=0.2)), Moment.of_rows(rows(7, seed + 50))]
    loud = loud_directions(others, share)
    taken = size * taken_rows(kind, count, loud, seed)
    both = torch.cat([loud.T, taken.double() / size])
    spanned = int(torch.linalg.matrix_rank(both, atol=1e-5, rtol=0.0))
    own = Moment.of_rows(rows(30, seed + 9))
    options: dict[str, Any] = {"rule": "apart", "energy_share": share, "taken": taken}
    if N - spanned < rank:
        with pytest.raises(LoraloomError, match=f"{spanned} directions to stay off leave {N - spanned} of {N}"):
            osrm_subspace(others, own, rank, **options)
        return
    found = osrm_subspace(others, own, rank, **options)
    V, A = found.avoid.double(), found.A.double()
    assert V.shape == (N, spanned)
    assert found.diagnostics.avoided == spanned
    assert orthonormal(V.T)
    assert orthonormal(A)
    assert project_out(both, V).norm() <= 1e-5 * both.norm()
    assert (A @ both.T).norm() <= 1e-5 * both.norm()


def test_rows_of_zeros_take_nothing() -> None:
    others, own = [Moment.of_rows(rows(40, 0, decay=0.2))], Moment.of_rows(rows(60, 1, decay=0.1))
    without = osrm_subspace(others, own, R, rule="apart", energy_share=0.7)
    nothing = osrm_subspace(others, own, R, rule="apart", energy_share=0.7, taken=torch.zeros(3, N))
    assert torch.equal(nothing.A, without.A)
    assert torch.equal(nothing.avoid, without.avoid)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_diagnostics_against_dense(rule: str) -> None:
    others, own = [Moment.of_rows(rows(30, s, decay=0.1)) for s in (0, 1)], Moment.of_rows(rows(60, 2))
    found = osrm_subspace(others, own, R, rule=rule)
    S, told = dense(others), found.diagnostics
    values = torch.linalg.eigvalsh(S)
    Q = torch.linalg.qr(found.A.double().T).Q
    assert (told.rows_seen, told.numerical_rank, told.determined) == (60, N, True)
    assert told.eigengap == pytest.approx(float((values[R] - values[R - 1]) / values[-1]), rel=1e-6)
    assert told.others_energy == pytest.approx(float(torch.trace(Q.T @ S @ Q) / torch.trace(S)), rel=1e-5)
    G = own.as_gram()
    assert told.own_energy == pytest.approx(float(torch.trace(Q.T @ G @ Q) / torch.trace(G)), rel=1e-5)


def test_an_undetermined_space_is_told() -> None:
    own = Moment.of_rows(rows(60, 2))
    few = osrm_subspace([Moment.of_rows(rows(10, 0))], own, R).diagnostics
    assert (few.rows_seen, few.numerical_rank, few.determined) == (10, 10, False)
    assert any("does not determine" in note and "10 of 24" in note for note in few.notes)
    # many rows of low rank are as little
    flat = osrm_subspace([Moment.of_rows(rows(500, 0, rank=10))], own, R).diagnostics
    assert (flat.rows_seen, flat.numerical_rank, flat.determined) == (500, 10, False)
    just = osrm_subspace([Moment.of_rows(rows(N - R, 0))], own, R).diagnostics
    assert (just.numerical_rank, just.determined, just.notes) == (N - R, True, ())


def test_response_scale_is_that_of_many_peft_draws() -> None:
    own = Moment.of_rows(rows(60, 0, decay=0.1))
    layer = get_peft_model(nn.Sequential(nn.Linear(N, 5)), LoraConfig(r=R, target_modules=["0"])).base_model.model[0]
    torch.manual_seed(0)
    drawn = []
    for _ in range(2000):
        layer.reset_lora_parameters("default", init_lora_weights=True)
        drawn.append(own.energy(layer.lora_A["default"].weight))
    A = osrm_subspace([Moment.of_rows(rows(10, 1))], own, R).A
    scaled = own.energy(A * response_scale(own, A))
    assert scaled == pytest.approx(R * own.trace() / (3 * N), rel=1e-6)
    assert scaled == pytest.approx(sum(drawn) / len(drawn), rel=0.03)
    blind = Moment.of_rows(project_out(rows(60, 0), A.double().T))
    with pytest.raises(LoraloomError, match="sees none"):
        response_scale(blind, A)


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    own=st.integers(0, 40),
    rank=st.integers(1, N),
    rule=st.sampled_from(sorted(RULES)),
    share=st.sampled_from([0.0, 0.5, 0.99]),
)
def test_whatever_the_sizes(counts: list[int], own: int, rank: int, rule: str, share: float) -> None:
    others = [Moment.of_rows(rows(count, seed)) for seed, count in enumerate(counts)]
    if rule == "apart" and N - loud_directions(others, share).shape[1] < rank:
        return  # refused: see test_refusals
    found = osrm_subspace(others, Moment.of_rows(rows(own, 9)), rank, rule=rule, energy_share=share)
    assert found.A.shape == (rank, N)
    assert found.A.isfinite().all()
    assert rule == "default" or orthonormal(found.A)
    assert orthonormal(found.avoid.T)


def test_zero_inputs_are_no_trouble() -> None:
    silent = Moment.of_rows(torch.zeros(5, N))
    found = osrm_subspace([silent], silent, R)
    assert orthonormal(found.A)
    assert (found.diagnostics.numerical_rank, found.diagnostics.others_energy) == (0, 0.0)


def test_refusals() -> None:
    one = Moment.of_rows(rows(40, 0))
    for arguments, options, message in [
        (([one], one, R), {"rule": "osmr"}, "did you mean 'osrm'"),
        (([], one, R), {}, "at least one other task"),
        (([one], one, N + 1), {}, "rank 25 does not fit"),
        (([one], one, 0), {}, "rank 0 does not fit"),
        (([one], one, R), {"energy_share": 1.0}, r"not in \[0, 1\)"),
        (([one, Moment.of_rows(torch.ones(3, 5))], one, R), {}, r"unequal widths \[5, 24\]"),
        (([one], one, R), {"taken": torch.ones(2, 5)}, r"unequal widths \[5, 24\]"),
        (([one], one, 12), {"rule": "apart", "energy_share": 0.99}, "leave . of 24, too few for rank 12"),
    ]:
        with pytest.raises(LoraloomError, match=message):
            osrm_subspace(*arguments, **options)
