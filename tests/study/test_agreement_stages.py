"""The distances of a study are those of agreement by hand, beside every score."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraloom.adapters.heads import Head
from loraloom.adapters.peft import read_adapter
from loraloom.analysis.agreement import Candidates, agreement
from loraloom.analysis.single import distance
from loraloom.merging import MergeOptions
from loraloom.model.generator import Generator
from loraloom.progress import Reporter
from loraloom.results import StudyResult
from loraloom.study import stages
from loraloom.study.by_hand import evaluator_of
from loraloom.study.recipe import Recipe
from loraloom.study.study import Study
from loraloom.tasks.task import answer_tokens_of

RULE = "task_arithmetic"


def measured(place: Path) -> tuple[Study, StudyResult]:
    recipe = Recipe.load(place / "recipe.yaml")
    return Study(recipe, place / "study", Reporter(quiet=True)), StudyResult.load(place / "study" / "results.json")


@pytest.mark.parametrize("kind", ["finished", "written"])
def test_distances_are_those_by_hand(kind: str, request: pytest.FixtureRequest) -> None:
    study, result = measured(request.getfixturevalue(kind))
    assert all(one.agreement.keys() == set(study.tasks) for one in result.merges)
    members = {name: read_adapter(study.folder / "adapters" / "LoRA" / name) for name in study.tasks}
    texts = {name: task.sample("heldout", 32) for name, task in study.tasks.items()}
    model = Generator(study.recipe.base) if kind == "written" else evaluator_of(study.recipe)
    model.max_length = study.recipe.training.max_length
    ours = {
        one.scale: one.agreement
        for one in result.merges
        if (one.init, one.rule, one.split, one.aligned, one.options.get("normalise"))
        == ("LoRA", RULE, "heldout", False, None)
    }
    found = agreement(
        members,
        model,
        texts,
        [Candidates(RULE, tuple(ours))],
        options=MergeOptions(normalise="none"),
        answer_tokens=answer_tokens_of(study.tasks),
    )
    for one in found.candidates:
        assert ours[one.scale] == pytest.approx(one.distances, rel=1e-4, abs=1e-6)
    tested = [one for one in result.merges if (one.init, one.rule, one.split) == ("LoRA", RULE, "test")]
    assert all(one.agreement == ours[one.scale] for one in tested if not one.aligned)


def test_aligned_heads_have_distances_of_their_own(finished: Path) -> None:
    study, result = measured(finished)
    trained = next(one for one in study.trained if one.init == "LoRA")
    merges = next(one for one in study.merges if one.trained is trained and one.settings.rule == RULE)
    scale, output = next(iter(merges.heldout.items()))
    model, heads = evaluator_of(study.recipe), stages.read_heads(trained.adapters)
    aligned = stages.read_aligned(output, heads)
    ours = next(
        one.agreement
        for one in result.merges
        if (one.init, one.rule, one.scale, one.split, one.aligned) == ("LoRA", RULE, scale, "heldout", True)
    )
    for name, merged in stages.merged_adapters(merges.merged.path / stages.ADAPTER, scale, heads).items():
        rows = model.encode(study.tasks[name].sample("heldout", 32))
        own = read_adapter(study.folder / "adapters" / "LoRA" / name)
        head = Head.of(own.head)
        expected = head.logits(model.features(own.updates, head, rows))
        found = aligned[name].logits(model.features(merged.updates, head, rows))
        assert ours[name] == pytest.approx(distance(expected, found), rel=1e-4)


def test_nothing_is_measured_where_no_texts_are_asked_for(finished: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(finished / "recipe.yaml")
    recipe = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"agreement": 0})})
    study = Study(recipe, finished / "study", Reporter(quiet=True))
    assert not any(one.distances for one in study.merges)
