"""The store makes each output once, serves only whole ones, and says what they depend on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from loraloom.errors import LoraloomError
from loraloom.files.hashing import file_sha256
from loraloom.study.store import RECORD, Stage, Store


def writing(text: str = "x") -> Any:
    def make(folder: Path, scratch: Path) -> None:
        (folder / "deep").mkdir()
        (folder / "deep" / "file.txt").write_text(text)

    return make


def refusing(folder: Path, scratch: Path) -> None:
    raise AssertionError("made again")


def test_an_output_is_made_once_whatever_its_label(tmp_path: Path) -> None:
    stage = Stage("train", "a.b", {"rate": 0.1})
    path = Store(tmp_path).get(stage, writing())
    assert path == tmp_path / "train" / f"a.b-{stage.key[:12]}"
    again = Store(tmp_path)
    assert again.get(Stage("train", "renamed", {"rate": 0.1}), refusing) == path
    assert again.seconds().keys() == {"train"}


def test_the_key_is_of_kind_options_and_inputs() -> None:
    first = Stage("task", "a", {"rows": 1})
    base = Stage("train", "a", {"rate": 0.1, "steps": [1, 2]}, {"task": first})
    same = Stage("train", "b", {"steps": [1, 2], "rate": 0.1}, {"task": Stage("task", "z", {"rows": 1})})
    others = [
        Stage("merge", "a", base.options, base.inputs),
        Stage("train", "a", {"rate": 0.2, "steps": [1, 2]}, base.inputs),
        Stage("train", "a", base.options, {"task": Stage("task", "a", {"rows": 2})}),
        Stage("train", "a", base.options, {"other": first}),
        Stage("train", "a", base.options),
    ]
    assert base.key == same.key
    assert len({base.key, *(other.key for other in others)}) == 6
    for value in (float("nan"), Path("x"), {1, 2}):
        with pytest.raises((TypeError, ValueError)):
            _ = Stage("train", "a", {"value": value}).key


def test_a_failure_is_told_and_kept_beside_never_served(tmp_path: Path) -> None:
    store, stage = Store(tmp_path), Stage("train", "a", {})

    def failing(folder: Path, scratch: Path) -> None:
        (folder / "half").write_text("x")
        raise LoraloomError("the loss is not finite")

    for _ in range(2):
        with pytest.raises(LoraloomError, match="not finite"):
            store.get(stage, failing)
        assert store.failures() == {stage.name: "LoraloomError: the loss is not finite"}
        assert store.outputs() == {}
        assert list((tmp_path / "train").iterdir()) == []
    store.get(stage, writing())
    assert store.failures() == {}


@pytest.mark.parametrize("harm", ["truncate", "edit", "remove file", "remove record", "break record", "remove folder"])
def test_an_output_that_was_tampered_with_is_made_again(tmp_path: Path, harm: str) -> None:
    store, stage = Store(tmp_path), Stage("train", "a", {})
    path = store.get(stage, writing("whole"))
    file, record = path / "deep" / "file.txt", path / RECORD
    {
        "truncate": lambda: file.write_text("wh"),
        "edit": lambda: file.write_text("WHOLE"),
        "remove file": file.unlink,
        "remove record": record.unlink,
        "break record": lambda: record.write_text("{"),
        "remove folder": lambda: shutil.rmtree(path),
    }[harm]()
    assert store.outputs() == {}
    assert store.get(stage, writing("whole")) == path
    assert file.read_text() == "whole"
    assert store.outputs().keys() == {stage.name}


def test_a_file_of_somebody_else_in_an_output_is_left_there(tmp_path: Path) -> None:
    store, stage = Store(tmp_path), Stage("train", "a", {})
    path = store.get(stage, writing())
    (path / "NOTES.md").write_text("mine")
    assert store.get(stage, refusing) == path
    (path / "deep" / "file.txt").unlink()
    with pytest.raises(LoraloomError, match=r"NOTES.md is not ours"):
        store.get(stage, writing())
    with pytest.raises(LoraloomError, match="no whole output"):
        store.remove(stage.name)
    (path / "NOTES.md").rename(tmp_path / "NOTES.md")
    assert store.get(stage, writing()) == path
    (path / "NOTES.md").write_text("mine")
    with pytest.raises(LoraloomError, match=r"NOTES.md is not ours"):
        store.remove(stage.name)
    assert (path / "NOTES.md").read_text() == "mine"


def test_a_file_is_hashed_only_where_its_time_of_writing_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, hashed = Stage("train", "a", {}), []
    path = Store(tmp_path / "one").get(stage, writing())

    def hashing(file: Path) -> str:
        hashed.append(file.name)
        return file_sha256(file)

    monkeypatch.setattr("loraloom.study.store.file_sha256", hashing)
    Store(tmp_path / "one").get(stage, refusing)
    shutil.copytree(tmp_path / "one", tmp_path / "kept times")  # as cp -a
    Store(tmp_path / "kept times").get(stage, refusing)
    assert not hashed
    for file in path.rglob("*.txt"):
        file.touch()
    store = Store(tmp_path / "one")
    for _ in range(3):
        store.get(stage, refusing)
    assert hashed == ["file.txt"]  # of equal content, once


def test_scratch_outlives_a_failure_and_goes_with_success(tmp_path: Path) -> None:
    store, stage = Store(tmp_path), Stage("train", "a", {})
    seen = []

    def resuming(folder: Path, scratch: Path) -> None:
        seen.append(scratch.is_dir())
        scratch.mkdir(parents=True, exist_ok=True)
        if len(seen) < 3:
            raise RuntimeError("killed")
        (folder / "a").write_text("x")

    for _ in range(2):
        with pytest.raises(RuntimeError):
            store.get(stage, resuming)
        store.tidy()
    store.get(stage, resuming)
    assert seen == [False, True, True]
    assert list((tmp_path / "unfinished").iterdir()) == []


_WORKER = """
import pathlib, sys, time
from loraloom.study.store import Stage, Store
store = Store(sys.argv[1])
def make(folder, scratch):
    with open(sys.argv[2], "a") as log:
        log.write("made\\n")
    print("making", flush=True)
    (folder / "a").write_text("x")
    time.sleep(float(sys.argv[3]))
