"""Adapters of different energy: told before a merge, made equally loud on request, as a dense reference has it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from loraloom.adapters.peft import write_adapter
from loraloom.adapters.update import Adapter, Update
from loraloom.cli.main import app
from loraloom.errors import LoraloomError
from loraloom.merging import MergeOptions, get_rule, make_plan, merge, rule_names, write_merged
from loraloom.merging.facts import MergeFacts
from loraloom.merging.normalise import drowned
from loraloom.statistics.file import Layer, Statistics
from loraloom.statistics.moments import Moment

SHAPES = {"layer.0.q": (6, 5), "layer.0.v": (7, 5), "layer.1.up": (9, 6)}
NAMES = ("mood", "tone", "size")
RULES = [get_rule(name) for name in rule_names() if not get_rule(name).whole]
LAYER_RULES = [rule.name for rule in RULES if "seed" not in rule.needs]


@pytest.fixture(autouse=True)
def _loud_again() -> Iterator[None]:
    """Commands silence every library in this process; other tests want to hear them."""
    yield
    logging.disable(logging.NOTSET)


def adapter(seed: int, rank: int = 2, times: float = 1.0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    updates = {
        name: Update(times * torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator))
        for name, (m, n) in SHAPES.items()
    }
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "target_modules": ["q", "v", "up"]}
    return Adapter(updates, config)


def rows(seed: int, name: str) -> torch.Tensor:
    """What a layer reads, with a mean and a few loud rows."""
    generator = torch.Generator().manual_seed(100 + seed)
    found = 1 + seed + torch.randn(20 + seed, SHAPES[name][1], generator=generator)
    found[0] *= 30
    return found


def statistics(seed: int) -> Statistics:
    layers = {name: Layer(name, n, m) for name, (m, n) in SHAPES.items()}
    moments = {name: Moment.of_rows(rows(seed, name)) for name in SHAPES}
    return Statistics("org/base", "", moments, layers, texts=4, tokens=20 + seed, kind="token")


def trio(*times: float) -> dict[str, Adapter]:
    loud = times or (1.0, 7.0, 0.2)
    return {name: adapter(i, rank=i + 1, times=loud[i]) for i, name in enumerate(NAMES)}


def dense(update: Update) -> np.ndarray:
    return update.B.double().numpy() @ update.A.double().numpy()


def norm_of(updates: Iterable[Update]) -> float:
    return float(np.sqrt(sum(np.square(dense(update)).sum() for update in updates)))


def sizes_by_hand(way: str, adapters: dict[str, Adapter], module: str) -> dict[str, float]:
    """Norms and root mean square responses in one layer, from dense matrices and single rows."""
    found = {}
    for seed, (name, one) in enumerate(adapters.items()):
        dW = dense(one.updates[module])
        if way == "norm":
            found[name] = float(np.linalg.norm(dW))
        else:
            squares = [np.square(dW @ row).sum() for row in rows(seed, module).double().numpy()]
            found[name] = float(np.sqrt(np.mean(squares)))
    return found


@pytest.mark.parametrize("way", ["norm", "response"])
def test_a_normalised_sum_is_the_dense_one(way: Any) -> None:
    """sum_i w_i (g / size_i) dW_i times the scale, with g the geometric mean of the sizes in the layer."""
    adapters, weights = trio(), [0.5, -1.0, 2.0]
    seen = [statistics(seed) for seed in range(3)]
    merged = merge(adapters, "task_arithmetic", weights=weights, scale=0.3, normalise=way, statistics=seen)
    for module, update in merged.adapter.updates.items():
        sizes = sizes_by_hand(way, adapters, module)
        middle = np.prod(list(sizes.values())) ** (1 / 3)
        parts = [
            w * middle / sizes[n] * dense(adapters[n].updates[module]) for n, w in zip(NAMES, weights, strict=True)
        ]
        expected = 0.3 * sum(parts)
        assert np.linalg.norm(dense(update) - expected) < 1e-6 * np.linalg.norm(expected)
        found = {name: merged.plan.factors[name][module] for name in NAMES}
        assert found == pytest.approx({name: middle / size for name, size in sizes.items()})


@pytest.mark.parametrize("way", ["norm", "response"])
@pytest.mark.parametrize("rule", LAYER_RULES)
def test_how_loud_one_adapter_is_changes_nothing_but_a_common_factor(rule: str, way: Any) -> None:
    """That factor is of the geometric mean: 10^(1/3) where one of three is ten times as large."""
    seen = [statistics(seed) for seed in range(3)]
    one, ten = (
        merge(trio(1.0, times, 0.2), rule, normalise=way, statistics=seen).adapter.updates for times in (0.7, 7.0)
    )
    for module, update in one.items():
        expected = 10 ** (1 / 3) * dense(update)
        assert np.linalg.norm(dense(ten[module]) - expected) < 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("way", ["norm", "response"])
def test_what_any_rule_is_given_does_not_hang_on_how_loud_one_adapter_is(way: Any) -> None:
    """Rules that draw at random give out their draws by falling norm: nothing but rounding tells equal norms apart."""
    seen = {name: statistics(seed) for seed, name in enumerate(NAMES)}
    plans = [make_plan(trio(1.0, t, 0.2), MergeOptions(normalise=way), statistics=seen) for t in (0.7, 7.0)]
    for module in SHAPES:
        for one, ten in zip(*(plan.updates(module) for plan in plans), strict=True):
            np.testing.assert_allclose(dense(ten), 10 ** (1 / 3) * dense(one), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", ["dare", "della", "cp"])
def test_the_order_of_equally_loud_adapters_changes_nothing(rule: str) -> None:
    turned = dict(reversed(trio().items()))
    one, two = (merge(given, rule, normalise="norm").adapter.updates for given in (trio(), turned))
    for module, update in one.items():
        torch.testing.assert_close(two[module].dense(), update.dense())


def test_the_weights_come_after() -> None:
    plan = make_plan(trio(), MergeOptions("weighted", normalise="norm", weights=[1.0, 1.0, 2.0]))
    given = [plan.updates(module) for module in plan.modules]
    for layer in given:
        norms = [float(np.linalg.norm(dense(update))) for update in layer]
        assert norms == pytest.approx([norms[0], norms[0], 2 * norms[0]])


@pytest.mark.parametrize("way", ["norm", "response"])
def test_one_adapter_stays_as_it_is(way: Any) -> None:
    one = adapter(0)
    seen = {name: statistics(i) for i, name in enumerate(NAMES)}
    for merged in (
        merge({"mood": one}, normalise=way, statistics={"mood": seen["mood"]}),
        merge({**trio(), "mood": one}, weights=[1.0, 0.0, 0.0], normalise=way, statistics=seen),
    ):
        assert merged.plan.factors == {}
        for module, update in merged.adapter.updates.items():
            torch.testing.assert_close(update.dense(), one.updates[module].dense())


def test_a_layer_that_an_adapter_leaves_alone_is_none_of_its(tmp_path: Path) -> None:
    """Zero there, it has no say in how loud the others are, and stays zero."""
    adapters = trio()
    adapters["tone"].updates["layer.0.v"].B.zero_()
    factors = make_plan(adapters, MergeOptions("weighted", normalise="norm")).factors
    assert "layer.0.v" not in factors["tone"]
    others = {name: one for name, one in adapters.items() if name != "tone"}
    without = make_plan(others, MergeOptions("weighted", normalise="norm")).factors
    assert {name: factors[name]["layer.0.v"] for name in others} == {n: without[n]["layer.0.v"] for n in others}


def test_a_layer_that_an_adapter_lacks_is_none_of_its(tmp_path: Path) -> None:
    """A layer of one adapter alone stays as it is; of two, they are brought to the mean of their two."""
    adapters = trio()
    del adapters["tone"].updates["layer.0.v"], adapters["tone"].updates["layer.1.up"]  # type: ignore[attr-defined]
    del adapters["size"].updates["layer.1.up"]  # type: ignore[attr-defined]
    plan = make_plan(adapters, MergeOptions("weighted", weights=[1.0] * 3, normalise="norm"))
    assert plan.factors["mood"]["layer.1.up"] == 1.0
    sizes = sizes_by_hand("norm", {name: adapters[name] for name in ("mood", "size")}, "layer.0.v")
    middle = np.sqrt(sizes["mood"] * sizes["size"])
    assert {name: plan.factors[name]["layer.0.v"] for name in sizes} == pytest.approx(
        {name: middle / size for name, size in sizes.items()}
    )
    given = plan.updates("layer.0.v")
    assert [float(np.linalg.norm(dense(update))) for update in given] == pytest.approx([middle, 0.0, middle])
    alone = MergeOptions(targets="intersection", normalise="norm")
    facts = MergeFacts.of(make_plan(adapters, alone), "test")
    assert [one.energy_share for one in facts.inputs] == pytest.approx([1 / 3] * 3)  # of what is merged, layer.0.q


def test_nothing_is_touched_without(tmp_path: Path) -> None:
    plan = make_plan(trio(), MergeOptions("weighted", weights=[1.0, 1.0, 1.0]))
    assert plan.factors == {}
    assert all(torch.equal(plan.updates(m)[1].B, plan.members["tone"].updates[m].B) for m in plan.modules)


def test_what_cannot_be_normalised_is_told() -> None:
    zero = {**trio(), "tone": adapter(1, times=0.0)}
    with pytest.raises(LoraloomError, match="'tone' cannot be normalised: every update is zero: leave it out"):
        merge(zero, normalise="norm")
    assert merge(zero, normalise="norm", weights=[1.0, 0.0, 1.0]).plan.factors.keys() == {"mood", "size"}
    deaf = {name: Update(update.B, 0 * update.A) for name, update in adapter(1).updates.items()}
    seen = [statistics(seed) for seed in range(3)]
    with pytest.raises(LoraloomError, match="'tone' cannot be normalised: it does nothing to its own inputs"):
        merge({**trio(), "tone": Adapter(deaf, adapter(1).config)}, normalise="response", statistics=seen)
    with pytest.raises(LoraloomError, match="2 problems") as caught:
        merge(trio(), "ties", normalise="norms", densty=1)  # type: ignore[arg-type]
    assert "normalise 'norms' is unknown: did you mean 'norm'?" in str(caught.value)
    with pytest.raises(LoraloomError, match="normalising by response needs statistics of each task's inputs"):
        merge(trio(), normalise="response")


def test_factors_are_recorded(tmp_path: Path) -> None:
    merged = merge(trio(), "weighted", normalise="norm")
    folder = write_merged(merged, tmp_path / "merged")
    told = json.loads((folder / "loraloom.json").read_text())
    assert told["normalise"] == "norm"
    assert {one["name"]: one["factors"] for one in told["inputs"]} == merged.plan.factors
    changed = {name: norm_of(merged.plan.updates(m)[i] for m in SHAPES) for i, name in enumerate(NAMES)}
    factors = {one["name"]: one["factor"] for one in told["inputs"]}
    assert factors == pytest.approx(
        {name: 3 * norm / norm_of(trio()[name].updates.values()) for name, norm in changed.items()}
    )
    assert [one["energy_share"] for one in told["inputs"]] == pytest.approx([1 / 3] * 3)
    energies = {name: sum(np.square(dense(u)).sum() for u in one.updates.values()) for name, one in trio().items()}
    assert {one["name"]: one["energy"] for one in told["inputs"]} == pytest.approx(energies)
    card = (folder / "README.md").read_text()
    assert "| adapter | rank | alpha | targets | energy | factor | weight | share | sha256 |" in card
    assert "- normalised: every adapter to the same |dW| in each layer, before the weights" in card
    assert f"| {factors['tone']:.3g} | 0.3333 | 33.3 % |" in card
    assert "warning" not in card


# what is said of quiet adapters


def test_a_factor_of_three_is_where_the_warning_begins() -> None:
    assert drowned({}) == drowned({"one": 5.0}) == drowned({"one": 1.0, "two": 3.0}) == []
    assert drowned({"one": 1.0, "off": 0.0}) == []  # of weight 0
    (told,) = drowned({"support": 168.0, "legal": 1189.0, "other": 900.0, "sales": 275.0})
    assert told.startswith("legal has up to 7.08 times the energy |dW|^2 of support, sales: what the quiet ones learnt")
    assert "likely to be lost" in told
    assert "`--normalise norm`" in told


def test_the_warning_goes_by_what_the_merge_sees() -> None:
    """Weights that make up for it silence it; normalising does."""
    adapters = trio(1.0, 1.0, 1.0)
    even = {name: sum(u.energy() for u in one.updates.values()) for name, one in adapters.items()}
    for options, warned in (
        (MergeOptions("weighted", normalise="none"), max(even.values()) > 3 * min(even.values())),
        (MergeOptions("weighted", weights=[1.0, 9.0, 1.0]), True),
        (MergeOptions("weighted", weights=[one**-0.5 for one in even.values()]), False),
        (MergeOptions("weighted", weights=[1.0, 9.0, 1.0], normalise="norm"), False),
    ):
        facts = MergeFacts.of(make_plan(adapters, options), "test")
        assert any("times the energy" in warning for warning in facts.warnings) == warned


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for i, (name, one) in enumerate(trio().items()):
        write_adapter(one, tmp_path / name, provenance={})
        statistics(i).save(tmp_path / f"{name}.safetensors")
    return tmp_path


def call(*words: Any, code: int = 0) -> Any:
    done = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "80"})
    assert done.exit_code == code, done.stderr
    return done


def test_quiet_adapters_are_told_before_anything_is_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*given: Any, **more: Any) -> None:
        raise LoraloomError("stopped before writing")

    monkeypatch.setattr("loraloom.merging.folders.write_merged", stop)
    words = ("merge", *(place / name for name in NAMES), "--normalise", "none", "-o", place / "out")
    done = call(*words, code=2)
    said = " ".join(done.stderr.split())
    assert "tone has up to" in said
    assert said.index("likely to be lost") < said.index("stopped before writing")
    dry = call(*words, "--dry-run")
    assert "tone has up to" in " ".join(dry.stderr.split())


def test_the_command_normalises(place: Path) -> None:
    folders = [place / name for name in NAMES]
    seen = [word for name in NAMES for word in ("--statistics", place / f"{name}.safetensors")]
    for way, more in (("norm", []), ("response", seen)):
        words = ("--rule", "ties", "--normalise", way, *more, "--screen", "off")
        done = call("merge", *folders, *words, "-o", place / way)
        assert "warning" not in done.stderr
        assert max(map(len, done.stdout.splitlines()[:6])) <= 80
        told = json.loads((place / way / "loraloom.json").read_text())
        for module in SHAPES:
            expected = sizes_by_hand(way, trio(), module)
            sizes = [one["factors"][module] * expected[one["name"]] for one in told["inputs"]]
            assert sizes == pytest.approx([sizes[0]] * 3)
    wrong = call("merge", *folders, "--normalise", "nrm", "-o", place / "x", code=2)
    assert "did you mean 'norm'?" in wrong.stderr
    dry = json.loads(call("merge", *folders, "--normalise", "norm", "-o", place / "x", "--dry-run", "--json").stdout)
    assert [one["energy_share"] for one in dry["inputs"]] == pytest.approx([1 / 3] * 3)


def test_a_dry_run_of_large_adapters_says_what_it_did_not_read(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraloom.merging.folders._QUICK", 10)
    words = ("merge", *(place / name for name in NAMES), "-o", place / "out", "--dry-run", "--normalise", "none")
    done = call(*words, "--screen", "off")
    assert "energies not told: the adapters are too large to read now" in " ".join(done.stdout.split())
    assert "warning" not in done.stderr
    told = json.loads(call(*words, "--json").stdout)
    assert {one["energy"] for one in told["inputs"]} == {one["energy_share"] for one in told["inputs"]} == {None}
