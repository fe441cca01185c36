"""The page in a real Chromium: drawn, quiet, narrow, dark, and worked by keyboard."""

from __future__ import annotations

import os
import shutil
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from loraloom.report import write_report
from loraloom.results import StudyResult

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-quic", "--disable-background-networking"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Start the Chromium of this machine, or skip."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = (os.environ.get("LORALOOM_CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium on this machine: install one or name it in LORALOOM_CHROMIUM")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def report(result: StudyResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the page once."""
    return write_report(result, tmp_path_factory.mktemp("browser") / "report.html")


@pytest.fixture(scope="module")
def faults() -> list[str]:
    """Collect whatever the browser complains about or asks for."""
    return []


@pytest.fixture(scope="module")
def page(browser: Browser, report: Path, faults: list[str]) -> Iterator[Page]:
    """Open the page once, at desk width in the light theme."""
    opened = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme="light")
    opened.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on(
        "request", lambda request: faults.append(request.url) if request.url[:5] not in ("file:", "data:") else None
    )
    opened.goto(report.as_uri())
    opened.wait_for_function(
        "document.querySelectorAll('.plot svg.main-svg').length >= document.querySelectorAll('.plot').length"
    )
    yield opened
    opened.close()


def test_every_chart_is_drawn_named_and_has_its_numbers(page: Page, faults: list[str]) -> None:
    """Marks in every panel, a text for each, and a table beneath each chart; no complaint and no request."""
    panels = page.locator("[data-panel]")
    assert panels.count() == 1 + 2 + 3 + 3 + 1
    for panel in panels.all():
        marks = panel.locator("path.point, path.js-line, .heatmaplayer image, .heatmaplayer path")
        assert marks.count() > 0
        assert panel.get_attribute("role") == "img"
        assert len(panel.get_attribute("aria-label") or "") > 40
    for chart in page.locator("[data-chart]").all():
        assert chart.locator("details table caption").count() > 0
    assert faults == []


def test_buttons_work_by_keyboard_and_change_the_chart(page: Page) -> None:
    """Enter on another rule redraws the lines and its text; Space on an init takes its line away and back."""
    chart = page.locator("[data-chart=scale]")
    line = chart.locator("path.js-line").first
    before, text = line.get_attribute("d"), chart.locator("[data-panel]").first.get_attribute("aria-label")
    button = chart.locator("[data-view='2']")
    button.focus()
    page.keyboard.press("Enter")
    page.wait_for_timeout(200)
    assert [b.get_attribute("aria-pressed") for b in chart.locator("[data-view]").all()] == ["false", "false", "true"]
    assert line.get_attribute("d") != before
    assert chart.locator("[data-panel]").first.get_attribute("aria-label") != text
    count = chart.locator("path.js-line").count()
    chart.locator("[data-init='1']").focus()
    page.keyboard.press("Space")
    page.wait_for_timeout(200)
    assert chart.locator("path.js-line").count() == count - 2
    assert chart.locator("[data-init='1']").get_attribute("aria-pressed") == "false"
    page.keyboard.press("Space")
    page.wait_for_timeout(200)
    assert chart.locator("path.js-line").count() == count
    maps = page.locator("[data-chart=interference]")
    cells = maps.locator(".annotation-text").all_text_contents()
    maps.locator("[data-view='3']").press("Enter")
    page.wait_for_timeout(200)
    assert maps.locator(".annotation-text").all_text_contents() != cells


def test_dark_theme_follows_while_open(page: Page) -> None:
    """Page, chart text and marks take the other theme when the setting changes, with readable contrast in both."""

    def colours() -> list[str]:
        found: list[str] = page.evaluate(
            """[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,
            getComputedStyle(document.querySelector('.plot .xtick text')).fill,
            getComputedStyle(document.querySelector('.plot path.point')).stroke]"""
        )
        return found

    def taken(theme: str, done: Callable[[list[str]], bool]) -> list[str]:
        page.emulate_media(color_scheme=theme)
        until = time.monotonic() + 10  # charts are drawn anew, slowly where other processes have the cores
        while not done(colours()) and time.monotonic() < until:
            page.wait_for_timeout(100)
        return colours()

    light = colours()
    dark = taken("dark", lambda found: all(one != other for one, other in zip(light, found, strict=True)))
    assert all(one != other for one, other in zip(light, dark, strict=True))
    assert taken("light", lambda found: found == light) == light
    for background, *texts in (light, dark):
        assert all(contrast(background, text) >= 4.5 for text in texts[:2])
        assert contrast(background, texts[2]) >= 3


def test_text_contrast_in_both_themes(page: Page) -> None:
    """Every visible text of the page, and of the maps' cells, reaches the AA ratio against what lies behind it."""
    script = """() => {
      const out = [];
      const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
      while (walk.nextNode()) {
        const node = walk.currentNode.parentElement;
        const skip = node.closest('script, style, noscript, .plot') || !node.checkVisibility();
        if (skip || !walk.currentNode.data.trim()) continue;
        let back = node;
        while (back && getComputedStyle(back).backgroundColor === 'rgba(0, 0, 0, 0)') back = back.parentElement;
        out.push([getComputedStyle(node).color, getComputedStyle(back || document.body).backgroundColor]);
      }
      return out; }"""
    for theme in ("dark", "light"):
        page.emulate_media(color_scheme=theme)
        page.wait_for_timeout(300)
        pairs = {tuple(pair) for pair in page.evaluate(script)}
        assert len(pairs) > 3
        assert [pair for pair in pairs if contrast(*pair) < 4.5] == []


def test_phone_width_does_not_scroll_sideways_and_first_tab_skips(
    browser: Browser, report: Path, tmp_path: Path
) -> None:
    """At 360 px the page stays within its width, charts included; its picture is not blank; Tab, Enter skips ahead."""
    phone = browser.new_page(viewport={"width": 360, "height": 740}, reduced_motion="reduce")
    phone.goto(report.as_uri())
    phone.wait_for_selector(".plot svg.main-svg")
    phone.keyboard.press("Tab")
    assert phone.evaluate("document.activeElement.className") == "skip"
    phone.keyboard.press("Enter")
    assert phone.evaluate("document.activeElement.id") == "content"
    for box in phone.locator("summary").all():
        box.click()
    assert phone.evaluate("document.documentElement.scrollWidth") == 360
    widest = "Math.max(...[...document.querySelectorAll('.plot svg')].map(e => e.getBoundingClientRect().right))"
    assert phone.evaluate(widest) <= 360
    shot = tmp_path / "phone.png"
    phone.locator("[data-chart=merged]").screenshot(path=str(shot))
    assert distinct_rows(shot.read_bytes()) > 50
    phone.close()


def test_the_page_of_answers_in_both_themes_and_widths(browser: Browser, answers: StudyResult, tmp_path: Path) -> None:
    """Every chart is drawn, what is kept among them, nothing complains, and a phone does not scroll sideways."""
    faults: list[str] = []
    opened = browser.new_page(viewport={"width": 390, "height": 900}, color_scheme="dark")
    opened.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.goto(write_report(answers, tmp_path / "report.html").as_uri())
    opened.locator("summary", has_text="Every metric of every task").click()
    for width, theme in ((390, "dark"), (1280, "light")):
        opened.set_viewport_size({"width": width, "height": 900})
        opened.emulate_media(color_scheme=theme)  # type: ignore[arg-type]
        opened.wait_for_timeout(300)
        assert opened.evaluate("document.documentElement.scrollWidth") == width
        for panel in opened.locator("[data-panel]").all():
            assert panel.locator("path.point, path.js-line, .heatmaplayer image, .heatmaplayer path").count() > 0
        assert opened.locator("[data-chart=kept] .shapelayer path").count() >= 1  # own adapters
    assert faults == []
    opened.close()


def contrast(one: str, other: str) -> float:
    """Return the WCAG contrast of two CSS rgb() colours."""

    def luminance(colour: str) -> float:
        parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def distinct_rows(png: bytes) -> int:
    """Return how many different pixel rows a PNG has: a blank picture has one or two."""
    data, at, width, channels = b"", 8, 0, 0
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        kind, body = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, channels = struct.unpack(">I", body[:4])[0], {2: 3, 6: 4}[body[9]]
        if kind == b"IDAT":
            data += body
        at += 12 + length
    pixels, stride = zlib.decompress(data), width * channels + 1
    return len({pixels[row : row + stride] for row in range(0, len(pixels), stride)})
