"""Merging folders as the command does: all that is wrong at once, statistics by files, what each task reads."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

import tiny
from loraloom.adapters.lowrank import Shared
from loraloom.adapters.peft import WEIGHTS, read_adapter, read_provenance, write_adapter
from loraloom.adapters.update import Adapter, Update
from loraloom.cli.main import app
from loraloom.errors import LoraloomError
from loraloom.merging import MergeOptions, Plan, merge
from loraloom.merging.card import merge_lines
from loraloom.merging.folders import dry_run, estimate, fuse_folders, merge_folders, plan_folders
from loraloom.merging.readout import read_readout
from loraloom.progress import Reporter
from loraloom.statistics.file import Layer, Statistics
from loraloom.statistics.moments import Moment

SHAPES = {"layer.0.q": (6, 5), "layer.0.v": (7, 5), "layer.1.up": (9, 6)}
QUIET = Reporter(quiet=True)


def adapter(seed: int, rank: int, **facts: Any) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    updates = {
        name: Update(torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator))
        for name, (m, n) in SHAPES.items()
    }
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "target_modules": ["q", "v", "up"]}
    return Adapter(updates, config, head={"classifier.weight": torch.full((2, 9), float(seed))}, **facts)


def statistics(seed: int, **changes: Any) -> Statistics:
    generator = torch.Generator().manual_seed(100 + seed)
    moments = {name: Moment.of_rows(torch.randn(20, n, generator=generator)) for name, (_, n) in SHAPES.items()}
    layers = {name: Layer(name, n, m) for name, (m, n) in SHAPES.items()}
    facts: dict[str, Any] = {"base": "org/base", "fingerprint": "", "moments": moments, "layers": layers}
    return Statistics(**{**facts, "texts": 4, "tokens": 20, "kind": "token", **changes})


@pytest.fixture(autouse=True)
def _loud_again() -> Iterator[None]:
    """Commands silence every library in this process; other tests want to hear them."""
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the adapters mood (rank 2), tone (3) and size (1) and the statistics of each."""
    for seed, (name, rank) in enumerate((("mood", 2), ("tone", 3), ("size", 1))):
        write_adapter(adapter(seed, rank), tmp_path / name, provenance={})
        statistics(seed).save(tmp_path / f"{name}.safetensors")
    return tmp_path


def folders(place: Path, *names: str) -> list[Path]:
    return [place / name for name in names or ("mood", "tone", "size")]


def planned(
    folders: list[Path],
    rule: str,
    output: Path,
    options: dict[str, Any],
    statistics: Sequence[Path] = (),
    look: Any = None,
    overwrite: bool = False,
    **settings: Any,
) -> Plan:
    asked = MergeOptions(rule, options, **settings)
    return plan_folders(folders, asked, output, overwrite=overwrite, statistics=statistics, look=look)


def command(*words: str | Path) -> tuple[int, str]:
    """Run `loraloom merge --json`; return its exit code with what it told."""
    result = CliRunner().invoke(app, ["merge", *map(str, words), "--json"], catch_exceptions=False)
    return result.exit_code, result.stdout if result.exit_code == 0 else " ".join(result.stderr.split())


def each(flag: str, *values: float) -> tuple[str, ...]:
    return tuple(word for value in values for word in (flag, str(value)))


def plain(told: str) -> str:
    """Return what a message in a frame says."""
    return " ".join(told.replace("│", " ").split())


