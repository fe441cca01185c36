"""Input that no task of answers can do with, each told in one clear message; and what must work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import AddedToken

import tiny
from commands import call, measured, refused
from loraloom.adapters.peft import read_adapter, write_adapter
from loraloom.errors import LoraloomError
from loraloom.model.generator import Generator
from loraloom.study.recipe import Recipe
from loraloom.study.store import study_store
from loraloom.study.tasks import build_task
from tiny_writers import prompt_recipe, writer_adapter, writer_base


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a chat template, and an adapter for each task of `prompt_recipe`."""
    place = tmp_path_factory.mktemp("answers")
    base = writer_base(place / "base", chat=True)
    for seed, task in enumerate(("first", "last")):
        writer_adapter(base, place / task, seed=seed)
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """The same in a folder of the test's own, with rows and a recipe."""
    for name in ("base", "first", "last"):
        shutil.copytree(made / name, tmp_path / name)
    prompt_recipe(tmp_path)
    return tmp_path


def compared(place: Path, *more: object) -> str:
    """What `compare` says of the two adapters, which it must refuse."""
    words = ("compare", place / "first", place / "last", "--recipe", place / "recipe.yaml", "-o", place / "out")
    told = refused(*words, "--rule", "task_arithmetic", "--scale", 1, *more)
    assert not (place / "out" / "results.json").exists()
    return told


