"""Statistics against dense float64 sums over activations that a hook of the test's own captures."""

from __future__ import annotations

import json
import math
import subprocess
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    T5ForSequenceClassification,
)
from typer.testing import CliRunner

import tiny_study
from loraloom.cli.main import app
from loraloom.errors import LoraloomError
from loraloom.statistics.collect import RowSum, collect_statistics, fingerprint
from loraloom.statistics.file import Layer, Statistics
from loraloom.statistics.moments import Moment

Batch = dict[str, Tensor]
T5_SIZES: dict[str, Any] = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}


def bert() -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    )


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, eos_token_id=1))


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, pad_token_id=0))


def t5() -> nn.Module:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(**T5_SIZES, decoder_start_token_id=0))


def t5_classifier() -> nn.Module:
    torch.manual_seed(0)
    return T5ForSequenceClassification(T5Config(**T5_SIZES, decoder_start_token_id=0, num_labels=3))


def padded(lists: Sequence[Sequence[int]], length: int, fill: int) -> Tensor:
    return torch.tensor([[*ids, *[fill] * (length - len(ids))] for ids in lists])


def texts(seed: int, lengths: Sequence[int]) -> list[list[int]]:
    """Random tokens, each text closed by T5's end (1)."""
    generator = torch.Generator().manual_seed(seed)
    return [[*torch.randint(2, 50, (length - 1,), generator=generator).tolist(), 1] for length in lengths]


def inputs(lists: Sequence[Sequence[int]], length: int, fill: int = 0) -> Batch:
    mask = padded([[1] * len(ids) for ids in lists], length, 0)
    return {"input_ids": padded(lists, length, fill), "attention_mask": mask}


def truth(model: nn.Module, batches: Sequence[Batch], masks: Callable[[str, Batch], Tensor], names: Sequence[str],
          kind: str = "token") -> dict[str, Tensor]:  # fmt: skip
    """Return the counted rows of each layer in float64, from inputs that a forward hook keeps whole."""
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    model.eval()
    for batch in batches:
        for name in names:
            layer = model.get_submodule(name)

            def keep(
                _: nn.Module, args: tuple[Tensor, ...], __: object, name: str = name, batch: Batch = batch
            ) -> None:
                x, mask = args[0].double(), masks(name, batch).bool()
                for sample in range(len(mask)):
                    rows = x[sample][mask[sample]] if x.ndim == 3 else x[sample : sample + 1]
                    kept[name].append(rows.mean(0, keepdim=True) if kind == "sample" else rows)

            layer._truth = layer.register_forward_hook(keep)  # type: ignore[assignment]
        with torch.no_grad():
            model(**batch)
        for name in names:
            model.get_submodule(name)._truth.remove()  # type: ignore[operator,union-attr]
    return {name: torch.cat(rows) for name, rows in kept.items()}


def check(found: Statistics, dense: dict[str, Tensor]) -> None:
    assert dense.keys() == found.layers.keys()
    for name, rows in dense.items():
        moment, gram = found.moment(name), rows.T @ rows
        assert moment.count == len(rows)
        assert (moment.as_gram() - gram).norm() <= 1e-6 * gram.norm()
        assert (moment.total - rows.sum(0)).norm() <= 1e-6 * rows.norm()
        assert found.layers[name].in_features == rows.shape[1]


def own_mask(_: str, batch: Batch) -> Tensor:
    return batch["attention_mask"]


def same(one: Statistics, two: Statistics, within: float = 1e-6) -> None:
    """Equal up to rounding: another length of padding sums in another order."""
    assert (one.layers, one.fingerprint, one.tokens, one.texts) == (two.layers, two.fingerprint, two.tokens, two.texts)
    for name, moment in one.moments.items():
        other = two.moments[name]
        assert moment.count == other.count
        assert (moment.as_gram() - other.as_gram()).norm() <= within * moment.as_gram().norm()


