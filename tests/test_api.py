"""What `import loraloom` offers: every name is there, documented and typed, and nothing heavy loads before its time."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import loraloom


@pytest.mark.parametrize("name", loraloom.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(loraloom, name)
    if name == "__version__":
        return
    assert inspect.getdoc(value)
    assert name in dir(loraloom)
    if inspect.isclass(value):
        for member, function in vars(value).items():
            if inspect.isfunction(function) and not member.startswith("_") and function.__module__ == value.__module__:
                assert function.__doc__, f"{name}.{member}"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'marge'"):
        loraloom.marge  # noqa: B018


def test_no_public_name_is_hidden_by_its_module() -> None:
    folder = Path(loraloom.__file__).parent
    assert not {path.stem for path in folder.iterdir()} & set(loraloom.__all__)


def test_types_are_shipped() -> None:
    assert (Path(loraloom.__file__).parent / "py.typed").is_file()


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
