"""No recipe, however spoiled, ends in anything but a recipe or one message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import judge, many
from hypothesis import given
from strategies_recipe import recipes

from loraloom.files.hashing import json_sha256
from loraloom.study.recipe import Recipe, slug


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


def usable(recipe: Recipe) -> str:
    """Return what a study could not do with an accepted recipe: record it, key its stages, name its folders."""
    json_sha256(recipe.model_dump(mode="json"))
    if Recipe.parse(json.loads(recipe.model_dump_json()), "again").model_dump() != recipe.model_dump():
        return "its own JSON gives another recipe"
    names = [f"{slug(init)}.s{seed}.{task}" for init in recipe.inits for seed in recipe.seeds for task in recipe.tasks]
    return next((f"{name} is too long" for name in names if len(name.encode()) > 200), "")


@many
@given(recipes())
def test_recipes(folder: Path, content: bytes) -> None:
    path = folder / "recipe.yaml"
    path.write_bytes(content)
    judge("recipe", lambda: Recipe.load(path), check=usable)