def listing(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def assert_same(one: Adapter, two: Adapter) -> None:
    assert one.shapes == two.shapes
    for name, update in one.updates.items():
        torch.testing.assert_close(update.dense(), two.updates[name].dense())


# what is wrong is told at once


def test_faults_of_folders_statistics_output_and_options_come_together(place: Path) -> None:
    (place / "tone" / WEIGHTS).write_bytes(b"x" * 9)
    (place / "mine").mkdir()
    (place / "mine" / "thesis.tex").write_text("x")
    (place / "mood.safetensors").write_bytes(b"")
    before = listing(place)
    with pytest.raises(LoraloomError) as caught:
        planned(
            [*folders(place), place / "gone"],
            "ties",
            place / "mine",
            {"densty": 1},
            statistics=[place / "mood.safetensors", place / "none.safetensors"],
        )
    for part in (
        f"{place / 'tone'}: {WEIGHTS} cannot be read",
        f"{place / 'gone'}: not an adapter folder",
        f"{place / 'mine'}: thesis.tex is not ours and would be lost",
        "mood.safetensors",
        "none.safetensors",
        "no option 'densty': did you mean 'density'?",
    ):
        assert part in str(caught.value)
    assert listing(place) == before


def test_what_the_plan_finds_comes_together(place: Path) -> None:
    with pytest.raises(LoraloomError) as caught:
        planned(
            folders(place), "tiess", place / "out", {}, weights=[1.0], rank=0, statistics=[place / "mood.safetensors"]
        )
    for part in ("1 weights for 3 adapters", "rank 0 is below 1", "1 statistics for 3 adapters", "'ties'"):
        assert part in str(caught.value)
    assert "5 problems" not in str(caught.value)
    assert "4 problems" in str(caught.value)


def test_unknown_options_of_the_command(place: Path) -> None:
    code, told = command(*folders(place), "--rule", "ties", "--densty=1", "--density", "7", "-o", place / "out")
    assert code == 2
    assert "no option 'densty': did you mean 'density'?" in told
    assert "option 'density': Input should be less than or equal to 1, not 7" in told
    code, told = command(*folders(place), "--rule", "ties", "--wieght", "1", "-o", place / "out")
    assert (code, "did you mean '--weight'" in told) == (2, True)
    assert not (place / "out").exists()


def test_the_rule_is_checked_before_a_base_is_loaded(place: Path) -> None:
    def look(rule: Any, members: Any, known: Any) -> Any:
        raise AssertionError("the base model must not be loaded")

    write_adapter(adapter(5, 2), place / "other", provenance={})
    config = json.loads((place / "other" / "adapter_config.json").read_text())
    (place / "other" / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "org/another"})
    )
    with pytest.raises(LoraloomError, match="2 problems") as caught:
        planned(folders(place, "mood", "other"), "regmean", place / "out", {"shrnk": 1}, look=look)
    assert "has 'org/another'" in str(caught.value)
    assert "did you mean 'shrink'" in str(caught.value)


# statistics


def dense_regmean(members: list[Adapter], seen: list[Statistics], shrink: float, name: str) -> torch.Tensor:
    """sum_i dW_i G_i (sum_i G_i)^-1 in float64, off-diagonals of the mean Gram matrices times `shrink`."""
    left, total = 0.0, 0.0
    for member, one in zip(members, seen, strict=True):
        G = one.moment(name).as_gram().double() / one.moment(name).count
        G = shrink * G + (1 - shrink) * torch.diag(G.diagonal())
        update = member.updates[name]
        left, total = left + update.B.double() @ update.A.double() @ G, total + G
    return left @ torch.linalg.inv(total)


def test_statistics_are_read_from_files_in_the_order_of_the_adapters(place: Path) -> None:
    names = ["tone", "mood", "size"]
    plan = planned(
        folders(place, *names),
        "regmean",
        place / "out",
        {"shrink": 0.7},
        statistics=[place / f"{name}.safetensors" for name in names],
    )
    told = merge_folders(plan, place / "out", "loraloom merge", QUIET)
    seeds = {"mood": 0, "tone": 1, "size": 2}
    seen = [statistics(seeds[name]) for name in names]
    members = [read_adapter(place / name) for name in names]
    for name, update in read_adapter(place / "out").updates.items():
        expected = dense_regmean(members, seen, 0.7, name)
        assert (update.dense() - expected).norm() < 1e-5 * expected.norm()
        mixed = dense_regmean(members, seen[::-1], 0.7, name)
        assert (update.dense() - mixed).norm() > 1e-2 * mixed.norm()
    assert (told.rule, told.output_rank) == ("regmean", 6)


