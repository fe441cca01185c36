"""LoRA settings are honoured, and A stays where `keep` says, under the Trainer and TRL's SFTTrainer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from typer.testing import CliRunner

import tiny
from loraloom.adapters.peft import read_adapter
from loraloom.cli.main import app
from loraloom.errors import LoraloomError
from loraloom.files.hashing import task_seed
from loraloom.merging import merge
from loraloom.starts.initialise import Initialisation, initialise, initialise_all
from loraloom.starts.keep import keep_callback
from loraloom.starts.options import Keep, StartOptions
from loraloom.statistics.collect import collect_statistics
from loraloom.statistics.file import Statistics

ALL = ["query", "value", "intermediate.dense"]


def statistics(model: PreTrainedModel, targets: Any, seed: int) -> Statistics:
    ids = torch.randint(3, len(tiny.WORDS), (4, 6), generator=torch.Generator().manual_seed(seed))
    return collect_statistics(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], targets)


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.base_folder("bert", tmp_path_factory.mktemp("bert") / "base"))


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.base_folder("llama", tmp_path_factory.mktemp("llama") / "base"))


def bert(folder: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def seen(bert_folder: str) -> list[Statistics]:
    return [statistics(bert(bert_folder), ALL, seed) for seed in range(3)]


def start(
    into: Any,
    seen: list[Statistics],
    lora: LoraConfig | None = None,
    *,
    seed: int = 0,
    adapter_name: str = "default",
    **options: Any,
) -> Initialisation:
    others = {"two": seen[1], "three": seen[2]}
    return initialise(into, seen[0], others, lora, StartOptions(**options), seed=seed, adapter_name=adapter_name)


def factors(model: torch.nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """A by module path, copied."""
    ending = f".lora_A.{adapter}.weight"
    return {
        name.split("base_model.model.", 1)[-1].removesuffix(ending): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if name.endswith(ending)
    }


def test_ranks_and_alphas_of_patterns_and_rslora(bert_folder: str, seen: list[Statistics], tmp_path: Path) -> None:
    """PEFT builds the same ranks and scalings from the folder as from the settings."""
    lora = LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=ALL,
        use_rslora=True,
        rank_pattern={r"layer\.1\..*query": 5, "value": 3},
        alpha_pattern={r"layer\.0\..*value": 11},
    )
    before = json.dumps(lora.to_dict(), default=sorted)
    done = start(tmp_path / "start", seen, lora)
    assert json.dumps(lora.to_dict(), default=sorted) == before
    from_settings = get_peft_model(bert(bert_folder), lora)
    loaded = PeftModel.from_pretrained(bert(bert_folder), str(tmp_path / "start"), is_trainable=True)
    assert len(done.A) == 6
    for module, A in done.A.items():
        one, two = (m.get_submodule(f"base_model.model.{module}") for m in (from_settings, loaded))
        assert (one.r, one.scaling) == (two.r, two.scaling)
        assert len(A) == one.r["default"]
        assert torch.equal(two.lora_A["default"].weight, A)
    assert {len(A) for A in done.A.values()} == {2, 3, 5}
    in_place = start(from_settings, seen)
    assert all(torch.equal(in_place.A[module], A) for module, A in done.A.items())


@pytest.mark.parametrize(
    "choice",
    [
        {"target_modules": "all-linear"},
        {},
        {"target_modules": r".*layer\.1.*query"},
        {"target_modules": ALL, "layers_to_transform": [1]},
        {"target_modules": ALL, "exclude_modules": ["value"]},
        {"target_modules": ["query"], "modules_to_save": ["classifier"]},
    ],
)
def test_the_folder_adapts_what_peft_would(
    bert_folder: str, seen: list[Statistics], choice: dict[str, Any], tmp_path: Path
) -> None:
    done = start(tmp_path / "start", seen, LoraConfig(r=2, **choice))
    if choice.get("target_modules", "all-linear") == "all-linear":
        assert done.A.keys() == seen[0].layers.keys()  # what the statistics cover
    else:
        assert done.A.keys() == factors(get_peft_model(bert(bert_folder), LoraConfig(r=2, **choice))).keys()
    loaded = PeftModel.from_pretrained(bert(bert_folder), str(tmp_path / "start"))
    assert factors(loaded).keys() == done.A.keys()
    assert all(torch.equal(A, done.A[module]) for module, A in factors(loaded).items())


def test_several_adapters_on_a_model(bert_folder: str, seen: list[Statistics]) -> None:
    model = get_peft_model(bert(bert_folder), LoraConfig(r=2, target_modules=["query"]), adapter_name="first")
    model.add_adapter("second", LoraConfig(r=3, target_modules=["value", "query"]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    done = start(model, seen, adapter_name="second")
    assert {len(A) for A in done.A.values()} == {3}
    assert len(done.A) == 4
    for name, tensor in model.state_dict().items():
        if ".second." not in name:
            assert torch.equal(tensor, before[name])
    assert factors(model, "second").keys() == done.A.keys()
    assert all(torch.equal(A, done.A[module]) for module, A in factors(model, "second").items())
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    callback = done.callback("second")
    assert callback.adapter_name == "second"
    with pytest.raises(LoraloomError, match="no adapter 'third'"):
        start(model, seen, adapter_name="third")


def test_low_cpu_mem_usage(bert_folder: str, seen: list[Statistics], tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=ALL)
    model = get_peft_model(bert(bert_folder), lora, low_cpu_mem_usage=True)
    assert all(A.is_meta for A in factors(model).values())
    done = start(model, seen)
    assert all(torch.equal(A, done.A[module]) for module, A in factors(model).items())
    ids = torch.arange(3, 15).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, bert(bert_folder)(input_ids=ids).logits)
    folder_too = start(tmp_path / "start", seen, lora)
    loaded = PeftModel.from_pretrained(bert(bert_folder), str(tmp_path / "start"), low_cpu_mem_usage=True)
    assert all(torch.equal(A, folder_too.A[module]) for module, A in factors(loaded).items())


def test_low_precision_factors(bert_folder: str, seen: list[Statistics]) -> None:
    model = get_peft_model(bert(bert_folder), LoraConfig(r=2, target_modules=ALL)).to(torch.bfloat16)
    done = start(model, seen)
    assert all(torch.equal(A, done.A[module].bfloat16()) for module, A in factors(model).items())


def test_seeds(seen: list[Statistics], tmp_path: Path) -> None:
    """A random A differs by layer and by seed, and is the same for the same; tasks have seeds of their own."""
    lora = LoraConfig(r=2, target_modules=["query"])
    first = start(tmp_path / "a", seen, lora, rule="random", seed=1).A
    again = start(tmp_path / "b", seen, lora, rule="random", seed=1).A
    other = start(tmp_path / "c", seen, lora, rule="random", seed=2).A
    one, two = first.values()
    assert not torch.equal(one, two)
    assert all(torch.equal(first[module], again[module]) for module in first)
    assert not any(torch.equal(first[module], other[module]) for module in first)
    assert len({task_seed(seed, task) for seed in range(50) for task in ("cola", "sst2", "rte")}) == 150


def classifier_trainer(model: Any, folder: Path, callbacks: list[TrainerCallback], **options: Any) -> Trainer:
    tokenizer, task = tiny.tokenizer("bert"), tiny.task()
    coded = tokenizer(list(task.train["text_a"]))
    rows = Dataset.from_dict({**coded, "labels": task.train["label"]})
    arguments = {
        "max_steps": 5,
        "learning_rate": 0.05,
        "weight_decay": 0.1,
        "per_device_train_batch_size": 4,
        **options,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(
            str(folder), **arguments, save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False
        ),
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=callbacks,
    )


def check_kept(keep: str, before: dict[str, Tensor], after: dict[str, Tensor], avoid: dict[str, Tensor]) -> None:
    assert before.keys() == after.keys()
    for module, A in after.items():
        if keep == "frozen":
            assert torch.equal(A, before[module])
        else:
            assert (A - before[module]).norm() > 0.05 * A.norm()
            off = float((A.double() @ avoid[module].double()).norm() / A.norm())
            assert off < 1e-6 if keep == "projected" else off > 1e-3


@pytest.mark.parametrize("keep", ["free", "frozen", "projected"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_kept_by_the_trainer(
    bert_folder: str, seen: list[Statistics], keep: Any, accumulate: int, tmp_path: Path
) -> None:
    model = get_peft_model(bert(bert_folder), LoraConfig(r=2, target_modules=ALL, modules_to_save=["classifier"]))
    done = start(model, seen, rule="apart", keep=keep)
    before = factors(model)
    trainer = classifier_trainer(model, tmp_path, [done.callback()], gradient_accumulation_steps=accumulate)
    trainer.train()
    assert trainer.state.global_step == 5
    check_kept(keep, before, factors(model), {name: space.avoid for name, space in done.subspaces.items()})
    B = [value for name, value in get_peft_model_state_dict(model).items() if "lora_B" in name]
    assert all(value.norm() > 0.01 for value in B)


@pytest.mark.parametrize("keep", ["frozen", "projected"])
def test_kept_when_the_callback_comes_late_or_trainable_was_reset(
    bert_folder: str, seen: list[Statistics], keep: Any, tmp_path: Path
) -> None:
    model = get_peft_model(bert(bert_folder), LoraConfig(r=2, target_modules=["query"]))
    done = start(model, seen, keep=keep)
    before = factors(model)
    model.set_adapter("default")  # PEFT makes A trainable again
    trainer = classifier_trainer(model, tmp_path, [])
    trainer.add_callback(done.callback())
    trainer.train()
    check_kept(keep, before, factors(model), {name: space.avoid for name, space in done.subspaces.items()})


class Watch(TrainerCallback):
    """Measures how far A is off its space after every optimiser step, when the projection has been done."""

    def __init__(self, avoid: dict[str, Tensor]) -> None:
        self.avoid = avoid
        self.off: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any = None, **kwargs: Any) -> None:
        A = factors(model)
        self.off.append(max(float((A[name] @ self.avoid[name]).norm() / A[name].norm()) for name in A))


@pytest.mark.parametrize("keep", ["free", "frozen", "projected"])
def test_kept_by_sft_trainer(llama_folder: str, keep: Any, tmp_path: Path) -> None:
    """A tiny Llama under TRL with gradient accumulation, from the folder that `initialise` wrote."""
    from trl import SFTConfig, SFTTrainer

    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    seen = [statistics(base, ["q_proj", "v_proj"], seed) for seed in range(3)]
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    done = start(tmp_path / "start", seen, lora, keep=keep)
    model = PeftModel.from_pretrained(base, str(tmp_path / "start"), is_trainable=True)
    before = factors(model)
    assert all(torch.equal(A, done.A[module]) for module, A in before.items())
    avoid = {name: space.avoid for name, space in done.subspaces.items()}
    watch = Watch(avoid)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            str(tmp_path / "out"),
            max_steps=4,
            learning_rate=0.05,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=3,
            max_length=16,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            bf16=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_dict({"text": list(tiny.task().train["text_a"])}),
        processing_class=tiny.tokenizer("llama"),
        callbacks=[keep_callback(tmp_path / "start"), watch],
    )
    trainer.train()
    assert len(watch.off) == 4
    check_kept(keep, before, factors(trainer.model), avoid)
    if keep == "projected":
        assert max(watch.off) < 1e-6


def test_merge_of_shared_frozen_adapters_has_rank_r(bert_folder: str, seen: list[Statistics], tmp_path: Path) -> None:
    """Three trained B over one frozen A: the merged update's singular values beyond r are rounding. With a random A
    for each it is 3 r."""
    ranks = {}
    for rule in ("shared", "random"):
        adapters = {}
        for index, name in enumerate(("one", "two", "three")):
            model = get_peft_model(bert(bert_folder), LoraConfig(r=2, target_modules=["query"]))
            own, others = seen[index], {str(i): seen[i] for i in range(3) if i != index}
            seed = 7 if rule == "shared" else index
            done = initialise(model, own, others, options=StartOptions(rule=rule, keep="frozen"), seed=seed)
            trainer = classifier_trainer(model, tmp_path, [done.callback()], seed=index)
            trainer.train()
            model.save_pretrained(tmp_path / rule / name)
            adapters[name] = read_adapter(tmp_path / rule / name)
        merged = merge(adapters, "task_arithmetic", scale=0.5).adapter
        dense = [update.dense().double() for update in merged.updates.values()]
        singular = [torch.linalg.svdvals(dW) for dW in dense]
        ranks[rule] = {int((values > 1e-6 * values[0]).sum()) for values in singular}
    assert ranks == {"shared": {2}, "random": {6}}


def test_diagnostics_and_notes_are_told(seen: list[Statistics], tmp_path: Path) -> None:
    """Two texts of six tokens leave 4 of 16 directions: told in the result, in notes() and in loraloom.json."""
    done = start(tmp_path / "start", seen, LoraConfig(r=2, target_modules=["query"]))
    layers = json.loads((tmp_path / "start" / "loraloom.json").read_text())["layers"]
    for module, space in done.subspaces.items():
        assert layers[module]["rows_seen"] == space.diagnostics.rows_seen == 48
    mean = sum(layer["own_energy"] for layer in layers.values()) / len(layers)
    assert done.diagnostics()["own_energy"] == pytest.approx(mean)
    few = [
        Statistics(s.base, s.fingerprint, {k: _cut(m) for k, m in s.moments.items()}, s.layers, 1, 3, "token")
        for s in seen
    ]
    told = start(tmp_path / "few", few, LoraConfig(r=2, target_modules=["query"]))
    assert any("does not determine the space: 6 rows" in note for note in told.notes())
    assert not any(space.diagnostics.determined for space in told.subspaces.values())


def _cut(moment: Any) -> Any:
    return type(moment).of_rows(moment.as_rows()[-3:])


def test_refusals(bert_folder: str, seen: list[Statistics], tmp_path: Path) -> None:
    folder = tmp_path / "start"
    lora = LoraConfig(r=2, target_modules=["query"])
    model = get_peft_model(bert(bert_folder), lora)
    wider = get_peft_model(bert(bert_folder), LoraConfig(r=2, target_modules=["query", "key", "output.dense"]))
    narrow = statistics(bert(bert_folder), ["query"], 0)
    strange = Statistics(**{**vars(seen[0]), "fingerprint": "f" * 64})
    cases: list[tuple[Any, str]] = [
        (lambda: initialise(folder, seen[0], {}, lora), "no statistics to stay off"),
        (lambda: initialise(folder, seen[0], {"x": strange}, lora), "'x' come from"),
        (lambda: initialise(folder, seen[0], {"x": narrow}, lora), "'x' cover other layers"),
        (lambda: start(folder, seen, LoraConfig(target_modules=["qeury"])), "did you mean 'query'"),
        (lambda: start(folder, seen, LoraConfig(r=17, target_modules=["query"])), "rank 17 is larger than the layer"),
        (lambda: start(folder, seen, LoraConfig(use_dora=True, init_lora_weights="pissa")), "2 problems"),
        (lambda: start(model, seen, lora), "has its own"),
        (lambda: start(wider, seen), "cover: 6 problems"),
        (lambda: start(folder, seen, lora, keep="projected", energy_share=0.9999), "too few for rank 2"),
    ]
    for call, message in cases:
        with pytest.raises(LoraloomError, match=message):
            call()
        assert not folder.exists()


def test_callback_refusals(bert_folder: str, seen: list[Statistics], tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["query"])
    done = start(tmp_path / "start", seen, lora, keep="projected")
    assert load_file(tmp_path / "start" / "avoid.safetensors").keys() == done.A.keys()
    other = get_peft_model(bert(bert_folder), LoraConfig(r=2, target_modules=["key"]))
    with pytest.raises(LoraloomError, match=r"no space is known for these layers: 2 problems"):
        keep_callback(tmp_path / "start").project(other)
    with pytest.raises(LoraloomError, match="no LoRA layer"):
        keep_callback(tmp_path / "start").project(bert(bert_folder))
    (tmp_path / "start" / "avoid.safetensors").unlink()
    with pytest.raises(LoraloomError, match=r"avoid.safetensors: missing"):
        keep_callback(tmp_path / "start")


def ruin(folder: Path, *, init: Any = ..., avoid: Any = ...) -> None:
    """Put `init` into loraloom.json, and bytes or tensors in place of the directions to stay off."""
    if init is not ...:
        told = json.loads((folder / "loraloom.json").read_text())
        (folder / "loraloom.json").write_text(json.dumps({**told, "init": init}))
    if isinstance(avoid, bytes):
        (folder / "avoid.safetensors").write_bytes(avoid)
    elif avoid is not ...:
        save_file(avoid, folder / "avoid.safetensors")


QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("ruined", "told"),
    [
        ({"init": None}, "init is no JSON object"),
        ({"init": [1]}, "init is no JSON object"),
        ({"init": {}}, "keep is None"),
        ({"init": {"keep": "frozn"}}, "keep is 'frozn'"),
        ({"init": {"keep": ["projected"]}}, r"keep is \['projected'\]"),
        ({"avoid": b"hello"}, "cannot be read"),
        ({"avoid": b""}, "cannot be read"),
        ({"avoid": {QUERY: torch.ones(16)}}, "are no directions"),
        ({"avoid": {QUERY: torch.ones(16, 2).int()}}, "are no directions"),
        ({"avoid": {QUERY: torch.eye(16)[:2]}}, "are no directions"),
        ({"avoid": {QUERY: torch.full((16, 2), torch.nan)}}, "not orthonormal"),
        ({"avoid": {QUERY: torch.ones(16, 2)}}, "not orthonormal"),
    ],
)
def test_a_damaged_start_is_told(seen: list[Statistics], ruined: dict[str, Any], told: str, tmp_path: Path) -> None:
    start(tmp_path / "start", seen, LoraConfig(r=2, target_modules=["query"]), keep="projected")
    assert keep_callback(tmp_path / "start").keep == "projected"
    ruin(tmp_path / "start", **ruined)
    with pytest.raises(LoraloomError, match=told) as error:
        keep_callback(tmp_path / "start")
    assert str(tmp_path / "start") in str(error.value)


def test_directions_of_another_width_are_told(bert_folder: str, seen: list[Statistics], tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["query"])
    done = start(tmp_path / "start", seen, lora, keep="projected")
    ruin(tmp_path / "start", avoid={module: torch.eye(20)[:, :2].contiguous() for module in done.A})
    with pytest.raises(LoraloomError, match="no space is known for these layers: 2 problems"):
        keep_callback(tmp_path / "start").project(get_peft_model(bert(bert_folder), lora))


def test_all_tasks_at_once_are_each_task_alone(seen: list[Statistics], tmp_path: Path) -> None:
    """Every folder is what `initialise` writes for that task with its seed; only the others' order may differ."""
    tasks, lora = dict(zip(("one", "two", "three"), seen, strict=True)), LoraConfig(r=2, target_modules=ALL)
    keeps: dict[str, Keep] = {"apart": "projected", "osrm": "free", "shared": "free"}
    for rule, keep in keeps.items():
        options = StartOptions(rule=rule, keep=keep, energy_share=0.3)
        done = initialise_all(tmp_path / rule, tasks, lora, options, seed=4)
        for name, own in tasks.items():
            others = {other: statistics for other, statistics in tasks.items() if other != name}
            seed = 4 if rule == "shared" else task_seed(4, name)
            alone = initialise(tmp_path / "alone", own, others, lora, options, seed=seed, overwrite=True)
            assert list(done[name].A) == list(alone.A)
            for file in ("adapter_model.safetensors", *(["avoid.safetensors"] if rule == "apart" else [])):
                one, two = load_file(tmp_path / rule / name / file), load_file(tmp_path / "alone" / file)
                assert one.keys() == two.keys()
                for tensor in one:
                    ours, theirs = one[tensor], two[tensor]
                    if file == "avoid.safetensors":  # any basis of one space is as good
                        ours, theirs = ours @ ours.T, theirs @ theirs.T
                    assert (ours - theirs).abs().max() < 1e-5
            here, there = (
                json.loads((place / "loraloom.json").read_text())
                for place in (tmp_path / rule / name, tmp_path / "alone")
            )
            assert {**here, "layers": None} == {**there, "layers": None}
        assert len({torch.stack(list(one.A.values())[:1]).sum().item() for one in done.values()}) == (
            1 if rule == "shared" else 3
        )


