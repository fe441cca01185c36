"""A task that arrives later: without statistics of its own, and off the adapters that are there already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_initialise import ALL, bert, classifier_trainer, factors, statistics

import tiny
from loraloom.adapters.peft import read_adapter
from loraloom.adapters.update import Adapter, Update
from loraloom.errors import LoraloomError
from loraloom.starts.initialise import initialise
from loraloom.starts.keep import keep_callback
from loraloom.starts.options import Scale, StartOptions
from loraloom.starts.subspace import loud_directions
from loraloom.statistics.file import Statistics

# every layer of the tiny BERT here reads 16 inputs
WIDTH = 16
QUERY, VALUE = (f"bert.encoder.layer.{{}}.attention.self.{name}" for name in ("query", "value"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.base_folder("bert", tmp_path_factory.mktemp("bert") / "base"))


@pytest.fixture(scope="module")
def seen(base: str) -> dict[str, Statistics]:
    return {name: statistics(bert(base), ALL, seed) for seed, name in enumerate(("one", "two"))}


@pytest.fixture(scope="module")
def earlier(seen: dict[str, Statistics], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    """Adapters of other ranks, targets and sizes; rows of the layers' A's that lie anywhere."""
    folder, found = tmp_path_factory.mktemp("earlier"), {}
    scale: Scale
    for name, rank, targets, scale in (("first", 3, ["query"], "unit"), ("second", 2, ["query", "value"], "response")):
        lora = LoraConfig(r=rank, lora_alpha=6, target_modules=targets)
        initialise(folder / name, None, seen, lora, StartOptions(rule="random", scale=scale), seed=rank)
        found[name] = read_adapter(folder / name)
    return found


def overlap(A: torch.Tensor, rows: torch.Tensor) -> float:
    """The largest cosine between a row of A and one of `rows`."""
    one, two = (x.double() / x.double().norm(dim=1, keepdim=True) for x in (A, rows))
    return float((one @ two.T).abs().max())


@pytest.mark.parametrize("names", [("one",), ("one", "two")])
@pytest.mark.parametrize("rule", ["apart", "random"])
def test_without_own_the_response_is_that_of_the_others(
    seen: dict[str, Statistics], names: tuple[str, ...], rule: str, tmp_path: Path
) -> None:
    """|A H^T|^2 over the rows of all others is what PEFT's A, of variance 1 / 3n, is expected to give them."""
    others = {name: seen[name] for name in names}
    lora = LoraConfig(r=2, target_modules=ALL)
    done = initialise(tmp_path / "start", None, others, lora, StartOptions(rule=rule, scale="response"))
    for module, A in done.A.items():
        gram = torch.stack([one.moment(module).as_gram() for one in others.values()]).sum(0)
        response = float(torch.trace(A.double() @ gram @ A.double().T))
        assert response == pytest.approx(2 * float(gram.trace()) / (3 * WIDTH), rel=1e-5)


