"""One PEFT adapter as low-rank updates: read, check, write. The only place that knows PEFT's file format."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loraloom.atomic import staged_folder
from loraloom.errors import LoraloomError, raise_problems

CONFIG, WEIGHTS, PROVENANCE = "adapter_config.json", "adapter_model.safetensors", "loraloom.json"
_PREFIX = "base_model.model."
# inits that subtract their start from the base weights: their adapter means nothing on the untouched base
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_INIT_ONLY = ("loftq_config", "eva_config", "corda_config", "lora_ga_config")  # a finished adapter needs none of them
# with these task types PEFT refuses to load an adapter that holds no head
_HEADED_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_NOT_AN_UPDATE = {
    "use_dora": "DoRA rescales the base weight",
    "lora_bias": "the bias of B would be lost",
    "target_parameters": "adapts bare parameters, not linear layers",
    "layer_replication": "the base model has other layers",
    "trainable_token_indices": "trains rows of the embedding",
    "alora_invocation_tokens": "acts on some tokens only",
    "use_qalora": "pools the inputs of A",
    "use_bdlora": "keeps block-diagonal factors",
    "arrow_config": "routes between adapters",
    "monteclora_config": "samples its weights",
    "kasa_config": "changes the base weights",
}


@dataclass(frozen=True)
class Update:
    """dW = B A of one layer: B (m, r) with alpha/r folded in, A (r, n); both float32."""

    B: Tensor
    A: Tensor

    @property
    def rank(self) -> int:
        """Return r, the number of rows of A."""
        return self.A.shape[0]

    def dense(self) -> Tensor:
        """Return dW (m, n)."""
        return self.B @ self.A


@dataclass(frozen=True)
class Adapter:
    """Low-rank updates by module path, with the task's head beside them.

    `updates` maps a module path of the base model to its Update; `head` holds the tensors PEFT saves whole
    (`modules_to_save`), by parameter path; `config` is adapter_config.json as read; `dtype` is the files' own.
    """

    updates: dict[str, Update]
    config: dict[str, Any]
    head: dict[str, Tensor] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    path: Path | None = None

    @property
    def name(self) -> str:
        """Return the folder's name, for messages."""
        return str(self.path) if self.path else "adapter"

    @property
    def base(self) -> str:
        """Return the name or folder of the base model, as the config gives it."""
        return str(self.config.get("base_model_name_or_path") or "")

    @property
    def rank(self) -> int:
        """Return the largest rank of any layer."""
        return max(update.rank for update in self.updates.values())

    def scaled(self, scale: float) -> Adapter:
        """Return the adapter with every update multiplied by `scale`."""
        updates = {name: Update(scale * update.B, update.A) for name, update in self.updates.items()}
        return Adapter(updates, self.config, self.head, self.dtype, self.path)


