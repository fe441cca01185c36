"""Tasks of answers through the whole path: training, a study, comparison, evaluation by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import PeftConfig
from torch import Tensor

import tiny
from commands import measured, refused, said
from loraloom.adapters.peft import read_adapter
from loraloom.cli.terminal import rules_table
from loraloom.errors import LoraloomError
from loraloom.files.hashing import task_seed
from loraloom.model.generator import Generator
from loraloom.progress import Reporter
from loraloom.results import StudyResult
from loraloom.settings import LoraSettings, TrainingSettings
from loraloom.statistics.texts import collect
from loraloom.study import stages
from loraloom.study.answers import KNOWN, kept_probability, recovered
from loraloom.study.compare import compare
from loraloom.study.entries import MergeSettings
from loraloom.study.export import run_study
from loraloom.study.recipe import Recipe
from loraloom.study.study import Study
from loraloom.study.tasks import build_task
from loraloom.tasks.metrics import resampled_rows
from loraloom.training.adapter import train_adapter
from tiny_written import TARGETS, write_study


def test_training_in_bfloat16_where_there_is_no_gpu(tmp_path: Path) -> None:
    base, task = str(tiny.base_folder("llama", tmp_path / "base")), tiny.asked(rows=16, chat=False)
    lora, settings = LoraSettings(targets=TARGETS["llama"]), TrainingSettings(batch_size=4, precision="bfloat16")
    train_adapter(base, task, tmp_path / "adapter", lora=lora, settings=settings)
    updates = read_adapter(tmp_path / "adapter").updates
    assert all(torch.isfinite(update.dense()).all() for update in updates.values())
    assert any(update.energy() > 0 for update in updates.values())


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_training_learns_to_answer_and_leaves_an_ordinary_adapter(kind: str, tmp_path: Path) -> None:
    base, task = str(tiny.base_folder(kind, tmp_path / "base")), tiny.asked(rows=48, chat=False)
    lora = LoraSettings(rank=4, alpha=8, targets=TARGETS[kind])
    settings = TrainingSettings(epochs=4, learning_rate=0.02, batch_size=8, max_length=32)
    trained = train_adapter(base, task, tmp_path / "adapter", lora=lora, settings=settings)
    adapter = read_adapter(tmp_path / "adapter")
    assert not adapter.head
    assert (
        PeftConfig.from_pretrained(str(tmp_path / "adapter")).task_type
        == {
            "llama": "CAUSAL_LM",
            "t5": "SEQ_2_SEQ_LM",
        }[kind]
    )
    generator = Generator(base)
    encoded = generator.encode(task.heldout)
    before, after = (generator.losses(updates, encoded).sum(dim=0) for updates in ({}, adapter.updates))
    assert trained.metric == "loss"
    # the Trainer's own figure is the mean over batches, here one
    assert trained.heldout == pytest.approx(float(after[0] / after[1]), rel=1e-3)
    assert float(after[0]) < 0.95 * float(before[0])


def test_a_study_counts_the_tokens_that_it_is_told(tmp_path: Path) -> None:
    """Merging by statistics needs them first: those of prompts and answers, as collected by hand."""
    recipe = Recipe.load(write_study(tmp_path, statistics={"texts": 6, "tokens": "both", "max_length": 16}))
    study = Study(recipe, tmp_path / "study", Reporter(quiet=True))
    for split, seen in study.statistics.items():
        for name, found in stages.read_statistics(seen).items():
            sample = study.tasks[name].sample(split, 6)
            expected = collect(Generator(recipe.base), sample, TARGETS["llama"], recipe.statistics)
            prompts = collect(
                Generator(recipe.base), sample.remove_columns("label"), TARGETS["llama"], recipe.statistics
            )
            assert found.tokens == expected.tokens > prompts.tokens
            for layer, moment in expected.moments.items():
                torch.testing.assert_close(found.moments[layer].as_gram(), moment.as_gram())


def test_tokens_of_answers_are_refused_where_heads_give_them(finished: Path) -> None:
    raw = yaml.safe_load((finished / "recipe.yaml").read_text())
    raw["statistics"] = {**raw.get("statistics", {}), "tokens": "answer"}
    with pytest.raises(LoraloomError, match=r"statistics.tokens: 'answer' is for answers that are written"):
        Recipe.parse(raw, "recipe.yaml")


def test_a_study_tells_base_single_and_merged(written: Path) -> None:
    result = StudyResult.load(written / "study" / "results.json")
    assert [one.task for one in result.bases] == ["mood", "tone"]
    assert all(
        one.score.more.keys() == {"exact_match", "loss", "probability"} for one in (*result.bases, *result.singles)
    )
    assert {one.aligned for one in result.merges} == {False}
    tested = [one for one in result.merges if one.split == "test"]
    assert len(tested) == 4
    for one in tested:
        for task, score in one.scores.items():
            base = next(found.score for found in result.bases if found.task == task)
            single = next(found.score for found in result.singles if (found.task, found.init) == (task, one.init))
            loss = {name: found.more["loss"].value for name, found in zip("bsm", (base, single, score), strict=True)}
            share = (loss["b"] - loss["m"]) / (loss["b"] - loss["s"])
            assert one.recovered[task].value == pytest.approx(share, abs=1e-9)
            chance = [found.more["probability"].value for found in (single, score)]
            kept = one.kept_probability[task].value
            assert kept in (pytest.approx(chance[1] / chance[0]), pytest.approx(max(share, 0.0), abs=1e-9))
    heldout = [one for one in result.merges if one.split == "heldout"]
    assert all(one.scores == one.kept_probability for one in heldout)
    # the scale that is tested is the best by what is kept
    for one in tested:
        rivals = [row for row in heldout if (row.init, row.rule) == (one.init, one.rule)]
        assert one.scale == max(rivals, key=lambda row: row.average.value).scale


def test_the_answers_are_kept_and_give_the_score(written: Path) -> None:
    result = StudyResult.load(written / "study" / "results.json")
    files = sorted((written / "study" / "answers").rglob("*.jsonl"))
    assert len(files) == 2 + 2 * 2 + 2 * 4  # base, single and merged adapters
    path = written / "study" / "answers" / "LoRA" / "regmean" / "mood.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    right = np.mean([row["answer"] == row["expected"] for row in rows])
    found = next(one for one in result.merges if (one.init, one.rule, one.split) == ("LoRA", "regmean", "test")).scores[
        "mood"
    ]
    assert found.more["exact_match"].value == pytest.approx(right)


def test_given_adapters_are_compared_and_measured_by_hand_as_in_the_study(written: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(written / "recipe.yaml")
    adapters = {task: written / "study" / "adapters" / "LoRA" / task for task in ("mood", "tone")}
    found = compare(adapters, recipe, tmp_path / "table", rules=["task_arithmetic"], scales=[0.5])
    _, columns, cells = rules_table(found)
    assert [row[0] for row in cells] == ["base model alone", "each task's own adapter", "task_arithmetic"]
    kept = {task: score.value for task, score in found.merges[-1].kept_probability.items()}
    gain = [score.value for score in found.merges[-1].recovered.values()]
    worst = min(kept, key=lambda task: kept[task])
    told = dict(zip(columns, cells[2], strict=True))
    assert told["recovered loss"] == f"{100 * np.mean(gain):.0f}%"
    assert told["probability kept"] == f"{100 * np.mean(list(kept.values())):.0f}%"
    assert told["worst task"] == f"{100 * kept[worst]:.0f}% {worst}"
    before = StudyResult.load(written / "study" / "results.json")
    singles = {one.task: one.score for one in before.singles if one.init == "LoRA"}
    assert {one.task: one.score for one in found.singles} == singles
    by_hand = measured(written / "recipe.yaml", adapters["mood"], "--task", "mood")
    assert by_hand["mood"]["value"] == pytest.approx(singles["mood"].value)


def test_rules_that_look_at_prompts_merge_for_every_caller_alike(written: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(written / "recipe.yaml")
    adapters = [written / "study" / "adapters" / "LoRA" / task for task in ("mood", "tone")]
    asked = ["--rule", "soups", "--steps", 2, "--recipe", written / "recipe.yaml", "--probe-texts", 8]
    said("merge", *adapters, *asked, "-o", tmp_path / "by-hand")
    merging = [MergeSettings(rule="soups", scales=[1.0], options={"steps": 2}, texts=8)]
    given = dict(zip(("mood", "tone"), adapters, strict=True))
    changes = {"inits": {}, "adapters": given, "merging": merging}
    run_study(recipe.model_copy(update=changes), tmp_path / "study")
    by_hand = read_adapter(tmp_path / "by-hand").updates
    (folder,) = (tmp_path / "study" / "merged").glob("*/soups")
    for path, update in read_adapter(folder).updates.items():
        torch.testing.assert_close(update.dense(), by_hand[path].dense())


def test_a_rule_that_needs_heads_is_refused(written: Path, tmp_path: Path) -> None:
    adapters = [written / "study" / "adapters" / "LoRA" / task for task in ("mood", "tone")]
    asked = ["--recipe", written / "recipe.yaml", "-o", tmp_path / "out"]
    told = refused("merge", *adapters, "--rule", "fisher", *asked)
    assert "rule 'fisher' needs heads, and the answers of mood, tone are written" in told
    told = refused("compare", *adapters, "--rule", "fisher", *asked)
    assert "rule 'fisher' needs heads" in told


def test_recovered_loss_is_the_share_of_the_gain_and_its_error_is_over_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    base, single, merged = torch.rand(3, 50, 2, generator=generator, dtype=torch.float64)
    base[:, 0] += 1
    score = recovered(base, single, merged, seed=3)

    def share(rows: Tensor) -> float:
        b, s, m = (float(one[rows, 0].sum()) for one in (base, single, merged))
        return (b - m) / (b - s)

    assert score.value == pytest.approx(share(torch.arange(50)))
    drawn = [share(torch.as_tensor(rows)) for rows in resampled_rows(50, 3)]
    assert score.stderr == pytest.approx(float(np.std(drawn, ddof=1)))
    assert recovered(base, base, merged, seed=0).value == 0  # nothing was gained, nothing can be kept


def test_kept_probability_is_of_whole_answers_and_its_error_is_over_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    single, merged = 4 * torch.rand(2, 50, 2, generator=generator, dtype=torch.float64)
    score = kept_probability(single, merged, seed=3)

    def share(rows: Tensor) -> float:
        own, kept = (float(torch.exp(-one[rows, 0]).mean()) for one in (single, merged))
        return kept / own

    assert score.value == pytest.approx(share(torch.arange(50)))
    drawn = [share(torch.as_tensor(rows)) for rows in resampled_rows(50, 3)]
    assert score.stderr == pytest.approx(float(np.std(drawn, ddof=1)))
    assert kept_probability(single + 1000, merged, seed=0).value == 0  # nothing is given, nothing can be kept


def test_the_last_tenths_of_a_nat_count() -> None:
    """A date of which a merge recovers 0.8 of the loss is hardly ever right: what is kept of its probability tells."""
    rows = torch.ones(20, 2, dtype=torch.float64) * torch.tensor([1.0, 10.0])
    base, single, merged = (rows * torch.tensor([nats, 1.0]) for nats in (15.0, 0.4, 3.3))
    assert recovered(base, single, merged, seed=0).value > 0.8
    assert kept_probability(single, merged, seed=0).value < 0.06


def test_what_has_no_probability_to_keep_is_judged_by_its_loss(written: Path) -> None:
    """Single adapters that give right answers next to nothing: named in the notes, and recovered loss is kept."""
    result = StudyResult.load(written / "study" / "results.json")
    unknown = [note for note in result.notes if f"a probability below {KNOWN}" in note]
    for one in result.merges:
        for task in one.scores:
            name = f"{task} ({one.init})"
            judged = max(one.recovered[task].value, 0.0) == pytest.approx(one.kept_probability[task].value, abs=1e-12)
            assert judged == any(name in note for note in unknown)


def test_kinds_that_need_two_models_are_refused_together(written: Path, tmp_path: Path) -> None:
    raw = yaml.safe_load((written / "recipe.yaml").read_text(encoding="utf-8"))
    raw["tasks"]["tone"] = {"source": "files", "train": "a.jsonl", "test": "b.jsonl", "text": ["text"]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    told = refused("run", tmp_path / "recipe.yaml")
    assert "the answers of mood are written, those of tone given by heads" in " ".join(told.split())


def test_a_classifier_is_no_part_of_a_comparison_of_answers(written: Path, finished: Path, tmp_path: Path) -> None:
    heads = finished / "study" / "adapters" / "LoRA" / "mood"
    told = refused(
        "compare",
        heads,
        written / "study/adapters/LoRA/tone",
        "--recipe",
        written / "recipe.yaml",
        "-o",
        tmp_path / "o",
    )
    assert "has a head, so it gives classes or numbers" in " ".join(told.split())


def test_a_task_is_read_back_as_it_was_saved(written: Path, tmp_path: Path) -> None:
    task = build_task("mood", Recipe.load(written / "recipe.yaml").task("mood"))
    task.save(tmp_path / "task")
    again = type(task).load(tmp_path / "task")
    assert (again.also, again.answering, again.digest()) == (task.also, task.answering, task.digest())
    assert task_seed(0, "mood") != task_seed(0, "tone")
