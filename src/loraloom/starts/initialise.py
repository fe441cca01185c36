"""Statistics + LoRA settings -> adapter folders to start training from, or a PeftModel in place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

import peft
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor

import loraloom
from loraloom.adapters.peft import write_folder
from loraloom.adapters.update import Adapter, headless_config, pattern_value
from loraloom.errors import LoraloomError, did_you_mean, raise_problems
from loraloom.files.hashing import task_seed
from loraloom.model.wrappers import assign, each_weight, peeled
from loraloom.starts.keep import AVOID, KeepInSubspace, lora_layers
from loraloom.starts.spectra import Others, Pool
from loraloom.starts.subspace import (
    DEFAULT,
    Keep,
    Scale,
    Subspace,
    check_room,
    meant_scale,
    project_out,
    response_scale,
    subspace_off,
)
from loraloom.statistics.file import Statistics
from loraloom.statistics.fit import base_differences, cover_problems
from loraloom.statistics.moments import pooled

_FACTORS = ("lora_A", "lora_B")  # as PEFT's layers name them


@dataclass(frozen=True)
class Initialisation:
    """Where every layer's A starts and how it is to be kept.

    A: (r, n) float32 by module path, as written; subspaces: what it came from, with diagnostics.
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

    def diagnostics(self) -> dict[str, float]:
        """Return the diagnostics averaged over layers."""
        rows = [asdict(subspace.diagnostics) for subspace in self.subspaces.values()]
        keys = [key for key, value in rows[0].items() if isinstance(value, int | float)]
        return {key: sum(float(row[key] or 0) for row in rows) / len(rows) for key in keys}


def initialise(
    into: str | Path | torch.nn.Module,
    own: Statistics | None,
    others: Mapping[str, Statistics],
    lora: LoraConfig | None = None,
    *,
    rule: str = DEFAULT,
    keep: Keep = "free",
    scale: Scale | None = None,
    energy_share: float = 0.5,
    seed: int = 0,
    after: Mapping[str, Adapter] | None = None,
    adapter_name: str = "default",
) -> Initialisation:
    """Start one task's adapter: write a PEFT folder, or fill the adapter `adapter_name` of a PeftModel in place, DDP or
    FSDP around it or not.

    own, others: statistics of the task and, by name, of the other tasks, on one base model. An atlas (statistics of
    generic text) can stand for all others; without `own` it stands for the task's own inputs too. lora: settings for a
    folder (a PeftModel has its own); without target_modules every layer of the statistics is adapted. rule: see
    `osrm_subspace`. keep: let A go, fix it, or (`projected`) keep it off the loud directions by the callback. scale:
    `unit` leaves A's rows as the rule gives them, `response` multiplies A by one number a layer so that it responds to
    the own inputs as PEFT's default A would; as the rule is meant without, see `meant_scale`. after: adapters that are
    there already, by name; the rows of their A's are stayed off as the loud directions are. B is 0, so the model starts
    as the base model exactly. No base model is loaded for a folder.

    Raises LoraloomError that tells together every layer that does not fit.
    """
    after = after or {}
    base, options = _settled(own, others, rule, keep, scale, energy_share, after)
    options["seed"] = seed
    if isinstance(into, torch.nn.Module):
        model = peeled(into)
        if not isinstance(model, PeftModel):
            raise LoraloomError(f"{type(into).__name__} is no PeftModel", "give get_peft_model's, or a folder")
        if keep == "frozen" and isinstance(into, torch.nn.parallel.DistributedDataParallel):
            raise LoraloomError("DDP waits for the gradient of an A that is frozen", "initialise, then wrap in DDP")
        if lora is not None:
            raise LoraloomError("lora settings were given for a PeftModel, which has its own", "leave `lora` out")
        lora = _config_of(model, adapter_name)
        ranks = {name: layer.r[adapter_name] for name, layer in lora_layers(model, adapter_name).items()}
        _check_layers(list(ranks), base)
    else:
        lora, ranks = _config_and_ranks(lora, base)
    _check_config(lora, ranks, base)

    def view(name: str) -> list[Others]:
        return [Others.of([seen.moments[name] for seen in others.values()], own.moments[name] if own else None)]

    (done,) = _starts(base, ranks, view, [options], after)
    done.provenance.update(_provenance(base, own, others, after, options, done.subspaces))
    if isinstance(into, torch.nn.Module):
        _fill(into, done, adapter_name)
    else:
        _write(Path(into), done, lora, base)
    return done


