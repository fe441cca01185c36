"""A made-up study: 2 seeds, 4 inits, 3 rules, 4 tasks; every number from a seeded generator."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from loraloom.results import (
    BaseScore,
    InitFacts,
    Interference,
    MergeScore,
    Score,
    SingleScore,
    StudyResult,
    TaskFacts,
    average,
)

INITS = {"lora": 0.66, "lora, shared seed": 0.58, "orthonormal": 0.67, "osrm": 0.74}
TASKS = ("sentiment", "grammar", "paraphrase", "topic")
RULES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("task_arithmetic", "full", {}),
    ("ties", "full", {"keep": 0.2}),
    ("ties", "core", {"keep": 0.2}),
)
SCALES = (0.25, 0.5, 1.0)
LAYERS = [f"encoder.layer.{block}.attention.self.{kind}" for block in range(3) for kind in ("query", "value")]


def make_result(
    inits: dict[str, float] | None = None,
    seeds: tuple[int, ...] = (1, 2),
    stderr: float = 0.01,
    aligned: tuple[bool, ...] = (False, True),
    noise: float = 0.01,
) -> StudyResult:
    """Build a result whose merged averages lie near the given level of each init (a fraction)."""
    draw = random.Random(7)
    inits = INITS if inits is None else inits

    def score(level: float) -> Score:
        return Score(
            value=level + draw.uniform(-noise, noise), stderr=stderr * draw.uniform(0.9, 1.1) if noise else stderr
        )

    def merge(init: str, seed: int, rule: int, aligned: bool, split: Any, scale: float, chosen: bool) -> MergeScore:
        name, space, options = RULES[rule]
        level = inits[init] - 0.02 * rule + 0.05 * aligned - 0.1 * abs(scale - 0.5)
        scores = {task: score(level) for task in TASKS}
        average = sum(item.value for item in scores.values()) / len(TASKS)
        error = sum(item.stderr**2 for item in scores.values()) ** 0.5 / len(TASKS)
        return MergeScore(
            init=init, seed=seed, rule=name, space=space, options=options, output_rank=8 * (rule + 1), scale=scale,  # type: ignore[arg-type]
            aligned=aligned, split=split, chosen_by="labels" if chosen else None, scores=scores,
            average=Score(value=average, stderr=error), kept=average / 0.84,
        )  # fmt: skip

    def interference(init: str, seed: int, when: Any, quantity: Any) -> Interference:
        level = (0.9 - inits[init]) * (2.5 if when == "after" else 1.5)
        values = [
            [
                [(1.0 if i == j else level) * draw.uniform(0.8, 1.2) for j in range(len(TASKS))]
                for i in range(len(TASKS))
            ]
            for _ in LAYERS
        ]
        pairs = [
            layer[i][j] / layer[i][i]
            for layer in values
            for i in range(len(TASKS))
            for j in range(len(TASKS))
            if i != j
        ]
        return Interference(
            init=init, seed=seed, when=when, quantity=quantity, tasks=list(TASKS), layers=LAYERS,
            values=values, ratio=sum(pairs) / len(pairs),
        )  # fmt: skip

    merges = [
        merge(init, seed, rule, heads, split, scale, split == "test")
        for init in inits
        for seed in seeds
        for rule in range(len(RULES))
        for heads in aligned
        for split, scales in (("heldout", SCALES), ("test", (0.5,)))
        for scale in scales
    ]
    return StudyResult(
        name="demo",
        created="2026-01-02T03:04:05Z",
        command="loraloom run demo.yaml",
        base="all-MiniLM-L6-v2",
        base_sha256="ab" * 32,
        content_sha256="cd" * 32,
        versions={"torch": "2.6.0", "peft": "0.18.0"},
        machine="2 cores, Linux",
        seeds=list(seeds),
        recipe={"name": "demo", "rank": 8, "inits": list(inits)},
        inits=[
            InitFacts(
                name=init,
                description=f"How {init} starts A, told in a sentence of ordinary length for the reader of the page.",
                options={"keep": "free", "rank": 8},
                diagnostics={"energy of own inputs": level, "overlap with others": None},
                notes=[f"a note on {init}"],
            )
            for init, level in inits.items()
        ],
        tasks=[
            TaskFacts(
                name=task,
                description=f"tells {task} from a sentence",
                metric="accuracy",
                labels=["no", "yes"],
                rows={"train": 400, "heldout": 100, "test": 200},
                majority=0.55 - 0.02 * index,
                sha256="ef" * 32,
                example=f"An example text of {task}, shortened …",
            )
            for index, task in enumerate(TASKS)
        ],
        singles=[
            SingleScore(init=init, seed=seed, task=task, score=score(0.84 - 0.03 * index))
            for init in inits
            for seed in seeds
            for index, task in enumerate(TASKS)
        ],
        merges=merges,
        interference=[
            interference(init, seed, when, quantity)
            for init in inits
            for seed in seeds
            for when, quantity in (("before", "A"), ("after", "A"), ("after", "BA"))
        ],
        seconds={"statistics": 3.2, "training": 81.5, "merging": 12.0},
        notes=["Every figure of this page is made up."],
    )


def make_answers(**changes: Any) -> StudyResult:
    """Build a study of tasks of answers: the base model alone, losses beside the metric, shares kept by task."""
    result = make_result(aligned=(False,), **changes)
    own = dict(zip(TASKS, (1.0, 1.1, 1.2, 1.3), strict=True))  # nats a token; the base model's are twice these

    def told(score: Score, loss: float) -> Score:
        return score.model_copy(update={"more": {"rouge_l": score, "loss": Score(value=loss, stderr=0.05)}})

    def answered(merge: MergeScore) -> MergeScore:
        shares = {task: score.value - 0.1 * at for at, (task, score) in enumerate(merge.scores.items())}
        recovered = {task: Score(value=value, stderr=0.02) for task, value in shares.items()}
        kept = {task: Score(value=value**2, stderr=0.03) for task, value in shares.items()}
        both = {"kept_probability": kept, "recovered": recovered}
        if merge.split == "heldout":
            return merge.model_copy(update={"scores": kept, "average": average(kept.values()), **both})
        scores = {task: told(score, own[task] * (2 - shares[task])) for task, score in merge.scores.items()}
        return merge.model_copy(update={"scores": scores, "kept": 0.0, **both})

    return result.model_copy(
        update={
            "tasks": [task.model_copy(update={"labels": None, "metric": "exact_match"}) for task in result.tasks],
            "bases": [
                BaseScore(task=task, score=told(Score(value=0.1 + 0.01 * at, stderr=0.01), 2 * own[task]))
                for at, task in enumerate(TASKS)
            ],
            "singles": [one.model_copy(update={"score": told(one.score, own[one.task])}) for one in result.singles],
            "merges": [answered(merge) for merge in result.merges],
        }
    )


@pytest.fixture(scope="session")
def answers() -> StudyResult:
    """Return the made-up study of tasks of answers."""
    return make_answers()


@pytest.fixture(scope="session")
def make() -> Callable[..., StudyResult]:
    """Return the builder of made-up studies."""
    return make_result


@pytest.fixture(scope="session")
def result() -> StudyResult:
    """Return the made-up study with every default."""
    return make_result()
