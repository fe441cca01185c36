"""What a rule sees of a Hugging Face model: outputs as PEFT's, gradients, rows as the statistics count them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from test_runner import KINDS, adapter_folder
from torch import Tensor

import tiny
from loraloom.adapters.heads import Head
from loraloom.adapters.peft import read_adapter
from loraloom.adapters.update import Adapter, Update
from loraloom.errors import LoraloomError
from loraloom.merging import merge
from loraloom.model.load import load_classifier
from loraloom.model.probe import TaskProbe
from loraloom.model.runner import Evaluator, labels
from loraloom.statistics.collect import collect_statistics
from loraloom.statistics.moments import Moment

TASKS = [tiny.task("mood", rows=24), tiny.task("level", rows=24, regression=True)]


def probe_of(kind: str, folder: Path, *, side: str = "right", batch_size: int = 5) -> tuple[TaskProbe, list[Adapter]]:
    """A tiny base of `kind` with random adapters for one task of two classes and one regression."""
    base = str(tiny.base_folder(kind, folder / "base", padding_side=side))
    outputs = [task.outputs for task in TASKS]
    folders = [adapter_folder(base, kind, folder / f"{i}", seed=i, outputs=n) for i, n in enumerate(outputs)]
    adapters = [read_adapter(one) for one in folders]
    evaluator = Evaluator(base)
    probe = TaskProbe(
        evaluator,
        [Head.of(adapter.head) for adapter in adapters],
        [evaluator.encode(task.train) for task in TASKS],
        [labels(task, "train") for task in TASKS],
        [False, True],
        batch_size=batch_size,
    )
    return probe, adapters


def peft_model(probe: TaskProbe, adapter: Adapter, outputs: int) -> Any:
    base = load_classifier(probe._evaluator.base, outputs, seed=99)
    return PeftModel.from_pretrained(base, str(adapter.path), is_trainable=True).eval()


@pytest.mark.parametrize(("kind", "side"), KINDS)
def test_outputs_and_gradients_are_those_of_peft(kind: str, side: str, tmp_path: Path) -> None:
    """By a scale on every layer, whose derivative is <dL/dB, B> in PEFT's own backward pass."""
    probe, adapters = probe_of(kind, tmp_path, side=side)
    for task, adapter in enumerate(adapters):
        model = peft_model(probe, adapter, TASKS[task].outputs)
        batch = probe.batches[task][1]
        scales = {name: torch.ones((), requires_grad=True) for name in adapter.updates}
        scaled = {name: Update(scales[name] * update.B, update.A) for name, update in adapter.updates.items()}
        found, expected = probe.run(task, batch, scaled), model(**batch).logits
        assert found.shape == (5, TASKS[task].outputs)
        assert (found - expected).norm() < 1e-5 * expected.norm()
        found.square().sum().backward()
        expected.square().sum().backward()
        for name, scale in scales.items():
            B = model.get_parameter(f"base_model.model.{name}.lora_B.default.weight")
            assert float(scale.grad) == pytest.approx(float((B.grad * B.detach()).sum()), rel=1e-3, abs=1e-4)
    evaluator = probe._evaluator
    assert not any(parameter.requires_grad or parameter.grad for parameter in evaluator.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in evaluator.model.modules())


@pytest.mark.parametrize(("kind", "side"), KINDS)
def test_rows_are_those_that_the_statistics_count(kind: str, side: str, tmp_path: Path) -> None:
    """With updates of zero the base model is seen; with others the last layer to run reads something else."""
    probe, adapters = probe_of(kind, tmp_path, side=side)
    updates = dict(adapters[0].updates)
    model = load_classifier(probe._evaluator.base, 2)
    expected = collect_statistics(model, probe.batches[0], tiny.TARGETS[kind])

    def watched(given: dict[str, Update]) -> dict[str, Moment]:
        seen: list[tuple[str, Tensor]] = []
        for batch in probe.batches[0]:
            probe.run(0, batch, given, lambda name, rows: seen.append((name, rows)))
        order = [name for name, _ in seen[: len(updates)]]
        assert [name for name, _ in seen] == order * len(probe.batches[0])  # every batch in the same order
        return {name: Moment.of_rows(torch.cat([rows for other, rows in seen if other == name])) for name in order}

    base, adapted = watched({name: Update(0 * u.B, u.A) for name, u in updates.items()}), watched(updates)
    assert set(base) == set(adapted) == set(updates)
    for name in updates:
        known = expected.moment(name)
        assert base[name].count == adapted[name].count == known.count
        assert torch.allclose(base[name].as_gram(), known.as_gram(), rtol=1e-4, atol=1e-3)
    first, *_, last = adapted
    assert torch.equal(adapted[first].as_gram(), base[first].as_gram())
    assert not torch.allclose(adapted[last].as_gram(), base[last].as_gram(), rtol=1e-2)


