"""A file written tensor by tensor, against safetensors' own writer and reader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loraloom.files.tensors import _ENTRY, TensorFile

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
WHOLE = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
SHAPES = [(), (1,), (0,), (3, 0), (7,), (5, 3), (2, 3, 4)]


def tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))) * 50
    return values > 0 if dtype == torch.bool else values.abs().to(dtype) if dtype == torch.uint8 else values.to(dtype)


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    file = TensorFile(path, tensors)
    for name, one in tensors.items():
        file.add(name, one)
    file.close()
    return path


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one
    )


def test_holds_what_safetensors_writes_for_every_dtype_and_shape(tmp_path: Path) -> None:
    tensors = {f"{dtype} {shape}": tensor(dtype, shape) for dtype in FLOATS + WHOLE for shape in SHAPES}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    write(tmp_path / "ours", tensors)
    assert same(load_file(tmp_path / "ours"), load_file(tmp_path / "theirs"))
    with safe_open(tmp_path / "ours", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        assert torch.equal(file.get_slice("torch.float32 (5, 3)")[1:3], tensors["torch.float32 (5, 3)"][1:3])


def test_bits_are_kept(tmp_path: Path) -> None:
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40, 3.0])
    got = load_file(write(tmp_path / "odd", {"odd": odd}))["odd"]
    assert torch.equal(got.view(torch.int32), odd.view(torch.int32))


def test_views_and_parameters_are_written_as_they_look(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"turned": whole.T, "strided": whole[:, ::2], "tied": whole, "again": whole}
    got = load_file(write(tmp_path / "views", {**tensors, "trained": torch.nn.Parameter(whole)}))
    assert same(got, {**tensors, "trained": whole})


@settings(max_examples=25, deadline=None)
@given(names=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), unique=True, max_size=20))
def test_any_names_in_any_number(names: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    names = [name for name in names if name != "__metadata__"]
    tensors = {name: torch.tensor([index]) for index, name in enumerate(names)}
    path = write(tmp_path_factory.mktemp("names") / "file", tensors)
    assert same(load_file(path), tensors)
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # where the format wants the data to start


def test_the_room_kept_for_the_header_suffices_for_the_largest_entries(tmp_path: Path) -> None:
    """Eight dimensions and offsets of twelve digits need fewer bytes than an entry is given."""
    entry = {"dtype": "BOOL", "shape": [10**8] * 8, "data_offsets": [10**12, 10**12]}
    assert len(json.dumps(entry, separators=(",", ":"))) + len(":,") <= _ENTRY
    many = {f"base_model.model.layer.{i}.lora_A.weight": torch.zeros(1, 1) for i in range(2000)}
    assert len(load_file(write(tmp_path / "many", many))) == 2000


def test_names_that_were_not_announced_or_come_twice_are_refused(tmp_path: Path) -> None:
    file = TensorFile(tmp_path / "file", ["one", "two"])
    file.add("one", torch.ones(2))
    for name in ("three", "one", "__metadata__"):
        with pytest.raises(ValueError, match=f"{name} was not announced, or was added before"):
            file.add(name, torch.zeros(2))
    file.close()
    file.close()
    assert same(load_file(tmp_path / "file"), {"one": torch.ones(2)})  # an announced name may stay out


def test_a_file_that_was_not_closed_cannot_be_read(tmp_path: Path) -> None:
    file = TensorFile(tmp_path / "file", ["one"])
    file.add("one", torch.ones(2))
    with pytest.raises(Exception, match="header"):
        load_file(tmp_path / "file")
    file.close()
    assert same(load_file(tmp_path / "file"), {"one": torch.ones(2)})
