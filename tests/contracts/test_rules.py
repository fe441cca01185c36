"""Laws that every registered rule must keep, and equality with a dense float64 reference written independently.

A new rule fails here until a module of `references` holds its reference; a law it cannot keep is declared in EXCEPTIONS
there, and must then really fail.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import itertools
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import references
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies as st

import tiny_probe
from loraloom.adapters.update import Adapter, Update
from loraloom.files.hashing import layer_seed
from loraloom.merging import Merged, Rule, get_rule, merge, rule_names
from loraloom.statistics.file import Layer, Statistics
from loraloom.statistics.moments import Moment

SHAPES = {"first": (26, 17), "second": (15, 26)}  # tall and wide; the tiny model's layers
SEED = 3  # of the random worlds: six of every kind
EVERYTHING = 1000  # a rank above every layer's: nothing is truncated

FAMILIES = [importlib.import_module(f"references.{found.name}") for found in pkgutil.iter_modules(references.__path__)]


def gathered(name: str) -> dict[Any, Any]:
    """Return the entries of one table over all families."""
    return {key: value for family in FAMILIES for key, value in getattr(family, name, {}).items()}


REFERENCES: dict[str, Callable[..., np.ndarray]] = gathered("REFERENCES")
VARIANTS: dict[str, list[dict[str, Any]]] = gathered("VARIANTS")  # options beyond the defaults; all spaces are added
IDENTITY_AT: dict[str, dict[str, Any]] = gathered("IDENTITY_AT")  # options at which one adapter comes back unchanged
EXCEPTIONS: dict[tuple[str, str], str] = gathered("EXCEPTIONS")  # (law, rule): why the rule cannot keep the law


@dataclass(frozen=True)
class World:
    """Random adapters, and what their tasks look like."""

    seed: int
    ranks: tuple[int, ...]
    short: bool  # the first update has a lower rank than its factors

    def adapters(self, shapes: dict[str, tuple[int, int]] = SHAPES) -> dict[str, Adapter]:
        generator = torch.Generator().manual_seed(self.seed)
        found = {}
        for i, r in enumerate(self.ranks):
            updates = {}
            for name, (m, n) in shapes.items():
                B, A = torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator)
                if self.short and i == 0:
                    B[:, -1] = 0.0
                updates[name] = Update(B, A)
            found[f"task{i}"] = Adapter(updates, {"peft_type": "LORA", "target_modules": list(shapes)})
        return found

    def inputs(self, name: str, shapes: dict[str, tuple[int, int]] = SHAPES) -> dict[str, torch.Tensor]:
        """Return the rows (k, n) that the layers read of one task, fewer or more than n."""
        generator = torch.Generator().manual_seed(self.seed + sum(name.encode()))
        rows = 8 if self.seed % 2 else 40
        return {layer: torch.randn(rows, n, generator=generator) for layer, (_, n) in shapes.items()}

    def statistics(self, name: str, shapes: dict[str, tuple[int, int]] = SHAPES) -> Statistics:
        moments = {layer: Moment.of_rows(rows) for layer, rows in self.inputs(name, shapes).items()}
        layers = {layer: Layer(layer, n, m) for layer, (m, n) in shapes.items()}
        return Statistics("tiny", "", moments, layers, texts=8, tokens=8, kind="token")


WORLDS = st.builds(
    World,
    seed=st.integers(0, 1000),
    ranks=st.lists(st.integers(1, 5), min_size=2, max_size=4).map(tuple),
    short=st.booleans(),
)


def cases(takes: Callable[[Rule], bool]) -> list[Any]:
    found = []
    for name in filter(lambda name: takes(get_rule(name)), rule_names()):
        spaces = get_rule(name).spaces
        for variant in VARIANTS.get(name, [{}]):
            for space in spaces:
                options = {**variant, "space": space} if len(spaces) > 1 else variant
                found.append(pytest.param(name, options, id=f"{name}-{options}"))
    return found


def on_worlds(examples: int) -> Callable[[Any], Any]:
    """Run a test on random worlds, the same for every test, so that what several laws compare with is computed once."""

    def decorate(test: Any) -> Any:
        drawn = settings(
            max_examples=examples,
            derandomize=True,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )(given(world=WORLDS)(test))
        return seed(SEED)(drawn)

    return decorate


def law(name: str, examples: int = 6, takes: Callable[[Rule], bool] = lambda rule: True) -> Any:
    """Run a law over every rule that it `takes` and its options; a declared exception must really fail."""
    marked = []
    for case in cases(takes):
        reason = EXCEPTIONS.get((name, case.values[0]))
        marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
        marked.append(pytest.param(*case.values, id=case.id, marks=marks))
    return lambda test: pytest.mark.parametrize(("rule", "options"), marked)(on_worlds(examples)(test))


def plain(world: World, members: dict[str, Adapter], rule: str, options: dict[str, Any], **arguments: Any) -> Merged:
    """Merge with every weight and the scale at 1, nothing truncated unless asked, and with all that the rule needs."""
    found = get_rule(rule)
    chosen = {"weights": [1.0] * len(members), "scale": 1.0, "rank": EVERYTHING, **arguments}
    if "rank" in found.supplied and "rank" not in arguments:
        chosen["rank"] = None
    if "moments" in found.supplied:
        layers = sorted((layer, shape[:2]) for member in members.values() for layer, shape in member.shapes.items())
        shapes = dict(layers)  # sorted: inputs are drawn layer by layer
        chosen["statistics"] = {name: world.statistics(name, shapes) for name in members}
    if found.distils:
        chosen["distiller"] = tiny_probe.Untrained()
    elif found.whole:
        chosen["probe"] = tiny_probe.tiny_probe(list(members), world.seed)
    return merge(members, rule, **chosen, **options)


def usual(world: World, rule: str, options: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the dense updates of the plain merge of the world's adapters; change nothing in them."""
    return _usual(world, rule, tuple(options.items()))


