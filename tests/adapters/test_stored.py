"""What the tensors of an adapter's file may be: their dtypes, shapes and values, and what is written of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraloom.adapters.peft import CONFIG, WEIGHTS, adapter_sha256, read_adapter, write_adapter
from loraloom.adapters.update import Adapter, Update
from loraloom.adapters.writer import balanced
from loraloom.errors import LoraloomError
from loraloom.files.tensors import TensorFile
from loraloom.merging import merge, write_merged

PREFIX = "base_model.model."
SETTINGS = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q", "v"],
    "base_model_name_or_path": "o/b",
}


def factors(seed: int = 0, m: int = 6, n: int = 5, r: int = 2, std: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"A": (r, n), "B": (m, r)}
    return {
        f"layers.{i}.{module}.lora_{part}.weight": std * torch.randn(shape, generator=generator)
        for i in range(2)
        for module in "qv"
        for part, shape in shapes.items()
    }


def folder_of(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file({PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({**SETTINGS, **config}))
    return folder


def dense(folder: Path) -> dict[str, Tensor]:
    """Return alpha/r B A of every layer by float64 arithmetic on what is in the file."""
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    scaling = config["lora_alpha"] / config["r"]
    assert not config.get("rank_pattern")
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith("lora_A.weight")]
    return {
        name.removeprefix(PREFIX): scaling
        * tensors[f"{name}.lora_B.weight"].double()
        @ tensors[f"{name}.lora_A.weight"].double()
        for name in names
    }


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


# dtypes

WIDE = {torch.float64: 1e-7, torch.float32: 1e-7, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", [*WIDE, torch.float8_e4m3fn, torch.float8_e5m2])
def test_floating_point_numbers_of_any_width_merge(dtype: torch.dtype, tmp_path: Path) -> None:
    folders = [
        folder_of(tmp_path / f"{i}", {name: one.to(dtype) for name, one in factors(i, std=0.2).items()})
        for i in range(2)
    ]
    out = write_merged(merge([read_adapter(folder) for folder in folders], "weighted"), tmp_path / "out")
    written = {tensor.dtype for tensor in load_file(out / WEIGHTS).values()}
    assert written == {dtype if dtype in WIDE else torch.bfloat16}
    one, two = map(dense, folders)
    assert error(dense(out), {name: (one[name] + two[name]) / 2 for name in one}) < WIDE.get(dtype, 1e-2)


@given(st.permutations([torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn]), st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_the_widest_dtype_is_written_whatever_comes_first(
    tmp_path_factory: pytest.TempPathFactory, dtypes: list[torch.dtype], kinds: int
) -> None:
    place = tmp_path_factory.mktemp("mixed")
    used = [dtypes[i % kinds] for i in range(8)]
    tensors = {name: one.to(dtype) for dtype, (name, one) in zip(used, factors().items(), strict=True)}
    expected = torch.bfloat16 if set(used) <= {torch.float8_e4m3fn, torch.bfloat16} else torch.float32
    expected = torch.float16 if set(used) == {torch.float16} else expected
    assert read_adapter(folder_of(place / "one", tensors)).dtype == expected


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64, torch.uint32])
def test_other_numbers_are_refused_by_the_tensors_names(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = factors()
    name = "layers.1.q.lora_B.weight"
    tensors[name] = tensors[name].to(dtype)
    with pytest.raises(LoraloomError, match=rf"{name} is of .*: weights are floating-point numbers"):
        read_adapter(folder_of(tmp_path / "one", tensors))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.uint16, torch.bool])
def test_every_dtype_of_the_format_can_be_written(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    file = TensorFile(tmp_path / "one.safetensors", ["a"])
    file.add("a", tensor)
    file.close()
    found = load_file(tmp_path / "one.safetensors")["a"]
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


# values and shapes


@pytest.mark.parametrize("names", [["lora_A", "lora_B"], ["lora_B"], ["classifier"]])
def test_empty_tensors_of_zero_3_are_told_as_that(names: list[str], tmp_path: Path) -> None:
    tensors = {**factors(), "classifier.weight": torch.ones(2, 6)}
    chosen = {name: torch.zeros(0) if any(part in name for part in names) else one for name, one in tensors.items()}
    with pytest.raises(LoraloomError, match="is empty: saved under DeepSpeed's ZeRO-3"):
        read_adapter(folder_of(tmp_path / "one", chosen))


@pytest.mark.parametrize(
    ("head", "told"),
    [
        ({"classifier.weight": torch.full((2, 6), float("nan"))}, "classifier.weight holds values that are not finite"),
        ({"classifier.weight": torch.full((2, 6), torch.inf)}, "classifier.weight holds values that are not finite"),
        ({"classifier.weight": torch.ones(2, 6).to(torch.int8)}, "classifier.weight is of I8"),
        (
            {"a.weight": torch.ones(2, 6), "a.bias": torch.ones(3)},
            r"a.weight of \(2, 6\) does not fit its bias of \(3,\)",
        ),
        ({"modules_to_save.x": torch.ones(2), "x": torch.ones(2)}, ""),
        ({"a.modules_to_save.w.weight": torch.ones(2), "a.w.weight": torch.ones(2)}, "are the same one of the base"),
    ],
)
def test_heads_are_checked_as_factors_are(head: dict[str, Tensor], told: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "one", {**factors(), **head})
    if told:
        with pytest.raises(LoraloomError, match=told):
            read_adapter(folder)
    else:
        assert set(read_adapter(folder).head) == set(head)


def test_rank_0_and_factors_that_do_not_multiply(tmp_path: Path) -> None:
    none = {name: torch.zeros((0, 5) if "lora_A" in name else (6, 0)) for name in factors()}
    with pytest.raises(LoraloomError, match="is empty"):
        read_adapter(folder_of(tmp_path / "none", none))
    flat = {name: one.flatten() for name, one in factors().items()}
    with pytest.raises(LoraloomError, match=r"layers.0.q: lora_A \(10,\) and lora_B \(12,\) do not multiply"):
        read_adapter(folder_of(tmp_path / "flat", flat))
    scalar = {**factors(), "scale": torch.tensor(2.0)}
    assert read_adapter(folder_of(tmp_path / "scalar", scalar)).head == {"scale": torch.tensor(2.0)}


def test_a_file_without_factors_is_told(tmp_path: Path) -> None:
    for number, tensors in enumerate(({}, {"classifier.weight": torch.ones(2, 6)})):
        with pytest.raises(LoraloomError, match="holds no lora_A and lora_B tensors"):
            read_adapter(folder_of(tmp_path / f"{number}", tensors))


def test_a_grouped_convolution_is_told(tmp_path: Path) -> None:
    tensors = {"conv.lora_A.weight": torch.ones(4, 6, 3), "conv.lora_B.weight": torch.ones(8, 2, 1)}
    with pytest.raises(LoraloomError, match="conv: LoRA of a convolution in 2 groups"):
        read_adapter(folder_of(tmp_path / "one", tensors))


def test_hundreds_of_problems_are_a_few_and_a_count(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.q.lora_{part}.weight": torch.zeros(0) for i in range(200) for part in "AB"}
    with pytest.raises(LoraloomError, match="400 problems") as caught:
        read_adapter(folder_of(tmp_path / "one", tensors))
    assert str(caught.value).count("\n") < 25
    assert "and 380 more" in str(caught.value)


@pytest.mark.parametrize("alpha", [1e30, 1e39, -1e39, 1e300])
def test_values_that_overflow_are_told_and_huge_ones_leave_json(alpha: float, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "one", factors(), lora_alpha=alpha)
    if abs(alpha) > 1e38:
        with pytest.raises(LoraloomError, match="lora_B times alpha/r overflows"):
            read_adapter(folder)
        return
    out = write_merged(merge([read_adapter(folder)], "task_arithmetic"), tmp_path / "out")
    layers = json.loads((out / "loraloom.json").read_text(), parse_constant=pytest.fail)["layers"]
    expected = float(dense(folder)["layers.0.q"].square().sum())
    assert layers["layers.0.q"]["energy"] == pytest.approx(expected, rel=1e-5)


# float16


@pytest.mark.parametrize("std", [1e-2, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_updates_keep_their_digits(dtype: torch.dtype, std: float, tmp_path: Path) -> None:
    """PEFT's A has entries of 0.1, a young B such as 1e-5: with all scaling in B half of float16's digits would go."""
    folders = []
    for i in range(3):
        tensors = factors(i, m=64, n=64, r=16)
        small = {name: (one * (0.1 if "lora_A" in name else std)).to(dtype) for name, one in tensors.items()}
        folders.append(folder_of(tmp_path / f"{i}", small, r=16, lora_alpha=4))
    out = write_merged(merge([read_adapter(f) for f in folders], "task_arithmetic"), tmp_path / "out")
    parts = [dense(folder) for folder in folders]
    expected = {name: 0.3 * sum(part[name] for part in parts) for name in parts[0]}
    assert error(dense(out), expected) < (5e-4 if dtype == torch.float16 else 5e-3)


@given(st.integers(0, 2**31), st.floats(-20, 20), st.floats(-20, 20), st.booleans())
def test_balanced_factors_make_the_same_update(seed: int, a: float, b: float, empty: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    update = Update(2**b * torch.randn(5, 3, generator=generator), 2**a * torch.randn(3, 4, generator=generator))
    if empty:
        update.B[:, 1] = 0
    found = balanced(update)
    assert torch.equal(found.dense(), update.dense())  # powers of two change no digit
    norms = found.A.norm(dim=1) / found.B.norm(dim=0)
    kept = [0, 2] if empty else [0, 1, 2]
    assert float(norms[kept].max()) < 2.01
    assert float(norms[kept].min()) > 0.49


def test_overflow_is_still_told(tmp_path: Path) -> None:
    update = Update(torch.full((3, 1), 1e9), torch.full((1, 3), 1e9))
    one = Adapter({"q": update}, dict(SETTINGS), dtype=torch.float16)
    with pytest.raises(LoraloomError, match=rf"^{tmp_path}/out: 2 problems\n.*overflows torch\.float16"):
        write_adapter(one, tmp_path / "out", provenance={})
    assert not (tmp_path / "out").exists()


# shards


def test_shards_are_read_hashed_and_missed(tmp_path: Path) -> None:
    whole = folder_of(tmp_path / "one", factors())
    expected = {name: update.dense() for name, update in read_adapter(whole).updates.items()}
    tensors = sorted(load_file(whole / WEIGHTS).items())
    (whole / WEIGHTS).unlink()
    for part in range(3):
        save_file(dict(tensors[part::3]), whole / f"adapter_model-0000{part + 1}-of-00003.safetensors")
    found = read_adapter(whole)
    assert {name: update.dense().tolist() for name, update in found.updates.items()} == {
        name: update.tolist() for name, update in expected.items()
    }
    before = adapter_sha256(whole)
    save_file({key: one + 1 for key, one in tensors[2::3]}, whole / "adapter_model-00003-of-00003.safetensors")
    assert adapter_sha256(whole) != before
    (whole / "adapter_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(LoraloomError, match=r"adapter_model-00002-of-00003\.safetensors is missing"):
        read_adapter(whole)
