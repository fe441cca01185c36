"""The pages of the reference, made out of the code whenever the site is built: no copy of them can grow old."""

from __future__ import annotations

import ast
import html
import inspect
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import typer
from pydantic import BaseModel, ValidationError

import loraloom
from loraloom.cli.main import app
from loraloom.cli.rule_options import option_lines
from loraloom.merging import Rule, get_rule, rule_names
from loraloom.study.recipe import Recipe

_MADE = "*This page is made from the code.*"
_VALUES = {int: "INTEGER", float: "NUMBER", Path: "PATH"}
_BOUNDS = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}


def pages() -> dict[str, str]:
    """Return the Markdown of every page of the reference by its path in the site."""
    return {
        "reference/commands.md": commands_page(),
        "reference/rules.md": rules_page(),
        "reference/recipe.md": recipe_page(),
        "reference/python.md": python_page(),
    }


def commands_page() -> str:
    """Return every command with its arguments and options, in the order and under the headings of `loraloom --help`."""
    panels: dict[str, list[str]] = defaultdict(list)
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", {})
        found = {f"{name} {sub}": one for sub, one in inner.items()} or {name: command}
        panels[command.rich_help_panel] += [_command(words, one) for words, one in found.items()]
    ordered = sorted(panels, key=["Try it", "Before training", "Train and merge", "Measure and repeat"].index)
    return _page("Commands", *(part for panel in ordered for part in (f"## {panel}", *panels[panel])))


def rules_page() -> str:
    """Return every rule with its facts, options and notes, one family after the other."""
    families: dict[str, list[Rule]] = defaultdict(list)
    for name in rule_names():
        families[get_rule(name).function.__module__].append(get_rule(name))
    parts = ["Which to take, and what each kept of its tasks, stands in [the merging rules](../rules.md)."]
    for module, rules in families.items():
        about = inspect.getdoc(inspect.getmodule(rules[0].function)) or ""
        parts += [f"## {module.rpartition('.')[2].capitalize()}", _prose(about.split("\n\n")[0])]
        parts += [_rule(rule) for rule in rules]
    return _page("Rules and their options", *parts)


def recipe_page() -> str:
    """Return every option of a recipe, section by section."""
    sections: dict[str, type[BaseModel]] = {"Recipe": Recipe, **dict(_sections(Recipe))}
    parts = ["Examples lie in [recipes/](../examples/index.md). A misspelt key is told with the nearest known one."]
    parts += [_section(name, schema) for name, schema in sections.items()]
    return _page("Recipe", *parts)


def python_page() -> str:
    """Return all that `import loraloom` offers, under the headings of its stub, for mkdocstrings to fill in."""
    stub = Path(loraloom.__file__).with_suffix(".pyi")
    text = stub.read_text(encoding="utf-8")
    headings = {number: line[2:] for number, line in enumerate(text.splitlines(), 1) if line.startswith("# ")}
    parts = []
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom):
            parts += [f"## {headings[node.lineno - 1].capitalize()}"] if node.lineno - 1 in headings else []
            parts += [f"::: loraloom.{node.module}.{alias.name}" for alias in node.names]
    return _page("Python", "All of it is imported as `loraloom.NAME`.", *parts)


def _page(title: str, *parts: str) -> str:
    return "\n\n".join([f"# {title}", _MADE, *parts]) + "\n"


def _command(words: str, command: Any) -> str:
    shown = [parameter for parameter in command.params if not parameter.hidden]
    arguments = [one for one in shown if not one.opts[0].startswith("-")]
    usage = [_argument(one) for one in arguments]
    rest = " [OPTIONS OF THE RULE]" if command.context_settings.get("ignore_unknown_options") else ""
    parts = [f"### loraloom {words}", _prose(inspect.cleandoc(command.help or ""))]
    parts.append(f"```text\nloraloom {' '.join([words, *usage])} [OPTIONS]{rest}\n```")
    rows = [(_code(_argument(one)), "", one.help) for one in arguments]
    rows += [(_code(_option(one)), _default(one), one.help) for one in shown if one not in arguments]
    parts.append(_table(("", "without it", "what it does"), rows))
    if rest:
        parts.append("The options of the rules stand in [Rules and their options](rules.md).")
    return "\n\n".join(parts)


def _argument(argument: Any) -> str:
    word = (argument.metavar or argument.name).upper() + ("..." if argument.nargs == -1 else "")
    return word if argument.required else f"[{word}]"


