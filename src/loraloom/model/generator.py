"""One base model that writes: the loss of given answers and greedy answers, with updates switched in and out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import torch
from datasets import Dataset
from torch import Tensor
from transformers import GenerationConfig

from loraloom.adapters.update import Update
from loraloom.errors import LoraloomError
from loraloom.model.load import context_of, is_two_sided, load_generator, load_tokenizer
from loraloom.model.prompts import Asked, encode_prompts, end_token
from loraloom.model.runner import device, in_bfloat16, switched_in
from loraloom.model.tokens import IGNORED, Batch
from loraloom.results import Score
from loraloom.settings import Precision
from loraloom.tasks.answers import TokenMetric, answer_score, loss_score, probability_score
from loraloom.tasks.task import Task


@dataclass(frozen=True)
class Answered:
    """What a model made of the prompts of some rows.

    score: the task's first metric, the others in `more`; loss and probability of the right answers are always
    among them. answers: as it wrote them, a text a row. losses: (k, 2) float64, nats and tokens of the right answers,
    a row each.
    """

    score: Score
    answers: list[str]
    losses: Tensor


def answer_task(generator: Generator, updates: Mapping[str, Update], task: Task, rows: Dataset) -> Answered:
    """Return what the base model with `updates` makes of `rows` of a task of answers.

    generator: the base model.
    updates: dW = B A by module path; a module without one stays as the base has it.
    rows: a split of the task or a part of it, with the right answers as `label`.

    Raises LoraloomError where an update does not fit the base model, and where `max_length` would cut an answer.
    """
    kind = task.answering
    assert kind is not None
    encoded, expected = generator.encode(rows), list(rows["label"])
    losses = generator.losses(updates, encoded)
    answers = generator.answers(updates, encoded, kind.answer_tokens)
    more: dict[str, Score] = {
        metric: answer_score(metric, answers, expected, kind.tolerance)
        for metric in (task.metric, *task.also)
        if metric not in get_args(TokenMetric)
    }
    first = more.pop(task.metric)
    nats, tokens = losses[:, 0].tolist(), losses[:, 1].tolist()
    more |= {"loss": loss_score(nats, tokens), "probability": probability_score(nats)}
    return Answered(Score(value=first.value, stderr=first.stderr, more=more), answers, losses)


class AnswerLogits(NamedTuple):
    """What a language model says of the answers of a batch.

    rows: (b,) which of the encoded ones they are. logits: (b, L, V) float32, of the answers' tokens, on the model's
    device. tokens: (b, L) int64, the answers; -100 where there is none.
    """

    rows: Sequence[int]
    logits: Tensor
    tokens: Tensor


ANSWERS = "answers"  # of a batch: (b, L) int64, the answers' tokens, -100 where there is none


class Generator:
    """One base model that writes answers for any adapter. The model itself stays as it was loaded.

    In bfloat16, as it will be served, it takes half the memory and about half the time.
    """

    def __init__(
        self, base: str, *, max_length: int = 128, batch_size: int = 64, precision: Precision = "float32"
    ) -> None:
        self.base = base
        self.max_length = max_length
        self.batch_size = batch_size
        self.two_sided = is_two_sided(base)
        self.tokenizer = load_tokenizer(base)
        model: Any = load_generator(base)
        self.model = (
            model.to(device(), torch.bfloat16 if in_bfloat16(precision) else torch.float32).eval().requires_grad_(False)
        )
        self.context = context_of(self.model.config)
        self._options = inspect.signature(self.model.forward).parameters

    def encode(self, rows: Dataset, max_length: int | None = None) -> list[Asked]:
        """Return the token ids of prompts and answers; see `encode_prompts`. Without `label` they have no answers."""
        kept = max_length or self.max_length
        return encode_prompts(rows, self.tokenizer, kept, two_sided=self.two_sided, context=self.context)

    def running(self, updates: Mapping[str, Update]) -> AbstractContextManager[None]:
        """Have `updates` in the model while the context lasts. Raises LoraloomError where one does not fit."""
        return switched_in(self.model, updates)

    def batches(self, encoded: Sequence[Asked]) -> Iterator[tuple[Sequence[int], Batch]]:
        """Yield (row indices, model inputs with the answers as `answers`), longest first."""
        for rows, batch in self._batches(encoded):
            answers = self._padded([encoded[row].answer for row in rows], IGNORED, left=not self.two_sided)
            yield rows, {**batch, ANSWERS: answers}

    def said(self, batch: Batch, run: Callable[..., Any] | None = None) -> Tensor:
        """Return (b, L, V) float32: the logits of the answers of one of `batches`, differentiable.

        `run` stands in for a call of the model.
        """
        inputs: dict[str, Any] = {name: tensor.to(device()) for name, tensor in batch.items()}
        answers = inputs.pop(ANSWERS)
        if self.two_sided:
            whole: Tensor = (run or self.model)(**inputs, labels=answers).logits
            return whole.float()
        # the answers stand at the right end, so that the logits of no other token are computed
        longest = answers.shape[1]
        if "logits_to_keep" in self._options:
            inputs["logits_to_keep"] = longest + 1
        logits: Tensor = (run or self.model)(**inputs).logits
        return logits[:, -longest - 1 : -1].float()

    def logits(self, encoded: Sequence[Asked]) -> Iterator[AnswerLogits]:
        """Yield what the model, as it is, says of the answers, batch by batch; differentiable."""
        for rows, batch in self.batches(encoded):
            yield AnswerLogits(rows, self.said(batch), batch[ANSWERS])

    def losses(self, updates: Mapping[str, Update], encoded: Sequence[Asked]) -> Tensor:
        """Return (k, 2) float64: of every row the nats of its answer, end token included, and their number of tokens.

        Raises LoraloomError where an update does not fit the base model.
        """
        found = torch.zeros(len(encoded), 2, dtype=torch.float64)
        with torch.inference_mode(), self.running(updates):
            for rows, logits, tokens in self.logits(encoded):
                loss = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), tokens.flatten(), ignore_index=IGNORED, reduction="none"
                )
                nats = loss.view(tokens.shape).double().sum(dim=1).cpu()
                found[list(rows)] = torch.stack([nats, (tokens != IGNORED).double().sum(dim=1).cpu()], dim=1)
        return found

    def answers(self, updates: Mapping[str, Update], encoded: Sequence[Asked], tokens: int) -> list[str]:
        """Return every prompt's greedy answer of at most `tokens` tokens, special ones left out.

        A prompt that leaves no room for them in the base's context loses its beginning. Raises LoraloomError where an
        update does not fit the base model, and where no prompt would be left.
        """
        written = self.written(updates, encoded, tokens)
        return [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in written]

    def written(self, updates: Mapping[str, Update], encoded: Sequence[Asked], tokens: int) -> list[list[int]]:
        """Return the token ids of `answers`, with the end token where the model wrote it."""
        ends, room = self._end_tokens(), self._room(tokens)
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,  # some bases ask for another by themselves, which is not greedy
            eos_token_id=ends or None,
            pad_token_id=self.tokenizer.pad_token_id,
            **self._starts(),
        )
        found: list[list[int]] = [[]] * len(encoded)
        with torch.inference_mode(), self.running(updates):
            for rows, batch in self._batches([Asked(one.prompt[-room:], []) for one in encoded]):
                batch.pop("position_ids", None)  # it counts them itself
                output = self.model.generate(**batch, generation_config=config)
                new = output[:, 1:] if self.two_sided else output[:, batch["input_ids"].shape[1] :]
                for row, ids in zip(rows, new.tolist(), strict=True):
                    stop = next((place for place, token in enumerate(ids) if token in ends), len(ids) - 1)
                    found[row] = ids[: stop + 1]
        return found

    def _end_tokens(self) -> list[int]:
        """Return what ends an answer: the tokenizer's, the chat template's, those of the generation config."""
        named = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        ends = {end_token(self.tokenizer), *(named if isinstance(named, list) else [named])}
        return sorted(int(end) for end in ends if end is not None)

    def _room(self, tokens: int) -> int:
        """Return how many tokens of a prompt go before an answer of at most `tokens`; 0 for all of them."""
        if self.context is None or (self.two_sided and tokens < self.context):
            return 0
        if tokens >= self.context:
            raise LoraloomError(
                f"{self.base}: the base takes {self.context} tokens, and answers may have {tokens}",
                "lower answer_tokens in the recipe",
            )
        return self.context - tokens

    def _starts(self) -> dict[str, Any]:
        start = getattr(self.model.config, "decoder_start_token_id", None)
        return {"decoder_start_token_id": start} if self.two_sided else {}

    def _batches(self, encoded: Sequence[Asked]) -> Iterator[tuple[Sequence[int], dict[str, Tensor]]]:
        """Yield (row indices, model inputs), longest first; a decoder's rows stand at the right end."""
        whole = [one.prompt if self.two_sided else one.prompt + one.answer for one in encoded]
        order = sorted(range(len(whole)), key=lambda row: -len(whole[row]))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            chosen = [whole[row] for row in rows]
            left = not self.two_sided
            mask = self._padded([[1] * len(ids) for ids in chosen], 0, left=left)
            batch = {"input_ids": self._padded(chosen, self.tokenizer.pad_token_id, left=left), "attention_mask": mask}
            if left and "position_ids" in self._options:
                batch["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_min(0)
            yield rows, batch

    def _padded(self, lists: Sequence[Sequence[int]], pad: int, *, left: bool) -> Tensor:
        longest = max(map(len, lists))
        rows = [
            [*[pad] * (longest - len(ids)), *ids] if left else [*ids, *[pad] * (longest - len(ids))] for ids in lists
        ]
        return torch.tensor(rows, dtype=torch.int64, device=device())
