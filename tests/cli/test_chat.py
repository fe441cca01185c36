"""`loraloom chat`: its answers against PEFT's own generation, its commands, and what it refuses."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import tiny
from commands import call, refused, said
from loraloom.adapters.peft import read_adapter, write_adapter
from tiny_writers import writer_adapter, writer_base

PROMPTS = ("the film was good", "tea")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a chat template, two adapters of it, and their merge beside them."""
    place = tmp_path_factory.mktemp("chat")
    writer_base(place / "base", chat=True)
    for seed, name in enumerate(("one", "two")):
        writer_adapter(place / "base", place / name, seed=seed)
    done = call("merge", place / "one", place / "two", "-o", place / "merged", "--scale", "1")
    assert done.exit_code == 0, done.output
    return place


def expected(base: Path, adapter: Path | None, prompt: str, tokens: int) -> str:
    """What transformers and PEFT write greedily after `prompt`, token by token."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(model, str(adapter)) if adapter else model
    tokenizer = tiny.tokenizer("llama")
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    start = ids.shape[1]
    while ids.shape[1] < start + tokens and ids[0, -1] != 2:
        ids = torch.cat([ids, model.eval()(ids).logits[:, -1:].argmax(-1)], dim=1)
    return str(tokenizer.decode(ids[0, start:], skip_special_tokens=True)).strip()


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Have these lines typed, and then no more asked for."""
    left = iter(lines)
    monkeypatch.setattr("builtins.input", lambda _: next(left))


def test_prompts_of_a_script_are_answered_by_every_adapter_named(place: Path) -> None:
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    told = said("chat", place / "merged", place / "one", *prompts, "--base", place / "base", "--tokens", 6)
    assert told["chat_template"] is True
    wanted = [
        (prompt, name, expected(place / "base", place / name, f"a {prompt} the ", 6))
        for prompt in PROMPTS
        for name in ("merged", "one")
    ]
    assert [(one["prompt"], one["adapter"], one["answer"]) for one in told["answers"]] == wanted
    assert len({answer for *_, answer in wanted}) > 1


def test_the_base_of_a_merge_is_that_of_its_members(place: Path) -> None:
    """A merge names its base without the folders before it: in a script as at the prompt its members tell them."""
    words = ("chat", place / "merged", "--prompt", "tea", "--tokens", 4)
    assert said(*words)["answers"] == said(*words, "--base", place / "base")["answers"]


def test_without_the_template_and_with_a_system_prompt(place: Path) -> None:
    words = ("chat", place / "one", "--prompt", "tea", "--tokens", 6)
    plain = said(*words, "--no-chat")
    assert (plain["chat_template"], plain["answers"][0]["answer"]) == (
        False,
        expected(place / "base", place / "one", "tea", 6),
    )
    ordered = said(*words, "--system", "very cold")
    assert ordered["answers"][0]["answer"] == expected(place / "base", place / "one", "a very cold a tea the ", 6)


def test_a_line_switches_between_the_merge_its_members_and_the_base(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    switches = ("tea", "/adapter two", "tea", "/base", "tea")
    typed(monkeypatch, *switches, "", "/adapter twu", "/adapter", "/sistem", "/help", "/quit")
    done = call("chat", place / "merged", "--tokens", "6")
    assert done.exit_code == 0, done.output
    speakers = (place / "merged", place / "two", None)
    answers = [expected(place / "base", adapter, "a tea the ", 6) for adapter in speakers]
    assert done.stdout.splitlines()[:3] == answers
    assert len(set(answers)) == 3
    assert "no adapter is called 'twu'" in done.stderr
    assert "did you mean 'two'?" in done.stderr
    assert "/sistem is no command" in done.stderr
    assert "answers now" in done.stdout
    assert "stop, as Ctrl-D does" in done.stdout


def test_lines_come_from_a_pipe_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("/base\ntea\n"))
    from loraloom.cli.chat import _lines

    assert list(_lines(None)) == ["/base", "tea"]  # type: ignore[arg-type]


