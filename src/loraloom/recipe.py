"""The YAML recipe as a typed schema: every option, its default, its meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from loraloom.errors import LoraloomError, did_you_mean, raise_problems
from loraloom.merging.rules import get_rule
from loraloom.subspace import RULES as SUBSPACE_RULES


class Settings(BaseModel):
    """Options that refuse unknown names and never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LoraSettings(Settings):
    """The shape of every adapter, in PEFT's terms."""

    rank: int = Field(8, ge=1, description="r of every target layer")
    alpha: float = Field(16, gt=0, description="lora_alpha: the update is alpha / r times B A")
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[str] | str = Field(["query", "value"], description="path endings, or one regular expression")
    rslora: bool = Field(False, description="scale by alpha / sqrt(r)")
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}


class StatisticsSettings(Settings):
    """What is seen of each task's unlabelled training texts before training."""

    texts: int = Field(100, ge=1, description="unlabelled training texts a task")
    rows: Literal["token", "sample"] = Field("token", description="a row a token, or a row the mean of a text's tokens")
    max_length: int = Field(128, ge=2)
    batch_size: int = Field(32, ge=1)


class TrainingSettings(Settings):
    """How one adapter is trained; the paper's settings are the defaults but for the epochs' early stopping."""

    epochs: int = Field(3, ge=1)
    learning_rate: float = Field(4e-4, gt=0)
    batch_size: int = Field(32, ge=1)
    accumulate: int = Field(1, ge=1, description="batches an optimiser step")
    max_length: int = Field(128, ge=2, description="word pieces kept of a text")
    warmup: float = Field(0.06, ge=0, lt=1, description="share of the steps")
    weight_decay: float = Field(0.0, ge=0)
    patience: int | None = Field(None, ge=1, description="epochs without a better held-out metric before it stops")
    eval_batch_size: int = Field(64, ge=1)
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 where a GPU has it")
    gradient_checkpointing: bool = False


class InitSettings(Settings):
    """How A starts and how it is kept."""

    rule: str = Field("covariance", description="covariance (the paper), complement, mean, random, shared or default")
    keep: Literal["free", "frozen", "projected"] = Field(
        "free", description="train A, fix it, or keep it off the others' loud directions after every optimiser step"
    )
    scale: Literal["unit", "response"] = Field(
        "unit", description="leave A as the rule gives it, or match the response of PEFT's default A layer by layer"
    )
    energy_share: float = Field(0.5, ge=0, lt=1, description="share of the others' energy that `avoid` holds")
    seed: Literal["task", "shared"] = Field("task", description="a seed of its own for every task, or one for all")
    description: str = ""

    @field_validator("rule")
    @classmethod
    def _known_rule(cls, rule: str) -> str:
        if rule not in SUBSPACE_RULES:
            raise ValueError(f"subspace rule {rule!r} is unknown; {did_you_mean(rule, SUBSPACE_RULES)}")
        return rule


class MergeSettings(Settings):
    """One merging rule over a few scales."""

    rule: str
    scales: list[float] = Field(min_length=1)
    options: dict[str, Any] = {}

    @model_validator(mode="after")
    def _known_options(self) -> MergeSettings:
        try:
            _, problems = get_rule(self.rule).check(self.options)
        except LoraloomError as error:
            problems = [f"{error.message}: {error.hint}"]
        if problems:
            raise ValueError("; ".join(problems))
        return self


class AlignmentSettings(Settings):
    """Label-free alignment of the heads to the merged features."""

    texts: int = Field(200, ge=2, description="unlabelled training texts a task")
    ridge: float = Field(0.1, gt=0, description="e as a share of the mean diagonal of C")


class BuiltinTask(Settings):
    """A task of the embedded default, made from the documentation of installed packages."""

    source: Literal["builtin"]
    train_rows: int = Field(600, ge=2)
    heldout_rows: int = Field(150, ge=2)
    test_rows: int = Field(300, ge=2)


class GlueTask(Settings):
    """One of the eight GLUE tasks, from a folder of JSONL or from the hub."""

    source: Literal["glue"]
    path: Path | None = Field(None, description="folder with <task>/{train,dev}.jsonl; the hub's nyu-mll/glue without")
    train_rows: int | None = Field(None, ge=2)
    heldout_rows: int = Field(200, ge=2)
    test_rows: int | None = Field(None, ge=2)