DECODER_ONLY = {
    "bert": (bert, ["query", "key", "value", "intermediate.dense", "pooler.dense"]),
    "gpt2": (gpt2, ["c_attn", "c_proj", "c_fc"]),
    "llama": (llama, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
}


@pytest.mark.parametrize("kind", ["token", "sample"])
@pytest.mark.parametrize("name", DECODER_ONLY)
def test_single_stack_against_dense(name: str, kind: Any) -> None:
    build, targets = DECODER_ONLY[name]
    model = build()
    batches = [inputs(texts(1, [5, 9, 2]), 9), inputs(texts(2, [7, 3, 6, 4]), 8), inputs(texts(3, [1]), 1)]
    found = collect_statistics(model, batches, targets, kind=kind)
    check(found, truth(model, batches, own_mask, list(found.layers), kind))
    assert (found.texts, found.tokens, found.kind) == (8, 37, kind)
    same(found, collect_statistics(model, [inputs(texts(1, [5, 9, 2]), 12, 7), *batches[1:]], targets, kind=kind))


def test_shared_inputs() -> None:
    batch = [inputs(texts(1, [5, 3]), 5)]
    groups = {name: layer.input for name, layer in collect_statistics(llama(), batch, "all-linear").layers.items()}
    for i in range(2):
        attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        for part in ("q_proj", "k_proj", "v_proj"):
            assert groups.pop(attention + part) == attention + "q_proj"
        assert groups.pop(attention + "o_proj") == attention + "o_proj"
        assert groups.pop(mlp + "gate_proj") == groups.pop(mlp + "up_proj") == mlp + "gate_proj"
        assert groups.pop(mlp + "down_proj") == mlp + "down_proj"
    assert not groups  # no lm_head
    found = collect_statistics(bert(), batch, ["query", "value"])
    assert found.layers["bert.encoder.layer.1.attention.self.value"] == Layer(
        "bert.encoder.layer.1.attention.self.query", 16, 16
    )
    assert len(found.moments) == 2
    assert not any("classifier" in name for name in collect_statistics(bert(), batch, "all-linear").layers)
    assert collect_statistics(gpt2(), batch, ["c_fc"]).layers["transformer.h.0.mlp.c_fc"].out_features == 64


def t5_masks(decoder: Callable[[Batch], Tensor]) -> Callable[[str, Batch], Tensor]:
    def masks(name: str, batch: Batch) -> Tensor:
        reads_encoder = "encoder.block" in name or name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        return batch["attention_mask"] if reads_encoder else decoder(batch)

    return masks


def t5_batch(lengths: Sequence[int], targets: Sequence[int], padding: tuple[int, int], fill: int = 0) -> Batch:
    return inputs(texts(1, lengths), padding[0], fill) | {"labels": padded(texts(2, targets), padding[1], -100)}


@pytest.mark.parametrize("kind", ["token", "sample"])
def test_t5_has_two_masks(kind: Any) -> None:
    model, batches = t5(), [t5_batch([5, 9, 2], [3, 2, 4], (9, 4)), t5_batch([4, 6], [8, 11], (6, 11))]
    found = collect_statistics(model, batches, "all-linear", kind=kind)
    decoder = t5_masks(lambda batch: batch["labels"] != -100)
    check(found, truth(model, batches, decoder, list(found.layers), kind))
    cross = "decoder.block.{}.layer.1.EncDecAttention."
    readers = [cross.format(i) + part for i in range(2) for part in "kv"]
    assert {found.layers[name].input for name in readers} == {cross.format(0) + "k"}
    assert found.layers[cross.format(0) + "q"].input == cross.format(0) + "q"
    assert "lm_head" not in found.layers
    assert found.tokens == 26 + 28
    same(
        found,
        collect_statistics(model, [t5_batch([5, 9, 2], [3, 2, 4], (12, 7), 3), batches[1]], "all-linear", kind=kind),
    )


def test_t5_given_decoder_inputs() -> None:
    model, lists = t5(), [[0, 5, 6], [0, 7]]
    batch = inputs(texts(1, [5, 3]), 5) | {"decoder_input_ids": padded(lists, 4, 0)}
    mask = padded([[1, 1, 1], [1, 1]], 4, 0)
    found = collect_statistics(model, [batch], ["q", "v"])
    check(found, truth(model, [batch], t5_masks(lambda _: mask), list(found.layers)))
    told = batch | {"decoder_attention_mask": padded([[1, 1], [1]], 4, 0)}
    found = collect_statistics(model, [told], ["q", "v"])
    check(found, truth(model, [told], t5_masks(lambda b: b["decoder_attention_mask"]), list(found.layers)))


def test_t5_classifier_reads_its_input_shifted() -> None:
    """The start and every token but the last: as many rows as tokens, whatever the padding."""
    model = t5_classifier()
    batches = [inputs(texts(1, [5, 9, 2]), 9) | {"labels": torch.tensor([0, 1, 2])}]
    found = collect_statistics(model, batches, "all-linear")
    check(found, truth(model, batches, t5_masks(lambda batch: batch["attention_mask"]), list(found.layers)))
    same(found, collect_statistics(model, [inputs(texts(1, [5, 9, 2]), 13)], "all-linear"))
    assert not any("classification_head" in name for name in found.layers)
    left = {"input_ids": torch.tensor([[0, 0, 5, 6, 1]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1]])}
    mask = torch.tensor([[1, 0, 0, 1, 1]])
    found = collect_statistics(model, [left], ["v"])
    check(found, truth(model, [left], t5_masks(lambda _: mask), list(found.layers)))


