"""The YAML recipe as a typed schema: every option, its default, its meaning."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from loraloom.adapters.bases import PACKAGED, public_name
from loraloom.errors import LoraloomError, did_you_mean, raise_problems, reads_file
from loraloom.files.hashing import text_sha256
from loraloom.files.reading import read_yaml
from loraloom.merging.registry import get_rule
from loraloom.settings import (
    AlignmentSettings,
    EvaluationSettings,
    LoraSettings,
    Settings,
    StatisticsSettings,
    TrainingSettings,
    explained,
)
from loraloom.starts.options import DEFAULT, StartOptions
from loraloom.study.entries import AUTO, FEWEST, MergeSettings, own_texts, ways_of
from loraloom.tasks.builtin import BuiltinTask
from loraloom.tasks.files import FileTask
from loraloom.tasks.glue import GlueTask
from loraloom.tasks.prompts import PromptTask
from loraloom.tasks.sources import SUFFIXES
from loraloom.tasks.splits import SplitTask
from loraloom.tasks.task import Task, TaskOptions

_PLACES = ("path", "train", "heldout", "test")  # options of tasks that name files
_LONGEST_NAME = 80  # bytes; a stage's folder has names of an init and a task, and 255 in all


class InitSettings(StartOptions):
    """How the adapters of a study start: the options of a start, what to stay off, and the seeds."""

    off: Literal["atlas", "others"] = Field(
        description="whose loud directions to stay off: those of generic text, or of the other tasks; by rule without"
    )
    seed: Literal["task", "shared"] = Field("task", description="a seed of its own for every task, or one for all")
    description: str = ""

    @property
    def start(self) -> StartOptions:
        """Return what a start is asked for, without the rest."""
        return StartOptions(**{name: getattr(self, name) for name in StartOptions.model_fields})

    @model_validator(mode="before")
    @classmethod
    def _off_as_meant(cls, given: Any) -> Any:
        """Fill in whose directions the rule is meant to stay off: published rules look at the other tasks."""
        if not isinstance(given, dict):
            return given
        return {"off": "atlas" if given.get("rule", DEFAULT) == "apart" else "others", **given}


TaskSettings = Annotated[BuiltinTask | GlueTask | FileTask | PromptTask, Field(discriminator="source")]
_SOURCES: dict[str, type[TaskOptions]] = {
    "builtin": BuiltinTask,
    "glue": GlueTask,
    "files": FileTask,
    "prompts": PromptTask,
}


def slug(name: str) -> str:
    """Return `name` as one file name: letters, digits, `_`, `.`, `+` and `-` stay, anything else becomes `-`.

    A long one is cut, and ends in a hash of the whole.
    """
    found = re.sub(r"[^\w.+]+", "-", name).strip(".-") or "-"
    if len(found.encode()) <= _LONGEST_NAME:
        return found
    return found.encode()[: _LONGEST_NAME - 13].decode(errors="ignore") + "-" + text_sha256(name)[:12]


def _task_name(name: str) -> str:
    # heads and rows are files of this name, and error messages of the tasks say it
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise ValueError(f"a task's name is letters, digits, `_`, `.`, `+` and `-`, not {name!r}")
    if len(name.encode()) > _LONGEST_NAME:
        raise ValueError(f"a task's name is at most {_LONGEST_NAME} bytes, this one {len(name.encode())}")
    return name


class Recipe(Settings):
    """tasks x inits x seeds x rules x scales on one base model; or finished adapters in place of the inits."""

    name: str
    base: str = Field(description="hub name or local folder of the base model; `demo` and `smollm2` come as packages")
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field([0], min_length=1)
    tasks: dict[Annotated[str, AfterValidator(_task_name)], TaskSettings] = Field(min_length=2)
    lora: LoraSettings = LoraSettings()
    statistics: StatisticsSettings = StatisticsSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    inits: dict[str, InitSettings] = Field({})
    adapters: dict[str, Path] = Field({}, description="finished adapter folders by task, in place of inits")
    merging: list[MergeSettings] = Field([])
    alignment: AlignmentSettings = AlignmentSettings()
    report_to: list[str] = Field([], description="where training's curves go too: tensorboard, wandb, mlflow ...")
    _written: dict[str, str] = PrivateAttr({})  # paths as `resolved` found them written

    @model_validator(mode="after")
    def _distinct(self) -> Recipe:
        problems = [
            f"{what}: {names} would share one folder"
            for what, names in (
                ("tasks", _same_folder(self.tasks)),
                ("inits", _same_folder(self.inits)),
            )
            if names
        ]
        if len(set(self.seeds)) < len(self.seeds):
            problems.append("seeds: the same seed twice")
        if self.adapters and self.inits:
            problems.append("adapters are finished and inits are trained: give one of the two")
        if self.adapters and set(self.adapters) != set(self.tasks):
            odd = sorted(set(self.adapters) ^ set(self.tasks))
            problems.append(f"adapters: one for each task, no other; look at {', '.join(odd)}")
        written = [name for name, task in self.tasks.items() if task.generates(name)]
        if 0 < len(written) < len(self.tasks):
            rest = ", ".join(name for name in self.tasks if name not in written)
            problems.append(
                f"tasks: the answers of {', '.join(written)} are written, those of {rest} given by heads: one model "
                "cannot do both, so write a recipe for each kind"
            )
        if self.statistics.tokens != "prompt" and not self.generates:
            counted = f"statistics.tokens: {self.statistics.tokens!r} is for answers that are written"
            problems.append(f"{counted}, and those of these tasks are given by heads")
        problems += self._merging_problems()
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _merging_problems(self) -> list[str]:
        known = [entry for entry in self.merging if entry.rule != AUTO]
        headed = [entry.rule for entry in known if self.generates and get_rule(entry.rule).heads]
        problems = [f"merging: {rule} needs heads, and these tasks' answers are written" for rule in headed]
        alike = [
            (one, other) for at, one in enumerate(self.merging) for other in self.merging[:at] if one.merges_as(other)
        ]
        if any(one.auto == other.auto for one, other in alike):
            problems.append("merging: the same rule with the same options twice: give one entry all scales")
        elif any(one.texts != other.texts for one, other in alike):
            problems.append("merging: entries that differ in `scales` alone need the same `texts`")
        texts = self.evaluation.agreement
        if any(entry.auto for entry in self.merging) and texts < FEWEST:
            auto = f"`auto` chooses by agreement on a few texts, and evaluation.agreement is {texts}"
            problems.append(f"merging: {auto}: leave it out, or set it to {FEWEST} or more")
        return problems

    @property
    def ways(self) -> list[MergeSettings]:
        """Return every way to merge that an entry of `merging` tries, once, with all its scales."""
        return ways_of(self.merging)

    @classmethod
    @reads_file
    def load(cls, path: str | Path) -> Recipe:
        """Read a YAML recipe; relative paths in it start at its folder.

        Raises LoraloomError that names every wrong key and value, with the nearest known key.
        """
        path = Path(path)
        raw = read_yaml(path, "name a recipe, as in recipes/, and mend what it tells")
        recipe = cls.parse(raw, str(path))
        try:
            return recipe.resolved(path.parent)
        except (OSError, RuntimeError, ValueError) as error:  # a home that nobody has, a loop of links, a NUL
            raise LoraloomError(f"{path}: a path in it is none: {error}", "name a file, a folder or the hub") from error

    @classmethod
    def parse(cls, raw: Any, origin: str) -> Recipe:
        """Return the recipe in `raw`, a mapping; `origin` is named in errors."""
        if not isinstance(raw, dict):
            raise LoraloomError(f"{origin}: a recipe is a mapping of options", "see recipes/ for examples")
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise_problems(origin, [_describe(cls, dict(fault)) for fault in error.errors()])
            raise

    @property
    def generates(self) -> bool:
        """Tell whether the answers of its tasks are written, not given by heads."""
        return any(task.generates(name) for name, task in self.tasks.items())

    def check_complete(self) -> None:
        """Raise LoraloomError where this is no whole study: tasks and base alone are enough to look at texts."""
        problems = [] if self.inits or self.adapters else ["inits: none, and no adapters: there is nothing to merge"]
        problems += [] if self.merging else ["merging: no rule"]
        raise_problems(self.name, problems, "see recipes/ for examples")

    def probe_texts(self, rule: str, options: Mapping[str, Any]) -> int:
        """Return how many texts a task `rule` may look at: as `merging` has it, best with these options."""
        entries = [entry for entry in self.merging if entry.rule == rule != AUTO]
        alike = [entry for entry in entries if entry.filled() == get_rule(rule).check(options)[0]]
        return next((entry.texts for entry in [*alike, *entries]), own_texts(rule))

    def task(self, name: str, of: str = "") -> TaskSettings:
        """Return the settings of one task. Raises LoraloomError where there is none; `of` says whose task it is."""
        if name not in self.tasks:
            missing = f"the recipe has no task {name!r}: {did_you_mean(name, self.tasks)}"
            raise LoraloomError(f"{of}: {missing}" if of else missing, "name folders and tasks alike" if of else "")
        return self.tasks[name]

    def sample_problems(self, task: Task) -> list[str]:
        """Return every sample of a task's training texts that this asks for and that is larger than what there is."""
        asked = {"statistics.texts": self.statistics.texts}
        if not self.generates:
            asked["alignment.texts"] = self.alignment.texts
        return [
            f"task {task.name!r}: {option} asks for {count} texts, {len(task.train)} training rows are left"
            for option, count in asked.items()
            if count > len(task.train)
        ]

    def training_of(self, task: str) -> TrainingSettings:
        """Return how one task is trained: `training`, with the task's own epochs where it has them."""
        epochs = self.tasks[task].epochs
        return self.training.model_copy(update={"epochs": epochs} if epochs else {})

    def resolved(self, folder: Path) -> Recipe:
        """Return the recipe with its relative local paths taken from `folder`.

        A data source is a path where it ends like a data file or lies in `folder`, else a name on the hub. The base is
        a path where it starts with `.` or `~`, or is a folder in `folder`.
        """
        written = dict(self._written)

        def place(path: str | Path) -> Path:
            found = (folder / Path(path).expanduser()).resolve()
            written[str(found)] = str(path)
            return found

        tasks: dict[str, Any] = {}
        for name, task in self.tasks.items():
            changes: dict[str, Any] = {}
            if isinstance(task, GlueTask) and task.path is not None:
                changes["path"] = place(task.path)
            if isinstance(task, SplitTask):
                for split, source in task.sources.items():
                    if source.lower().endswith(SUFFIXES) or os.path.exists(folder / Path(source).expanduser()):
                        changes[split] = str(place(source))
            tasks[name] = task.model_copy(update=changes)
        base = self.base
        if base.startswith((".", "~")) or (base not in PACKAGED and os.path.isdir(folder / base)):
            base = str(place(base))
        adapters = {name: place(path) for name, path in self.adapters.items()}
        resolved = self.model_copy(update={"tasks": tasks, "base": base, "adapters": adapters})
        resolved._written = written
        return resolved

    def published(self) -> dict[str, Any]:
        """Return the recipe as plain values for everybody to read: paths as they were written, but never absolute.

        Of a path that is absolute its last part is left: the rest tells of somebody's disk.
        """
        plain = self.model_dump(mode="json")
        plain["base"] = self._shown(self.base)
        plain["adapters"] = {name: self._shown(path) for name, path in self.adapters.items()}
        for task in plain["tasks"].values():
            task |= {option: self._shown(task[option]) for option in _PLACES if task.get(option)}
        return plain

    def _shown(self, path: str | Path) -> str:
        return public_name(self._written.get(str(path), str(path)))