def test_all_tasks_are_refused_together(seen: list[Statistics], tmp_path: Path) -> None:
    lora, strange = LoraConfig(r=2, target_modules=["query"]), Statistics(**{**vars(seen[0]), "fingerprint": "f" * 64})
    for tasks, options, message in [
        ({"one": seen[0]}, {}, "no statistics to stay off"),
        ({"one": seen[0], "two": strange}, {}, "'two' come from"),
        ({"one": seen[0], "two": seen[1]}, {"energy_share": 0.9999}, "too few for rank 2"),
    ]:
        with pytest.raises(LoraloomError, match=message):
            initialise_all(tmp_path / "starts", tasks, lora, StartOptions(**options))
        assert not (tmp_path / "starts").exists()


def test_a_layer_is_read_once_and_let_go(seen: list[Statistics], tmp_path: Path) -> None:
    """Query and value share an input: each task's moment of it is read once, and no two inputs are held at a time."""
    reads: list[str] = []

    class Watched(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            reads.append(name)
            return super().__getitem__(name)

    watched = {str(i): replace(statistics, moments=Watched(statistics.moments)) for i, statistics in enumerate(seen)}
    options = StartOptions(energy_share=0.3)
    initialise_all(tmp_path / "starts", watched, LoraConfig(r=2, target_modules=ALL), options)
    inputs = sorted({layer.input for layer in seen[0].layers.values()})
    assert len(inputs) < len(seen[0].layers)
    assert reads == [name for name in inputs for _ in seen]


def test_the_command_starts_all_tasks(seen: list[Statistics], tmp_path: Path) -> None:
    """`init` with the files of all tasks writes what it writes for each with --own and --other: seeds by name."""
    files = [tmp_path / f"{name}.safetensors" for name in ("one", "two", "three")]
    for file, statistics in zip(files, seen, strict=True):
        statistics.save(file)

    def run(*words: Any) -> Any:
        return CliRunner().invoke(app, ["init", "--rank", "2", "--energy-share", "0.3", *map(str, words), "--json"])

    done = run(*files, "-o", tmp_path / "all")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [Path(one["folder"]).name for one in told["starts"]] == ["one", "two", "three"]
    run("--own", files[1], "--other", files[0], "--other", files[2], "-o", tmp_path / "two")
    ours, theirs = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "all" / "two", tmp_path / "two")
    )
    assert ours.keys() == theirs.keys()
    assert all((ours[name] - theirs[name]).abs().max() < 1e-5 for name in ours)
    assert told["starts"][1]["seed"] == task_seed(0, "two")
    noted = (tmp_path / "two" / "loraloom.json").read_text()
    assert list(json.loads(noted)["others"]) == ["one.safetensors", "three.safetensors"]
    assert str(tmp_path) not in noted  # it will be published
    (tmp_path / "again").mkdir()
    seen[0].save(tmp_path / "again" / "one.safetensors")
    both = ("--other", files[0], "--other", tmp_path / "again" / "one.safetensors")
    assert run(*both, "-o", tmp_path / "alike").exit_code == 0
    told = json.loads((tmp_path / "alike" / "loraloom.json").read_text())
    assert list(told["others"]) == ["one.safetensors", "again/one.safetensors"]
    for words, message in [
        ((*files, "--own", files[0]), "is given with the files of all tasks"),
        ((*files, tmp_path / "again" / "one.safetensors"), "two files are named one"),
        ((*files, tmp_path / "gone.safetensors"), "gone.safetensors: no such file"),
        ((files[0],), "no statistics to stay off"),
    ]:
        refused = run(*words, "-o", tmp_path / "out")
        assert refused.exit_code == 2
        assert message in refused.output
    assert not (tmp_path / "out").exists()
