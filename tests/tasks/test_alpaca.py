"""Rows of Alpaca's columns are prompts and answers, without anybody saying so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loraloom.errors import LoraloomError
from loraloom.tasks.prompts import PromptTask, prompt_task, read_prompts


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def alpaca(count: int, word: str) -> list[dict[str, Any]]:
    return [{"instruction": f"Add {word} {n}", "input": "to 7" * (n % 2), "output": f"{n + 7}"} for n in range(count)]


def test_instruction_and_input_are_the_prompt_and_output_the_answer(tmp_path: Path) -> None:
    sources = {split: write(tmp_path / f"{split}.jsonl", alpaca(6, split)) for split in ("train", "test")}
    task = prompt_task("sum", PromptTask(**sources, heldout_rows=2))
    assert {(row["text_a"], row["label"]) for row in task.test} == {
        (f"Add test {n}" + "\nto 7" * (n % 2), str(n + 7)) for n in range(6)
    }
    assert all(row["history"] is None for row in task.test)
    prompts = read_prompts(sources["train"], 6, answers=False)
    assert set(prompts.column_names) == {"text_a", "history"}
    assert prompts["text_a"][1] == "Add train 1\nto 7"


def test_what_llama_factory_has_beside_them_stands_before_the_prompt(tmp_path: Path) -> None:
    rows = [{**row, "system": "Be brief.", "history": [["Hello", "Hi"]]} for row in alpaca(3, "a")]
    found = read_prompts(write(tmp_path / "rows.jsonl", rows), 3, answers=True)
    turns = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi")]
    assert [(turn["role"], turn["content"]) for turn in found[0]["history"]] == turns
    assert (found[0]["text_a"], found[0]["label"]) == ("Add a 0", "7")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"output": ""}, "output: empty answer: row 1"),
        ({"instruction": None}, "instruction: null prompt: row 1"),
        ({"input": 7}, "instruction: not a text: row 1"),
        ({"history": "Hello"}, "history that is no list of pairs"),
    ],
)
def test_what_is_wrong_with_such_rows_is_told(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    rows = [{**alpaca(1, "a")[0], **change}, *alpaca(3, "b")]
    with pytest.raises(LoraloomError) as caught:
        read_prompts(write(tmp_path / "rows.jsonl", rows), 4, answers=True)
    assert told in str(caught.value)


def test_columns_that_somebody_names_come_first(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [{**row, "prompt": "p", "answer": "a"} for row in alpaca(3, "a")])
    assert read_prompts(rows, 3, answers=True)["text_a"] == ["p"] * 3
    bare = write(tmp_path / "bare.jsonl", alpaca(3, "a"))
    with pytest.raises(LoraloomError, match="no column 'question'"):
        prompt_task("sum", PromptTask(train=bare, test=bare, prompt="question"))
    with pytest.raises(LoraloomError, match="no column 'output'"):
        read_prompts(write(tmp_path / "half.jsonl", [{"instruction": "a"}]), 1, answers=True)
