"""The law of docs/architecture.md, held against the imports of the code; and the documents against the commands."""

from __future__ import annotations

import ast
import re
import shlex
from graphlib import TopologicalSorter
from pathlib import Path

import click
import pytest
import typer
import yaml

from loraloom.cli.main import app
from loraloom.merging import get_rule, rule_names

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((SOURCE / "loraloom").rglob("*.py"))
}
# a folder (or a file beside them) imports only from groups to its left; within a group nothing imports across
ROOMS = (
    "errors | cores progress settings notebook | files | adapters results | tasks report | model | statistics | "
    "starts merging | training analysis | study | cli"
)
# who may import transformers and peft: others see a model, a tokenizer or a config that they are given
TRANSFORMERS_ALLOWED = (
    "loraloom.model.architecture",
    "loraloom.model.generator",
    "loraloom.model.load",
    "loraloom.model.objective",
    "loraloom.model.packaged",
    "loraloom.model.served",
    "loraloom.starts.files",
    "loraloom.starts.initialise",
    "loraloom.starts.keep",
    "loraloom.training.adapter",
    "loraloom.training.distil",
    "loraloom.training.runs",
)


def _imports(path: Path, *, lazy: bool) -> set[str]:
    """Return the modules that a file imports; `lazy`: inside functions too. TYPE_CHECKING blocks do not run."""
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree)) if lazy else [node for node in tree.body if not isinstance(node, ast.If)]
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def _uses(name: str, package: str) -> bool:
    return any(found.split(".")[0] == package for found in _imports(MODULES[name], lazy=True))


def test_a_folder_imports_only_from_folders_to_its_left() -> None:
    place = {room: index for index, group in enumerate(ROOMS.split("|")) for room in group.split()}
    rooms = {name: name.split(".")[1] for name in MODULES if "." in name and name != "loraloom.__main__"}
    assert set(rooms.values()) == place.keys()
    wrong = [
        f"{name} imports {used}"
        for name, room in rooms.items()
        for used in _imports(MODULES[name], lazy=True) & MODULES.keys()
        if used != "loraloom" and rooms[used] != room and place[rooms[used]] >= place[room]
    ]
    assert not wrong


@pytest.mark.parametrize("name", [name for name in MODULES if name not in TRANSFORMERS_ALLOWED])
def test_only_the_named_files_touch_transformers_or_peft(name: str) -> None:
    assert not _uses(name, "peft")
    assert not _uses(name, "transformers")


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("loraloom.report")])
def test_the_report_never_needs_a_model(name: str) -> None:
    assert not _uses(name, "torch")


def test_imports_make_no_circle() -> None:
    graph = {name: {used for used in _imports(path, lazy=False) if used in MODULES} for name, path in MODULES.items()}
    # a package's __init__ imports its own files, which is no circle between files
    files = {name: used - {name, name.rsplit(".", 1)[0]} for name, used in graph.items()}
    assert len(list(TopologicalSorter(files).static_order())) == len(MODULES)


def test_files_stay_readable() -> None:
    long = {name: lines for name, path in MODULES.items() if (lines := len(path.read_text().splitlines())) > 400}
    assert not long


def test_every_room_and_file_of_the_architecture_page_exists_and_none_is_left_out() -> None:
    table = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    found = set()
    for rooms, holds in re.findall(r"^\| (`[^|]*) \| (.*) \|$", table, flags=re.M):
        for room in re.findall(r"`([\w.]+)/?`", rooms):
            inside = re.findall(r"`(\w+\.py)`", holds) if not room.endswith(".py") else []
            found |= {f"{room}/{file}" for file in inside} | ({room} if room.endswith(".py") else set())
    package = SOURCE / "loraloom"
    files = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if not path.name.startswith("__")}
    by_folder = ("report/", "merging/rules/", "cli/")  # the page says what these hold, not each file
    assert found <= files
    assert not [file for file in files - found if not file.startswith(by_folder)]


