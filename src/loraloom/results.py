"""What a study measured, as one typed JSON file: written by study.py, read by report/ and by anybody."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from loraloom.errors import raise_problems, reads_file
from loraloom.files.atomic import write_text
from loraloom.files.reading import read_json
from loraloom.notebook import listing

_MOST, _WIDEST, _DEEPEST = 5_000_000, 10_000, 30  # values in a file, keys of an object, and levels
_SHOWN = 200  # inits, tasks, seeds or ways to merge
_SHOWN_MERGES = 12  # in a notebook
_LARGEST_RECIPE = 256 << 10  # characters of JSON

# bounds that no metric or response comes near, within which sums and squares are finite
_Figure = Annotated[float, Field(ge=-1e12, le=1e12)]
_Response = Annotated[float, Field(ge=0, le=1e300)]
_Count = Annotated[int, Field(ge=0, lt=2**63)]
_V = TypeVar("_V")
_List = Annotated[list[_V], FailFast()]  # of a million wrong records the first is enough

MARK = b'"loraloom-results-1"'  # by which a results file is known


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Score(_Record):
    """A metric with its standard error (bootstrap over rows), and the task's other metrics on the same rows."""

    value: _Figure
    stderr: _Figure
    more: dict[str, Score] = Field(
        {}, description="by metric, of tasks of answers; `loss` in nats a token, `probability` of a whole answer"
    )

    @model_serializer(mode="wrap")
    def _short(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in plain(self).items() if key != "more" or value}


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
    labels: Annotated[list[str] | None, FailFast()]
    rows: dict[str, _Count] = Field(description="rows of train, heldout and test")
    dropped: dict[str, _Count] = Field({}, description="rows that were left out, by why")
    majority: _Figure | None = Field(description="test metric of always naming the commonest training label")
    sha256: str
    example: str = Field(description="one training text, shortened")


class BaseScore(_Record):
    """What the base model alone scores on a task's test rows; of tasks of answers, for others need a head."""

    task: str
    score: Score


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
    output_rank: _Count
    scale: float
    aligned: bool = Field(description="heads aligned to the merged features, in closed form, without labels")
    split: Literal["heldout", "test"]
    chosen_by: Literal["labels", "agreement"] | None = Field(
        description="who chose this scale of those tried, on held-out rows: their labels, or agreement with the single "
        "adapters' answers without labels; null where the recipe has one scale, or chose nothing by this"
    )
    rule_chosen: bool = Field(False, description="true where the rule was chosen with the scale")
    scores: dict[str, Score] = Field(
        description="by task; of answers the task's metric on test rows, `kept_probability` on held-out ones, or where "
        "that is not there `recovered`"
    )
    kept_probability: dict[str, Score] = Field(
        {},
        description="by task of answers: mean probability of the whole right answer / the single adapter's; where "
        "the latter is below 0.02 on held-out rows, recovered loss, not below 0",
    )
    recovered: dict[str, Score] = Field(
        {}, description="by task of answers: (loss of base - loss) / (loss of base - loss of the single adapter)"
    )
    agreement: dict[str, _Figure | None] = Field(
        {},
        description="by task: distance from the single adapter's answers on unlabelled held-out texts; 0 is the same, "
        "1 knows nothing of the task, null of a task whose own answers are all alike",
    )
    average: Score
    resamples: _List[_Figure] = Field(
        default_factory=list,
        description="average on seeded resamples of the test rows, the same for every merge: differences are paired",
    )
    kept: float = Field(description="average / average of the single-task adapters on the same split")

    @model_validator(mode="before")
    @classmethod
    def _older(cls, given: Any) -> Any:
        """Read what older files say of labels alone."""
        if not isinstance(given, dict) or "scale_chosen_with_labels" not in given:
            return given
        rest = {key: value for key, value in given.items() if key != "scale_chosen_with_labels"}
        return {"chosen_by": "labels" if given["scale_chosen_with_labels"] is True else None, **rest}

    @property
    def distance(self) -> float | None:
        """Return the mean distance from the single adapters over the tasks that have one; None where none has."""
        known = [one for one in self.agreement.values() if one is not None]
        return sum(known) / len(known) if known else None

    @property
    def way(self) -> tuple[str, str, str]:
        """Return what tells one way to merge from another: rule, space, and options as JSON."""
        return self.rule, self.space, json.dumps(self.options, sort_keys=True)