class FileTask(Settings):
    """A task from JSONL, CSV, TSV or Parquet files, or `org/name` on the hub."""

    source: Literal["files"]
    train: str
    test: str
    heldout: str | None = Field(None, description="cut from the training rows where absent")
    text: list[str] = Field(min_length=1, max_length=2, description="one or two text columns")
    label: str = Field("label", description="label column")
    labels: list[str] | None = Field(None, description="label values in order; sorted where absent")
    metric: Literal["accuracy", "matthews", "accuracy_f1", "pearson_spearman"] | None = None
    regression: bool = False
    train_rows: int | None = Field(None, ge=2)
    heldout_rows: int = Field(200, ge=2)
    test_rows: int | None = Field(None, ge=2)
    description: str = ""


TaskSettings = Annotated[BuiltinTask | GlueTask | FileTask, Field(discriminator="source")]


class Recipe(Settings):
    """tasks x inits x seeds x rules x scales on one base model."""

    name: str
    base: str = Field(description="hub name or local folder of the base model; `demo` is the embedded default")
    seeds: list[int] = Field([0], min_length=1)
    tasks: dict[str, TaskSettings] = Field(min_length=2)
    lora: LoraSettings = LoraSettings()
    statistics: StatisticsSettings = StatisticsSettings()
    training: TrainingSettings = TrainingSettings()
    inits: dict[str, InitSettings] = Field(min_length=1)
    merging: list[MergeSettings] = Field(min_length=1)
    alignment: AlignmentSettings = AlignmentSettings()

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a YAML recipe; relative paths in it start at its folder.

        Raises LoraloomError that names every wrong key and value, with the nearest known key.
        """
        path = Path(path)
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise LoraloomError(f"{path}: cannot be read: {error.strerror}", "name a recipe, as in recipes/") from error
        except yaml.YAMLError as error:
            raise LoraloomError(f"{path}: not valid YAML: {error}", "mend the line that it names") from error
        return cls.parse(raw, str(path)).resolved(path.parent)

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

    def resolved(self, folder: Path) -> Recipe:
        """Return the recipe with its relative local paths taken from `folder`."""
        tasks: dict[str, Any] = {}
        for name, task in self.tasks.items():
            changes: dict[str, Any] = {}
            if isinstance(task, GlueTask) and task.path is not None:
                changes["path"] = (folder / task.path).resolve()
            if isinstance(task, FileTask):
                for key in ("train", "test", "heldout"):
                    value = getattr(task, key)
                    if value is not None and (folder / value).exists():
                        changes[key] = str((folder / value).resolve())
            tasks[name] = task.model_copy(update=changes)
        base = self.base
        if base.startswith((".", "~")) or (folder / base).is_dir():
            base = str((folder / Path(base).expanduser()).resolve())
        return self.model_copy(update={"tasks": tasks, "base": base})


def _describe(schema: type[BaseModel], fault: dict[str, Any]) -> str:
    """Return one line for a pydantic fault: where, what, and the nearest known key for an unknown one."""
    place = [part for part in fault["loc"] if part not in ("builtin", "glue", "files")]
    where = ".".join(map(str, place))
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown option; {did_you_mean(str(place[-1]), _options_beside(schema, fault['loc']))}"
    message = str(fault["msg"]).removeprefix("Value error, ")
    given = fault.get("input")
    shown = f" (given {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{where}: {message}{shown}"


def _options_beside(schema: type[BaseModel], loc: tuple[str | int, ...]) -> list[str]:
    """Return the option names allowed where the last part of `loc` stands."""
    sections: dict[str, type[BaseModel]] = {
        "lora": LoraSettings,
        "statistics": StatisticsSettings,
        "training": TrainingSettings,
        "inits": InitSettings,
        "merging": MergeSettings,
        "alignment": AlignmentSettings,
        "builtin": BuiltinTask,
        "glue": GlueTask,
        "files": FileTask,
    }
    inner = [sections[str(part)] for part in loc[:-1] if str(part) in sections]
    return list((inner[-1] if inner else schema).model_fields)