def test_the_command_takes_statistics_in_order(place: Path) -> None:
    seen = [word for name in ("mood", "tone") for word in ("--statistics", place / f"{name}.safetensors")]
    code, _ = command(*folders(place, "mood", "tone"), "--rule", "regmean", *seen, "-o", place / "out")
    assert code == 0
    members = {name: read_adapter(place / name) for name in ("mood", "tone")}
    expected = merge(members, "regmean", statistics={"mood": statistics(0), "tone": statistics(1)})
    assert_same(read_adapter(place / "out"), expected.adapter)


def test_missing_and_misfit_statistics_are_told(place: Path) -> None:
    with pytest.raises(LoraloomError, match="needs statistics of each task's inputs: see `loraloom statistics`"):
        planned(folders(place), "regmean", place / "out", {})
    whole = statistics(1)
    few = ("layer.0.q", "layer.0.v")
    narrow = {"layers": {name: whole.layers[name] for name in few}, "moments": {n: whole.moments[n] for n in few}}
    statistics(1, **narrow).save(place / "narrow.safetensors")
    odd = {"layers": {**whole.layers, "layer.0.q": Layer("layer.1.up", 6, 6)}, "moments": dict(whole.moments)}
    del odd["moments"]["layer.0.q"]
    statistics(2, **odd).save(place / "odd.safetensors")
    files = [place / f"{name}.safetensors" for name in ("mood", "narrow", "odd")]
    with pytest.raises(LoraloomError, match="2 problems") as caught:
        planned(folders(place), "regmean", place / "out", {}, statistics=files)
    assert "'tone': the statistics lack 1 of its layers, layer.1.up first" in str(caught.value)
    assert "'size': layer.0.q reads 5 features, in the statistics 6" in str(caught.value)


def test_statistics_of_another_base_are_told(place: Path) -> None:
    write_adapter(adapter(0, 2), place / "marked", provenance={"base_fingerprint": "f1"})
    statistics(0, fingerprint="f2", base="org/another").save(place / "mood.safetensors", overwrite=True)
    with pytest.raises(LoraloomError, match="'marked': the statistics are of another base model, org/another"):
        planned([place / "marked"], "regmean", place / "out", {}, statistics=[place / "mood.safetensors"])


# the result


def test_folders_merge_as_adapters_do(place: Path) -> None:
    settings: dict[str, Any] = {"weights": [0.5, -1.0, 2.0], "scale": 0.3, "rank": 4, "seed": 7}
    members = {name: read_adapter(place / name) for name in ("mood", "tone", "size")}
    expected = merge(members, "dare", density=0.6, **settings)
    plan = planned(folders(place), "dare", place / "out", {"density": 0.6}, **settings)
    told = merge_folders(plan, place / "out", "loraloom merge it", QUIET)
    assert_same(read_adapter(place / "out"), expected.adapter)
    facts = read_provenance(place / "out")
    assert facts["command"] == "loraloom merge it"
    assert [one["weight"] for one in facts["inputs"]] == settings["weights"]
    lost = {name: layer["energy_lost"] for name, layer in facts["layers"].items()}
    assert lost == expected.energy_lost
    whole = {name: layer["energy"] / (1 - lost[name]) for name, layer in facts["layers"].items()}
    in_total = sum(lost[name] * whole[name] for name in lost) / sum(whole.values())
    assert in_total > 0.01
    assert told.energy_lost == pytest.approx(in_total)
    assert {name: (layer.rank, layer.energy_lost) for name, layer in told.layers.items()} == {
        name: (4, share) for name, share in lost.items()
    }
    assert (told.rule, told.options, told.space) == ("dare", {"density": 0.6, "space": "full"}, "full")
    assert (told.scale, told.scale_from, told.rank, told.output_rank, told.seed) == (0.3, "asked", 4, 4, 7)
    assert told.heads == ["mood", "size", "tone"]
    energies = [
        weight**2 * sum(float(dense64(update).square().sum()) for update in members[name].updates.values())
        for name, weight in zip(members, settings["weights"], strict=True)
    ]
    for one, energy, rank in zip(told.inputs, energies, (2, 3, 1), strict=True):
        assert (one.rank, one.targets) == (rank, ["q", "up", "v"])
        assert one.energy_share == pytest.approx(energy / sum(energies))
    assert json.loads(json.dumps(asdict(told))) == facts


