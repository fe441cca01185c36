"""Adapters of different layers: their union, their intersection, or a refusal; what is told of each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from commands import call, refused, said
from loraloom.adapters.peft import read_adapter, write_adapter
from loraloom.adapters.update import Adapter, Update
from loraloom.errors import LoraloomError
from loraloom.merging import get_rule, merge, rule_names, write_merged
from loraloom.statistics.file import Layer, Statistics
from loraloom.statistics.moments import Moment

M, N = 6, 5


def adapter(seed: int, layers: list[str], rank: int = 2, **facts) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    updates = {
        name: Update(torch.randn(M, rank, generator=generator), torch.randn(rank, N, generator=generator))
        for name in layers
    }
    config = {"peft_type": "LORA", "base_model_name_or_path": "some/base", "target_modules": list(layers)}
    return Adapter(updates, config, **facts)


def wide() -> Adapter:
    return adapter(0, ["layer.0.q", "layer.0.v", "layer.1.q"])


def narrow() -> Adapter:
    return adapter(1, ["layer.0.q", "layer.1.k"], rank=1)


UNION = ["layer.0.q", "layer.0.v", "layer.1.k", "layer.1.q"]


def test_a_layer_of_one_adapter_is_that_adapters_own() -> None:
    one, two = wide(), narrow()
    merged = merge({"one": one, "two": two}, "task_arithmetic")
    assert merged.plan.modules == UNION
    for member, layer in ((one, "layer.0.v"), (two, "layer.1.k")):
        expected = 0.3 * member.updates[layer].B @ member.updates[layer].A
        torch.testing.assert_close(merged.merged[layer].update.dense(), expected)
        assert merged.merged[layer].update.rank == member.rank
    halved = merge({"one": one, "two": two}, "weighted").merged["layer.0.v"].update
    torch.testing.assert_close(halved.dense(), 0.5 * one.updates["layer.0.v"].dense())
    tsv = merge({"one": one, "two": two}, "tsv").merged["layer.0.v"].update
    torch.testing.assert_close(tsv.dense(), 0.75 * one.updates["layer.0.v"].dense())


def test_an_intersection_merges_the_shared_layers_and_tells_what_is_lost() -> None:
    one, two = wide(), narrow()
    merged = merge({"one": one, "two": two}, "task_arithmetic", targets="intersection")
    assert merged.plan.modules == ["layer.0.q"]
    assert merged.plan.config["target_modules"] == ["layer.0.q"]
    both = merge(
        {name: adapter_of(member, ["layer.0.q"]) for name, member in (("one", one), ("two", two))}, "task_arithmetic"
    )
    assert torch.equal(merged.merged["layer.0.q"].update.dense(), both.merged["layer.0.q"].update.dense())
    told = []
    for name, member, count in (("one", one, 2), ("two", two, 1)):
        energies = {layer: float(update.dense().double().square().sum()) for layer, update in member.updates.items()}
        share = 1 - energies["layer.0.q"] / sum(energies.values())
        told.append(
            f"{name}: {count} of its {len(energies)} layers are dropped, with {100 * share:.3g} % of its energy"
        )
    assert merged.plan.warnings == told


def adapter_of(member: Adapter, layers: list[str]) -> Adapter:
    return Adapter({layer: member.updates[layer] for layer in layers}, member.config)


def test_what_cannot_be_is_refused_in_words() -> None:
    pair = {"one": wide(), "two": adapter(1, ["layer.1.k"])}
    with pytest.raises(LoraloomError, match="no layer is adapted by all of them: take the union"):
        merge(pair, targets="intersection")
    with pytest.raises(LoraloomError, match=r"adapter adapts layer\.0\.q, layer\.0\.v, layer\.1\.q; adapter does not"):
        merge(pair, targets="same")
    with pytest.raises(LoraloomError, match="targets 'unoin' is unknown: did you mean 'union'"):
        merge(pair, targets="unoin")


def test_layers_of_two_classes_of_model_are_no_union() -> None:
    """Names that the base cannot have both of: of a model with a head, and of the backbone in it."""
    inner = adapter(0, ["layers.0.q", "layers.1.q"])
    for other in (["model.layers.0.v"], ["model.layers.0.q", "lm_head"], ["model.layers.0.q", "model.layers.1.q"]):
        for targets in ("union", "intersection", "same"):
            for pair in ([inner, adapter(1, other)], [adapter(1, other), inner]):
                with pytest.raises(LoraloomError, match=r"under 'model\.': they were trained in two classes of model"):
                    merge(pair, targets=targets)
    both = adapter(2, ["layers.0.q", "model.layers.0.q"])  # a base that has both tells so itself
    assert len(merge([inner, both]).plan.modules) == 3


def test_an_adapter_of_weight_0_brings_no_layers() -> None:
    merged = merge({"one": wide(), "two": narrow(), "none": adapter(2, ["layer.9.q"])}, "ties", weights=[1, 1, 0])
    assert merged.plan.modules == UNION
    assert "layer.9.q" not in merged.plan.config["target_modules"]


def test_one_base_may_have_other_fingerprints_over_other_layers(tmp_path: Path) -> None:
    """A fingerprint is of the adapted layers' weights."""
    merged = merge({"one": adapter(0, UNION, fingerprint="f1"), "two": adapter(1, UNION[:2], fingerprint="f2")})
    folder = write_merged(merged, tmp_path / "merged")
    assert json.loads((folder / "loraloom.json").read_text())["base_fingerprint"] == ""
    with pytest.raises(LoraloomError, match="base model"):
        merge({"one": adapter(0, UNION, fingerprint="f1"), "two": adapter(1, UNION, fingerprint="f2")})


