"""The built-in tasks: same rows everywhere, no leak between splits, labels that are true."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import subprocess
import sys
import textwrap
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from loraloom.errors import LoraloomError
from loraloom.tasks import builtin, builtin_text
from loraloom.tasks.builtin import LABELLED_NAMES, BuiltinTask, builtin_task
from loraloom.tasks.builtin_text import Part, first_sentence, parts
from loraloom.tasks.task import SPLITS, Task

ROWS = BuiltinTask(train_rows=800, heldout_rows=200, test_rows=300)
COUNTS = {"train": 800, "heldout": 200, "test": 300}
_ELSEWHERE = f"""
import json
from loraloom.tasks.builtin import LABELLED_NAMES, BuiltinTask, builtin_task
from loraloom.tasks.builtin_text import generic_texts
print(json.dumps([[builtin_task(name, {ROWS!r}).digest() for name in LABELLED_NAMES], generic_texts(400)]))
"""


@pytest.fixture(scope="module")
def elsewhere() -> tuple[list[str], list[str]]:
    """Return the digests of the tasks and generic texts of a process that hashes with another seed."""
    environment = {**os.environ, "PYTHONHASHSEED": "4711"}
    command = [sys.executable, "-c", _ELSEWHERE]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, timeout=300)
    digests, texts = json.loads(done.stdout)
    return digests, texts


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return {name: builtin_task(name, ROWS) for name in LABELLED_NAMES}


def _texts(task: Task, split: str) -> list[str]:
    return [text for column in task.text_columns for text in getattr(task, split)[column]]


def _bag(text: str) -> tuple[str, ...]:
    return tuple(sorted("".join(c if "a" <= c <= "z" else " " for c in text.lower()).split()))


def test_another_process_with_another_hash_seed_draws_the_same_rows(
    tasks: dict[str, Task], elsewhere: tuple[list[str], list[str]]
) -> None:
    assert elsewhere[0] == [task.digest() for task in tasks.values()]


def test_another_seed_draws_other_rows_of_the_same_files(tasks: dict[str, Task]) -> None:
    for name, task in tasks.items():
        other = builtin_task(name, ROWS, seed=1)
        assert other.digest() != task.digest()
        train, test = builtin._drawn(name, COUNTS, 1)["train"], builtin._drawn(name, COUNTS, 0)["test"]
        assert not {row.file for row in train} & {row.file for row in test}


@pytest.mark.parametrize("name", LABELLED_NAMES)
def test_counts_and_label_shares_are_as_asked(tasks: dict[str, Task], name: str) -> None:
    task = tasks[name]
    assert task.labels is not None
    for split in SPLITS:
        shares = Counter(getattr(task, split)["label"])
        assert sum(shares.values()) == COUNTS[split]
        assert sorted(shares) == list(range(len(task.labels)))
        assert max(shares.values()) - min(shares.values()) <= 1


@pytest.mark.parametrize("name", LABELLED_NAMES)
def test_no_text_and_no_source_file_is_in_two_splits(tasks: dict[str, Task], name: str) -> None:
    texts = [_bag(text) for split in SPLITS for text in _texts(tasks[name], split)]
    assert len(texts) == len(set(texts))
    drawn = builtin._drawn(name, COUNTS, 0)
    files = {split: {row.file for row in drawn[split]} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not files[one] & files[other]
    for split in SPLITS:  # the rows whose files were compared are the rows of the task
        assert [row.texts[0] for row in drawn[split]] == getattr(tasks[name], split)["text_a"]


@pytest.mark.parametrize("name", LABELLED_NAMES)
def test_texts_are_short_and_plain(tasks: dict[str, Task], name: str) -> None:
    for split in SPLITS:
        for text in _texts(tasks[name], split):
            assert text.isascii()
            assert 2 <= len(text.split()) <= 24


def test_shuffled_sentences_are_real_sentences_in_another_order(tasks: dict[str, Task]) -> None:
    originals: dict[tuple[str, ...], set[str]] = {}
    for docstring in builtin_text.docstrings():
        for part in parts(docstring.text):
            sentence = first_sentence(part.text)
            originals.setdefault(_bag(sentence), set()).add(sentence)
    for split in SPLITS:
        for row in getattr(tasks["order"], split):
            known = originals[_bag(row["text_a"])]
            assert (row["text_a"] in known) == bool(row["label"])
            if not row["label"]:
                words = row["text_a"][:-1].split()
                # the displaced words lie in one window of five
                assert any(
                    max(places) - min(places) < 5
                    for sentence in known
                    if len(other := sentence[:-1].split()) == len(words)
                    and (places := [i for i, (a, b) in enumerate(zip(words, other, strict=True)) if a != b])
                )


def test_own_summaries_stand_under_their_name_and_others_do_not(tasks: dict[str, Task]) -> None:
    owners: dict[str, set[str]] = defaultdict(set)
    splits: dict[str, set[str]] = defaultdict(set)
    for docstring in builtin_text.docstrings():
        summary = first_sentence(parts(docstring.text)[0].text)
        owners[summary].add(docstring.name.replace("_", "").lower())
        splits[summary].add(builtin_text.split_of(docstring.file))
    for split in SPLITS:
        for row in getattr(tasks["match"], split):
            assert (row["text_a"].replace(" ", "") in owners[row["text_b"]]) == (row["label"] == 1), row
            assert split in splits[row["text_b"]], row


def test_topics_are_not_told_by_a_package_name(tasks: dict[str, Task]) -> None:
    for split in SPLITS:
        for text in _texts(tasks["topic"], split):
            assert not any(name in text.lower() for name in ("networkx", "pandas", "sympy", "torch"))


def test_a_type_is_the_one_the_docstring_declares(monkeypatch: pytest.MonkeyPatch) -> None:
    docstring = builtin_text.Docstring("scipy/a.py", "f", _NUMPY_STYLE)
    monkeypatch.setattr(builtin, "docstrings", lambda: (docstring,))
    builtin._sentences.cache_clear()
    try:
        rows = [(builtin._TYPES[row.label], row.texts[0]) for row in builtin._type_rows(0)]
    finally:
        builtin._sentences.cache_clear()
    assert rows == [
        ("number", "Number of steps that the search takes."),
        ("true or false", "Whether the search tells what it does."),
    ]  # `start` may be of two types: no label would be true


_NUMPY_STYLE = """Search a value in a list.

