"""Statistics of prompts and answers, against dense sums over rows that a plain model reads one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from typer.testing import CliRunner

import tiny
from loraloom.cli.main import app
from loraloom.errors import LoraloomError
from loraloom.settings import StatisticsSettings, Tokens
from loraloom.statistics.file import Statistics
from loraloom.statistics.texts import collect_from_file, make_atlas
from tiny_writers import prompt_rows, writer_base

ROWS = prompt_rows("first", 7)
READING = StatisticsSettings(texts=7, atlas_texts=7, max_length=30, batch_size=3)


def reading(tokens: Tokens) -> StatisticsSettings:
    return READING.model_copy(update={"tokens": tokens})


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    made = {kind: writer_base(folder / kind, kind) for kind in ("gpt2", "t5")}
    return {name: str(path) for name, path in {**made, "llama": writer_base(folder / "llama", chat=True)}.items()}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def chats() -> list[dict[str, Any]]:
    """The same rows as whole chats."""
    roles = ("user", "assistant")
    return [
        {"messages": [{"role": role, "content": text} for role, text in zip(roles, row.values(), strict=True)]}
        for row in ROWS
    ]


def read_alone(base: str, layer: str) -> list[tuple[int, Tensor]]:
    """Return of every row the length of its prompt and what `layer` of a decoder reads of prompt and answer."""
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    seen: list[Tensor] = []
    model.get_submodule(layer).register_forward_hook(lambda _, inputs, output: seen.append(inputs[0][0].detach()))
    lengths = []
    for row in ROWS:
        asked, answer = row["prompt"], row["answer"]
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": asked}]
            asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
        whole = [*prompt, *tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        model(input_ids=torch.tensor([whole]))
        lengths.append(len(prompt))
    return list(zip(lengths, seen, strict=True))


def gram(rows: Tensor) -> Tensor:
    return rows.double().T @ rows.double()


@pytest.mark.parametrize("tokens", get_args(Tokens))
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_tokens_that_are_asked_for_count(bases: dict[str, str], tmp_path: Path, kind: str, tokens: Tokens) -> None:
    layer = {"llama": "model.layers.1.self_attn.q_proj", "gpt2": "transformer.h.1.attn.c_attn"}[kind]
    parts = {"prompt": lambda n: slice(n), "answer": lambda n: slice(n, None), "both": lambda n: slice(None)}
    rows = torch.cat([x[parts[tokens](n)] for n, x in read_alone(bases[kind], layer)])
    file = write(tmp_path / "rows.jsonl", ROWS)
    found = collect_from_file(file, [], bases[kind], tiny.TARGETS[kind], reading(tokens))
    assert (found.texts, found.moment(layer).count) == (7, len(rows))
    torch.testing.assert_close(found.moment(layer).as_gram(), gram(rows), rtol=1e-4, atol=1e-4)


def test_chats_are_read_as_columns_are(bases: dict[str, str], tmp_path: Path) -> None:
    files = [write(tmp_path / "rows.jsonl", ROWS), write(tmp_path / "chats.jsonl", chats())]
    one, other = (collect_from_file(file, [], bases["llama"], ["q_proj"], reading("both")).moments for file in files)
    assert all(torch.equal(one[name].as_gram(), other[name].as_gram()) for name in one)


def test_prompts_need_no_answers(bases: dict[str, str], tmp_path: Path) -> None:
    whole = write(tmp_path / "rows.jsonl", ROWS)
    bare = write(tmp_path / "bare.jsonl", [{"prompt": row["prompt"]} for row in ROWS])
    one, other = (collect_from_file(file, [], bases["llama"], ["q_proj"], READING).moments for file in (whole, bare))
    assert all(torch.equal(one[name].as_gram(), other[name].as_gram()) for name in one)
    with pytest.raises(LoraloomError, match="no column 'answer'"):
        collect_from_file(bare, [], bases["llama"], ["q_proj"], reading("answer"))


@pytest.mark.parametrize("tokens", ["prompt", "both"])
def test_an_encoder_reads_prompts_and_its_decoder_answers(
    bases: dict[str, str], tmp_path: Path, tokens: Tokens
) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(bases["t5"]), AutoModelForSeq2SeqLM.from_pretrained(bases["t5"])
    layers = [f"{side}.block.1.layer.0.SelfAttention.q" for side in ("encoder", "decoder")]
    seen: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    for layer in layers:
        model.get_submodule(layer).register_forward_hook(
            lambda _, inputs, output, layer=layer: seen[layer].append(inputs[0][0].detach())
        )
    for row in ROWS:
        answer = [0, *tokenizer(row["answer"], add_special_tokens=False)["input_ids"]]
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        model(input_ids=ids, decoder_input_ids=torch.tensor([answer if tokens == "both" else [0]]))
    file = write(tmp_path / "rows.jsonl", ROWS)
    found = collect_from_file(file, [], bases["t5"], ["q", "v"], reading(tokens))
    for layer in layers:
        rows = torch.cat(seen[layer])
        assert found.moment(layer).count == len(rows)
        torch.testing.assert_close(found.moment(layer).as_gram(), gram(rows), rtol=1e-4, atol=1e-4)
    with pytest.raises(LoraloomError, match="its encoder reads no answers"):
        collect_from_file(file, [], bases["t5"], ["q", "v"], reading("answer"))


def test_an_atlas_of_prompts_is_their_statistics(bases: dict[str, str], tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", ROWS)
    atlas = make_atlas(bases["llama"], ["q_proj"], READING, texts=file, tokens="both")
    expected = collect_from_file(file, [], bases["llama"], ["q_proj"], reading("both"))
    assert all(
        torch.equal(moment.as_gram(), expected.moments[name].as_gram()) for name, moment in atlas.moments.items()
    )


def test_the_command_takes_prompts_and_tells_what_is_wrong(bases: dict[str, str], tmp_path: Path) -> None:
    file, out = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "seen.safetensors"
    words = ["statistics", file, "--base", bases["llama"], "--target", "q_proj", "-o", str(out), "--texts", "7"]
    done = CliRunner().invoke(app, [*words, "--tokens", "both", "--target", "all-linear"])
    assert done.exit_code == 2
    assert "all-linear: it stands alone" in done.output
    words[words.index("q_proj")] = "all-linear"
    done = CliRunner().invoke(app, [*words, "--tokens", "both"])
    assert done.exit_code == 0, done.output
    assert len(Statistics.load(out).layers) == 14  # of two blocks of seven; no head
    expected = collect_from_file(file, [], bases["llama"], ["q_proj"], reading("both"))
    assert Statistics.load(out).tokens == expected.tokens
    for more, told in (
        (["--tokens", "both", "--column", "prompt"], "--tokens: it is for a file of prompts, without --column"),
        (["--texts", "9"], "9 texts were asked for, it holds 7"),
    ):
        done = CliRunner().invoke(app, [*words, "--overwrite", *more])
        assert done.exit_code == 2
        assert told in " ".join(done.output.split())
    other = write(tmp_path / "other.jsonl", [{"text": "a day"}])
    done = CliRunner().invoke(app, ["statistics", other, *words[2:], "--overwrite", "--texts", "1"])
    assert done.exit_code == 2
    assert "no column 'prompt'" in done.output
    assert "--column text" in " ".join(done.output.split())