def test_members_that_changed_are_not_taken_for_those_that_were_merged(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("merged", "one"):
        shutil.copytree(place / name, tmp_path / name)
    writer_adapter(place / "base", tmp_path / "two", seed=7)
    typed(monkeypatch, "/adapter two", "/adapter one", "/quit")
    done = call("chat", tmp_path / "merged")
    assert "changed since: two" in " ".join(done.stderr.split())
    assert "no adapter is called 'two'" in done.stderr
    assert "'one'" not in done.stderr


def test_a_base_without_a_template_is_given_prompts_as_they_stand(place: Path, tmp_path: Path) -> None:
    base = writer_base(tmp_path / "plain")
    told = said("chat", place / "one", "--base", base, "--prompt", "tea", "--tokens", 6)
    assert told["chat_template"] is False
    assert told["answers"][0]["answer"] == expected(base, place / "one", "tea", 6)
    assert "needs a chat template, and the base has none" in refused(
        "chat", place / "one", "--base", base, "--prompt", "tea", "--system", "very"
    )


def test_a_base_that_git_lfs_has_not_fetched_is_told_as_that(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "base", tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
    told = refused("chat", place / "one", "--base", tmp_path / "base", "--prompt", "tea")
    assert "model.safetensors: a pointer of Git LFS" in told


def test_what_cannot_be_answered_is_told(place: Path, tmp_path: Path) -> None:
    words = ("--base", place / "base", "--prompt", "tea")
    assert "--json is for prompts that are given" in refused("chat", place / "one", "--json")
    assert "prompt and answer have 47 tokens together; the base takes 40" in refused(
        "chat", place / "one", "--prompt", "tea " * 39, "--tokens", 6
    )
    one = read_adapter(place / "one")
    head = {"score.weight": torch.ones(2, 16)}
    scoring = replace(one, head=head, config={**one.config, "task_type": "SEQ_CLS"})
    classifier = write_adapter(scoring, tmp_path / "classifier", provenance={})
    assert f"{classifier}: has a head, so it gives classes or numbers" in refused("chat", classifier, *words)
    normed = replace(one, head={"norm.weight": torch.ones(16)}, config={**one.config, "task_type": "CAUSAL_LM"})
    write_adapter(normed, tmp_path / "normed", provenance={})
    told = refused("chat", tmp_path / "normed", *words)
    assert "brings norm.weight whole: trained, or resized for added tokens, which cannot be merged" in told
    unlabelled = ("--unlabelled", tmp_path / "texts.jsonl")
    (tmp_path / "texts.jsonl").write_text('{"text": "tea"}\n{"text": "a day"}\n')
    auto = ("merge", place / "one", tmp_path / "normed", "--rule", "auto", *unlabelled, *unlabelled, *words[:2])
    told = refused(*auto, "-o", tmp_path / "out")
    assert "brings norm.weight whole: trained, or resized" in told
    told = refused("chat", tmp_path / "none", tmp_path / "neither", *words)
    assert all(f"{tmp_path / name}" in told for name in ("none", "neither"))
    other = writer_adapter(writer_base(tmp_path / "gpt2", "gpt2"), tmp_path / "other", kind="gpt2")
    assert "has no layer transformer.h.0.attn.c_attn" in refused("chat", other, *words)


def test_an_encoder_decoder_answers_too(tmp_path: Path) -> None:
    base = tiny.base_folder("t5", tmp_path / "base")
    adapter = writer_adapter(base, tmp_path / "adapter", kind="t5")
    model: Any = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base), str(adapter)).eval()
    prompt, written = torch.tensor([tiny.tokenizer("t5")("tea")["input_ids"]]), torch.tensor([[0]])
    for _ in range(6):
        logits = model(input_ids=prompt, decoder_input_ids=written).logits
        written = torch.cat([written, logits[:, -1:].argmax(-1)], dim=1)
    ids = written[0, 1:].tolist()
    ids = ids[: ids.index(2)] if 2 in ids else ids
    told = said("chat", adapter, "--prompt", "tea", "--tokens", 6)
    assert told["chat_template"] is False
    assert told["answers"][0]["answer"] == tiny.tokenizer("t5").decode(ids, skip_special_tokens=True)
