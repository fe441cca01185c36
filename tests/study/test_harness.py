"""The door to lm-evaluation-harness: its figures against PEFT's own model by brute force, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import tiny
from commands import call, refused, said
from loraloom.errors import LoraloomError
from loraloom.study.harness import HarnessResult, HarnessScore, run_harness
from tiny_writers import writer_adapter, writer_base

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

TEXTS = ["the film was", "a cold day", "one great song was very", "tea", "the road that was dark", "room"]
LABELS = [0, 1, 0, 0, 1, 1]
CHOICES = ["good", "bad"]
COMMON = """dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: '{{{{text}}}}'
"""
MOOD = """task: tiny_mood
output_type: multiple_choice
doc_to_choice: [good, bad]
doc_to_target: label
metadata: {version: 1.5}
"""
NEXT = """task: tiny_next
output_type: generate_until
doc_to_target: '{{answer}}'
generation_kwargs: {max_gen_toks: 4, do_sample: false, until: ["</s>"]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(autouse=True, scope="module")
def no_list_of_packages() -> Iterator[None]:
    """The harness runs `pip list` after every evaluation: seconds, for what no test looks at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter, and a folder with two tasks on one file of rows."""
    place = tmp_path_factory.mktemp("harness")
    writer_adapter(writer_base(place / "base", chat=True), place / "adapter")
    (place / "tasks").mkdir()
    rows = [
        {"text": text, "label": label, "answer": written(place, text) if row % 3 else "never"}
        for row, (text, label) in enumerate(zip(TEXTS, LABELS, strict=True))
    ]
    data = place / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, task in (("mood", MOOD), ("next", NEXT)):
        (place / "tasks" / f"{name}.yaml").write_text(task + COMMON.format(data=data), encoding="utf-8")
    return place


def peft_model(place: Path) -> torch.nn.Module:
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    return PeftModel.from_pretrained(base, str(place / "adapter")).eval()


def ids(text: str) -> torch.Tensor:
    return torch.tensor([tiny.tokenizer("llama")(text)["input_ids"]])


def written(place: Path, text: str) -> str:
    """What PEFT's model writes greedily in four tokens, token by token."""
    model, so_far = peft_model(place), ids(text)
    start = so_far.shape[1]
    for _ in range(4):
        so_far = torch.cat([so_far, model(so_far).logits[:, -1:].argmax(-1)], dim=1)
        if so_far[0, -1] == 2:
            break
    return str(tiny.tokenizer("llama").decode(so_far[0, start:], skip_special_tokens=True))


def one(scores: list[HarnessScore], task: str, metric: str) -> HarnessScore:
    (found,) = [score for score in scores if (score.task, score.metric) == (task, metric)]
    return found


@pytest.fixture(scope="module")
def found(place: Path) -> HarnessResult:
    typed = "loraloom evaluate /home/me/adapter"
    tasks = ["tiny_mood", "tiny_next"]
    return run_harness(str(place / "base"), place / "adapter", tasks, place / "tasks", command=typed)


def test_the_figures_are_those_of_pefts_own_model(place: Path, found: HarnessResult) -> None:
    model, right = peft_model(place), 0
    for text, label in zip(TEXTS, LABELS, strict=True):
        logits = model(ids(text)).logits[0, -1]
        liked = [float(logits[tiny.WORDS[choice]]) for choice in CHOICES]
        right += liked.index(max(liked)) == label
    mood = one(found.scores, "tiny_mood", "acc")
    assert mood.value == pytest.approx(right / 6)
    assert 0 < right < 6
    assert mood.stderr is not None
    assert (mood.version, mood.filter, mood.rows, mood.higher_is_better) == ("1.5", None, 6, True)
    assert one(found.scores, "tiny_next", "exact_match").value == pytest.approx(4 / 6)


def test_the_chat_template_is_applied_where_asked(place: Path, found: HarnessResult) -> None:
    chat = run_harness(str(place / "base"), place / "adapter", ["tiny_next"], place / "tasks", chat=True)
    assert (found.chat_template, chat.chat_template) == (False, True)
    assert one(chat.scores, "tiny_next", "exact_match") != one(found.scores, "tiny_next", "exact_match")


def test_the_record_says_what_was_run(found: HarnessResult, tmp_path: Path) -> None:
    found.save(tmp_path / "lm-eval.json")
    told = json.loads((tmp_path / "lm-eval.json").read_text(encoding="utf-8"))
    assert told["format"] == "loraloom-lm-eval-1"
    assert told["command"] == "loraloom evaluate adapter"
    assert told["adapter"] == "adapter"
    assert told["tasks"]["tiny_mood"]["output_type"] == "multiple_choice"
    assert {"python", "loraloom", "lm-eval", "torch", "transformers"} == told["versions"].keys()
    with pytest.raises(LoraloomError, match="is there already"):
        found.save(tmp_path / "lm-eval.json")
    found.save(tmp_path / "lm-eval.json", overwrite=True)


def test_what_cannot_be_run_is_told(place: Path, tmp_path: Path) -> None:
    base, adapter, tasks = str(place / "base"), place / "adapter", place / "tasks"
    with pytest.raises(LoraloomError, match="no folder of tasks"):
        run_harness(base, adapter, ["tiny_mood"], tmp_path / "none")
    (tmp_path / "broken.yaml").write_text(MOOD + COMMON.format(data=tmp_path / "none.jsonl"), encoding="utf-8")
    with pytest.raises(LoraloomError, match=r"could not run tiny_mood: .*none\.jsonl"):
        run_harness(base, adapter, ["tiny_mood"], tmp_path)
    writer_base(tmp_path / "plain")
    with pytest.raises(LoraloomError, match="no chat template"):
        run_harness(str(tmp_path / "plain"), adapter, ["tiny_mood"], tasks, chat=True)


def test_the_command_writes_its_results_beside_the_adapter(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "adapter", tmp_path / "adapter")
    words = ("evaluate", tmp_path / "adapter", "--lm-eval", "tiny_mood", "--lm-eval-path", place / "tasks")
    (told,) = (score for score in said(*words)["scores"] if score["metric"] == "acc")
    stored = json.loads((tmp_path / "adapter.lm-eval.json").read_text(encoding="utf-8"))
    (kept,) = (score for score in stored["scores"] if score["metric"] == "acc")
    assert kept["value"] == told["value"]
    assert "is there already" in refused(*words)
    assert f"tiny_mood acc {told['value']:.4f}" in " ".join(call(*words, "--overwrite").stdout.split())
    assert "the base model's folder does not exist" in refused(*words, "--overwrite", "--base", "./none")
    assert "add --recipe RECIPE, or --lm-eval TASK,TASK" in refused("evaluate", tmp_path / "adapter")
