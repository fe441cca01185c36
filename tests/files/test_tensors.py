"""A file written tensor by tensor, against safetensors' own writer and reader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loraloom.errors import LoraloomError
from loraloom.files.tensors import _ENTRY, StoredFile, TensorFile, read_header

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


EIGHT_BITS = [torch.float8_e4m3fn, torch.float8_e5m2]


def test_what_is_read_at_each_access_is_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {f"{dtype} {shape}": tensor(dtype, shape) for dtype in FLOATS + WHOLE + EIGHT_BITS for shape in SHAPES}
    save_file(tensors, tmp_path / "one", metadata={"format": "pt", "said": "so"})
    file = StoredFile(tmp_path / "one")
    assert same({name: one.to(torch.float32) for name, one in file.items()}, {k: v.float() for k, v in tensors.items()})
    assert {name: (one.dtype, tuple(one.shape)) for name, one in file.items()} == {
        name: (one.dtype, tuple(one.shape)) for name, one in tensors.items()
    }
    assert file.metadata == {"format": "pt", "said": "so"}
    assert {name: entry.shape for name, entry in file.entries.items()} == {
        k: tuple(v.shape) for k, v in tensors.items()
    }
    name = f"{torch.float32} (5, 3)"
    file[name].fill_(9)  # a copy
    assert torch.equal(file[name], tensors[name])
    assert name in file
    assert "none" not in file
    with pytest.raises(KeyError):
        file["none"]


@pytest.mark.parametrize("how", ["gone", "replaced", "written over", "cut short", "a folder"])
def test_a_file_that_changes_while_it_is_used_is_told(how: str, tmp_path: Path) -> None:
    path = tmp_path / "one"
    save_file({"a": torch.zeros(100), "b": torch.zeros(100)}, path)
    file = StoredFile(path)
    assert not file["a"].any()
    if how in ("gone", "a folder"):
        path.unlink()
    if how == "a folder":
        path.mkdir()
    elif how == "replaced":
        save_file({"a": torch.ones(100), "b": torch.ones(100)}, tmp_path / "two")
        (tmp_path / "two").replace(path)
    elif how == "written over":
        path.write_bytes(path.read_bytes())
    elif how == "cut short":
        path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(LoraloomError, match="one: cannot be read any more") as error:
        file["b"]
    assert "was it replaced?" in str(error.value)


HEADER = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'


def with_header(text: bytes, data: bytes = b"1234", length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        with_header(HEADER, length=9),
        with_header(HEADER, length=2**63),
        with_header(HEADER, length=20 << 20),
        with_header(HEADER, b"123"),
        with_header(HEADER, b"12345"),
        with_header(b"[" * 10_000 + b"]" * 10_000),
        with_header(b"null"),
        with_header(b'{"__metadata__": null, "a": 1}'),
        with_header(HEADER.replace(b"[0,4]", b"[0,-4]")),
        with_header(HEADER.replace(b"[1]", b"[%s]" % (b"9" * 5000))),
        with_header(HEADER.replace(b"[1]", b"[4611686018427387904, 4]")),
        with_header(HEADER.replace(b"F32", b"F33")),
        with_header(b"\xff" + HEADER),
        with_header(b'{"x":"' + b'"data_offsets"' * 200_001),
    ],
)
def test_a_header_that_none_has(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "one"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"\w"):
        read_header(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", tmp_path / ("x" * 300)):
        with pytest.raises(ValueError, match=r"directory|No such file|name too long"):
            StoredFile(path)
