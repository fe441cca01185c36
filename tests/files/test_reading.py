"""JSON that anybody may have written: read, or told in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from loraloom.errors import LoraloomError
from loraloom.files.hashing import json_text
from loraloom.files.reading import read_json, read_json_object, read_yaml
from loraloom.files.tensors import StoredFile
from loraloom.tasks.sources import read_table

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(content=VALUES)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, content: object) -> None:
    path = tmp_path_factory.mktemp("json") / "one.json"
    path.write_text(json_text(content), encoding="utf-8")
    assert read_json(path) == content


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "not valid JSON"),
        (b'{"a": ', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b'{"r": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"r": NaN}', "NaN is no JSON"),
        (b'{"r": -Infinity}', "-Infinity is no JSON"),
        (b'{"r": "\\ud800"}', "not valid JSON"),
        (b'{"\\uDC00": 1}', "not valid JSON"),
        (b"[" + b"[]," * 1_000_000 + b"[]]", "more than 1,000,000 values"),
    ],
)
def test_what_is_no_json_is_told(content: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(LoraloomError) as caught:
        read_json(path, "save it again")
    assert told in caught.value.message
    assert str(path) in caught.value.message
    assert len(caught.value.message) < 600
    assert caught.value.hint == "save it again"


def test_emoji_and_byte_order_marks_are_read(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_bytes(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00"}')
    assert read_json_object(tmp_path / "one.json") == {"a": "\N{GRINNING FACE}"}


@pytest.mark.parametrize("content", ["null", "3", "true", "[1]", '"a"'])
def test_an_object_is_asked_for(content: str, tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(content)
    with pytest.raises(LoraloomError, match="holds no JSON object"):
        read_json_object(tmp_path / "one.json")


def test_a_missing_or_huge_file(tmp_path: Path) -> None:
    with pytest.raises(LoraloomError, match="cannot be read"):
        read_json(tmp_path / "none.json")
    with open(tmp_path / "huge.json", "wb") as file:
        file.truncate(1 << 30)  # takes no room
    with pytest.raises(LoraloomError, match="larger than 64 MB"):
        read_json(tmp_path / "huge.json")


def test_a_pointer_of_git_lfs_is_told_as_one(tmp_path: Path) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 12345\n"
    path = tmp_path / "rows.jsonl"
    path.write_text(pointer)
    for read in (read_json, read_yaml, StoredFile):
        with pytest.raises(LoraloomError, match=r"rows.jsonl: a pointer of Git LFS") as error:
            read(path)
        assert "git lfs pull" in error.value.hint
    with pytest.raises(ValueError, match="a pointer of Git LFS, not the file itself: fetch it: `git lfs pull`"):
        read_table(str(path), "train", ["text"])
