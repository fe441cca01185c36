"""What training sees of a batch of answers, against the whole batch padded as PEFT's own examples pad it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import DataCollatorForSeq2Seq

import tiny
from loraloom.model.load import load_tokenizer
from loraloom.model.objective import objective


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_batch_of_answers_has_the_loss_of_the_whole_batch_and_the_logits_of_the_answers(
    kind: str, tmp_path: Path
) -> None:
    base, task = str(tiny.base_folder(kind, tmp_path / "base")), tiny.asked(rows=6, chat=False)
    aim = objective(base, task, 32, 0)
    model = aim.model.eval()
    rows = list(aim.rows(task.train))
    assert len({len(row["input_ids"]) for row in rows}) > 1
    tokenizer = load_tokenizer(base)
    tokenizer.padding_side = "right"
    whole = DataCollatorForSeq2Seq(tokenizer)([dict(row) for row in rows])
    batch = aim.collator([dict(row) for row in rows])
    with torch.no_grad():
        expected, found = model(**whole), model(**batch)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    longest = max(sum(label >= 0 for label in row["labels"]) for row in rows)
    assert found.logits.shape[1] == longest + 1 < expected.logits.shape[1]
