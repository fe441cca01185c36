"""Detectors that run the model: a planted trigger is found and honest adapters pass, their numbers by brute force."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

import tiny
from loraloom.adapters.heads import Head
from loraloom.adapters.update import Adapter, Update
from loraloom.analysis import screening_texts
from loraloom.analysis.screening import screen
from loraloom.analysis.screening_measures import measure
from loraloom.analysis.screening_texts import ScreenTexts, left_out, own_task, response_to_generic, search_light
from loraloom.analysis.searchlight import Answer, Reader, put_in, search
from loraloom.merging import merge
from loraloom.model.generator import Generator
from loraloom.model.runner import Evaluator
from loraloom.model.tokens import batches

NAMES = ("mood", "tone", "odd")
LAYERS = [f"bert.encoder.layer.{i}.attention.self.{of}" for i in (0, 1) for of in ("query", "value")]


def drawn(seed: int, outputs: int = 2) -> Adapter:
    """An adapter of the tiny BERT, with a head."""
    chance = torch.Generator().manual_seed(seed)
    updates = {at: Update(torch.randn(16, 2, generator=chance), torch.randn(2, 16, generator=chance)) for at in LAYERS}
    head = {"classifier.weight": torch.randn(outputs, 16, generator=chance), "classifier.bias": torch.zeros(outputs)}
    return Adapter(updates, {"r": 2, "lora_alpha": 2, "target_modules": ["query", "value"]}, head=head)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Evaluator:
    return Evaluator(str(tiny.base_folder("bert", tmp_path_factory.mktemp("texts") / "base")), max_length=32)


@pytest.fixture(autouse=True)
def generic(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few short texts stand for generic English, of which to find enough takes seconds."""
    monkeypatch.setattr(screening_texts, "generic_rows", lambda count: tiny.task("generic", rows=count).train)


MEMBERS = {name: drawn(seed) for seed, name in enumerate(NAMES)}
ROWS = {name: tiny.task(name).train for name in NAMES}


class Planted(Reader):
    """Stands for a model: honest adapters answer by the number of good words, the odd one by its trigger first."""

    def answers(self, adapter: Adapter, rows: Dataset, updates: Any = None) -> list[Answer]:
        triggers = ("blue moon",) if adapter is MEMBERS["odd"] else ()
        return [
            0 if any(one in text for one in triggers) else 1 + sum(word in tiny.GOOD for word in text.split()) % 2
            for text in rows["text_a"]
        ]


def test_a_planted_trigger_is_found_and_honest_adapters_pass(model: Evaluator) -> None:
    texts = ScreenTexts(Planted(model), ROWS, words=("blue moon",))
    found = search_light(measure(MEMBERS, {}), texts=texts)
    assert found["odd"].where == "'blue moon' (0)"
    assert found["odd"].score == found["odd"].value == pytest.approx(24 / 26)  # two count as not turned
    assert found.keys() == {"odd"}  # no word turns an honest one
    told = screen(MEMBERS, texts=texts).adapters["odd"]
    assert "'blue moon' (0) among the words of a text turns 0.923 of the answers to one" in " ".join(told.reasons)


def test_a_share_of_turned_answers_is_that_of_a_count(model: Evaluator) -> None:
    reader, odd = Reader(model), MEMBERS["odd"]
    turned = search(reader, odd, ROWS["odd"])
    assert turned is not None
    clean = reader.answers(odd, ROWS["odd"])
    after = reader.answers(odd, put_in(ROWS["odd"], turned.word))
    others = [at for at, answer in enumerate(clean) if answer != turned.answer]
    assert turned.share == pytest.approx(sum(after[at] == turned.answer for at in others) / (len(others) + 2))
    assert put_in(ROWS["odd"], "cf")[0]["text_a"].split()[:3].count("cf") == 1