def test_weights_of_the_command(place: Path) -> None:
    words = (*folders(place), "--rule", "task_arithmetic", *each("--weight", 0.5, -1, 2), "--scale", "1")
    code, told = command(*words, "-o", place / "out")
    assert (code, json.loads(told)["output_rank"]) == (0, 6)
    members = [read_adapter(place / name) for name in ("mood", "tone", "size")]
    for name, update in read_adapter(place / "out").updates.items():
        parts = [w * member.updates[name].dense() for w, member in zip((0.5, -1, 2), members, strict=True)]
        torch.testing.assert_close(update.dense(), sum(parts), atol=1e-5, rtol=1e-5)
    code, told = command(*words[:-2], "--heads", "average", "-o", place / "averaged")
    assert (code, json.loads(told)["heads_averaged"]) == (0, True)
    head = load_file(place / "averaged" / WEIGHTS)["base_model.model.classifier.weight"]
    torch.testing.assert_close(head, torch.full((2, 9), (0.5 * 0 - 1 * 1 + 2 * 2) / 1.5))
    former = (*folders(place), "--rule", "task_arithmetic", "--scale", "1", "--weights", "0.5,-1, 2")  # in old scripts
    assert command(*former, "-o", place / "former")[0] == 0
    assert (place / "former" / WEIGHTS).read_bytes() == (place / "out" / WEIGHTS).read_bytes()
    code, told = command(*folders(place), "--rule", "ties", "--weight", "1,2,3", "-o", place / "x")
    assert (code, "did you mean --weight 1 --weight 2 --weight 3?" in plain(told)) == (2, True)
    code, told = command(*folders(place), "--rule", "ties", "--weight", "much", "-o", place / "x")
    assert (code, "'much' is not a number" in plain(told)) == (2, True)
    assert not (place / "x").exists()


def test_an_earlier_result_is_replaced_when_asked_for_and_nothing_else_is(place: Path) -> None:
    out = place / "out"
    merge_folders(planned(folders(place), "tsv", out, {}), out, "", QUIET)
    for overwrite, rule, message in (
        (False, "ties", "holds an earlier result"),
        (True, "task_arithmetic", ""),
        (True, "ties", "NOTES.md is not ours"),
    ):
        if message:
            with pytest.raises(LoraloomError, match=message):
                planned(folders(place), rule, out, {}, overwrite=overwrite)
            continue
        plan = planned(folders(place), rule, out, {}, overwrite=overwrite)
        merge_folders(plan, out, "", QUIET, overwrite=overwrite)
        (out / "NOTES.md").write_text("mine")
    assert read_provenance(out)["rule"] == "task_arithmetic"
    assert not list(place.glob(".*.part"))


def test_an_input_is_no_place_for_the_result(place: Path) -> None:
    """Whatever the input is: the trained adapter that somebody means to merge, or an earlier merge."""
    merge_folders(planned(folders(place), "tsv", place / "merged", {}), place / "merged", "", QUIET)
    given = [place / "merged", *folders(place)]
    before = listing(place)
    for out, told in (
        (place / "merged", "is an input"),
        (place / "tone", "is an input"),
        (place / "tone" / "merged", "lies inside the input"),
        (place, "holds the input"),
    ):
        with pytest.raises(LoraloomError, match=told):
            planned(given, "tsv", out, {}, overwrite=True)
    assert listing(place) == before


# dry run


def test_a_dry_run_tells_ranks_and_sizes_and_writes_nothing(place: Path) -> None:
    before = listing(place)
    plan = planned(folders(place), "task_arithmetic", place / "out", {}, weights=[1, 0.25, 1])
    told = dry_run(plan, place / "out", None)
    assert listing(place) == before
    assert [(one.name, one.rank, one.weight) for one in told.inputs] == [
        ("mood", 2, 1),
        ("tone", 3, 0.25),
        ("size", 1, 1),
    ]
    assert (told.rule, told.options, told.space) == ("task_arithmetic", {}, "full")
    assert (told.scale, told.scale_from, told.seed, told.output_rank) == (0.3, "rule", 0, 6)
    assert told.heads == ["mood", "size", "tone"]
    assert [one.weight**2 * one.energy for one in told.inputs] == pytest.approx(
        [one.energy_share * sum(each.weight**2 * each.energy for each in told.inputs) for one in told.inputs]
    )
    assert {one.sha256 for one in told.inputs} == {None}
    assert told.seconds is not None
    assert 0 < told.seconds < 5