def test_every_walk_of_the_architecture_page_leads_from_import_to_import() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## Three walks")[1].split("##")[0]
    walks = [re.findall(r"[\w/]+\.py", block) for block in re.findall(r"(?:^    .+\n)+", page, flags=re.M)]
    assert len(walks) == 3
    for walk in walks:
        assert len(walk) == len(set(walk)), "a file is entered twice"
        names = ["loraloom." + file.removesuffix(".py").replace("/", ".") for file in walk]
        used = {name: _imports(MODULES[name], lazy=True) for name in names}
        for number, name in enumerate(names[1:], start=1):
            assert any(name in used[before] or before in used[name] for before in names[:number]), name


def _commands() -> dict[str, click.Command]:
    group = typer.main.get_command(app)
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found.update({f"{name} {sub}": one for sub, one in inner.items()} if inner else {name: command})
    return found


def _documented() -> list[str]:
    lines = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        lines += re.findall(r"^(?:    )?(loraloom [a-z].*)$", text, flags=re.M)
    return lines


def test_documents_show_commands() -> None:
    assert len(_documented()) >= 4


@pytest.mark.parametrize("line", _documented())
def test_every_command_shown_exists_with_its_options(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    commands = _commands()
    meant = (" ".join(words[:2]), words[0], f"{words[0]} collect")  # `statistics TEXTS` is short for the last
    command = next((commands[name] for name in meant if name in commands), None)
    assert command is not None, line
    known = {option for parameter in command.params for option in parameter.opts}
    if command.context_settings.get("ignore_unknown_options"):  # those of the rule named
        default = next(parameter.default for parameter in command.params if "--rule" in parameter.opts)
        named = words[words.index("--rule") + 1] if "--rule" in words else default
        fields = () if named == "auto" else get_rule(named).options.model_fields
        known |= {f"--{name.replace('_', '-')}" for name in fields}
    assert {word.split("=")[0] for word in words if word.startswith("-")} <= known


def test_every_rule_has_its_row_in_the_rules_page() -> None:
    page = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
    lines = (line.strip("|").replace(r"\|", "|").split(" | ") for line in page.splitlines())
    rows = {cells[0].strip("` "): cells for cells in lines if len(cells) == 8}
    for name in rule_names():
        rule, cells = get_rule(name), rows[name]
        assert cells[1:4] == [rule.formula, rule.paper, ", ".join(rule.needs) or "nothing"], name
        assert cells[6] == rule.cost, name


def test_the_list_of_hashes_is_of_the_versions_that_are_pinned() -> None:
    pinned = re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.M)
    locked = re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "requirements.lock").read_text(encoding="utf-8"), flags=re.M)
    versions = {(name.lower().replace("_", "-"), version) for name, version in pinned if name != "torch"}
    assert versions == {(name.lower().replace("_", "-"), version) for name, version in locked}


def test_every_file_that_a_document_names_exists() -> None:
    pages = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "recipes").glob("*.yaml"),
    ]
    pages += [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "experiments").glob("*.py")]
    named = {
        (page.name, name)
        for page in pages
        for name in re.findall(
            r"\b((?:src|tests|benchmarks|experiments|examples|recipes|docs)/[\w./-]+\.(?:py|yaml|md|json|png))\b",
            page.read_text(encoding="utf-8"),
        )
    }
    assert len(named) > 20
    assert not sorted((page, name) for page, name in named if not (ROOT / name).exists())


def test_every_page_of_docs_has_its_place_in_the_site() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    named = [page for section in config["nav"] for pages in section.values() for page in _pages(pages)]
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    missing = sorted(pages - set(named))
    assert not missing, f"pages of docs/ in no section of mkdocs.yml: give each its line under `nav`: {missing}"
    assert len(named) == len(set(named))


def _pages(found: str | list[dict[str, str]]) -> list[str]:
    return [found] if isinstance(found, str) else [page for one in found for page in one.values()]


def test_no_two_test_files_have_one_name() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})
