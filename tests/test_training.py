"""Training end to end on tiny random models: saved adapters, resuming to the bit, early stopping, and every failure."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer
from transformers.integrations import integration_utils

import tiny
from loraloom.adapters.heads import Head
from loraloom.adapters.peft import CONFIG, WEIGHTS, read_adapter, read_provenance
from loraloom.errors import LoraloomError
from loraloom.files.outputs import RECORD
from loraloom.model.load import load_classifier, load_tokenizer
from loraloom.model.runner import Evaluator, evaluate
from loraloom.settings import LoraSettings, TrainingSettings
from loraloom.starts.initialise import initialise
from loraloom.starts.options import StartOptions
from loraloom.statistics.collect import collect_statistics
from loraloom.statistics.file import Statistics
from loraloom.tasks.task import Task
from loraloom.training.adapter import lora_config, train_adapter
from loraloom.training.runs import Reports, check_reports

TASK = tiny.task(rows=24)
LORA = LoraSettings(rank=2, targets=tiny.TARGETS["bert"])
SETTINGS = TrainingSettings(epochs=3, batch_size=8, learning_rate=0.02)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.base_folder("bert", tmp_path_factory.mktemp("bert") / "base"))


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


def same(one: Path, two: Path) -> bool:
    first, second = weights(one), weights(two)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def undisturbed(bert: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_adapter(bert, TASK, tmp_path_factory.mktemp("a") / "a", lora=LORA, settings=SETTINGS, seed=5).folder


def kept(base: str) -> Statistics:
    model = load_classifier(base, 2)
    ids = torch.randint(3, len(tiny.WORDS), (4, 6), generator=torch.Generator().manual_seed(0))
    return collect_statistics(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], LORA.targets)


@pytest.fixture(scope="module")
def seen(bert: str) -> Statistics:
    return kept(bert)


@pytest.mark.parametrize("kind", tiny.CONFIGS)
@pytest.mark.parametrize("regression", [False, True])
def test_two_steps_saved_and_read_again(
    kind: str, regression: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model that was trained, PEFT's reload and our Evaluator give the same logits."""
    base = str(tiny.base_folder(kind, tmp_path / "base"))
    task = tiny.task(regression=regression, rows=12)
    trained: dict[str, Any] = {}
    save = PeftModel.save_pretrained

    def keep(model: Any, folder: str, *args: Any, **options: Any) -> None:
        trained["model"] = model
        save(model, folder, *args, **options)

    monkeypatch.setattr(PeftModel, "save_pretrained", keep)
    lora = LoraSettings(rank=2, targets=tiny.TARGETS[kind])
    settings = TrainingSettings(epochs=1, batch_size=6, learning_rate=0.02)
    done = train_adapter(base, task, tmp_path / "out", lora=lora, settings=settings, seed=3)
    assert done.steps == 2
    tokenizer = load_tokenizer(base)
    batch = tokenizer(list(task.test["text_a"]), padding=True, return_tensors="pt")
    reloaded: Any = PeftModel.from_pretrained(load_classifier(base, task.outputs, seed=99), str(done.folder))
    with torch.no_grad():
        expected = trained["model"].eval()(**batch).logits.cpu()
        from_peft = reloaded.eval()(**batch).logits
        with trained["model"].disable_adapter():
            assert not torch.allclose(trained["model"](**batch).logits, expected)
    adapter, evaluator = read_adapter(done.folder), Evaluator(base, batch_size=4)
    head = Head.of(adapter.head, adapter.name)
    ours = head.logits(evaluator.features(adapter.updates, head, evaluator.encode(task.test)))
    assert expected.shape == (len(task.test), task.outputs)
    assert (from_peft - expected).norm() < 1e-5 * expected.norm()
    assert (ours - expected).norm() < 1e-5 * expected.norm()
    assert done.heldout == pytest.approx(
        evaluate(evaluator, adapter.updates, head, task, split="heldout").value, abs=1e-5
    )
    assert all(update.B.any() for update in adapter.updates.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]  # no scratch is left
    assert sorted(path.name for path in done.folder.iterdir()) == [RECORD, CONFIG, WEIGHTS, "loraloom.json"]


