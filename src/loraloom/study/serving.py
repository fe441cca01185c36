"""Whether adapters do in a server what they are: PEFT's hot-swapped ones against the same updates in the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor

from loraloom.errors import LoraloomError, raise_problems
from loraloom.model.generator import Generator
from loraloom.model.load import base_folder, load_tokenizer
from loraloom.model.prompts import Asked
from loraloom.model.served import Served, fused
from loraloom.model.tokens import IGNORED
from loraloom.model.vocabulary import writing_problems
from loraloom.study.conversation import BASE, members_of, read_speakers

PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "List three fruits.",
    "Translate to German: good morning.",
)
# float32: what remains of one sum in two orders, as a share of the largest logit and of what the adapter does to it
_OF_LOGITS, _OF_EFFECT = 2e-5, 1e-3


@dataclass(frozen=True)
class ServedRow:
    """What an adapter does when it is served; all figures are largest absolute differences of logits.

    effect: from the base model; None of the base itself.
    difference: of PEFT's from those with the update in the weights. again: of PEFT's own, after all others were served.
    rounding: what `difference` may be. fine: whether it is, and `again` too.
    """

    adapter: str
    effect: float | None
    difference: float
    again: float
    rounding: float
    fine: bool


@dataclass(frozen=True)
class ServedAnswer:
    """What an adapter answered to a prompt, greedily."""

    prompt: str
    adapter: str
    answer: str


@dataclass(frozen=True)
class ServeFacts:
    """What came of a check. tokens: of answers, at which logits were compared. absent: members that were not found."""

    base: str
    chat_template: bool
    tokens: int
    adapters: list[ServedRow]
    answers: list[ServedAnswer]
    absent: list[str]
    fine: bool


def serve_check(
    folder: Path,
    base: str | None = None,
    members: Sequence[Path] = (),
    *,
    prompts: Sequence[str] = PROMPTS,
    chat: bool = True,
    tokens: int = 24,
) -> ServeFacts:
    """Load base and adapters as a server does, swap them, and compare each with the base that has it in its weights.

    folder: of the adapter, merged or not, whose greedy answers are looked at.
    base: the base model; None for the one that the adapter names.
    members: further adapters to swap with; without any those that were merged into `folder`, where they are found.
    prompts: to answer. chat: whether they go through the base's chat template. tokens: of an answer, at most.

    Raises LoraloomError for adapters that do not fit the base, or that do not write by their updates alone.
    """
    found, absent = ([], []) if members else members_of(folder)
    folders = list(dict.fromkeys([folder, *(members or found)]))
    adapters = {name: one for name, one in read_speakers(folders).items() if one.path in folders}
    base = base or next(iter(adapters.values())).base
    if not base:
        raise LoraloomError(f"{folder}: names no base model", "name it by --base BASE")
    raise_problems("cannot be checked", writing_problems(adapters.values(), load_tokenizer(base)))
    generator = Generator(base_folder(base), batch_size=1)
    chat = chat and bool(generator.tokenizer.chat_template)
    rows: list[dict[str, Any]] = [{"text_a": prompt, **({"history": None} if chat else {})} for prompt in prompts]
    encoded = generator.encode(datasets.Dataset.from_list(rows))
    model = generator.model
    with fused(model, next(iter(adapters.values()))):
        written = generator.written({}, encoded, tokens)
    asked = [Asked(one.prompt, ids) for one, ids in zip(encoded, written, strict=True)]

    whole = {BASE: _logits(generator, asked)}
    for name, adapter in adapters.items():
        with fused(model, adapter):
            whole[name] = _logits(generator, asked)
    served = Served(model, {name: one.path for name, one in adapters.items() if one.path})
    generator.model = served.model
    first, again, answers = {}, {}, []
    for name in (*adapters, BASE):
        with served.switched_to(None if name == BASE else name):
            first[name] = _logits(generator, asked)
            spoken = zip(prompts, generator.answers({}, encoded, tokens), strict=True)
            answers += [ServedAnswer(prompt, name, answer) for prompt, answer in spoken]
    for name in first:
        with served.switched_to(None if name == BASE else name):
            again[name] = _largest(_logits(generator, asked) - first[name])
    compared = [_row(name, whole, first[name], again[name]) for name in first]
    return ServeFacts(
        base, chat, sum(map(len, written)), compared, answers, absent, fine=all(one.fine for one in compared)
    )


def _logits(generator: Generator, asked: Sequence[Asked]) -> Tensor:
    """Return (tokens, V) float32: the logits of all the answers' tokens."""
    with torch.inference_mode():
        return torch.cat([one.logits[one.tokens != IGNORED].cpu() for one in generator.logits(asked)])


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def _row(name: str, whole: dict[str, Tensor], served: Tensor, again: float) -> ServedRow:
    effect = _largest(whole[name] - whole[BASE])
    difference = _largest(served - whole[name])
    rounding = _OF_LOGITS * _largest(whole[name]) + _OF_EFFECT * effect
    fine = max(difference, again) <= rounding
    return ServedRow(name, None if name == BASE else effect, difference, again, rounding, fine)
