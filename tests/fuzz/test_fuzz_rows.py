"""No file of rows, however spoiled, ends in anything but a task or one message."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from harness import judge, many
from hypothesis import given
from strategies_rows import row_files

from loraloom.tasks.files import FileTask, file_task
from loraloom.tasks.task import SPLITS, Task


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@pytest.fixture(scope="module")
def good(folder: Path) -> str:
    """A file that no fault is in."""
    path = folder / "good.jsonl"
    rows = [{"text": f"t{i}", "other": "o", "mood": str(i % 2)} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def usable(task: Task, folder: Path) -> str:
    """Return what is wrong with an accepted task: it must be trainable, and saved as it is."""
    task.save(folder / "saved", overwrite=True)
    if Task.load(folder / "saved").digest() != task.digest():
        return "saved, it is another task"
    for split in SPLITS:
        for row in getattr(task, split):
            if not all(isinstance(row[column], str) and row[column].strip() for column in task.text_columns):
                return f"a row without text: {row}"
            if task.labels is None and not math.isfinite(row["label"]):
                return f"a label that is no number: {row}"
            if task.labels is not None and not 0 <= row["label"] < len(task.labels):
                return f"a label that is no class: {row}"
    return ""


@many
@given(row_files())
def test_training_rows(folder: Path, good: str, file: tuple[str, bytes, dict[str, Any]]) -> None:
    suffix, content, options = file
    path = folder / f"rows{suffix}"
    path.write_bytes(content)
    task = FileTask(**options, train=str(path), test=good)
    judge("rows", lambda: file_task("task", task), check=lambda found: usable(found, folder))


@many
@given(row_files())
def test_test_rows(folder: Path, good: str, file: tuple[str, bytes, dict[str, Any]]) -> None:
    suffix, content, options = file
    path = folder / f"rows{suffix}"
    path.write_bytes(content)
    task = FileTask(**options, train=good, test=str(path))
    judge("rows", lambda: file_task("task", task), check=lambda found: usable(found, folder))