@cache
def _usual(world: World, rule: str, options: tuple[tuple[str, Any], ...]) -> dict[str, np.ndarray]:
    return dense(plain(world, world.adapters(), rule, dict(options)).adapter)


def by_the_rule(merged: Merged) -> Merged:
    """Return the same merge with the rule at work, where one adapter alone came back as it is without it."""
    plan = dataclasses.replace(merged.plan, as_it_is=False)
    return Merged(plan, {layer.module: layer for layer in plan.layers()})


def mapped(adapter: Adapter, change: Callable[[Update], Update]) -> Adapter:
    return Adapter({name: change(update) for name, update in adapter.updates.items()}, adapter.config)


def assert_same(merged: Merged, expected: dict[str, np.ndarray], tolerance: float = 2e-5) -> None:
    found = dense(merged.adapter)
    for name, dW in expected.items():
        error = np.linalg.norm(found[name] - dW)
        assert error <= tolerance * np.linalg.norm(dW), f"{name}: {error / np.linalg.norm(dW):.2e}"


def dense(adapter: Adapter) -> dict[str, np.ndarray]:
    return {name: update.B.double().numpy() @ update.A.double().numpy() for name, update in adapter.updates.items()}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small matrices on one thread: faster, and the same on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_worlds_are_of_every_kind() -> None:
    seen: list[World] = []

    def look(world: World) -> None:
        seen.append(world)

    on_worlds(6)(look)()
    assert {len(world.ranks) for world in seen} == {2, 3, 4}
    assert {(world.short, bool(world.seed % 2)) for world in seen} == set(itertools.product((False, True), repeat=2))


def test_every_rule_has_a_reference() -> None:
    """Those with a probe have theirs in tests/merging, on a model of their own."""
    assert {name for name in rule_names() if not get_rule(name).whole} == set(REFERENCES)


@law("reference", takes=lambda rule: not rule.whole)
def test_equals_the_dense_reference(world: World, rule: str, options: dict[str, Any]) -> None:
    found = get_rule(rule)
    members = world.adapters()
    weights, scale = [0.7, -0.4, 1.3, 0.9][: len(members)], 0.6
    merged = plain(world, members, rule, options, weights=weights, scale=scale, rank=None, seed=3)
    limit = max(world.ranks) if found.output_rank == "max" else sum(world.ranks)
    for name in SHAPES:
        deltas = [w * dense(member)[name] for w, member in zip(weights, members.values(), strict=True)]
        everything = {
            "moments": [world.inputs(task)[name].double().numpy() for task in members],
            "generator": torch.Generator().manual_seed(layer_seed(3, name)),
            "rank": None,
        }
        extra = {key: value for key, value in everything.items() if key in found.supplied}
        expected = scale * REFERENCES[rule](deltas, world.ranks, merged.plan.options, **extra)
        U, S, Vh = np.linalg.svd(expected, full_matrices=False)
        assert_same(merged, {name: U[:, :limit] * S[:limit] @ Vh[:limit]})
        assert merged.energy_lost[name] == pytest.approx((S[limit:] ** 2).sum() / (S**2).sum(), abs=1e-7)
        assert merged.adapter.updates[name].rank <= limit


