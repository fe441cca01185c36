"""What reaches the terminal: pages that fit it, JSON that is JSON, and no character that steers it."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from loraloom.cli import common
from loraloom.cli.main import app
from loraloom.cli.terminal import Out, as_typed, show_error
from loraloom.errors import LoraloomError, printable, reads_file

STEERING = "\x1b]0;OWNED\x07\x1b[2J\x9b2J\u202e\udcff"


def test_printable_shows_what_steers_a_terminal_and_keeps_the_rest() -> None:
    assert printable("a\x1b[2J\x07\r\tb\x9b\u202e\udcff") == "a\\x1b[2J\\x07\\r\\tb\\x9b\\u202e\\udcff"
    assert printable("Größe 尺寸 → 1\n2") == "Größe 尺寸 → 1\n2"
    assert printable("95.5\xa0%") == "95.5 %"


def test_every_kind_of_output_is_made_printable(capsys: pytest.CaptureFixture[str]) -> None:
    out = Out(as_json=False, quiet=False)
    out.result({STEERING: STEERING})
    out.result({}, STEERING)
    out.say(STEERING)
    out.facts(STEERING, [(STEERING, STEERING)])
    out.table(STEERING, [STEERING, "b"], [[STEERING, STEERING]])
    out.hint(STEERING)
    out.warn(STEERING)
    out.next(STEERING, "loraloom", STEERING)
    show_error(LoraloomError(STEERING, STEERING))
    Out(as_json=True, quiet=False).result({STEERING: STEERING})
    shown = "".join(capsys.readouterr())
    assert shown.replace("\n", "").isprintable()
    assert shown.count("OWNED") >= 15


def test_names_in_a_strangers_adapter_do_not_steer_the_terminal(tmp_path: Path) -> None:
    """Of a base model in the results, and of a tensor in an error."""
    layer = "base_model.model.encoder.query"
    tensors = {f"{layer}.lora_A.weight": torch.ones(2, 5), f"{layer}.lora_B.weight": torch.ones(6, 2)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["query"], "bias": "none"}
    for name, base, more in (("base", STEERING[:-1], {}), ("key", "base", {f"{layer}.{STEERING[:-1]}.lora_x": None})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
        save_file(tensors | {key: torch.ones(1) for key in more}, tmp_path / name / "adapter_model.safetensors")
        for tail in ([], ["--json"]):
            done = CliRunner().invoke(app, ["inspect", str(tmp_path / name), *tail])
            assert "OWNED" in done.output
            assert done.output.replace("\n", "").isprintable()


def test_json_is_for_facts_and_quiet_for_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for as_json, quiet in ((True, False), (False, True), (True, True)):
        out = Out(as_json=as_json, quiet=quiet)
        out.table("t", ["a"], [["b"]])
        out.facts("t", [("a", "b")])
        out.say("s")
        out.hint("do")
        out.warn("do")
        out.next("do", "loraloom", "demo")
        out.result({"a": Path("x"), "b": math.nan, "c": (1, math.inf)}, "text")
        captured = capsys.readouterr()
        assert captured.err == ""
        assert captured.out == ('{\n "a": "x",\n "b": null,\n "c": [\n  1,\n  null\n ]\n}\n' if as_json else "")


def test_a_command_to_type_can_be_pasted_and_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["loraloom", "merge", *(f"runs/adapter {i}" for i in range(9)), "-o", "merged"]
    typed = as_typed(words, 80)
    assert max(map(len, typed.splitlines())) <= 80
    assert shlex.split(typed.replace("\\\n", "")) == words


@pytest.mark.parametrize("inside", [True, False])
def test_what_nobody_foresaw_is_told_with_the_file_and_where_to_report(
    inside: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fault met while a file was read is the file's, any other loraloom's own; tests see the exception itself."""

    @reads_file
    def read(count: int, path: Path) -> None:
        raise KeyError("odd")

    def fault() -> Any:
        read(1, Path("in.json")) if inside else {}["odd"]

    with pytest.raises(KeyError), common.command(False, False):
        fault()
    monkeypatch.delenv("LORALOOM_RAISE")
    with pytest.raises(common.typer.Exit) as left, common.command(False, False):
        fault()
    assert left.value.exit_code == (2 if inside else 1)
    told = capsys.readouterr().err
    assert ("in.json: cannot be used: KeyError: 'odd'" if inside else "a fault of loraloom's own: KeyError") in told
    place = Path(told.rsplit(" ", 1)[1].strip())
    assert "Traceback" in place.read_text()
    assert "Traceback" not in told
    place.unlink()


def test_a_fault_of_the_system_names_the_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LORALOOM_RAISE")
    with pytest.raises(common.typer.Exit) as left, common.command(False, False):
        Path("/nowhere/at/all").read_bytes()
    assert left.value.exit_code == 2
    assert "/nowhere/at/all: No such file or directory" in capsys.readouterr().err


def test_what_is_stopped_tells_that_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    for stop in (KeyboardInterrupt(), SystemExit(143)):
        for quiet in (False, True):
            with pytest.raises(type(stop)), Out(as_json=False, quiet=quiet).goes_on():
                raise stop
            told = capsys.readouterr().err
            assert ("the same command goes on where this one stood" in told) is not quiet
