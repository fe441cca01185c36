"""What mkdocs does beside showing docs/: it makes the reference, and brings in the files outside that docs/ link to."""

from __future__ import annotations

import ast
import posixpath
import re
import sys
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "src")]

import notebook  # noqa: E402 (after the path that leads to it)
import reference  # noqa: E402

# files of the repository that are pages of the site as they are
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
CODE = {"examples": "*.[pi]*", "recipes": "*.yaml"}  # folders whose files are shown on pages of their own
_NOTEBOOK = "adapters, merges, statistics and a study, as a notebook shows them"
_FIGURE = re.compile(r"!\[[^\]]*\]\(figures/(\w+\.svg)\)")
_LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    made = {**reference.pages(), **_code_pages()}
    made |= {page: (ROOT / name).read_text(encoding="utf-8") for name, page in PAGES.items()}
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to files of the repository to their pages in the site, and set figures in: they take its theme."""
    figures = ROOT / "docs" / "figures"
    markdown = _FIGURE.sub(lambda one: f"<div>{(figures / one[1]).read_text(encoding='utf-8')}</div>", markdown)
    here = page.file.src_uri
    source = next((name for name, made in PAGES.items() if made == here), f"docs/{here}")

    def led(link: re.Match[str]) -> str:
        path = link[2]
        if ":" in path or here.startswith(("reference/", "examples/", "recipes/")):
            return link[0]
        target = place_of(posixpath.normpath(posixpath.join(posixpath.dirname(source), path)))
        return f"{link[1]}{posixpath.relpath(target, posixpath.dirname(here) or '.')}{link[3]}"

    return _LINK.sub(led, markdown)


def place_of(path: str) -> str:
    """Return where a file of the repository stands in the site."""
    if path in PAGES:
        return PAGES[path]
    top = path.split("/")[0]
    if top in CODE:
        return f"{path.rsplit('.', 1)[0]}.md" if "/" in path else "examples/index.md"
    return path.removeprefix("docs/")


def _code_pages() -> dict[str, str]:
    """Return a page for each example and recipe, and one that lists them."""
    made = {}
    parts = ["# Examples and recipes"]
    for folder, pattern in CODE.items():
        parts.append(f"## {folder.capitalize()}")
        for path in sorted((ROOT / folder).glob(pattern)):
            text = path.read_text(encoding="utf-8")
            name = f"{folder}/{path.name}"
            language = "yaml" if path.suffix == ".yaml" else "python"
            shown = (
                notebook.as_page(path) if path.suffix == ".ipynb" else f"# {path.name}\n\n```{language}\n{text}```\n"
            )
            made[place_of(name)] = shown
            link = posixpath.relpath(place_of(name), "examples")
            about = _about(text, language) if path.suffix != ".ipynb" else _NOTEBOOK
            parts.append(f"- [{path.name}]({link}): {about}")
    return {"examples/index.md": "\n\n".join(parts) + "\n", **made}


def _about(text: str, language: str) -> str:
    """Return the first sentence of a script's docstring or of the comment at a recipe's top."""
    if language == "python":
        said = ast.get_docstring(ast.parse(text)) or ""
    else:
        said = " ".join(re.match(r"(?:#.*\n)*", text)[0].replace("#", " ").split())  # type: ignore[index]
    return re.split(r"(?<=[.:])\s", " ".join(said.split()), maxsplit=1)[0].rstrip(":") or PurePosixPath(language).name
