"""What Tab completes are the words that the options take, and the rules that there are; and no Tab loads torch."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args

import pytest
from typer.testing import CliRunner

from loraloom.adapters.dialects import DIALECTS
from loraloom.adapters.servers import SERVERS
from loraloom.adapters.together import Targets
from loraloom.cli.main import app
from loraloom.merging import rule_names
from loraloom.merging.options import Dtype, Heads, Normalise
from loraloom.starts.options import Keep, StartRule


def completed(words: str) -> list[str]:
    """Return what bash is given for a line."""
    asked = {"_LORALOOM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    return CliRunner().invoke(app, [], prog_name="loraloom", env=asked).stdout.split()


@pytest.mark.parametrize(
    ("words", "known"),
    [
        ("loraloom merge --rule ", {"auto", *rule_names()}),
        ("loraloom compare --rule ", set(rule_names())),
        ("loraloom rules ", set(rule_names())),
        ("loraloom merge --normalise ", set(get_args(Normalise))),
        ("loraloom merge --heads ", set(get_args(Heads))),
        ("loraloom merge --targets ", set(get_args(Targets))),
        ("loraloom merge --dtype ", set(get_args(Dtype))),
        ("loraloom merge --to ", set(DIALECTS)),
        ("loraloom merge --for ", set(SERVERS)),
        ("loraloom export --for ", set(SERVERS)),
        ("loraloom init --rule ", set(get_args(StartRule))),
        ("loraloom init --keep ", set(get_args(Keep))),
        ("loraloom evaluate --split ", {"test", "heldout"}),
    ],
)
def test_an_option_completes_the_words_that_it_takes(words: str, known: set[str]) -> None:
    assert set(completed(words)) == known
    first = sorted(known)[0]
    assert first in completed(words + first[:2])
    assert all(word.startswith(first[:2]) for word in completed(words + first[:2]))


def test_commands_and_options_complete_too() -> None:
    assert completed("loraloom mer") == ["merge"]
    assert "--unlabelled" in completed("loraloom merge --un")


def test_a_tab_loads_no_torch() -> None:
    code = (
        "import sys; from loraloom.cli.main import app\nfrom typer.testing import CliRunner\n"
        "asked = {'_LORALOOM_COMPLETE': 'complete_bash', 'COMP_WORDS': 'loraloom merge --rule ts', 'COMP_CWORD': '3'}\n"
        "print(CliRunner().invoke(app, [], prog_name='loraloom', env=asked).stdout, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["tsv", "False"]