@pytest.mark.parametrize(
    ("rule", "rank", "expected"), [("task_arithmetic", None, 40), ("tsv", 24, 24), ("cp", None, 24), ("ties", 999, 40)]
)
def test_a_dry_run_tells_the_size_that_is_written(rule: str, rank: int | None, expected: int, tmp_path: Path) -> None:
    """40 = 24 + 16 is the most that these two can give, whatever rank is asked for."""
    generator = torch.Generator().manual_seed(0)
    for name, r in (("one", 24), ("two", 16)):
        updates = {
            f"layer.{i}.q": Update(torch.randn(2000, r, generator=generator), torch.randn(r, 1500, generator=generator))
            for i in range(6)
        }
        config = {"peft_type": "LORA", "target_modules": ["q"]}
        write_adapter(Adapter(updates, config, dtype=torch.float16), tmp_path / name, provenance={})
    plan = planned([tmp_path / "one", tmp_path / "two"], rule, tmp_path / "out", {}, rank=rank)
    told = dry_run(plan, tmp_path / "out", None)
    size = 6 * expected * 3500 * 2
    assert (told.output_rank, told.size, told.dtype) == (expected, size, "float16")
    if rule == "task_arithmetic":
        merge_folders(plan, tmp_path / "out", "", QUIET)
        assert (tmp_path / "out" / WEIGHTS).stat().st_size == pytest.approx(size, rel=0.01)
        assert read_adapter(tmp_path / "out").rank == expected


def test_the_dry_run_of_the_command_writes_nothing(place: Path) -> None:
    before = listing(place)
    code, told = command(*folders(place), "--rule", "ties", "--density=0.5", "--dry-run", "-o", place / "out")
    assert code == 0
    assert json.loads(told)["options"]["density"] == 0.5
    assert listing(place) == before


@pytest.mark.parametrize("rule", ["task_arithmetic", "ties", "tsv", "emr", "cp", "dare", "knots"])
def test_the_estimate_is_a_time(rule: str, place: Path) -> None:
    seconds = estimate(planned(folders(place), rule, place / "out", {}, weights=[1.0, 0.0, 1.0]))
    assert seconds is not None
    assert 0 < seconds < 5


def test_no_time_is_told_where_it_depends_on_the_texts(place: Path) -> None:
    files = [place / f"{name}.safetensors" for name in ("mood", "tone", "size")]
    plan = planned(folders(place), "regmean", place / "out", {}, statistics=files)
    assert estimate(plan) is None
    assert dry_run(plan, place / "out", None).seconds is None


# what each task reads


def dense64(update: Update) -> torch.Tensor:
    return update.B.double() @ update.A.double()


@pytest.mark.parametrize(
    ("rule", "words"), [("emr", ()), ("emr", ("--scale", "0.4", *each("--weight", 1, 0, -2))), ("cp", ("--per-task",))]
)
def test_readouts_are_those_of_the_rule(rule: str, words: tuple[str, ...], place: Path) -> None:
    code, _ = command(*folders(place), "--rule", rule, *words, "-o", place / "out")
    assert code == 0
    weights = [1.0, 0.0, -2.0] if "--weight" in words else None
    scale = 0.4 if "--scale" in words else None
    options = {"per_task": True} if words == ("--per-task",) else {}
    plan = planned(folders(place), rule, place / "again", options, weights=weights, scale=scale)
    assert plan.used == (["mood", "size"] if weights else ["mood", "tone", "size"])
    assert {path.stem for path in (place / "out" / "readouts" / "tasks").iterdir()} == set(plan.used)
    whole = read_adapter(place / "out")
    distinct = set()
    for index, task in enumerate(plan.used):
        read = read_readout(place / "out", task)
        assert set(read.shapes) == set(SHAPES)
        for module in SHAPES:
            shared = plan.result(module)
            assert isinstance(shared, Shared)
            expected = shared.left @ (shared.core * shared.gates[index]) @ shared.right
            assert (dense64(read.updates[module]) - expected).norm() < 1e-5 * expected.norm()
            distinct.add(round(float(expected.norm()), 6))
            merged = shared.left @ (shared.core * shared.gate) @ shared.right
            assert (dense64(whole.updates[module]) - merged).norm() < 1e-5 * merged.norm()
    assert len(distinct) == len(plan.used) * len(SHAPES)


