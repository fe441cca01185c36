"""Whether adapters write with their base's words alone: no head, no words of their own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loraloom.adapters.config import writes
from loraloom.adapters.peft import files_by_task
from loraloom.adapters.update import Adapter
from loraloom.errors import first_few
from loraloom.files.reading import read_json, read_json_object

# the layers of a language model that read words and write them
_WORDS = re.compile(r"(^|\.)(lm_head|embed_\w+|word_embeddings|wte|shared)\.")
# the heads of models that give classes or numbers
_TASKS = re.compile(r"(^|\.)(score|classifier|classification_head|qa_outputs|pooler|pre_classifier)\.")
_HINT = "save the adapter's tokenizer again"
_MOST = 10_000_000  # values of a tokenizer's file: its words, and the pairs that it merges


def writing_problems(adapters: Iterable[Adapter], tokenizer: Any) -> list[str]:
    """Return why adapters do not write by their updates alone, in the words of the base's `tokenizer`.

    That is a head, which gives classes or numbers; weights of words that come along whole; and tokens added to an
    adapter's own tokenizer that the base's lacks, or numbers otherwise, but for its padding, which no model sees.
    """
    known = tokenizer.get_vocab()
    return [problem for adapter in adapters for problem in _problems(adapter, known)]


def has_task_head(adapter: Adapter) -> bool:
    """Tell whether an adapter brings the head of a task, and not parts of a model that writes."""
    return bool(adapter.head) and not _parts_of_model(adapter)


def _parts_of_model(adapter: Adapter) -> list[str]:
    """Return the parameters that an adapter brings whole and that are the model's own: trained, or resized."""
    written = writes(adapter.config)
    return [path for path in sorted(adapter.head) if _WORDS.search(path) or (written and not _TASKS.search(path))]


def _problems(adapter: Adapter, known: Mapping[str, int]) -> list[str]:
    problems = []
    beside = adapter.path is not None and files_by_task(adapter.path, "heads")
    whole = _parts_of_model(adapter)
    if whole:
        why = "trained, or resized for added tokens, which cannot be merged"
        problems.append(f"{adapter.name}: brings {first_few(whole)} whole: {why}")
    elif adapter.head or (beside and not writes(adapter.config)):
        problems.append(f"{adapter.name}: has a head, so it gives classes or numbers and writes no answers")
    own, unseen = _added(adapter.beside.carried), _padding(adapter.beside.carried)
    other = [repr(token) for token, number in own.items() if known.get(token) != number and token != unseen]
    if other:
        problems.append(f"{adapter.name}: its tokenizer has {first_few(other)}, which the base's has not")
    return problems


def _padding(files: Mapping[str, Path]) -> str | None:
    """Return the padding token that a tokenizer's files name."""
    if "tokenizer_config.json" not in files:
        return None
    token = read_json_object(files["tokenizer_config.json"], _HINT).get("pad_token")
    return token.get("content") if isinstance(token, dict) else token


def _added(files: Mapping[str, Path]) -> dict[str, int]:
    """Return the added tokens of a tokenizer's files, with their numbers."""
    found: dict[str, int] = {}
    if "added_tokens.json" in files:
        found |= read_json_object(files["added_tokens.json"], _HINT)
    if "tokenizer.json" in files:
        content = read_json(files["tokenizer.json"], _HINT, most=_MOST, widest=_MOST)
        added = content.get("added_tokens") if isinstance(content, dict) else None
        entries = [one for one in added if isinstance(one, dict)] if isinstance(added, list) else []
        found |= {str(one.get("content")): one.get("id", -1) for one in entries}
    return found
