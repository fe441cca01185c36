"""`merge` and `write_merged`: messages, defaults, what becomes of configs and heads, what is written."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

from commands import hints
from loraloom.adapters.peft import WEIGHTS, adapter_sha256, read_adapter, write_adapter
from loraloom.adapters.stored import StoredUpdates
from loraloom.adapters.together import equal_adapters
from loraloom.adapters.update import Adapter, Update
from loraloom.errors import LoraloomError
from loraloom.merging import get_rule, merge, rule_names, write_merged
from loraloom.merging.facts import MergedFacts

CONFIG = {"peft_type": "LORA", "base_model_name_or_path": "some/base", "target_modules": ["q", "v"]}


def adapter(seed: int, rank: int = 2, **facts) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    updates = {
        name: Update(torch.randn(6, rank, generator=generator), torch.randn(rank, 5, generator=generator))
        for name in ("layer.0.q", "layer.0.v")
    }
    return Adapter(updates, **{"config": CONFIG, **facts})


def test_all_problems_are_told_at_once() -> None:
    other = adapter(1, config={**CONFIG, "base_model_name_or_path": "other/base"})
    with pytest.raises(LoraloomError) as caught:
        merge(
            {"a/b": adapter(0), "two": other, "TWO": adapter(2)},
            "ties",
            weights=[1.0, math.nan],
            scale=math.inf,
            rank=0,
            density=3,
            densty=0.1,
        )
    for part in (
        "'a/b' cannot name a file",
        "several inputs are called 'two'",
        "base model: adapter has 'some/base', adapter has 'other/base'",
        "2 weights for 3 adapters",
        "weight nan is not finite",
        "scale inf is not finite",
        "rank 0 is below 1",
        "no option 'densty': did you mean 'density'?",
        "option 'density': Input should be less than or equal to 1, not 3",
        "9 problems",
    ):
        assert part in str(caught.value)


def test_an_unknown_rule_is_told_with_the_rest() -> None:
    with pytest.raises(LoraloomError, match=r"1 weights for 2 adapters") as caught:
        merge([adapter(0), adapter(1)], "tis", weights=[1.0])
    assert "did you mean 'ties'" in str(caught.value)


def test_unknown_ways_with_heads_and_heads_without_a_mean_are_told() -> None:
    with pytest.raises(LoraloomError, match="heads 'averag' is unknown: did you mean 'average'"):
        merge([adapter(0)], "ties", heads="averag")
    with pytest.raises(LoraloomError, match="the weights add up to 0"):
        merge([adapter(0), adapter(1)], "ties", heads="average", weights=[1.0, -1.0])


def test_no_adapters() -> None:
    with pytest.raises(LoraloomError, match="no adapters"):
        merge([], "ties")


def test_folders_of_one_name_are_told_apart_by_their_parents(tmp_path) -> None:
    pair = [adapter(i, path=Path(f"/runs/{i}/adapter")) for i in range(2)]
    assert list(merge(pair, "ties").plan.members) == ["0-adapter", "1-adapter"]
    assert merge({"one": pair[0], "two": pair[1]}, "ties").plan.members == {"one": pair[0], "two": pair[1]}


@pytest.mark.parametrize(
    ("rule", "weight", "scale"), [("task_arithmetic", 1, 0.3), ("weighted", 0.5, 1), ("svd", 0.5, 1), ("tsv", 1, 0.75)]
)
def test_defaults_in_force_are_recorded(rule, weight, scale) -> None:
    merged = merge({"one": adapter(0), "two": adapter(1)}, rule)
    assert merged.plan.weights == {"one": weight, "two": weight}
    assert merged.plan.scale == scale
    assert merged.plan.space == "full"


def test_whose_the_scale_is_is_recorded() -> None:
    pair = [adapter(0), adapter(1)]
    for merged, scale, whose in (
        (merge(pair, "tsv"), 0.75, "rule"),
        (merge(pair, "tsv", scale=0.75), 0.75, "asked"),
        (merge(pair[:1], "tsv"), 1.0, "single adapter"),
        (merge(pair, "tsv", weights=[0.0, 1.0]), 1.0, "single adapter"),
        (merge(pair[:1], "tsv", scale=0.5), 0.5, "asked"),
    ):
        assert (merged.plan.scale, merged.plan.scale_from) == (scale, whose)


def test_one_adapter_comes_back_as_itself_by_default() -> None:
    one = adapter(0)
    merged = merge([one])
    for name, update in merged.adapter.updates.items():
        torch.testing.assert_close(update.dense(), one.updates[name].dense())
    told = "one adapter takes part: there is nothing to merge"
    assert merged.plan.warnings == [f"{told}, and it stays as it is, without rule 'tsv'"]
    assert merge([one], "ties", density=0.5).plan.warnings == [told]
    assert merge([one, adapter(1)]).plan.warnings == []


def test_space_and_options_are_recorded() -> None:
    merged = merge([adapter(0), adapter(1)], "ties", space="core")
    assert (merged.plan.space, merged.plan.options) == ("core", {"density": 0.2, "divisor": "count", "space": "core"})
    assert list(merged.plan.members) == ["adapter1", "adapter2"]


def test_task_arithmetic_by_hand() -> None:
    one, two = adapter(0, rank=2), adapter(1, rank=3)
    merged = merge([one, two], "task_arithmetic", weights=[2.0, -1.0], scale=0.5)
    for name, update in merged.adapter.updates.items():
        expected = 0.5 * (2 * one.updates[name].dense() - two.updates[name].dense())
        torch.testing.assert_close(update.dense(), expected)
        assert update.rank == 5


def test_config_without_head_and_with_targets_that_hold_for_all() -> None:
    config = {**CONFIG, "modules_to_save": ["classifier"]}
    turned = {**CONFIG, "target_modules": ["v", "q"]}
    listed = {**CONFIG, "target_modules": "all-linear"}
    same = merge([adapter(0, config=config), adapter(1, config=turned)], "ties").adapter.config
    assert same == {**CONFIG, "bias": "none"}
    config["exclude_modules"] = ["layer.1.q"]
    other = merge([adapter(0, config=config), adapter(1, config=listed)], "ties").adapter.config
    assert other == {**CONFIG, "bias": "none", "target_modules": ["layer.0.q", "layer.0.v"]}


def test_dtype_is_the_widest_of_the_inputs() -> None:
    half, bfloat = adapter(0, dtype=torch.float16), adapter(1, dtype=torch.bfloat16)
    assert merge([half, half], "ties").adapter.dtype == torch.float16
    assert merge([half, bfloat], "ties").adapter.dtype == torch.float32


def test_written_folder_tells_where_it_came_from(tmp_path) -> None:
    for i in range(2):
        head = {"classifier.weight": torch.full((2, 6), float(i)).half()}
        write_adapter(adapter(i, head=head), tmp_path / f"task{i}", provenance={})
    inputs = [read_adapter(tmp_path / f"task{i}") for i in range(2)]
    merged = merge(inputs, "svd", rank=1, seed=5)
    folder = write_merged(merged, tmp_path / "merged", command="loraloom merge")
    facts = json.loads((folder / "loraloom.json").read_text())
    energies = [sum(update.energy() for update in one.updates.values()) for one in inputs]
    assert facts["inputs"] == [
        {
            "name": f"task{i}",
            "task": f"task{i}",
            "folder": f"task{i}",
            "sha256": adapter_sha256(tmp_path / f"task{i}"),
            "rank": 2,
            "alpha": 2.0,
            "targets": ["q", "v"],
            "layers": 2,
            "lacks": 0,
            "energy": pytest.approx(energies[i]),
            "factors": {},
            "factor": 1.0,
            "weight": 0.5,
            "energy_share": pytest.approx(energies[i] / sum(energies)),
            "hub": None,
            "files": {},
        }
        for i in range(2)
    ]
    assert (facts["command"], facts["rule"], facts["seed"], facts["scale"]) == ("loraloom merge", "svd", 5, 1.0)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["layers"]["layer.0.q"] == {
        "rank": 1,
        "energy": pytest.approx(float(merged.adapter.updates["layer.0.q"].dense().square().sum()), rel=1e-5),
        "energy_lost": merged.energy_lost["layer.0.q"],
    }
    assert facts["layers"]["layer.0.q"]["energy_lost"] > 0.05
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nbase_model: some/base\nlibrary_name: peft\n")
    shares = [f"{100 * energy / sum(energies):.1f} %" for energy in energies]
    lost = {name: f"{100 * share:.1f} %" for name, share in merged.energy_lost.items()}
    worst = sorted(merged.energy_lost, key=lambda name: -merged.energy_lost[name])
    for part in (
        "2 adapters merged by the rule `svd`",
        *(
            f"| task{i} | 2 | 2 | q, v | {energies[i]:.3g} | 0.5 | {shares[i]} | {facts['inputs'][i]['sha256']} |"
            for i in range(2)
        ),
        "- scale: 1, the rule's own",
        "- output rank: 1, 1 asked for, in 2 layers",
        f"- energy lost: {100 * facts['energy_lost']:.1f} % in total, by truncation; most in "
        + ", ".join(f"{name} {lost[name]}" for name in worst),
        "- heads: task0, task1: one a task, in heads/",
        f"- warning: truncation took {100 * facts['energy_lost']:.0f} % of the energy: ask for a larger rank",
    ):
        assert part in card
    assert str(tmp_path) not in card
    for i in range(2):
        head = load_file(folder / "heads" / f"task{i}.safetensors")
        assert head["classifier.weight"].dtype == torch.float16
        assert float(head["classifier.weight"].mean()) == i
    again = read_adapter(folder)
    assert again.head == {}
    for name, update in merged.adapter.updates.items():
        torch.testing.assert_close(again.updates[name].dense(), update.dense())


def test_a_base_folder_does_not_become_a_hub_name(tmp_path) -> None:
    config = {**CONFIG, "base_model_name_or_path": "/models/base"}
    folder = write_merged(merge([adapter(0, config=config)], "weighted"), tmp_path / "merged")
    assert "/models/base" not in (folder / "README.md").read_text()


@pytest.mark.parametrize("rule", [name for name in rule_names() if get_rule(name).needs in ((), ("seed",))])
def test_adapters_come_back_from_files_as_merged(tmp_path, rule) -> None:
    """Ranks that differ between layers go through rank_pattern."""
    one, two = adapter(0), adapter(1)
    wide = adapter(2, rank=4).updates["layer.0.v"]
    one = Adapter({**one.updates, "layer.0.v": wide}, CONFIG)
    merged = merge([one, two], rule)
    again = read_adapter(write_merged(merged, tmp_path / "merged"))
    for name, update in merged.adapter.updates.items():
        torch.testing.assert_close(again.updates[name].dense(), update.dense())


RULES = [name for name in rule_names() if get_rule(name).needs in ((), ("seed",))]


@pytest.mark.parametrize("rule", RULES)
def test_one_adapter_alone_takes_no_scale_that_makes_room_for_others(rule) -> None:
    one = adapter(0)
    merged = merge([one], rule)
    assert merged.plan.scale == 1.0
    assert merge([one, adapter(1)], rule, weights=[1.0, 0.0]).plan.scale == 1.0
    assert merge([one], rule, weights=[2.0]).plan.scale == 1.0  # whatever its weight, there is nobody to make room for
    assert merge([one], rule, scale=0.5).plan.scale == 0.5
    if rule in ("task_arithmetic", "weighted", "svd", "tsv", "consensus", "emr", "cp"):  # others drop some entries
        for name, update in merged.adapter.updates.items():
            torch.testing.assert_close(update.dense(), one.updates[name].dense(), atol=1e-5, rtol=1e-5)


def test_an_adapter_given_twice_is_refused_or_told(tmp_path) -> None:
    write_adapter(adapter(0), tmp_path / "a", provenance={})
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    write_adapter(adapter(1), tmp_path / "c", provenance={})
    one, copied, other = (read_adapter(tmp_path / name) for name in "abc")
    with pytest.raises(LoraloomError, match=f"{tmp_path}/a is given several times: give it once, with a larger weight"):
        merge([one, read_adapter(tmp_path / "c" / ".." / "a"), other], "weighted")
    folder = write_merged(merge([one, copied, other], "weighted"), tmp_path / "merged")
    assert json.loads((folder / "loraloom.json").read_text())["warnings"] == ["a and b hold the same updates"]
    assert merge([one, other], "weighted").plan.warnings == []


def test_each_of_many_adapters_is_read_once_to_find_copies(tmp_path, monkeypatch) -> None:
    for name in range(9):
        write_adapter(adapter(min(name, 7)), tmp_path / str(name), provenance={})
    read = {str(name): read_adapter(tmp_path / str(name)) for name in range(9)}
    asked: list[str] = []
    stored = StoredUpdates.__getitem__
    monkeypatch.setattr(StoredUpdates, "__getitem__", lambda self, at: asked.append(at) or stored(self, at))
    assert equal_adapters(read) == [("7", "8")]
    assert len(asked) == 9 + 2 * 2


def test_base_names_that_differ_are_settled_by_the_caller() -> None:
    pair = [adapter(i, config={**CONFIG, "base_model_name_or_path": f"org/{name}"}) for i, name in enumerate("xy")]
    with pytest.raises(LoraloomError, match="if they are one, name it by --base, or mend base_model_name_or_path"):
        merge(pair, "weighted")
    assert merge(pair, "weighted", base="org/z").plan.config["base_model_name_or_path"] == "org/z"
    known = [replace(one, fingerprint=f"f{i}") for i, one in enumerate(pair)]
    with pytest.raises(LoraloomError, match="base model"):  # the weights themselves say that they differ
        merge(known, "weighted", base="org/z")


def test_a_base_between_folders_tells_against_every_other() -> None:
    names = ("/srv/base", "org/x", "org/y")
    trio = [adapter(i, config={**CONFIG, "base_model_name_or_path": name}) for i, name in enumerate(names)]
    for order in itertools.permutations(trio):
        with pytest.raises(LoraloomError, match="base model"):
            merge(list(order), "weighted")
    assert merge(trio[:2], "weighted").plan.config["base_model_name_or_path"] == "org/x"


def test_nothing_of_anybodys_disk_is_published(tmp_path) -> None:
    config = {**CONFIG, "base_model_name_or_path": str(tmp_path / "bases" / "mine")}
    for i in range(2):
        write_adapter(adapter(i, config=config), tmp_path / f"a{i}", provenance={})
    merged = merge([read_adapter(tmp_path / f"a{i}") for i in range(2)], "weighted")
    typed = f"loraloom merge {tmp_path}/a0 {tmp_path}/a1 --rule weighted -o {tmp_path}/out"
    folder = write_merged(merged, tmp_path / "out", command=typed)
    for path in folder.iterdir():
        assert str(tmp_path) not in path.read_bytes().decode(errors="replace")
    assert (
        json.loads((folder / "loraloom.json").read_text())["command"] == "loraloom merge a0 a1 --rule weighted -o out"
    )
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "mine"


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(4)), st.sampled_from(RULES))
def test_the_order_of_the_adapters_changes_nothing(tmp_path_factory, order, rule) -> None:
    place = tmp_path_factory.getbasetemp() / "order"
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float16)
    for i, dtype in enumerate(dtypes):
        if not (place / f"a{i}").exists():
            config = {
                **CONFIG,
                "task_type": "CAUSAL_LM" if i else None,
                f"field{i}": i,
                "target_modules": ["qv"[i % 2], "v"],
            }
            head = {"score.weight": torch.full((2, 6), float(i)).to(dtype)}
            write_adapter(adapter(i, config=config, head=head, dtype=dtype), place / f"a{i}", provenance={})
    members = {f"a{i}": read_adapter(place / f"a{i}") for i in range(4)}
    plans = [
        merge({name: members[name] for name in names}, rule, heads="average")
        for names in (list(members), [f"a{i}" for i in order])
    ]
    one, two = (merged.plan for merged in plans)
    assert (one.config, one.dtype, one.left_out, one.forms) == (two.config, two.dtype, two.left_out, two.forms)
    torch.testing.assert_close(one.head, two.head)
    for name, update in plans[0].adapter.updates.items():
        torch.testing.assert_close(update.dense(), plans[1].adapter.updates[name].dense(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_input_replaced_after_it_was_read_is_refused(file: str, tmp_path: Path) -> None:
    """Layers of two files in one result, under the hash of either, would be no merge of anything."""
    for seed, name in enumerate(("one", "two", "other")):
        write_adapter(adapter(seed, 2), tmp_path / name, provenance={})
    merged = merge([read_adapter(tmp_path / name) for name in ("one", "two")], "weighted")
    write_merged(merged, tmp_path / "before")
    os.replace(tmp_path / "other" / file, tmp_path / "one" / file)
    with pytest.raises(LoraloomError, match="it changed while it was used") as caught:
        write_merged(merged, tmp_path / "after")
    assert file in str(caught.value)
    assert not (tmp_path / "after").exists()


def saved(folder: Path, seed: int, *, B: float = 1.0, norm: bool = False, **changes: Any) -> Adapter:
    """Write an adapter that writes text, of rank 2, as PEFT would; `norm`: with a weight that was trained whole."""
    made = torch.Generator().manual_seed(seed)
    factors = {"lora_A": torch.randn(2, 5, generator=made), "lora_B": B * torch.randn(6, 2, generator=made)}
    tensors = {f"base_model.model.layers.0.q.{name}.weight": factor for name, factor in factors.items()}
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    save_file(tensors | ({"base_model.model.norm.weight": torch.ones(5)} if norm else {}), folder / WEIGHTS)
    return read_adapter(folder)


def test_an_adapter_that_changes_nothing_is_told(tmp_path: Path) -> None:
    one, start = saved(tmp_path / "one", 0), saved(tmp_path / "start", 1, B=0.0)
    told = "start changes nothing, every update is 0: was it trained?"
    assert told in MergedFacts.read(write_merged(merge([one, start]), tmp_path / "merged")).warnings
    left_out = merge([one, start], weights=[1.0, 0.0])
    assert told not in MergedFacts.read(write_merged(left_out, tmp_path / "one of them")).warnings
    assert told in hints("inspect", tmp_path / "one", tmp_path / "start")


@pytest.mark.parametrize("changes", [{"r": 8}, {"rank_pattern": {"layers.0.q": 8}}])
def test_ranks_that_are_not_the_configs_are_told_and_divide_alpha(changes: dict[str, Any], tmp_path: Path) -> None:
    true, false = saved(tmp_path / "true", 0), saved(tmp_path / "false", 0, **changes)
    torch.testing.assert_close(false.updates["layers.0.q"].dense(), true.updates["layers.0.q"].dense())
    (told,) = (one for one in merge([true, false]).plan.warnings if "PEFT" in one)
    assert told.startswith("false: factors of rank 2 where its config says 8, in 1 of its 1 layers: PEFT would refuse")


def test_a_rank_pattern_that_is_no_pattern_is_refused_with_its_adapter(tmp_path: Path) -> None:
    with pytest.raises(LoraloomError, match=r"odd: .*rank_pattern: '\[' is no regular expression"):
        saved(tmp_path / "odd", 0, rank_pattern={"[": 2})


def test_weights_that_a_writing_adapter_trained_whole_are_told_and_no_heads_are_aligned(tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        saved(tmp_path / name, seed, norm=True)
    saved(tmp_path / "plain", 2)
    told = "one trained norm.weight whole, beside its LoRA: the result has the base's;"
    said = hints("merge", tmp_path / "one", tmp_path / "two", "-o", tmp_path / "kept")
    assert f"{told} --heads average puts their mean there" in said
    assert "align" not in said
    said = hints("merge", tmp_path / "one", tmp_path / "plain", "-o", tmp_path / "mixed")
    assert f"{told} those of others have nothing to be averaged with" in said
    assert "whole" not in hints("merge", tmp_path / "one", tmp_path / "two", "--heads", "average", "-o", tmp_path / "m")
