"""What `check` tells of adapters that PEFT's own add_weighted_adapter made, against the dense updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from commands import hints, page, refused, said
from loraloom.adapters.peft import read_adapter, write_adapter
from loraloom.adapters.update import Adapter, Update
from loraloom.analysis.checking import check_folder_of
from loraloom.merging import merge, write_merged

WEIGHTS = [0.7, 0.4]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(14, 11), nn.Linear(11, 13)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.value(self.query(x))
        return out


def merged_by_peft(folder: Path, way: str, *, rslora: bool = False, **more: Any) -> tuple[Path, list[Path]]:
    """Merge two random adapters by PEFT; return where the merge and its members are."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], use_rslora=rslora)
    model = get_peft_model(Net(), config, adapter_name="one")
    model.add_adapter("two", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "both", combination_type=way, **more)
    model.save_pretrained(folder, selected_adapters=["one", "two", "both"])
    return folder / "both", [folder / "one", folder / "two"]


def dense(folder: Path) -> dict[str, Tensor]:
    return {module: update.dense().double() for module, update in read_adapter(folder).updates.items()}


@pytest.mark.parametrize(("way", "kind"), [("cat", "sum"), ("svd", "truncated sum")])
def test_sums_of_pefts_that_are_right(tmp_path: Path, way: str, kind: str) -> None:
    folder, members = merged_by_peft(tmp_path, way)
    found = check_folder_of(folder, members)
    assert found.merge is not None
    assert (found.merge.kind, found.wrong, found.folder.leftover) == (kind, False, None)
    assert found.merge.weights is not None
    assert found.merge.weights == pytest.approx(WEIGHTS, rel=1e-4)


def test_cross_terms_of_pefts_linear_merge(tmp_path: Path) -> None:
    folder, members = merged_by_peft(tmp_path, "linear")
    found = check_folder_of(folder, members)
    assert found.merge is not None
    assert (found.merge.kind, found.wrong) == ("crossed factors", True)
    assert found.merge.weights is not None
    assert found.merge.weights == pytest.approx(WEIGHTS, rel=1e-4)
    whole, (one, two) = dense(folder), map(dense, members)
    cross = {module: whole[module] - WEIGHTS[0] * one[module] - WEIGHTS[1] * two[module] for module in whole}
    energy = [sum(float(dW.square().sum()) for dW in of.values()) for of in (cross, whole)]
    assert found.merge.crossed == pytest.approx(energy[0] / energy[1], rel=1e-4)
    assert "cross terms are" in " ".join(page("check", folder, *members).split())
    assert "next: merge them right" in hints("check", folder, *members)


@pytest.mark.parametrize("way", ["cat", "svd", "linear"])
def test_the_scale_of_rslora_that_is_applied_twice(tmp_path: Path, way: str) -> None:
    folder, members = merged_by_peft(tmp_path, way, rslora=True)
    found = check_folder_of(folder, members)
    assert found.merge is not None
    assert found.merge.weights is not None
    assert found.folder.leftover == pytest.approx(found.folder.ranks[1] ** 0.5)
    assert found.wrong
    without = [weight / found.folder.leftover for weight in found.merge.weights]
    assert without == pytest.approx(WEIGHTS, rel=1e-4)
    told = said("check", folder, *members)
    assert (told["wrong"], told["merge"]["kind"]) == (True, found.merge.kind)
    assert "set use_rslora to false" in hints("check", folder, *members)
    assert "much too loud; give its members" in hints("check", folder)


def test_entries_of_factors_that_were_dropped_apart(tmp_path: Path) -> None:
    folder, members = merged_by_peft(tmp_path, "magnitude_prune", density=0.5)
    found = check_folder_of(folder, members)
    assert found.merge is not None
    assert (found.merge.kind, found.wrong, found.merge.weights) == ("dropped entries", True, None)
    assert 0.1 < found.folder.zeros < 0.5
    assert "exactly 0" in hints("check", folder)


def test_a_merge_of_our_own_is_right(tmp_path: Path) -> None:
    _, members = merged_by_peft(tmp_path, "cat", rslora=True)
    inputs = [read_adapter(path) for path in members]
    found = check_folder_of(write_merged(merge(inputs, "weighted"), tmp_path / "ours"), members)
    assert found.merge is not None
    assert (found.merge.kind, found.wrong) == ("sum", False)
    assert found.merge.weights == pytest.approx([0.5, 0.5])
    other = check_folder_of(write_merged(merge(inputs, "iso_c"), tmp_path / "iso"), members)
    assert other.merge is not None
    assert (other.merge.kind, other.wrong) == ("other", False)


def test_a_strangers_adapter(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    updates = {f"layer.{i}.query": Update(torch.zeros(9, 2), torch.randn(2, 8, generator=generator)) for i in range(2)}
    updates |= {
        f"layer.{i}.value": Update(10.0**i * torch.randn(9, 3, generator=generator), torch.randn(3, 8))
        for i in (0, 1, 3)
    }
    config = {"peft_type": "LORA", "target_modules": ["query", "value"], "base_model_name_or_path": "/home/me/base"}
    write_adapter(Adapter(updates, config), tmp_path / "odd", provenance={})
    told = said("check", tmp_path / "odd")
    assert (told["folder"]["layers"], told["folder"]["ranks"], told["merge"]) == (5, [2, 3], None)
    assert told["folder"]["still"] == ["layer.0.query", "layer.1.query"]
    assert told["folder"]["loudest"][0] == "layer.3.value"
    heard = hints("check", tmp_path / "odd")
    for words in ("2 layers of 5 with an update of zero", "times as loud", "a folder on somebody's disk"):
        assert words in heard
    assert "no such" in refused("check", tmp_path / "gone") or "not an adapter" in refused("check", tmp_path / "gone")
    other = {"layer.0.value": Update(torch.ones(7, 1), torch.ones(1, 7))}
    write_adapter(Adapter(other, config), tmp_path / "other", provenance={})
    assert "cannot check" in refused("check", tmp_path / "odd", tmp_path / "other")
