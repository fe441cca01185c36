"""Options that travel together, typed and checked: of adapters, statistics, training and alignment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loraloom.errors import raise_problems

Tokens = Literal["prompt", "answer", "both"]  # of rows of prompts and answers, which tokens statistics count
Kind = Literal["token", "sample"]  # what a row of statistics is: a token, or the mean over a sample's tokens
Precision = Literal["auto", "float32", "bfloat16"]  # auto: bfloat16 where a GPU has it
DISTIL_TEXTS = 1000  # unlabelled texts a task at most by which a merge is trained
AGREEMENT_TEXTS = 32  # unlabelled texts a task by which rule and scale are chosen; docs/agreement.md


class Settings(BaseModel):
    """Options that refuse unknown names and never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True)


S = TypeVar("S", bound=Settings)
_SHOWN = 60  # characters or digits of a wrong value


def checked(schema: type[S], what: str, given: Mapping[str, Any]) -> S:
    """Return the options in `given` as `schema`. Raises LoraloomError, `what` first, that tells every wrong one."""
    try:
        return schema.model_validate(dict(given))
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, fault['loc']))}: {explained(dict(fault))}" for fault in error.errors()]
        raise_problems(what, [problem.removeprefix(": ") for problem in problems])
        raise


def explained(fault: Mapping[str, Any]) -> str:
    """Return what a pydantic fault says is wrong, with the value that was given."""
    message, given = str(fault["msg"]).removeprefix("Value error, "), fault.get("input")
    if fault["type"] == "string_type" and isinstance(given, bool):
        message += "; put it in quotes: YAML reads yes, no, on and off as true and false"
    if isinstance(given, str):
        given = given[:_SHOWN]
    elif isinstance(given, int) and abs(given) > 10**_SHOWN:
        given = None  # Python refuses to print one of thousands of digits
    shown = f" (given {given!r})" if isinstance(given, str | int | float) and given != "" else ""
    return message + shown


class LoraSettings(Settings):
    """The shape of every adapter, in PEFT's terms."""

    rank: int = Field(8, ge=1, description="r of every target layer")
    alpha: float = Field(16, gt=0, description="lora_alpha: the update is alpha / r times B A")
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[str] | str = Field(
        ["query", "value"], min_length=1, description="path endings, or one regular expression"
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(r)")
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}

    def for_peft(self) -> dict[str, Any]:
        """Return these settings as arguments of PEFT's LoraConfig."""
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": self.targets,
            "use_rslora": self.rslora,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
        }


class StatisticsSettings(Settings):
    """What is seen of each task's unlabelled training texts before training."""

    texts: int = Field(100, ge=1, description="unlabelled training texts a task")
    kind: Kind = Field("token", description="a row a token, or a row the mean of a text's tokens")
    tokens: Tokens = Field("prompt", description="of tasks of answers, which tokens count: prompt, answer, or both")
    max_length: int = Field(128, ge=2)
    batch_size: int = Field(32, ge=1)
    atlas_texts: int = Field(300, ge=1, description="texts of generic English, for inits that stay off an atlas")


class TrainingSettings(Settings):
    """How one adapter is trained; the paper's settings are the defaults but for the epochs' early stopping."""

    epochs: int = Field(3, ge=1)
    learning_rate: float = Field(4e-4, gt=0)
    batch_size: int = Field(32, ge=1, description="rows of a batch, shared out where several processes train")
    accumulate: int = Field(1, ge=1, description="batches an optimiser step")
    max_length: int = Field(128, ge=2, description="word pieces kept of a text")
    warmup: float = Field(0.06, ge=0, lt=1, description="share of the steps")
    weight_decay: float = Field(0.0, ge=0)
    patience: int | None = Field(None, ge=1, description="epochs without a better held-out metric before it stops")
    eval_batch_size: int = Field(64, ge=1, description="rows that a process measures at once")
    precision: Precision = Field("auto", description="auto: bfloat16 where a GPU has it")
    gradient_checkpointing: bool = False


class EvaluationSettings(Settings):
    """How models are run when they are measured, and by how many texts merges are compared with the single models."""

    precision: Precision = Field("auto", description="of a base that writes; auto: bfloat16 where a GPU has it")
    agreement: int = Field(
        AGREEMENT_TEXTS,
        ge=0,
        description="unlabelled held-out texts a task by which every merge's distance from the single models is told",
    )


class AlignmentSettings(Settings):
    """Label-free alignment of the heads to the merged features."""

    texts: int = Field(200, ge=2, description="unlabelled training texts a task")
    ridge: float = Field(1.0, gt=0, description="e as a share of the mean diagonal of C")
