"""Progress: plain lines with times where no terminal is, rows of stages at work where one is, and none when quiet."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from loraloom import progress
from loraloom.progress import Reporter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds since the start, which the test moves on."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the lines on standard error, and hold that nothing else was printed."""
    out, err = capsys.readouterr()
    assert out == ""
    return [re.sub(" +", " ", line.strip()) for line in err.splitlines()]


def test_lines_when_a_kind_begins_after_ten_seconds_every_minute_and_when_it_ends(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Reporter() as reporter:
        reporter.begin("training", 3)
        for step in range(75):
            clock[0] += 1
            reporter.detail("training", f"mood\x1b[2J step {step}")
        reporter.advance("training")
        clock[0] = 3700
        reporter.reach("training", 3)
        reporter.begin("nothing", 0)
        assert list(reporter.each("layers", "ab")) == ["a", "b"]
        reporter.begin("loading", 1)
    assert said(capsys) == [
        "0:00 training: 3 to do",
        "0:10 training: 0 of 3, mood\\x1b[2J step 9",
        "1:10 training: 0 of 3, mood\\x1b[2J step 69",
        "1:01:40 training: done in 1:01:40",
        "1:01:40 nothing: 0 to do",
        "1:01:40 nothing: done in 0:00",
        "1:01:40 layers: 2 to do",
        "1:01:40 layers: done in 0:00",
        "1:01:40 loading",
        "1:01:40 loading: done in 0:00",
    ]


def test_lines_of_stages_by_name(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """Two at work at once: each begins, tells its loss and the time left every minute, and ends; a quick one begins."""
    with Reporter() as reporter:
        reporter.begin("train", 5)
        reporter.found("train")
        reporter.enter("train", "a")
        reporter.enter("train", "a")
        reporter.enter("train", "b")
        for step in range(1, 91):
            clock[0] += 1
            reporter.step("train", "a", step, 90, 0.25 if step > 50 else None)
            reporter.step("train", "b", 10 + step, 200)
        reporter.leave("train", "a")
        clock[0] += 5
        reporter.enter("train", "quick")
        reporter.leave("train", "quick")
        reporter.leave("train", "b")
        reporter.enter("train", "never begun and yet done")
        reporter.leave("train", "never begun and yet done")
    assert said(capsys) == [
        "0:00 train: 5 to do",
        "0:00 train 2 of 5: a",
        "0:00 train 3 of 5: b",
        "0:10 train a: step 10 of 90, 1:20 left",
        "0:10 train b: step 20 of 200, 3:00 left",
        "1:10 train a: step 70 of 90, loss 0.25, 0:20 left",
        "1:10 train b: step 80 of 200, 2:00 left",
        "1:30 train a: done in 1:30, 3 left, about 4:30",
        "1:35 train 4 of 5: quick",
        "1:35 train b: done in 1:35, 1 left, about 0:31",
        "1:35 train 5 of 5: never begun and yet done",
        "1:35 train: done in 1:35, 1 of 5 were there already",
    ]


def test_more_of_a_kind_that_goes_on_adds_to_it(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter() as reporter:
        reporter.begin("statistics", 2)
        reporter.found("statistics")
        reporter.begin("statistics", 1)
        reporter.found("statistics")
        reporter.found("statistics")
        reporter.begin("statistics", 1)
    assert said(capsys) == [
        "0:00 statistics: 2 to do",
        "0:00 statistics",
        "0:00 statistics: done in 0:00, 3 of 3 were there already",
        "0:00 statistics",
        "0:00 statistics: done in 0:00",
    ]


def test_a_terminal_shows_a_row_for_every_stage_that_tells_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(progress, "Console", lambda **_: screen)
    reporter = Reporter()
    bars = reporter._shown
    assert isinstance(bars, progress._Bars)
    reporter.begin("train", 2)
    for name in ("a\x1b[2J", "b"):
        reporter.enter("train", name)
        reporter.step("train", name, 1, 10)
        reporter.step("train", name, 5, 10, 0.5)
    reporter.begin("train", 1)
    rows = [(task.description, task.completed, task.total, task.fields["detail"]) for task in bars.bars.tasks]
    assert rows[0][:3] == ("train", 0, 3)
    assert [row[1:3] for row in rows[1:]] == [(5, 10), (5, 10)]
    assert rows[1][3].startswith("a\\x1b[2J, loss 0.5, 0:0")
    reporter.leave("train", "b")
    reporter.found("train")
    assert [(task.completed, task.total) for task in bars.bars.tasks] == [(2, 3), (5, 10)]


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