def test_no_mask_counts_every_token() -> None:
    batch = {"input_ids": padded(texts(1, [4, 4]), 4, 0)}
    assert collect_statistics(bert(), [batch], ["query"]).tokens == 8


def test_add_and_subtract() -> None:
    model, one, two = bert(), [inputs(texts(1, [5, 9]), 9)], [inputs(texts(2, [8, 4]), 8), inputs(texts(3, [3]), 3)]
    first, second = (collect_statistics(model, part, ["query", "dense"]) for part in (one, two))
    both = collect_statistics(model, one + two, ["query", "dense"])
    same(first + second, both, 1e-6)  # float32 products, of other blocks of rows
    same(both - second, first, 1e-6)
    with pytest.raises(LoraloomError, match="no part of"):
        first - both


def test_sums_stay_exact_over_many_blocks() -> None:
    """Quiet inputs survive beside ones 10^8 times as loud: of entry ij at most 2e-6 sqrt(G_ii G_jj) is lost."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(50, 8) * torch.logspace(-4, 4, 8))

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def forward(self, input_ids: Tensor) -> Tensor:
            out = self.body(input_ids)
            assert isinstance(out, Tensor)
            return out

    ids = torch.randint(50, (40, 3, 7))
    found = collect_statistics(Plain(), [{"input_ids": part} for part in ids], ["1"])
    rows = model[0].weight.detach().double()[ids.flatten()]
    gram, mine = rows.T @ rows, found.moment("body.1").as_gram()
    assert mine.shape == (8, 8)
    assert ((mine - gram).abs() / (rows.norm(dim=0)[:, None] * rows.norm(dim=0))).max() < 2e-6


def test_a_gram_matrix_against_dense_float64_where_blocks_are_many() -> None:
    """Float32 products lose 2e-6 of sqrt(G_ii G_jj), however many rows there are and however they were split."""
    torch.manual_seed(0)
    rows = (torch.randn(9000, 40) + 3) * torch.logspace(-4, 4, 40)
    wide = rows.double()
    gram, scale = wide.T @ wide, wide.norm(dim=0)
    for sizes in ([9000], [100] * 90, [8999, 1]):
        total = RowSum(40)
        for batch, part in enumerate(rows.split(sizes), start=1):
            total.add(part, batch)
        moment = total.moment()
        assert moment.count == 9000
        assert ((moment.as_gram() - gram).abs() / (scale[:, None] * scale)).max() < 2e-6
        assert ((moment.total - wide.sum(dim=0)).abs() / wide.abs().sum(dim=0)).max() < 2e-6
        assert moment.faults() == []


class Twice(nn.Module):
    """One layer called twice, a second that shares its first input only, and a third never called."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.shared = nn.Embedding(50, 6), nn.Linear(6, 6)
        self.other, self.idle = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        out: Tensor = self.shared(torch.tanh(self.shared(x))) + self.other(input=x)
        return out


def test_shared_weights_count_every_call() -> None:
    torch.manual_seed(0)
    model, batch = Twice(), {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}
    found = collect_statistics(model, [batch], ["shared", "other"])
    x = model.embed(batch["input_ids"])
    calls = torch.cat([x, torch.tanh(model.shared(x))]).detach().reshape(-1, 6).double()
    assert found.moment("shared").count == 12
    assert torch.allclose(found.moment("shared").as_gram(), calls.T @ calls, rtol=1e-6)
    assert found.moment("other").count == 6
    with pytest.raises(LoraloomError, match="does not call idle"):
        collect_statistics(model, [batch], ["shared", "idle"])


