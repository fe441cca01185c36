"""Checkpoints from anyone: what goes along and what is left out, links that lead out, files that are not as said."""

from __future__ import annotations

import json
import os
import resource
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loraloom.merging.checkpoint
import loraloom.merging.shards
from loraloom.adapters.update import Update
from loraloom.errors import LoraloomError
from loraloom.merging.fuse import FusedFacts, fuse
from loraloom.merging.placement import Changes

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with config, tokenizer and two shards: `a.weight` (2, 3) in the first, `b.weight` in the other."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    for name, shard in zip("ab", SHARDS, strict=True):
        save_file({f"{name}.weight": torch.ones(2, 3)}, folder / shard, metadata={"format": "pt"})
    write_index(folder, {"a.weight": SHARDS[0], "b.weight": SHARDS[1]})
    return folder


def write_index(folder: Path, weight_map: Any, **more: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 48}, "weight_map": weight_map, **more}))


def fused(base: Path, **options: Any) -> FusedFacts:
    update = Update(torch.ones(2, 1), torch.ones(1, 3))
    return fuse(base, base.parent / "out", Changes({"a": (2, 3)}), lambda _: update, **options)


def refused(base: Path, *words: str) -> str:
    """Fuse and be refused with `words` in the message, soon, in little memory, with nothing written; return it."""
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(LoraloomError) as caught:
        fused(base)
    told = str(caught.value)
    assert [word for word in words if word not in told] == []
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
    assert not (base.parent / "out").exists()
    return told


# --- what goes along -------------------------------------------------------------------------------------------------


def test_what_a_model_needs_goes_along_and_the_rest_is_told(base: Path) -> None:
    needed = [
        "vocab.txt",
        "chat_template.jinja",
        "spiece.model",
        "generation_config.json",
        "LICENSE.txt",
        "tekken.json",
    ]
    left = ["README.md", ".gitattributes", "pytorch_model.bin", "model.onnx", "adapter_config.json", "optimizer.pt"]
    left += ["adapter_model.safetensors", "consolidated.safetensors", "training_args.bin", "notes.txt", "own.py"]
    for name in [*needed, *left]:
        (base / name).write_text("[]")
    for name in ("onnx", "additional_chat_templates"):
        (base / name).mkdir()
        (base / name / "tool.jinja").write_text("{{ text }}")
    facts = fused(base, files={"README.md": "mine"})
    assert sorted(facts.left_out) == sorted([*left, "onnx"])
    assert (facts.folder / "README.md").read_text() == "mine"
    for name in (*needed, "config.json", "tokenizer.json", INDEX, "additional_chat_templates/tool.jinja"):
        assert (facts.folder / name).read_bytes() == (base / name).read_bytes()
    assert sorted(facts.sha256) == sorted(
        [*needed, "config.json", "tokenizer.json", INDEX, *SHARDS, "additional_chat_templates/tool.jinja", "README.md"]
    )


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_goes_along_where_the_configuration_names_it(file: str, base: Path) -> None:
    (base / file).write_text('{"auto_map": {"AutoModel": "own.Own"}}')
    (base / "own.py").write_text("raise SystemExit('it ran')")
    facts = fused(base)
    assert (facts.folder / "own.py").exists()
    assert facts.left_out == []


# --- links -----------------------------------------------------------------------------------------------------------


