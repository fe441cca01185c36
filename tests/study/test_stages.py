"""A stage is a function of what its key holds: every argument counts, and nothing else of a recipe can be reached."""

from __future__ import annotations

import gc
import inspect
import shutil
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from pydantic import BaseModel

import tiny
import tiny_study
from loraloom.progress import Reporter
from loraloom.study import agreement, stages
from loraloom.study.engine import Call, Context, Engine, Reading, StageFunction, Worker, stage
from loraloom.study.inputs import Base, Input, Local, Output, Rows, Texts
from loraloom.study.recipe import Recipe
from loraloom.study.store import Stage, Store
from loraloom.study.study import Study
from loraloom.study.tasks import make_task

FUNCTIONS = {
    name: one for place in (stages, agreement) for name, one in vars(place).items() if isinstance(one, StageFunction)
} | {"make_task": make_task}
# one rule without a base model, one by statistics, one by texts, one by teachers
RULES: list[dict[str, Any]] = [
    *({"rule": rule, "scales": [1.0]} for rule in ("tsv", "regmean", "regmean_pp")),
    {"rule": "distil", "scales": [1.0], "options": {"steps": 2}},
]


@pytest.fixture(scope="module")
def calls(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The arguments with which a recipe of starts, and one of given adapters, call every stage function."""
    found: dict[str, dict[str, Any]] = {}
    do = Engine.do

    def noted(self: Engine, function: StageFunction[Any], label: str, **given: Any) -> Output:
        found[next(name for name, one in FUNCTIONS.items() if one is function)] = given
        return do(self, function, label, **given)

    copy = shutil.copytree(finished / "study", tmp_path_factory.mktemp("calls") / "study")
    adapters = {name: f"study/adapters/LoRA/{name}" for name in ("mood", "tone")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "do", noted)
        for changes in ({}, {"inits": {}, "adapters": adapters, "merging": RULES}):
            recipe = Recipe.parse(tiny_study.recipe(**changes), "r").resolved(finished)
            study = Study(recipe, copy, Reporter(quiet=True))
            list(study.evaluations())
            list(study.interference())
    return found


def test_every_stage_is_called_with_all_its_arguments_by_name(calls: dict[str, dict[str, Any]]) -> None:
    assert calls.keys() == FUNCTIONS.keys()
    for name, function in FUNCTIONS.items():
        folder, context, *arguments = inspect.signature(function.write).parameters.values()
        assert (folder.name, context.annotation) == ("folder", "Context")
        assert all(one.kind is one.KEYWORD_ONLY and one.default is one.empty for one in arguments)
        assert {one.name for one in arguments} == calls[name].keys()


def test_a_stage_that_distils_tells_its_steps(calls: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    function = FUNCTIONS["merge_by_teachers"]
    call = Call(function.stage("merge", **calls["merge_by_teachers"]), function, calls["merge_by_teachers"])
    Worker(Store(tmp_path)).run(call, lambda done, total, loss=None: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]


def others(value: Any) -> Iterator[Any]:
    """Yield values that differ from an argument in one place of it: each of its options, or what one input holds."""
    if isinstance(value, Output):
        yield Output(Stage("another", "stage", {}), value.path)
    elif isinstance(value, Input):
        yield replace(value, key="of other content")
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from ({**value, key: other} for other in others(one))
            yield {name: other for name, other in value.items() if name != key}
        if len(value) > 1:
            yield dict(reversed(value.items()))
        yield {**value, "one more": next(iter(value.values()), "anything")}
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from (value.model_copy(update={name: other}) for other in others(getattr(value, name)))
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from (replace(value, **{field.name: other}) for other in others(getattr(value, field.name)))
    elif isinstance(value, list):
        yield [*value, "one more"]
    elif isinstance(value, bool) or value is None:
        yield not value
    else:
        yield value + ("x" if isinstance(value, str) else 1)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_option_and_input_is_in_the_key(calls: dict[str, dict[str, Any]], name: str) -> None:
    function, given = FUNCTIONS[name], calls[name]
    keys = [function.stage("label", **given).key]
    for argument, value in given.items():
        changed = [function.stage("label", **{**given, argument: other}).key for other in others(value)]
        assert changed, argument
        keys += changed
    assert len(set(keys)) == len(keys)
    assert function.stage("another label", **given).key == keys[0]
    assert replace(function, version=function.version + 1).stage("label", **given).key not in keys


def reachable(*roots: Any) -> Iterator[Any]:
    """Yield all that code could come to by attributes, items and closures of `roots`, without imports."""
    ends = (types.ModuleType, type, Reporter, Dataset)  # hold no recipe, but by way of the whole interpreter
    seen: set[int] = set()
    ahead = list(roots)
    while ahead:
        one = ahead.pop()
        if id(one) in seen or isinstance(one, ends):
            continue
        seen.add(id(one))
        yield one
        if isinstance(one, types.FunctionType):
            ahead += [one.__defaults__, one.__kwdefaults__, *(cell.cell_contents for cell in one.__closure__ or ())]
        else:
            ahead += gc.get_referents(one)


def test_neither_recipe_nor_study_can_be_reached_from_a_stage(
    finished: Path, tmp_path: Path, calls: dict[str, dict[str, Any]]
) -> None:
    seen: list[Context] = []

    @stage("look", version=1)
    def look(folder: Path, context: Context, *, word: str) -> None:
        seen.append(context)

    study = Study(Recipe.load(finished / "recipe.yaml"), tmp_path, Reporter(quiet=True))
    study.engine.expect(look, 1)
    study.engine.do(look, "look", word="hello")
    assert {field.name for field in fields(Context)} == {
        *("scratch", "evaluator", "generator", "unload", "progress", "reports")
    }
    assert any(isinstance(one, Recipe) for one in reachable(study))
    found = list(reachable(seen, *calls.values()))
    assert not [one for one in found if isinstance(one, Recipe | Study)]
    assert any(isinstance(one, Worker) for one in found)


def test_a_label_a_place_and_a_name_are_no_part_of_the_key(tmp_path: Path) -> None:
    @stage("look", version=1)
    def look(folder: Path, context: Context, *, base: Base, file: Local, rows: Rows, reading: Reading) -> None:
        raise AssertionError("never run")

    def key(label: str, folder: Path) -> str:
        folder.mkdir()
        (folder / "file").write_text("the same")
        tiny.base_folder("bert", folder / "base")
        task = replace(tiny.task(), description=label, source={"from": label})
        base = replace(Base.of(str(folder / "base")), name=label)
        return look.stage(
            label, base=base, file=Local.file(folder / "file"), rows=Rows.of(task), reading=Reading(16, 4)
        ).key

    assert key("a", tmp_path / "a") == key("b", tmp_path / "b")
    assert Rows.of(replace(tiny.task(), description="seen by no stage")).task.description == ""


def test_texts_come_without_labels() -> None:
    rows = Dataset.from_dict({"text_a": ["a", "b"], "text_b": ["c", "d"], "label": [0, 1]})
    texts = Texts.of(rows)
    assert texts.rows.column_names == ["text_a", "text_b"]
    assert texts.key == Texts.of(rows.remove_columns("label").add_column("label", [1, 1])).key
    moved = Dataset.from_dict({"text_a": ["a", "b c"], "text_b": ["", "d"]})
    assert len({texts.key, Texts.of(moved).key, Texts.of(rows.select_columns("text_a")).key}) == 3


def test_what_cannot_be_hashed_is_no_argument() -> None:
    @stage("look", version=1)
    def look(folder: Path, context: Context, *, value: Any) -> None:
        raise AssertionError("never run")

    inputs = {"a": Local(Path("x"), "hash"), "b": "an option"}
    for value in (Path("x"), {1, 2}, object(), {"deep": [Path("x")]}, inputs, float("nan")):
        with pytest.raises((TypeError, ValueError)):
            _ = look.stage("label", value=value).key


def test_the_base_model_is_loaded_once_however_it_reads(finished: Path, tmp_path: Path) -> None:
    worker = Worker(Store(tmp_path))
    base = Base.of(str(finished / "base"))
    long, short = (worker.evaluator(base, Reading(length, 4)) for length in (16, 6))
    assert long.model is short.model
    rows = Dataset.from_dict({"text_a": [" ".join(["good"] * 30)]})
    assert [len(one.encode(rows)[0]["input_ids"]) for one in (long, short)] == [16, 6]
    worker.unload()
    assert worker.evaluator(base, Reading(16, 4)).model is not long.model
