"""A task of prompts and answers from the user's own rows: columns, chats as trainers write them, or a template."""

from __future__ import annotations

import reprlib
import string
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import datasets
from pydantic import Field, field_validator, model_validator

from loraloom.errors import LoraloomError, first_few, raise_problems
from loraloom.tasks.answers import AnswerMetric, TokenMetric, answer_problems
from loraloom.tasks.generate import ANSWER_TOKENS, Generate
from loraloom.tasks.sources import Table, check_unicode, read_table, too_few
from loraloom.tasks.splits import Checked, Row, SplitTask, parted, read_tables
from loraloom.tasks.task import Task

HISTORY = {"role": datasets.Value("string"), "content": datasets.Value("string")}  # a turn before the prompt
ALPACA = ("instruction", "input", "output", "system", "history")  # the first and `output` must be there
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}

Form = Literal["columns", "messages", "alpaca", "template"]  # how the rows of a table are written
Turn = dict[str, str]  # role and content


class PromptTask(SplitTask):
    """Prompts and answers from JSONL, JSON, CSV, TSV or Parquet files, or `org/name` on the hub."""

    source: Literal["prompts"] = "prompts"
    prompt: str = Field("prompt", description="prompt column: a text, or a list of turns")
    answer: str = Field("answer", description="answer column: a text or a number, or a list with the assistant's turn")
    messages: str = Field("messages", description="column of whole chats, read where there is no prompt column")
    template: str | None = Field(None, description="the prompt, columns in braces: `Question: {question}`")
    system: str | None = Field(None, description="system prompt of rows that bring none")
    chat: Literal["auto", "off"] = Field("auto", description="off: the prompt as it stands, without chat template")
    metric: list[AnswerMetric] = Field(
        ["exact_match", "loss"], min_length=1, description="the first is the one of tables"
    )
    answer_tokens: int = Field(ANSWER_TOKENS, ge=1, description="the most that a model may write")
    tolerance: float = Field(1e-6, ge=0, description="of numbers in answers, for number_match")

    @field_validator("metric", mode="before")
    @classmethod
    def _one_metric(cls, given: Any) -> Any:
        return [given] if isinstance(given, str) else given

    @field_validator("chat", mode="before")
    @classmethod
    def _off(cls, given: Any) -> Any:
        return "off" if given is False else given  # YAML reads off as false

    @model_validator(mode="after")
    def _fit(self) -> PromptTask:
        problems = []
        if len(set(self.metric)) < len(self.metric):
            problems.append(f"metric: the same twice in {self.metric}")
        if self.metric[0] in get_args(TokenMetric):
            problems.append(
                f"metric: {self.metric[0]} is told beside any other, and is not of written answers: name another first"
            )
        if self.chat == "off" and self.system is not None:
            problems.append("system: `chat: off` has no place for a system prompt: write it into a template")
        if self.template is not None:
            problems += [f"template: {fault}" for fault in _template_faults(self.template)]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def generates(self, name: str) -> bool:
        """Tell that the task's answers are written."""
        return True

    @property
    def fields(self) -> list[str]:
        """Return the columns that the template names, in order."""
        return [field for _, field, _, _ in string.Formatter().parse(self.template or "") if field]


def prompt_task(name: str, options: PromptTask, *, seed: int = 0) -> Task:
    """Read a task of prompts and answers from files or from the Hub.

    name: of the task.
    options: where its rows are, which columns, what metrics, how many; see `PromptTask`.
    seed: of the shuffle that draws rows.

    Each row has a prompt and an answer: from two columns, from a chat whose last turn is the assistant's, or from a
    template; or from Alpaca's columns instruction, input and output, where there is no other prompt. Chats may be
    written as TRL, axolotl (role, content) or LLaMA-Factory (from, value) write them. What stands before the prompt
    goes to the column `history`, which is absent where `chat` is off. Splits and leaks as for `file_task`.

    Raises LoraloomError telling all faults at once, each with its file, column and rows (counted from 1).
    """
    wanted = [*options.fields, options.prompt, options.messages, options.answer, *ALPACA]
    tables, problems = read_tables(options, wanted, lambda table: _needed(options, table))
    checked = {split: _checked(table, options) for split, table in tables.items()}
    problems += [problem for one in checked.values() for problem in one.problems]
    parts, dropped, faults = parted(checked, options, seed)
    problems += faults or _unmeasured(parts, options)
    without_text = any(": empty " in problem or ": null " in problem for problem in problems)
    hint = "`empty: drop` in the recipe leaves rows without prompt or answer out" if without_text else ""
    raise_problems(f"task {name!r}", problems, hint)
    return Task(
        name=name,
        labels=None,
        metric=options.metric[0],
        also=tuple(options.metric[1:]),
        answering=Generate(options.answer_tokens, options.tolerance),
        description=options.description,
        source={
            **{split: getattr(options, split) for split in options.asked},
            **{option: getattr(options, option) for option in ("prompt", "answer", "messages", "template", "system")},
            "seed": seed,
            "empty": sum(one.empty for one in checked.values()),
            **dropped,
        },
        **{split: prompt_rows(part, chat=options.chat != "off") for split, part in parts.items()},
    )


