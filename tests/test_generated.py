"""What docs/ and examples/ keep of what code makes is what that code makes now: figures, and cells of notebooks."""

from __future__ import annotations

import importlib
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what imports a file of docs/generate."""
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "generate"))
    return importlib.import_module


def test_figures_are_those_that_the_code_draws_and_say_what_they_show(made: Any) -> None:
    drawn = made("figures").figures()
    page = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    assert {path.stem for path in (ROOT / "docs" / "figures").iterdir()} == set(drawn)
    for name, text in drawn.items():
        stored = (ROOT / "docs" / "figures" / f"{name}.svg").read_text(encoding="utf-8")
        assert re.sub(r"\d+\.\d+", "#", stored) == re.sub(r"\d+\.\d+", "#", text), "run docs/generate/figures.py"
        root = ElementTree.fromstring(stored)
        assert f"![{root.get('aria-label')}](figures/{name}.svg)" in page
        assert len(stored) < 20_000


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda path: path.name)
def test_a_notebook_shows_what_its_cells_show(path: Path, made: Any) -> None:
    notebook = made("notebook")
    shown = notebook.run_cells(path)
    for cell, found in zip(notebook.code_cells(path), shown, strict=True):
        kept = notebook.stored(cell)
        assert {kind: kept[kind] for kind in found} == found, "run docs/generate/notebook.py"
    titles = [re.findall("<caption>(.*?)</caption>", one.get("text/html", "")) for one in shown]
    told = " ".join(title for found in titles for title in found)
    for title in ("LoRA adapter", "Merged by", "Statistics of", "Study "):
        assert title in told
    assert "True" in [one.get("text/plain") for one in shown]  # the sum against the dense one
