"""The page as a file: self-contained, small, escaped, accessible in its markup."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import plotly.graph_objects as go
import pytest

from loraloom.report import write_report
from loraloom.results import StudyResult


class Page(HTMLParser):
    """Every start tag with its attributes, the text of headings, and the text of scripts by id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags:
            self.texts.setdefault(self.tags[-1][0], []).append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def html(result: StudyResult, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the written page of the made-up study."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert write_report(result, path) == path
    return path.read_text(encoding="utf-8")


def specification(html: str) -> dict[str, list[list[dict[str, object]]]]:
    start = html.index('id="figures">') + len('id="figures">')
    found: dict[str, list[list[dict[str, object]]]] = json.loads(html[start : html.index("</script>", start)])
    return found


def test_nothing_comes_from_the_network_and_the_size_is_capped(html: str) -> None:
    """No address in src or href, plotly once, under 8 MB."""
    page = Page(html)
    links = [value or "" for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href")]
    assert links
    assert not [link for link in links if "http" in link or link.startswith("//")]
    assert "@import" not in html
    assert html.count("* plotly.js v") == 1
    assert len(html.encode()) < 8_000_000


def test_markup_has_landmarks_headings_in_order_and_named_tables(html: str) -> None:
    """One h1, no skipped level, a caption and scopes for every table, every link inside the page lands."""
    page = Page(html)
    names = [tag for tag, _ in page.tags]
    levels = [int(tag[1]) for tag in names if len(tag) == 2 and tag[0] == "h" and tag[1].isdigit()]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert {"header", "nav", "main", "footer"} <= set(names)
    assert names.count("table") == names.count("caption") > 20
    assert all(attrs.get("scope") in ("col", "row") for attrs in page.of("th"))
    assert all(attrs.get("type") == "button" and attrs.get("aria-pressed") for attrs in page.of("button"))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {attrs["href"] for attrs in page.of("a")} <= {f"#{name}" for name in ids}


def test_page_tells_how_it_was_made(html: str, result: StudyResult) -> None:
    """Command, hashes, versions, seeds, recipe, tasks, inits and notes are all on the page."""
    texts = [result.command, result.base_sha256, result.content_sha256, result.machine, "2.6.0", "rank: 8"]
    texts += [fact.description for fact in (*result.tasks, *result.inits)]
    texts += [task.example for task in result.tasks] + [note for init in result.inits for note in init.notes]
    assert not [text for text in (*texts, *result.notes) if text not in html]


def test_figures_are_valid_plotly_with_one_colour_per_init(html: str, result: StudyResult) -> None:
    """Every panel of every view passes plotly's own schema, colours set aside; an init keeps its colour everywhere."""
    drawn = specification(html)
    assert list(drawn) == ["merged", "scale", "interference", "layers", "single"]
    colours: dict[str, set[str]] = {}
    for views in drawn.values():
        for panels in views:
            assert len(panels) == len(views[0])
            for panel in panels:
                text = json.dumps({"data": panel["data"], "layout": panel["layout"]})
                for name in {piece.split(")")[0] for piece in text.split("var(")[1:]}:
                    assert f"{name}:" in html, f"{name} is no colour of the theme"
                    text = text.replace(f"var({name})", "#123456")
                go.Figure(json.loads(text))
                assert panel["alt"]
                for trace in panel["data"]:  # type: ignore[attr-defined]
                    if trace["type"] == "scatter":
                        colours.setdefault(trace["name"], set()).add(trace["marker"]["color"])
    assert sorted(colours) == sorted(init.name for init in result.inits)
    assert len(set.union(*colours.values())) == len(colours)
    assert all(len(found) == 1 for found in colours.values())


def test_first_chart_shows_the_tables_numbers(html: str, result: StudyResult) -> None:
    """The marks of OSRM with aligned heads are its test averages, at their error."""
    traces = specification(html)["merged"][0][0]["data"]
    trace = next(t for t in traces if t["name"] == "osrm" and "open" not in t["marker"]["symbol"])  # type: ignore[attr-defined]
    seeds = [
        m for m in result.merges if (m.init, m.split, m.aligned, m.rule) == ("osrm", "test", True, "task_arithmetic")
    ]
    assert trace["x"][0] == pytest.approx(100 * sum(m.average.value for m in seeds) / len(seeds))


def test_names_of_users_are_text(make: Callable[..., StudyResult], tmp_path: Path) -> None:
    """Names that look like markup show as they are: they close no script, open no tag, and are no plotly markup."""
    evil = "</script><script>alert(1)</script>"
    bold = "<b>osrm</b> & co"
    result = make(inits={evil: 0.6, bold: 0.7})
    tasks = [task.model_copy(update={"description": evil, "example": bold}) for task in result.tasks]
    marked = result.model_copy(update={"name": evil, "command": bold, "notes": [evil], "tasks": tasks})
    html = write_report(marked, tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert len(page.of("script")) == 3
    assert not page.of("b")
    assert "<b>" not in html[: html.index("* plotly.js v")]
    names = {trace["name"] for trace in specification(html)["merged"][0][0]["data"]}  # type: ignore[attr-defined]
    assert "&lt;b&gt;osrm&lt;/b&gt; &amp; co" in names


def test_study_with_parts_missing_still_makes_a_page(make: Callable[..., StudyResult], tmp_path: Path) -> None:
    """One seed without interference, or nothing measured at all: the charts that have no data are left out."""
    partial = make(seeds=(1,), aligned=(False,)).model_copy(update={"interference": []})
    html = write_report(partial, tmp_path / "partial.html").read_text(encoding="utf-8")
    assert list(specification(html)) == ["merged", "scale", "single"]
    assert "this study has one seed" in html
    bare = partial.model_copy(update={"merges": [], "singles": [], "notes": []})
    html = write_report(bare, tmp_path / "bare.html").read_text(encoding="utf-8")
    assert specification(html) == {}
    assert "No merged adapter was measured" in html
