"""What a study measured, as one typed JSON file: written by study.py, read by report/ and by anybody."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loraloom.errors import LoraloomError, raise_problems, reads_file
from loraloom.files.atomic import write_text

MARK = b'"loraloom-results-1"'  # by which a results file is known


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Score(_Record):
    """A metric with its standard error (bootstrap over rows)."""

    value: float
    stderr: float


def average(scores: Iterable[Score]) -> Score:
    """Return the mean over tasks; the tasks' rows are independent, so their errors add in squares."""
    found = list(scores)
    value = sum(score.value for score in found) / len(found)
    return Score(value=value, stderr=math.sqrt(sum(score.stderr**2 for score in found)) / len(found))


class TaskFacts(_Record):
    """What a task is: enough to judge its figures."""

    name: str
    description: str
    metric: str
    labels: list[str] | None
    rows: dict[str, int] = Field(description="rows of train, heldout and test")
    dropped: dict[str, int] = Field({}, description="rows that were left out, by why")
    majority: float | None = Field(description="test metric of always naming the commonest training label")
    sha256: str
    example: str = Field(description="one training text, shortened")


class SingleScore(_Record):
    """A task's own adapter on its own test rows, with its own head as trained."""

    init: str
    seed: int
    task: str
    score: Score


class MergeScore(_Record):
    """One merged adapter at one scale on every task of one split."""

    init: str
    seed: int
    rule: str
    space: Literal["full", "core", "knots"]
    options: dict[str, Any]
    output_rank: int
    scale: float
    aligned: bool = Field(description="heads aligned to the merged features, in closed form, without labels")
    split: Literal["heldout", "test"]
    scale_chosen_with_labels: bool = Field(description="true where the held-out labels chose this scale")
    scores: dict[str, Score] = Field(description="by task")
    average: Score
    resamples: list[float] = Field(
        default_factory=list,
        description="average on seeded resamples of the test rows, the same for every merge: differences are paired",
    )
    kept: float = Field(description="average / average of the single-task adapters on the same split")


class Interference(_Record):
    """Root-mean-square response of adapter i to the held-out inputs of task j, layer by layer."""

    init: str
    seed: int
    when: Literal["before", "after"] = Field(description="before or after training")
    quantity: Literal["A", "BA"] = Field(description="|A_i h_j|, or the whole update |B_i A_i h_j|")
    tasks: list[str]
    layers: list[str]
    values: list[list[list[float]]] = Field(description="[layer][adapter i][task j]")
    ratio: float = Field(description="mean over layers and pairs i != j of response to j / response to i's own inputs")


class InitFacts(_Record):
    """How an init starts and keeps A, in words and options, with its subspace diagnostics averaged over layers."""

    name: str
    description: str
    options: dict[str, Any]
    diagnostics: dict[str, float | None] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)


class StudyResult(_Record):
    """Everything the report shows and a reader needs to repeat it."""

    format: Literal["loraloom-results-1"] = "loraloom-results-1"
    name: str
    created: str = Field(description="UTC, ISO 8601")
    command: str
    base: str
    base_sha256: str = Field(description="fingerprint of the base model")
    content_sha256: str = Field(description="hash over every row of every task")
    versions: dict[str, str]
    machine: str
    seeds: list[int]
    recipe: dict[str, Any]
    inits: list[InitFacts]
    tasks: list[TaskFacts]
    singles: list[SingleScore]
    merges: list[MergeScore]
    interference: list[Interference]
    seconds: dict[str, float] = Field(
        description="wall-clock by kind of stage, as first computed; after a kill, since then"
    )
    notes: list[str] = Field(default_factory=list, description="what a reader must know before trusting a figure")

    def save(self, path: Path, *, overwrite: bool = False) -> None:
        """Write the result as JSON; with `overwrite` it replaces an earlier one."""
        write_text(path, self.model_dump_json(indent=1) + "\n", mark=MARK, overwrite=overwrite)

    @classmethod
    @reads_file
    def load(cls, path: Path) -> StudyResult:
        """Read and check a results file. Raises LoraloomError naming every field that is wrong."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise LoraloomError(f"{path}: cannot be read: {error.strerror}", "name a study's results.json") from error
        except ValidationError as error:
            faults = [f"{'.'.join(map(str, fault['loc'])) or 'file'}: {fault['msg']}" for fault in error.errors()]
            more = [f"and {len(faults) - 5} more"] if faults[5:] else []
            raise_problems(f"{path}: not a results file", [*faults[:5], *more], "run the study again")
            raise
