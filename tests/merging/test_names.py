"""What inputs are called: any folder's name, one name each, nothing of anybody's disk."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import example, given, strategies as st

from loraloom.merging.names import input_names, public_command


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["a/mood", "a/tone"], ["mood", "tone"]),
        (["x/adapter", "y/adapter"], ["x-adapter", "y-adapter"]),
        (["lr=0.1,seed=3", "lr=0.1,seed=4"], ["lr-0.1-seed-3", "lr-0.1-seed-4"]),
        (["a (copy)", "b@v2", "c#1"], ["a -copy", "b-v2", "c-1"]),
        (["a=1", "a@1"], ["a-1", "a-1-2"]),
        (["Mood", "mood2"], ["Mood", "mood2"]),
        (["=", "@"], None),
        (["naïve ünit"], ["naïve ünit"]),
        (["x" * 200, "x" * 201], None),
    ],
)
def test_names_of_folders(folders: list[str], names: list[str] | None, tmp_path: Path) -> None:
    found = input_names([tmp_path / folder for folder in folders])
    assert names is None or found == names
    assert len(set(found)) == len(folders)


TEXT = st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=120)


@example(["+", ".hidden", "- x", "+"])
@given(st.lists(TEXT.filter(lambda name: name not in (".", "..")), min_size=1, max_size=5))
def test_any_folders_get_names_of_their_own_that_can_name_files(folders: list[str]) -> None:
    names = input_names([Path("/x") / folder for folder in folders])
    assert len({name.casefold() for name in names}) == len(folders)
    for name in names:
        assert re.fullmatch(r"\w[\w.+ -]*", name)
        assert len(f"{name}.safetensors".encode()) < 255


def test_what_is_published_of_a_command() -> None:
    typed = (
        "loraloom merge /home/me/mood ../tone 'C:\\Users\\me\\size' --fuse-into=/srv/base -o ~/out --weights 0.5,0.5"
    )
    assert public_command(typed) == "loraloom merge mood ../tone size --fuse-into=base -o out --weights 0.5,0.5"
    assert public_command(None) is None
    assert public_command("loraloom merge 'a b' x=/y") == "loraloom merge 'a b' x=/y"
    assert public_command("loraloom 'merge") is None
