"""Adapters that stay in their file: read layer by layer, again at each access; written the same way."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraloom.adapters.peft import (
    CONFIG,
    WEIGHTS,
    StoredUpdates,
    adapter_writer,
    read_adapter,
    task_of,
    write_adapter,
    write_folder,
)
from loraloom.adapters.update import Adapter, Shape, Update
from loraloom.errors import LoraloomError
from loraloom.merging import merge, write_merged
from loraloom.merging.options import MergeOptions
from loraloom.merging.planning import make_plan

LAYERS = [f"layer.{i}.q" for i in range(24)]


def adapter(seed: int, rank: int = 8, width: int = 1000, **facts: Any) -> Adapter:
    """24 layers of 2 x 8 x 1000 values: 1.5 MB in float32."""
    generator = torch.Generator().manual_seed(seed)
    updates = {
        name: Update(
            torch.randn(width, rank, generator=generator),
            torch.randn(rank, width, generator=generator),
        )
        for name in LAYERS
    }
    return Adapter(updates, {"peft_type": "LORA", "target_modules": ["q"], "base_model_name_or_path": ""}, **facts)


def written(folder: Path, seed: int, **changes: Any) -> Path:
    return write_adapter(adapter(seed, **changes), folder, provenance={})


def living() -> int:
    """Return the bytes of every tensor that Python can reach."""
    storages = {}
    for one in gc.get_objects():
        if isinstance(one, Tensor):
            storage = one.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_weights_are_not_kept_in_memory(tmp_path: Path) -> None:
    size = (written(tmp_path / "one", 0) / WEIGHTS).stat().st_size
    layer = size // len(LAYERS)
    before = living()
    read = read_adapter(tmp_path / "one")
    assert isinstance(read.updates, StoredUpdates)
    assert living() - before < layer / 10
    update = read.updates[LAYERS[3]]
    assert layer * 0.9 < living() - before < layer * 1.1
    assert read.updates[LAYERS[3]] is not update
    del update
    for _ in read.updates.values():
        pass
    assert living() - before < layer * 1.1  # the loop's last


def test_a_merge_into_a_folder_keeps_one_layer_in_memory(tmp_path: Path) -> None:
    inputs = [read_adapter(written(tmp_path / f"{i}", i)) for i in range(2)]
    layer = (tmp_path / "0" / WEIGHTS).stat().st_size // len(LAYERS)
    before, calls, sizes = living(), [], []

    def look(done: int, total: int) -> None:
        calls.append((done, total))
        if done in (2, total // 2, total):
            sizes.append(living() - before)

    write_merged(make_plan(inputs, MergeOptions("task_arithmetic")), tmp_path / "merged", progress=look)
    assert calls == [(i + 1, len(LAYERS)) for i in range(len(LAYERS))]
    assert max(sizes) < 5 * layer  # of 48 that were read, and 24 of twice the rank that were written
    in_memory = merge(inputs, "task_arithmetic").adapter
    for name, update in read_adapter(tmp_path / "merged").updates.items():
        assert torch.equal(update.B, in_memory.updates[name].B)
        assert torch.equal(update.A, in_memory.updates[name].A)


def test_shapes_need_no_weights(tmp_path: Path) -> None:
    read = read_adapter(written(tmp_path / "one", 0, rank=3))
    (tmp_path / "one" / WEIGHTS).unlink()
    assert read.shapes == dict.fromkeys(LAYERS, Shape(1000, 1000, 3))
    assert read.rank == 3
    assert list(read.updates) == sorted(LAYERS)
    assert len(read.updates) == 24
    assert LAYERS[0] in read.updates.shapes  # type: ignore[attr-defined]


@pytest.mark.parametrize("fault", ["gone", "cut short", "other layers", "other values", "written over"])
def test_a_file_that_goes_after_it_was_read_is_told(fault: str, tmp_path: Path) -> None:
    read = read_adapter(written(tmp_path / "one", 0))
    path = tmp_path / "one" / WEIGHTS
    if fault == "gone":
        path.unlink()
    elif fault == "cut short":
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content[: len(content) // 2])
    elif fault == "other values":  # as a training that ends meanwhile would put there: nobody has checked these
        (written(tmp_path / "two", 1) / WEIGHTS).replace(path)
    elif fault == "written over":
        path.write_bytes(path.read_bytes())
    else:
        path.unlink()
        save_file({"other": torch.ones(1)}, path)
    with pytest.raises(LoraloomError, match=f"{WEIGHTS}: cannot be read any more") as caught:
        read.updates[LAYERS[0]]
    assert "was it replaced?" in str(caught.value)
    with pytest.raises(LoraloomError, match="cannot be read any more"):
        write_merged(make_plan({"one": read}, MergeOptions("weighted")), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_unknown_layer_is_a_key_error(tmp_path: Path) -> None:
    read = read_adapter(written(tmp_path / "one", 0))
    assert "other" not in read.updates
    with pytest.raises(KeyError):
        read.updates["other"]


def test_what_is_read_can_be_changed_without_changing_the_file(tmp_path: Path) -> None:
    read = read_adapter(written(tmp_path / "one", 0))
    before = read.updates[LAYERS[0]]
    B, A = before.B.clone(), before.A.clone()
    before.B.zero_()
    before.A.zero_()
    assert torch.equal(read.updates[LAYERS[0]].B, B)
    assert torch.equal(read.updates[LAYERS[0]].A, A)


def test_scaling_is_folded_into_b_at_each_access(tmp_path: Path) -> None:
    folder = written(tmp_path / "one", 0, rank=4)
    config = json.loads((folder / CONFIG).read_text())
    changed = {**config, "lora_alpha": 6, "use_rslora": True, "alpha_pattern": {r"layer\.1\.q": 10}}
    (folder / CONFIG).write_text(json.dumps(changed))
    read, stored = read_adapter(folder), load_file(folder / WEIGHTS)
    for name, factor in ((LAYERS[0], 3.0), (LAYERS[1], 5.0)):
        for _ in range(2):
            torch.testing.assert_close(
                read.updates[name].B, factor * stored[f"base_model.model.{name}.lora_B.weight"], rtol=0, atol=0
            )


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    read = read_adapter(written(tmp_path / "one", 0, dtype=torch.bfloat16))
    update = read.updates[LAYERS[0]]
    assert (read.dtype, update.B.dtype, update.A.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert torch.equal(update.A, adapter(0).updates[LAYERS[0]].A.bfloat16().float())


def test_a_writer_that_stops_leaves_nothing(tmp_path: Path) -> None:
    one = adapter(0)
    modules = sorted(one.updates)

    def half() -> None:
        with adapter_writer(tmp_path / "out", one.config, torch.float32, modules) as out:
            out.add(modules[0], one.updates[modules[0]])
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        half()
    assert list(tmp_path.iterdir()) == []


def test_a_layer_cannot_be_written_twice(tmp_path: Path) -> None:
    one = adapter(0)

    def twice() -> None:
        with adapter_writer(tmp_path / "out", one.config, torch.float32, LAYERS) as out:
            out.add(LAYERS[0], one.updates[LAYERS[0]])
            out.add(LAYERS[0], one.updates[LAYERS[0]])

    with pytest.raises(ValueError, match="was added before"):
        twice()
    assert list(tmp_path.iterdir()) == []


def test_the_task_of_a_folder(tmp_path: Path) -> None:
    one = adapter(0, rank=1)
    write_adapter(one, tmp_path / "mine", provenance={"task": {"name": "mood"}})
    write_adapter(one, tmp_path / "tone", provenance={"task": "mood"})
    assert task_of(tmp_path / "mine") == "mood"
    assert task_of(tmp_path / "tone") == "tone"


def test_files_beside_the_weights(tmp_path: Path) -> None:
    tensors = {"layer.0.q.lora_A.weight": torch.ones(2, 3), "layer.0.q.lora_B.weight": torch.zeros(3, 2)}
    extra = {"heads/mood.safetensors": {"w": torch.ones(2).half()}}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    write_folder(tmp_path / "one", config, tensors, provenance={"a": 1}, files={"README.md": "ä"}, extra=extra)
    assert (tmp_path / "one" / "README.md").read_text(encoding="utf-8") == "ä"
    assert load_file(tmp_path / "one" / "heads" / "mood.safetensors")["w"].dtype == torch.float16
    assert read_adapter(tmp_path / "one").shapes == {"layer.0.q": Shape(3, 3, 2)}