def test_it_learns_and_says_what_it_did(bert: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Twenty epochs on 24 texts: it knows them by heart, and prints nothing."""
    task, steps = replace(TASK, heldout=TASK.train), []
    settings = TrainingSettings(epochs=20, batch_size=8, learning_rate=0.01)
    lora = LoraSettings(rank=8, targets="all-linear")
    done = train_adapter(
        bert, task, tmp_path / "out", lora=lora, settings=settings, progress=lambda *at: steps.append(at)
    )
    assert done.heldout >= 0.95
    assert [at[:2] for at in steps] == [(step, 60) for step in range(1, 61)]
    assert capfd.readouterr() == ("", "")
    told = read_provenance(done.folder)
    assert told["task"] == {"name": "mood", "sha256": task.digest(), "metric": "accuracy", "labels": ["bad", "good"]}
    assert told["training"] == {**settings.model_dump(), "seed": 0}
    assert told["heldout"]["best"] == done.heldout


def test_seeds(bert: str, undisturbed: Path, tmp_path: Path) -> None:
    again = train_adapter(bert, TASK, tmp_path / "again", lora=LORA, settings=SETTINGS, seed=5)
    other = train_adapter(bert, TASK, tmp_path / "other", lora=LORA, settings=SETTINGS, seed=6)
    assert same(undisturbed, again.folder)
    assert not same(undisturbed, other.folder)


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


def kill_at(step: int) -> Any:
    def progress(done: int, *_: Any) -> None:
        if done == step:
            raise Killed

    return progress


def test_resumed_after_a_kill(bert: str, undisturbed: Path, tmp_path: Path) -> None:
    """Killed in the third epoch: the second call starts from the second epoch's checkpoint; same bits at the end."""
    steps: list[int] = []
    with pytest.raises(Killed):
        train_adapter(bert, TASK, tmp_path / "out", lora=LORA, settings=SETTINGS, seed=5, progress=kill_at(8))
    assert not (tmp_path / "out").exists()
    train_adapter(
        bert, TASK, tmp_path / "out", lora=LORA, settings=SETTINGS, seed=5, progress=lambda done, *_: steps.append(done)
    )
    assert steps == [7, 8, 9]
    assert same(tmp_path / "out", undisturbed)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("damage", ["state missing", "state cut", "weights missing too"])
def test_a_checkpoint_written_in_part_is_not_used(bert: str, undisturbed: Path, damage: str, tmp_path: Path) -> None:
    scratch, steps = tmp_path / "scratch", []
    options: dict[str, Any] = {"lora": LORA, "settings": SETTINGS, "seed": 5, "checkpoints": scratch}
    with pytest.raises(Killed):
        train_adapter(bert, TASK, tmp_path / "out", progress=kill_at(8), **options)
    state = scratch / "checkpoint-6" / "trainer_state.json"
    if damage == "state cut":
        state.write_text(state.read_text()[:100])
    else:
        state.unlink()
    if damage == "weights missing too":
        (scratch / "checkpoint-6" / WEIGHTS).unlink()
    before = {path.name for path in scratch.glob("checkpoint-*")}
    train_adapter(bert, TASK, tmp_path / "out", progress=lambda done, *_: steps.append(done), **options)
    assert steps[0] == (4 if "checkpoint-3" in before else 1)
    assert same(tmp_path / "out", undisturbed)


def test_the_trainer_writes_its_state_last(bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tells a whole checkpoint from a part, held against the installed transformers."""
    found: list[set[str]] = []
    write = transformers.trainer_callback.TrainerState.save_to_json

    def spy(state: Any, path: str) -> None:
        found.append({file.name for file in Path(path).parent.iterdir()})
        write(state, path)
        kept_files.append({file.name for file in Path(path).parent.iterdir()})

    kept_files: list[set[str]] = []
    monkeypatch.setattr(transformers.trainer_callback.TrainerState, "save_to_json", spy)
    with pytest.raises(Killed):
        train_adapter(
            bert, TASK, tmp_path / "out", lora=LORA, settings=SETTINGS, checkpoints=tmp_path / "s", progress=kill_at(4)
        )
    assert "trainer_state.json" not in found[0]
    assert {file.name for file in (tmp_path / "s" / "checkpoint-3").iterdir()} == kept_files[0]


@pytest.mark.parametrize("change", ["settings", "seed", "lora", "task"])
def test_checkpoints_of_another_call_are_not_gone_on_from(
    bert: str, undisturbed: Path, change: str, tmp_path: Path
) -> None:
    other: dict[str, Any] = {"lora": LORA, "settings": SETTINGS, "seed": 5, "task": TASK}
    other[change] = {
        "settings": SETTINGS.model_copy(update={"learning_rate": 0.03}),
        "seed": 6,
        "lora": LORA.model_copy(update={"alpha": 3}),
        "task": replace(TASK, train=TASK.train.select(range(23))),
    }[change]
    with pytest.raises(Killed):
        train_adapter(bert, output=tmp_path / "out", progress=kill_at(8), **other)
    train_adapter(bert, TASK, tmp_path / "out", lora=LORA, settings=SETTINGS, seed=5)
    assert same(tmp_path / "out", undisturbed)


def test_a_folder_of_some_other_training_is_left_alone(bert: str, tmp_path: Path) -> None:
    (tmp_path / "mine" / "checkpoint-7").mkdir(parents=True)
    with pytest.raises(LoraloomError, match="some other training"):
        train_adapter(bert, TASK, tmp_path / "out", lora=LORA, settings=SETTINGS, checkpoints=tmp_path / "mine")
    assert (tmp_path / "mine" / "checkpoint-7").is_dir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    one = SETTINGS.model_copy(update={"epochs": 1})
    train_adapter(bert, TASK, tmp_path / "out", lora=LORA, settings=one, checkpoints=tmp_path / "notes")
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["diary.txt"]


class Scripted:
    """Held-out scores by evaluation, in place of measured ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, scores: list[float]) -> None:
        self.scores = scores
        evaluate_loop = Trainer.evaluate

        def evaluate(trainer: Trainer, *args: Any, **options: Any) -> dict[str, float]:
            epoch = round(trainer.state.epoch or 0)
            trainer.compute_metrics = lambda _: {"score": self.scores[epoch - 1]}
            return evaluate_loop(trainer, *args, **options)

        monkeypatch.setattr(Trainer, "evaluate", evaluate)


PATIENT = TrainingSettings(epochs=6, batch_size=8, learning_rate=0.02, patience=2)


def test_early_stopping_keeps_the_best(bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Best in epoch 2, stopped after epoch 4: the weights are those that epoch 2 left."""
    Scripted(monkeypatch, [0.1, 0.9, 0.3, 0.2, 1.0, 1.0])
    seen: dict[int, dict[str, Tensor]] = {}
    save = Trainer._save_checkpoint

    def spy(trainer: Trainer, *args: Any) -> None:
        save(trainer, *args)
        seen[trainer.state.global_step] = weights(
            Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
        )

    monkeypatch.setattr(Trainer, "_save_checkpoint", spy)
    done = train_adapter(bert, TASK, tmp_path / "out", lora=LORA, settings=PATIENT)
    assert (done.heldout, done.steps) == (0.9, 12)
    assert all(torch.equal(tensor, seen[6][name]) for name, tensor in weights(done.folder).items())
    assert not all(torch.equal(tensor, seen[12][name]) for name, tensor in weights(done.folder).items())


@pytest.mark.parametrize("killed", [7, 10, "after the last"])
def test_early_stopping_counts_on_after_a_kill(
    bert: str, killed: int | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Scripted(monkeypatch, [0.1, 0.9, 0.3, 0.2, 1.0, 1.0])
    whole = train_adapter(bert, TASK, tmp_path / "whole", lora=LORA, settings=PATIENT)
    options: dict[str, Any] = {"lora": LORA, "settings": PATIENT}
    with monkeypatch.context() as patch:
        if isinstance(killed, int):
            options["progress"] = kill_at(killed)
        else:
            patch.setattr(Trainer, "_load_best_model", lambda _: kill_at(0)(0, 0))
        with pytest.raises(Killed):
            train_adapter(bert, TASK, tmp_path / "out", **options)
    options.pop("progress", None)
    again = train_adapter(bert, TASK, tmp_path / "out", **options)
    assert (again.heldout, again.steps) == (whole.heldout, whole.steps) == (0.9, 12)
    assert same(again.folder, whole.folder)


@pytest.mark.parametrize("keep", ["free", "frozen", "projected"])
def test_from_a_start(bert: str, seen: Statistics, keep: Any, tmp_path: Path) -> None:
    """A recipe's start (SEQ_CLS, no head in it): kept as asked, after a kill too, and said in loraloom.json."""
    lora = LoraSettings(rank=2, targets=LORA.targets, rslora=True, rank_pattern={"value": 3})
    config = lora_config(lora, [])
    config.base_model_name_or_path = bert
    initialise(tmp_path / "start", seen, {"other": seen}, config, StartOptions(keep=keep))
    with pytest.raises(Killed):
        train_adapter(
            bert, TASK, tmp_path / "out", init=tmp_path / "start", settings=SETTINGS, seed=1, progress=kill_at(5)
        )
    done = train_adapter(bert, TASK, tmp_path / "out", init=tmp_path / "start", settings=SETTINGS, seed=1)
    whole = train_adapter(bert, TASK, tmp_path / "whole", init=tmp_path / "start", settings=SETTINGS, seed=1)
    assert same(done.folder, whole.folder)
    before, after = read_adapter(tmp_path / "start"), read_adapter(done.folder)
    avoid = load_file(tmp_path / "start" / "avoid.safetensors") if keep == "projected" else {}
    for module, update in after.updates.items():
        A, start = update.A, before.updates[module].A
        assert A.shape == start.shape
        assert update.B.norm() > 0.01
        assert torch.equal(A, start) == (keep == "frozen")
        if keep == "projected":
            assert (A.double() @ avoid[module].double()).norm() < 1e-6 * A.norm()
    told = read_provenance(done.folder)
    assert (told["init"]["keep"], told["made_by"]) == (keep, "loraloom train")


def test_a_start_that_does_not_fit(bert: str, seen: Statistics, tmp_path: Path) -> None:
    start = tmp_path / "start"
    initialise(start, seen, {"other": seen}, lora_config(LORA, []))
    wide = str(tiny.base_folder("roberta", tmp_path / "roberta"))
    with pytest.raises(LoraloomError, match=r"start: \d+ problems[\s\S]*has no layer for"):
        train_adapter(wide, TASK, tmp_path / "out", init=start, settings=SETTINGS)
    config = json.loads((start / CONFIG).read_text())
    (start / CONFIG).write_text(json.dumps({**config, "target_modules": ["query", "value", "key"]}))
    with pytest.raises(LoraloomError, match=r"it lacks .*key.lora_A"):
        train_adapter(bert, TASK, tmp_path / "out", init=start, settings=SETTINGS)
    (start / CONFIG).write_text(json.dumps({**config, "r": 3}))
    with pytest.raises(LoraloomError, match=r"lora_A.weight is \(2, 16\), in the model \(3, 16\)"):
        train_adapter(bert, TASK, tmp_path / "out", init=start, settings=SETTINGS)
    assert not (tmp_path / "out").exists()


def fails(error: Exception) -> Any:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    return fail


TORCH_FULL = "[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"  # torch.save on a full disk
RUST_FULL = "Error while serializing: I/O error: No space left on device (os error 28)"  # safetensors on one


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("transformers.trainer_callback.TrainerState.save_to_json", OSError(errno.ENOSPC, "No space left on device")),
        ("transformers.trainer.Trainer._save_optimizer_and_scheduler", RuntimeError(TORCH_FULL)),
        ("transformers.trainer.Trainer._save", SafetensorError(RUST_FULL)),
    ],
)
def test_a_full_disk_and_on_from_there(
    bert: str, undisturbed: Path, where: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"lora": LORA, "settings": SETTINGS, "seed": 5}

    def fill(done: int, *_: Any) -> None:
        if done == 5:  # the first checkpoint was still written
            patch.setattr(where, fails(error))

    with monkeypatch.context() as patch, pytest.raises(LoraloomError, match=r"checkpoints: .*is the disk full") as told:
        train_adapter(bert, TASK, tmp_path / "out", progress=fill, **options)
    assert "goes on from the last whole checkpoint" in told.value.hint
    steps: list[int] = []
    train_adapter(bert, TASK, tmp_path / "out", progress=lambda done, *_: steps.append(done), **options)
    assert steps[0] == 4
    assert same(tmp_path / "out", undisturbed)


