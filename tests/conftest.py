"""What several test files share."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

# threads that wait for others must not keep from the processor those that work
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

import tiny_study
import tiny_written

# tiny models run no faster on more threads, and sums then round as in the processes that the tests start
torch.set_num_threads(1)

# nor can a test tell what has reached the disk, as none cuts the power; tests/files/test_atomic.py counts the calls
os.fsync = lambda file: None


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A folder with adapters and statistics of three tasks; see `tiny_files`."""
    import tiny_files

    return tiny_files.write_three(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recipe.yaml and, in `study`, what a run of it left; read it, change nothing."""
    from loraloom.study.export import run_study
    from loraloom.study.recipe import Recipe

    folder = tmp_path_factory.mktemp("finished")
    run_study(Recipe.load(tiny_study.write_study(folder)), folder / "study")
    return folder


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recipe.yaml of tasks of answers and what a run left in `study`; read it, change nothing."""
    from loraloom.study.export import run_study
    from loraloom.study.recipe import Recipe

    folder = tmp_path_factory.mktemp("written")
    run_study(Recipe.load(tiny_written.write_study(folder)), folder / "study")
    return folder


# a command in a test lets through what nobody foresaw, so that no fault of our own passes for one of the input
os.environ.setdefault("LORALOOM_RAISE", "1")


COLUMNS = ("tried", "refused", "accepted", "traceback", "hang", "wrong", "slow")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tell how many malformed inputs of each kind the tests of tests/fuzz tried, and how they ended."""
    found: dict[str, Counter[str]] = {}
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if getattr(report, "when", "") == "teardown":
            for kind, tally in dict(report.user_properties).get("malformed inputs", {}).items():
                found.setdefault(kind, Counter()).update(tally)
    if not found:
        return
    terminalreporter.section("malformed inputs")
    terminalreporter.write_line(f"{'kind':<14}" + "".join(f"{column:>10}" for column in COLUMNS))
    for kind, tally in [*sorted(found.items()), ("in all", sum(found.values(), Counter()))]:
        terminalreporter.write_line(f"{kind:<14}" + "".join(f"{tally[column]:>10}" for column in COLUMNS))