store.get(Stage("train", "a.b", {}), make)
"""


def worker(root: Path, log: Path, seconds: float) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", _WORKER, str(root), str(log), str(seconds)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def test_two_processes_make_a_stage_once_and_a_killed_one_blocks_nobody(tmp_path: Path) -> None:
    root, log = tmp_path / "stages", tmp_path / "log"
    killed = worker(root, log, 600)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "making\n"
    waiting = worker(root, log, 0.5)
    time.sleep(0.3)
    assert waiting.poll() is None
    # what lies half-written belongs to a process at work
    Store(root).tidy()
    assert len(list(root.glob("train/.*.part"))) == 1
    killed.kill()
    killed.wait()
    also = worker(root, log, 0.5)
    assert waiting.wait(30) == 0
    assert also.wait(30) == 0
    assert log.read_text() == "made\n" * 2  # the killed one, and one of the two after it
    # what the killed one left went when the next one wrote there
    assert [path.name for path in (root / "train").iterdir()] == [Stage("train", "a.b", {}).name.split("/")[1]]
    for one in (killed, waiting, also):
        assert one.stdout is not None
        one.stdout.close()


def test_explain_tells_inputs_and_what_of_them_is_missing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    task = Stage("task", "mood", {"rows": 4})
    start = Stage("init", "a", {"rank": 2}, {"mood": task})
    train = Stage("train", "a", {"rate": 0.1}, {"init": start})
    for stage in (task, start, train):
        store.get(stage, writing())
    found = store.explain(train.name)
    assert found["options"] == {"rate": 0.1}
    assert found["inputs"]["init"]["inputs"] == {"mood": {"output": task.name, "present": True, "inputs": {}}}
    store.remove(start.name)
    assert store.explain(train.name)["inputs"] == {"init": {"output": start.name, "present": False}}
    with pytest.raises(LoraloomError, match="no whole output 'train/b'"):
        store.explain("train/b")


def test_only_outputs_can_be_removed(tmp_path: Path) -> None:
    store = Store(tmp_path / "stages")
    store.get(Stage("task", "a", {}), writing())
    outside = tmp_path / "adapters" / "a"
    outside.mkdir(parents=True)
    (outside / RECORD).write_text(json.dumps({"kind": "train"}))
    with pytest.raises(LoraloomError, match="no whole output"):
        store.remove("../adapters/a")
    assert outside.is_dir()


def test_a_root_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(LoraloomError, match="file/stages: cannot be written"):
        Store(tmp_path / "file" / "stages").get(Stage("task", "a", {}), refusing)
