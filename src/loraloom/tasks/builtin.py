"""English tasks without a download: four of labelled sentences of installed docstrings, and those of `builtin_answers`.

Rows depend on the versions of Python and of the packages, on the counts and on the seed, and on nothing else. Whole
source files are given to splits (`builtin_text.split_of`); no sentence stands twice in a task, in whatever split.
"""

from __future__ import annotations

import itertools
import platform
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import datasets
from pydantic import Field

from loraloom.errors import LoraloomError, did_you_mean, raise_problems
from loraloom.tasks.builtin_answers import ANSWER_PLANS, ANSWER_TOKENS, answer_rows
from loraloom.tasks.builtin_text import (
    FOLDERS,
    STANDARD_LIBRARY,
    Part,
    docstrings,
    first_sentence,
    package_of,
    parts,
    place,
    split_of,
)
from loraloom.tasks.generate import Generate
from loraloom.tasks.prompts import prompt_rows
from loraloom.tasks.task import SPLITS, Metric, Task, TaskOptions


@dataclass(frozen=True)
class _Row:
    """One row and the source file that it comes from, which fixes its split."""

    file: str
    label: int
    texts: tuple[str, ...]


@dataclass(frozen=True)
class _Plan:
    """What makes a task: label names, metric, a sentence for the report, and seed -> all rows there are."""

    labels: tuple[str, ...]
    metric: Metric
    description: str
    rows: Callable[[int], Iterator[_Row]]


@cache
def _sentences() -> tuple[tuple[str, str, Part, str], ...]:
    """Return (file, owner's name, part, its first sentence) for every part of every docstring that has one."""
    return tuple(
        (docstring.file, docstring.name, part, sentence)
        for docstring in docstrings()
        for part in parts(docstring.text)
        if (sentence := first_sentence(part.text))
    )


_TOPICS = {
    "networkx": "graphs",
    "pandas": "tables",
    "sympy": "symbolic mathematics",
    "torch": "neural networks",
}
_PACKAGE_NAMES = re.compile(r"networkx|\bnx\b|pandas|\bpd\b|sympy|torch", re.IGNORECASE)


def _topic_rows(seed: int) -> Iterator[_Row]:
    """Label a sentence of 8 words or more by the package that documents itself with it; its name may not be there."""
    packages = list(_TOPICS)
    for file, _, part, sentence in _sentences():
        package = package_of(file)
        if (
            package in _TOPICS
            and part.role != "parameter"
            and len(sentence.split()) >= 8
            and not _PACKAGE_NAMES.search(sentence)
        ):
            yield _Row(file, packages.index(package), (sentence,))


_TYPES = ("true or false", "number", "text", "array")
_TYPE_OF_WORD = {
    **dict.fromkeys(("bool", "boolean"), 0),
    **dict.fromkeys(("int", "integer", "float", "number", "scalar"), 1),
    **dict.fromkeys(("str", "string"), 2),
    **dict.fromkeys(("array_like", "array-like", "array", "ndarray", "list", "tensor", "sequence"), 3),
}


def _type_rows(seed: int) -> Iterator[_Row]:
    """Label the description of a parameter by its declared type, where that is a single type."""
    for file, _, part, sentence in _sentences():
        declared = re.sub(r"\bor None\b|\|\s*None", "", part.declared).lower()
        word = re.match(r"[a-z_-]+", declared)
        if word and word[0] in _TYPE_OF_WORD and not re.search(r"\bor\b|\||\binstance\b|[{}]", declared):
            yield _Row(file, _TYPE_OF_WORD[word[0]], (sentence,))


_WIDTH = 5
# Orders of 5 words in which none keeps its place and no two neighbours stay neighbours.
_REORDERINGS = [
    order
    for order in itertools.permutations(range(_WIDTH))
    if all(at != i for i, at in enumerate(order)) and all(b != a + 1 for a, b in itertools.pairwise(order))
]


def _order_rows(seed: int) -> Iterator[_Row]:
    """Show each sentence once: as it is written, or with 5 neighbouring words in another order."""
    for file, _, part, sentence in _sentences():
        words = sentence[:-1].split()
        if part.role == "parameter" or not 8 <= len(words) <= 20 or not re.fullmatch(r"[A-Za-z ,'-]+\.", sentence):
            continue
        rng = random.Random(f"{seed}/{sentence}")
        intact = rng.random() < 0.5
        shown = sentence if intact else _reordered(words, rng) + "."
        if intact or shown.lower() != sentence.lower():
            yield _Row(file, int(intact), (shown,))


