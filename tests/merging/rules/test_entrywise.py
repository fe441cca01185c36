"""The entrywise rules beyond the common laws: figures worked by hand, blocks, spaces, large layers, refusals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from loraloom.adapters import lowrank as core
from loraloom.adapters.update import Update
from loraloom.errors import LoraloomError
from loraloom.merging import get_rule, rule_names, spaces
from loraloom.merging.rules.entrywise import breadcrumbs, dare, dare_ties, della, knots, sce, ties
from loraloom.merging.rules.votes import consensus, emr, pcb

RULES = [name for name in rule_names() if get_rule(name).function.__module__.endswith(("entrywise", "consensus"))]
SPACED = [name for name in RULES if len(get_rule(name).spaces) > 1]


def update(m: int, n: int, r: int, seed: int = 0) -> Update:
    generator = torch.Generator().manual_seed(seed)
    return Update(torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator))


def dense(*rows: list[float]) -> Update:
    """Return a matrix as an update."""
    W = torch.tensor(rows, dtype=torch.float32)
    return Update(torch.eye(len(rows)), W)


def merged(name: str, members: list[Update], seed: int = 5, **options: object) -> torch.Tensor:
    rule = get_rule(name)
    chosen, problems = rule.check(options)
    assert not problems
    result = rule.layer(members, chosen, seed=seed)
    if isinstance(result, core.Shared):
        result = result.update()
    return result.dense() if isinstance(result, Update) else result


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def test_ties_by_hand() -> None:
    one, two = dense([4.0, -3.0, 0.1], [2.0, 1.0, 5.0]), dense([-1.0, -6.0, 0.2], [4.0, 3.0, -7.0])
    found = ties([one, two], density=4 / 6)  # keeps 4 -3 2 5 and -6 4 3 -7
    expected = [[4.0, -4.5, 0.0], [3.0, 3.0, -7.0]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("space", spaces.SPACES)
def test_ties_elects_nothing_where_signs_cancel(space) -> None:
    """Without a tolerance the rounding of x + y - (x + y) would elect a sign, another one in another order."""
    x, y = update(20, 14, 2), update(20, 14, 2, seed=1)
    both = core.concatenate([x, y])
    members = [x, y, Update(-both.B, both.A)]
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        found = merged("ties", [members[i] for i in order], density=1.0, space=space)
        assert float(found.abs().max()) < 1e-5


def test_entries_that_share_the_last_kept_magnitude_are_all_kept() -> None:
    flat = Update(torch.ones(4, 1), torch.ones(1, 5))
    torch.testing.assert_close(ties([flat], density=0.2), torch.ones(4, 5, dtype=torch.float64))


@pytest.mark.parametrize("rule", [ties, breadcrumbs, pcb])
def test_a_density_of_less_than_one_entry_keeps_one(rule: Callable[..., torch.Tensor]) -> None:
    found = rule([update(6, 5, 2)], density=1e-9)
    assert int(found.count_nonzero()) == 1


@pytest.mark.parametrize("space", spaces.SPACES)
@pytest.mark.parametrize("name", SPACED)
def test_the_result_is_the_same_in_any_blocks(monkeypatch, name: str, space: str) -> None:
    members = [update(33, 20, r, seed) for seed, r in enumerate((2, 3, 4))]
    whole = merged(name, members, space=space)
    monkeypatch.setattr(spaces, "_BLOCK", 3 * 20 * 5)  # 5 rows a block, and 3 in the last
    torch.testing.assert_close(merged(name, members, space=space), whole, atol=1e-12, rtol=1e-6)


@pytest.mark.parametrize("name", SPACED)
def test_float32_of_large_layers_agrees_with_float64(monkeypatch, name: str) -> None:
    members = [update(40, 30, r, seed) for seed, r in enumerate((2, 3, 4))]
    whole = merged(name, members)
    monkeypatch.setattr(spaces, "_SMALL", 0)
    found = merged(name, members)
    assert found.dtype == torch.float32
    assert float((found.double() - whole).norm() / whole.norm()) < 1e-4  # nothing flipped: one entry weighs more


def test_dare_keeps_its_share_and_the_mean() -> None:
    one = update(200, 150, 3)
    found = dare([one], density=0.3, generator=seeded())
    kept = found != 0
    assert float(kept.double().mean()) == pytest.approx(0.3, abs=0.01)
    torch.testing.assert_close(found[kept], (one.dense().double() / 0.3)[kept], atol=1e-5, rtol=1e-5)


def test_dare_is_unbiased() -> None:
    members = [update(12, 9, 2, seed) for seed in (0, 1)]
    mean = torch.stack([merged("dare", members, seed=seed, density=0.5) for seed in range(2000)]).mean(dim=0)
    whole = sum(member.dense().double() for member in members)
    assert float((mean - whole).norm() / whole.norm()) < 4 / 2000**0.5


def test_tasks_draw_apart_and_a_further_one_leaves_the_others_alone() -> None:
    one, two = update(40, 30, 2), update(40, 30, 2, seed=1)
    small = Update(1e-3 * two.B, two.A)
    alone = dare([one], density=0.5, generator=seeded())
    both = dare([small, one], density=0.5, generator=seeded())
    difference = both - alone  # what the small one adds
    assert float(difference.abs().max()) <= 2.1e-3 * float(two.dense().abs().max())
    kept = (difference.abs() > 1e-9) == (alone != 0)
    assert float(kept.double().mean()) == pytest.approx(0.5, abs=0.05)


def test_dare_ties_of_everything_is_ties_of_everything() -> None:
    members = [update(20, 15, 2, seed) for seed in range(3)]
    torch.testing.assert_close(dare_ties(members, density=1.0, generator=seeded()), ties(members, density=1.0))


def test_della_keeps_large_entries_more_often_and_stays_unbiased() -> None:
    row = dense([1.0, -2.0, 3.0, -4.0, 5.0])
    draws = torch.stack([della([row], density=0.5, eps=0.4, generator=seeded_by(k))[0] for k in range(4000)])
    expected = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    torch.testing.assert_close((draws != 0).double().mean(dim=0), expected, atol=0.03, rtol=0)
    torch.testing.assert_close(draws.mean(dim=0), row.dense()[0].double(), atol=0.4, rtol=0)


def seeded_by(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_della_refuses_chances_outside_zero_and_one() -> None:
    with pytest.raises(LoraloomError, match="chances outside"):
        della([update(5, 4, 2)], density=0.9, eps=0.2, generator=seeded())
    with pytest.raises(LoraloomError, match="chances outside"):
        della([update(5, 4, 2)], density=0.2, eps=0.2, generator=seeded())


def test_breadcrumbs_by_hand() -> None:
    one = dense([9.0, -8.0, 7.0, 6.0, -5.0], [4.0, 3.0, -2.0, 1.0, 0.5])
    found = breadcrumbs([one], density=0.4, gamma=0.2)
    expected = [[0.0, 0.0, 7.0, 6.0, -5.0], [4.0, 0.0, 0.0, 0.0, 0.0]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_sce_by_hand() -> None:
    """Variances 0 4 1 0.25; half of the three that vary, rounded: two; weights 13 and 5 over 18."""
    one, two = dense([1.0, 3.0, 2.0, 1.0]), dense([1.0, -1.0, 4.0, 2.0])
    found = sce([one, two], density=0.6)
    weights = (3.0**2 + 2.0**2, 1.0**2 + 4.0**2)
    both = (weights[0] * 2.0 + weights[1] * 4.0) / sum(weights)
    torch.testing.assert_close(found, torch.tensor([[0.0, 3.0, both, 0.0]], dtype=torch.float64))


def test_sce_of_equal_updates_is_that_update() -> None:
    one = update(20, 15, 3)
    torch.testing.assert_close(sce([one] * 3), one.dense().double(), atol=1e-5, rtol=1e-5)


def test_consensus_by_hand() -> None:
    """Wanted at lambda 1 above the size of the other: by both nowhere unless equal sizes; at 0.4 by both often."""
    one, two = dense([1.0, 2.0, -3.0, 1.0]), dense([1.0, 0.5, -2.0, -1.0])
    expected = [[2.0, 0.0, -5.0, 0.0]]  # 2 > 0.2, but 0.5 < 0.4 * 2; 1 and -1 want it both, and cancel
    found = consensus([one, two], strictness=0.4, tasks=2)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    everything = consensus([one, two], strictness=0.4, tasks=1)
    torch.testing.assert_close(everything, torch.tensor([[2.0, 2.5, -5.0, 0.0]], dtype=torch.float64))


def test_emr_reads_single_tasks_better_than_the_mean_does() -> None:
    members = [update(30, 20, 2, seed) for seed in range(4)]
    shared = emr(members)
    mean = sum(member.dense() for member in members) / 4
    for member, read in zip(members, shared.readouts(), strict=True):
        truth = member.dense()
        assert float((read.dense() - truth).norm()) < float((mean - truth).norm())
        cores = [shared.left.T @ W.dense().double() @ shared.right.T for W in (member, read)]
        assert float(cores[0].abs().sum()) == pytest.approx(float(cores[1].abs().sum()), rel=1e-5)  # the rescaling
        assert bool(((cores[0] * cores[1]) >= -1e-6).all())  # a task reads no sign against its own


def test_emr_gates_come_in_the_order_of_the_updates() -> None:
    members = [update(30, 20, 2), Update(torch.zeros(30, 2), torch.ones(2, 20)), update(30, 20, 2, seed=3)]
    reads = [read.dense() for read in emr(members).readouts()]
    assert float(reads[1].abs().max()) == 0.0
    for i in (0, 2):
        assert float((reads[i] * members[i].dense()).sum()) > 0.5 * float(members[i].dense().square().sum())


def test_pcb_ignores_the_scale_of_the_adapters() -> None:
    members = [update(20, 15, 2, seed) for seed in range(3)]
    small = [Update(1e-4 * member.B, member.A) for member in members]
    torch.testing.assert_close(pcb(small), 1e-4 * pcb(members), atol=1e-9, rtol=1e-4)


def pcb_published(deltas: np.ndarray, ratio: float) -> np.ndarray:
    """Return what the published formulas give for the rows of `deltas`, flat task vectors; tanh included."""

    def spread(x: np.ndarray) -> np.ndarray:
        low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
        return (x - low) / (high - low)

    tasks, size = deltas.shape
    ordered = np.sort(np.abs(deltas), axis=1)
    low, high = ordered[:, int(size * 1e-4)], ordered[:, int(size * (1 - 1e-4) - 1)]
    magnitudes = np.clip(np.abs(deltas), low[:, None], high[:, None])
    scores = np.exp(tasks * spread(magnitudes) ** 2) * np.tanh(deltas * deltas.sum(axis=0))
    floor = np.sort(scores, axis=1)[:, int(size * (1 - ratio))]
    weights = spread(np.maximum(scores, floor[:, None]))
    return (np.sign(deltas) * magnitudes * weights).sum(axis=0) / np.maximum(weights.sum(axis=0), 1e-12)


def test_pcb_equals_the_published_formulas_on_entries_of_real_size() -> None:
    """But for the entry at the cut, which theirs gives the weight 0: 1e-4 of 10000 entries clips as many in both."""
    members = [update(100, 100, 3, seed) for seed in range(4)]
    members = [Update(1e-3 * member.B, member.A) for member in members]
    flat = np.stack([member.dense().double().numpy().ravel() for member in members])
    found, expected = pcb(members).numpy().ravel(), pcb_published(flat, 0.1)
    apart = np.abs(found - expected) > 1e-3 * np.abs(expected).max()
    assert apart.mean() < 1e-3


def test_knots_is_the_published_merge_of_the_stacked_svd() -> None:
    members = [update(30, 12, r, seed) for seed, r in enumerate((2, 3, 2))]
    U, S, Vh = np.linalg.svd(np.hstack([member.dense().double().numpy() for member in members]), full_matrices=False)
    U, S, Vh = U[:, :7], S[:7], Vh[:7]
    parts = [dense(*(S[:, None] * Vh[:, 12 * i : 12 * (i + 1)]).tolist()) for i in range(3)]
    expected = U @ ties(parts, density=0.2).double().numpy()
    np.testing.assert_allclose(knots(members).dense().numpy(), expected, atol=2e-4)
    assert get_rule("knots").default_scale == 0.6
    assert knots(members).rank == 7


@pytest.mark.parametrize("name", SPACED)
@pytest.mark.parametrize("density", [0.0, 1.5, -0.2])
def test_densities_out_of_range_are_refused(name: str, density: float) -> None:
    if "density" in get_rule(name).options.model_fields:
        assert get_rule(name).check({"density": density})[1]


# ---- truncation of dense results


def slow_decay(m: int, n: int) -> torch.Tensor:
    """Return a TIES result: sign elections leave it a spectrum without an end."""
    return ties([update(m, n, 6, seed) for seed in range(4)]).float()


def sparse_noise(m: int, n: int) -> torch.Tensor:
    return torch.randn(m, n, generator=seeded())


def decaying(m: int, n: int) -> torch.Tensor:
    U = torch.linalg.qr(torch.randn(m, m, generator=seeded())).Q
    return U * torch.arange(1, m + 1).pow(-0.7) @ torch.randn(m, n, generator=seeded())


def low_rank(m: int, n: int) -> torch.Tensor:
    return update(m, n, 5).dense()


@pytest.mark.parametrize("kind", [slow_decay, sparse_noise, decaying, low_rank])
@pytest.mark.parametrize(("m", "n"), [(600, 700), (900, 560)])
@pytest.mark.parametrize("rank", [4, 24])
def test_the_krylov_space_captures_what_an_svd_does(kind, m: int, n: int, rank: int) -> None:
    dW = kind(m, n) if m <= n else kind(n, m).T
    energies = np.linalg.svd(dW.double().numpy(), compute_uv=False) ** 2
    cut, lost = core.truncate_dense(dW, rank)
    best = energies[:rank].sum()
    left = float((dW.double() - cut.B.double() @ cut.A.double()).square().sum())
    assert left - energies[rank:].sum() <= 1e-4 * best + 1e-9 * energies.sum()
    assert lost == pytest.approx(left / energies.sum(), abs=1e-6)
    assert cut.rank == rank


def test_a_dense_zero_and_a_rank_near_the_side_are_truncated_too() -> None:
    zero, lost = core.truncate_dense(torch.zeros(600, 700), 8)
    assert lost == 0.0
    assert float(zero.dense().abs().max()) == 0.0
    dW = sparse_noise(520, 530)
    cut, lost = core.truncate_dense(dW, 519)
    energies = np.linalg.svd(dW.double().numpy(), compute_uv=False) ** 2
    assert lost == pytest.approx(energies[519:].sum() / energies.sum(), rel=1e-3)
    assert cut.rank == 519


def test_truncation_leaves_the_global_random_state_alone() -> None:
    state = torch.random.get_rng_state()
    one, two = (core.truncate_dense(sparse_noise(600, 640), 8)[0] for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one.B, two.B)
