"""Models in wrappers: paths are those of the plain model, hooks fire, results are those of the plain run.

DDP and FSDP run on CPU over gloo: as one process here, as two in processes of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig, T5ForConditionalGeneration
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.t5.modeling_t5 import T5Block

import tiny
from loraloom.errors import LoraloomError
from loraloom.model.layers import base_running
from loraloom.model.wrappers import plain_path
from loraloom.starts.initialise import initialise
from loraloom.starts.options import StartOptions
from loraloom.statistics.collect import collect_statistics, fingerprint
from loraloom.statistics.file import Statistics
from tiny_launch import two_processes

_WIDE = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes packs 64 values
Wrap = Callable[[nn.Module], nn.Module]
TARGETS = {**tiny.TARGETS, "bert": ["query", "value", "intermediate.dense"]}
BLOCKS: set[type[nn.Module]] = {BertLayer, GPT2Block, LlamaDecoderLayer, T5Block}


def base(kind: str = "bert") -> nn.Module:
    torch.manual_seed(0)
    of = T5ForConditionalGeneration._from_config if kind == "t5" else AutoModelForSequenceClassification.from_config
    model: nn.Module = of(tiny.CONFIGS[kind]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    return model


def adapted() -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(base(), LoraConfig(r=2, target_modules=TARGETS["bert"], task_type="SEQ_CLS"))


def batches(seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in (7, 5):
        ids, mask = torch.randint(5, len(tiny.WORDS), (4, length), generator=generator), torch.ones(4, length).long()
        mask[1, 3:] = mask[3, 2:] = 0
        found.append({"input_ids": ids * mask, "attention_mask": mask})
    return found


def blocks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module) in BLOCKS]


def fsdp(model: nn.Module, *, by_block: bool = True, **options: Any) -> nn.Module:
    policy = partial(transformer_auto_wrap_policy, transformer_layer_cls=BLOCKS) if by_block else None
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), **options)


def fsdp2(model: nn.Module) -> nn.Module:
    for block in blocks(model):
        fully_shard(block)
    fully_shard(model)
    return model


def compiled_blocks(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):
            for index, block in enumerate(module):
                module[index] = torch.compile(block, backend="eager", fullgraph=True)
    return model


def checkpoint_wrapped(model: nn.Module) -> nn.Module:
    apply_activation_checkpointing(model, check_fn=lambda module: type(module) in BLOCKS)
    return model


SPREAD: dict[str, Wrap] = {
    "ddp": DistributedDataParallel,
    "fsdp": partial(fsdp, use_orig_params=True),
    "fsdp, flat": partial(fsdp, use_orig_params=False),
    "fsdp, one unit": partial(fsdp, use_orig_params=True, by_block=False),
    "fsdp2": fsdp2,
}
ALONE: dict[str, Wrap] = {
    "compiled": partial(torch.compile, backend="eager"),
    "compiled blocks": compiled_blocks,
    "checkpoint wrapper": checkpoint_wrapped,
}
TRAINED = [how for how in SPREAD if how != "fsdp, flat"]  # needs parameters that are trained all or none


def same(found: Statistics, plain: Statistics) -> None:
    """Equal but for the order of sums inside a layer's own product."""
    assert found.layers == plain.layers
    assert (found.base, found.fingerprint) == (plain.base, plain.fingerprint)
    assert (found.texts, found.tokens) == (plain.texts, plain.tokens)
    for name, moment in plain.moments.items():
        gram = moment.as_gram()
        assert (found.moments[name].as_gram() - gram).norm() <= 1e-6 * gram.norm(), name