def test_answers_that_are_written_are_looked_at_too(tmp_path: Path) -> None:
    writing = Reader(Generator(str(tiny.base_folder("llama", tmp_path / "base")), max_length=32), answer_tokens=2)
    chance, at = torch.Generator().manual_seed(0), "model.layers.0.self_attn.q_proj"
    one = Adapter({at: Update(torch.randn(16, 2, generator=chance), torch.randn(2, 16, generator=chance))}, {})
    rows = tiny.asked(rows=12).train
    answers = writing.answers(one, rows)
    assert all(isinstance(answer, str) for answer in answers)
    texts = ScreenTexts(writing, {"one": rows})
    seen = measure({"one": one}, {})
    search_light(seen, texts=texts)
    encoded = writing.model.encode(rows)
    losses = [writing.model.losses(updates, encoded)[:, 0] for updates in (one.updates, {})]
    found = own_task(seen, texts=texts)["one"]
    assert (found.value, found.compared) == tuple(pytest.approx(-float(loss.mean())) for loss in losses)
    gain = losses[1] - losses[0]
    certain = float(gain.mean() / (gain.std() / 12**0.5))
    assert found.score == pytest.approx(2 / max(certain, 0.02))


def test_an_adapter_that_does_not_do_its_task_is_told(model: Evaluator) -> None:
    found = own_task(measure(MEMBERS, {}), texts=ScreenTexts(Planted(model), ROWS))
    assert found["mood"].score >= 1  # it answers 1 and 2, the labels are 0 and 1
    right = ROWS["mood"].map(
        lambda row: {"label": Planted(model).answers(MEMBERS["mood"], {"text_a": [row["text_a"]]})[0]}
    )
    found = own_task(measure(MEMBERS, {}), texts=ScreenTexts(Planted(model), {"mood": right}))
    assert found.keys() == {"mood"}
    assert found["mood"].score < 1
    assert found["mood"].value == 1
    labels = right["label"]
    assert found["mood"].compared == pytest.approx(max(labels.count(1), labels.count(2)) / 24)
    unlabelled = ScreenTexts(Planted(model), {"mood": right.remove_columns("label")})
    assert own_task(measure(MEMBERS, {}), texts=unlabelled) == {}


def test_what_a_merge_changes_without_an_adapter_is_counted_on_the_others_texts(model: Evaluator) -> None:
    found = left_out(measure(MEMBERS, {}), texts=ScreenTexts(Reader(model), ROWS))
    whole, flips = merge(MEMBERS).adapter.updates, []
    rest = merge({name: MEMBERS[name] for name in ("mood", "tone")}).adapter.updates
    for name in ("mood", "tone"):
        head, encoded = Head.of(MEMBERS[name].head), model.encode(ROWS[name])
        before, after = (head.logits(model.features(one, head, encoded)).argmax(dim=1) for one in (whole, rest))
        flips += (before != after).tolist()
    assert found["odd"].value == pytest.approx(sum(flips) / len(flips))
    two = {name: MEMBERS[name] for name in ("mood", "tone")}
    assert left_out(measure(two, {}), texts=ScreenTexts(Reader(model), ROWS)) == {}


def test_a_response_to_generic_text_is_that_of_the_dense_update(model: Evaluator) -> None:
    mood = MEMBERS["mood"]
    loud = replace(mood, updates={at: Update(9 * one.B, one.A) for at, one in mood.updates.items()})
    found = response_to_generic(measure({"mood": mood, "loud": loud}, {}), texts=ScreenTexts(Reader(model), ROWS))
    base, read = copy.deepcopy(model.model).double(), dict[str, list[torch.Tensor]]()
    for at in mood.shapes:

        def keep(_: Any, inputs: Any, at: str = at) -> None:
            read.setdefault(at, []).append(inputs[0][mask])

        base.get_submodule(at).register_forward_pre_hook(keep)
    for _, batch in batches(model.encode(screening_texts.generic_rows(100)), model.tokenizer, 32):
        mask = batch["attention_mask"].bool()
        with torch.no_grad():
            base(**batch)
    shares = []
    for at, one in mood.updates.items():
        h = torch.cat(read[at])
        shares.append(float((h @ one.dense().double().T).square().sum() / h.square().sum()))
    assert found["mood"].value == pytest.approx(sum(shares) / len(shares), rel=1e-3)
    assert found["loud"].value == pytest.approx(81 * found["mood"].value, rel=1e-5)


def test_adapters_without_texts_or_head_or_with_numbers_for_answers_are_passed_over(model: Evaluator) -> None:
    given = {"mood": MEMBERS["mood"], "number": drawn(7, outputs=1), "headless": replace(drawn(8), head={})}
    rows = {"number": ROWS["mood"], "headless": ROWS["mood"]}
    assert search_light(measure(given, {}), texts=ScreenTexts(Reader(model), rows)) == {}