def test_no_link_that_leads_out_of_the_folder_is_followed(base: Path) -> None:
    secret = base.parent / "secret"
    secret.write_text("PRIVATE")
    (base / "chat_template.jinja").symlink_to(secret)
    (base / "vocab.txt").symlink_to(os.path.relpath(secret, base))
    (base / "merges.txt").symlink_to("merges.txt")
    (base / "generation_config.json").symlink_to("tokenizer.json")  # inside: its content goes along
    (base / "additional_chat_templates").symlink_to(base.parent)
    facts = fused(base)
    assert sorted(facts.left_out) == ["additional_chat_templates", "chat_template.jinja", "merges.txt", "vocab.txt"]
    assert not any("PRIVATE" in path.read_text("latin-1") for path in facts.folder.iterdir())
    assert not any(path.is_symlink() for path in facts.folder.iterdir())
    assert (facts.folder / "generation_config.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["config.json", INDEX, SHARDS[0]])
def test_weights_and_config_that_are_links_out_of_the_folder_are_refused(name: str, base: Path) -> None:
    (base / name).rename(base.parent / name)
    (base / name).symlink_to(base.parent / name)
    refused(base, f"{name}: no file of this folder, or a link that leads out of it")
    (base / name).unlink()
    os.mkfifo(base / name)  # to open it would wait for ever
    refused(base, f"{name}: no file of this folder")


def test_a_snapshot_of_the_hubs_cache_is_a_folder_of_links(base: Path) -> None:
    blobs, snapshot = (
        base.parent / "models--org--base" / "blobs",
        base.parent / "models--org--base" / "snapshots" / "1a",
    )
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(base.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    outside = base.parent / "vocab.txt"
    outside.write_text("PRIVATE")
    (snapshot / "vocab.txt").symlink_to(outside)
    update = Update(torch.ones(2, 1), torch.ones(1, 3))
    here = base.parent / "here"
    here.symlink_to(snapshot)
    facts = fuse(here, base.parent / "out", Changes({"a": (2, 3)}), lambda _: update)
    assert facts.left_out == ["vocab.txt"]
    assert torch.equal(load_file(facts.folder / SHARDS[0])["a.weight"], torch.full((2, 3), 2.0))
    assert (facts.folder / "tokenizer.json").read_text() == "{}"


# --- files that are not as they should be ----------------------------------------------------------------------------


def test_a_base_without_safetensors_is_refused(base: Path) -> None:
    for path in base.iterdir():
        path.unlink()
    base.rmdir()
    refused(base, "config.json: missing", "neither model.safetensors nor")
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.fp16.safetensors").write_text("")
    refused(base, "holds model.fp16.safetensors")
    (base / "pytorch_model.bin").write_text("")
    refused(base, "pytorch_model.bin is a pickle", "save_pretrained")
    (base / "model.safetensors").write_bytes(b"\x09\0\0\0\0\0\0\0{}")
    (base / "config.json").write_text("{")
    refused(base, "model.safetensors: cannot be read", "config.json: not valid JSON", "2 problems")


def test_broken_shards_are_told_together(base: Path) -> None:
    (base / SHARDS[0]).unlink()
    (base / "cut.safetensors").write_bytes((base / SHARDS[1]).read_bytes()[:-1])
    home = {"a.weight": SHARDS[0], "c": "cut.safetensors", "ghost": SHARDS[1], "evil": "../base/model.safetensors"}
    write_index(base, home)
    told = refused(base, f"{SHARDS[0]}: missing", "cut.safetensors: cannot be read", "4 problems")
    assert f"{SHARDS[1]}: lacks tensor ghost" in told
    assert "'../base/model.safetensors', which is no safetensors file of this folder" in told


@pytest.mark.parametrize("name", ["/etc/hostname", "..", ".", "", "config.json", "a\0", "x" * 300, "a/b"])
def test_shards_that_are_no_files_of_the_folder(name: str, base: Path) -> None:
    write_index(base, {"a.weight": name, "b.weight": SHARDS[1]})
    refused(base, "which is no safetensors file of this folder")
    write_index(base, {"a.weight": f"{name}.safetensors", "b.weight": SHARDS[1]})
    refused(base, ".safetensors")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"weight_map": ' + '{"a": ' * 50_000 + "}" * 50_000 + "}", "nested too deeply"),
        ("[]", "no JSON object"),
        ('{"weight_map": 1}', "weight_map does not map"),
        ('{"weight_map": "x"}', "weight_map does not map"),
        ('{"weight_map": {"a.weight": ["x"]}}', "weight_map does not map"),
        ('{"weight_map": {}}', "names no shards"),
        ("{}", "weight_map does not map"),
        (
            '{"weight_map": {"a.weight": "model-00001-of-00002.safetensors"}, "metadata": 5}',
            "metadata is no JSON object",
        ),
        ('{"weight_map": NaN}', "NaN"),
        ('{"weight_map": ' + "9" * 5000 + "}", "not valid JSON"),
        ("\udcff", "not valid JSON"),
        ("", "not valid JSON"),
    ],
)
def test_an_index_of_any_kind(content: str, told: str, base: Path) -> None:
    (base / INDEX).write_bytes(content.encode("utf-8", "surrogateescape"))
    refused(base, INDEX, told)


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "5", "", '{"a": ' * 50_000, "9" * 5000, "\xff"])
def test_a_config_of_any_kind(content: str, base: Path) -> None:
    (base / "config.json").write_text(content, encoding="latin-1")
    refused(base, "config.json: ")


def header(entries: Any, data: int = 24, size: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + bytes(data)


ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0",
        header({"a.weight": ENTRY}, data=23),
        header({"a.weight": ENTRY}, data=25),
        header({"a.weight": ENTRY, "c": ENTRY}),  # one over the other
        header({"a.weight": {**ENTRY, "shape": [2, 4]}}),
        header({"a.weight": {**ENTRY, "dtype": "F33"}}),
        header({"a.weight": {**ENTRY, "data_offsets": [0, 2**64]}}),
        header({"a.weight": {**ENTRY, "data_offsets": [-24, 0]}}),
        header({"a.weight": {**ENTRY, "shape": [2**62, 2**62]}}),
        header({"a.weight": 5}),
        header([]),
        header({"a.weight": ENTRY}, size=2**63),
        header({"a.weight": ENTRY}, size=2**40),
        header({"a.weight": ENTRY, "__metadata__": {"format": "x" * (17 << 20)}}),
        struct.pack("<Q", 100_000) + b"[" * 100_000,
    ],
)
def test_a_header_of_any_kind(content: bytes, base: Path) -> None:
    (base / SHARDS[0]).write_bytes(content)
    refused(base, f"{SHARDS[0]}: cannot be read")


def many(count: int) -> bytes:
    entries = {f"{one}": {"dtype": "F32", "shape": [], "data_offsets": [4 * one, 4 * one + 4]} for one in range(count)}
    return header(entries, data=4 * count)


def test_more_tensors_than_any_model_has(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (base / SHARDS[1]).write_bytes(header([*["data_offsets"] * 200_001]))
    refused(base, f"{SHARDS[1]}: cannot be read (more tensors than any model has)")
    for module in (loraloom.files.tensors, loraloom.merging.checkpoint):
        monkeypatch.setattr(module, "MOST_TENSORS", 5)
    for shard in SHARDS:
        (base / shard).write_bytes(many(3))
    refused(base, f"{SHARDS[1]}: with it the shards hold more tensors than any model has")


def test_a_tensor_of_several_shards_that_the_index_does_not_place(base: Path) -> None:
    for shard in SHARDS:
        save_file({**load_file(base / shard), "c.weight": torch.ones(1)}, base / shard, metadata={"format": "pt"})
    refused(base, "c.weight: in several shards, of which")