def prompt_rows(rows: Sequence[Row], *, chat: bool = True, system: str | None = None) -> datasets.Dataset:
    """Return rows of prompts and answers as a data set, with what stands before a prompt where it is a `chat`'s.

    system: the system prompt of rows that bring nothing to stand before theirs.
    """
    columns = {"text_a": datasets.Value("string"), "label": datasets.Value("string")}
    if not chat:
        return datasets.Dataset.from_list(list(rows), features=datasets.Features(columns))
    before = None if system is None else [{"role": "system", "content": system}]
    features = datasets.Features({**columns, "history": [HISTORY]})
    return datasets.Dataset.from_list([{"history": before, **row} for row in rows], features=features)


def as_prompts(texts: datasets.Dataset) -> datasets.Dataset:
    """Return texts as prompts alone, before which nothing stands: for the base's chat template, where it has one."""
    return texts.add_column("history", [None] * len(texts))


def read_prompts(source: str, count: int, *, answers: bool) -> datasets.Dataset:
    """Return the first `count` rows of prompts in a file or on the Hub: text_a, history, and with `answers` label.

    source: with the columns `prompt` and, for answers, `answer`; or `messages`, whole chats; or Alpaca's.

    Raises LoraloomError telling all that is wrong with them.
    """
    options = PromptTask(train=source, test=source)
    try:
        table = read_table(source, "train", [options.prompt, options.messages, options.answer, *ALPACA])
    except ValueError as error:
        raise LoraloomError(f"{source}: {error}", "name a JSONL, CSV, TSV or Parquet file, or org/name") from error
    form = _form(options, table)
    answer = {"columns": options.answer, "alpaca": "output"}.get(form)
    needed = [column for column in _needed(options, table) if answers or column != answer]
    missing = [f"no column {column!r}" for column in needed if column not in table.columns]
    plain = "text" if "text" in table.columns else "NAME"
    raise_problems(source, missing, f"where these are texts and no prompts, name their column: --column {plain}")
    raise_problems(source, too_few(len(table.rows), count))
    unread = {} if answers or answer is None else {answer: "-"}
    checked = _checked(table._replace(rows=[{**row, **unread} for row in table.rows[:count]]), options)
    raise_problems("these prompts cannot be read", checked.problems)
    rows = prompt_rows(checked.rows)
    return rows if answers else rows.remove_columns("label")


def _unmeasured(parts: Mapping[str, list[Row]], options: PromptTask) -> list[str]:
    """Return the metrics that cannot measure the answers of held-out or test rows."""
    return [
        f"{options.sources.get(split, options.train)}: {problem}"
        for split in ("heldout", "test")
        if split in parts
        for metric in options.metric
        for problem in answer_problems(metric, [row["label"] for row in parts[split]])
    ]


def _needed(options: PromptTask, table: Table) -> Sequence[str]:
    return {
        "template": [*options.fields, options.answer],
        "columns": [options.prompt, options.answer],
        "messages": [options.messages],
        "alpaca": ["instruction", "output"],
    }[_form(options, table)]


def _form(options: PromptTask, table: Table) -> Form:
    """Tell how rows are written: as asked, or as the first of what the table has columns for."""
    if options.template is not None:
        return "template"
    if options.prompt not in table.columns:
        if options.messages in table.columns:
            return "messages"
        if (options.prompt, options.answer) == ("prompt", "answer") and "instruction" in table.columns:
            return "alpaca"
    return "columns"


def _checked(table: Table, options: PromptTask) -> Checked:
    """Read every row; faults are gathered by column and kind."""
    faults: dict[tuple[str, str], list[str]] = defaultdict(list)
    rows: list[Row] = []
    empty = 0
    form = _form(options, table)
    for number, cells in enumerate(table.rows, start=1):
        column = "output" if form == "alpaca" else options.answer
        try:
            if form == "messages":
                column = options.messages
                turns, answer = _chat(cells.get(column))
            else:
                answer = _answer(cells.get(column))
                column = {"template": "template", "alpaca": "instruction"}.get(form, options.prompt)
                turns = _alpaca(cells) if form == "alpaca" else _prompt(cells, options)
            rows.append(_row(turns, answer, options, chat=isinstance(cells.get(column), list)))
        except ValueError as error:
            if options.empty == "drop" and str(error).startswith(("empty ", "null ")):
                empty += 1
                continue
            shown = reprlib.repr(cells.get(column)) if column in cells else reprlib.repr(cells)
            faults[column, str(error)].append(f"row {number} ({shown})")
            rows.append({"text_a": "", "label": ""})  # so that no split is told to be short of it
    problems = [f"{table.source}: {column}: {what}: {first_few(where)}" for (column, what), where in faults.items()]
    return Checked(rows, problems, empty)


