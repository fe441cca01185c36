"""Commands as a user types them, in this process: what they print, and that their JSON is one for programs."""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from loraloom.cli.main import app

WIDTH = 80


def call(*words: object) -> Any:
    """Run a command in a terminal of 80 columns; return click's result."""
    done = CliRunner().invoke(
        app, [str(word) for word in words], prog_name="loraloom", catch_exceptions=False, env={"COLUMNS": str(WIDTH)}
    )
    logging.disable(logging.NOTSET)  # commands silence every library in this process; other tests want to hear them
    return done


def said(*words: object) -> Any:
    """Run a command that must succeed with --json; return what it tells."""
    done = call(*words, "--json")
    assert (done.exit_code, done.stderr) == (0, ""), done.output
    told = json.loads(done.stdout)
    if words[0] not in ("merge", "align", "rules", "chat", "distil"):
        check_json(told)
    return told


def said_thrice(*words: object) -> Any:
    """Run a command that must succeed with --json, with --quiet and plain; return its JSON."""
    told = said(*words)
    quiet = call(*words, "--quiet")
    assert (quiet.exit_code, quiet.output) == (0, "")
    plain = call(*words)
    assert plain.exit_code == 0
    assert plain.stdout.strip()
    return told


def measured(recipe: Path, adapter: Path, *words: object) -> dict[str, dict[str, Any]]:
    """Run `evaluate`; return its figures by task."""
    return {one["task"]: one for one in said("evaluate", adapter, "--recipe", recipe, *words)["tasks"]}


def refused(*words: object) -> str:
    """Run a command that must be refused; return what it says on stderr, in one line."""
    done = call(*words)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


def hints(*words: object) -> str:
    """Run a command; return what it says on stderr, in one line."""
    return " ".join(call(*words).stderr.split())


def page(*words: object) -> str:
    """Run a command that must succeed; return all that it prints, whose lines fit, but for a path alone in one."""
    done = call(*words)
    assert done.exit_code == 0, done.output
    wide = [line for line in done.output.splitlines() if len(line.rstrip()) > WIDTH]
    assert all(len(line.removesuffix(" \\").split()) == 1 for line in wide), wide
    return str(done.output)


def check_json(value: Any, where: str = "") -> None:
    """Fail unless keys are snake_case words, and no text is a number, a number with its unit, or a word for none."""
    if isinstance(value, dict):
        for key, one in value.items():
            assert re.fullmatch(r"[a-z][a-z0-9_]*", key), f"{where}: key {key!r}"
            check_json(one, f"{where}.{key}")
    elif isinstance(value, list):
        for one in value:
            check_json(one, where)
    elif isinstance(value, float):
        assert math.isfinite(value), where
    elif isinstance(value, str):
        if where.endswith((".normalise", ".version")):  # whose value that is, as it is typed or written
            return
        assert not re.fullmatch(r"[-+]?[\d.,]+(e[-+]?\d+)?( ?(%|[kMGT]?i?B|s|ms))?", value), f"{where}: {value!r}"
        assert value.lower() not in ("none", "nothing", "nan", "true", "false", "yes", "no", "-", ""), (
            f"{where}: {value!r}"
        )
