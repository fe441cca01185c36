"""The page on generation shows a recipe that is one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import yaml

from loraloom.study.recipe import Recipe
from loraloom.tasks.answers import AnswerMetric

PAGE = (Path(__file__).parents[2] / "docs" / "generation.md").read_text(encoding="utf-8")


def test_its_recipe_is_one_of_three_tasks_of_answers() -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.S)
    recipe = Recipe.parse(yaml.safe_load(shown), "docs/generation.md")
    assert recipe.generates
    assert list(recipe.tasks) == ["support", "legal", "sales"]


def test_it_tells_every_metric() -> None:
    assert re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.M) == list(get_args(AnswerMetric))
