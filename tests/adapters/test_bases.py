"""One base has many names; none that is published leads into somebody's home."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, strategies as st

from loraloom.adapters.bases import best_name, public_name, same_base

SNAPSHOT = "/home/me/.cache/huggingface/hub/models--Qwen--Qwen2.5-7B/snapshots/d149729398750b98c0af14eb82c78cfe92750796"
ONE = [
    "Qwen/Qwen2.5-7B",
    "Qwen/Qwen2.5-7B/",
    "qwen/qwen2.5-7b",
    "unsloth/Qwen2.5-7B",
    "unsloth/Qwen2.5-7B-bnb-4bit",
    "unsloth/qwen2.5-7b-unsloth-bnb-4bit",
    "/srv/Qwen2.5-7B",
    "/srv/Qwen2.5-7B/",
    "./Qwen2.5-7B",
    "../bases/Qwen2.5-7B",
    "~/Qwen2.5-7B",
    "models/Qwen2.5-7B",
    "C:\\hf\\Qwen2.5-7B",
    "D:\\Qwen2.5-7B\\",
    "Qwen2.5-7B",
    SNAPSHOT,
    SNAPSHOT.replace("/", "\\"),
    SNAPSHOT.partition("/snapshots")[0],
]


@pytest.mark.parametrize(("one", "two"), itertools.combinations(ONE, 2))
def test_the_names_of_one_base(one: str, two: str) -> None:
    assert same_base(one, two) is True
    assert same_base(two, one) is True


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ("org/a", "org/b", False),
        ("gpt2", "bert-base-uncased", False),
        ("org/base", "other/base", False),
        ("org/base-4bit", "org/base2", False),
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct", False),
        (SNAPSHOT, "Qwen/Qwen2.5-3B", False),
        ("/data/checkpoint-100", "org/base", None),
        ("/data/a", "/srv/b", None),
        ("C:\\a", "org/base", None),
        ("", "org/base", None),
    ],
)
def test_names_that_differ_or_cannot_tell(one: str, two: str, same: bool | None) -> None:
    assert same_base(one, two) is same
    assert same_base(two, one) is same


@given(st.lists(st.sampled_from(ONE), min_size=1, max_size=5), st.randoms())
def test_the_name_to_publish_is_the_same_in_any_order(names: list[str], chance) -> None:
    mixed = list(names)
    chance.shuffle(mixed)
    found = best_name(names)
    assert best_name(mixed) == found
    assert not any(part in found for part in (":", "\\", "~", "home", "srv"))
    if "Qwen/Qwen2.5-7B" in names or SNAPSHOT in names:
        assert found in ("Qwen/Qwen2.5-7B", "Qwen2.5-7B", "qwen/qwen2.5-7b")


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("org/base", "org/base"),
        ("gpt2", "gpt2"),
        ("./bases/one", "./bases/one"),
        ("/home/me/bases/one/", "one"),
        ("C:\\Users\\me\\one", "one"),
        ("~/one", "one"),
        (SNAPSHOT, "Qwen/Qwen2.5-7B"),
        ("", ""),
    ],
)
def test_what_is_published_of_a_name(name: str, public: str) -> None:
    assert public_name(name) == public
