"""A results file is read back as it was, and one that is not whole says which field is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loraloom.errors import LoraloomError
from loraloom.results import StudyResult


def test_it_is_read_back_as_it_was(finished: Path, tmp_path: Path) -> None:
    result = StudyResult.load(finished / "study" / "results.json")
    result.save(tmp_path / "results.json")
    assert (tmp_path / "results.json").read_bytes() == (finished / "study" / "results.json").read_bytes()


def test_a_file_that_is_wrong_names_its_fields(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "results.json"

    def told(content: str | bytes) -> str:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(LoraloomError) as error:
            StudyResult.load(path)
        return str(error.value)

    whole = (finished / "study" / "results.json").read_text(encoding="utf-8")
    assert told(whole[:1000]).startswith(f"{path}: not a results file: file: Invalid JSON")
    assert "not a results file" in told(b"\xff\x00")
    content = json.loads(whole)
    del content["seeds"]
    content["singles"][1]["score"]["value"] = "high"
    told_fields = told(json.dumps(content))
    assert "seeds: Field required" in told_fields
    assert "singles.1.score.value: Input should be a valid number" in told_fields
    content["merges"] = [{}] * 50
    assert "more" in told(json.dumps(content))
    with pytest.raises(LoraloomError, match="cannot be read: No such file"):
        StudyResult.load(tmp_path / "gone.json")