def rewrite(path: Path, change: Callable[[int, dict[str, str]], dict[str, Any]]) -> None:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [json.dumps(change(number, row)) for number, row in enumerate(rows, start=1)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_no_column_of_answers(place: Path) -> None:
    rewrite(place / "first.train.jsonl", lambda _, row: {"prompt": row["prompt"], "reply": row["answer"]})
    assert "first.train.jsonl: no column 'answer': known: prompt, reply" in compared(place)


def test_empty_answers(place: Path) -> None:
    path = place / "first.train.jsonl"
    rewrite(path, lambda number, row: {**row, "answer": " " if number in (3, 5) else row["answer"]})
    told = compared(place)
    assert "first.train.jsonl: answer: empty answer: row 3 (' '), row 5 (' ')" in told
    assert "`empty: drop` in the recipe leaves rows without prompt or answer out" in told


def test_answers_longer_than_what_is_kept_of_a_row_and_than_the_context(place: Path) -> None:
    rewrite(place / "first.test.jsonl", lambda number, row: {**row, "answer": "tea " * (30 if number == 2 else 1)})
    told = compared(place)
    assert "1 of 10 answers have 24 tokens or more, all that is kept of a row" in told
    assert "raise max_length above 31, or leave these rows out" in told
    rewrite(place / "first.test.jsonl", lambda number, row: {**row, "answer": "tea " * (50 if number == 2 else 1)})
    content = yaml.safe_load((place / "recipe.yaml").read_text())
    content["training"]["max_length"] = 100
    (place / "recipe.yaml").write_text(yaml.safe_dump(content))
    told = compared(place)
    assert "1 of 10 answers have 40 tokens or more, the base takes no more" in told
    assert "max_length" not in told


def studied(place: Path, *, given: bool = False) -> str:
    """What `run` says of a study of the two tasks, or of the two `given` adapters, which it must refuse untrained."""
    content = yaml.safe_load((place / "recipe.yaml").read_text())
    content |= {"merging": [{"rule": "tsv", "scales": "auto"}], "evaluation": {"agreement": 4}}
    adapters = {"adapters": {task: str(place / task) for task in ("first", "last")}}
    (place / "study.yaml").write_text(yaml.safe_dump({**content, **(adapters if given else {"inits": {"LoRA": {}}})}))
    told = refused("run", place / "study.yaml", "-o", place / "study", "--quiet")
    kinds = {name.partition("/")[0] for name in study_store(place / "study").outputs()}
    assert kinds <= {"task"}
    assert [path.name for path in (place / "study").iterdir()] == ["stages"]
    return told


def test_a_study_and_training_look_at_all_rows_before_they_train(place: Path) -> None:
    rewrite(place / "last.test.jsonl", lambda number, row: {**row, "answer": "tea " * (50 if number == 2 else 1)})
    content = yaml.safe_load((place / "recipe.yaml").read_text())
    content["tasks"]["first"]["answer_tokens"] = 60
    content["training"]["max_length"] = 100
    (place / "recipe.yaml").write_text(yaml.safe_dump(content))
    told = studied(place)
    assert "task 'first': answer_tokens: 60, and the base takes 40 tokens: lower it" in told
    last = (
        "task 'last', test rows: 1 of 10 answers have 40 tokens or more, the base takes no more: leave these rows out"
    )
    assert last in told
    assert last in refused("train", "--task", "last", "--recipe", place / "recipe.yaml", "-o", place / "out")
    assert last in refused("evaluate", place / "last", "--recipe", place / "recipe.yaml", "--task", "last")
    assert not (place / "out").exists()
    measured(place / "recipe.yaml", place / "last", "--task", "last", "--split", "heldout")


@pytest.mark.parametrize("kind", ["tokens", "head"])
def test_adapters_of_other_words_or_with_heads_are_no_writers_of_this_base(kind: str, place: Path, made: Path) -> None:
    if kind == "tokens":
        tokenizer = tiny.tokenizer("llama")
        tokenizer.add_tokens([AddedToken("<tool>", special=True)])
        tokenizer.save_pretrained(place / "first")
        wanted = f"{place / 'first'}: its tokenizer has '<tool>', which the base's has not"
    else:
        first = read_adapter(made / "first")
        shutil.rmtree(place / "first")
        write_adapter(replace(first, head={"score.weight": torch.ones(2, 16)}), place / "first", provenance={})
        wanted = f"{place / 'first'}: has a head, so it gives classes or numbers and writes no answers"
    assert wanted in studied(place, given=True)
    merged = ("merge", place / "first", place / "last", "-o", place / "out", "--quiet")
    assert wanted in refused(*merged, "--rule", "auto", "--scale", "auto", "--recipe", place / "recipe.yaml")
    assert wanted in refused(*merged, "--rule", "distil", "--recipe", place / "recipe.yaml")
    texts = [word for task in ("first", "last") for word in ("--unlabelled", place / f"{task}.train.jsonl")]
    told = refused(*merged, "--scale", "auto", *texts, "--column", "prompt", "--base", place / "base")
    mixed = f"{place / 'first'}: with a head, for classes or numbers; {place / 'last'}: without"
    assert (wanted if kind == "tokens" else mixed) in told
    assert not (place / "out").exists()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_rows_longer_than_the_context_lose_the_beginning_of_their_prompt(kind: str, tmp_path: Path) -> None:
    """Learned positions would be out of range, and rotary ones never trained."""
    generator = Generator(str(writer_base(tmp_path / "base", kind)), max_length=100)
    prompt_recipe(tmp_path)
    rewrite(tmp_path / "first.test.jsonl", lambda _, row: {**row, "prompt": "tea " * 60 + row["prompt"]})
    task = build_task("first", Recipe.load(tmp_path / "recipe.yaml").task("first"))
    encoded = generator.encode(task.test)
    assert {len(one.prompt) + len(one.answer) for one in encoded} == {40}
    assert torch.isfinite(generator.losses({}, encoded)).all()
    ends = [one._replace(prompt=one.prompt[-35:]) for one in encoded]
    assert generator.answers({}, encoded, 5) == generator.answers({}, ends, 5)
    with pytest.raises(LoraloomError, match="the base takes 40 tokens, and answers may have 40"):
        generator.answers({}, encoded, 40)


@pytest.mark.parametrize("before", [{"system": "very"}, {}])
def test_chats_for_a_base_without_a_chat_template(place: Path, before: dict[str, str]) -> None:
    def chat(_: int, row: dict[str, str]) -> dict[str, Any]:
        turns = {**before, "user": row["prompt"], "assistant": row["answer"]}
        return {"messages": [{"role": role, "content": content} for role, content in turns.items()]}

    for task in ("first", "last"):
        for split in ("train", "test"):
            rewrite(place / f"{task}.{split}.jsonl", chat)
    told = compared(place, "--base", writer_base(place / "plain"))
    assert "the base has no chat template, and 10 of 10 rows are chats or have a system prompt" in told
    assert "`chat: off`" in told
    content = yaml.safe_load((place / "recipe.yaml").read_text())
    (place / "recipe.yaml").write_text(yaml.safe_dump({**content, "base": str(place / "plain")}))
    wanted = "task 'last', train rows: the base has no chat template, and 52 of 52 rows are chats"
    assert wanted in studied(place)
    assert wanted in refused("train", "--task", "last", "--recipe", place / "recipe.yaml", "-o", place / "adapter")
    assert not (place / "adapter").exists()
    for task in ("first", "last"):
        words = ("statistics", place / f"{task}.test.jsonl", "--texts", 5, "--target", "q_proj")
        told = refused(*words, "--base", place / "plain", "-o", place / "out.safetensors")
        assert "no chat template, and 5 of 5 rows are chats or have a system prompt" in told


def test_added_tokens_that_the_base_lacks(place: Path) -> None:
    tokenizer = tiny.tokenizer("llama")
    tokenizer.add_tokens([AddedToken("<tool>", special=True)])
    tokenizer.save_pretrained(place / "first")
    wanted = f"{place / 'first'}: its tokenizer has '<tool>', which the base's has not"
    assert wanted in compared(place)
    assert wanted in refused("evaluate", place / "first", "--recipe", place / "recipe.yaml")
    assert wanted in refused("chat", place / "first", "--base", place / "base", "--prompt", "tea")
    padded = tiny.tokenizer("llama")
    padded.add_special_tokens({"pad_token": "[PAD]"})  # as scripts do for bases without one; no model sees it
    padded.save_pretrained(place / "last")
    measured(place / "recipe.yaml", place / "last", "--task", "last")


def test_weights_of_words_that_come_along_whole(place: Path, made: Path) -> None:
    first = read_adapter(made / "first")
    head = {"lm_head.weight": torch.ones(22, 16), "model.embed_tokens.weight": torch.ones(22, 16)}
    shutil.rmtree(place / "first")
    write_adapter(replace(first, head=head), place / "first", provenance={})
    wanted = f"{place / 'first'}: brings lm_head.weight, model.embed_tokens.weight whole"
    assert wanted in compared(place)
    assert wanted in refused("evaluate", place / "first", "--recipe", place / "recipe.yaml")


def test_a_classification_adapter_among_those_that_write(place: Path, made: Path) -> None:
    last = read_adapter(made / "last")
    shutil.rmtree(place / "last")
    write_adapter(replace(last, head={"score.weight": torch.ones(2, 16)}), place / "last", provenance={})
    wanted = f"{place / 'last'}: has a head, so it gives classes or numbers and writes no answers"
    assert wanted in compared(place)
    assert wanted in refused("evaluate", place / "last", "--recipe", place / "recipe.yaml")


def test_a_base_that_writes_no_text(place: Path) -> None:
    bert = tiny.base_folder("bert", place / "bert")
    told = refused("evaluate", place / "first", "--recipe", place / "recipe.yaml", "--base", bert)
    assert "a bert model writes no text" in told


def test_a_decoder_without_a_generation_config_works(place: Path) -> None:
    config = place / "base" / "generation_config.json"
    config.write_text('{"eos_token_id": 2, "repetition_penalty": 9.0}', encoding="utf-8")
    found = measured(place / "recipe.yaml", place / "first")
    config.unlink()
    assert measured(place / "recipe.yaml", place / "first") == found
    assert call("chat", place / "first", "--base", place / "base", "--prompt", "tea", "--tokens", 6).exit_code == 0
