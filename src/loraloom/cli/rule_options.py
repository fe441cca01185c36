"""The options of merging rules on the command line: read off the rules themselves, so a new rule brings its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from loraloom.errors import LoraloomError, did_you_mean
from loraloom.merging import get_rule, rule_names


def split_arguments(tokens: Sequence[str], rule: str, known: Sequence[str]) -> tuple[list[Path], dict[str, Any]]:
    """Return the paths among a command's free arguments, and the options of `rule`: --name value or --name=value.

    A bool option needs no value. Values are read as JSON where they are numbers, true, false or null, else as words;
    the rule checks names and values. Raises LoraloomError for an option without a value, and for one that no rule has
    and that looks like one of the command's own, which are `known`.
    """
    fields = get_rule(rule).options.model_fields if rule in rule_names() else {}  # an unknown rule is told by `merge`
    switches = {name for name, field in fields.items() if field.annotation is bool}
    anywhere = {name for other in rule_names() for name in get_rule(other).options.model_fields}
    paths: list[Path] = []
    options: dict[str, Any] = {}
    left = list(tokens)
    while left:
        token = left.pop(0)
        if not token.startswith("-"):
            paths.append(Path(token))
            continue
        flag, equals, value = token.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if name not in anywhere and get_close_matches(flag, known, n=1, cutoff=0.8):
            raise LoraloomError(f"no option {flag}", did_you_mean(flag, known))
        if not equals and name in switches:
            value = "true"
        elif not equals:
            if not left:
                raise LoraloomError(f"{flag} has no value", f"write it as {flag} VALUE")
            value = left.pop(0)
        options[name] = _value(value)
    return paths, options


def number_list(text: str | None, flag: str) -> list[float] | None:
    """Return the numbers in `text`, parted by commas. Raises LoraloomError where one is none."""
    try:
        return [float(part) for part in text.split(",")] if text is not None else None
    except ValueError as error:
        raise LoraloomError(f"{flag} {text!r}: not numbers parted by commas", f"write it as {flag} 0.5,0.5") from error


def options_help() -> str:
    """Return every option of every rule, a line each under its rule's name."""
    lines = ["Options of the rules:"]
    for rule in rule_names():
        options = get_rule(rule).option_help()
        if options:
            lines += ["", f"  {rule}", *(f"    --{name.replace('_', '-')}{text}" for name, text in options.items())]
    return "\n".join(lines)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