def test_without_own_base_and_layers_are_those_of_the_others(
    base: str, seen: dict[str, Statistics], tmp_path: Path
) -> None:
    options = StartOptions(rule="apart", keep="projected", scale="unit")
    done = initialise(tmp_path / "start", None, seen, None, options)
    assert done.A.keys() == seen["one"].layers.keys()
    assert all(A.shape == (8, WIDTH) for A in done.A.values())
    noted = json.loads((tmp_path / "start" / "loraloom.json").read_text())
    assert (noted["own"], noted["after"]) == (None, [])
    assert (noted["base"], noted["base_fingerprint"]) == (seen["one"].base, seen["one"].fingerprint)
    assert {name: facts["texts"] for name, facts in noted["others"].items()} == {"one": 4, "two": 4}
    config = json.loads((tmp_path / "start" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == seen["one"].base
    loaded = PeftModel.from_pretrained(bert(base), str(tmp_path / "start"))
    assert all(torch.equal(A, done.A[module]) for module, A in factors(loaded).items())
    in_place = get_peft_model(bert(base), LoraConfig(r=8, target_modules=ALL))
    initialise(in_place, None, seen, None, options)
    assert all(torch.equal(A, done.A[module]) for module, A in factors(in_place).items())


@pytest.mark.parametrize(("rule", "keep"), [("apart", "free"), ("apart", "projected")])
@pytest.mark.parametrize("with_own", [True, False])
def test_off_the_rows_of_earlier_adapters_in_every_layer(
    base: str,
    seen: dict[str, Statistics],
    earlier: dict[str, Adapter],
    rule: str,
    keep: Any,
    with_own: bool,
    tmp_path: Path,
) -> None:
    own = statistics(bert(base), ALL, 9) if with_own else None
    options = StartOptions(rule=rule, keep=keep, scale="response")
    lora = LoraConfig(r=4, target_modules=ALL)
    done = initialise(tmp_path / "start", own, seen, lora, options, after=earlier)
    alone = initialise(tmp_path / "alone", own, seen, lora, options)
    assert json.loads((tmp_path / "start" / "loraloom.json").read_text())["after"] == ["first", "second"]
    for module, A in done.A.items():
        loud = loud_directions([one.moment(module) for one in seen.values()], 0.5)
        assert overlap(A, loud.T) < 1e-6
        there = [adapter.updates[module].A for adapter in earlier.values() if module in adapter.updates]
        assert len(there) == (2 if "query" in module else 1 if "value" in module else 0)
        assert done.subspaces[module].avoid.shape[1] == loud.shape[1] + sum(map(len, there))
        for rows in there:
            assert overlap(A, rows) < 1e-6
            assert overlap(alone.A[module], rows) > 1e-2  # it is `after` that keeps it off
        if not there:
            assert torch.equal(A, alone.A[module])


def test_an_adapter_named_twice_changes_nothing(
    seen: dict[str, Statistics], earlier: dict[str, Adapter], tmp_path: Path
) -> None:
    options = StartOptions(rule="apart", keep="projected", scale="unit")
    lora = LoraConfig(r=4, target_modules=["query"])
    once = initialise(tmp_path / "a", seen["one"], seen, lora, options, after=earlier)
    again = {**earlier, "again": earlier["first"]}
    twice = initialise(tmp_path / "b", seen["one"], seen, lora, options, after=again)
    for module, A in once.A.items():
        assert twice.subspaces[module].avoid.shape == once.subspaces[module].avoid.shape
        assert (twice.A[module] - A).abs().max() < 1e-5


@pytest.mark.parametrize("from_folder", [False, True])
def test_training_stays_off_earlier_adapters(
    base: str, seen: dict[str, Statistics], earlier: dict[str, Adapter], from_folder: bool, tmp_path: Path
) -> None:
    options = StartOptions(rule="apart", keep="projected", scale="response")
    lora = LoraConfig(r=2, target_modules=["query", "value"])
    if from_folder:
        initialise(tmp_path / "start", None, seen, lora, options, after=earlier)
        model = PeftModel.from_pretrained(bert(base), str(tmp_path / "start"), is_trainable=True)
        callback = keep_callback(tmp_path / "start")
    else:
        model = get_peft_model(bert(base), lora)
        callback = initialise(model, None, seen, None, options, after=earlier).callback()
    before = factors(model)
    classifier_trainer(model, tmp_path / "out", [callback]).train()
    after = factors(model)
    assert len(after) == 4
    for module, A in after.items():
        assert (A - before[module]).norm() > 0.05 * A.norm()
        for adapter in earlier.values():
            if module in adapter.updates:
                assert overlap(A, adapter.updates[module].A) < 1e-6


def adapter_of(modules: list[str], width: int, rank: int = 2) -> Adapter:
    generator = torch.Generator().manual_seed(width)
    return Adapter(
        {name: Update(torch.zeros(WIDTH, rank), torch.randn(rank, width, generator=generator)) for name in modules}, {}
    )


def test_all_that_does_not_fit_is_told_at_once(base: str, seen: dict[str, Statistics], tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["query"])
    others = {**seen, "strange": Statistics(**{**vars(seen["one"]), "fingerprint": "f" * 64})}
    after = {
        "wide": adapter_of([QUERY.format(0), VALUE.format(1)], 20),
        "elsewhere": adapter_of(["pooler.dense"], WIDTH),
        "fine": adapter_of([QUERY.format(1), "pooler.dense"], WIDTH),
    }
    with pytest.raises(LoraloomError) as told:
        initialise(tmp_path / "start", None, others, lora, after=after)
    lines = str(told.value).splitlines()
    assert lines[0].startswith("cannot initialise: 4 problems")
    for line, part in zip(lines[1:5], ("'strange' come from", "'wide'", "'wide'", "'elsewhere'"), strict=True):
        assert part in line
    assert f"{QUERY.format(0)} reads 20 features, in the statistics 16" in lines[2]
    assert "the statistics cover none of its layers" in lines[4]
    assert not (tmp_path / "start").exists()


@pytest.mark.parametrize(("rule", "keep"), [("apart", "free"), ("apart", "projected")])
def test_no_room_beside_earlier_adapters(seen: dict[str, Statistics], rule: str, keep: Any, tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["query"])
    after = {"large": adapter_of([QUERY.format(1)], WIDTH, rank=15)}
    with pytest.raises(LoraloomError, match=r"leave [01] of 16, too few for rank 2") as told:
        initialise(tmp_path / "start", None, seen, lora, StartOptions(rule=rule, keep=keep), after=after)
    assert "fewer adapters" in (told.value.hint or "")
    assert not (tmp_path / "start").exists()


def test_nothing_to_stay_off_is_refused(
    seen: dict[str, Statistics], earlier: dict[str, Adapter], tmp_path: Path
) -> None:
    lora = LoraConfig(r=2, target_modules=["query"])
    for own in (None, seen["one"]):
        with pytest.raises(LoraloomError, match="neither of other tasks nor an atlas"):
            initialise(tmp_path / "start", own, {}, lora, after=earlier)
    assert not (tmp_path / "start").exists()


def test_a_rule_that_would_not_stay_off_earlier_adapters_is_refused(
    seen: dict[str, Statistics], tmp_path: Path
) -> None:
    after = {"first": adapter_of([QUERY.format(1)], WIDTH, rank=2)}
    with pytest.raises(LoraloomError, match="rule 'osrm' does not stay off earlier adapters"):
        initialise(tmp_path / "start", None, seen, LoraConfig(r=2), StartOptions(rule="osrm"), after=after)