def test_what_a_layer_reads_is_differentiable(tmp_path: Path) -> None:
    probe, adapters = probe_of("bert", tmp_path)
    scale, read = torch.ones((), requires_grad=True), {}
    scaled = {name: Update(scale * update.B, update.A) for name, update in adapters[0].updates.items()}
    probe.run(0, probe.batches[0][0], scaled, lambda name, rows: read.update({name: rows}))
    deepest = read["bert.encoder.layer.1.attention.self.query"].square().sum()
    deepest.backward()
    assert scale.grad is not None
    assert scale.grad.abs() > 0


def test_batches_keep_rows_and_labels_together(tmp_path: Path) -> None:
    probe, _ = probe_of("bert", tmp_path)
    evaluator = probe._evaluator
    for task in range(2):
        encoded, known = evaluator.encode(TASKS[task].train), labels(TASKS[task], "train")
        assert [len(own) for own in probe.labels[task]] == [5, 5, 5, 5, 4]
        found = []
        for number, (batch, own) in enumerate(zip(probe.batches[task], probe.labels[task], strict=True)):
            for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], own, strict=True):
                text = ids[mask.bool()].tolist()
                rows = [i for i in range(5 * number, min(5 * number + 5, 24)) if encoded[i]["input_ids"] == text]
                assert any(known[row] == label for row in rows)
                found += rows[:1]
        assert len(found) == 24
    assert probe.regression == (False, True)
    assert probe.labels[1][0].dtype == torch.float32


def test_merge_takes_it(tmp_path: Path) -> None:
    """A rule that learns runs from adapters to adapter on a real model, the same twice, and tells its progress."""
    probe, adapters = probe_of("bert", tmp_path)
    told: list[tuple[int, int]] = []
    probe._progress = lambda done, total: told.append((done, total))
    one, two = (
        merge(dict(zip("ab", adapters, strict=True)), "soups", probe=probe, steps=3).adapter.updates for _ in range(2)
    )
    assert all(torch.equal(one[name].dense(), two[name].dense()) for name in one)
    assert told == [(1, 3), (2, 3), (3, 3)] * 2


def test_refusals(tmp_path: Path) -> None:
    probe, adapters = probe_of("bert", tmp_path)
    evaluator = probe._evaluator
    heads = [Head.of(adapter.head) for adapter in adapters]
    encoded = [evaluator.encode(task.train) for task in TASKS]
    with pytest.raises(LoraloomError) as told:
        TaskProbe(evaluator, heads, [encoded[0], [], encoded[1]], [labels(TASKS[0], "train")], [False])
    for problem in ("3 texts for 2 heads", "1 labels for 2 heads", "1 regression for 2 heads", "task 1 has no texts"):
        assert problem in str(told.value)
    short = [labels(TASKS[0], "train"), labels(TASKS[1], "test")]
    with pytest.raises(LoraloomError, match="task 1 has 24 texts and 13 labels"):
        TaskProbe(evaluator, heads, encoded, short, [False, True])
    assert TaskProbe(evaluator, heads, encoded, None, [False, True]).labels == []
    wrong = {"bert.encoder.layer.7.attention.self.query": next(iter(adapters[0].updates.values()))}
    with pytest.raises(LoraloomError, match="has no layer"):
        probe.run(0, probe.batches[0][0], wrong)
