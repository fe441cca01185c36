"""Statistics + LoRA settings -> adapter folders to start training from, or a PeftModel in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor

import loraloom
from loraloom.adapters.bases import public_name
from loraloom.adapters.config import headless_config
from loraloom.adapters.patterns import pattern_values, targeted
from loraloom.adapters.peft import write_folder
from loraloom.adapters.update import Adapter
from loraloom.errors import LoraloomError, did_you_mean, raise_problems
from loraloom.files.hashing import task_seed
from loraloom.files.outputs import check_folder
from loraloom.model.wrappers import assign, each_weight, peeled
from loraloom.starts.keep import AVOID, KeepInSubspace, lora_layers
from loraloom.starts.options import Keep, StartOptions
from loraloom.starts.spectra import Others, Pool
from loraloom.starts.subspace import Subspace, check_room, project_out, response_scale, subspace_off
from loraloom.statistics.file import Statistics
from loraloom.statistics.fit import base_differences, cover_problems
from loraloom.statistics.moments import pooled

START = "start"  # the kind of result
_FACTORS = ("lora_A", "lora_B")  # as PEFT's layers name them


@dataclass(frozen=True)
class Initialisation:
    """Where every layer's A starts and how it is to be kept.

    A: (r, n) float32 by module path, as written.
    subspaces: what each came from, with diagnostics, by module path.
    keep: how A is kept while it trains.
    provenance: what loraloom.json tells: versions, base, options, statistics, diagnostics of every layer.
    """

    A: dict[str, Tensor]
    subspaces: dict[str, Subspace]
    keep: Keep
    provenance: dict[str, Any]

    def callback(self, adapter_name: str = "default") -> KeepInSubspace:
        """Return the TrainerCallback that keeps A as `keep` says; for a filled PeftModel give its adapter's name."""
        avoid = {module: subspace.avoid for module, subspace in self.subspaces.items()}
        return KeepInSubspace(self.keep, avoid, adapter_name)

    def notes(self) -> list[str]:
        """Return what the diagnostics of any layer want said, each once."""
        return sorted({note for space in self.subspaces.values() for note in space.diagnostics.notes})

    def diagnostics(self) -> dict[str, float | None]:
        """Return the diagnostics averaged over layers; None for what could not be known."""
        rows = [asdict(subspace.diagnostics) for subspace in self.subspaces.values()]
        found = {key: [row[key] for row in rows] for key in rows[0] if key != "notes"}
        return {key: None if None in values else sum(values) / len(values) for key, values in found.items()}


def initialise(
    into: str | Path | torch.nn.Module,
    own: Statistics | None,
    others: Mapping[str, Statistics],
    lora: LoraConfig | None = None,
    options: StartOptions | None = None,
    *,
    seed: int = 0,
    after: Mapping[str, Adapter] | None = None,
    adapter_name: str = "default",
    overwrite: bool = False,
) -> Initialisation:
    """Start one task's adapter: write a PEFT folder, or fill an adapter of a PeftModel in place. B is 0, so the model
    starts as the base model exactly.

    into: a folder, for which no base model is loaded; or a PeftModel, DDP or FSDP around it or not.
    own: statistics of the task's own inputs; without them an atlas among `others` stands for these too.
    others: statistics to stay off, by name, on one base model: of the other tasks, or an atlas (of generic text).
    lora: PEFT's settings of a folder; without target modules every layer of the statistics is adapted. A PeftModel has
        its own.
    options: where A starts and how it is kept; see `StartOptions`.
    seed: of the rules that draw at random; each layer draws its own from it.
    after: adapters that are there already, by name; the rows of their A's are stayed off as the loud directions are.
    adapter_name: the adapter of a PeftModel that is filled.
    overwrite: replace a folder that holds an earlier start.

    Returns A of every layer, float32, with what it came from; see `Initialisation`. Raises LoraloomError that tells
    together every layer that does not fit; nothing is written then.
    """
    options, after = options or StartOptions(), after or {}
    _check_given(own, others, options, after)
    base = own or next(iter(others.values()))

    def start(config: LoraConfig, ranks: Mapping[str, int]) -> Initialisation:
        _check_config(config, ranks, base)

        def view(name: str) -> list[Others]:
            return [Others.of([seen.moments[name] for seen in others.values()], own.moments[name] if own else None)]

        return _starts([_Task(own, others, seed)], base, ranks, view, options, after)[0]

    if isinstance(into, torch.nn.Module):
        return _in_place(into, adapter_name, lora, options.keep, base, start)
    return _in_folder(Path(into), lora, base, start, overwrite)