@law("rank", takes=lambda rule: "rank" not in rule.supplied)
def test_rank_truncates_optimally(world: World, rule: str, options: dict[str, Any]) -> None:
    cut = plain(world, world.adapters(), rule, options, rank=2)
    for name, dW in usual(world, rule, options).items():
        U, S, Vh = np.linalg.svd(dW, full_matrices=False)
        assert cut.adapter.updates[name].rank <= 2
        assert_same(cut, {name: U[:, :2] * S[:2] @ Vh[:2]})
        assert cut.energy_lost[name] == pytest.approx((S[2:] ** 2).sum() / (S**2).sum(), abs=1e-6)


@law("identity")
def test_one_adapter_is_the_identity(world: World, rule: str, options: dict[str, Any]) -> None:
    members = {"task1": world.adapters()["task1"]}
    merged = plain(world, members, rule, {**options, **IDENTITY_AT.get(rule, {})}, rank=None)
    merged = by_the_rule(merged)
    assert_same(merged, dense(members["task1"]))
    assert max(merged.energy_lost.values()) < 1e-9


# a rule with a probe takes no weight of 0: it looks at the texts of every input
@law("identity", takes=lambda rule: not rule.whole)
def test_one_hot_weights_give_that_adapter(world: World, rule: str, options: dict[str, Any]) -> None:
    members = world.adapters()
    weights = [0.0, 1.0, 0.0, 0.0][: len(members)]
    merged = plain(world, members, rule, {**options, **IDENTITY_AT.get(rule, {})}, weights=weights, rank=None)
    assert_same(by_the_rule(merged), dense(members["task1"]))


@pytest.mark.parametrize("rule", rule_names())
def test_one_adapter_comes_back_as_it_is_by_default(rule: str) -> None:
    members = World(seed=1, ranks=(3, 2), short=False).adapters()
    for chosen, weights in ({"task1": members["task1"]}, None), (members, [0.0, 1.0]):
        merged = merge(chosen, rule, weights=weights)
        for name, update in members["task1"].updates.items():
            assert torch.equal(merged.merged[name].update.B, update.B)
            assert torch.equal(merged.merged[name].update.A, update.A)
        assert merged.plan.warnings == [
            f"one adapter takes part: there is nothing to merge, and it stays as it is, without rule {rule!r}"
        ]


def lacking(members: dict[str, Adapter]) -> dict[str, Adapter]:
    """Return the adapters without one layer of the first and another of the last: of two, each layer has one update."""
    left = dict(members)
    for name, layer in zip((min(left), max(left)), reversed(SHAPES), strict=True):
        updates = {module: update for module, update in left[name].updates.items() if module != layer}
        left[name] = dataclasses.replace(left[name], updates=updates)
    return left


def filled(members: dict[str, Adapter]) -> dict[str, Adapter]:
    """Return the adapters with updates of zero in the layers that they lack."""
    zero = {name: Update(torch.zeros(m, 1), torch.zeros(1, n)) for name, (m, n) in SHAPES.items()}
    return {name: dataclasses.replace(one, updates={**zero, **one.updates}) for name, one in members.items()}


@law("union", examples=3)
def test_a_layer_that_an_adapter_lacks_is_one_that_it_leaves_as_it_is(
    world: World, rule: str, options: dict[str, Any]
) -> None:
    members = lacking(world.adapters())
    found = plain(world, members, rule, options)
    # LoraHub's search ends at steps of 0.01, where rounding decides
    tolerance = 1e-2 if rule == "lorahub" else 2e-5
    assert_same(found, dense(plain(world, filled(members), rule, options).adapter), tolerance)
    again = plain(world, dict(reversed(members.items())), rule, options)
    assert_same(again, dense(found.adapter), tolerance)


@law("reference", examples=3, takes=lambda rule: not rule.whole)
def test_the_union_equals_the_dense_reference_with_zeros(world: World, rule: str, options: dict[str, Any]) -> None:
    found = get_rule(rule)
    # the references know no layer of zeros, nor of one entry
    world = World(world.seed, tuple(max(2, r) for r in world.ranks), short=False)
    members = lacking(world.adapters())
    merged = plain(world, members, rule, options, scale=0.6, seed=3)
    for name, (m, n) in SHAPES.items():
        # what a task reads counts where its adapter changes nothing too; who only looks at updates looks at the others
        asked = members if "moments" in found.supplied else [task for task in members if name in members[task].shapes]
        deltas = [dense(members[task]).get(name, np.zeros((m, n))) for task in asked]
        ranks = [members[task].shapes[name].r if name in members[task].shapes else 0 for task in asked]
        everything = {
            "moments": [world.inputs(task)[name].double().numpy() for task in asked],
            "generator": torch.Generator().manual_seed(layer_seed(3, name)),
            "rank": None,
        }
        extra = {key: value for key, value in everything.items() if key in found.supplied}
        assert_same(merged, {name: 0.6 * REFERENCES[rule](deltas, ranks, merged.plan.options, **extra)})


