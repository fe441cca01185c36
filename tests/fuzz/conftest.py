"""Prints what became of the malformed inputs, a line a file kind."""

from __future__ import annotations

import pytest
from harness import TALLY

COLUMNS = ("tried", "refused", "accepted", "traceback", "hang", "wrong", "slow")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tell how many inputs of each kind were tried, and how they ended."""
    if not TALLY:
        return
    terminalreporter.section("malformed inputs")
    terminalreporter.write_line(f"{'kind':<12}" + "".join(f"{column:>11}" for column in COLUMNS))
    for kind, tally in sorted(TALLY.items()):
        terminalreporter.write_line(f"{kind:<12}" + "".join(f"{tally[column]:>11}" for column in COLUMNS))
    total = [sum(tally[column] for tally in TALLY.values()) for column in COLUMNS]
    terminalreporter.write_line(f"{'in all':<12}" + "".join(f"{count:>11}" for count in total))
