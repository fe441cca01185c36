"""Five English text tasks without a download: sentences of installed docstrings, labelled by where they stand.

Rows depend on the versions of Python and of the packages alone. Whole files are given to splits
(`builtin_text.split_of`), and a sentence is used once over all splits of a task.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from loraloom.tasks.builtin_text import STANDARD_LIBRARY, docstrings, parts, sentences, split_of
from loraloom.tasks.task import SPLITS, Metric


@dataclass(frozen=True)
class _Row:
    """A row with the source file it comes from, which fixes its split."""

    file: str
    label: int
    texts: tuple[str, ...]


@dataclass(frozen=True)
class _Plan:
    """What makes a task: its labels, metric and description, and its rows before they are sampled."""

    labels: tuple[str, ...]
    metric: Metric
    description: str
    rows: Callable[[random.Random], Iterator[_Row]]


@cache
def _sentences() -> tuple[tuple[str, str, str], ...]:
    """Return (file, role, sentence) of the first sentence of each part of each docstring."""
    return tuple(
        (docstring.file, role, found[0])
        for docstring in docstrings()
        for role, paragraph in parts(docstring.text)
        if (found := sentences(paragraph))
    )


_TOPICS = {
    "networkx": "graphs",
    "pandas": "tables",
    "sympy": "symbolic mathematics",
    "torch": "neural networks",
}


def _topic_rows(rng: random.Random) -> Iterator[_Row]:
    labels = list(_TOPICS)
    for file, role, sentence in _sentences():
        package = file.partition("/")[0]
        if package in _TOPICS and role in ("summary", "prose") and len(sentence.split()) >= 8:
            yield _Row(file, labels.index(package), (sentence,))


_ROLES = ("summary", "parameter", "return value", "error")


def _role_rows(rng: random.Random) -> Iterator[_Row]:
    for file, role, sentence in _sentences():
        if role in _ROLES:
            yield _Row(file, _ROLES.index(role), (sentence,))


def _order_rows(rng: random.Random) -> Iterator[_Row]:
    for file, role, sentence in _sentences():
        words = sentence.split()
        if role in ("summary", "prose") and 7 <= len(words) <= 20 and re.fullmatch(r"[A-Za-z ,'-]+\.", sentence):
            broken = rng.random() < 0.5
            yield _Row(file, int(not broken), (_swap(words, rng) if broken else sentence,))


def _swap(words: list[str], rng: random.Random) -> str:
    """Return the sentence with two neighbouring words, neither the first nor the last, exchanged."""
    places = [i for i in range(1, len(words) - 2) if words[i].lower() != words[i + 1].lower()]
    if not places:
        return ""
    at = rng.choice(places)
    return " ".join([*words[:at], words[at + 1], words[at], *words[at + 2 :]])


def _match_rows(rng: random.Random) -> Iterator[_Row]:
    by_file: dict[str, dict[str, str]] = defaultdict(dict)
    for docstring in docstrings():
        found = sentences(parts(docstring.text)[0][1])
        if docstring.kind in ("function", "method") and found and not docstring.name.startswith("__") and len(_words(docstring.name).split())>=2:
            by_file[docstring.file].setdefault(docstring.name, found[0])
    for file, summaries in by_file.items():
        names = sorted(summaries)
        rng.shuffle(names)
        half = len(names) // 2
        for name in names[:half]:
            yield _Row(file, 1, (_words(name), summaries[name]))
        others = names[half:]
        for name, other in zip(others, [*others[1:], others[0]], strict=True):
            if name != other and _key(summaries[name]) != _key(summaries[other]):
                yield _Row(file, 0, (_words(name), summaries[other]))


def _next_rows(rng: random.Random) -> Iterator[_Row]:
    """Two neighbouring sentences of a docstring in their order, or exchanged."""
    for docstring in docstrings():
        for role, paragraph in parts(docstring.text):
            found = sentences(paragraph)
            for i in range(0, len(found) - 1, 2):
                a, b = found[i : i + 2]
                if len(a.split()) + len(b.split()) < 36:
                    ok = rng.random() < 0.5
                    yield _Row(docstring.file, int(ok), (a, b) if ok else (b, a))


def _follow_rows(rng: random.Random) -> Iterator[_Row]:
    """first and second of a docstring, or the second of another docstring of the file"""
    by = defaultdict(list)
    for d in docstrings():
        found = [s for role, p in parts(d.text) if role in ("summary", "prose") for s in sentences(p)]
        if len(found) > 1 and len(found[0].split()) + len(found[1].split()) < 36:
            by[d.file].append(found[:2])
    for file, prs in by.items():
        rng.shuffle(prs)
        h = len(prs) // 2
        for a, b in prs[:h]:
            yield _Row(file, 1, (a, b))
        o = prs[h:]
        for (a, _), (_, b) in zip(o, [*o[1:], o[0]]):
            if _ != b and len(o) > 1:
                yield _Row(file, 0, (a, b))


def _words(name):
    return re.sub(r"(?<=[a-z])(?=[A-Z])|_"," ",name).strip().lower()

def _key(text: str) -> str:
    """Return what near duplicates share: the words of a text in alphabetic order, without case, digits and marks."""
    return " ".join(sorted(re.findall(r"[a-z]+", text.lower())))


_GAPS=("of","in","to","for")
def _gap_rows(rng):
    for file, role, sentence in _sentences():
        words=sentence.split()
        if role in ("summary","prose") and 6<=len(words)<=20:
            at=[i for i,w in enumerate(words) if w in _GAPS]
            if at:
                i=rng.choice(at)
                yield _Row(file,_GAPS.index(words[i]),(" ".join([*words[:i],"[MASK]",*words[i+1:]]),))

_KINDS=("module","class","function")
def _kind_rows(rng):
    for d in docstrings():
        f=sentences(parts(d.text)[0][1])
        k={"method":"function"}.get(d.kind,d.kind)
        if f: yield _Row(d.file,_KINDS.index(k),(f[0],))

_TYPES=("true or false","number","text","array")
_TYPEMAP={"bool":0,"boolean":0,"int":1,"float":1,"integer":1,"number":1,"str":2,"string":2,"array_like":3,"array-like":3,"ndarray":3,"list":3,"tensor":3,"callable":4}
def _type_rows(rng):
    from loraloom.tasks.builtin_text import typed
    for d in docstrings():
        for t,desc in typed(d.text):
            t=_TYPEMAP.get(re.split(r"[,\s(|{\[]",t.strip().lower())[0])
            f=sentences(desc)
            if t is not None and t<4 and f: yield _Row(d.file,t,(f[0],))

def _shuf_rows(rng, width=4, at_least=8):
    for file, role, sentence in _sentences():
        words=sentence[:-1].split()
        if role in ("summary","prose") and at_least<=len(words)<=20 and re.fullmatch(r"[A-Za-z ,'-]+\.", sentence):
            broken=rng.random()<.5
            if broken:
                i=rng.randrange(1,len(words)-width+1); w=words[i:i+width]; v=list(w)
                for _ in range(9):
                    rng.shuffle(v)
                    if all(a!=b for a,b in zip(v,w)): break
                words=[*words[:i],*v,*words[i+width:]]
            yield _Row(file,int(not broken),(" ".join(words)+".",))
def _shufall(rng):
    return _shuf_rows(rng,5)

def _drop_rows(rng):
    """drop a little word"""
    F={"a","an","the","of","to","is","are","be","in","for","by","with","and","or","that","as","on","from"}
    for file, role, sentence in _sentences():
        words=sentence.split()
        if role in ("summary","prose") and 7<=len(words)<=20 and re.fullmatch(r"[A-Za-z ,'-]+\.", sentence):
            at=[i for i,w in enumerate(words) if w in F]
            if not at: continue
            broken=rng.random()<.5
            if broken:
                i=rng.choice(at); del words[i]
            yield _Row(file,int(not broken),(" ".join(words),))

_PLANS: dict[str, _Plan] = {
    "topic": _Plan(tuple(_TOPICS.values()), "accuracy", "", _topic_rows),
    "role": _Plan(_ROLES, "accuracy", "", _role_rows),
    "order": _Plan(("broken", "intact"), "accuracy", "", _order_rows),
    "match": _Plan(("other", "own"), "accuracy", "", _match_rows),
    "gap": _Plan(_GAPS,"accuracy","",_gap_rows),
    "kind": _Plan(_KINDS,"accuracy","",_kind_rows),
    "type": _Plan(_TYPES,"accuracy","",_type_rows),
    "shuf": _Plan(("broken","intact"),"accuracy","",_shuf_rows),
    "shufall": _Plan(("broken","intact"),"accuracy","",_shufall),
    "drop": _Plan(("broken","intact"),"accuracy","",_drop_rows),
    "next": _Plan(("swapped", "inorder"), "accuracy", "", _next_rows),
    "follow": _Plan(("other", "own"), "accuracy", "", _follow_rows),
}


def sample(name, counts, seed=0):
    plan = _PLANS[name]
    rng = random.Random(f"{seed}/{name}")
    pools = defaultdict(list)
    seen = set()
    for row in plan.rows(rng):
        keys = {_key(t) for t in row.texts}
        if keys & seen or "" in keys:
            continue
        seen |= keys
        pools[split_of(row.file), row.label].append(row)
    out = {}
    for split in SPLITS:
        rows = []
        for l in range(len(plan.labels)):
            pool = pools[split, l]
            rng.shuffle(pool)
            k = counts[split] // len(plan.labels)
            print(name, split, plan.labels[l], len(pool), k)
            rows += pool[:k]
        rng.shuffle(rows)
        out[split] = rows
    return out
