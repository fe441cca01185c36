"""The tutorial and the how-to pages, run as they stand: every command and code block, in a folder with tiny inputs.

A block whose title says that it needs something (a GPU, a token of the hub, an installation) is left to test_house.py.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

import tiny
import tiny_study
from commands import call
from loraloom.adapters.peft import read_adapter
from tiny_writers import prompt_rows, writer_adapter, writer_base

DOCS = Path(__file__).parent.parent / "docs"
_BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# of a recipe in a page, what makes it small: the same stages on fewer rows
SMALL = {"train_rows": 24, "heldout_rows": 8, "test_rows": 12, "epochs": 1, "texts": 12}


class Block(NamedTuple):
    """A fenced block: its language, what stands behind that, and its lines."""

    language: str
    about: str
    text: str

    @property
    def title(self) -> str:
        """Return what the page calls it, as the name of its file."""
        return (re.findall(r'title="([^"]+)"', self.about) or [""])[0]


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page, in order; text to look at is left out."""
    found = [Block(*one) for one in _BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))]
    return [one for one in found if one.language != "text"]


def run(page: str) -> None:
    """Run a page in the current folder, from its first block to its last, in one namespace."""
    names: dict[str, Any] = {}
    for block in blocks(page):
        if block.title.startswith("needs "):
            continue
        if block.language == "bash":
            for line in block.text.replace("\\\n", " ").splitlines():
                typed(line)
        elif block.language == "python":
            exec(compile(block.text, page, "exec"), names)
        else:
            assert block.title, f"{page}: a block of {block.language} that is no file of a name"
            Path(block.title).write_text(small(block.text) if block.language == "yaml" else block.text)


def typed(line: str) -> None:
    """Run a line as a shell would; `> file` keeps what it prints."""
    words = shlex.split(line, comments=True)
    if not words:
        return
    words, into = (words[:-2], words[-1]) if ">" in words else (words, None)
    assert words[0] == "loraloom", line
    done = call(*words[1:])
    assert done.exit_code == 0, f"{line}\n{done.output}"
    if into:
        Path(into).write_text(done.stdout)


def small(text: str) -> str:
    """Return a recipe with few rows and steps, and for `demo` a tiny base in the folder."""

    def shrunk(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: shrunk(one, name) for name, one in value.items()}
        if key == "seeds":
            return value[:1]
        return min(value, SMALL[key]) if key in SMALL else value

    recipe = shrunk(yaml.safe_load(text))
    return yaml.safe_dump({**recipe, "base": "base"} if recipe["base"] == "demo" else recipe, sort_keys=False)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a page is read: empty, and without a hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def bounded(base: Path) -> None:
    """Let the tokenizer of a tiny base know how many positions that has, as those of published models do."""
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 40}))


def classifiers(folder: Path, finished: Path) -> None:
    """Lay two trained classifiers, their base, rows and recipe under the names that pages have."""
    shutil.copytree(finished / "base", folder / "base")
    bounded(folder / "base")
    for name in ("mood.train.jsonl", "mood.test.jsonl", "tone.train.jsonl", "tone.test.jsonl"):
        (folder / name).symlink_to(finished / name)
    for task in ("mood", "tone"):
        shutil.copytree(finished / "study" / "adapters" / "LoRA" / task, folder / task)
        tiny_study.write_rows(folder / f"{task}.jsonl", task, 100)
    (folder / "tasks.yaml").write_text(yaml.safe_dump({**tiny_study.recipe(), "base": "base"}))


def test_how_to_compare_rules_and_starts(here: Path, finished: Path) -> None:
    classifiers(here, finished)
    run("howto-research.md")
    assert (here / "comparison" / "report.html").is_file()
    assert (here / "again.html").is_file()


def test_how_to_work_without_the_others_data(here: Path, finished: Path) -> None:
    classifiers(here, finished)
    shutil.rmtree(here / "mood")  # the page trains it
    run("howto-no-data.md")
    assert all(read_adapter(here / name).rank == 2 for name in ("support-start", "mood-start", "news-start", "mood"))


def test_how_to_serve_one_adapter(here: Path) -> None:
    writer_base(here / "base", chat=True)
    tasks = {}
    for seed, (name, kind) in enumerate({"support": "first", "legal": "last", "sales": "first"}.items()):
        writer_adapter(here / "base", here / name, seed=seed)
        for split, count in (("train", 60), ("test", 8)):
            lines = [json.dumps(row) for row in prompt_rows(kind, count, seed)]
            (here / f"{name}.{split}.jsonl").write_text("\n".join(lines))
        texts = [json.dumps({"text": row["prompt"]}) for row in prompt_rows(kind, 8, seed)]
        (here / f"{name}.jsonl").write_text("\n".join(texts))
        files = {"train": f"{name}.train.jsonl", "test": f"{name}.test.jsonl"}
        tasks[name] = {"source": "prompts", **files, "heldout_rows": 8, "answer_tokens": 3}
    (here / "tasks.yaml").write_text(yaml.safe_dump({"name": "tiny", "base": "base", "tasks": tasks}))
    run("howto-serve.md")
    assert read_adapter(here / "merged").rank == 16
    assert (here / "fused" / "model.safetensors").is_file()


def test_the_tutorial(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bounded(tiny.base_folder("bert", here / "base"))
    monkeypatch.setattr("loraloom.model.packaged.demo_base", lambda: here / "base")
    run("tutorial.md")
    assert read_adapter(here / "merged").rank == 16


ELSEWHERE = ("howto-cluster.md",)  # needs a cluster: tests/study have one


@pytest.mark.parametrize(
    "page", [*sorted({path.name for path in DOCS.glob("howto-*.md")} - {*ELSEWHERE}), "tutorial.md"]
)
def test_every_page_is_run_here(page: str) -> None:
    assert f'run("{page}")' in Path(__file__).read_text(encoding="utf-8")
    assert len(blocks(page)) > 3
