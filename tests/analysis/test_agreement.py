"""Distances against brute force in numpy; a planted best scale; what is recorded, and every refusal."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings, strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import tiny
from loraloom.adapters.heads import Head
from loraloom.adapters.peft import read_provenance
from loraloom.adapters.update import Adapter, Update
from loraloom.analysis.agreement import CANDIDATES, FACTORS, Candidates, agreement, candidates_of, merged_updates
from loraloom.analysis.single import FARTHEST, OfAnswers, SingleModels, distance
from loraloom.errors import LoraloomError
from loraloom.merging import MergeOptions, make_plan, merge, rule_names, write_merged
from loraloom.merging.choice import AgreementFacts, CandidateFacts, TextsFacts
from loraloom.merging.facts import MergedFacts
from loraloom.model.generator import Generator
from loraloom.model.runner import Evaluator
from loraloom.model.written import Written

LAYERS = [f"bert.encoder.layer.{i}.attention.self.{part}" for i in (0, 1) for part in ("query", "value")]
OUTPUTS = {"mood": 2, "size": 3, "level": 1}


def brute(own: np.ndarray, merged: np.ndarray) -> float:
    """The definition, row by row in float64."""
    if own.shape[1] == 1:
        return float(((own - merged) ** 2).sum() / ((own - own.mean()) ** 2).sum())
    p, q = (np.exp(x - x.max(1, keepdims=True)) for x in (own, merged))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    mean = p.mean(axis=0)
    far = sum(p[k, c] * np.log(p[k, c] / q[k, c]) for k in range(len(p)) for c in range(p.shape[1]))
    unit = sum(p[k, c] * np.log(p[k, c] / mean[c]) for k in range(len(p)) for c in range(p.shape[1]))
    return float(far / unit)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(2, 12), outputs=st.integers(1, 5), size=st.floats(0.1, 8))
def test_a_distance_is_that_of_the_definition(seed: int, rows: int, outputs: int, size: float) -> None:
    own, merged = (size * np.random.default_rng(seed).normal(size=(2, rows, outputs))).astype(np.float32)
    expected = brute(own.astype(np.float64), merged.astype(np.float64))
    assert distance(torch.tensor(own), torch.tensor(merged)) == pytest.approx(expected, rel=1e-6)
    assert distance(torch.tensor(own), torch.tensor(own)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("outputs", [1, 2, 4])
def test_a_model_that_always_says_the_mean_is_at_distance_one(outputs: int) -> None:
    own = 3 * torch.randn(9, outputs, generator=torch.Generator().manual_seed(0))
    mean = own.mean(dim=0) if outputs == 1 else own.double().softmax(dim=1).mean(dim=0).log().float()
    assert distance(own, mean.expand(9, outputs)) == pytest.approx(1, rel=1e-5)


def test_a_distance_is_in_the_tasks_own_unit() -> None:
    own, merged = torch.randn(2, 8, 1, generator=torch.Generator().manual_seed(1))
    assert distance(1000 * own + 7, 1000 * merged + 7) == pytest.approx(distance(own, merged), rel=1e-3)


def test_outputs_that_are_alike_have_no_unit_and_broken_ones_are_far() -> None:
    own = torch.randn(6, 3)
    assert distance(own[:1].expand(6, 3), own) is None
    assert distance(torch.full((6, 1), 4.5), torch.randn(6, 1)) is None
    assert distance(own, torch.full((6, 3), torch.nan)) == FARTHEST
    assert distance(own[:, :1], torch.full((6, 1), 1e30)) == FARTHEST


# merged models


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory: pytest.TempPathFactory) -> Evaluator:
    return Evaluator(str(tiny.base_folder("bert", tmp_path_factory.mktemp("base"))), batch_size=5)


def adapters(**outputs: int) -> dict[str, Adapter]:
    """Random adapters of rank 2, each with a random head of so many outputs."""
    found = {}
    for seed, (name, count) in enumerate((outputs or OUTPUTS).items()):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        updates = {layer: Update(draw(16, 2), draw(2, 16)) for layer in LAYERS}
        head = {"classifier.weight": draw(count, 16), "classifier.bias": draw(count)}
        config = {"peft_type": "LORA", "base_model_name_or_path": "base", "target_modules": ["query", "value"]}
        found[name] = Adapter(updates, config, head)
    return found


def texts(*names: str, rows: int = 12) -> dict[str, Any]:
    return {name: tiny.task(name, rows=rows).train for name in names or OUTPUTS}


def outputs(evaluator: Evaluator, adapter: Adapter, updates: Any, rows: Any) -> np.ndarray:
    head = Head.of(adapter.head)
    return head.logits(evaluator.features(updates, head, evaluator.encode(rows))).double().numpy()


def test_every_candidate_is_measured_as_it_would_be_merged(evaluator: Evaluator) -> None:
    members, rows = adapters(), texts()
    tried = (Candidates("task_arithmetic", (0.2, 1.0)), Candidates("ties", (0.5,), {"density": 0.4, "space": "core"}))
    found = agreement(members, evaluator, rows, tried, options=MergeOptions(weights=[1, 2, 0.5], rank=3))
    assert [(one.rule, one.scale) for one in found.candidates] == [
        ("task_arithmetic", 0.2),
        ("task_arithmetic", 1.0),
        ("ties", 0.5),
    ]
    for one in found.candidates:
        whole = merge(members, one.rule, weights=[1, 2, 0.5], rank=3, scale=one.scale, **one.options).adapter
        for name, adapter in members.items():
            own = outputs(evaluator, adapter, adapter.updates, rows[name])
            expected = brute(own, outputs(evaluator, adapter, whole.updates, rows[name]))
            assert one.distances[name] == pytest.approx(expected, rel=1e-3), (one, name)
    assert found.best.mean == min(one.mean for one in found.candidates)


def test_a_rule_that_tells_tasks_apart_is_measured_by_what_each_task_reads(evaluator: Evaluator) -> None:
    members, rows = adapters(), texts()
    plan = make_plan(members, MergeOptions("emr", scale=1.0))
    single = SingleModels(evaluator, members, rows)
    found, whole = single.distances(merged_updates(plan, list(members))), merge(members, "emr", scale=1.0)
    read = {name: whole.readout(name).updates for name in members}
    assert found == single.distances(read)
    assert found != single.distances(dict.fromkeys(members, whole.adapter.updates))


def test_the_planted_scale_is_found(evaluator: Evaluator) -> None:
    """Three adapters of one update: their sum is that update three times, and a third of it each single model."""
    members = adapters()
    alike = {name: replace(adapter, updates=members["mood"].updates) for name, adapter in members.items()}
    tried = (Candidates("task_arithmetic", (0.1, 0.2, 1 / 3, 0.5, 1.0)),)
    best = agreement(alike, evaluator, texts(), tried).best
    assert best.scale == 1 / 3
    assert best.mean == pytest.approx(0, abs=1e-6)
    assert not best.lost
    for name in members:  # an adapter alone is its own model
        only = {name: members[name]}
        found = SingleModels(evaluator, only, texts()).distances({name: members[name].updates})
        assert found == {name: pytest.approx(0, abs=1e-9)}


def test_the_base_is_not_run_again_for_the_single_models(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    features, encode = Evaluator.features, Evaluator.encode
    monkeypatch.setattr(Evaluator, "features", lambda *a: calls.append("run") or features(*a))
    monkeypatch.setattr(Evaluator, "encode", lambda *a: calls.append("encode") or encode(*a))
    agreement(adapters(), evaluator, texts(), (Candidates("tsv", (0.3, 0.6, 1.0)), Candidates("svd", (1.0,))))
    assert calls.count("encode") == 3
    assert calls.count("run") == 3 + 4 * 3


def test_an_adapter_that_answers_alike_takes_no_part_and_is_told(evaluator: Evaluator) -> None:
    members = adapters()
    flat = {path: torch.zeros_like(tensor) for path, tensor in members["size"].head.items()}
    members["size"] = replace(members["size"], head=flat)
    found = agreement(members, evaluator, texts(), (Candidates("tsv", (0.5, 1.0)),))
    assert found.left_out == ["size"]
    assert all(one.distances["size"] is None and one.mean > 0 for one in found.candidates)
    assert any(warning.startswith("size: its own model answers every text alike") for warning in found.warnings)
    with pytest.raises(LoraloomError, match="every adapter answers all its texts alike"):
        SingleModels(evaluator, {"size": members["size"]}, texts("size"))


def test_what_was_seen_is_recorded_and_the_texts_are_not(evaluator: Evaluator, tmp_path: Path) -> None:
    members, rows = adapters(), texts()
    found = agreement(members, evaluator, rows, (Candidates("tsv", (0.5, 1.0)), Candidates("ties", (1.0,))))
    best = found.best
    write_merged(merge(members, best.rule, scale=best.scale, agreement=found), tmp_path / "out")
    told = MergedFacts.read(tmp_path / "out")
    assert told.agreement == found
    assert told.scale_from == "agreement"
    plain = json.dumps([{"text_a": row["text_a"]} for row in rows["mood"]], separators=(",", ":"))
    assert told.agreement.texts["mood"] == TextsFacts(12, hashlib.sha256(plain.encode()).hexdigest())
    written = json.dumps(read_provenance(tmp_path / "out")) + (tmp_path / "out" / "README.md").read_text()
    assert "Distance from the single models" in written
    assert not any(row["text_a"] in written for row in rows["mood"])


def test_what_was_not_tried_at_several_scales_was_asked_for(evaluator: Evaluator) -> None:
    members = adapters()
    found = agreement(members, evaluator, texts(), candidates_of(scale=0.4))
    assert {one.scale for one in found.candidates} == {0.4}
    plan = make_plan(members, MergeOptions(found.best.rule, scale=0.4, agreement=found))
    assert plan.scale_from == "asked"


@pytest.mark.parametrize("rule", rule_names())
def test_every_rule_has_scales_to_try(rule: str) -> None:
    (found,) = candidates_of(rule)
    assert list(found.scales) == sorted(set(found.scales))
    assert len(found.scales) >= len(FACTORS) - 2
    assert candidates_of(rule, scale=0.7)[0].scales == (0.7,)
    assert candidates_of() == CANDIDATES


def test_a_tie_goes_to_the_first_and_a_lost_task_is_named() -> None:
    one = CandidateFacts("tsv", {}, 0.5, {"a": 0.2, "b": 1.0, "c": None})
    assert (one.mean, one.worst, one.lost) == (0.6, "b", ["b"])
    found = AgreementFacts({}, [one, replace(one, scale=1.0)])
    assert found.best.scale == 0.5
    assert found.warnings[0].startswith("b: the chosen candidate answers it no better")


def test_all_that_is_wrong_is_told_together(evaluator: Evaluator) -> None:
    members = adapters()
    members["mood"] = replace(members["mood"], head={})
    with pytest.raises(LoraloomError) as told:
        agreement(members, evaluator, {**texts("mood"), **texts("size", rows=1)}, (Candidates("tsv", (1.0,)),))
    for part in ("the adapter brings no head", "no texts for 'level'", "size: 1 texts, 2 are the fewest"):
        assert part in str(told.value)
    with pytest.raises(LoraloomError, match="no merging rule is called 'tvs'"):
        agreement(adapters(), evaluator, texts(), (Candidates("tvs", (1.0,)),))


# answers that are written


def writers(kind: str, count: int = 2, size: float = 0.6) -> dict[str, Adapter]:
    """Random adapters of rank 2 on a tiny base that writes."""
    paths = {
        "llama": [f"model.layers.{i}.self_attn.{part}_proj" for i in (0, 1) for part in "qv"],
        "t5": [f"decoder.block.{i}.layer.0.SelfAttention.{part}" for i in (0, 1) for part in "qv"],
    }[kind]
    found = {}
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        updates = {
            path: Update(
                size * torch.randn(8 if path.endswith("v_proj") else 16, 2, generator=generator),
                torch.randn(2, 16, generator=generator),
            )
            for path in paths
        }
        config = {"peft_type": "LORA", "base_model_name_or_path": "base", "target_modules": ["q_proj", "v_proj"]}
        found[f"task{seed}"] = Adapter(updates, config)
    return found


def with_updates(base: str, kind: str, updates: Any) -> Any:
    """The base model with dense updates in its weights: no hooks, no padding, no cache."""
    of = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    model = of.from_pretrained(base).eval().double()
    with torch.no_grad():
        for path, update in updates.items():
            model.get_parameter(f"{path}.weight").add_(update.B.double() @ update.A.double())
    return model


def next_words(model: Any, kind: str, prompt: list[int], answer: list[int]) -> np.ndarray:
    """Return log chances (answer + 1, words) of each next token of one row."""
    with torch.no_grad():
        if kind == "t5":
            found = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *answer]])).logits[0]
        else:
            found = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 :]
    return found.log_softmax(dim=-1).numpy()


def greedy(model: Any, kind: str, prompt: list[int], most: int) -> list[int]:
    answer: list[int] = []
    while len(answer) < most and (not answer or answer[-1] != 2):
        answer.append(int(next_words(model, kind, prompt, answer)[-1].argmax()))
    return answer


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_answers_are_compared_token_by_token_with_the_base_as_unit(kind: str, tmp_path: Path) -> None:
    base = str(tiny.base_folder(kind, tmp_path / "base"))
    generator, members = Generator(base, batch_size=3), writers(kind)
    rows = {name: tiny.task(name, rows=5).train for name in members}
    found = SingleModels(generator, members, rows, answer_tokens=4)
    whole = merge(members, "task_arithmetic", scale=0.7).adapter.updates
    told = found.distances(dict.fromkeys(members, whole))
    models = {name: with_updates(base, kind, one.updates) for name, one in members.items()}
    merged, alone = with_updates(base, kind, whole), with_updates(base, kind, {})
    for name, model in models.items():
        sums = np.zeros(2)
        for text in rows[name]["text_a"]:
            prompt = generator.tokenizer(text).input_ids
            answer = greedy(model, kind, prompt, 4)
            own, *others = (next_words(one, kind, prompt, answer)[:-1] for one in (model, merged, alone))
            sums += [(np.exp(own) * (own - other)).sum() for other in others]
        assert told[name] == pytest.approx(sums[0] / sums[1], rel=1e-3)
    assert found.distances({name: one.updates for name, one in members.items()}) == {
        name: pytest.approx(0, abs=1e-6) for name in members
    }
    assert found.distances({name: {} for name in members}) == {name: pytest.approx(1) for name in members}


def test_words_beyond_the_likeliest_count_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, members = Generator(str(tiny.base_folder("llama", tmp_path / "base"))), writers("llama", 1)
    rows, tried = {"task0": tiny.task(rows=6).train}, dict.fromkeys(members, members["task0"].scaled(0.5).updates)
    whole = SingleModels(generator, members, rows, answer_tokens=3)
    monkeypatch.setattr("loraloom.model.distances.LIKELIEST", 5)
    few = SingleModels(generator, members, rows, answer_tokens=3)
    one, two = (each._single["task0"] for each in (whole, few))
    assert 0 < two.distance(tried["task0"]) * two.written.unit <= one.distance(tried["task0"]) * one.written.unit
    assert 0 < two.written.unit <= one.written.unit
    assert few.distances(tried)["task0"] == pytest.approx(whole.distances(tried)["task0"], rel=0.2)


def test_what_was_written_is_read_alike_in_other_batches(tmp_path: Path) -> None:
    generator, members = Generator(str(tiny.base_folder("llama", tmp_path / "base")), batch_size=4), writers("llama")
    rows = tiny.task(rows=7).train
    found = Written.by(generator, members["task0"].updates, generator.encode(rows.remove_columns("label")), 5)
    one = OfAnswers(generator, found, rows).distance(members["task1"].updates)
    generator.batch_size = 2
    again = OfAnswers(generator, found, rows)
    assert again.distance(members["task1"].updates) == pytest.approx(one, rel=1e-5)
    assert again.distance(members["task0"].updates) == pytest.approx(0, abs=1e-6)


def test_prompts_that_fill_the_context_make_room_for_their_answers(tmp_path: Path) -> None:
    """GPT-2 has no position beyond its context: a prompt of all of it, with an answer behind, would fail."""
    generator = Generator(str(tiny.base_folder("gpt2", tmp_path / "base")))
    assert generator.context
    update = Update(torch.randn(48, 2), torch.randn(2, 16))
    rows = Dataset.from_dict({"text_a": [" ".join(["good"] * 60), "bad film"]})
    with pytest.warns(UserWarning, match="lose their beginning at 40 tokens"):
        prompts = generator.encode(rows)
    found = Written.by(generator, {"transformer.h.0.attn.c_attn": update}, prompts, 4)
    asked = found.asked(generator, prompts)
    assert max(len(one.prompt) + len(one.answer) for one in asked) == generator.context
    assert found.distance(generator, {}, asked) == pytest.approx(1)


def test_an_adapter_that_changes_nothing_and_one_with_a_head_are_told(tmp_path: Path) -> None:
    generator, members = Generator(str(tiny.base_folder("llama", tmp_path / "base"))), writers("llama")
    rows = {name: tiny.task(rows=4).train for name in members}
    members["task1"] = members["task1"].scaled(0.0)
    found = agreement(members, generator, rows, (Candidates("task_arithmetic", (0.5, 1.0)),), answer_tokens=3)
    assert found.left_out == ["task1"]
    assert found.best.scale == 1.0
    assert found.best.mean == pytest.approx(0, abs=1e-6)
    headed = {**members, "task1": replace(members["task0"], head={"score.weight": torch.ones(2, 16)})}
    with pytest.raises(LoraloomError, match="has a head, so it gives classes or numbers"):
        SingleModels(generator, headed, rows)