def initialise_all(
    folder: str | Path,
    tasks: Mapping[str, Statistics],
    lora: LoraConfig | None = None,
    *,
    rule: str = DEFAULT,
    keep: Keep = "free",
    scale: Scale | None = None,
    energy_share: float = 0.5,
    seed: int = 0,
    after: Mapping[str, Adapter] | None = None,
) -> dict[str, Initialisation]:
    """Write the PEFT folder of every task in `tasks`, each off all others, under `folder` by its name.

    As `initialise` for each task, with a seed of its own drawn from `seed` and its name (of the rule `shared`: `seed`
    itself), but layer by layer: what a layer's moments are factored into serves all tasks, and no other layer's
    moments need be in memory. Raises LoraloomError as it does, before anything is written.
    """
    after = after or {}
    rest = dict(list(tasks.items())[1:])
    base, chosen = _settled(next(iter(tasks.values()), None), rest, rule, keep, scale, energy_share, after)
    lora, ranks = _config_and_ranks(lora, base)
    _check_config(lora, ranks, base)

    def views(name: str) -> Iterable[Others]:
        pool = Pool([seen.moments[name] for seen in tasks.values()])
        return (pool.without(index) for index in range(len(tasks)))

    seeds = [seed if rule == "shared" else task_seed(seed, name) for name in tasks]
    options = [{**chosen, "seed": own_seed} for own_seed in seeds]
    done = dict(zip(tasks, _starts(base, ranks, views, options, after), strict=True))
    for (name, one), choice in zip(done.items(), options, strict=True):
        others = {other: seen for other, seen in tasks.items() if other != name}
        one.provenance.update(_provenance(base, tasks[name], others, after, choice, one.subspaces))
        _write(Path(folder) / name, one, lora, base)
    return done


def _starts(
    base: Statistics,
    ranks: Mapping[str, int],
    views: Callable[[str], Iterable[Others]],
    options: Sequence[Mapping[str, Any]],
    after: Mapping[str, Adapter],
) -> list[Initialisation]:
    """Return the start of every task, without provenance; `views` gives the others of each task for an input's name."""
    done = [Initialisation({}, {}, choice["keep"], {}) for choice in options]
    by_input = sorted(ranks, key=lambda module: base.layers[module].input)
    for name, group in groupby(by_input, lambda module: base.layers[module].input):
        modules = list(group)
        for one, choice, others in zip(done, options, views(name), strict=True):
            for module in modules:
                seed, taken = task_seed(choice["seed"], module), _rows_of(after, module)
                space = subspace_off(others, ranks[module], choice["rule"], choice["energy_share"], seed, taken)
                one.subspaces[module] = space
                one.A[module] = _start(space, others, choice["keep"], choice["scale"])
    # in the order of the layers, as one by one
    return [
        replace(one, A={name: one.A[name] for name in ranks}, subspaces={name: one.subspaces[name] for name in ranks})
        for one in done
    ]


def _start(space: Subspace, others: Others, keep: Keep, scale: Scale) -> Tensor:
    """Return A as it is written; where the own inputs are not known, the others' together stand for them."""
    A = space.A
    if keep == "projected":
        check_room(space.avoid, len(A))
        A = project_out(A.double(), space.avoid.double()).float()
    if scale == "response":
        A = A * response_scale(others.own or pooled(others.moments), A)
    return A.contiguous()


def _rows_of(after: Mapping[str, Adapter], module: str) -> Tensor | None:
    """Return the rows of the earlier adapters' A's in one layer, (k, n), None where there are none."""
    rows = [adapter.updates[module].A for adapter in after.values() if module in adapter.updates]
    return torch.cat(rows) if rows else None


