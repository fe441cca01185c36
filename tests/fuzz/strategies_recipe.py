"""Recipes: valid ones, spoiled ones, and bytes that are hardly YAML."""

from __future__ import annotations

from typing import Any

import yaml
from harness import spoiled, torn
from hypothesis import strategies as st

import tiny_study

_FORMS = [
    "{a: &a [x, x], b: &b [*a, *a, *a], c: [*b, *b, *b]}",
    "&a {name: *a}",
    "<<: [{name: x}, {base: y}]",
    "!!int foo",
    "!!float ''",
    "!!timestamp 2001-99-99",
    "!!set {a, b}",
    "!!python/name:os.system",
    "2001-99-99",
    "0x" + "f" * 5000,
    "1:60:99",
    ".nan",
    "-.inf",
    "1_000e3",
    '"\\ud800"',
    '"\\x1b[2J"',
    "~",
    "=",
    "<<",
    "? [a]\n: b",
    "|\n  text\n text",
    "[" * 3000,
    "{a: " * 3000,
]


def _recipes() -> list[dict[str, Any]]:
    """Return recipes that together have every section and kind of task."""
    files = tiny_study.recipe()
    mixed = tiny_study.recipe(
        tasks={
            "topic": {"source": "builtin", "train_rows": 8},
            "cola": {"source": "glue", "path": "rows"},
            "own": {
                "source": "files",
                "train": "a/b:c#d",
                "test": "~/x.csv",
                "heldout": "y.tsv",
                "text": ["a", "b"],
                "labels": ["0", "yes"],
                "metric": "matthews",
                "empty": "drop",
                "epochs": 2,
                "description": "words",
            },
        },
        seeds=[0, 1],
        lora={"rank": 2, "targets": ".*query", "rank_pattern": {"query": 4}, "alpha_pattern": {"value": 2.0}},
        merging=[
            {"rule": "ties", "scales": [1.0], "options": {"density": 0.3}},
            {"rule": "regmean", "scales": [0.5, 1], "options": {}, "texts": 3},
        ],
    )
    given = {key: value for key, value in files.items() if key != "inits"}
    return [files, mixed, {**given, "adapters": {"mood": "a", "tone": "b"}}]


@st.composite
def recipes(draw: st.DrawFn) -> bytes:
    """Return the bytes of a recipe, spoiled in its values, its YAML or its bytes."""
    content = draw(st.sampled_from(_recipes()))
    how = draw(st.sampled_from(["values", "values", "form", "torn"]))
    if how == "values":
        content = draw(spoiled(content, times=2))
    # surrogates cannot be dumped as they are; as escapes they are what a stranger can write
    text = yaml.dump(content, sort_keys=False, allow_unicode=False)
    if how == "form":
        lines = text.splitlines()
        place = draw(st.integers(0, len(lines) - 1))
        head = lines[place].partition(":")[0]
        lines[place] = f"{head}: {draw(st.sampled_from(_FORMS))}"
        text = "\n".join(lines)
    data = text.encode("utf-8", errors="replace")
    return draw(torn(data)) if how == "torn" else data
