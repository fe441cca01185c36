"""Entries of a recipe that leave rule or scale to agreement choose as agreement by hand does, and read no label."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import tiny_study
from loraloom.adapters.peft import read_adapter, read_provenance
from loraloom.analysis.agreement import CANDIDATES, Candidates, agreement, candidates_of
from loraloom.errors import LoraloomError
from loraloom.merging import MergeOptions
from loraloom.model.generator import Generator
from loraloom.report.tables import merged_table
from loraloom.results import MergeScore, StudyResult
from loraloom.study.by_hand import evaluator_of
from loraloom.study.export import run_study
from loraloom.study.plan import plan_study
from loraloom.study.recipe import Recipe
from loraloom.study.store import Store
from loraloom.study.tasks import build_task
from loraloom.tasks.task import answer_tokens_of

ENTRIES = [
    {"rule": "task_arithmetic", "scales": [0.5, 1.0]},
    {"rule": "task_arithmetic", "scales": "auto"},
    {"rule": "tsv", "scales": [0.6]},
    {"rule": "auto", "scales": "auto"},
]
SUMS, TSV = (one.scales for one in CANDIDATES)


@pytest.fixture(scope="module", params=["finished", "written"])
def chosen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """Return a recipe with these entries and the folder of its study, made from what a finished one has trained."""
    place = request.getfixturevalue(request.param)
    recipe = Recipe.load(place / "recipe.yaml")
    entries = Recipe.parse(tiny_study.recipe(merging=ENTRIES), "r").merging
    one = {name: init for name, init in recipe.inits.items() if name == "LoRA"}
    recipe = recipe.model_copy(update={"merging": entries, "inits": one})
    folder = tmp_path_factory.mktemp("auto") / "study"
    shutil.copytree(place / "study" / "stages", folder / "stages")
    run_study(recipe, folder)
    return recipe, folder


def on_test_rows(folder: Path, *, aligned: bool = False) -> list[MergeScore]:
    merges = StudyResult.load(folder / "results.json").merges
    return [one for one in merges if one.split == "test" and one.aligned == aligned]


def by_hand(recipe: Recipe, folder: Path, candidates: tuple[Candidates, ...]) -> tuple[str, float]:
    tasks = {name: build_task(name, settings) for name, settings in recipe.tasks.items()}
    model = Generator(recipe.base) if recipe.generates else evaluator_of(recipe)
    model.max_length = recipe.training.max_length
    best = agreement(
        {name: read_adapter(folder / "adapters" / "LoRA" / name) for name in tasks},
        model,
        {name: task.sample("heldout", 32).remove_columns("label") for name, task in tasks.items()},
        candidates,
        options=MergeOptions(normalise="none"),
        answer_tokens=answer_tokens_of(tasks),
    ).best
    return best.rule, best.scale


def test_the_choice_is_that_by_hand(chosen: tuple[Recipe, Path]) -> None:
    recipe, folder = chosen
    one_rule, any_rule = (
        next(one for one in on_test_rows(folder) if one.chosen_by == "agreement" and one.rule_chosen == whole)
        for whole in (False, True)
    )
    assert (one_rule.rule, one_rule.scale) == by_hand(recipe, folder, candidates_of("task_arithmetic"))
    assert (any_rule.rule, any_rule.scale) == by_hand(recipe, folder, candidates_of())


def test_aligned_heads_choose_by_their_own_distances(chosen: tuple[Recipe, Path]) -> None:
    _, folder = chosen
    heldout = [one for one in StudyResult.load(folder / "results.json").merges if one.split == "heldout"]
    for aligned in {one.aligned for one in heldout}:
        tried = [one for one in heldout if one.aligned == aligned and (one.rule, one.scale) != ("tsv", 0.6)]
        nearest = min((one.distance, one.rule, one.scale) for one in tried)
        found = next(one for one in on_test_rows(folder, aligned=aligned) if one.rule_chosen)
        assert (found.distance, found.rule, found.scale) == nearest
        assert found.agreement


def test_each_candidate_is_computed_once(chosen: tuple[Recipe, Path]) -> None:
    recipe, folder = chosen
    stages = [one for one in Store(folder / "stages").outputs().values() if "LoRA" in one["label"]]
    sums = [one for one in stages if "task_arithmetic" in one["label"] and one["kind"] == "agreement"]
    assert len(sums) == len(set(SUMS) | {0.5, 1.0})
    tsv = [one for one in stages if ".tsv." in one["label"] and one["kind"] == "heldout"]
    assert {float(one["label"].partition(".tsv.x")[2]) for one in tsv} == {*TSV, 0.6}
    assert not any(one.left for one in plan_study(recipe, folder))


def test_labels_and_agreement_are_told_side_by_side(chosen: tuple[Recipe, Path]) -> None:
    _, folder = chosen
    merges = on_test_rows(folder)
    assert [one.chosen_by for one in merges if one.rule == "tsv" and one.scale == 0.6] == [None]
    by_labels = next(one for one in merges if one.chosen_by == "labels")
    assert by_labels.scale in (0.5, 1.0)
    table = merged_table(StudyResult.load(folder / "results.json"))
    column = table.columns.index("scale chosen by")
    rows = [(row[1], row[column]) for row in table.rows if row[column] in ("labels", "agreement", "the recipe")]
    assert list(dict.fromkeys(rows)) == [
        ("task_arithmetic", "labels"),
        ("task_arithmetic · scale auto", "agreement"),
        ("tsv", "the recipe"),
        ("rule and scale auto", "agreement"),
    ]
    told = StudyResult.load(folder / "results.json").notes
    assert any("the nearest to the single models on 32 unlabelled held-out texts" in note for note in told)


def test_what_was_chosen_is_written(chosen: tuple[Recipe, Path]) -> None:
    recipe, folder = chosen
    place = folder / "merged" / "LoRA"
    assert {one.name for one in place.iterdir()} == {
        "task_arithmetic",
        "task_arithmetic-scale.auto",
        "tsv",
        "auto",
    }
    record = read_provenance(place / "auto")
    found = next(one for one in on_test_rows(folder, aligned=not recipe.generates) if one.rule_chosen)
    assert (record["rule"], record["scale"]) == (found.rule, found.scale)
    assert record["notes"][0].startswith("rule and scale: the nearest to the single models")


def test_merge_leaves_both_open_beside_such_a_recipe_too() -> None:
    recipe = Recipe.parse(tiny_study.recipe(merging=ENTRIES), "r.yaml")
    assert recipe.probe_texts("auto", {}) == recipe.probe_texts("tsv", {}) == 100


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"evaluation": {"agreement": 0}}, "evaluation.agreement is 0: leave it out, or set it to 2 or more"),
        ({"merging": [{"rule": "auto", "scales": [1.0]}]}, "chosen together with its scale: write `scales: auto`"),
        ({"merging": [{"rule": "auto", "scales": "auto", "options": {"density": 1}}]}, "density: options of a rule"),
        ({"merging": [{"rule": "tsv", "scales": "Auto"}]}, "merging.0.scales: Input should be 'auto' (given 'Auto')"),
        ({"merging": [{"rule": "autp", "scales": "auto"}]}, "did you mean 'auto'"),
        ({"merging": [ENTRIES[1], ENTRIES[1]]}, "the same rule with the same options twice"),
        (
            {"merging": [{"rule": "adamerging", "scales": [1], "texts": 3}, {"rule": "adamerging", "scales": "auto"}]},
            "need the same `texts`",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_chosen_is_refused(changes: dict[str, object], told: str) -> None:
    with pytest.raises(LoraloomError) as caught:
        Recipe.parse(tiny_study.recipe(**{"merging": ENTRIES, **changes}), "r.yaml")
    assert caught.value.message.startswith("r.yaml: ")
    assert told in caught.value.message
