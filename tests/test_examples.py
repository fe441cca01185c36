"""Each script of examples/ runs as its docstring says, on tiny adapters, and does what it promises."""

from __future__ import annotations

import io
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from commands import said
from loraloom.adapters.peft import read_adapter, write_adapter
from loraloom.adapters.update import Adapter, Update
from loraloom.results import StudyResult
from tiny_writers import prompt_recipe, writer_base

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script: str, *arguments: str | Path) -> str:
    """Run a script as Python would, in this process, which has loaded the libraries already."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    return printed.getvalue()


def test_every_example_is_tested_here() -> None:
    tested = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{path.name}"' in tested for path in EXAMPLES.glob("*.py"))


def adapters(folder: Path, ranks: tuple[int, ...], shape: tuple[int, int], modules: tuple[str, ...]) -> list[Path]:
    generator = torch.Generator().manual_seed(0)
    m, n = shape
    for rank in ranks:
        updates = {
            name: Update(torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator))
            for name in modules
        }
        config = {"peft_type": "LORA", "base_model_name_or_path": "some/base", "target_modules": ["query", "value"]}
        write_adapter(Adapter(updates, config), folder / f"rank{rank}", provenance={})
    return [folder / f"rank{rank}" for rank in ranks]


def test_one_adapter_for_serving(tmp_path: Path) -> None:
    teams = adapters(tmp_path, (4, 16, 24), (40, 36), ("layer.0.query", "layer.0.value"))
    told = run("one_adapter_for_serving.py", *teams, tmp_path / "merged")
    assert "rank 16, 2 layers" in told
    assert "energy lost: " in told
    merged = read_adapter(tmp_path / "merged")
    assert {shape.r for shape in merged.shapes.values()} == {16}


def test_fused_checkpoint(finished: Path, tmp_path: Path) -> None:
    base = finished / "base"
    weights = load_file(base / "model.safetensors")
    path = next(name for name in weights if name.endswith("layer.0.attention.self.query.weight"))
    trained = [finished / "study" / "adapters" / "LoRA" / task for task in ("mood", "tone")]
    told = run("fused_checkpoint.py", *trained, "--base", base, "--output", tmp_path / "fused")
    assert "rule: task_arithmetic" in told
    module = next(name for name in read_adapter(trained[0]).shapes if name.endswith("layer.0.attention.self.query"))
    expected = weights[path].double()
    for folder in trained:
        expected = expected + 0.3 * read_adapter(folder).updates[module].dense().double()
    fused = load_file(tmp_path / "fused" / "model.safetensors")
    assert (fused[path].double() - expected).norm() < 1e-6 * expected.norm()
    assert (tmp_path / "fused" / "heads" / "mood.safetensors").is_file()


@pytest.mark.parametrize("rules", [("task_arithmetic", "emr")])
def test_table_of_rules(finished: Path, tmp_path: Path, rules: tuple[str, ...]) -> None:
    trained = [finished / "study" / "adapters" / "LoRA" / task for task in ("mood", "tone")]
    out = tmp_path / "comparison"
    told = run(
        *(
            "table_of_rules.py",
            *trained,
            "--recipe",
            finished / "recipe.yaml",
            "--output",
            out,
            *(word for rule in rules for word in ("--rule", rule)),
        )
    )
    assert all(f"| {rule} " in told for rule in rules)
    assert (out / "report.html").is_file()


def test_trl_adapters(tmp_path: Path) -> None:
    """Adapters that TRL trains on a recipe's rows learn them, and are compared by the same recipe."""
    pytest.importorskip("trl")
    writer_base(tmp_path / "base", chat=True)
    recipe = prompt_recipe(tmp_path)
    told = run("trl_adapters.py", recipe, tmp_path / "adapters")
    folders = [tmp_path / "adapters" / name for name in ("first", "last")]
    assert all(f"{folder}: loss " in told for folder in folders)
    said("compare", *folders, "--recipe", recipe, "-o", tmp_path / "out", "--rule", "task_arithmetic", "--scale", 1)
    result = StudyResult.load(tmp_path / "out" / "results.json")
    single = {one.task: one.score for one in result.singles}
    alone = {one.task: one.score for one in result.bases}
    for name in ("first", "last"):
        assert single[name].more["loss"].value < alone[name].more["loss"].value