class Interference(_Record):
    """Root-mean-square response of adapter i to the held-out inputs of task j, layer by layer."""

    init: str
    seed: int
    when: Literal["before", "after"] = Field(description="before or after training")
    quantity: Literal["A", "BA"] = Field(description="|A_i h_j|, or the whole update |B_i A_i h_j|")
    tasks: _List[str]
    layers: _List[str]
    values: _List[_List[_List[_Response]]] = Field(description="[layer][adapter i][task j]")
    ratio: _Response = Field(
        description="mean over layers and pairs i != j of response to j / response to i's own inputs"
    )


class InitFacts(_Record):
    """How an init starts and keeps A, in words and options, with its subspace diagnostics averaged over layers."""

    name: str
    description: str
    options: dict[str, Any]
    diagnostics: dict[str, float | None] = Field(default_factory=dict)
    notes: _List[str] = Field(default_factory=list)


class Answers(_Record):
    """What is written to one test prompt of a task."""

    task: str
    prompt: str
    expected: str
    base: str = Field(description="by the base model alone")
    singles: dict[str, str] = Field(description="by every task's own adapter")
    merged: str


class Transcript(_Record):
    """The same prompts, answered by the base model, by the adapters of one init and seed, and by a merge of them."""

    init: str
    seed: int
    rule: str
    scale: float
    answers: _List[Answers]


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
    seeds: _List[int]
    recipe: dict[str, Any]
    inits: _List[InitFacts]
    tasks: _List[TaskFacts]
    bases: _List[BaseScore] = Field([], description="the base model alone")
    singles: _List[SingleScore]
    merges: _List[MergeScore]
    interference: _List[Interference]
    transcript: Transcript | None = Field(None, description="of tasks of answers, the best merge on held-out rows")
    seconds: dict[str, float] = Field(
        description="wall-clock by kind of stage, as first computed; after a kill, since then"
    )
    notes: _List[str] = Field(default_factory=list, description="what a reader must know before trusting a figure")

    def save(self, path: Path, *, overwrite: bool = False) -> None:
        """Write the result as JSON; with `overwrite` it replaces an earlier one."""
        write_text(path, self.model_dump_json(indent=1) + "\n", mark=MARK, overwrite=overwrite)

    @classmethod
    @reads_file
    def load(cls, path: str | Path) -> StudyResult:
        """Read and check a results file. Raises LoraloomError naming every field that is wrong, or does not fit."""
        hint = "name a study's results.json, or run the study again"
        try:
            result = cls.model_validate(read_json(Path(path), hint, most=_MOST, widest=_WIDEST))
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, fault['loc'])) or 'file'}: {fault['msg']}" for fault in error.errors()]
        else:
            problems = _misfits(result)
        raise_problems(f"{path}: not a results file", problems, hint)
        return result

    def _repr_html_(self) -> str:
        tested = sorted((one for one in self.merges if one.split == "test"), key=lambda one: -one.average.value)
        rows = [
            (
                one.init,
                one.seed,
                one.rule,
                f"{one.scale:g}",
                "aligned" if one.aligned else "as trained",
                f"{100 * one.average.value:.1f} ±{100 * one.average.stderr:.1f}",
                f"{100 * one.kept:.1f} %",
            )
            for one in tested[:_SHOWN_MERGES]
        ]
        best = f"best {len(rows)} of {len(tested)}" if len(rows) < len(tested) else "all"
        title = f"Study {self.name} on {self.base}: {len(self.tasks)} tasks; {best} merges on test rows"
        return listing(title, ("init", "seed", "rule", "scale", "heads", "average", "kept"), rows)