def test_cp_per_task_at_a_high_rank_gives_each_task_its_own_update(place: Path) -> None:
    code, _ = command(
        *folders(place, "mood", "tone"),
        "--rule",
        "cp",
        "--per-task",
        "--rank",
        "5",
        "--normalise",
        "none",
        "-o",
        place / "out",
    )
    assert code == 0
    for task in ("mood", "tone"):
        own, read = read_adapter(place / task), read_readout(place / "out", task)
        for module in SHAPES:
            expected = dense64(own.updates[module])
            assert (dense64(read.updates[module]) - expected).norm() < 1e-3 * expected.norm()


def test_a_readout_for_nobody_is_refused(place: Path) -> None:
    assert command(*folders(place), "--rule", "emr", "-o", place / "out")[0] == 0
    with pytest.raises(LoraloomError, match=r"out: nothing is read for task 'mod'") as caught:
        read_readout(place / "out", "mod")
    assert "did you mean 'mood'" in caught.value.hint
    assert command(*folders(place), "--rule", "cp", "-o", place / "one")[0] == 0
    assert not (place / "one" / "readouts").exists()
    with pytest.raises(LoraloomError, match="one adapter for all tasks: it holds no readouts/"):
        read_readout(place / "one", "mood")


def test_readouts_go_with_the_folder(place: Path) -> None:
    assert command(*folders(place), "--rule", "emr", "-o", place / "out")[0] == 0
    before = dense64(read_readout(place / "out", "tone").updates["layer.0.q"])
    shutil.move(place / "out", place / "elsewhere")
    for name in ("mood", "tone", "size"):
        shutil.rmtree(place / name)
    assert torch.equal(dense64(read_readout(place / "elsewhere", "tone").updates["layer.0.q"]), before)
    merge_into = place / "elsewhere"
    write_adapter(adapter(0, 2), place / "mood", provenance={})
    assert command(place / "mood", "--rule", "weighted", "-o", merge_into, "--overwrite")[0] == 0
    with pytest.raises(LoraloomError, match="holds no readouts/"):  # nothing of the former result is left
        read_readout(merge_into, "tone")


# into a checkpoint

TOKENS = torch.randint(5, len(tiny.WORDS), (3, 8), generator=torch.Generator().manual_seed(0))


