"""Prompts and answers as token ids: by the base's chat template where it has one; and which tokens end an answer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from loraloom.errors import LoraloomError, first_line
from loraloom.model.tokens import IGNORED

if TYPE_CHECKING:
    import datasets

Turn = Mapping[str, str]  # role and content
_AROUND = 32  # tokens at most that a template puts around an answer, whose own are no more than its bytes


class Asked(NamedTuple):
    """A prompt's token ids, and those of its answer with the end token; none where the answer is not known."""

    prompt: list[int]
    answer: list[int]

    def row(self, *, two_sided: bool) -> dict[str, list[int]]:
        """Return what a language model is trained on: the loss sees the answer's tokens alone."""
        if two_sided:
            return {"input_ids": self.prompt, "attention_mask": [1] * len(self.prompt), "labels": self.answer}
        ids = self.prompt + self.answer
        labels = [IGNORED] * len(self.prompt) + self.answer
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def encode_prompts(
    rows: datasets.Dataset, tokenizer: Any, max_length: int, *, two_sided: bool, context: int | None = None
) -> list[Asked]:
    """Return every row's prompt and answer as token ids.

    rows: with a column `text_a`; `history`, where the base's chat template is to be used if it has one: the turns
      before the prompt of a chat, which needs a template, or None for a prompt alone; and `label`, the answer, or
      without it the prompts alone.
    tokenizer: of transformers; without a chat template prompt and answer stand as they are.
    max_length: tokens kept of both together, or of each where the base is `two_sided`. What is too long loses the
      beginning of its prompt, and a warning tells how many do.
    two_sided: whether the base has an encoder for the prompt.
    context: the most tokens that the base takes, whatever `max_length` is; None where it has no bound.

    Raises LoraloomError for answers that leave no room for a prompt, and for chats where the base has no chat template,
    or one that refuses them.
    """
    _check_template(rows, tokenizer)
    asked, kept = _whole(rows, tokenizer, two_sided), min(max_length, context or max_length)
    _check_room(asked, len(asked), kept, context)
    room = [kept - (0 if two_sided else len(one.answer)) for one in asked]
    cut = [len(one.prompt) - left for one, left in zip(asked, room, strict=True) if len(one.prompt) > left]
    if cut:
        why = "the base takes no more" if kept == context else f"max_length {kept + max(cut)} would keep them whole"
        warnings.warn(f"{len(cut)} of {len(asked)} prompts lose their beginning at {kept} tokens: {why}", stacklevel=3)
    return [Asked(one.prompt[-left:], one.answer) for one, left in zip(asked, room, strict=True)]


def check_prompts(
    rows: datasets.Dataset, tokenizer: Any, max_length: int, *, two_sided: bool, context: int | None = None
) -> None:
    """Raise LoraloomError as `encode_prompts` does, at the cost of those rows alone that may be at fault.

    These are the first of every order of turns, and answers that are long in characters.
    """
    _check_template(rows, tokenizer)
    kept = min(max_length, context or max_length)
    orders, doubtful = set[tuple[str, ...] | None](), list[int]()
    histories = rows["history"] if "history" in rows.column_names else [None] * len(rows)
    for number, (answer, history) in enumerate(zip(rows["label"], histories, strict=True)):
        order = None if history is None else tuple(turn["role"] for turn in history)
        if order not in orders or len(answer.encode()) + _AROUND >= kept:
            doubtful.append(number)
        orders.add(order)
    _check_room(_whole(rows.select(doubtful), tokenizer, two_sided), len(rows), kept, context)


def _check_template(rows: datasets.Dataset, tokenizer: Any) -> None:
    """Raise where there are chats, and the base has no template for them."""
    histories = rows["history"] if "history" in rows.column_names else []
    chats = sum(history is not None for history in histories)
    if chats and not tokenizer.chat_template:
        raise LoraloomError(
            f"the base has no chat template, and {chats} of {len(rows)} rows are chats or have a system prompt",
            "name an instruct base; or give prompts alone, with `chat: off`",
        )


def _check_room(asked: Sequence[Asked], count: int, kept: int, context: int | None) -> None:
    """Raise where answers leave no room for a prompt; `asked` are some of `count` rows."""
    long = [len(one.answer) for one in asked if len(one.answer) >= kept]
    if long:
        why = "the base takes no more" if kept == context else "all that is kept of a row"
        possible = context is None or max(long) < context
        raise LoraloomError(
            f"{len(long)} of {count} answers have {kept} tokens or more, {why}",
            f"{f'raise max_length above {max(long)}, or ' if possible else ''}leave these rows out",
        )


def end_token(tokenizer: Any) -> int | None:
    """Return the token that ends an answer: the chat template's where it has one of its own, else the end of text."""
    if tokenizer.chat_template:
        last = _answer(tokenizer, [{"role": "user", "content": "x"}], "x")[-1]
        if last in tokenizer.all_special_ids:
            return last
    return None if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)


def _whole(rows: datasets.Dataset, tokenizer: Any, two_sided: bool) -> list[Asked]:
    """Return prompts and answers of any length."""
    nothing = [None] * len(rows)
    answers, histories = (rows[name] if name in rows.column_names else nothing for name in ("label", "history"))
    templated = tokenizer.chat_template and "history" in rows.column_names
    return [
        _chat(tokenizer, [*(history or []), {"role": "user", "content": prompt}], answer)
        if templated
        else _plain(tokenizer, prompt, answer, two_sided)
        for prompt, answer, history in zip(rows["text_a"], answers, histories, strict=True)
    ]


def _plain(tokenizer: Any, prompt: str, answer: str | None, two_sided: bool) -> Asked:
    asked = [int(token) for token in tokenizer(prompt)["input_ids"]]
    if not two_sided and asked and asked[-1] == tokenizer.eos_token_id:
        asked = asked[:-1]  # the answer is to follow
    return Asked(asked, [] if answer is None else _ended(tokenizer, _ids(tokenizer, answer)))


def _chat(tokenizer: Any, turns: Sequence[Turn], answer: str | None) -> Asked:
    asked = _ids(tokenizer, _templated(tokenizer, turns, add_generation_prompt=True))
    return Asked(asked, [] if answer is None else _answer(tokenizer, turns, answer))


def _answer(tokenizer: Any, turns: Sequence[Turn], answer: str) -> list[int]:
    """Return an answer's tokens as the template writes them after the prompt, to its end token."""
    before = _templated(tokenizer, turns, add_generation_prompt=True)
    whole = _templated(tokenizer, [*turns, {"role": "assistant", "content": answer}])
    return _ended(tokenizer, _ids(tokenizer, whole[len(before) :].rstrip() if whole.startswith(before) else answer))


def _ended(tokenizer: Any, tokens: list[int]) -> list[int]:
    end = tokenizer.eos_token_id
    if end is None or (tokens and tokens[-1] in tokenizer.all_special_ids):
        return tokens
    return [*tokens, int(end)]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def _templated(tokenizer: Any, turns: Sequence[Turn], **options: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template([dict(turn) for turn in turns], tokenize=False, **options))
    except Exception as error:  # templates raise errors of their own, of jinja's classes and others
        raise LoraloomError(
            f"the base's chat template refuses these turns: {first_line(error)}", "leave the system prompt out, say"
        ) from error
