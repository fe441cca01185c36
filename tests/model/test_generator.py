"""What a base model writes with updates in it: losses as PEFT's, answers as one token after the other gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model

import tiny
from loraloom.adapters.peft import read_adapter
from loraloom.errors import LoraloomError
from loraloom.model.generator import Generator, answer_task
from loraloom.model.load import load_generator
from loraloom.model.prompts import Asked, encode_prompts

KINDS = ["llama", "gpt2", "t5"]


def written(kind: str, folder: Path, *, seed: int = 0) -> tuple[Generator, Path]:
    """A tiny base of `kind` and a random adapter for it, as PEFT saves it."""
    base = str(tiny.base_folder(kind, folder / "base"))
    torch.manual_seed(seed)
    of = TaskType.SEQ_2_SEQ_LM if kind == "t5" else TaskType.CAUSAL_LM
    model = get_peft_model(load_generator(base), LoraConfig(task_type=of, r=2, target_modules=tiny.TARGETS[kind]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(str(folder / "adapter"))
    return Generator(base, batch_size=5), folder / "adapter"


def alone(model: Any, one: Asked, two_sided: bool) -> Any:
    """The logits of one row's answer, without padding."""
    if two_sided:
        return model(input_ids=torch.tensor([one.prompt]), labels=torch.tensor([one.answer])).logits[0]
    ids = torch.tensor([one.prompt + one.answer])
    return model(input_ids=ids).logits[0, len(one.prompt) - 1 : -1]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_peft_row_by_row(kind: str, tmp_path: Path) -> None:
    generator, folder = written(kind, tmp_path)
    rows = tiny.asked(rows=13, chat=False).train
    encoded = generator.encode(rows)
    found = generator.losses(read_adapter(folder).updates, encoded)
    model = PeftModel.from_pretrained(load_generator(generator.base), str(folder)).eval()
    for one, (nats, tokens) in zip(encoded, found.tolist(), strict=True):
        logits = alone(model, one, generator.two_sided)
        expected = torch.nn.functional.cross_entropy(logits.double(), torch.tensor(one.answer), reduction="sum")
        assert tokens == len(one.answer) == 3
        assert nats == pytest.approx(float(expected), rel=1e-4)
    # and the base model is as it was
    assert not torch.allclose(generator.losses({}, encoded)[:, 0], found[:, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_greedy_one_token_after_the_other(kind: str, tmp_path: Path) -> None:
    generator, folder = written(kind, tmp_path)
    encoded = generator.encode(tiny.asked(rows=11, chat=False).train)
    found = generator.written(read_adapter(folder).updates, encoded, 5)
    model = PeftModel.from_pretrained(load_generator(generator.base), str(folder)).eval()
    for one, ids in zip(encoded, found, strict=True):
        expected: list[int] = []
        while len(expected) < 5 and expected[-1:] != [2]:
            following = alone(model, Asked(one.prompt, [*expected, 0]), generator.two_sided)
            expected.append(int(following[-1].argmax()))
        assert ids == expected


def test_a_chat_template_stands_around_the_prompt_and_the_loss_sees_the_answer_alone(tmp_path: Path) -> None:
    words = tiny.tokenizer("llama")
    words.chat_template = tiny.CHAT
    rows = tiny.asked(rows=3).train
    rows = rows.remove_columns("history").add_column("history", [[{"role": "system", "content": "warm tea"}]] * 3)
    for row, one in zip(rows, encode_prompts(rows, words, 64, two_sided=False), strict=True):
        text = f"<s> system warm tea </s> <s> user {row['text_a']} </s> <s> assistant"
        assert one.prompt == words(text)["input_ids"]
        assert one.answer == words(f"{row['label']} </s>")["input_ids"]
        given = one.row(two_sided=False)
        assert given["input_ids"] == one.prompt + one.answer
        assert given["labels"] == [-100] * len(one.prompt) + one.answer


def test_a_long_prompt_loses_its_beginning_and_no_answer_is_cut() -> None:
    words, rows = tiny.tokenizer("llama"), tiny.asked(rows=6, chat=False).train
    whole = encode_prompts(rows, words, 64, two_sided=False)
    most = max(len(one.prompt) for one in whole)
    long = sum(len(one.prompt) > 3 for one in whole)
    told = f"{long} of 6 prompts lose their beginning at 6 tokens: max_length {most + 3} would keep them whole"
    with pytest.warns(UserWarning, match=told):
        cut = encode_prompts(rows, words, 6, two_sided=False)
    for one, other in zip(whole, cut, strict=True):
        assert other == Asked(one.prompt[-3:], one.answer)
    with pytest.raises(LoraloomError, match="6 of 6 answers have 3 tokens or more") as told:
        encode_prompts(rows, words, 3, two_sided=False)
    assert told.value.hint.startswith("raise max_length above 3")


def test_turns_before_a_prompt_need_a_chat_template() -> None:
    rows = tiny.asked(rows=2).train.remove_columns("history")
    rows = rows.add_column("history", [None, [{"role": "system", "content": "warm"}]])
    with pytest.raises(LoraloomError, match=r"no chat template.*1 of 2 rows"):
        encode_prompts(rows, tiny.tokenizer("llama"), 64, two_sided=False)


def test_an_encoder_writes_no_text(tmp_path: Path) -> None:
    with pytest.raises(LoraloomError, match="a bert model writes no text"):
        Generator(str(tiny.base_folder("bert", tmp_path)))


def test_a_base_without_generation_config_writes(tmp_path: Path) -> None:
    base = tiny.base_folder("llama", tmp_path)
    (base / "generation_config.json").unlink()
    task = tiny.asked(rows=6, chat=False)
    found = answer_task(Generator(str(base)), {}, task, task.test)
    assert len(found.answers) == len(task.test)
    assert found.score.more.keys() == {"token_f1", "loss", "probability"}
    assert found.score.more["loss"].value == pytest.approx(float(found.losses[:, 0].sum() / found.losses[:, 1].sum()))
    chances = torch.exp(-found.losses[:, 0])
    assert found.score.more["probability"].value == pytest.approx(float(chances.mean()))
    error = float(chances.std(correction=0)) / len(chances) ** 0.5
    assert found.score.more["probability"].stderr == pytest.approx(error)


def test_in_bfloat16_the_losses_are_those_of_float32_to_its_precision(tmp_path: Path) -> None:
    base, rows = str(tiny.base_folder("llama", tmp_path / "base")), tiny.asked(rows=6, chat=False).train
    whole, half = Generator(base), Generator(base, precision="bfloat16")
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    expected, found = (one.losses({}, one.encode(rows)) for one in (whole, half))
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=0)