def _option(option: Any) -> str:
    kind = option.type_descriptor.annotation
    kind = next((one for one in get_args(kind) if one is not type(None)), kind)
    value = "" if kind is bool else " " + (option.metavar or _VALUES.get(kind, "TEXT"))
    return ", ".join([*option.opts, *option.secondary_opts]) + value


def _default(option: Any) -> str:
    if option.required:
        return "required"
    return "" if option.default in (None, False) else _code(str(option.default))


def _rule(rule: Rule) -> str:
    facts = {
        "formula": html.escape(rule.formula),
        "paper": html.escape(rule.paper),
        "needs": ", ".join(rule.needs) or "nothing beside the adapters",
        "space": "any, with one result" if rule.exact and rule.spaces == ("full",) else ", ".join(rule.spaces),
        "cost": html.escape(rule.cost),
        "rank without `--rank`": "the largest of the adapters'" if rule.output_rank == "max" else "the sum of all",
        "scale without `--scale`": f"{rule.default_scale:g}",
        "weights without `--weight`": "1 each" if rule.default_weights == "one" else "1/T each, of T adapters",
    }
    parts = [f"### {rule.name}", f"{_prose(rule.summary)}.", _table(("", ""), facts.items())]
    options = [(_code(option), html.escape(meaning)) for option, meaning in option_lines(rule).items()]
    parts += [_table(("option", "what it does"), options)] if options else []
    return "\n\n".join([*parts, _prose(rule.notes)])


def _sections(schema: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield every schema inside of another by the key under which it stands; those of one key by their source."""
    for key, field in schema.model_fields.items():
        found = list(_schemas(field.annotation))
        for one in found:
            yield f"{key}, source: {one.model_fields['source'].default}" if len(found) > 1 else key, one


def _schemas(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _schemas(part)


def _section(name: str, schema: type[BaseModel]) -> str:
    rows = []
    inner = {key for key, _ in _sections(schema)}
    for key, option in schema.model_json_schema().get("properties", {}).items():
        link = next((f"see [{key}](#{key})" for key in [key] if key in inner and key != "tasks"), "")
        link = "by name; see each source below" if key == "tasks" else link
        default = "required" if key in _required(schema) else _shown_default(option)
        rows.append(
            (_code(key), link or html.escape(_kind(option)), default, html.escape(option.get("description", "")))
        )
    title = name if name == "Recipe" else f"`{name}`"
    anchor = "recipe" if name == "Recipe" else re.sub(r"\W+", "-", name)
    about = _prose((inspect.getdoc(schema) or "").split("\n\n")[0])
    return f"## {title} {{ #{anchor} }}\n\n{about}\n\n" + _table(("option", "value", "without it", "meaning"), rows)


def _required(schema: type[BaseModel]) -> set[str]:
    """Return the options that must be given: some that have no default are filled in by their schema."""
    try:
        schema.model_validate({})
    except ValidationError as error:
        return {str(fault["loc"][0]) for fault in error.errors() if fault["type"] == "missing"}
    return set()


def _shown_default(option: Mapping[str, Any]) -> str:
    default = option.get("default")
    return "" if default in (None, "", [], {}) or isinstance(default, dict) else _code(json.dumps(default).strip('"'))


def _kind(option: Mapping[str, Any]) -> str:
    """Return in words what values a JSON schema takes."""
    if "anyOf" in option:
        return " or ".join(_kind(one) for one in option["anyOf"] if one.get("type") != "null")
    if "enum" in option or "const" in option:
        return " or ".join(map(str, option.get("enum", [option.get("const")])))
    if option.get("type") == "array":
        return f"list of {_kind(option.get('items', {}))}"
    if option.get("type") == "object":
        values = option.get("additionalProperties")
        return f"mapping to {_kind(values)}" if isinstance(values, dict) else "mapping"
    bounds = [f"{words} {option[key]:g}" for key, words in _BOUNDS.items() if key in option]
    word = {"string": "text", "boolean": "true or false"}.get(option.get("type", "any"), option.get("type", "any"))
    return " ".join([word, " and ".join(bounds)]).strip()


def _prose(text: str) -> str:
    """Return plain text as Markdown that looks the same: no tag and no heading in it."""
    return html.escape(text, quote=False).replace("|", "&#124;").replace("*", "&#42;")


def _code(text: str) -> str:
    return f"<code>{html.escape(text)}</code>"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    cells = ([" ".join((cell or "").replace("|", "&#124;").split()) for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)
