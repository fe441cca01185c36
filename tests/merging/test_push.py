"""A merged adapter goes to a hub on loopback as it was told before, whole or not, and comes back the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

import tiny_files
import tiny_hub
from commands import call, page, refused, said
from loraloom.adapters.hub import adapter_folder
from loraloom.adapters.peft import adapter_sha256, read_adapter, write_adapter


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tiny_hub.Hub]:
    """A hub, and in the folder where commands run a merge of two adapters, with figures of it."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("law", 1), ("tax", 2)):
        made = tiny_files.adapter(seed)
        made.config["base_model_name_or_path"] = "some/base"
        write_adapter(made, tmp_path / name, provenance={})
    said("merge", "law", "tax", "--rule", "ties", "--scale", "0.5", "-o", "merged")
    score = {"value": 0.845, "stderr": 0.012}
    tasks = [{"task": name, "metric": "accuracy", **score} for name in ("law", "tax")]
    told = {"adapter": "merged", "sha256": adapter_sha256("merged"), "split": "test", "tasks": tasks, "average": score}
    (tmp_path / "measured.json").write_text(json.dumps(told))
    with tiny_hub.running(tmp_path / "cache", monkeypatch) as hub:
        yield hub


def test_what_would_go_up_is_told_and_the_hub_is_not_asked(hub: tiny_hub.Hub, tmp_path: Path) -> None:
    (tmp_path / "merged" / "notes.txt").write_text("mine")
    told = said("push", "merged", "org/both", "--measured", "measured.json")
    assert told["uploaded"] is None
    assert told["left_out"] == ["notes.txt"]
    sizes = {one["name"]: one["size"] for one in told["files"]}
    assert sizes.keys() == {
        path.relative_to("merged").as_posix() for path in Path("merged").rglob("*") if path.is_file()
    } - {"notes.txt"}
    assert sizes["adapter_model.safetensors"] == Path("merged", "adapter_model.safetensors").stat().st_size
    shown = page("push", "merged", "org/both")
    assert "nothing was sent" in shown
    assert "notes.txt: not written by loraloom" in shown
    assert "no scores in the card" in shown
    assert hub.asked == []


def test_the_card_tells_base_members_rule_scale_screening_and_what_was_measured(hub: tiny_hub.Hub) -> None:
    card = ModelCard(said("push", "merged", "org/both", "--measured", "measured.json")["card"])
    assert card.data.base_model == "some/base"
    assert {"lora", "merge"} <= set(card.data.tags)
    for name in ("law", "tax"):
        row = next(line for line in card.text.splitlines() if line.startswith(f"| {name} | 2 |"))
        assert row.endswith(f"| {adapter_sha256(name)} |")
    assert "- rule: ties" in card.text
    assert "- scale: 0.5, as asked for" in card.text
    assert "- screened: pass law, tax" in card.text
    assert "On test rows, in points" in card.text
    assert "| law | accuracy | 84.5 ±1.2 |" in card.text
    assert "| average |  | 84.5 ±1.2 |" in card.text


def test_it_is_sent_whole_in_one_commit_and_comes_back_the_same(hub: tiny_hub.Hub, tmp_path: Path) -> None:
    told = said("push", "merged", "org/both", "--measured", "measured.json", "--yes")
    sha = told["uploaded"]["commit"]
    repository = hub.repositories["org/both"]
    assert not repository.private
    assert repository.refs == {"main": sha}
    files = repository.commits[sha]
    assert files.pop("README.md").decode() == told["card"]
    assert files == {name: Path("merged", name).read_bytes() for name in files}
    assert {*files, "README.md"} == {one["name"] for one in told["files"]}
    back = read_adapter(adapter_folder(f"org/both@{sha}"))
    for module, update in read_adapter("merged").updates.items():
        torch.testing.assert_close(back.updates[module].dense(), update.dense(), rtol=0, atol=0)
    # again, to a branch, beside what is there
    repository.commit_to(("main",), {**repository.commits[sha], "mine.txt": b"mine"})
    before = repository.refs["main"]
    shown = page("push", "merged", "org/both@next", "--yes")
    assert repository.refs["main"] == before
    assert repository.commits[repository.refs["next"]]["mine.txt"] == b"mine"
    assert f"loraloom merge org/both@{repository.refs['next']}" in " ".join(shown.replace("\\", "").split())


def test_a_private_push_never_lands_where_everybody_reads(hub: tiny_hub.Hub) -> None:
    said("push", "merged", "org/mine", "--private", "--yes")
    assert hub.repositories["org/mine"].private
    said("push", "merged", "org/open", "--yes")
    before = dict(hub.repositories["org/open"].commits)
    assert "org/open: is there already, and everybody can read it" in refused(
        "push", "merged", "org/open", "--private", "--yes"
    )
    assert hub.repositories["org/open"].commits == before
    said("push", "merged", "org/mine", "--private", "--yes")  # once more into the same


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "the hub does not know who you are next: run `hf auth login`"),
        (403, "your token may not write to org/both"),
    ],
)
def test_what_the_hub_refuses_is_told(hub: tiny_hub.Hub, status: int, words: str) -> None:
    hub.refuses = status
    assert words in refused("push", "merged", "org/both", "--yes")


def test_without_a_connection_it_is_told(hub: tiny_hub.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_hub.connect("http://127.0.0.1:9", tmp_path / "cache", monkeypatch)
    assert "the hub cannot be reached" in refused("push", "merged", "org/both", "--yes")
    assert call("push", "merged", "org/both").exit_code == 0


def test_what_cannot_be_pushed_is_told_before_anything_is_asked(hub: tiny_hub.Hub, tmp_path: Path) -> None:
    told = refused("push", "law", "both", "--yes")
    assert "both: no name of a repository on the hub" in told
    assert "loraloom.json" in told
    assert "a commit stays as it is" in refused("push", "merged", f"org/both@{'a' * 40}", "--yes")
    other = json.loads(Path("measured.json").read_text())
    Path("other.json").write_text(json.dumps({**other, "sha256": "0" * 64}))
    assert "other.json: measured of other weights" in refused("push", "merged", "org/both", "--measured", "other.json")
    Path("odd.json").write_text('{"tasks": 3}')
    assert "odd.json: is not what `evaluate --json` prints" in refused(
        "push", "merged", "org/both", "--measured", "odd.json"
    )
    (tmp_path / "merged" / "adapter_config.json").unlink()
    assert "adapter_config.json of it missing" in refused("push", "merged", "org/both", "--yes")
    assert hub.asked == []


def test_what_people_will_miss_in_the_card_is_warned_of(hub: tiny_hub.Hub) -> None:
    for name in ("law", "tax"):
        config = json.loads(Path(name, "adapter_config.json").read_text())
        Path(name, "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "./base"}))
    said("merge", "law", "tax", "--screen", "off", "-o", "bare")
    shown = " ".join(call("push", "bare", "org/bare").stderr.split())
    assert "./base, is no name on the hub" in shown
    assert "were not screened" in shown
