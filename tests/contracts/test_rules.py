"""Laws that every registered rule must keep, and equality with a dense float64 reference written independently.

A new rule fails here until it has a reference in REFERENCES; a law it cannot keep is declared in EXCEPTIONS.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from loraloom.adapter import Adapter, Update
from loraloom.merging import Merged, get_rule, merge, rule_names

SHAPES = {"tall": (26, 17), "wide": (15, 24)}
RANKS = (2, 5, 3)
EVERYTHING = 1000  # a rank above every layer's: nothing is truncated

# options beyond the defaults, by rule; every space of a rule is added to each
VARIANTS: dict[str, list[dict[str, Any]]] = {"ties": [{}, {"density": 0.6}], "tsv": [{}, {"k": 2}]}
# options at which one adapter comes back unchanged, where the defaults are no identity, and why
IDENTITY_AT: dict[str, dict[str, Any]] = {"ties": {"density": 1.0}}  # trimming is the point of the rule
# (law, rule): why the rule cannot keep the law
EXCEPTIONS: dict[tuple[str, str], str] = {}


# dense references: f(dense float64 updates, their ranks, options) -> dense float64


def sum_of(deltas: Sequence[np.ndarray], ranks: Sequence[int], options: dict[str, Any]) -> np.ndarray:
    return np.sum(deltas, axis=0)


def ties_of(deltas: Sequence[np.ndarray], ranks: Sequence[int], options: dict[str, Any]) -> np.ndarray:
    if options["space"] == "core":
        U = np.linalg.svd(np.hstack(deltas))[0][:, : sum(ranks)]
        V = np.linalg.svd(np.vstack(deltas))[2][: sum(ranks)].T
        cores = [U.T @ dW @ V for dW in deltas]
        return U @ ties_of(cores, ranks, {**options, "space": "full"}) @ V.T
    trimmed = []
    for dW in deltas:
        order = np.argsort(-np.abs(dW), axis=None)[: round(options["density"] * dW.size)]
        kept = np.zeros(dW.size)
        kept[order] = dW.flatten()[order]
        trimmed.append(kept.reshape(dW.shape))
    merged = np.zeros_like(deltas[0])
    for place in np.ndindex(merged.shape):
        values = [dW[place] for dW in trimmed]
        agreeing = [value for value in values if value * sum(values) > 0]
        merged[place] = np.mean(agreeing) if agreeing else 0.0
    return merged


def tsv_of(deltas: Sequence[np.ndarray], ranks: Sequence[int], options: dict[str, Any]) -> np.ndarray:
    def orthogonal(X: np.ndarray) -> np.ndarray:  # X (X^T X)^(-1/2), another route than an SVD of X
        values, vectors = np.linalg.eigh(X.T @ X)
        return X @ (vectors / np.sqrt(values)) @ vectors.T

    kept = [min(options["k"] or rank, rank) for rank in ranks]
    parts = [np.linalg.svd(dW, full_matrices=False) for dW in deltas]
    U = np.hstack([part[0][:, :k] for part, k in zip(parts, kept, strict=True)])
    S = np.concatenate([part[1][:k] for part, k in zip(parts, kept, strict=True)])
    V = np.vstack([part[2][:k] for part, k in zip(parts, kept, strict=True)]).T
    return orthogonal(U) @ np.diag(S) @ orthogonal(V).T


REFERENCES: dict[str, Callable[..., np.ndarray]] = {
    "task_arithmetic": sum_of,
    "weighted": sum_of,
    "svd": sum_of,
    "ties": ties_of,
    "tsv": tsv_of,
}


def cases() -> list[Any]:
    found = []
    for name in rule_names():
        spaces = get_rule(name).spaces
        for variant in VARIANTS.get(name, [{}]):
            for space in spaces:
                options = {**variant, "space": space} if len(spaces) > 1 else variant
                found.append(pytest.param(name, options, id=f"{name}-{options}"))
    return found


def law(name: str) -> Any:
    """Run a law over every rule, options and seed; a declared exception must really fail, or it is out of date."""
    marked = []
    for case in cases():
        reason = EXCEPTIONS.get((name, case.values[0]))
        marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
        marked.append(pytest.param(*case.values, id=case.id, marks=marks))

    def decorate(test: Any) -> Any:
        return pytest.mark.parametrize("seed", [0, 1])(pytest.mark.parametrize(("rule", "options"), marked)(test))

    return decorate


def adapters(seed: int, ranks: Sequence[int] = RANKS, shapes: Mapping[str, Any] = SHAPES) -> dict[str, Adapter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"task{i}": Adapter(
            {
                name: Update(torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator))
                for name, (m, n) in shapes.items()
            },
            {"peft_type": "LORA", "target_modules": list(shapes)},
        )
        for i, r in enumerate(ranks)
    }


def mapped(adapter: Adapter, change: Callable[[Update], Update]) -> Adapter:
    return Adapter({name: change(update) for name, update in adapter.updates.items()}, adapter.config)


def plain(members: dict[str, Adapter], rule: str, options: dict[str, Any], **arguments: Any) -> Merged:
    """Merge with every weight and the scale at 1, and nothing truncated unless asked."""
    settings = {"weights": [1.0] * len(members), "scale": 1.0, "rank": EVERYTHING, **arguments}
    return merge(members, rule, **settings, **options)


def assert_same(merged: Merged, expected: dict[str, np.ndarray], tolerance: float = 2e-5) -> None:
    for name, dW in expected.items():
        error = np.linalg.norm(dense(merged.adapter)[name] - dW)
        assert error <= tolerance * np.linalg.norm(dW), name


def dense(adapter: Adapter) -> dict[str, np.ndarray]:
    return {name: update.B.double().numpy() @ update.A.double().numpy() for name, update in adapter.updates.items()}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small matrices on one thread: faster, and the same on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_rule_has_a_reference() -> None:
    assert set(rule_names()) == set(REFERENCES)


@law("reference")
def test_equals_the_dense_reference(rule: str, options: dict[str, Any], seed: int) -> None:
    members = adapters(seed)
    weights, scale = [0.7, -0.4, 1.3], 0.6
    merged = merge(members, rule, weights=weights, scale=scale, **options)
    limit = max(RANKS) if get_rule(rule).output_rank == "max" else sum(RANKS)
    for name in SHAPES:
        deltas = [w * dense(member)[name] for w, member in zip(weights, members.values(), strict=True)]
        U, S, Vh = np.linalg.svd(scale * REFERENCES[rule](deltas, RANKS, merged.options), full_matrices=False)
        assert_same(merged, {name: U[:, :limit] * S[:limit] @ Vh[:limit]})
        assert merged.energy_lost[name] == pytest.approx((S[limit:] ** 2).sum() / (S**2).sum(), abs=1e-7)
        assert merged.adapter.updates[name].rank <= limit


@law("rank")
def test_rank_truncates_optimally(rule: str, options: dict[str, Any], seed: int) -> None:
    whole, cut = (plain(adapters(seed), rule, options, rank=rank) for rank in (EVERYTHING, 2))
    for name, dW in dense(whole.adapter).items():
        U, S, Vh = np.linalg.svd(dW, full_matrices=False)
        assert cut.adapter.updates[name].rank == 2
        assert_same(cut, {name: U[:, :2] * S[:2] @ Vh[:2]})
        assert cut.energy_lost[name] == pytest.approx((S[2:] ** 2).sum() / (S**2).sum(), abs=1e-6)


@law("identity")
def test_one_adapter_is_the_identity(rule: str, options: dict[str, Any], seed: int) -> None:
    members = adapters(seed, ranks=(4,))
    settings = {**options, **IDENTITY_AT.get(rule, {})}
    settings.pop("k", None)  # keeping fewer triples than the rank is no identity
    merged = merge(members, rule, weights=[1.0], scale=1.0, **settings)
    assert_same(merged, dense(members["task0"]))
    assert max(merged.energy_lost.values()) < 1e-9


@law("permutation")
def test_order_does_not_matter(rule: str, options: dict[str, Any], seed: int) -> None:
    members = adapters(seed)
    turned = {name: members[name] for name in ("task2", "task0", "task1")}
    one = plain(members, rule, options, weights=[0.5, 2.0, -1.0], rank=None)
    two = plain(turned, rule, options, weights=[-1.0, 0.5, 2.0], rank=None)
    assert_same(two, dense(one.adapter))


@law("equivariance")
@pytest.mark.parametrize("factor", [2.5, -1.0, 1e-6])
def test_scaling_the_adapters_scales_the_result(rule: str, options: dict[str, Any], seed: int, factor: float) -> None:
    members = adapters(seed)
    expected = {name: factor * dW for name, dW in dense(plain(members, rule, options).adapter).items()}
    assert_same(plain({name: a.scaled(factor) for name, a in members.items()}, rule, options), expected)
    assert_same(plain(members, rule, options, scale=factor), expected)


@law("zero")
def test_a_zero_adapter_is_neutral(rule: str, options: dict[str, Any], seed: int) -> None:
    members = adapters(seed)
    zero = mapped(members["task1"], lambda u: Update(torch.zeros_like(u.B), u.A))
    assert_same(plain({"zero": zero, **members}, rule, options), dense(plain(members, rule, options).adapter))


@law("all zero")
def test_zero_adapters_merge_to_zero(rule: str, options: dict[str, Any], seed: int) -> None:
    members = {
        name: mapped(member, lambda u: Update(torch.zeros_like(u.B), u.A)) for name, member in adapters(seed).items()
    }
    merged = plain(members, rule, options, rank=None)
    for name, update in merged.adapter.updates.items():
        assert update.rank >= 1
        assert torch.equal(update.dense(), torch.zeros(SHAPES[name]))
        assert merged.energy_lost[name] == 0.0


@law("gauge")
def test_the_split_into_factors_does_not_matter(rule: str, options: dict[str, Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def turn(update: Update) -> Update:
        r = update.rank
        R = torch.eye(r, dtype=torch.float64) + 0.5 * torch.rand(r, r, generator=generator, dtype=torch.float64)
        return Update((update.B.double() @ R).float(), torch.linalg.solve(R, update.A.double()).float())

    members = adapters(seed)
    turned = {name: mapped(member, turn) for name, member in members.items()}
    assert_same(plain(turned, rule, options), dense(plain(members, rule, options).adapter))


@law("determinism")
def test_deterministic_for_any_number_of_threads(rule: str, options: dict[str, Any], seed: int) -> None:
    members = adapters(seed, shapes={"large": (300, 200)})  # large enough for torch to use its threads
    results = []
    for count in (1, 1, 2):
        torch.set_num_threads(count)
        results.append(plain(members, rule, options, rank=None, seed=7))
    assert_same(results[1], dense(results[0].adapter), tolerance=0.0)
    assert_same(results[2], dense(results[0].adapter), tolerance=1e-6)


@law("pure")
def test_inputs_and_random_state_are_left_alone(rule: str, options: dict[str, Any], seed: int) -> None:
    members = adapters(seed)
    before, state = copy.deepcopy(members), torch.random.get_rng_state()
    merge(members, rule, **options)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, member in members.items():
        assert member.config == before[name].config
        for module, update in member.updates.items():
            assert torch.equal(update.B, before[name].updates[module].B)
            assert torch.equal(update.A, before[name].updates[module].A)