def check_statistics(wrap: Wrap, kind: str = "bert") -> None:
    given = batches()
    if kind == "t5":
        given = [{**batch, "labels": batch["input_ids"][:, :4].contiguous()} for batch in given]
    plain = collect_statistics(base(kind), given, TARGETS[kind])
    wrapped = wrap(base(kind))
    assert fingerprint(wrapped, plain.layers) == plain.fingerprint  # before the wrapper's first call too
    same(collect_statistics(wrapped, given, TARGETS[kind]), plain)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Whole LoRA factors by plain path."""
    sharded = isinstance(model, FullyShardedDataParallel)
    with FullyShardedDataParallel.summon_full_params(model, writeback=False) if sharded else nullcontext():
        return {
            plain_path(name).removeprefix("module."): (p.full_tensor() if hasattr(p, "full_tensor") else p.data).clone()
            for name, p in model.named_parameters()
            if ".lora_" in name
        }


def trained(wrap: Wrap, keep: Any = "projected") -> tuple[dict[str, Tensor], Any, Statistics]:
    """Initialise inside the wrapper, take three steps; return the factors, what was made, and own statistics."""
    model = wrap(adapted())
    own, other = (collect_statistics(model, batches(seed), TARGETS["bert"]) for seed in (0, 5))
    done = initialise(model, own, {"other": other}, options=StartOptions(keep=keep))
    callback = done.callback()
    model.train()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        loss = model(**batches()[0], labels=torch.tensor([0, 1, 1, 0])).loss
        loss.backward()
        optimiser.step()
        callback.on_optimizer_step(None, None, None, model=model)
        optimiser.zero_grad()
    return weights(model), done, own


def check_training(wrap: Wrap, keep: Any = "projected") -> None:
    plain, _, own = trained(lambda model: model, keep)
    found, done, own_found = trained(wrap, keep)
    same(own_found, own)
    assert found.keys() == plain.keys()
    for name, tensor in plain.items():
        assert (found[name] - tensor).norm() <= 1e-5 * tensor.norm(), name
    for module, start in done.A.items():
        A = found[f"base_model.model.{module}.lora_A.default.weight"]
        assert torch.equal(A, start) == (keep == "frozen")
        if keep == "projected":
            assert (A.double() @ done.subspaces[module].avoid.double()).norm() < 1e-6 * A.norm()


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("how", SPREAD)
def test_statistics_of_a_spread_model(how: str, one_process: None) -> None:
    check_statistics(SPREAD[how])


def test_fsdp2_is_left_as_it_was(one_process: None) -> None:
    """After a call it leaves its outermost weights whole, and an optimiser made then would train copies."""
    model = fsdp2(base())
    with base_running(model):
        model(**batches()[0])
        assert not all(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    assert all(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def test_what_is_written_to_fsdp2_after_a_call_stays(one_process: None) -> None:
    seen = collect_statistics(base(), batches(), TARGETS["bert"])
    model: Any = fully_shard(adapted())
    with torch.no_grad():
        model.eval()(**batches()[0])
    done = initialise(model, seen, {"other": seen})
    model.reshard()
    factors = weights(model)
    for module, A in done.A.items():
        assert torch.equal(factors[f"base_model.model.{module}.lora_A.default.weight"], A)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("how", ["fsdp", "fsdp2"])
def test_statistics_of_other_models_under_fsdp(kind: str, how: str, one_process: None) -> None:
    check_statistics(SPREAD[how], kind)


@pytest.mark.parametrize("how", TRAINED)
def test_training_of_a_spread_model(how: str, one_process: None) -> None:
    check_training(SPREAD[how])


def _one_of_two(rank: int) -> None:
    for wrap in SPREAD.values():
        check_statistics(wrap)
    check_statistics(fsdp2, "t5")
    for how in TRAINED:
        check_training(SPREAD[how])
        if how != "ddp":
            check_training(SPREAD[how], "frozen")


def test_two_processes(tmp_path: Path) -> None:
    """Weights are truly apart here: each process holds half of every one."""
    two_processes(_one_of_two, tmp_path / "meet")


@pytest.mark.parametrize("how", ALONE)
def test_compiled_and_checkpointed(how: str) -> None:
    check_statistics(ALONE[how])
    check_training(ALONE[how])


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_compiled_and_run_before(whole: bool) -> None:
    """What was compiled without hooks is not what is run, and nothing is compiled anew with them."""
    graphs: list[Any] = []

    def compiled(module: nn.Module) -> None:
        module.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)

    plain = collect_statistics(base(), batches(), TARGETS["bert"])
    model = base().eval()
    for module in [model] if whole else blocks(model):
        compiled(module)
    with torch.no_grad():
        model(**batches()[0])
    before = len(graphs)
    assert before
    same(collect_statistics(model, batches(), TARGETS["bert"]), plain)
    assert len(graphs) == before


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    """Blocks run twice in a training step; statistics count their inputs once all the same."""

    def wrap(model: nn.Module) -> nn.Module:
        inner: Any = model
        inner.gradient_checkpointing_enable({"use_reentrant": reentrant})
        inner.enable_input_require_grads()  # else a reentrant checkpoint has no gradient
        return model.train()

    check_statistics(wrap)
    check_training(wrap)


def test_wrapped_models_that_are_refused(one_process: None) -> None:
    seen = collect_statistics(base(), batches(), TARGETS["bert"])
    with pytest.raises(LoraloomError, match="DistributedDataParallel is no PeftModel"):
        initialise(DistributedDataParallel(base()), seen, {"other": seen})
    with pytest.raises(LoraloomError, match="then wrap in DDP"):
        initialise(DistributedDataParallel(adapted()), seen, {"other": seen}, options=StartOptions(keep="frozen"))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base(bits: int, tmp_path: Path) -> None:
    """bitsandbytes' layers, on the CPU too: inputs are those that a hook of the test's own sees; A is kept inside."""
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    options: dict[str, Any] = {"load_in_4bit": True} if bits == 4 else {"load_in_8bit": True}
    folder, wide = str(tmp_path / "base"), BertConfig(**{**tiny.CONFIGS["bert"]().to_dict(), **_WIDE})
    AutoModelForSequenceClassification.from_config(wide).save_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def load() -> Any:
        torch.manual_seed(0)
        config = BitsAndBytesConfig(**options, llm_int8_skip_modules=["classifier"])
        return AutoModelForSequenceClassification.from_pretrained(folder, quantization_config=config, device_map=device)

    model = load()
    plain = collect_statistics(AutoModelForSequenceClassification.from_pretrained(folder), batches(), TARGETS["bert"])
    found = collect_statistics(model, batches(), TARGETS["bert"])
    kind = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
    assert all(isinstance(model.get_submodule(name), kind) for name in found.layers)
    assert found.layers == plain.layers
    assert found.fingerprint != plain.fingerprint
    assert found.fingerprint == fingerprint(load(), found.layers)
    seen: dict[str, list[Tensor]] = {name: [] for name in found.layers}
    for name, rows in seen.items():
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0].cpu()))
    with torch.no_grad():
        for batch in batches():
            model.eval()(**{key: value.to(device) for key, value in batch.items()})
    masks = [batch["attention_mask"].bool() for batch in batches()]
    for name, inputs in seen.items():
        x = torch.cat([rows[mask] for rows, mask in zip(inputs, masks, strict=True)]).double()
        assert torch.allclose(found.moment(name).as_gram(), x.T @ x, rtol=1e-5, atol=1e-8), name

    lora = LoraConfig(r=2, target_modules=TARGETS["bert"], task_type="SEQ_CLS")
    other = collect_statistics(get_peft_model(load(), lora), batches(5), TARGETS["bert"])
    assert other.fingerprint == found.fingerprint
    peft_model = get_peft_model(load(), lora)  # on a CPU, 4-bit layers that have run in eval mode cannot be trained
    done = initialise(peft_model, found, {"other": other}, options=StartOptions(keep="projected"))
    optimiser = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        given = {**batches()[0], "labels": torch.tensor([0, 1, 1, 0])}
        peft_model.train()(**{key: value.to(device) for key, value in given.items()}).loss.backward()
        optimiser.step()
        done.callback().on_optimizer_step(None, None, None, model=peft_model)
        optimiser.zero_grad()
    factors = {name: tensor.cpu() for name, tensor in weights(peft_model).items()}
    for module, start in done.A.items():
        A, B = (factors[f"base_model.model.{module}.lora_{factor}.default.weight"] for factor in "AB")
        assert not torch.equal(A, start)
        assert B.norm() > 0
        assert (A.double() @ done.subspaces[module].avoid.double()).norm() < 1e-6 * A.norm()


def test_a_base_moved_off_the_device(tmp_path: Path) -> None:
    """accelerate's offloading leaves layers without storage."""
    from accelerate import cpu_offload

    model = AutoModel.from_pretrained(str(tiny.base_folder("bert", tmp_path / "base")))
    plain = collect_statistics(model, batches(), TARGETS["bert"])
    same(collect_statistics(cpu_offload(model, torch.device("cpu")), batches(), TARGETS["bert"]), plain)
