"""Numbers and lists in words: as many digits as mean something, and never a Python list."""

from __future__ import annotations

import math
from collections.abc import Sequence


def number(value: float | None) -> str:
    """Return a number with the three digits that mean something: 0.00123, 0.5, 12.3, 4,096; - where there is none."""
    if value is None or math.isnan(value):
        return "-"
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.1e}"


def span(least: float, most: float) -> str:
    """Return two numbers in words, or one where they are equal: 8, 4 to 16."""
    return number(least) if least == most else f"{number(least)} to {number(most)}"


def percent(share: float | None) -> str:
    """Return a share as so many of a hundred."""
    return "-" if share is None else f"{number(100 * share)} %"


def counted(count: int, thing: str) -> str:
    """Return a count with what is counted: 1 layer, 24 layers."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def listed(names: Sequence[str], most: int = 6) -> str:
    """Return names in a row: a, b and c; of more than `most` the first ones and a count."""
    if len(names) > most:
        return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} more"
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
