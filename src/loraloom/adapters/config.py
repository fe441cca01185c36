"""adapter_config.json: what is read of it, what no low-rank update expresses, and one config for several adapters."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loraloom.adapters.bases import best_name
from loraloom.errors import LoraloomError, did_you_mean, first_few, raise_problems
from loraloom.files.reading import read_json_object

CONFIG = "adapter_config.json"
_BASE = "base_model_name_or_path"
# with these task types PEFT refuses to load an adapter that holds no head
_HEADED_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_WRITING_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")  # answered by the base's own head
# inits that subtract their start from the base weights: their adapter means nothing on the untouched base
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_NOT_AN_UPDATE = {
    "use_dora": "DoRA rescales the base weight",
    "lora_bias": "the bias of B would be lost",
    "layer_replication": "the base model has other layers",
    "trainable_token_indices": "trains rows of the embedding",
    "alora_invocation_tokens": "acts on some tokens only",
    "use_qalora": "pools the inputs of A",
    "use_bdlora": "keeps block-diagonal factors",
    "arrow_config": "routes between adapters",
    "monteclora_config": "samples its weights",
    "kasa_config": "changes the base weights",
    "velora_config": "compresses what the layers keep",
}
# what a finished adapter needs none of
INIT_ONLY = ("loftq_config", "eva_config", "corda_config", "lora_ga_config")
# carried into a merged config where all adapters agree
_AGREED = ("task_type", "revision", "lora_dropout")
# said anew by whoever writes an adapter, or of no meaning once it is trained: dropped without a word
_SETTLED = (
    *("peft_type", _BASE, "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("target_modules", "target_parameters", "modules_to_save", "fan_in_fan_out", "bias", "inference_mode"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying", "peft_version"),
    *("init_lora_weights", "runtime_config", *INIT_ONLY),
    "qalora_group_size",
    *_NOT_AN_UPDATE,
)

Names = list[str] | None


class Fields(BaseModel):
    """The fields of adapter_config.json that are read here, with PEFT's defaults."""

    model_config = ConfigDict(strict=True, extra="ignore")

    base_model_name_or_path: str | None = None
    task_type: str | None = None
    revision: str | None = None
    r: int = Field(8, ge=1, le=1 << 20)
    lora_alpha: float = Field(8, allow_inf_nan=False)
    lora_dropout: float | None = 0.0
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool | None = False
    fan_in_fan_out: bool | None = False
    bias: str | None = "none"
    init_lora_weights: bool | str | None = True
    target_modules: str | Names = None
    target_parameters: Names = None
    exclude_modules: str | Names = None
    modules_to_save: Names = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | Names = None
    auto_mapping: dict[str, Any] | None = None


def read_config(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json of a LoRA adapter's folder, as it is.

    Raises LoraloomError where there is none, it is no JSON object, it is of another tool or method, or fields that are
    read here have a wrong type.
    """
    path = folder / CONFIG
    if not folder.exists():
        raise LoraloomError(f"{folder}: not an adapter folder: there is no such folder", _near(folder))
    if not path.is_file():
        found = [*folder.glob(f"*/{CONFIG}"), *folder.glob(f"snapshots/*/{CONFIG}")]  # the latter in the hub's cache
        inner = sorted(child.parent.relative_to(folder).as_posix() for child in found)
        hint = f"name one of its sub-folders: {first_few(inner, 9)}" if inner else "name the folder that PEFT saved"
        raise LoraloomError(f"{folder}: not an adapter folder: {CONFIG} is missing", hint)
    config = read_json_object(path, "save the adapter again")
    check_config(path, config)
    return config


def _near(folder: Path) -> str:
    """Return a hint that names the adapters beside a folder that is not there, those of a name like its first."""
    beside = [found.parent.name for found in folder.parent.glob(f"*/{CONFIG}")] if folder.parent.is_dir() else []
    near = did_you_mean(folder.name, beside)
    return near if near.startswith("did") else "name the folder that PEFT saved"


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Raise LoraloomError for a config of another tool or method, and for fields read here that have a wrong type."""
    if config.get("peft_type") != "LORA":
        raise LoraloomError(
            f"{path}: peft_type is {config.get('peft_type')!r:.80}, not 'LORA'", "only LoRA adapters can be merged here"
        )
    raise_problems(str(path), field_problems(config), "mend the field, or save the adapter again")


def field_problems(config: Mapping[str, Any]) -> list[str]:
    """Return which fields of PEFT's config that are read here have a wrong type."""
    try:
        Fields.model_validate(dict(config))
    except ValidationError as error:
        told = {_field(one["loc"], config): (one["msg"], one["input"]) for one in reversed(error.errors())}
        return [f"{field}: {message}, not {given!r:.80}" for field, (message, given) in sorted(told.items())]
    return []


def unsupported(config: Mapping[str, Any], where: str = CONFIG) -> list[str]:
    """Return what of `config` low-rank updates cannot express; `where` it stands."""
    found = [
        f"{where}: {key}: {why}: not a low-rank update of a layer"
        for key, why in _NOT_AN_UPDATE.items()
        if config.get(key)
    ]
    if (config.get("bias") or "none") != "none":
        found.append(f"{where}: bias: {config['bias']!r:.80}: trained biases would be lost")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGED_BASE):
        found.append(
            f"{where}: init_lora_weights: {init!r:.80} changed the base weights; convert it with "
            "`save_pretrained(..., path_initial_model_for_weight_conversion=...)` of PEFT"
        )
    return found


