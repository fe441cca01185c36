"""The same prompts answered before and after merging: what the study keeps, and how the page shows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from commands import call
from loraloom.errors import LoraloomError
from loraloom.report import write_report
from loraloom.results import Answers, StudyResult, Transcript
from loraloom.study.demo import chat_demo_recipe, demo_recipe
from loraloom.study.export import run_study
from loraloom.study.recipe import Recipe

TASKS = {"first": 0, "last": -1}  # which word of the prompt is the answer


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny decoder with two adapters that write, merged: its folder."""
    folder = tmp_path_factory.mktemp("writing")
    tiny.base_folder("llama", folder / "base")
    for task, place in TASKS.items():
        for split, count in (("train", 32), ("test", 8)):
            texts = tiny.task(f"{task}.{split}", rows=count).train["text_a"]
            lines = [json.dumps({"prompt": text, "answer": text.split()[place]}) for text in dict.fromkeys(texts)]
            (folder / f"{task}.{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tasks = {
        task: {
            "source": "prompts",
            "train": f"{task}.train.jsonl",
            "test": f"{task}.test.jsonl",
            "heldout_rows": 4,
            "answer_tokens": 3,
        }
        for task in TASKS
    }
    recipe = {
        "name": "writing",
        "base": "./base",
        "tasks": tasks,
        "lora": {"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]},
        "statistics": {"texts": 8, "atlas_texts": 8, "max_length": 24},
        "training": {"epochs": 1, "learning_rate": 0.02, "batch_size": 8, "max_length": 24},
        "inits": {"LoRA": {"rule": "default"}},
        "merging": [{"rule": "task_arithmetic", "scales": [0.5, 1.0]}, {"rule": "tsv", "scales": [1.0]}],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    run_study(Recipe.load(folder / "recipe.yaml"), folder / "study")
    return folder


def written(base: Path, adapter: Path | None, prompt: str, scale: float = 1.0) -> str:
    """What PEFT's own model writes."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    return str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def test_it_holds_what_each_writes(study: Path) -> None:
    result = StudyResult.load(study / "study" / "results.json")
    transcript = result.transcript
    assert transcript is not None
    best = max((merge for merge in result.merges if merge.split == "heldout"), key=lambda merge: merge.average.value)
    assert (transcript.init, transcript.seed) == ("LoRA", 0)
    assert (transcript.rule, transcript.scale) == (best.rule, best.scale)
    assert [one.task for one in transcript.answers] == ["first"] * 3 + ["last"] * 3
    merged = next((study / "study" / "merged" / "LoRA").glob(f"{transcript.rule}*"))
    for one in (transcript.answers[0], transcript.answers[-1]):
        assert one.expected == one.prompt.split()[TASKS[one.task]]
        assert one.base == written(study / "base", None, one.prompt)
        assert one.merged == written(study / "base", merged, one.prompt)
        assert one.singles == {
            task: written(study / "base", study / "study" / "adapters" / "LoRA" / task, one.prompt) for task in TASKS
        }


def test_the_terminal_shows_one_prompt_of_every_task(study: Path) -> None:
    done = call("run", study / "recipe.yaml", "-o", study / "study")
    assert done.exit_code == 0, done.output
    result = StudyResult.load(study / "study" / "results.json")
    assert result.transcript is not None
    shown = {one.task: one for one in reversed(result.transcript.answers)}
    for task, one in shown.items():
        told = done.stdout[done.stdout.index(f"\n{one.prompt}\n") :].splitlines()[2:6]
        assert [line.split("  ")[1] for line in told] == ["expected", "base model", f"adapter {task}", "merged"]
        assert told[2].endswith(one.singles[task])


def test_the_demos_are_whole_recipes() -> None:
    for recipe in (demo_recipe(), demo_recipe(fast=True), chat_demo_recipe(), chat_demo_recipe(fast=True)):
        recipe.check_complete()
        assert recipe.generates == ("--chat" in recipe.name)


def test_the_page_shows_them_escaped(study: Path, tmp_path: Path) -> None:
    result = StudyResult.load(study / "study" / "results.json")
    evil = "</td><script>alert(1)</script>"
    answers = [
        Answers(task="first", prompt=evil, expected="a", base=evil, singles=dict.fromkeys(TASKS, evil), merged="b")
    ]
    changed = result.model_copy(
        update={"transcript": Transcript(init="LoRA", seed=0, rule="ties", scale=0.5, answers=answers)}
    )
    html = write_report(changed, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "The same prompts, side by side" in html
    assert "<script>alert" not in html
    assert html.count("&lt;/td&gt;&lt;script&gt;alert(1)") == 4
    without = write_report(result.model_copy(update={"transcript": None}), tmp_path / "without.html")
    assert "side by side" not in without.read_text(encoding="utf-8")


def test_a_transcript_of_other_tasks_is_refused(study: Path, tmp_path: Path) -> None:
    content = json.loads((study / "study" / "results.json").read_text(encoding="utf-8"))
    del content["transcript"]["answers"][0]["singles"]["last"]
    content["transcript"]["answers"][1]["task"] = "third"
    (tmp_path / "results.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(LoraloomError) as told:
        StudyResult.load(tmp_path / "results.json")
    assert "transcript.answers.0: not of the study's tasks" in str(told.value)
    assert "transcript.answers.1: not of the study's tasks" in str(told.value)