def test_other_faults_are_not_called_a_full_disk(bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "training_step", fails(RuntimeError("mat1 and mat2")))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train_adapter(bert, TASK, tmp_path / "out", lora=LORA, settings=SETTINGS)


def test_a_full_disk_at_the_end(bert: str, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter itself cannot be flushed: told, no half folder, and the next call goes on."""

    def full(path: Path) -> None:
        if path.name == WEIGHTS:
            raise OSError(errno.ENOSPC, "No space left on device")

    options: dict[str, Any] = {"lora": LORA, "settings": SETTINGS, "seed": 5}
    with monkeypatch.context() as patch:
        patch.setattr("loraloom.files.atomic._flush", full)
        with pytest.raises(LoraloomError, match="out: cannot be written: No space"):
            train_adapter(bert, TASK, tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == [".out.checkpoints"]
    train_adapter(bert, TASK, tmp_path / "out", **options)
    assert same(tmp_path / "out", undisturbed)


def test_a_loss_that_is_not_finite(bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = Trainer.training_step, []

    def broken(trainer: Trainer, *args: Any, **options: Any) -> Tensor:
        calls.append(trainer.state.global_step)
        loss = step(trainer, *args, **options)
        return loss * float("nan") if len(calls) == 2 else loss  # one batch among finite ones

    monkeypatch.setattr(Trainer, "training_step", broken)
    with pytest.raises(LoraloomError, match="'mood': the training loss is not finite at step 2"):
        train_adapter(bert, TASK, tmp_path / "out", lora=LORA, settings=SETTINGS)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite(bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss seen before the last step says nothing of what that step did."""
    settings = TrainingSettings(epochs=1, batch_size=24, learning_rate=0.02)
    step = Trainer.training_step

    def broken(trainer: Trainer, model: Any, *args: Any, **options: Any) -> Tensor:
        loss = step(trainer, model, *args, **options)
        next(p for name, p in model.named_parameters() if "lora_A" in name).grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr(Trainer, "training_step", broken)
    with pytest.raises(LoraloomError, match="'mood': the trained weights are not finite"):
        train_adapter(bert, TASK, tmp_path / "out", lora=LORA, settings=settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_and_accumulation_change_nothing(bert: str, tmp_path: Path) -> None:
    plain = TrainingSettings(epochs=1, batch_size=8, learning_rate=0.02)
    task: Task = replace(TASK, train=TASK.train.select(range(16)))
    results = [
        weights(train_adapter(bert, task, tmp_path / str(i), lora=LORA, settings=plain.model_copy(update=extra)).folder)
        for i, extra in enumerate([{}, {"gradient_checkpointing": True}])
    ]
    assert all((results[1][name] - tensor).norm() <= 1e-5 * tensor.norm() for name, tensor in results[0].items())
    half = plain.model_copy(update={"batch_size": 4, "accumulate": 2})
    assert train_adapter(bert, task, tmp_path / "half", lora=LORA, settings=half).steps == 2


def test_an_existing_output_is_replaced_only_at_the_end(bert: str, undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "out")
    how: dict[str, Any] = {"lora": LORA, "settings": SETTINGS, "seed": 6, "overwrite": True}
    with pytest.raises(Killed):
        train_adapter(bert, TASK, tmp_path / "out", progress=kill_at(8), **how)
    assert same(undisturbed, tmp_path / "out")
    train_adapter(bert, TASK, tmp_path / "out", **how)
    assert not same(undisturbed, tmp_path / "out")


def test_curves_go_where_they_are_asked_to(bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Trainer's own callback is called, with the folder of the reports; the result is the same without it."""
    seen: list[Any] = []

    class Recorder(transformers.TrainerCallback):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            seen.append(os.environ["TENSORBOARD_LOGGING_DIR"])

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append({"step": state.global_step, "name": args.run_name, **logs})

    known = integration_utils.INTEGRATION_TO_CALLBACK
    monkeypatch.setitem(known, "tensorboard", Recorder)
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["tensorboard"])
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    told: list[Any] = []
    train_adapter(
        bert,
        TASK,
        tmp_path / "out",
        lora=LORA,
        settings=SETTINGS,
        seed=5,
        reports=Reports(["tensorboard"], tmp_path / "logs"),
        progress=lambda *at: told.append(at),
    )
    assert seen[0] == str(tmp_path / "logs")
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ
    losses = {one["step"]: one["loss"] for one in seen[1:] if "loss" in one}
    assert list(losses) == list(range(1, 10))
    assert [loss for _, _, loss in told] == [None, *[losses[step] for step in range(1, 9)]]
    assert {one["name"] for one in seen[1:]} == {"logs"}
    with pytest.raises(LoraloomError) as refused:
        check_reports(["tensorbord", "wandb"])
    assert "did you mean 'tensorboard'?" in refused.value.message
    assert "wandb is not installed" in refused.value.message
