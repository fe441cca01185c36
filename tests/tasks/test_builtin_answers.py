"""Built-in tasks that are answered in words: right answers, short prompts, nothing of one split in another."""

from __future__ import annotations

import datetime
import json
import re

import pytest

from loraloom.errors import LoraloomError
from loraloom.study.recipe import Recipe
from loraloom.tasks.builtin import BuiltinTask, builtin_task
from loraloom.tasks.builtin_answers import ANSWER_PLANS, _ordinal, _year
from loraloom.tasks.builtin_text import split_of
from loraloom.tasks.task import SPLITS, Task

ROWS = BuiltinTask(train_rows=400, heldout_rows=50, test_rows=200)


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return {name: builtin_task(name, ROWS) for name in ANSWER_PLANS}


@pytest.mark.parametrize("name", ANSWER_PLANS)
def test_rows(name: str, tasks: dict[str, Task]) -> None:
    task = tasks[name]
    assert [len(getattr(task, split)) for split in SPLITS] == [400, 50, 200]
    assert task.kind.generates
    assert task.digest() == builtin_task(name, ROWS).digest()
    assert task.digest() != builtin_task(name, ROWS, seed=1).digest()
    prompts = [row["text_a"] for split in SPLITS for row in getattr(task, split)]
    assert len(set(prompts)) == len(prompts)
    assert max(len(prompt.split()) for prompt in prompts) <= 30
    assert all(row["history"] is None for row in task.test)  # so that the base's chat template is used


def test_names_are_of_words_of_the_summary(tasks: dict[str, Task]) -> None:
    seen: set[str] = set()
    for split in SPLITS:
        rows = getattr(tasks["name"], split)
        assert not seen & set(rows["label"])
        seen |= set(rows["label"])
        for row in rows:
            assert re.fullmatch(r"[a-z]+(_[a-z]+)+", row["label"])
            assert row["label"] not in row["text_a"]
            assert all(word in row["text_a"].lower() for word in row["label"].split("_"))


def test_bookings_say_what_they_are_of(tasks: dict[str, Task]) -> None:
    numbers = dict(zip(["two", "three", "four", "five", "six", "seven", "eight", "nine"], range(2, 10), strict=True))
    templates: dict[str, set[str]] = {}
    for split in SPLITS:
        for row in getattr(tasks["slots"], split):
            slots, asked = json.loads(row["label"]), row["text_a"]
            said = [number for word, number in numbers.items() if re.search(rf"\b{word}\b", asked, re.IGNORECASE)]
            assert said == [slots["people"]]
            assert slots["city"] in asked
            assert slots["day"] in asked
            assert split_of(slots["city"]) == split
            shape = re.sub("|".join([slots["city"], slots["day"], *numbers]), "_", asked, flags=re.IGNORECASE)
            templates.setdefault(split, set()).add(shape)
    assert not templates["test"] & (templates["train"] | templates["heldout"])


def test_dates_in_words(tasks: dict[str, Task]) -> None:
    assert [_ordinal(day) for day in (1, 2, 3, 8, 9, 12, 15, 20, 21, 30)] == (
        [
            "first",
            "second",
            "third",
            "eighth",
            "ninth",
            "twelfth",
            "fifteenth",
            "twentieth",
            "twenty-first",
            "thirtieth",
        ]
    )
    years = {1940: "nineteen forty", 1995: "nineteen ninety-five", 2000: "two thousand", 1900: "nineteen hundred"}
    years |= {2007: "two thousand and seven", 2031: "twenty thirty-one", 1905: "nineteen oh five"}
    assert {year: _year(year) for year in years} == years
    for row in tasks["date"].train:
        day = datetime.date.fromisoformat(row["label"])
        assert day.strftime("%B") in row["text_a"]
        assert re.search(rf"\b{_ordinal(day.day)}\b", row["text_a"])
        assert _year(day.year) in row["text_a"]


def test_a_system_prompt() -> None:
    few = BuiltinTask(train_rows=4, heldout_rows=2, test_rows=2, system="Be brief.")
    assert builtin_task("date", few).test[0]["history"] == [{"role": "system", "content": "Be brief."}]
    with pytest.raises(LoraloomError, match="'topic': system: its answers are not written"):
        builtin_task("topic", few)


def test_too_many_rows() -> None:
    with pytest.raises(LoraloomError, match=r"'name'.*100000 train rows asked, this installation has") as told:
        builtin_task("name", BuiltinTask(train_rows=100_000, heldout_rows=50, test_rows=50))
    assert "fewer rows" in told.value.hint


def test_a_recipe_knows_them_by_name() -> None:
    raw = {"name": "x", "base": "smollm2", "tasks": {"date": {"source": "builtin"}, "slots": {"source": "builtin"}}}
    assert Recipe.parse(raw, "x").generates
    raw["tasks"] = {"date": {"source": "builtin"}, "topic": {"source": "builtin"}}
    with pytest.raises(LoraloomError, match="the answers of date are written, those of topic given by heads"):
        Recipe.parse(raw, "x")