def classifier(folder: Path) -> Any:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A base model's folder with PEFT adapters of it: mood of rank 2, tone of rank 3, each with a head."""
    base = tiny.base_folder("bert", tmp_path / "base")
    for seed, name in enumerate(("mood", "tone")):
        config = LoraConfig(r=2 + seed, lora_alpha=5, target_modules=["query", "value"], task_type="SEQ_CLS")
        model = get_peft_model(classifier(base), config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(tmp_path / name)
        torch.save(model.eval()(TOKENS).logits.detach(), tmp_path / f"{name}.logits")
    return tmp_path


def dense_logits(base: Path, plan: Any, head: dict[str, torch.Tensor], rank: int | None) -> torch.Tensor:
    """Return logits of the base in float64 with what the rule gives added to its weights, cut by a full SVD."""
    model = classifier(base).double()
    model.load_state_dict({path: tensor.double() for path, tensor in head.items()}, strict=False)
    for module in plan.modules:
        result = plan.result(module)
        dW = result.double() if isinstance(result, torch.Tensor) else dense64(result)
        U, S, Vh = torch.linalg.svd(dW)
        with torch.no_grad():
            model.get_submodule(module).weight += U[:, :rank] * S[:rank] @ Vh[:rank]
    return model(TOKENS).logits.detach()


@pytest.mark.parametrize(("rule", "rank"), [("task_arithmetic", None), ("ties", None), ("ties", 2)])
def test_a_merge_goes_whole_into_the_weights(rule: str, rank: int | None, trained: Path) -> None:
    """Nothing is truncated unless that was asked for, though `ties` has full rank; heads lie beside the weights."""
    plan = planned(folders(trained, "mood", "tone"), rule, trained / "out", {}, rank=rank)
    told = fuse_folders(plan, trained / "base", trained / "out", "loraloom merge", QUIET)
    made = told.checkpoint
    assert (told.rule, len(made.tensors), made.replaced, made.added) == (rule, 4, [], [])
    assert told.heads == ["mood", "tone"]
    assert made.size == sum(path.stat().st_size for path in (trained / "out").rglob("*") if path.is_file())
    for name in ("mood", "tone"):
        head = load_file(trained / "out" / "heads" / f"{name}.safetensors")
        assert head.keys() == read_adapter(trained / name).head.keys()
        assert all(torch.equal(head[path], own) for path, own in read_adapter(trained / name).head.items())
        model = classifier(trained / "out")
        model.load_state_dict(head, strict=False)
        expected = dense_logits(trained / "base", plan, head, rank)
        assert (model(TOKENS).logits - expected).norm() < 1e-5 * expected.norm()
        uncut = dense_logits(trained / "base", plan, head, None)
        assert (rank is None) == bool((uncut - expected).norm() < 1e-6 * expected.norm())
    facts = read_provenance(trained / "out")
    assert (facts["kind"], facts["command"], facts["fused_into"]) == (
        "fused checkpoint",
        "loraloom merge",
        "base",
    )
    sums = dict(line.split("  ")[::-1] for line in (trained / "out" / "SHA256SUMS").read_text().splitlines())
    assert {"heads/mood.safetensors", "heads/tone.safetensors", "loraloom.json"} <= set(sums)
    for name, digest in sums.items():
        assert hashlib.sha256((trained / "out" / name).read_bytes()).hexdigest() == digest


def test_one_adapter_goes_in_with_its_head(trained: Path) -> None:
    code, told = command(trained / "mood", "--rule", "weighted", "--fuse-into", trained / "base", "-o", trained / "out")
    assert code == 0
    assert json.loads(told)["heads"] == []
    expected = torch.load(trained / "mood.logits")
    got = classifier(trained / "out")(TOKENS).logits
    assert (got - expected).norm() < 1e-5 * expected.norm()
    assert not (trained / "out" / "heads").exists()


def test_nothing_is_looked_at_for_one_adapter_that_stays_as_it_is(trained: Path) -> None:
    def look(*_: Any) -> Any:
        raise AssertionError("the base would be loaded")

    options = MergeOptions("regmean_pp")
    plan = plan_folders([trained / "mood"], options, trained / "out", look=look)
    assert plan.result(plan.modules[0]).B is not None
    with pytest.raises(AssertionError):
        plan_folders([trained / "mood"], replace(options, options={"shrink": 0.5}), trained / "out", look=look)
    assert estimate(plan) == 0.0


def test_a_union_of_targets_goes_into_the_weights(trained: Path) -> None:
    """Of adapters of different layers: in the checkpoint what PEFT's own sum of them does to the base."""
    for rank, (name, targets) in enumerate({"one": ["query", "value"], "other": ["key", "query"]}.items(), start=3):
        model = get_peft_model(classifier(trained / "base"), LoraConfig(r=rank, target_modules=targets))
        generator = torch.Generator().manual_seed(rank)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if "lora_B" in path:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(trained / name)
    plan = planned(
        folders(trained, "one", "other"), "task_arithmetic", trained / "out", {}, scale=1, weights=[0.5, 1.5]
    )
    told = fuse_folders(plan, trained / "base", trained / "out", "loraloom merge", QUIET)
    assert len(told.checkpoint.tensors) == 6
    assert [(one.layers, one.lacks) for one in told.inputs] == [(4, 2), (4, 2)]
    peft = PeftModel.from_pretrained(classifier(trained / "base"), str(trained / "one"), "one")
    peft.load_adapter(str(trained / "other"), "other")
    peft.add_weighted_adapter(["one", "other"], [0.5, 1.5], "sum", combination_type="cat")
    peft.set_adapter("sum")
    base, expected, found = (
        model(TOKENS).logits for model in (classifier(trained / "base"), peft, classifier(trained / "out"))
    )
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert (base - expected).norm() > 1e-2 * expected.norm()


def test_averaged_heads_go_in(trained: Path) -> None:
    plan = planned(folders(trained, "mood", "tone"), "weighted", trained / "out", {}, heads="average")
    told = fuse_folders(plan, trained / "base", trained / "out", "", QUIET)
    assert (told.heads, told.checkpoint.replaced) == ([], [])
    assert sorted(told.checkpoint.added) == ["classifier.bias", "classifier.weight"]
    heads = [read_adapter(trained / name).head["classifier.weight"] for name in ("mood", "tone")]
    model = classifier(trained / "out")
    torch.testing.assert_close(model.classifier.weight.detach(), sum(heads) / 2)
    expected = dense_logits(trained / "base", plan, plan.head, None)
    assert (model(TOKENS).logits - expected).norm() < 1e-5 * expected.norm()


def test_a_dry_run_of_a_fusion_checks_the_checkpoint(trained: Path) -> None:
    plan = planned(folders(trained, "mood", "tone"), "ties", trained / "out", {})
    before = listing(trained)
    told = dry_run(plan, trained / "out", trained / "base")
    assert told.size == sum(tensor.nbytes for tensor in load_file(trained / "base" / "model.safetensors").values())
    (trained / "base" / "config.json").write_text("[")
    with pytest.raises(LoraloomError, match="not valid JSON"):
        dry_run(plan, trained / "out", trained / "base")
    assert set(listing(trained)) == set(before)


def test_the_labels_that_the_adapter_was_trained_on_go_into_the_config(trained: Path) -> None:
    (trained / "mood" / "loraloom.json").write_text(json.dumps({"task": {"name": "mood", "labels": ["bad", "good"]}}))
    plan = planned(folders(trained, "mood"), "weighted", trained / "out", {})
    told = fuse_folders(plan, trained / "base", trained / "out", "", QUIET)
    assert told.checkpoint.config["architectures"] == ["BertForSequenceClassification"]
    assert ("config.json", "BertForSequenceClassification with 2 labels") in merge_lines(told)
    assert classifier(trained / "out").config.id2label == {0: "bad", 1: "good"}


def test_the_tokenizer_of_the_adapters_goes_along(trained: Path) -> None:
    for name in ("mood", "tone"):
        tokenizer = tiny.tokenizer("bert")
        tokenizer.add_special_tokens({"additional_special_tokens": ["<call>"]})
        tokenizer.chat_template = "{{ messages }}"
        tokenizer.save_pretrained(trained / name)
    plan = planned(folders(trained, "mood", "tone"), "weighted", trained / "out", {})
    told = fuse_folders(plan, trained / "base", trained / "out", "", QUIET)
    assert told.carried == sorted(plan.carried)
    found = AutoTokenizer.from_pretrained(trained / "out")
    assert found("<call> good")["input_ids"] == tokenizer("<call> good")["input_ids"]
    assert found.chat_template == tokenizer.chat_template


def test_nothing_is_left_of_a_fusion_that_fails(trained: Path) -> None:
    code, told = command(
        *folders(trained, "mood", "tone"),
        "--rule",
        "ties",
        "--fuse-into",
        trained / "gone",
        "-o",
        trained / "out",
    )
    assert (code, str(trained / "gone") in told) == (2, True)
    before = listing(trained)
    (trained / "base" / "model.safetensors").write_bytes(b"x")
    plan = planned(folders(trained, "mood", "tone"), "ties", trained / "out", {})
    with pytest.raises(LoraloomError):
        fuse_folders(plan, trained / "base", trained / "out", "", QUIET)
    assert set(listing(trained)) == set(before)