def initialise_all(
    folder: str | Path,
    tasks: Mapping[str, Statistics],
    lora: LoraConfig | None = None,
    options: StartOptions | None = None,
    *,
    seed: int = 0,
    after: Mapping[str, Adapter] | None = None,
    overwrite: bool = False,
) -> dict[str, Initialisation]:
    """Write the PEFT folder of every task, each off all others, layer by layer.

    What a layer's moments are factored into serves all tasks, and no other layer's moments need be in memory.

    folder: where the tasks' folders lie, each by its name.
    tasks: statistics of each task's own inputs, by name, on one base model.
    seed: each task draws its own from it and its name; of the rule `shared` all take it as it is.
    lora, options, after, overwrite: as for `initialise`.

    Returns what `initialise` returns for each task. Raises LoraloomError as it does, before anything is written.
    """
    options, after = options or StartOptions(), after or {}
    for name in tasks:
        check_folder(Path(folder) / name, kind=START, overwrite=overwrite)
    base = next(iter(tasks.values()), None)
    _check_given(base, dict(list(tasks.items())[1:]), options, after)
    assert base is not None  # no task leaves nothing to stay off
    config, ranks = _config_and_ranks(lora, base)
    _check_config(config, ranks, base)

    def views(name: str) -> Iterable[Others]:
        pool = Pool([seen.moments[name] for seen in tasks.values()])
        return (pool.without(index) for index in range(len(tasks)))

    each = [
        _Task(
            own,
            {other: seen for other, seen in tasks.items() if other != name},
            seed if options.rule == "shared" else task_seed(seed, name),
        )
        for name, own in tasks.items()
    ]
    done = dict(zip(tasks, _starts(each, base, ranks, views, options, after), strict=True))
    for name, one in done.items():
        _write(Path(folder) / name, one, config, base, overwrite)
    return done


@dataclass(frozen=True)
class _Task:
    """One task that starts: its own statistics, if known, those to stay off by name, and its seed."""

    own: Statistics | None
    others: Mapping[str, Statistics]
    seed: int


_Start = Callable[[LoraConfig, Mapping[str, int]], Initialisation]  # of these settings, and ranks by module path


def _in_folder(
    folder: Path, lora: LoraConfig | None, base: Statistics, start: _Start, overwrite: bool
) -> Initialisation:
    check_folder(folder, kind=START, overwrite=overwrite)
    config, ranks = _config_and_ranks(lora, base)
    done = start(config, ranks)
    _write(folder, done, config, base, overwrite)
    return done


def _in_place(
    model: torch.nn.Module, adapter_name: str, lora: LoraConfig | None, keep: Keep, base: Statistics, start: _Start
) -> Initialisation:
    inner = peeled(model)
    if not isinstance(inner, PeftModel):
        raise LoraloomError(f"{type(model).__name__} is no PeftModel", "give get_peft_model's, or a folder")
    if keep == "frozen" and isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise LoraloomError("DDP waits for the gradient of an A that is frozen", "initialise, then wrap in DDP")
    if lora is not None:
        raise LoraloomError("lora settings were given for a PeftModel, which has its own", "leave `lora` out")
    config = _config_of(inner, adapter_name)
    ranks = {name: layer.r[adapter_name] for name, layer in lora_layers(inner, adapter_name).items()}
    _check_layers(list(ranks), base)
    done = start(config, ranks)
    _fill(model, done, adapter_name)
    return done


