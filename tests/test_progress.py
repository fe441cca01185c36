"""Progress where no terminal is: plain lines with times, and none when quiet."""

from __future__ import annotations

import re

import pytest

from loraloom import progress
from loraloom.progress import Reporter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds since the start, which the test moves on."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_when_a_kind_begins_every_ten_seconds_and_when_it_ends(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Reporter() as reporter:
        reporter.begin("training", 3)
        for step in range(25):
            clock[0] += 1
            reporter.detail("training", f"mood\x1b[2J step {step}")
        reporter.advance("training")
        clock[0] = 3700
        reporter.reach("training", 3)
        reporter.begin("nothing", 0)
        assert list(reporter.each("layers", "ab")) == ["a", "b"]
        reporter.begin("loading", 1)
    out, err = capsys.readouterr()
    assert out == ""
    assert [re.sub(" +", " ", line.strip()) for line in err.splitlines()] == [
        "0:00 training: 3 to do",
        "0:10 training: 0 of 3, mood\\x1b[2J step 9",
        "0:20 training: 0 of 3, mood\\x1b[2J step 19",
        "1:01:40 training: done in 1:01:40",
        "1:01:40 nothing: 0 to do",
        "1:01:40 nothing: done in 0:00",
        "1:01:40 layers: 2 to do",
        "1:01:40 layers: done in 0:00",
        "1:01:40 loading",
        "1:01:40 loading: done in 0:00",
    ]


def test_what_failed_is_not_said_to_be_done(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with Reporter() as reporter:
            reporter.begin("training", 1)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert "done" not in capsys.readouterr().err


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter(quiet=True) as reporter:
        reporter.begin("training", 2)
        reporter.detail("training", "x")
        reporter.advance("training")
    assert capsys.readouterr() == ("", "")
