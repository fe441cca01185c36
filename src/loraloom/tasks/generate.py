"""Tasks whose rows are each a prompt and the answer that a language model is to write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from loraloom.tasks.answers import AnswerMetric
from loraloom.tasks.sources import check_unicode, is_null

ANSWER_TOKENS = 64  # of an answer, at most, where nobody says


@dataclass(frozen=True)
class Generate:
    """What training and measuring need to know of a task of answers.

    answer_tokens: the most that a model may write. tolerance: of numbers in answers, for `number_match`.
    """

    answer_tokens: int = ANSWER_TOKENS
    tolerance: float = 1e-6

    metrics: ClassVar[tuple[AnswerMetric, ...]] = get_args(AnswerMetric)
    generates: ClassVar[bool] = True
    column: ClassVar[str] = "string"  # of answers in a data set
    words: ClassVar[str] = "answers"

    def read(self, value: Any) -> str:
        """Return what a row has for its answer. Raises ValueError where that is no text."""
        if value is None:
            raise ValueError("null answer")
        if isinstance(value, (bool, dict, list)):
            raise ValueError("not a text: write the answer as the model is to write it")
        text = str(value)
        if is_null(value) or not text.strip():
            raise ValueError("empty answer")
        check_unicode(text)
        return text
