"""Gives each test's report what became of its malformed inputs, from wherever it ran; tests/conftest.py prints it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from harness import TALLY


@pytest.fixture(autouse=True)
def _tally(request: pytest.FixtureRequest) -> Iterator[None]:
    TALLY.clear()
    yield
    request.node.user_properties.append(("malformed inputs", {kind: dict(tally) for kind, tally in TALLY.items()}))
