"""The options of merging rules on the command line: read off the rules themselves, so a new rule brings its own."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from loraloom.errors import LoraloomError, did_you_mean
from loraloom.merging import Rule, get_rule, rule_names
from loraloom.merging.registry import option_flag

_WIDTH = 80
_VALUES = {"number": "NUMBER", "integer": "INTEGER", "string": "WORD"}
_BOUNDS = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}


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
            raise LoraloomError(f"no option {flag}", _meant(flag, value or "".join(left[:1]), known))
        if not equals and name in switches:
            value = "true"
        elif not equals:
            if not left:
                raise LoraloomError(f"{flag} has no value", f"write it as {flag} VALUE")
            value = left.pop(0)
        options[name] = _value(value)
    return paths, options


def option_lines(rule: Rule) -> dict[str, str]:
    """Return what each option of a rule means, with its bounds and default, by how it is typed."""
    options: Mapping[str, Mapping[str, Any]] = rule.schema()["options"]
    return dict(_described(name, option) for name, option in options.items())


def options_help() -> str:
    """Return every option of every rule under its rule's name."""
    found = {rule: option_lines(get_rule(rule)) for rule in rule_names()}
    sections = [
        "\n".join([f"  {rule}", *(_wrapped(f"{option}: {meaning}", "    ") for option, meaning in options.items())])
        for rule, options in found.items()
        if options
    ]
    return "\n\n".join(["Options of the rules:", *sections])


def rule_list(rules: Sequence[Rule]) -> str:
    """Return a line or two for each rule: what it does, and what it needs beside the adapters."""
    width = max(len(rule.name) for rule in rules) + 2
    needs = {rule.name: f"; needs {', '.join(rule.needs)}" if rule.needs else "" for rule in rules}
    lines = [_wrapped(f"{rule.name:<{width}}{rule.summary}{needs[rule.name]}", "", width) for rule in rules]
    return "\n".join([*lines, "", "`loraloom rules NAME` tells one whole: formula, paper, cost, options."])


def one_rule(rule: Rule) -> str:
    """Return a rule whole: formula, paper, needs, cost, defaults, options, how it differs from what was published."""
    facts = {
        "formula": rule.formula,
        "paper": rule.paper,
        "needs": ", ".join(rule.needs) or "nothing beside the adapters",
        "module": rule.function.__module__,
        "space": "any, with one result" if rule.exact and rule.spaces == ("full",) else ", ".join(rule.spaces),
        "cost": rule.cost,
        "rank": "the largest of the adapters' ranks" if rule.output_rank == "max" else "the sum of the adapters' ranks",
        "scale": f"{rule.default_scale:g} by default",
        "weights": "1 each by default" if rule.default_weights == "one" else "1/T each by default, of T adapters",
        **option_lines(rule),
    }
    width = max(map(len, facts)) + 2
    lines = [_wrapped(f"{name:<{width}}{fact}", "  ", width) for name, fact in facts.items()]
    notes = [_wrapped(part, "", 0) for part in rule.notes.split("\n\n")]
    return "\n".join([_wrapped(f"{rule.name}: {rule.summary}", ""), "", *lines, "", "\n\n".join(notes)]).rstrip()


def former_weights(text: str | None, weight: list[float] | None) -> list[float] | None:
    """Return the weights of `--weights 0.5,0.3`, which scripts still have; without it `weight`, given one by one."""
    if text is None:
        return weight
    hint = f"write {each('--weight', text)}"
    if weight:
        raise LoraloomError("--weights and --weight are two forms of one option", hint)
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise LoraloomError(f"--weights {text!r}: not numbers parted by commas", hint) from error


def each(flag: str, values: str) -> str:
    """Return how values that were parted by commas are given to an option: once for each."""
    return " ".join(f"{flag} {part.strip()}" for part in values.split(","))


def _wrapped(text: str, indent: str, hanging: int = 2) -> str:
    """Return `text` in lines that fit a terminal; those after the first are set in by `hanging` more characters."""
    later = indent + " " * hanging
    return textwrap.fill(text, _WIDTH, initial_indent=indent, subsequent_indent=later, break_on_hyphens=False)


def _described(name: str, option: Mapping[str, Any]) -> tuple[str, str]:
    # an option that may be left empty is a choice of a type and null
    kind = next((one for one in option.get("anyOf", ()) if one["type"] != "null"), option)
    notes = [f"{words} {kind[key]:g}" for key, words in _BOUNDS.items() if key in kind]
    if option["default"] not in (None, False):
        notes.append(f"{option['default']} by default")
    value = "" if kind["type"] == "boolean" else " " + ("|".join(kind.get("enum", ())) or _VALUES[kind["type"]])
    ending = f" ({', '.join(notes)})" if notes else ""
    return option_flag(name) + value, f"{option.get('description', '')}{ending}".strip()


def _meant(flag: str, value: str, known: Sequence[str]) -> str:
    single = flag.removesuffix("s")
    return f"did you mean {each(single, value)}?" if single != flag and single in known else did_you_mean(flag, known)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