@law("permutation")
def test_order_does_not_matter(world: World, rule: str, options: dict[str, Any]) -> None:
    members = world.adapters()
    weights = dict(zip(members, [0.5, 2.0, -1.0, 0.7], strict=False))
    turned = {name: members[name] for name in reversed(members)}
    one = plain(world, members, rule, options, weights=list(weights.values()), rank=None)
    two = plain(world, turned, rule, options, weights=[weights[name] for name in turned], rank=None)
    assert_same(two, dense(one.adapter))


@law("equivariance")
@pytest.mark.parametrize("factor", [2.5, -1.0, 1e-6])
def test_scaling_the_adapters_scales_the_result(
    world: World, rule: str, options: dict[str, Any], factor: float
) -> None:
    expected = {name: factor * dW for name, dW in usual(world, rule, options).items()}
    scaled = {name: member.scaled(factor) for name, member in world.adapters().items()}
    assert_same(plain(world, scaled, rule, options), expected)


@law("scale")
def test_the_scale_multiplies_the_result(world: World, rule: str, options: dict[str, Any]) -> None:
    expected = {name: -1.7 * dW for name, dW in usual(world, rule, options).items()}
    assert_same(plain(world, world.adapters(), rule, options, scale=-1.7), expected)


@law("zero")
def test_a_zero_adapter_is_neutral(world: World, rule: str, options: dict[str, Any]) -> None:
    members = world.adapters()
    zero = mapped(members["task1"], lambda u: Update(torch.zeros_like(u.B), u.A))
    assert_same(plain(world, {"zero": zero, **members}, rule, options), usual(world, rule, options))


@law("all zero")
def test_zero_adapters_merge_to_zero(world: World, rule: str, options: dict[str, Any]) -> None:
    members = {
        name: mapped(member, lambda u: Update(torch.zeros_like(u.B), u.A)) for name, member in world.adapters().items()
    }
    merged = plain(world, members, rule, options, rank=None)
    for name, update in merged.adapter.updates.items():
        assert update.rank >= 1
        assert torch.equal(update.dense(), torch.zeros(SHAPES[name]))
        assert merged.energy_lost[name] == 0.0


def turned(world: World, update: Update) -> Update:
    """Return the same dW in other factors."""
    generator, r = torch.Generator().manual_seed(world.seed), update.rank
    R = torch.eye(r, dtype=torch.float64) + 0.5 * torch.rand(r, r, generator=generator, dtype=torch.float64)
    return Update((update.B.double() @ R).float(), torch.linalg.solve(R, update.A.double()).float())


@law("gauge")
def test_the_split_into_factors_does_not_matter(world: World, rule: str, options: dict[str, Any]) -> None:
    other = {name: mapped(member, lambda u: turned(world, u)) for name, member in world.adapters().items()}
    assert_same(plain(world, other, rule, options), usual(world, rule, options))


@law("determinism", examples=2)
def test_deterministic_for_any_number_of_threads(world: World, rule: str, options: dict[str, Any]) -> None:
    whole = get_rule(rule).whole
    shapes = SHAPES if whole else {"large": (260, 130)}  # 2 ** 15 entries or more: torch uses its threads
    results = []
    for count in (1, 1, 2):
        torch.set_num_threads(count)
        results.append(plain(world, world.adapters(shapes), rule, options, rank=None, seed=7))
    torch.set_num_threads(1)
    assert_same(results[1], dense(results[0].adapter), tolerance=0.0)
    assert_same(results[2], dense(results[0].adapter), tolerance=1e-6)


@law("pure", examples=2)
def test_inputs_and_random_state_are_left_alone(world: World, rule: str, options: dict[str, Any]) -> None:
    members = world.adapters()
    before, state = copy.deepcopy(members), torch.random.get_rng_state()
    plain(world, members, rule, options, rank=None)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, member in members.items():
        assert member.config == before[name].config
        for module, update in member.updates.items():
            assert torch.equal(update.B, before[name].updates[module].B)
            assert torch.equal(update.A, before[name].updates[module].A)