def _starts(
    tasks: Sequence[_Task],
    base: Statistics,
    ranks: Mapping[str, int],
    views: Callable[[str], Iterable[Others]],
    options: StartOptions,
    after: Mapping[str, Adapter],
) -> list[Initialisation]:
    """Return the start of every task; `views` gives the others of each task for an input's name."""
    spaces: list[dict[str, Subspace]] = [{} for _ in tasks]
    starts: list[dict[str, Tensor]] = [{} for _ in tasks]
    by_input = sorted(ranks, key=lambda module: base.layers[module].input)
    for name, group in groupby(by_input, lambda module: base.layers[module].input):
        modules = list(group)
        for task, A, found, others in zip(tasks, starts, spaces, views(name), strict=True):
            for module in modules:
                seed, taken = task_seed(task.seed, module), _rows_of(after, module)
                space = subspace_off(others, ranks[module], options.rule, options.energy_share, seed, taken)
                found[module], A[module] = space, _start(space, others, options)
    done = []
    for task, A, found in zip(tasks, starts, spaces, strict=True):
        space_of = {module: found[module] for module in ranks}  # in the order of the layers, not of their inputs
        provenance = _provenance(task, base, options, after, space_of)
        done.append(Initialisation({module: A[module] for module in ranks}, space_of, options.keep, provenance))
    return done


def _start(space: Subspace, others: Others, options: StartOptions) -> Tensor:
    """Return A as it is written; where the own inputs are not known, the others' together stand for them."""
    A = space.A
    if options.keep == "projected":
        check_room(space.avoid, len(A))
        A = project_out(A.double(), space.avoid.double()).float()
    if options.scale == "response":
        A = A * response_scale(others.own or pooled(others.moments), A)
    return A.contiguous()


def _rows_of(after: Mapping[str, Adapter], module: str) -> Tensor | None:
    """Return the rows of the earlier adapters' A's in one layer, (k, n), None where there are none."""
    rows = [adapter.updates[module].A for adapter in after.values() if module in adapter.updates]
    return torch.cat(rows) if rows else None


def _check_given(
    own: Statistics | None, others: Mapping[str, Statistics], options: StartOptions, after: Mapping[str, Adapter]
) -> None:
    """Raise LoraloomError that tells what of it does not go together."""
    problems = []
    if after and options.rule != "apart":
        problems.append(f"rule {options.rule!r} does not stay off earlier adapters: use apart")
    if not others:
        problems.append("no statistics to stay off: neither of other tasks nor an atlas")
    raise_problems("cannot initialise", problems, "see `loraloom init --help`")
    statistics = {**({"own": own} if own else {}), **others}
    problems = base_differences(statistics)
    for name, adapter in after.items():
        problems += cover_problems(name, adapter, next(iter(statistics.values())), partly=True)
    hint = "use one base model and one target set for all statistics and adapters"
    raise_problems("cannot initialise", problems, hint)


def _config_and_ranks(lora: LoraConfig | None, own: Statistics) -> tuple[LoraConfig, dict[str, int]]:
    """Return the settings of a folder, all layers where none are named, and the rank of every target layer."""
    lora = copy(lora) if lora else LoraConfig()
    if lora.target_modules in (None, "all-linear"):
        lora.target_modules = sorted(own.layers)
    targets = lora.target_modules
    if isinstance(targets, str):
        targeted(own.layers, targets)  # for its limit: PEFT's own matching has none
    # PEFT's own test: it knows exclude_modules and layers_to_transform too
    chosen = [module for module in own.layers if check_target_module_exists(lora, module)]
    if not chosen:
        endings = {module.rsplit(".", 1)[-1] for module in own.layers}
        near = did_you_mean(targets if isinstance(targets, str) else sorted(targets)[0], endings)
        raise LoraloomError(f"target_modules {targets!r}: the statistics hold no such layer", near)
    ranks = pattern_values(lora.rank_pattern or {}, chosen, lora.r)
    return lora, {module: int(rank) for module, rank in ranks.items()}


