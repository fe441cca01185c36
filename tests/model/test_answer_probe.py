"""What a rule sees of a language model: the logits of answers, gradients, rows as the statistics count them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_generator import KINDS, written

import tiny
from loraloom.adapters.peft import read_adapter
from loraloom.adapters.update import Update
from loraloom.errors import LoraloomError
from loraloom.model.probe import AnswerProbe
from loraloom.model.tokens import IGNORED
from loraloom.statistics.collect import collect_statistics
from loraloom.statistics.moments import Moment


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_of_an_answer_is_a_row_and_its_loss_is_the_models(kind: str, tmp_path: Path) -> None:
    generator, folder = written(kind, tmp_path)
    updates = read_adapter(folder).updates
    encoded = generator.encode(tiny.asked(rows=9, chat=False).train)
    probe = AnswerProbe(generator, [encoded], batch_size=4)
    nats = generator.losses(updates, encoded)[:, 0].sum()
    found = [probe.run(0, batch, updates) for batch in probe.batches[0]]
    lost = [
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        for logits, labels in zip(found, probe.labels[0], strict=True)
    ]
    assert float(torch.stack(lost).sum()) == pytest.approx(float(nats), rel=1e-4)
    assert probe.regression == (False,)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_differentiable_and_shows_what_the_layers_read(kind: str, tmp_path: Path) -> None:
    generator, folder = written(kind, tmp_path)
    updates = read_adapter(folder).updates
    probe = AnswerProbe(generator, [generator.encode(tiny.asked(rows=7, chat=False).train)], batch_size=3)
    batch = probe.batches[0][0]
    scale = torch.ones((), requires_grad=True)
    scaled = {path: Update(scale * update.B, update.A) for path, update in updates.items()}
    rows: dict[str, list[torch.Tensor]] = {}
    logits = probe.run(0, batch, scaled, lambda path, x: rows.setdefault(path, []).append(x))
    loss = torch.nn.functional.cross_entropy(logits, probe.labels[0][0])
    (gradient,) = torch.autograd.grad(loss, scale)

    def at(factor: float) -> float:
        moved = {path: Update(factor * update.B, update.A) for path, update in updates.items()}
        with torch.inference_mode():
            return float(torch.nn.functional.cross_entropy(probe.run(0, batch, moved), probe.labels[0][0]))

    assert float(gradient) == pytest.approx((at(1.001) - at(0.999)) / 0.002, rel=0.05, abs=2e-3)
    assert rows.keys() == updates.keys()
    # of the base alone, a layer's rows are those that the statistics count
    seen: dict[str, list[torch.Tensor]] = {}
    silent = {path: Update(0 * update.B, update.A) for path, update in updates.items()}
    probe.run(0, batch, silent, lambda path, x: seen.setdefault(path, []).append(x.detach()))
    given = {name: tensor for name, tensor in batch.items() if name != "answers"}
    if generator.two_sided:
        given["labels"] = batch["answers"]
    counted = collect_statistics(generator.model, [given], list(updates))
    for path in updates:
        own = Moment.of_rows(torch.cat(seen[path]))
        torch.testing.assert_close(own.as_gram(), counted.moment(path).as_gram(), rtol=1e-4, atol=1e-5)
    assert (batch["answers"] != IGNORED).sum() == len(logits)


def test_a_task_without_rows_is_refused(tmp_path: Path) -> None:
    generator, _ = written("llama", tmp_path)
    with pytest.raises(LoraloomError, match="task 1 has no texts"):
        AnswerProbe(generator, [generator.encode(tiny.asked(rows=4, chat=False).train), []])
