"""Several processes train one adapter: as one process would, one folder, one voice, to the bit after a kill."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

import tiny
import tiny_study
from loraloom.adapters.peft import WEIGHTS, read_adapter
from loraloom.cli.main import app
from loraloom.errors import LoraloomError
from loraloom.model import processes
from loraloom.model.load import load_classifier
from loraloom.progress import Reporter
from loraloom.settings import LoraSettings, TrainingSettings
from loraloom.starts.initialise import initialise
from loraloom.starts.options import StartOptions
from loraloom.statistics.collect import collect_statistics
from loraloom.study.by_hand import train_from_recipe
from loraloom.study.recipe import Recipe
from loraloom.training import adapter as training
from loraloom.training.adapter import lora_config, train_adapter
from tiny_launch import two_processes

LAUNCH = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
LORA = LoraSettings(rank=2, alpha=4, targets=tiny.TARGETS["bert"])
BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
SETTINGS = TrainingSettings(epochs=3, batch_size=8, learning_rate=0.02, gradient_checkpointing=True)
TASK = tiny.task(rows=24)


def write_start(base: str, folder: Path) -> Path:
    """Write an adapter folder whose A is kept off its loud directions, and return it."""
    seen = []
    for seed in range(2):
        ids = torch.randint(3, len(tiny.WORDS), (4, 6), generator=torch.Generator().manual_seed(seed))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        seen.append(collect_statistics(load_classifier(base, 2), [batch], LORA.targets))
    config = lora_config(LORA, [])
    config.base_model_name_or_path = base
    initialise(folder, seen[0], {"other": seen[1]}, config, StartOptions(keep="projected"))
    return folder


def test_one_folder_as_of_one_process(tmp_path: Path) -> None:
    """Each step sees all rows, so that two halves of a batch must give what the whole gives."""
    settings = {"epochs": 2, "learning_rate": 0.01, "batch_size": 32, "max_length": 16, "warmup": 0}
    recipe = tiny_study.write_study(tmp_path, training=settings)
    start = write_start(str(tmp_path / "base"), tmp_path / "start")
    before = {path.name for path in tmp_path.iterdir()}
    words = ["train", "--recipe", recipe, "--task", "mood", "--init", start, "-o", tmp_path / "out", "--json"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH.split(), "-m", "loraloom", *map(str, words)]
    run = subprocess.run(launch, env=tiny_study.environment(), capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)  # one object, of one process
    assert {path.name for path in tmp_path.iterdir()} - before == {"out"}

    alone = train_from_recipe(Recipe.load(recipe), "mood", tmp_path / "alone", start, 0, Reporter(quiet=True))
    assert (
        (told["steps"], told["heldout"])
        == (alone.steps, pytest.approx(alone.heldout, abs=1e-4))
        == (2, told["heldout"])
    )
    together, avoid = read_adapter(tmp_path / "out"), load_file(start / "avoid.safetensors")
    for module, update in read_adapter(alone.folder).updates.items():
        A = together.updates[module].A
        assert (A - update.A).norm() <= 0.01 * update.A.norm()
        assert (together.updates[module].B - update.B).norm() <= 0.05 * update.B.norm()  # Adam magnifies rounding
        assert (A.double() @ avoid[module].double()).norm() < 1e-6 * A.norm()
    PeftModel.from_pretrained(load_classifier(str(tmp_path / "base"), 2), str(tmp_path / "out"))


def _train(folder: Path, output: str, **options: Any) -> dict[str, Tensor]:
    """Train and return the factors as this process holds them at the end."""
    held: list[dict[str, Tensor]] = []
    state_dict = training.get_peft_model_state_dict

    def keep(model: Any) -> Any:
        held.append({name: tensor.clone() for name, tensor in state_dict(model).items()})
        return state_dict(model)

    training.get_peft_model_state_dict = keep
    try:
        base, start = str(folder / "base"), folder / "start"
        train_adapter(base, TASK, folder / output, init=start, lora=LORA, settings=SETTINGS, seed=5, **options)
    finally:
        training.get_peft_model_state_dict = state_dict
    return held[-1]


def _killed(rank: int, folder: str) -> None:
    found: list[Any] = [None, None]
    dist.all_gather_object(found, _train(Path(folder), "whole"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())

    def kill(done: int, *_: Any) -> None:
        if done == 8:  # in the third epoch
            os._exit(9)

    _train(Path(folder), "out", progress=kill)


def _resumed(rank: int, folder: str) -> None:
    steps: list[int] = []
    _train(Path(folder), "out", progress=lambda done, *_: steps.append(done))
    assert steps == ([7, 8, 9] if rank == 0 else [])
    odd = SETTINGS.model_copy(update={"batch_size": 7})
    with pytest.raises(LoraloomError, match="batch_size 7 cannot be shared out among 2"):
        train_adapter(str(Path(folder) / "base"), TASK, Path(folder) / "odd", lora=LORA, settings=odd)
    with pytest.raises(LoraloomError, match="none is not there"):
        training.by_first(_fail)
    # a command's fault is told once, and ends every process
    done = CliRunner().invoke(app, ["train", "--recipe", str(Path(folder) / "none.yaml"), "--task", "mood", "-o", "x"])
    assert done.exit_code == 2
    assert bool(done.output) == (rank == 0)


def _fail() -> None:
    raise LoraloomError("none is not there")


def test_resumed_after_a_kill_and_faults(tmp_path: Path) -> None:
    tiny.base_folder("bert", tmp_path / "base")
    write_start(str(tmp_path / "base"), tmp_path / "start")
    with pytest.raises(torch.multiprocessing.ProcessExitedException):
        two_processes(_killed, tmp_path / "meet", str(tmp_path))
    assert not (tmp_path / "out").exists()
    two_processes(_resumed, tmp_path / "meet again", str(tmp_path))
    whole, out = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "out"))
    assert all(torch.equal(tensor, out[name]) for name, tensor in whole.items())
    assert not any(path.name.endswith(".checkpoints") for path in tmp_path.iterdir())


def benchmark(*words: str) -> dict[str, Any]:
    """Run the benchmark with `words`; return what it defines."""
    page = runpy.run_path(str(BENCHMARK))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(BENCHMARK), *words])
        page["main"]()
    return page


def test_the_benchmark_of_a_gpu_runs_small(capsys: pytest.CaptureFixture[str]) -> None:
    """Every row is there without a GPU too; with one asked for and none there, nothing is measured."""
    benchmark("--device", "cpu", "--tiny", "--runs", "1", "--bound", "16")
    told = capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in told.splitlines() if line.startswith("|")]
    assert [cells[0].split(",")[0] for cells in rows[2:]] == [
        *["statistics of a task"] * 2,
        "the bare pass",
        "statistics of 8 tasks",
        rows[6][0],
        "a training step",
        *[f"merging 8 adapters by `{rule}`" for rule in ("svd", "tsv", "ctm")],
    ]
    assert rows[6][0].startswith("start of 8 adapters")
    assert all(float(cells[1]) > 0 for cells in rows[2:])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benchmark_says_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    page = benchmark()
    assert "no GPU is at hand: nothing was measured" in capsys.readouterr().out
    once = page["with_section"]("# Page\n", "rows")
    assert once == f"# Page\n\n{page['BEGIN']}\nrows\n{page['END']}\n"
    assert page["with_section"](once, "other \\1 rows") == once.replace("rows", "other \\1 rows")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_study_takes_one_process(rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    done = CliRunner().invoke(app, ["run", str(tiny_study.write_study(tmp_path)), "-o", str(tmp_path / "study")])
    assert done.exit_code == 2
    assert ("a study runs in one process, and 2 were started" in done.output) == (rank == "0")
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_weights_spread_over_processes_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(LoraloomError, match=f"{name} spreads the weights"):
        train_adapter("nowhere", TASK, tmp_path / "out")


def test_processes_that_did_not_meet_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They would each train alone, and write over each other."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(training, "PartialState", lambda cpu: None)
    with pytest.raises(LoraloomError, match="2 were started, 1 found together"):
        train_adapter("nowhere", TASK, tmp_path / "out")


def test_a_torch_built_for_gpus_trains_on_a_cpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a driver torch still names what it was built for: the processes would each have trained alone."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert processes.on_cpu()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert not processes.on_cpu()