def _check_layers(modules: Sequence[str], own: Statistics) -> None:
    missing = [module for module in modules if module not in own.layers]
    raise_problems(
        "the model adapts layers that the statistics do not cover",
        missing,
        "collect statistics with the same target_modules",
    )


def _check_config(lora: LoraConfig, ranks: Mapping[str, int], own: Statistics) -> None:
    problems = []
    for option in ("use_dora", "lora_bias", "target_parameters", "layer_replication", "trainable_token_indices"):
        if getattr(lora, option, None):
            problems.append(f"{option}: trains more than a low-rank update of linear layers, which cannot be merged")
    if lora.init_lora_weights is not True:
        problems.append(f"init_lora_weights is {lora.init_lora_weights!r}: it must be True, A is given here")
    for module, rank in ranks.items():
        layer = own.layers[module]
        if rank > min(layer.in_features, layer.out_features):
            shape = f"{layer.out_features} x {layer.in_features}"
            problems.append(f"{module}: rank {rank} is larger than the layer ({shape})")
    raise_problems("these LoRA settings cannot be initialised", problems, "change the LoRA settings")


def _provenance(
    task: _Task,
    base: Statistics,
    options: StartOptions,
    after: Mapping[str, Adapter],
    subspaces: Mapping[str, Subspace],
) -> dict[str, Any]:
    def facts(statistics: Statistics) -> dict[str, Any]:
        return {"texts": statistics.texts, "tokens": statistics.tokens, "kind": statistics.kind}

    return {
        "made_by": "loraloom init",
        "versions": {"loraloom": loraloom.__version__, "peft": peft.__version__, "torch": torch.__version__},
        "base": public_name(base.base),
        "base_fingerprint": base.fingerprint,
        # of a recipe's init, what a start is asked alone
        "init": {**options.model_dump(include=set(StartOptions.model_fields)), "seed": task.seed},
        "own": facts(task.own) if task.own else None,
        "others": {name: facts(statistics) for name, statistics in task.others.items()},
        "after": sorted(after),
        "layers": {module: asdict(space.diagnostics) for module, space in subspaces.items()},
    }


def _write(folder: Path, done: Initialisation, lora: LoraConfig, own: Statistics, overwrite: bool) -> None:
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in lora.to_dict().items()}
    config = headless_config(config)
    config["base_model_name_or_path"] = public_name(lora.base_model_name_or_path or own.base)
    tensors = {}
    for module, A in done.A.items():
        tensors[f"{module}.lora_A.weight"] = A
        tensors[f"{module}.lora_B.weight"] = torch.zeros(own.layers[module].out_features, A.shape[0])
    extra = {}
    if done.keep == "projected":
        extra[AVOID] = {module: space.avoid for module, space in done.subspaces.items()}
    facts: dict[str, Any] = {"provenance": done.provenance, "extra": extra}
    write_folder(folder, config, tensors, **facts, kind=START, overwrite=overwrite)


@torch.no_grad()
def _fill(model: torch.nn.Module, done: Initialisation, adapter_name: str) -> None:
    layers = lora_layers(model, adapter_name)
    for layer in layers.values():
        for factor in (layer.lora_A[adapter_name], layer.lora_B[adapter_name]):
            if factor.weight.is_meta:  # low_cpu_mem_usage leaves the factors without storage
                factor.to_empty(device=layer.get_base_layer().weight.device)
    A_of, B_of = ({name: getattr(layer, of)[adapter_name] for name, layer in layers.items()} for of in _FACTORS)
    for module, weight in each_weight(model, A_of, write=True):
        assign(weight, done.A[module])
    for _, weight in each_weight(model, B_of, write=True):
        weight.zero_()
    done.callback(adapter_name).freeze(model)


def _config_of(model: PeftModel, adapter_name: str) -> LoraConfig:
    if adapter_name not in model.peft_config:
        raise LoraloomError(f"the model has no adapter {adapter_name!r}", did_you_mean(adapter_name, model.peft_config))
    return model.peft_config[adapter_name]