def _reordered(words: Sequence[str], rng: random.Random) -> str:
    start = rng.randrange(1, len(words) - _WIDTH + 1)  # the first word keeps its place and its capital
    window = [words[start + at] for at in rng.choice(_REORDERINGS)]
    return " ".join([*words[:start], *window, *words[start + _WIDTH :]])


def _match_rows(seed: int) -> Iterator[_Row]:
    """Pair a name of two words or more with its own summary, or with another one of the same package and split."""
    groups: dict[tuple[str, str], dict[str, tuple[str, str]]] = defaultdict(dict)
    for file, name, part, sentence in _sentences():
        spoken = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_", " ", name).strip().lower()
        if part.role == "summary" and " " in spoken and not name.startswith("__"):
            groups[package_of(file), split_of(file)].setdefault(spoken, (file, sentence))
    for group in groups.values():
        names = sorted(group, key=lambda name: place(f"{seed}/{name}"))
        own, others = names[: len(names) // 2], names[len(names) // 2 :]
        for name in own:
            yield _Row(group[name][0], 1, (name, group[name][1]))
        for name, other in zip(others, others[1:] + others[:1], strict=True):
            if _key(group[name][1]) != _key(group[other][1]):
                yield _Row(group[name][0], 0, (name, group[other][1]))


_PLANS = {
    "topic": _Plan(
        tuple(_TOPICS.values()),
        "accuracy",
        "What is this sentence about: graphs, tables, symbolic mathematics or neural networks? "
        "Sentences from the docstrings of networkx, pandas, sympy and torch; the label is the package.",
        _topic_rows,
    ),
    "type": _Plan(
        _TYPES,
        "accuracy",
        "What does this parameter take: true or false, a number, text or an array? Descriptions of parameters from "
        "the docstrings of numpy, pandas, scipy, scikit-learn and others; the label is the type declared there.",
        _type_rows,
    ),
    "order": _Plan(
        ("shuffled", "intact"),
        "accuracy",
        "Is this sentence as its author wrote it, or were five neighbouring words put in another order? "
        "Sentences from the docstrings of Python's library and of loraloom's dependencies, each used once.",
        _order_rows,
    ),
    "match": _Plan(
        ("another's", "its own"),
        "accuracy",
        "Does this summary belong to the function or class of this name, or to another one of the same package? "
        "Names and summaries from Python's library and loraloom's dependencies, each used once.",
        _match_rows,
    ),
}
LABELLED_NAMES, ANSWERED_NAMES = tuple(_PLANS), tuple(ANSWER_PLANS)
BUILTIN_NAMES = LABELLED_NAMES + ANSWERED_NAMES


class BuiltinTask(TaskOptions):
    """A task of the embedded default, made from the documentation of installed packages."""

    source: Literal["builtin"] = "builtin"
    train_rows: int = Field(600, ge=2)
    heldout_rows: int = Field(150, ge=2)
    test_rows: int = Field(300, ge=2)
    system: str | None = Field(None, description="system prompt of a task whose answers are written")

    def generates(self, name: str) -> bool:
        """Tell whether the answers of the task of this name are written."""
        return name in ANSWER_PLANS


def builtin_task(name: str, options: BuiltinTask, *, seed: int = 0) -> Task:
    """Return one built-in task with the asked numbers of rows, labels in equal shares.

    name: of the task.
    options: how many rows of each split, and what stands before written answers.
    seed: by which rows are drawn.

    Raises LoraloomError for an unknown name and, naming every label, where this installation has too few rows.
    """
    if name not in BUILTIN_NAMES:
        raise LoraloomError(f"no built-in task is called {name!r}", did_you_mean(name, BUILTIN_NAMES))
    counts = dict(zip(SPLITS, (options.train_rows, options.heldout_rows, options.test_rows), strict=True))
    if name in ANSWER_PLANS:
        return _answer_task(name, counts, options.system, seed)
    if options.system is not None:
        raise LoraloomError(f"built-in task {name!r}: system: its answers are not written", "leave it out")
    _check_counts(name, counts, seed)
    plan = _PLANS[name]
    drawn = _drawn(name, counts, seed)
    pools = _pools(name, seed)
    source: dict[str, Any] = {
        "origin": "docstrings of installed packages",
        "seed": seed,
        "versions": source_versions(),
        "rows_available": {split: sum(len(pools[split, i]) for i in range(len(plan.labels))) for split in SPLITS},
        "source_files": {split: len({row.file for row in drawn[split]}) for split in SPLITS},
    }
    splits = {split: datasets.Dataset.from_list([_record(row) for row in drawn[split]]) for split in SPLITS}
    return Task(name, plan.labels, plan.metric, description=plan.description, source=source, **splits)


def _answer_task(name: str, counts: dict[str, int], system: str | None, seed: int) -> Task:
    plan, rows = (
        ANSWER_PLANS[name],
        {split: answer_rows(name, split, asked, seed=seed) for split, asked in counts.items()},
    )
    problems = [
        f"{asked} {split} rows asked, this installation has {len(rows[split])}"
        for split, asked in counts.items()
        if len(rows[split]) < asked
    ]
    raise_problems(f"built-in task {name!r}", problems, "ask for fewer rows; " + _installed_hint())
    return Task(
        name,
        None,
        plan.metrics[0],
        description=plan.description,
        source={
            "origin": "docstrings of installed packages, and templates",
            "seed": seed,
            "versions": source_versions(),
        },
        also=plan.metrics[1:],
        answering=Generate(ANSWER_TOKENS),
        **{split: prompt_rows(part, system=system) for split, part in rows.items()},
    )


def _record(row: _Row) -> dict[str, Any]:
    return {**dict(zip(("text_a", "text_b"), row.texts, strict=False)), "label": row.label}


@cache
def _pools(name: str, seed: int) -> dict[tuple[str, int], list[_Row]]:
    """Return the rows of a task by (split, label), in an order drawn by the seed, without near duplicates."""
    pools: dict[tuple[str, int], list[_Row]] = {
        (split, label): [] for split in SPLITS for label in range(len(_PLANS[name].labels))
    }
    seen: set[str] = set()
    for row in _PLANS[name].rows(seed):
        keys = {_key(text) for text in row.texts}
        if seen.isdisjoint(keys):
            seen |= keys
            pools[split_of(row.file), row.label].append(row)
    for pool in pools.values():
        pool.sort(key=lambda row: place(f"{seed}/{row.texts}"))
    return pools


def _key(text: str) -> str:
    """Return what near duplicates share: the words in alphabetic order, without case, digits and punctuation."""
    return " ".join(sorted(re.findall(r"[a-z]+", text.lower())))


def _shares(rows: int, labels: int) -> list[int]:
    """Return how many of `rows` each label gets; the first labels get one more where it does not divide."""
    return [rows // labels + (label < rows % labels) for label in range(labels)]


def _check_counts(name: str, counts: dict[str, int], seed: int) -> None:
    problems = []
    labels = _PLANS[name].labels
    for split, rows in counts.items():
        if rows < len(labels):
            problems.append(f"{rows} {split} rows asked, fewer than its {len(labels)} labels")
        for label, share in enumerate(_shares(rows, len(labels))):
            available = len(_pools(name, seed)[split, label])
            if share > available:
                problems.append(
                    f"{rows} {split} rows need {share} of label {labels[label]!r}, this installation has {available}"
                )
    hint = "ask for other numbers of rows; " + _installed_hint()
    raise_problems(f"built-in task {name!r}", problems, hint)


def _installed_hint() -> str:
    missing = [package for package, found in source_versions().items() if not found]
    return f"or install {', '.join(missing)}" if missing else "all their packages are installed"


def _drawn(name: str, counts: dict[str, int], seed: int) -> dict[str, list[_Row]]:
    """Return the rows of each split, mixed over the labels by the seed."""
    pools, labels = _pools(name, seed), len(_PLANS[name].labels)
    return {
        split: sorted(
            (row for label, share in enumerate(_shares(rows, labels)) for row in pools[split, label][:share]),
            key=lambda row: place(f"{seed}/{row.texts}"),
        )
        for split, rows in counts.items()
    }


def source_versions() -> dict[str, str]:
    """Return the version of Python and of each package that gives rows, "" for one that is not installed."""
    versions = {STANDARD_LIBRARY: platform.python_version()}
    for package in FOLDERS.keys() - {STANDARD_LIBRARY}:
        try:
            versions[package] = version({"sklearn": "scikit-learn"}.get(package, package))
        except PackageNotFoundError:
            versions[package] = ""
    return dict(sorted(versions.items()))
