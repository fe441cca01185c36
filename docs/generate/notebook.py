"""The notebooks of examples/: `python docs/generate/notebook.py` runs their cells anew and keeps what each one shows.

Cells are plain Python, run in one namespace in the notebook's folder; what a cell's last line is, is shown.
"""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
Shown = dict[str, str]


def run_cells(path: Path) -> list[Shown]:
    """Return what each code cell of a notebook shows: HTML or text by its media type, nothing for most."""
    names: dict[str, Any] = {}
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        return [_run(_source(cell), names, path.name) for cell in code_cells(path)]
    finally:
        os.chdir(here)


def code_cells(path: Path) -> list[dict[str, Any]]:
    """Return the code cells of a notebook."""
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def stored(cell: Mapping[str, Any]) -> Shown:
    """Return what a cell showed when it was run last."""
    found = [output["data"] for output in cell["outputs"]]
    return {kind: "".join(lines) for kind, lines in found[0].items()} if found else {}


def as_page(path: Path) -> str:
    """Return a notebook as Markdown: its words, its code, and what that shows."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = _source(cell)
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        shown = stored(cell) if cell["cell_type"] == "code" else {}
        if "text/html" in shown:
            parts.append(f"<div>{shown['text/html']}</div>")
        elif shown:
            parts.append(f"```text\n{shown['text/plain']}\n```")
    return "\n\n".join(parts) + "\n"


def _source(cell: Mapping[str, Any]) -> str:
    return "".join(cell["source"])


def _run(source: str, names: dict[str, Any], name: str) -> Shown:
    """Run one cell, and return what its last line is, as a notebook shows it."""
    body = ast.parse(source, name).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), name, "exec"), names)
    if not isinstance(last, ast.Expr):
        return {}
    value = eval(compile(ast.Expression(last.value), name, "eval"), names)
    rich = getattr(value, "_repr_html_", None)
    return {"text/html": rich()} if rich else {"text/plain": repr(value)}


def _store(path: Path) -> None:
    """Write a notebook anew with what its cells show now."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, (cell, shown) in enumerate(zip(cells, run_cells(path), strict=True), start=1):
        data = {"text/plain": ["..."], **{kind: text.splitlines(keepends=True) for kind, text in shown.items()}}
        output = {"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": data}
        cell |= {"execution_count": number, "outputs": [output] if shown else []}
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for found in sorted(EXAMPLES.glob("*.ipynb")):
        _store(found)
