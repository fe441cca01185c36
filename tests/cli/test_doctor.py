"""The command doctor tells what is there and what is missing, each with how to get it; and fails where that matters."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import call, page, said
from loraloom.model import doctor


@pytest.fixture(autouse=True)
def _fresh() -> None:
    doctor._import_fault.cache_clear()


def named(found: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(one for one in found if one["name"] == name)


def test_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "loraloom" / "bases").mkdir(parents=True)
    (tmp_path / "loraloom" / "bases" / "half").write_bytes(b"1" * 1000)
    told = said("doctor")
    assert named(told["packages"], "torch")["version"] == version("torch")
    assert told["threads"] == torch.get_num_threads()
    assert named(told["devices"], "cpu")["memory"] == told["memory"]
    assert len(told["devices"]) == 1 + torch.cuda.device_count() + torch.backends.mps.is_available()
    cache = named(told["caches"], "bases that loraloom made")
    assert (cache["place"], cache["size"], cache["at_least"]) == (str(tmp_path / "loraloom"), 1000, False)
    base = named(told["bases"], "smollm2")  # not made in this cache, and nothing is fetched to look
    assert (base["place"], "when it is first used" in base["problem"]) == (None, True)
    assert told["faults"] == []
    shown = page("doctor")
    assert "Nothing is missing that it needs" in shown
    assert "XDG_CACHE_HOME moves it" in " ".join(shown.split())


def test_what_is_missing_and_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["torch>=999", "no-such-package>=2", "peft>=0.1", "absent; python_version < '3'", "absent; extra == 'ray'"]
    monkeypatch.setattr(doctor, "requires", lambda _: asked)
    monkeypatch.setattr(doctor, "metadata", lambda _: _Metadata())
    done = call("doctor", "--json")
    assert done.exit_code == 1
    told = doctor.look_around()
    assert told.faults == [
        f"torch: {version('torch')} is installed, >=999 is needed; run: pip install 'torch>=999'",
        "no-such-package: is missing; run: pip install 'no-such-package>=2'",
    ]
    assert [(one.name, one.missing, one.get) for one in told.extras] == [
        ("ray", ["absent"], "pip install 'loraloom[ray]'")
    ]
    text = " ".join(call("doctor").output.split())
    assert "warning: no-such-package: is missing; run: pip install 'no-such-package>=2'" in text
    assert "ray missing; run: pip install 'loraloom[ray]'" in text


class _Metadata:
    def get_all(self, _: str) -> list[str]:
        return ["dev", "ray"]


def test_a_package_that_cannot_be_imported_is_told_with_its_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def broken(name: str, *more: Any) -> Any:
        if name == "torch":
            raise OSError("libcudart.so.99: cannot open shared object file")
        return real(name, *more)

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    told = doctor.look_around()
    assert told.faults == [
        "torch: cannot be imported (OSError: libcudart.so.99: cannot open shared object file); "
        "run: pip install --force-reinstall torch"
    ]
    assert told.devices == []
    assert {one.problem for one in told.bases} == {"cannot be looked for until the faults below are mended"}


def test_a_cache_that_cannot_be_written_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "rows"))
    monkeypatch.setattr(doctor.os, "access", lambda place, _: Path(place) != tmp_path)
    assert doctor.look_around().faults == [
        f"{tmp_path / 'rows'}: cannot be written; name another folder by HF_DATASETS_CACHE"
    ]


def test_a_cache_of_more_files_than_can_be_counted_is_told_as_at_least(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"1" * 10)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert doctor._size(tmp_path) == (20, True)
    monkeypatch.setattr(doctor, "_COUNTING", -1.0)
    size, whole = doctor._size(tmp_path)
    assert not whole
    assert size < 20