def _settled(
    own: Statistics | None,
    others: Mapping[str, Statistics],
    rule: str,
    keep: Keep,
    scale: Scale | None,
    energy_share: float,
    after: Mapping[str, Adapter],
) -> tuple[Statistics, dict[str, Any]]:
    """Return statistics that know the base, and the options of a start as the rule is meant; checks what is given."""
    scale = scale or meant_scale(rule)
    _check_options(others, rule, keep, scale, after)
    base = own or next(iter(others.values()))
    _check_statistics({**({"own": own} if own else {}), **others}, after)
    return base, {"rule": rule, "keep": keep, "scale": scale, "energy_share": energy_share}


def _check_options(others: Collection[str], rule: str, keep: str, scale: str, after: Mapping[str, Adapter]) -> None:
    problems = []
    if after and rule != "apart":
        problems.append(f"rule {rule!r} does not stay off earlier adapters: use apart")
    for option, given, known in (("keep", keep, get_args(Keep)), ("scale", scale, get_args(Scale))):
        if given not in known:
            problems.append(f"{option} {given!r} is unknown; {did_you_mean(given, known)}")
    if not others:
        problems.append("no statistics to stay off: neither of other tasks nor an atlas")
    raise_problems("cannot initialise", problems, "see `loraloom init --help`")


def _check_statistics(statistics: Mapping[str, Statistics], after: Mapping[str, Adapter]) -> None:
    first = next(iter(statistics.values()))
    problems = base_differences(statistics)
    for name, adapter in after.items():
        problems += cover_problems(name, adapter, first, partly=True)
    raise_problems(
        "cannot initialise", problems, "use one base model and one target set for all statistics and adapters"
    )


def _config_and_ranks(lora: LoraConfig | None, own: Statistics) -> tuple[LoraConfig, dict[str, int]]:
    """Return the settings of a folder, all layers where none are named, and the rank of every target layer."""
    lora = copy(lora) if lora else LoraConfig()
    if lora.target_modules in (None, "all-linear"):
        lora.target_modules = sorted(own.layers)
    targets = lora.target_modules
    # PEFT's own test: it knows exclude_modules and layers_to_transform too
    chosen = [module for module in own.layers if check_target_module_exists(lora, module)]
    if not chosen:
        endings = {module.rsplit(".", 1)[-1] for module in own.layers}
        near = did_you_mean(targets if isinstance(targets, str) else sorted(targets)[0], endings)
        raise LoraloomError(f"target_modules {targets!r}: the statistics hold no such layer", near)
    return lora, {module: int(pattern_value(lora.rank_pattern or {}, module, lora.r)) for module in chosen}


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
    base: Statistics,
    own: Statistics | None,
    others: Mapping[str, Statistics],
    after: Mapping[str, Adapter],
    options: dict[str, Any],
    subspaces: Mapping[str, Subspace],
) -> dict[str, Any]:
    def facts(statistics: Statistics) -> dict[str, Any]:
        return {"texts": statistics.texts, "tokens": statistics.tokens, "rows": statistics.kind}

    return {
        "made_by": "loraloom init",
        "versions": {"loraloom": loraloom.__version__, "peft": peft.__version__, "torch": torch.__version__},
        "base": base.base,
        "base_fingerprint": base.fingerprint,
        "init": options,
        "own": facts(own) if own else None,
        "others": {name: facts(statistics) for name, statistics in others.items()},
        "after": sorted(after),
        "layers": {module: asdict(space.diagnostics) for module, space in subspaces.items()},
    }


def _write(folder: Path, done: Initialisation, lora: LoraConfig, own: Statistics) -> None:
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in lora.to_dict().items()}
    config = headless_config(config)
    config["base_model_name_or_path"] = lora.base_model_name_or_path or own.base
    tensors = {}
    for module, A in done.A.items():
        tensors[f"{module}.lora_A.weight"] = A
        tensors[f"{module}.lora_B.weight"] = torch.zeros(own.layers[module].out_features, A.shape[0])
    extra = {}
    if done.keep == "projected":
        extra[AVOID] = {module: space.avoid for module, space in done.subspaces.items()}
    write_folder(folder, config, tensors, provenance=done.provenance, extra=extra)


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