def matches_target(module: str, targets: str | Iterable[str]) -> bool:
    """Tell whether PEFT would adapt `module`: a regular expression over the whole path, or a list of path endings."""
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Return the value of the first key of a PEFT rank_pattern or alpha_pattern that matches `module`."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def module_scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return alpha/r of `module`, or alpha/sqrt(r) for rsLoRA, with alpha_pattern honoured; `rank` is the tensor's."""
    alpha = float(pattern_value(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", 8)))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def headless_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` for an adapter without a head, such that PEFT loads it and keeps the base model's own head."""
    kept = {key: value for key, value in config.items() if key != "modules_to_save"}
    if kept.get("task_type") in _HEADED_TASKS:
        kept["task_type"] = None
    return kept


def read_adapter(folder: str | Path) -> Adapter:
    """Read an adapter folder.

    Raises LoraloomError that tells at once all that is wrong or that low-rank updates cannot express: a missing or
    truncated file, an A without its B, values that are not finite, DoRA, biases, embeddings, inits that changed the
    base.
    """
    folder = Path(folder)
    config = _read_config(folder)
    tensors, problems = _read_tensors(folder)
    pairs, head, stray = _sort_tensors(tensors)
    problems = _unsupported(config) + problems + stray
    if tensors and not pairs and not stray:
        problems.append(f"{WEIGHTS}: holds no lora_A and lora_B tensors")
    updates: dict[str, Update] = {}
    for module, pair in pairs.items():
        fault = _pair_fault(module, pair)
        if fault:
            problems.append(fault)
            continue
        A, B = pair["A"].float(), pair["B"].float()
        updates[module] = Update(B * module_scaling(config, module, A.shape[0]), A)
    raise_problems(str(folder), problems, "train the adapter again or convert it with the tool that made it")
    dtype = next(iter(pairs.values()))["A"].dtype
    return Adapter(updates, config, head, dtype, folder)


def write_adapter(
    adapter: Adapter,
    folder: str | Path,
    *,
    provenance: Mapping[str, Any],
    files: Mapping[str, str] | None = None,
    extra: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Path:
    """Write an ordinary PEFT adapter folder: scaling is 1 (alpha = r) because B holds it already.

    `provenance` goes to loraloom.json beside it; `files` are further text files and `extra` further safetensors files
    by name. The folder appears whole or not at all; returns it. Raises LoraloomError where a value does not fit the
    adapter's dtype.
    """
    ranks = {module: update.rank for module, update in adapter.updates.items()}
    common = max(sorted(set(ranks.values())), key=list(ranks.values()).count)
    # "^": PEFT matches path endings, and one module's path can end another's
    odd = {f"^{module}": rank for module, rank in ranks.items() if rank != common}
    config = {
        **{key: value for key, value in adapter.config.items() if key not in _INIT_ONLY},
        "r": common,
        "lora_alpha": common,
        "rank_pattern": odd,
        "alpha_pattern": dict(odd),
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    tensors: dict[str, Tensor] = dict(adapter.head)
    for module, update in adapter.updates.items():
        tensors[f"{module}.lora_A.weight"] = update.A.to(adapter.dtype)
        tensors[f"{module}.lora_B.weight"] = update.B.to(adapter.dtype)
    problems = [f"{name}: overflows {adapter.dtype}" for name in tensors if not torch.isfinite(tensors[name]).all()]
    raise_problems(str(folder), problems, "nothing was written; use a smaller scale")
    return write_folder(folder, config, tensors, provenance=provenance, files=files, extra=extra)


def write_folder(
    folder: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    provenance: Mapping[str, Any],
    files: Mapping[str, str] | None = None,
    extra: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Path:
    """Write config, tensors (by path in the base model) and loraloom.json as a PEFT folder, whole or not at all.

    `files` are further text files by name, `extra` further safetensors files by name.
    """
    folder = Path(folder)
    with staged_folder(folder) as staged:
        (staged / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (staged / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
        _save({_PREFIX + name: tensor for name, tensor in tensors.items()}, staged / WEIGHTS)
        for name, text in (files or {}).items():
            (staged / name).write_text(text, encoding="utf-8")
        for name, content in (extra or {}).items():
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            _save(content, staged / name)
    return folder


def read_provenance(folder: str | Path) -> dict[str, Any]:
    """Return loraloom.json of an adapter folder, or an empty dict where there is none.

    Raises LoraloomError where it is not valid JSON.
    """
    path = Path(folder) / PROVENANCE
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except ValueError as error:
        raise LoraloomError(f"{path}: not valid JSON ({error})", "delete it or write the adapter again") from error


def adapter_sha256(folder: str | Path) -> str:
    """Return the sha256 over config and weights of an adapter folder."""
    sha = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        with open(Path(folder) / name, "rb") as file:
            while block := file.read(1 << 20):
                sha.update(block)
    return sha.hexdigest()


def compatibility_problems(adapters: Sequence[Adapter]) -> list[str]:
    """Return every difference of base model, target modules and shapes between the first of `adapters` and the rest."""
    problems = []
    for other in adapters[1:]:
        first = adapters[0]
        if _bases_differ(first, other):
            problems.append(f"base model: {first.name} has {first.base!r}, {other.name} has {other.base!r}")
        for one, two in ((first, other), (other, first)):
            missing = sorted(set(one.updates) - set(two.updates))
            if missing:
                shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
                problems.append(f"{one.name} adapts {shown}; {two.name} does not")
        for module in sorted(set(first.updates) & set(other.updates)):
            one_shape, two_shape = _shape(first.updates[module]), _shape(other.updates[module])
            if one_shape != two_shape:
                problems.append(f"{module}: {first.name} is {one_shape}, {other.name} is {two_shape}")
    return problems


def check_compatible(adapters: Sequence[Adapter]) -> None:
    """Raise LoraloomError telling all of `compatibility_problems`; do nothing where there are none."""
    hint = "merge adapters of one base model and one target set"
    raise_problems("these adapters do not fit together", compatibility_problems(adapters), hint)


def _bases_differ(one: Adapter, two: Adapter) -> bool:
    """Compare the fingerprints of the bases where both are known, else their names; a local folder's tells nothing.

    One base lies in another folder on every machine, so two paths need not be two bases.
    """
    known = [read_provenance(adapter.path).get("base_fingerprint") for adapter in (one, two) if adapter.path]
    if len(known) == 2 and all(known):
        return known[0] != known[1]
    if any(not adapter.base or adapter.base.startswith(("/", ".", "~")) for adapter in (one, two)):
        return False
    return one.base != two.base


def _shape(update: Update) -> str:
    return f"{update.B.shape[0]} x {update.A.shape[1]}"


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    whole = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    save_file(whole, path, metadata={"format": "pt"})


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        inner = sorted(child.parent.name for child in folder.glob(f"*/{CONFIG}")) if folder.is_dir() else []
        hint = f"name one of its sub-folders: {', '.join(inner)}" if inner else "name the folder that PEFT saved"
        raise LoraloomError(f"{folder}: not an adapter folder: {CONFIG} is missing", hint)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LoraloomError(f"{path}: not valid JSON ({error}): half-written?", "save the adapter again") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise LoraloomError(f"{path}: peft_type is {kind!r}, not 'LORA'", "only LoRA adapters can be merged here")
    return config


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    found = [
        f"{CONFIG}: {key}: {why}: not a low-rank update of a linear layer"
        for key, why in _NOT_AN_UPDATE.items()
        if config.get(key)
    ]
    if config.get("bias", "none") != "none":
        found.append(f"{CONFIG}: bias: {config['bias']!r}: trained biases would be lost")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGED_BASE):
        found.append(
            f"{CONFIG}: init_lora_weights: {init!r} changed the base weights; convert it with "
            "`save_pretrained(..., path_initial_model_for_weight_conversion=...)` of PEFT"
        )
    return found


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / "adapter_model.bin").is_file():
            return {}, ["adapter_model.bin is a pickle, which may run code: load it in PEFT and save it as safetensors"]
        return {}, [f"{WEIGHTS} is missing: half-written?"]
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, []  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        return {}, [f"{WEIGHTS} cannot be read ({error}): half-written?"]


def _sort_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], list[str]]:
    pairs: dict[str, dict[str, Tensor]] = {}
    head: dict[str, Tensor] = {}
    stray = []
    for key, tensor in sorted(tensors.items()):
        name = key.removeprefix(_PREFIX)
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if match:
            pairs.setdefault(match[1], {})[match[2]] = tensor
        elif "lora_" in name:
            stray.append(f"{WEIGHTS}: tensor {key} is not the A or B of a linear layer")
        else:
            head[name] = tensor
    return pairs, head, stray


def _pair_fault(module: str, pair: Mapping[str, Tensor]) -> str:
    if set(pair) != {"A", "B"}:
        return f"{WEIGHTS}: {module} has lora_{next(iter(pair))} alone: a half-written adapter?"
    A, B = pair["A"], pair["B"]
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        return f"{WEIGHTS}: {module}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} do not multiply"
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        return f"{WEIGHTS}: {module} holds values that are not finite"
    return ""
