"""Texts of a task as token batches: cut, sorted by length, padded a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import torch

Encoded = list[dict[str, list[int]]]


def encode(rows: datasets.Dataset, tokenizer: Any, max_length: int) -> Encoded:
    """Return the token ids of every row (one text, or a pair), cut to `max_length`, without padding."""
    texts = [list(rows[column]) for column in ("text_a", "text_b") if column in rows.column_names]
    if not len(rows):
        return []
    coded = tokenizer(*texts, truncation=True, max_length=max_length)
    return [{key: coded[key][index] for key in coded} for index in range(len(rows))]


def batches(
    encoded: Encoded, tokenizer: Any, batch_size: int
) -> Iterator[tuple[Sequence[int], dict[str, torch.Tensor]]]:
    """Yield (row indices, padded tensors), longest rows first, so that padding is short and memory peaks at once."""
    order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]["input_ids"]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        padded = tokenizer.pad([encoded[index] for index in chosen], return_tensors="pt")
        yield chosen, dict(padded)
