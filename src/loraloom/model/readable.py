"""Whether a base model can read a task's prompts and has room for its answers, asked before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loraloom.errors import LoraloomError, raise_problems
from loraloom.model.load import is_two_sided, load_tokenizer, read_context
from loraloom.model.prompts import check_prompts
from loraloom.tasks.task import SPLITS, Task


def check_readable(base: str, tasks: Mapping[str, Task], max_length: int, splits: Sequence[str] = SPLITS) -> None:
    """Raise LoraloomError that tells of all tasks of answers why `base` cannot read or answer their rows.

    base: hub name or folder. max_length: tokens kept of a row. splits: whose rows are looked at.
    """
    written = {name: task for name, task in tasks.items() if task.answering}
    if not written:
        return
    tokenizer, two_sided, context = load_tokenizer(base), is_two_sided(base), read_context(base)
    problems = []
    for name, task in written.items():
        most = task.answering.answer_tokens if task.answering else 0
        if context is not None and most >= context:
            problems.append(f"task {name!r}: answer_tokens: {most}, and the base takes {context} tokens: lower it")
        for split in splits:
            try:
                check_prompts(getattr(task, split), tokenizer, max_length, two_sided=two_sided, context=context)
            except LoraloomError as error:
                problems.append(f"task {name!r}, {split} rows: {error.message}: {error.hint}")
    raise_problems(f"{base}: cannot answer as asked", problems)
