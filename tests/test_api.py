"""What `import loraloom` offers: every name is there, documented and typed, and nothing heavy loads before its time."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_origin

import pytest

import loraloom


@pytest.mark.parametrize("name", loraloom.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(loraloom, name)
    if name == "__version__" or get_origin(value) is Literal:  # a type's alias has no docstring of its own
        return
    assert inspect.getdoc(value)
    assert name in dir(loraloom)
    if inspect.isclass(value):
        for member, function in vars(value).items():
            if inspect.isfunction(function) and not member.startswith("_") and function.__module__ == value.__module__:
                assert function.__doc__, f"{name}.{member}"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="marge"):
        loraloom.marge  # noqa: B018


def test_no_public_name_is_hidden_by_its_module() -> None:
    folder = Path(loraloom.__file__).parent
    assert not {path.stem for path in folder.iterdir()} & set(loraloom.__all__)


def test_types_are_shipped() -> None:
    assert (Path(loraloom.__file__).parent / "py.typed").is_file()
    assert (Path(loraloom.__file__).parent / "__init__.pyi").is_file()


ROOT = Path(__file__).parent.parent
SCRIPTS = [*(ROOT / "examples").glob("*.py"), *(ROOT / "experiments").glob("*.py")]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("path", [*SCRIPTS, *PAGES], ids=lambda path: path.name)
def test_what_people_read_imports_from_the_root_alone(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"^ *(?:from|import) loraloom\..*$", text, flags=re.M)
    for names in re.findall(r"^ *from loraloom import (\([^)]*\)|.*)$", text, flags=re.M):
        used = {name.split(" as ")[0].strip() for name in names.strip("()").split(",")} - {""}
        assert used <= set(loraloom.__all__), path


def test_import_and_help_load_nothing_heavy() -> None:
    script = (
        "import sys, loraloom.cli.main\n"
        "try: loraloom.cli.main.app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = [name for name in ('torch', 'transformers', 'peft', 'datasets', 'numpy') if name in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=60)


def test_merging_and_subspaces_stand_without_transformers() -> None:
    script = (
        "import sys, loraloom.merging, loraloom.starts.subspace\n"
        "heavy = [name for name in ('transformers', 'peft', 'datasets') if name in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
