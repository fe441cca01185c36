"""No results file, however spoiled, ends in anything but a page or one message; and no name in it is ever markup."""

from __future__ import annotations

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from harness import judge, many
from hypothesis import given
from strategies_results import as_bytes, hostile, renamed, results, study

from loraloom.report import markdown_tables, page, write_report
from loraloom.results import StudyResult


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module", autouse=True)
def _small_pages() -> Any:
    """Four megabytes of plotly.js in every page would take all the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "get_plotlyjs", lambda: "/* plotly.js */")
        yield


class Markup(HTMLParser):
    """Counts the elements of a page and keeps the kinds of their attributes, the targets of links and all script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: set[tuple[str, str]] = set()
        self.links: set[str] = set()
        self.scripts: list[str] = []
        self._in_script = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {(tag, name) for name, _ in attrs}
        self.links |= {value or "" for name, value in attrs if name in ("href", "src")}
        self._in_script = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts.append(data)


def drawn(folder: Path, content: bytes) -> str:
    """Return the page of a results file."""
    path = folder / "results.json"
    path.write_bytes(content)
    result = StudyResult.load(path)
    markdown_tables(result)
    return write_report(result, folder / "report.html", overwrite=True).read_text(encoding="utf-8")


def figures(html: str) -> Any:
    """Return what the page's script draws, as a browser would read it: NaN is no JSON."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', html, flags=re.S)
    assert found is not None
    return json.loads(found[1], parse_constant=refuse)


def faults(html: str) -> str:
    """Return what is wrong with the page of an accepted file."""
    markup = Markup(html)
    if markup.tags["script"] != 3 or any(name.startswith("on") for _, name in markup.attributes):
        return "script of the file's own"
    try:
        figures(html)
    except ValueError as error:
        return f"the page's figures are no JSON: {error}"
    return ""


@many
@given(results())
def test_results(folder: Path, content: bytes) -> None:
    judge("results", lambda: drawn(folder, content), check=faults)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Markup:
    """Return what a page of plain names has."""
    return Markup(drawn(folder, as_bytes(study())))


@many
@given(content=renamed(hostile()))
def test_names_are_never_markup(folder: Path, plain: Markup, content: dict[str, Any]) -> None:
    """Whatever things are called, the page has the elements, attributes, links and script of plain names."""
    html = judge("results", lambda: drawn(folder, as_bytes(content)), check=faults)
    if html is None:  # two things of one name
        return
    found = Markup(html)
    assert found.attributes <= plain.attributes
    assert found.links == plain.links
    assert found.tags.keys() == plain.tags.keys()
    assert found.scripts[1:] == plain.scripts[1:]  # but for the figures
    panels = [panel for views in figures(html).values() for view in views for panel in view]
    read_by_plotly = json.dumps([[panel["data"], panel["layout"]] for panel in panels])
    assert not re.search(r"<(?!extra>|/extra>)", read_by_plotly)  # it takes a few tags for markup