@pytest.mark.parametrize("rule", [name for name in rule_names() if not get_rule(name).whole])
def test_untrained_adapters_with_a_layer_that_one_lacks_are_zero(rule: str) -> None:
    zeros = {name: Update(torch.zeros(M, 2), torch.ones(2, N)) for name in UNION}
    pair = {"one": Adapter({"layer.0.q": zeros["layer.0.q"]}, wide().config), "two": Adapter(zeros, wide().config)}
    seen = {name: statistics(UNION) for name in pair}
    merged = merge(pair, rule, statistics=seen)
    for name, layer in merged.merged.items():
        assert layer.update.rank >= 1, name
        assert torch.equal(layer.update.dense(), torch.zeros(M, N))


# statistics


def statistics(layers: list[str], seed: int = 0, fingerprint: str = "") -> Statistics:
    generator = torch.Generator().manual_seed(seed)
    moments = {name: Moment.of_rows(torch.randn(9, N, generator=generator)) for name in layers}
    return Statistics(
        "some/base", fingerprint, moments, {name: Layer(name, N, M) for name in layers}, texts=9, tokens=9, kind="token"
    )


def test_a_task_has_a_say_in_a_layer_that_its_adapter_lacks_where_it_was_looked_at() -> None:
    pair = {"one": wide(), "two": narrow()}
    known = {"one": statistics(UNION, 1), "two": statistics(UNION, 2)}
    G = []
    for seen in known.values():
        whole = seen.moment("layer.0.v").as_gram() / 9
        diagonal = whole.diagonal()
        G.append(0.9 * whole + torch.diag(0.1 * diagonal + 1e-6 * diagonal.mean()))
    dW = pair["one"].updates["layer.0.v"].dense().double()
    found = merge(pair, "regmean", statistics=known)
    torch.testing.assert_close(
        found.merged["layer.0.v"].update.dense().double(),
        dW @ G[0] @ torch.linalg.inv(G[0] + G[1]),
        rtol=1e-4,
        atol=1e-5,
    )
    assert found.plan.warnings == []
    own = {"one": statistics(wide_layers := list(pair["one"].updates), 1), "two": statistics(list(pair["two"].updates))}
    alone = merge(pair, "regmean", statistics=own)
    torch.testing.assert_close(alone.merged["layer.0.v"].update.dense().double(), dW, rtol=1e-4, atol=1e-5)
    assert alone.plan.warnings == [
        "one: its statistics lack 1 of the layers, which it does not adapt: there it has no say",
        "two: its statistics lack 2 of the layers, which it does not adapt: there it has no say",
    ]
    assert merge(pair, "ties", statistics=own).plan.warnings == []
    with pytest.raises(LoraloomError, match=r"'one': the statistics lack 1 of its layers, layer\.0\.v first"):
        merge(pair, "regmean", statistics={**own, "one": statistics([n for n in wide_layers if n != "layer.0.v"])})


def test_statistics_of_more_layers_have_a_fingerprint_of_their_own() -> None:
    one = adapter(0, UNION[:2], fingerprint="of two")
    known = {"one": statistics(UNION, fingerprint="of four"), "two": statistics(UNION, fingerprint="of four")}
    assert merge({"one": one, "two": adapter(1, UNION)}, "regmean", statistics=known).plan.modules == UNION


# the command


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    pair = {"sales": wide(), "support": narrow()}
    return [write_adapter(member, tmp_path / name, provenance={}) for name, member in pair.items()]


def test_the_command_tells_who_adapts_what(folders: list[Path], tmp_path: Path) -> None:
    told = call("merge", *folders, "-o", tmp_path / "merged").output
    assert "4: sales adapts 3 of them, support adapts 2 of them" in " ".join(told.split())
    dry = said("merge", *folders, "-o", tmp_path / "dry", "--dry-run")
    assert [(one["layers"], one["lacks"]) for one in dry["inputs"]] == [(3, 1), (2, 2)]
    assert dry["targets"] == "union"
    assert "layers: 4: sales adapts 3 of them" in (tmp_path / "merged" / "README.md").read_text()
    assert sorted(read_adapter(tmp_path / "merged").shapes) == UNION
    alone = call("merge", folders[0], "--rule", "ties", "-o", tmp_path / "alone").output
    assert "ties, left out: there is nothing to merge" in alone
    alone = call("merge", folders[0], "--rule", "ties", "--density", "0.5", "-o", tmp_path / "half").output
    assert "ties --density 0.5 --divisor count --space full" in alone
    said("merge", *folders, "-o", tmp_path / "shared", "--targets", "intersection")
    assert list(read_adapter(tmp_path / "shared").shapes) == ["layer.0.q"]
    assert "adapts layer.0.v" in refused("merge", *folders, "-o", tmp_path / "same", "--targets", "same")
