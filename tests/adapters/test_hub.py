"""Adapters by their names on the hub, against a hub on loopback: pinned, hashed, and told from folders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tiny_files
import tiny_hub
from commands import call, page, refused, said
from loraloom.adapters.hub import adapter_folder, folder_name, pinned
from loraloom.adapters.peft import CONFIG, WEIGHTS, read_adapter, write_adapter
from loraloom.errors import LoraloomError
from loraloom.merging.names import input_names

SUM = ("--rule", "task_arithmetic", "-o")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tiny_hub.Hub]:
    monkeypatch.chdir(tmp_path)
    with tiny_hub.running(tmp_path / "cache", monkeypatch) as hub:
        yield hub


def save(folder: Path, seed: int) -> Path:
    return write_adapter(tiny_files.adapter(seed), folder, provenance={})


def test_a_merge_takes_names_on_the_hub_and_records_commits_and_hashes(hub: tiny_hub.Hub, tmp_path: Path) -> None:
    old = hub.add("org/law", save(tmp_path / "old", 1), "v1")
    new = hub.add("org/law", save(tmp_path / "new", 2))
    only = hub.add("team/medicine", save(tmp_path / "medicine", 3))
    for name in ("org/law@v1", "team/medicine"):
        adapter_folder(name)  # tells that it fetches, where --json says nothing else
    told = said("merge", "org/law@v1", "team/medicine", *SUM, tmp_path / "merged")
    first, second = told["inputs"]
    assert (first["name"], first["folder"], first["task"]) == ("law", "law", "law")
    assert (first["hub"], second["hub"]) == (f"org/law@{old}", f"team/medicine@{only}")
    for one, folder in ((first, "old"), (second, "medicine")):
        hashes = {
            name: hashlib.sha256((tmp_path / folder / name).read_bytes()).hexdigest() for name in (CONFIG, WEIGHTS)
        }
        assert one["files"] == hashes
    assert json.loads((tmp_path / "merged" / "loraloom.json").read_text())["inputs"] == told["inputs"]
    assert (
        f"from the hub: law is org/law@{old}, medicine is team/medicine@{only}"
        in (tmp_path / "merged" / "README.md").read_text()
    )
    assert new not in (tmp_path / "merged" / "README.md").read_text()
    # the same values as of the folders, and again by what the record says
    local = said("merge", tmp_path / "old", tmp_path / "medicine", *SUM, tmp_path / "local")
    assert [one["hub"] for one in local["inputs"]] == [None, None]
    said("merge", first["hub"], second["hub"], *SUM, tmp_path / "again")
    weights = [(tmp_path / name / WEIGHTS).read_bytes() for name in ("merged", "local", "again")]
    assert weights[0] == weights[1] == weights[2]


def test_without_a_connection_the_cache_is_taken_or_it_is_told(
    hub: tiny_hub.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add("org/law", save(tmp_path / "law", 1))
    folder = adapter_folder("org/law")
    tiny_hub.connect("http://127.0.0.1:9", tmp_path / "cache", monkeypatch)
    for name in ("org/law", f"org/law@{commit}"):
        with pytest.warns(UserWarning, match="cannot be reached; what its cache holds is taken"):
            assert adapter_folder(name) == folder
    told = refused("merge", "org/law", "org/tax@v2", "org/wine", "-o", "merged")
    assert "org/tax@v2: no such folder, and the hub cannot be reached" in told
    assert "`hf download org/tax --revision v2 --local-dir FOLDER`, and name that folder here" in told
    assert "org/wine: no such folder" in told
    assert not Path("merged").exists()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "the hub cannot be reached" in refused("merge", "org/tax", "-o", "merged")


def test_a_folder_wins_over_a_name_on_the_hub(hub: tiny_hub.Hub, tmp_path: Path) -> None:
    hub.add("org/law", save(tmp_path / "law", 1))
    save(tmp_path / "org" / "law", 2)
    assert adapter_folder("org/law") == Path("org/law")
    for place in (
        "law",
        "./law",
        "../org/law",
        "/org/law",
        "~/law",
        "a/../b",
        "org/law/",
        "org/law.safetensors",
        "org\\law",
        "",
    ):
        assert adapter_folder(place) == Path(place)
    assert hub.asked == []


def test_what_the_hub_has_not_is_told_at_once(hub: tiny_hub.Hub, tmp_path: Path) -> None:
    hub.add("org/law", save(tmp_path / "law", 1))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    hub.add("org/model", tmp_path / "model")
    told = refused("merge", "org/lwa", "org/law@v9", "org/model", "org/a--b", "-o", "merged")
    assert "org/lwa: no such folder, and the hub has no such repository, or a private one" in told
    assert "org/law has no revision v9" in told
    assert "org/model: is on the hub, and no adapter: adapter_config.json is missing" in told
    assert "org/a--b: no such folder, and no name on the hub" in told
    (tmp_path / "recipe.yaml").write_text("name: r\nbase: demo\n")
    told = refused("align", "merged", "org/lwa", "org/model", "--recipe", "recipe.yaml")
    assert "org/lwa: no such folder" in told
    assert "org/model: is on the hub, and no adapter" in told
    assert not any("/resolve/" in one for one in hub.asked)  # no weights were fetched to find that out


def test_an_adapter_in_a_folder_of_a_repository(hub: tiny_hub.Hub, tmp_path: Path) -> None:
    save(tmp_path / "all" / "law", 1)
    save(tmp_path / "all" / "tax", 2)
    (tmp_path / "all" / "law" / "checkpoint-5").mkdir()
    (tmp_path / "all" / "law" / "checkpoint-5" / "weights.bin").write_bytes(b"1" * 100)
    (tmp_path / "all" / "law" / "optimizer.pt").write_bytes(b"1" * 100)
    (tmp_path / "all" / "law" / "tokenizer.json").write_text("{}")
    commit = hub.add("org/all", tmp_path / "all")
    with pytest.raises(LoraloomError, match="name one of its folders: org/all/law"):
        adapter_folder("org/all")
    with pytest.warns(UserWarning, match=f"fetching org/all/law from the hub, at {commit[:12]}"):
        folder = adapter_folder("org/all/law")
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS, ".loraloom", "loraloom.json", "tokenizer.json"}
    assert not (folder.parent / "tax").exists()
    assert pinned(folder) == f"org/all/law@{commit}"
    assert (folder_name(folder), read_adapter(folder).task) == ("law", "law")
    assert input_names([folder, tmp_path / "all" / "law"]) == ["org-all-law", f"{tmp_path.name}-all-law"]
    assert read_adapter(folder).beside.carried.keys() == {"tokenizer.json"}


def test_weights_that_would_be_lost_are_fetched_to_be_told(hub: tiny_hub.Hub, tmp_path: Path) -> None:
    folder = save(tmp_path / "law", 1)
    (folder / "new_embeddings.safetensors").write_bytes(b"")
    hub.add("org/law", folder)
    assert "new_embeddings.safetensors: rows of new tokens" in refused("merge", "org/law", "-o", "merged")


def test_the_page_tells_where_adapters_are_from(hub: tiny_hub.Hub, tmp_path: Path) -> None:
    commit = hub.add("org/law", save(tmp_path / "law", 1))
    assert f"org/law@{commit}" in "".join(page("merge", "org/law", tmp_path / "law", "-o", "merged").split())
    mergekit = tmp_path / "recipe.yml"
    mergekit.write_text(
        f"merge_method: task_arithmetic\nmodels:\n- model: b/b+org/law@{commit}\n  parameters: {{weight: 2}}\n"
    )
    assert call("merge", "--from-mergekit", mergekit, "--rank", "2", "-o", "again").exit_code == 0
    one, two = read_adapter("again"), tiny_files.adapter(1)
    torch.testing.assert_close(one.updates["encoder.0.query"].dense(), 2 * two.updates["encoder.0.query"].dense())