# What a file says must fit together, whoever wrote it; what a study has measured does.


def _misfits(result: StudyResult) -> list[str]:
    """Return what does not fit: names without facts, figures twice, tables of other shapes, sizes beyond a report."""
    inits, tasks = [init.name for init in result.inits], [task.name for task in result.tasks]
    known: dict[str, set[Any]] = {"init": set(inits), "task": set(tasks), "seed": set(result.seeds)}
    problems = _sizes(result)
    if problems:  # nothing below is for what has no bounds
        return problems
    problems += _twice("inits", inits) + _twice("tasks", tasks) + _twice("seeds", result.seeds)
    for kind in ("bases", "singles", "merges", "interference"):
        records = getattr(result, kind)
        problems += _twice(kind, map(_identity, records))
        problems += [
            f"{kind}.{at}.{field}: {getattr(record, field)!r} is not among the {field}s"
            for at, record in enumerate(records)
            for field in known
            if getattr(record, field, None) not in {*known[field], None}
        ]
    for at, asked in enumerate(result.transcript.answers if result.transcript else ()):
        if asked.task not in tasks or asked.singles.keys() != known["task"]:
            problems.append(f"transcript.answers.{at}: not of the study's tasks")
    for at, merge in enumerate(result.merges):
        if merge.scores.keys() != known["task"]:
            problems.append(f"merges.{at}.scores: not one for each task")
        problems += [
            f"merges.{at}.{field}: not one for each task"
            for field in ("kept_probability", "recovered", "agreement")
            if getattr(merge, field) and getattr(merge, field).keys() != known["task"]
        ]
    for at, table in enumerate(result.interference):
        if sorted(table.tasks) != sorted(tasks) or table.layers != result.interference[0].layers:
            problems.append(f"interference.{at}: of other tasks or layers than the study")
        elif len(table.values) != len(table.layers) or not all(_is_square(layer, len(tasks)) for layer in table.values):
            problems.append(f"interference.{at}.values: not one for each layer, adapter and task")
    return problems


def _identity(record: BaseModel) -> str:
    """Return what no other record of its kind may share, as text: what it is of, but for its figures."""
    figures = {
        "score",
        "scores",
        "kept_probability",
        "recovered",
        "agreement",
        "average",
        "resamples",
        "kept",
        "output_rank",
        "tasks",
        "layers",
        "values",
        "ratio",
    }
    return json.dumps(record.model_dump(exclude=figures), sort_keys=True)


def _twice(what: str, names: Iterable[Any]) -> list[str]:
    return [f"{what}: {name} stands there {count} times" for name, count in Counter(names).items() if count > 1]


def _is_square(layer: list[list[float]], size: int) -> bool:
    return len(layer) == size and all(len(row) == size for row in layer)


def _sizes(result: StudyResult) -> list[str]:
    """Return what is so large, or so deep, that no page could show it."""
    free = {"recipe": result.recipe}
    free |= {f"inits.{at}.options": init.options for at, init in enumerate(result.inits)}
    free |= {f"merges.{at}.options": merge.options for at, merge in enumerate(result.merges)}
    deep = [f"{where}: nested too deeply" for where, content in free.items() if _is_deep(content)]
    if deep:
        return deep
    counts = {
        "inits": len(result.inits),
        "tasks": len(result.tasks),
        "seeds": len(result.seeds),
        "ways to merge": len({merge.way for merge in result.merges}),
    }
    problems = [f"{count} {what}: a report shows {_SHOWN} at most" for what, count in counts.items() if count > _SHOWN]
    if len(json.dumps(result.recipe)) > _LARGEST_RECIPE:
        problems.append(f"recipe: larger than {_LARGEST_RECIPE >> 10} kB, which no recipe is")
    return problems


def _is_deep(content: Any) -> bool:
    level = [content]
    for _ in range(_DEEPEST):
        level = [part for value in level for part in _parts(value)]
    return bool(level)


def _parts(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
