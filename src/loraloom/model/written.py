"""What one model writes to prompts, and how far others are from it there, token by token (see distances.py)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraloom.adapters.update import Update
from loraloom.model.distances import SILENT, likeliest, log_chances, words_apart
from loraloom.model.generator import Generator
from loraloom.model.prompts import Asked
from loraloom.model.tokens import IGNORED

Updates = Mapping[str, Update]  # by module path


@dataclass(frozen=True)
class Written:
    """What a model writes to prompts, greedily, and how likely it finds every word of a vocabulary at each token.

    Of each token's distribution the likeliest words are kept, and the rest as one.

    lengths: (prompts,) int64, the tokens of every answer. answers: (tokens,) int64, those of all answers, in order.
    words: (tokens, words) int64, those kept of each. own: (tokens, words + 1) float64, the logs of their chances and of
    the rest's. base: float64, how far the base model is from it, nats: (tokens,), or their mean (1,).
    """

    lengths: Tensor
    answers: Tensor
    words: Tensor
    own: Tensor
    base: Tensor

    @classmethod
    def by(cls, generator: Generator, updates: Updates, prompts: Sequence[Asked], answer_tokens: int) -> Written:
        """Let the model with `updates` write answers of at most so many tokens."""
        answers = generator.written(updates, prompts, answer_tokens)
        lengths = torch.tensor([len(ids) for ids in answers])
        told = torch.tensor([token for ids in answers for token in ids])
        asked = answered(generator, prompts, answers)
        words, own = _chances(generator, updates, asked)
        return cls(lengths, told, words, own, apart(generator, {}, asked, words, own))

    @property
    def unit(self) -> float:
        """Return how far the base model is from it, nats a token."""
        return float(self.base.mean())

    @property
    def alike(self) -> bool:
        """Tell whether the model writes as the base does."""
        return self.unit <= SILENT

    def asked(self, generator: Generator, prompts: Sequence[Asked]) -> list[Asked]:
        """Return its prompts with its answers."""
        answers = torch.split(self.answers, self.lengths.tolist())
        return answered(generator, prompts, [ids.tolist() for ids in answers])

    def distance(self, generator: Generator, updates: Updates, asked: Sequence[Asked]) -> float:
        """Return how far the model with `updates` is from it a token, in units of the base's; `asked`: see there."""
        return float(apart(generator, updates, asked, self.words, self.own).mean()) / self.unit


def answered(generator: Generator, prompts: Sequence[Asked], answers: Sequence[list[int]]) -> list[Asked]:
    """Return prompts with these answers; one that leaves no room in the base's context loses its beginning."""
    context = None if generator.two_sided else generator.context
    return [
        Asked(one.prompt if context is None else one.prompt[-(context - len(ids)) :], ids)
        for one, ids in zip(prompts, answers, strict=True)
    ]


def apart(generator: Generator, updates: Updates, asked: Sequence[Asked], words: Tensor, own: Tensor) -> Tensor:
    """Return (tokens,) float64: how far the model with `updates` is at each answer's token from `own`, nats.

    words, own: of the answers in `asked`, as `Written` has them.
    """
    return words_apart(own, _chances(generator, updates, asked, words)[1])


def _chances(
    generator: Generator, updates: Updates, asked: Sequence[Asked], words: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return words and log chances, as `Written` has them, of the model with `updates`; its likeliest without any."""
    lengths = [len(one.answer) for one in asked]
    starts, places = [0, *itertools.accumulate(lengths)], list[Tensor]()
    chosen, found = list[Tensor](), list[Tensor]()
    with torch.inference_mode(), generator.running(updates):
        for rows, logits, tokens in generator.logits(asked):
            place = torch.cat([torch.arange(starts[row], starts[row + 1]) for row in rows])
            said = logits[tokens != IGNORED]
            picked = likeliest(said) if words is None else words[place].to(said.device)
            found.append(log_chances(said, picked).double().cpu())
            chosen.append(picked.cpu())
            places.append(place)
    order = torch.cat(places).argsort()
    return torch.cat(chosen)[order], torch.cat(found)[order]