def _same_folder(names: Iterable[str]) -> str:
    """Return the names of which two make one file name, on a disk that ignores case."""
    folders: dict[str, list[str]] = {}
    for name in names:
        folders.setdefault(slug(name).casefold(), []).append(repr(name))
    return "; ".join(" and ".join(same) for same in folders.values() if len(same) > 1)


def _describe(schema: type[BaseModel], fault: dict[str, Any]) -> str:
    """Return one line for a pydantic fault: where, what, and the nearest known key for an unknown one."""
    loc, kind = list(fault["loc"]), str(fault["type"])
    options: type[BaseModel] = schema
    if loc and loc[0] == "tasks" and len(loc) > 2 and loc[2] in _SOURCES:
        options = _SOURCES[str(loc.pop(2))]
    elif len(loc) > 1 and loc[0] in _SECTIONS:
        options = _SECTIONS[str(loc[0])]
    if loc[:1] == ["merging"] and loc[2:3] == ["scales"]:
        del loc[3:4]  # which of the two things it may be
    where = ".".join(str(part) for part in loc if part != "[key]")
    if kind == "extra_forbidden":
        new = _RENAMED.get(where)
        return f"{where}: unknown option; " + (
            f"did you mean {new!r}?" if new else did_you_mean(str(loc[-1]), options.model_fields)
        )
    if kind == "union_tag_not_found":
        return f"{where}: needs `source`: {', '.join(_SOURCES)}"
    if kind == "union_tag_invalid":
        source = str(fault["ctx"]["tag"])
        return f"{where}.source: {source!r} is unknown; {did_you_mean(source, _SOURCES)}"
    return f"{where}: {explained(fault)}".removeprefix(": ")


_RENAMED = {"statistics.rows": "kind"}  # what older recipes say

_SECTIONS: dict[str, type[BaseModel]] = {
    "lora": LoraSettings,
    "statistics": StatisticsSettings,
    "training": TrainingSettings,
    "evaluation": EvaluationSettings,
    "inits": InitSettings,
    "merging": MergeSettings,
    "alignment": AlignmentSettings,
}