Further prose on the :func:`~a.search` itself. It has two sentences.

Parameters
----------
steps : int, default=3
    Number of steps that
    the search takes. More of them take longer.
start : int or array_like
    Where the search starts, if anywhere.
tell : bool or None
    Whether the search tells what it does.

Returns
-------
value : str
    The value that was found.
"""


def test_parts_of_a_numpydoc_docstring() -> None:
    found = [(part.role, part.declared, first_sentence(part.text)) for part in parts(_NUMPY_STYLE)]
    assert found == [
        ("summary", "", "Search a value in a list."),
        ("prose", "", "Further prose on the a.search itself."),
        ("parameter", "int, default=3", "Number of steps that the search takes."),
        ("parameter", "int or array_like", "Where the search starts, if anywhere."),
        ("parameter", "bool or None", "Whether the search tells what it does."),
    ]


def test_parts_of_a_google_docstring() -> None:
    text = (
        "Search a value.\n\nArgs:\n    steps (int): Number of steps\n        taken at most.\n\nReturns:\n    A value.\n"
    )
    assert parts(text) == [
        Part("summary", "Search a value."),
        Part("parameter", "Number of steps\n    taken at most.", "int"),
    ]


@pytest.mark.parametrize(
    "paragraph",
    ["Too short.", "no capital at the start of it.", "Without a full stop at its end", ">>> Call(1) at once."],
)
def test_what_is_no_plain_sentence_is_left_out(paragraph: str) -> None:
    assert first_sentence(paragraph) == ""


def test_docstrings_are_those_that_an_import_shows() -> None:
    read = {found.name: found.text for found in builtin_text.docstrings() if found.file == "python/textwrap.py"}
    for owner in (textwrap.TextWrapper, textwrap.wrap, textwrap.dedent, textwrap.shorten):
        assert read[owner.__name__] == inspect.getdoc(owner)


def test_generic_texts_are_the_same_in_another_process_and_none_comes_twice(
    elsewhere: tuple[list[str], list[str]],
) -> None:
    texts = builtin_text.generic_texts(400)
    assert elsewhere[1] == texts == builtin_text.generic_texts(500)[:400]
    assert len(set(texts)) == len(texts) == 400
    assert all(text.isascii() and text == " ".join(text.split()) and len(text.split()) >= 8 for text in texts)


def test_generic_texts_are_paragraphs_without_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files share a paragraph, laid out in two ways; a summary of five words is too short."""
    again = "Another summary, of just as many words as it needs.\n\nFurther prose on the :func:`~a.search`\nitself."
    known = [("python/a.py", _NUMPY_STYLE), ("python/b.py", again + " It has two sentences.")]
    monkeypatch.setattr(
        builtin_text, "docstrings_of", lambda _: tuple(builtin_text.Docstring(file, "f", text) for file, text in known)
    )
    assert set(builtin_text.generic_texts(2)) == {
        "Further prose on the :func:`~a.search` itself. It has two sentences.",
        "Another summary, of just as many words as it needs.",
    }
    with pytest.raises(LoraloomError, match="3 texts were asked for, Python's own library holds 2"):
        builtin_text.generic_texts(3)


@pytest.mark.parametrize("name", LABELLED_NAMES)
def test_too_many_rows_are_told_of_every_split_at_once(name: str) -> None:
    with pytest.raises(LoraloomError) as told:
        builtin_task(name, BuiltinTask(train_rows=10**6, heldout_rows=200, test_rows=10**5))
    assert str(told.value).startswith(f"built-in task {name!r}: ")
    for split, rows in (("train", 10**6), ("test", 10**5)):
        assert f"{rows} {split} rows need" in str(told.value)
    assert "heldout" not in str(told.value)


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(LoraloomError, match="did you mean 'order'"):
        builtin_task("oder", ROWS)


def test_tasks_survive_a_folder(tasks: dict[str, Task], tmp_path: Path) -> None:
    tasks["match"].save(tmp_path / "match")
    assert Task.load(tmp_path / "match").digest() == tasks["match"].digest()