def test_save_and_load(tmp_path: Path) -> None:
    few = collect_statistics(bert(), [inputs(texts(1, [3]), 3)], ["query"])
    many = collect_statistics(bert(), [inputs(texts(1, [9, 9]), 9)], ["query", "value", "dense"], kind="token")
    short = collect_statistics(bert(), [inputs(texts(1, [9, 9]), 9)], ["query", "dense"], directions=4)
    for found in (few, many, short, short.limit_directions(2), few.limit_rows(0)):
        found.save(tmp_path / "a.safetensors", overwrite=True)
        back = Statistics.load(tmp_path / "a.safetensors")
        for field in ("base", "fingerprint", "layers", "texts", "tokens", "kind"):
            assert getattr(back, field) == getattr(found, field)
        assert back.moments.keys() == found.moments.keys()
        for name, moment in found.moments.items():
            assert_equal(moment, back.moments[name])
        back.save(tmp_path / "a.safetensors", overwrite=True)  # over the file that its moments are read from
        for name, moment in Statistics.load(tmp_path / "a.safetensors").moments.items():
            assert_equal(moment, found.moments[name])
    assert few.moments[next(iter(few.moments))].rows is not None
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_bound_that_is_not_reached_changes_nothing() -> None:
    """Bit for bit, for rows (18 tokens of width 16 or 24 are Gram matrices or rows) and means of samples alike."""
    batches = [inputs(texts(1, [5, 6]), 6), inputs(texts(2, [7]), 7)]
    for kind, bound in (("token", 23), ("sample", 3), ("token", 24)):
        exact = collect_statistics(bert(), batches, "all-linear", kind=kind)  # type: ignore[arg-type]
        found = collect_statistics(bert(), batches, "all-linear", kind=kind, directions=bound)  # type: ignore[arg-type]
        assert (found.layers, found.texts, found.tokens) == (exact.layers, exact.texts, exact.tokens)
        for name, moment in exact.moments.items():
            assert_equal(moment, found.moments[name])


@pytest.mark.parametrize("kind", ["token", "sample"])
def test_bounded_statistics_against_dense(kind: Any) -> None:
    """The rank bounds every input, and what it left out is within `lost`: padding, shared inputs, two masks."""
    model = t5()
    batches = [t5_batch([5, 9, 2], [3, 2, 4], (9, 4)), t5_batch([4, 6, 3], [8, 11, 2], (6, 11))] * 2
    found = collect_statistics(model, batches, "all-linear", kind=kind, directions=5)
    dense = truth(model, batches, t5_masks(lambda batch: batch["labels"] != -100), list(found.layers), kind)
    for name, rows in dense.items():
        moment, gram = found.moment(name), rows.T @ rows
        error = torch.linalg.eigvalsh(gram - moment.as_gram())
        assert moment.factor is not None
        assert len(moment.factor) == 5
        assert moment.count == len(rows)
        assert (moment.total - rows.sum(0)).norm() <= 1e-6 * rows.norm()
        assert -1e-5 * gram.trace() <= error[0]
        assert error[-1] <= moment.lost + 1e-5 * gram.trace()
        assert moment.lost <= gram.trace() / 6
    told = found.contents()
    assert (told["inputs_with_directions"], told["directions"], told["rows"]) == (len(found.moments), 5, 0)
    worst = max(moment.lost / float(torch.linalg.eigvalsh(moment.as_gram())[-1]) for moment in found.moments.values())
    assert told["left_out"] == pytest.approx(worst, rel=1e-2)