def writes(config: Mapping[str, Any]) -> bool:
    """Tell whether an adapter is of a model that writes: what it saved whole is then a part of that, no task's head."""
    return config.get("task_type") in _WRITING_TASKS


def headless_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` for an adapter without a head, such that PEFT loads it and keeps the base model's own head."""
    kept = {key: value for key, value in config.items() if key != "modules_to_save"}
    if kept.get("task_type") in _HEADED_TASKS:
        kept["task_type"] = None
    return kept


def merged_config(
    configs: Sequence[Mapping[str, Any]],
    layers: Sequence[Collection[str]],
    modules: Collection[str],
    base: str | None,
    *,
    with_head: bool,
    with_experts: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """Return one config for the merge of adapters with `configs`, and the fields that were dropped, in any order.

    layers: those that each adapter has, experts left out. modules: those of the merge, likewise.
    base: the base model's name, the best of theirs where it is None.
    with_head, with_experts: whether the merge has a head, and experts.

    What they agree on is kept where it is known here; code to import and unknown fields never are.
    """
    config: dict[str, Any] = {
        "peft_type": "LORA",
        _BASE: best_name([base] if base else [str(one.get(_BASE) or "") for one in configs]),
        "bias": "none",
        "target_modules": _targets(configs, layers, modules),
    }
    if any(one.get("fan_in_fan_out") for one in configs):  # PEFT corrects it where a layer's class tells better
        config["fan_in_fan_out"] = True
    if with_experts:  # those that have any mean the same
        config["target_parameters"] = next(sorted(one[key]) for one in configs if one.get(key := "target_parameters"))
    dropped = {key for one in configs for key, value in one.items() if _worth_naming(key, value)}
    for key in _AGREED:
        values = [one.get(key) for one in configs]
        if any(value != values[0] for value in values):
            dropped.add(key)
        elif values[0] is not None:
            config[key] = values[0]
    if not with_head:
        return headless_config(config), sorted(dropped)
    config["modules_to_save"] = sorted({name for one in configs for name in one.get("modules_to_save") or ()})
    return config, sorted(dropped)


def _field(where: Sequence[int | str], config: Mapping[str, Any]) -> str:
    """Return the field that an error of pydantic is about, with the key inside it; a union's branch is left out."""
    field, value = str(where[0]), config.get(str(where[0]))
    return f"{field}: {str(where[1])!r:.80}" if isinstance(value, dict) and len(where) > 1 else field


def _worth_naming(key: str, value: Any) -> bool:
    """Tell whether a field that is dropped said anything: PEFT writes many that do not."""
    if key == "megatron_core":
        return value not in (None, "", "megatron.core")
    if key == "auto_mapping":
        return bool(value) and not str(value.get("parent_library")).startswith("transformers")
    return bool(value) and key not in (*_SETTLED, *_AGREED)


def _targets(configs: Sequence[Mapping[str, Any]], layers: Sequence[Collection[str]], modules: Collection[str]) -> Any:
    """Return target modules that mean `modules` alone: names of theirs, or "all-linear"; else every layer by its path.

    No pattern out of a file is written: PEFT would run it.
    """
    plain = [
        one.get("target_modules")
        for one in configs
        if not any(one.get(key) for key in ("exclude_modules", "layers_to_transform", "layers_pattern"))
    ]
    if len(plain) == len(configs):
        wanted, known = set(modules), set().union(*layers)
        if all(one == "all-linear" for one in plain):
            if all(set(one) == wanted for one in layers):
                return "all-linear"
        elif all(isinstance(one, list) for one in plain):
            # a list means every layer of the base that it fits, and its adapter has them: no other layer can fit it
            lists = [set(one or ()) for one in plain]
            for named in (set().union(*lists), lists[0].intersection(*lists)):
                endings = tuple(f".{target}" for target in named)
                if {module for module in known if f".{module}".endswith(endings)} == wanted:
                    return sorted(named)
    return sorted(modules)
