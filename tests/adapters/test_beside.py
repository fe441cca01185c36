"""What lies beside an adapter's weights: read, carried along, refused or named; nothing is dropped untold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

from loraloom.adapters.beside import CARRIED, carry, files_beside
from loraloom.adapters.peft import read_adapter, write_adapter
from loraloom.adapters.update import Adapter, Update
from loraloom.errors import LoraloomError
from loraloom.merging import merge, write_merged

TOKENIZER = {
    "tokenizer.json": b'{"added_tokens": [{"content": "<call>"}]}',
    "tokenizer_config.json": b'{"chat_template": "{{ x }}", "name_or_path": "/home/me/base"}',
    "chat_template.jinja": b"{{ messages }}",
    "tokenizer.model": bytes(range(256)),
}


def saved(folder: Path, seed: int = 0, files: dict[str, bytes] | None = None, **changes: Any) -> Path:
    generator = torch.Generator().manual_seed(seed)
    update = Update(torch.randn(6, 2, generator=generator), torch.randn(2, 5, generator=generator))
    config = {"peft_type": "LORA", "target_modules": ["q"], "base_model_name_or_path": "org/base", **changes}
    write_adapter(Adapter({"q": update}, config), folder, provenance={})
    for name, content in (files or {}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def merged(folders: list[Path], output: Path) -> tuple[Path, dict[str, Any]]:
    folder = write_merged(merge([read_adapter(one) for one in folders], "weighted"), output)
    return folder, json.loads((folder / "loraloom.json").read_text())


@pytest.mark.parametrize(
    "name",
    [
        "non_lora_trainables.bin",
        "non_lora_state_dict.bin",
        "new_embeddings.safetensors",
        "mm_projector.bin",
        "value_head.safetensors",
        "v_head.bin",
        "embed_tokens.bin",
        "lm_head.safetensors",
    ],
)
def test_trained_weights_outside_the_adapter_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(LoraloomError, match=f"{name}: .*which cannot be merged"):
        read_adapter(saved(tmp_path / "one", files={name: b"x"}))


def test_the_tokenizer_goes_along_where_all_agree(tmp_path: Path) -> None:
    folder, facts = merged([saved(tmp_path / f"{i}", i, TOKENIZER) for i in range(3)], tmp_path / "out")
    for name, content in TOKENIZER.items():
        found = (folder / name).read_bytes()
        assert found == content or (
            name == "tokenizer_config.json" and json.loads(found) == {"chat_template": "{{ x }}"}
        )
    assert facts["carried"] == sorted(TOKENIZER)
    assert facts["left_out"] == {}
    again = merged([folder], tmp_path / "again")[1]  # nothing is lost on a second way
    assert again["carried"] == sorted(TOKENIZER)


@pytest.mark.parametrize(
    "changes", [{"tokenizer.json": b"{}"}, {"chat_template.jinja": None}, dict.fromkeys(TOKENIZER), {"vocab.txt": b"a"}]
)
def test_a_tokenizer_in_which_they_differ_is_named_and_no_half_of_it_goes_along(
    changes: dict[str, bytes | None], tmp_path: Path
) -> None:
    other = {name: content for name, content in {**TOKENIZER, **changes}.items() if content is not None}
    pair = [saved(tmp_path / "a", 0, TOKENIZER), saved(tmp_path / "b", 1, other)]
    for number, order in enumerate((pair, pair[::-1])):
        folder, facts = merged(order, tmp_path / f"out{number}")
        assert not set(CARRIED) & {path.name for path in folder.iterdir()}
        assert facts["carried"] == []
        assert set(facts["left_out"]) == {*TOKENIZER, *other}
        assert all("do not agree" in why for why in facts["left_out"].values())


def test_everything_else_is_named_with_its_owner(tmp_path: Path) -> None:
    more = {"optimizer.pt": b"", "notes.md": b"", "heads/x.safetensors": b"", "odd.safetensors": b"", "my.json": b""}
    pair = [saved(tmp_path / "a", 0, more), saved(tmp_path / "b", 1, {"optimizer.pt": b""})]
    left_out = merged(pair, tmp_path / "out")[1]["left_out"]
    assert left_out == {
        "heads": "of an earlier merge: the tasks' own (of a)",
        "my.json": "not of the adapter (of a)",
        "notes.md": "a text or picture (of a)",
        "odd.safetensors": "weights of a kind that is not known (of a)",
        "optimizer.pt": "of the training's state",
    }


def test_no_link_out_of_the_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("private")
    folder = saved(tmp_path / "one")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    (folder / "vocab.json").symlink_to(tmp_path / "nowhere")
    out, facts = merged([folder], tmp_path / "out")
    assert not (out / "tokenizer.json").exists()
    assert set(facts["left_out"].values()) == {"a link to a file elsewhere"}
    # the hub's cache is made of links
    repository = tmp_path / "models--org--x"
    blobs, snapshot = repository / "blobs", saved(repository / "snapshots" / "abc")
    blobs.mkdir()
    (blobs / "f00").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/f00")
    out, facts = merged([snapshot], tmp_path / "of-hub")
    assert (out / "tokenizer.json").read_text() == "{}"
    assert not (out / "tokenizer.json").is_symlink()


@given(st.lists(st.sets(st.sampled_from([*CARRIED[:4], "a.txt", "b.bin", "runs"])), min_size=1, max_size=4))
def test_every_file_is_accounted_for_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, folders: list[set[str]]
) -> None:
    place = tmp_path_factory.mktemp("beside")
    members = {}
    for number, names in enumerate(folders):
        (place / f"{number}").mkdir()
        for name in names:
            (place / f"{number}" / name).write_text(name)
        members[f"{number}"] = files_beside(place / f"{number}", set())[0]
    carried, left_out = carry(members)
    assert set(carried) | set(left_out) == set().union(*folders)
    assert not set(carried) & set(left_out)
    turned = carry(dict(reversed(members.items())))
    assert (turned[0], set(turned[1])) == (carried, set(left_out))


def test_fields_that_are_dropped_are_named(tmp_path: Path) -> None:
    strange = {"megatron_core": "evil", "unknown": 1, "revision": "x", "task_type": "CAUSAL_LM"}
    pair = [saved(tmp_path / "a", 0, **strange), saved(tmp_path / "b", 1, task_type="CAUSAL_LM")]
    folder, facts = merged(pair, tmp_path / "out")
    assert {f"adapter_config.json: {name}" for name in ("megatron_core", "unknown", "revision")} == set(
        facts["left_out"]
    )
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    assert not set(strange) - {"task_type"} & set(config)
