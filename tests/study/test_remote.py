"""Studies at an address: whole or not at all on a server of S3, whoever is killed, whoever else is at it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny_study
from loraloom.errors import LoraloomError
from loraloom.study import remote
from loraloom.study.engine import Worker
from loraloom.study.export import run_study
from loraloom.study.recipe import Recipe
from loraloom.study.remote import Remote, is_address, local_copy
from loraloom.study.store import Stage, Store

s3fs = pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Yield the address of a server of S3 on this machine, which lives as long as the tests of this file."""
    one = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    one.start()
    host, port = one.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield f"http://{host}:{port}"
        one.stop()


@pytest.fixture
def bucket(server: str, request: pytest.FixtureRequest) -> str:
    """Return the address of a new bucket."""
    name = f"bucket-{abs(hash(request.node.name)) % 10**8}"
    s3fs.S3FileSystem(use_listings_cache=False).mkdir(name)
    return f"s3://{name}"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what makes this process another machine: one with a folder of its own, which is empty at first."""

    def become(name: str) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))

    become("one")
    return become


A = Stage("fact", "a", {"word": "a"})


def write(folder: Path, scratch: Path) -> None:
    (folder / "below").mkdir()
    (folder / "below" / "word").write_text("a")
    (folder / "other").write_text("b")


def refuse(folder: Path, scratch: Path) -> None:
    raise AssertionError("made again")


def objects(address: str) -> list[str]:
    """Return the names of all objects at an address."""
    return sorted(s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True).find(address))


def test_another_machine_finds_what_one_has_made(bucket: str, machine: Any) -> None:
    made = Store(f"{bucket}/study/stages").get(A, write)
    machine("two")
    two = Store(f"{bucket}/study/stages")
    found = two.get(A, refuse)
    assert found != made
    assert (found / "below" / "word").read_text() == "a"
    assert sorted(two.outputs()) == [A.name]
    assert json.loads((found / "stage.json").read_text()) == json.loads((made / "stage.json").read_text())
    assert two.find(Stage("fact", "a", {"word": "b"})) is None


def test_what_is_killed_while_it_is_put_is_not_there(
    bucket: str, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was made is put by whoever has it, when it is asked for again."""
    one = Store(f"{bucket}/study/stages")
    assert one.remote is not None
    with monkeypatch.context() as patch:
        patch.setattr(one.remote.files, "pipe_file", lambda *args, **given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            one.get(A, write)
    assert objects(bucket)
    machine("two")
    assert Store(f"{bucket}/study/stages").find(A) is None
    machine("one")
    assert Store(f"{bucket}/study/stages").find(A) is not None
    machine("two")
    assert Store(f"{bucket}/study/stages").find(A) is not None


def test_of_two_that_make_one_output_at_a_time_the_first_stays(bucket: str, machine: Any) -> None:
    one = Store(f"{bucket}/study/stages")

    def slowly(folder: Path, scratch: Path) -> None:
        write(folder, scratch)
        machine("two")
        Store(f"{bucket}/study/stages").get(A, write)
        machine("one")

    one.get(A, slowly)
    assert one.remote is not None
    found = [name for name in objects(bucket) if "/fact/" in name]
    marker = one.remote._marker(A.key)
    assert marker is not None
    assert len(found) == 2
    assert all(marker["at"] in name for name in found)


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_an_output_that_is_not_as_it_was_put_is_made_again(bucket: str, machine: Any, damage: str) -> None:
    Store(f"{bucket}/study/stages").get(A, write)
    files = s3fs.S3FileSystem(use_listings_cache=False)
    name = next(name for name in objects(bucket) if name.endswith("word"))
    files.pipe_file(name, b"c") if damage == "changed" else files.rm_file(name)
    machine("two")
    with pytest.warns(UserWarning, match=rf"{A.name} is made again: .*{'was changed' if damage == 'changed' else ''}"):
        found = Store(f"{bucket}/study/stages").get(A, write)
    assert (found / "below" / "word").read_text() == "a"
    machine("three")
    Store(f"{bucket}/study/stages").get(A, refuse)


def test_notes_are_seen_from_elsewhere_until_they_are_forgotten(
    bucket: str, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_EVERY", 0.0)
    one = Store(f"{bucket}/study/stages")
    one.note(A, 1, 2, 0.5)
    machine("two")
    two = Store(f"{bucket}/study/stages")
    note = two.noted(A)
    assert note is not None
    assert (note["done"], note["total"], note["loss"]) == (1, 2, 0.5)
    one.forget(A)
    assert two.noted(A) is None


def test_a_study_at_an_address_is_the_same_and_is_done_for_every_machine(
    finished: Path, bucket: str, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, address = Recipe.load(finished / "recipe.yaml"), f"{bucket}/study"
    run_study(recipe, address)
    first = local_copy(address)
    machine("two")
    monkeypatch.setattr(Worker, "run", lambda self, call, progress: pytest.fail(f"{call.stage.name} is made again"))
    run_study(recipe, address)
    second = local_copy(address)
    assert first != second
    assert tiny_study.contents(first) == tiny_study.contents(second) == tiny_study.contents(finished / "study")
    figures = [tiny_study.figures(study / "results.json") for study in (first, second, finished / "study")]
    assert figures[0] == figures[1] == figures[2]
    there = {name.split("/", 2)[2] for name in objects(address)}
    written = {path.relative_to(second).as_posix() for path in second.rglob("*") if path.is_file()}
    assert {name for name in there if not name.startswith("stages/")} == {
        name for name in written if not name.startswith("stages/")
    }


def test_addresses_that_cannot_be_used(bucket: str, machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LoraloomError, match="s3://no-such-bucket/study/stages: cannot be used: ") as told:
        Store("s3://no-such-bucket/study/stages").get(A, write)
    assert "that the bucket is there" in told.value.hint
    with pytest.raises(LoraloomError, match="nosuch://bucket: cannot be used: Protocol not known: nosuch"):
        Remote("nosuch://bucket")
    assert is_address("s3://bucket/study")
    assert not is_address("studies/s3")
    assert not is_address(Path("C:/studies"))


def test_a_file_system_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec.core

    def absent(*args: Any, **given: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    with pytest.raises(LoraloomError, match="s3://bucket/study: Install s3fs to access S3") as told:
        Remote("s3://bucket/study")
    assert told.value.hint == "pip install 'loraloom[s3]'"
