"""What a notebook shows of adapters, merges, statistics and results is short, true and no HTML of a file's."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import torch

import loraloom as ll
from tiny_files import adapter, statistics

ROOT = Path(__file__).parent.parent
EVIL = "<script>alert(1)</script>"


def cells(shown: str) -> dict[str, str]:
    """Return a table of facts as its rows' names and values."""
    rows = re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td></tr>", shown)
    return {unescape(name): unescape(value) for name, value in rows}


def check(shown: str) -> None:
    """Fail where it is long, or a tag in it is not of the table."""
    assert len(shown) < 5000
    assert set(re.findall(r"</?(\w+)", shown)) <= {"table", "caption", "tr", "th", "td"}


def test_an_adapter() -> None:
    one = ll.Adapter({EVIL + ".query": adapter(0).updates["encoder.0.query"]}, {"base_model_name_or_path": EVIL})
    check(one._repr_html_())
    told = cells(adapter(0)._repr_html_())
    numbers = sum(update.A.numel() + update.B.numel() for update in adapter(0).updates.values())
    assert (told["layers"], told["rank"], told["numbers"]) == ("2", "2", str(numbers))
    assert told["of kinds"] == "query"


def test_a_merge() -> None:
    merged = ll.merge({"mood": adapter(0), "tone": adapter(10)}, "task_arithmetic", weights=[1, 0.5], scale=0.3, rank=2)
    shown = merged._repr_html_()
    check(shown)
    assert "Merged by task_arithmetic" in shown
    told = cells(shown)
    assert told["adapters"].endswith("tone (0.5)")
    assert (told["scale"], told["rank"], told["layers"]) == ("0.3", "2", "2")
    # against the dense sum: what the two directions kept do not hold
    worst = 0.0
    for module, update in adapter(0).updates.items():
        dense = update.dense().double() + 0.5 * adapter(10).updates[module].dense().double()
        values = torch.linalg.svdvals(dense).square()
        worst = max(worst, float(values[2:].sum() / values.sum()))
    assert told["energy lost"].startswith(f"at most {100 * worst:.2g} %")


def test_statistics() -> None:
    check(statistics(0)._repr_html_())
    told = cells(statistics(0, 20)._repr_html_())
    assert (told["tokens"], told["layers"], told["widths"], told["privacy"]) == ("20", "2", "8", "none")


def test_results() -> None:
    result = ll.StudyResult.load(ROOT / "docs" / "results" / "gen6-smollm2-seed0.json")
    shown = result._repr_html_()
    check(shown)
    best = max(one.average.value for one in result.merges if one.split == "test")
    rows = re.findall(r"<tr><td>(.*?)</td></tr>", shown)
    assert rows[0].split("</td><td>")[5].startswith(f"{100 * best:.1f} ")
    check(result.model_copy(update={"name": EVIL, "base": EVIL})._repr_html_())
