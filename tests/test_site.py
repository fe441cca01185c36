"""The site: it is built with no warning, holds all of the code's own reference, and asks nothing of the network."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest

from loraloom.merging import get_rule, rule_names
from loraloom.study.recipe import Recipe
from test_house import ROOT, _commands


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site once, as `make docs` does."""
    pytest.importorskip("material", reason="install loraloom[docs] to build the site")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


def text(page: Path) -> str:
    """Return what a page says, without its tags."""
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


def test_every_rule_command_and_option_is_in_the_reference(site: Path) -> None:
    rules, commands, recipe = (text(site / "reference" / f"{name}.html") for name in ("rules", "commands", "recipe"))
    for name in rule_names():
        assert get_rule(name).formula in rules, name
        assert all(f"--{option.replace('_', '-')}" in rules for option in get_rule(name).options.model_fields), name
    for name, command in _commands().items():
        assert f"loraloom {name}" in commands
        assert all(one.opts[0] in commands for one in command.params if one.opts[0].startswith("-") and not one.hidden)
    assert all(option in recipe for option in Recipe.model_fields)
    assert "energy_share" in recipe


def test_every_public_name_has_its_docstring_in_the_reference(site: Path) -> None:
    import loraloom

    page = (site / "reference" / "python.html").read_text(encoding="utf-8")
    missing = [
        name for name in loraloom.__all__ if name != "__version__" and not re.search(rf'id="[\w.]*\.{name}"', page)
    ]
    assert not missing


def test_the_site_loads_nothing_from_outside(site: Path) -> None:
    loads = re.compile(r"""(?:src=|<link[^>]+href=|url\(|@import )["']?(?:https?:)?//[^\s"')]+""")
    pages = [path for path in site.rglob("*") if path.suffix in (".html", ".css")]
    assert len(pages) > 30
    found = {found for path in pages for found in loads.findall(path.read_text(encoding="utf-8"))}
    assert not found
