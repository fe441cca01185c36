"""Results files: a made-up study's, spoiled in its values, in what refers to what, or in its bytes."""

from __future__ import annotations

import json
from typing import Any

from harness import NUMBERS, WORDS, as_json, spoiled, torn
from hypothesis import strategies as st

SCORE = {"value": 0.7, "stderr": 0.01}
MARKUP = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "<!--",
    "<a href='javascript:alert(1)'>a</a>",
    "{{ 7 * 7 }}",
    "{% raw %}",
    "%{x}",
    "]]>",
    "\u2028\x00",
    "$x^2$",
]


def study() -> dict[str, Any]:
    """Return a small study of two inits, two tasks, two rules and two scales, as results.json has it."""
    inits, tasks, layers = ["one", "two"], ["a", "b"], ["layer.0.query", "layer.1.query"]
    merges = [
        {
            "init": init, "seed": 0, "rule": rule, "space": "full", "options": {"density": 0.2}, "output_rank": 8,
            "scale": scale, "aligned": False, "split": split, "chosen_by": "labels" if split == "test" else None,
            "scores": dict.fromkeys(tasks, SCORE), "average": SCORE, "resamples": [0.6, 0.7, 0.8], "kept": 0.9,
        }
        for init in inits for rule in ("ties", "tsv") for split, scales in (("heldout", (0.5, 1.0)), ("test", (0.5,)))
        for scale in scales
    ]  # fmt: skip
    tables = [
        {
            "init": init, "seed": 0, "when": when, "quantity": quantity, "tasks": tasks, "layers": layers,
            "values": [[[1.0, 0.4], [0.3, 2.0]], [[0.5, 0.1], [0.0, 0.0]]], "ratio": 0.3,
        }
        for init in inits for when, quantity in (("before", "A"), ("after", "BA"))
    ]  # fmt: skip
    facts = {"description": "", "metric": "accuracy", "labels": ["x", "y"], "rows": {"test": 9}, "majority": 0.5}
    content = {
        "format": "loraloom-results-1", "name": "made up", "created": "2026-01-02T03:04:05Z", "command": "loraloom run",
        "base": "base", "base_sha256": "ab" * 32, "content_sha256": "cd" * 32, "versions": {"torch": "2"},
        "machine": "2 cores", "seeds": [0], "recipe": {"lora": {"rank": 8}},
        "inits": [{"name": init, "description": "", "options": {}, "diagnostics": {"gap": 0.1}} for init in inits],
        "tasks": [{"name": task, **facts, "sha256": "ef" * 32, "example": "text"} for task in tasks],
        "singles": [{"init": init, "seed": 0, "task": task, "score": SCORE} for init in inits for task in tasks],
        "merges": merges, "interference": tables, "seconds": {"train": 1.0}, "notes": ["one seed"],
    }  # fmt: skip
    return dict(json.loads(json.dumps(content)))  # no part of it stands in two places


def answers() -> dict[str, Any]:
    """Return the same study of tasks of answers: with the base model alone, further metrics and shares kept."""
    content = study()
    score = {**SCORE, "more": {"rouge_l": SCORE, "loss": {"value": 1.2, "stderr": 0.1}, "probability": SCORE}}
    content["bases"] = [{"task": task["name"], "score": score} for task in content["tasks"]]
    for single in content["singles"]:
        single["score"] = score
    for merge in content["merges"]:
        for share in ("kept_probability", "recovered"):
            merge[share] = dict.fromkeys(merge["scores"], SCORE)
        if merge["split"] == "test":
            merge["scores"] = dict.fromkeys(merge["scores"], score)
    return dict(json.loads(json.dumps(content)))


def _leaves(value: Any) -> list[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    inside = [place for key in keys for place in _leaves(value[key])]
    return [(value, key) for key in keys if not isinstance(value[key], dict | list)] + inside


@st.composite
def renamed(draw: st.DrawFn, words: st.SearchStrategy[str]) -> dict[str, Any]:
    """Return a study in which up to four names are others, wherever they stand, so that it still fits together."""
    old = ["one", "two", "a", "b", "made up", "layer.0.query", "layer.1.query", "ties", "base", "one seed", "gap"]
    chosen = draw(st.lists(st.sampled_from(old), min_size=1, max_size=4, unique=True))
    new = {name: draw(words) for name in chosen}

    def rename(value: Any) -> Any:
        if isinstance(value, dict):
            return {new.get(key, key): rename(part) for key, part in value.items()}
        if isinstance(value, list):
            return [rename(part) for part in value]
        return new.get(value, value) if isinstance(value, str) else value

    found = rename(study())
    assert isinstance(found, dict)
    return found


@st.composite
def results(draw: st.DrawFn) -> bytes:
    """Return the bytes of a results file."""
    how = draw(st.sampled_from(["values", "number", "record", "names", "torn"]))
    content: Any = draw(st.sampled_from([study, answers]))()
    if how == "values":
        content = draw(spoiled(content, times=2))
    elif how == "number":
        places = [(holder, key) for holder, key in _leaves(content) if isinstance(holder[key], float | int)]
        for _ in range(draw(st.integers(1, 4))):
            holder, key = draw(st.sampled_from(places))
            holder[key] = draw(st.one_of(st.sampled_from(NUMBERS), st.floats(), st.integers()))
    elif how == "record":
        kinds = ["inits", "tasks", "singles", "merges", "interference", "seeds", "notes"]
        kind = draw(st.sampled_from(kinds + ["bases"] * ("bases" in content)))
        records = content[kind]
        place = draw(st.integers(0, len(records) - 1))
        change = draw(st.sampled_from(["drop", "twice", "none"]))
        content[kind] = {
            "drop": records[:place] + records[place + 1 :],
            "twice": [*records, records[place]],
            "none": [],
        }[change]
    elif how == "names":
        content = draw(renamed(st.one_of(st.sampled_from([*MARKUP, *WORDS]), st.text(max_size=9))))
    data = as_json(content)
    return draw(torn(data)) if how == "torn" else data


def hostile() -> st.SearchStrategy[str]:
    """Names that would be markup, script, template or plotly's own if they were not escaped."""
    return st.one_of(st.sampled_from(MARKUP), st.text(alphabet="<>&\"'/={}%$\\ascript:()", max_size=20))


def as_bytes(content: dict[str, Any]) -> bytes:
    """Return the JSON of a study."""
    return json.dumps(content).encode()