def _row(turns: Sequence[Turn], answer: str, options: PromptTask, *, chat: bool) -> Row:
    """Return a row; a prompt alone, which is no `chat`'s, needs no chat template, and has None for its history."""
    *history, last = turns
    if last["role"] != "user":
        raise ValueError(f"the turn before the answer is the {last['role']}'s, not the user's")
    if options.chat == "off":
        if history:
            raise ValueError("turns before the prompt, which `chat: off` has no place for")
        return {"text_a": last["content"], "label": answer}
    if options.system is not None and not any(turn["role"] == "system" for turn in history):
        history = [{"role": "system", "content": options.system}, *history]
    return {"text_a": last["content"], "label": answer, "history": history if chat or history else None}


def _prompt(cells: Mapping[str, Any], options: PromptTask) -> list[Turn]:
    if options.template is not None:
        given = {field: _text(cells.get(field), "prompt", plain=False) for field in options.fields}
        return [{"role": "user", "content": options.template.format(**given)}]
    value = cells.get(options.prompt)
    return _turns(value) if isinstance(value, list) else [{"role": "user", "content": _text(value, "prompt")}]


def _alpaca(cells: Mapping[str, Any]) -> list[Turn]:
    """Return the turns of a row of Alpaca's; `system` and `history`, pairs of turns, are LLaMA-Factory's."""
    system, before = cells.get("system"), cells.get("history") or []
    if not isinstance(before, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in before):
        raise ValueError("history that is no list of pairs")
    turns = [{"role": "system", "content": _text(system, "system prompt")}] if system else []
    for pair in before:
        turns += [{"role": r, "content": _text(t, "turn")} for r, t in zip(("user", "assistant"), pair, strict=True)]
    asked = _text(cells.get("instruction"), "prompt")
    more = cells.get("input")
    return [*turns, {"role": "user", "content": f"{asked}\n{_text(more, 'input')}" if more else asked}]


def _answer(value: Any) -> str:
    if isinstance(value, list):
        turns = _turns(value)
        if [turn["role"] for turn in turns] != ["assistant"]:
            raise ValueError("not one turn of the assistant")
        value = turns[0]["content"]
    return Generate().read(value)


def _chat(value: Any) -> tuple[list[Turn], str]:
    """Return the turns before the last one, and that one, which must be the assistant's."""
    turns = _turns(value)
    if turns[-1]["role"] != "assistant":
        raise ValueError("no answer: the last turn is not the assistant's")
    if len(turns) < 2:
        raise ValueError("no prompt before the answer")
    return turns[:-1], Generate().read(turns[-1]["content"])


def _turns(value: Any) -> list[Turn]:
    """Return the turns of a chat written as {role, content} or {from, value}."""
    if not isinstance(value, list) or not value:
        raise ValueError("not a list of turns" if value else "empty chat")
    return [_turn(turn) for turn in value]


def _turn(turn: Any) -> Turn:
    if not isinstance(turn, dict):
        raise ValueError("a turn that is no object")
    role = turn.get("role", turn.get("from"))
    if role not in _ROLES:
        raise ValueError(f"a turn whose role is {reprlib.repr(role)}: known are {', '.join(_ROLES)}")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):  # of parts, as multimodal chats have them
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise ValueError("a turn with parts that are no text")
        content = "".join(str(part.get("text", "")) for part in content)
    if role == "system":
        return {"role": "system", "content": content if isinstance(content, str) else _text(content, "turn")}
    return {"role": _ROLES[role], "content": _text(content, "turn")}


def _text(value: Any, what: str, *, plain: bool = True) -> str:
    """Return a text; where it need not be `plain`, what a number is written as."""
    if value is None:
        raise ValueError(f"null {what}")
    if not isinstance(value, str) and (plain or isinstance(value, (dict, list))):
        raise ValueError("not a text")
    text = str(value)
    if plain and not text.strip():
        raise ValueError(f"empty {what}")
    check_unicode(text)
    return text


def _template_faults(template: str) -> list[str]:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        return [f"{error}: write {{{{ for a brace"]
    named = [field for _, field, _, _ in parts if field is not None]
    if not named:
        return ["names no column: write one in braces, as {question}"]
    odd = [field for field in named if not field or any(sign in field for sign in ".[]") or field.isdecimal()]
    odd += [field or "" for _, field, form, conversion in parts if field is not None and (form or conversion)]
    return [f"{{{field}}} is not the name of a column" for field in odd]