def test_gram_matrices_too_large_for_the_machine_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = inputs(texts(1, [5]), 5)
    monkeypatch.setattr("loraloom.statistics.collect._free_memory", lambda _: 8 * (16**2 + 24**2) - 1)
    layers = ["layer.0.attention.self.query", "layer.0.output.dense"]
    with pytest.warns(UserWarning, match=r"of 2 inputs take 0.0 GB .*--directions 256"):
        collect_statistics(bert(), [batch], layers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collect_statistics(bert(), [batch], layers, directions=4)
        collect_statistics(bert(), [batch], layers[:1])


def assert_equal(one: Moment, two: Moment) -> None:
    assert (one.count, one.lost) == (two.count, two.lost)
    for part in ("total", "rows", "gram", "factor"):
        mine, theirs = getattr(one, part), getattr(two, part)
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], object]) -> None:
    with safe_open(path, framework="pt") as file:
        metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t[f"{QUERY}.gram"].fill_(math.nan), "not finite"),
        (lambda t, m: t.update({f"{QUERY}.gram": torch.zeros(3, 3, dtype=torch.float64)}), "does not fit 18 rows"),
        (lambda t, m: t.update({f"{QUERY}.total": torch.zeros(16)}), "total: is F32, not F64"),
        (lambda t, m: t.pop(f"{QUERY}.total"), "does not fit"),
        (lambda t, m: t.update(stray=torch.zeros(1)), "tensor stray belongs to no input"),
        (lambda t, m: m.update(format="pt"), "its format is 'pt'"),
        (lambda t, m: m.update(layers="{"), "metadata is damaged"),
        (lambda t, m: m.update(kind="word"), "neither 'token' nor 'sample'"),
        (lambda t, m: m.update(counts="{}"), "has no moment"),
        (lambda t, m: t[f"{QUERY}.gram"][0, 1].add_(1), "gram is not symmetric"),
        (lambda t, m: t[f"{QUERY}.gram"].diagonal().sub_(1), "gram is not positive semi-definite"),
        (lambda t, m: t[f"{QUERY}.total"].mul_(9), "total is larger than gram allows"),
        (lambda t, m: m.update(counts=m["counts"].replace("18", "-1")), "greater than or equal to 0 .given -1"),
        (lambda t, m: m.update(lost='{"gone": 1}'), "lost names 'gone'"),
        (lambda t, m: m.update(lost="[1]"), "metadata is damaged"),
    ],
)
def test_load_tells_what_is_wrong(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "a.safetensors"
    collect_statistics(bert(), [inputs(texts(1, [9, 9]), 9)], ["query"]).save(path)
    rewrite(path, change)
    with pytest.raises(LoraloomError, match=message):
        Statistics.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t[f"{QUERY}.factor"].fill_(math.inf), "not finite"),
        (lambda t, m: t.update({f"{QUERY}.factor": torch.zeros(4, 15)}), "does not fit 18 rows"),
        (lambda t, m: t.update({f"{QUERY}.factor": torch.zeros(17, 16)}), "does not fit 18 rows"),
        (lambda t, m: t.update({f"{QUERY}.rows": torch.zeros(18, 16)}), "does not fit 18 rows"),
        (lambda t, m: t.update({f"{QUERY}.factor": torch.zeros(4, 16).double()}), "factor: is F64, not F32"),
        (lambda t, m: t[f"{QUERY}.factor"].mul_(0.1), "total is larger than factor allows"),
        (lambda t, m: t[f"{QUERY}.total"].mul_(9), "total is larger than factor allows"),
        (lambda t, m: m.update(lost=json.dumps({QUERY: -1})), "greater than or equal to 0 .given -1"),
        (lambda t, m: m.update(lost=json.dumps({QUERY: math.nan})), "NaN is no JSON"),
        (lambda t, m: m.update(lost=json.dumps({QUERY: "much"})), "metadata is damaged"),
    ],
)
def test_load_tells_what_is_wrong_with_a_factor(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "a.safetensors"
    collect_statistics(bert(), [inputs(texts(1, [9, 9]), 9)], [QUERY], directions=4).save(path)
    Statistics.load(path)
    rewrite(path, change)
    with pytest.raises(LoraloomError, match=message):
        Statistics.load(path)


def test_moments_are_read_from_the_file_at_each_access(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    found = collect_statistics(bert(), [inputs(texts(1, [9, 9]), 9)], ["query", "value"], directions=4)
    found.save(path)
    back = Statistics.load(path)
    value = QUERY.replace("query", "value")
    assert back.moment(QUERY) is back.moment(value)  # one input: read once
    path.unlink()
    assert back.moment(QUERY).count == 18
    with pytest.raises(LoraloomError, match=r"a\.safetensors: cannot be read any more"):
        back.moment(QUERY.replace("0", "1"))


def test_the_command_bounds_what_it_shares(tmp_path: Path) -> None:
    """`--directions` bounds every input; with `--rows 0` too, no row is handed on as it is, however few there are."""
    tiny_study.write_study(tmp_path)
    words = ["statistics", str(tmp_path / "mood.train.jsonl"), "--base", str(tmp_path / "base"), "--column", "text"]
    words += ["--target", "query", "--max-length", "16"]
    runner = CliRunner()

    def collected(*more: str) -> dict[str, Any]:
        path = str(tmp_path / f"{len([*tmp_path.glob('[0-9].safetensors')])}.safetensors")
        done = runner.invoke(app, [*words, *more, "-o", path, "--overwrite"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        shown = runner.invoke(app, ["statistics", "show", path, "--json"])
        told: dict[str, Any] = json.loads(shown.stdout)
        return told

    told = collected("--texts", "12", "--directions", "3")
    assert (told["inputs_with_directions"], told["directions"], told["rows"]) == (2, 3, 0)
    assert told["left_out"] > 0
    bounded = Statistics.load(tmp_path / "0.safetensors")
    assert collected("--texts", "12", "--directions", "16")["inputs_with_gram_matrix"] == 2
    for name, moment in Statistics.load(tmp_path / "1.safetensors").moments.items():
        error = torch.linalg.eigvalsh(moment.as_gram() - bounded.moments[name].as_gram())
        slack = 1e-6 * moment.trace()
        assert -slack <= float(error[0])
        assert float(error[-1]) <= bounded.moments[name].lost + slack
    few = ("--texts", "1", "--directions", "15")
    assert collected(*few)["inputs_with_rows"] == 2
    told = collected(*few, "--rows", "0")
    assert (told["rows"], told["inputs_with_directions"]) == (0, 2)
    assert told["left_out"] == 0
    atlas = [
        "atlas",
        str(tmp_path / "base"),
        "--target",
        "query",
        "--texts",
        "3",
        "--max-length",
        "16",
        "--directions",
        "2",
    ]
    runner.invoke(app, [*atlas, "-o", str(tmp_path / "b.safetensors")], catch_exceptions=False)
    assert Statistics.load(tmp_path / "b.safetensors").contents()["directions"] == 2


def test_rows_must_sum_to_their_total(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    collect_statistics(bert(), [inputs(texts(1, [3]), 3)], ["query"]).save(path)
    rewrite(path, lambda tensors, _: tensors[f"{QUERY}.total"].add_(1))
    with pytest.raises(LoraloomError, match="total is not the rows' sum"):
        Statistics.load(path)


def test_half_written_and_absent_files(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    collect_statistics(bert(), [inputs(texts(1, [9, 9]), 9)], ["query"]).save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(LoraloomError, match="half-written"):
        Statistics.load(path)
    with pytest.raises(LoraloomError, match="no such file"):
        Statistics.load(tmp_path / "b")


def test_refusals_name_both_sides() -> None:
    batch, one, other = [inputs(texts(1, [5]), 5)], bert(), bert()
    nn.init.normal_(other.get_submodule(QUERY).weight)  # type: ignore[arg-type]
    one.name_or_path, other.name_or_path = "base-a", "base-b"
    first, second = (collect_statistics(model, batch, ["query"]) for model in (one, other))
    with pytest.raises(LoraloomError, match=r"fingerprint: base-a \(1 texts\) has .*, base-b \(1 texts\) has "):
        first + second
    sample = collect_statistics(one, batch, ["query"], kind="sample")
    with pytest.raises(LoraloomError, match=r"kind: base-a .* has token, base-a .* has sample"):
        first - sample
    wider = collect_statistics(one, batch, ["query", "value"])
    with pytest.raises(LoraloomError, match=r"layer bert\S+value: base-a \(1 texts\) has None"):
        first + wider


def test_wrong_input_is_told() -> None:
    model, batch = bert(), inputs(texts(1, [4, 2]), 4)
    with pytest.raises(LoraloomError, match="did you mean 'query'"):
        collect_statistics(model, [batch], ["querry"])
    with pytest.raises(LoraloomError, match="there is no batch"):
        collect_statistics(model, [], ["query"])
    with pytest.raises(LoraloomError, match=rf"{QUERY}.*no token counts"):
        collect_statistics(model, [batch | {"attention_mask": torch.zeros(2, 4)}], ["query"])
    with pytest.raises(LoraloomError, match="batch 1: attention_mask is"):
        collect_statistics(model, [batch | {"attention_mask": torch.ones(2, 3)}], ["query"])
    with pytest.raises(LoraloomError, match="the statistics do not cover it"):
        collect_statistics(model, [batch], ["query"]).moment("bert.pooler.dense")
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = math.inf  # type: ignore[operator]
    bad = inputs([[7, 3]], 2)
    with pytest.raises(LoraloomError, match=rf"batch 2: {QUERY} reads rows that are not finite"):
        collect_statistics(model, [inputs([[2, 3]], 2), bad], ["query"])
    hidden = {"input_ids": torch.tensor([[2, 3, 7]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    with torch.no_grad():  # padding that is not finite in the first layer does not count
        model.bert.encoder.layer = model.bert.encoder.layer[:1]  # type: ignore[union-attr,index,assignment]
    assert collect_statistics(model, [hidden], [QUERY]).tokens == 2


def test_peft_model_shows_its_base() -> None:
    batches = [inputs(texts(1, [5, 9]), 9), inputs(texts(2, [4]), 4)]
    expected = collect_statistics(bert(), batches, ["query", "value"])
    config = LoraConfig(target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False)
    model = get_peft_model(bert(), config)
    assert (model(**batches[0]).logits - bert().eval()(**batches[0]).logits).abs().max() > 1e-3
    model.train()
    model.base_model.model.bert.embeddings.eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)  # a frozen A, which PEFT would thaw when it turns adapters on again
    flags = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    found = collect_statistics(model, batches, ["query", "value"])
    same(found, expected, 0)
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert modes == [module.training for module in model.modules()]
    with pytest.raises(LoraloomError, match="cannot be turned off"):
        collect_statistics(model.get_base_model(), batches, ["query"])
    model.merge_adapter()
    with pytest.raises(LoraloomError, match="merged"):
        collect_statistics(model, batches, ["query"])


def test_low_precision() -> None:
    model, batches = llama().to(torch.bfloat16), [inputs(texts(1, [5, 9]), 9)]
    found = collect_statistics(model, batches, ["q_proj", "down_proj"])
    check(found, truth(model, batches, own_mask, list(found.layers)))
    assert found.fingerprint == collect_statistics(llama(), batches, ["q_proj", "down_proj"]).fingerprint


def test_fingerprint_is_of_the_target_weights_alone() -> None:
    model, wrapped = bert(), get_peft_model(bert(), LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    before = fingerprint(model, [QUERY])
    nn.init.zeros_(model.classifier.weight)  # type: ignore[union-attr,arg-type]
    assert before == fingerprint(model, [QUERY]) == fingerprint(wrapped, [QUERY])
    assert before != fingerprint(model, [QUERY.replace("query", "key")])
    with torch.no_grad():
        model.get_submodule(QUERY).weight[3, 5] += 1  # type: ignore[operator,index]
    assert before != fingerprint(model, [QUERY])
    with pytest.raises(LoraloomError, match="did you mean"):
        fingerprint(model, ["bert.encoder.layer.0.attention.self.querry"])


def test_progress_counts_texts() -> None:
    seen: list[int] = []
    collect_statistics(bert(), [inputs(texts(1, [3, 2]), 3), inputs(texts(2, [4]), 4)], ["query"], progress=seen.append)
    assert seen == [2, 3]


def test_four_bit_weights() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    model = Twice()
    model.other = bnb.nn.Linear4bit(6, 6)
    model.cuda()
    batch = {"input_ids": torch.tensor([[1, 2, 3]])}
    x = model.embed(batch["input_ids"].cuda()).detach().double().reshape(-1, 6).cpu()
    assert torch.allclose(collect_statistics(model, [batch], ["other"]).moment("other").as_gram(), x.T @ x, rtol=1e-6)


def test_equal_statistics_are_equal_files(tmp_path: Path) -> None:
    """To the byte, in whatever order a process has its sets."""
    tiny_study.write_study(tmp_path)
    words = ["statistics", f"{tmp_path}/mood.train.jsonl", "--base", f"{tmp_path}/base", "--column", "text"]
    words += ["--target", "query", "--texts", "12", "--directions", "9", "--max-length", "16", "-q"]
    environment = {**tiny_study.environment(), "PYTHONHASHSEED": "1"}  # this process draws its own
    subprocess.run(tiny_study.command(*words, "-o", tmp_path / "one"), env=environment, check=True)
    assert CliRunner().invoke(app, [*words, "-o", str(tmp_path / "two")]).exit_code == 0
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
