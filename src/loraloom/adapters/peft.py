"""PEFT's adapter folders: read, check, write. The only place that knows their format."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loraloom.adapters.update import Adapter, Shape, Update, module_scaling
from loraloom.errors import LoraloomError, raise_problems, reads_file
from loraloom.files.atomic import staged_folder
from loraloom.files.hashing import file_sha256, write_json
from loraloom.files.tensors import TensorFile, all_finite, save_tensors, write_files

CONFIG, WEIGHTS, PROVENANCE = "adapter_config.json", "adapter_model.safetensors", "loraloom.json"
_PREFIX = "base_model.model."
# inits that subtract their start from the base weights: their adapter means nothing on the untouched base
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_INIT_ONLY = ("loftq_config", "eva_config", "corda_config", "lora_ga_config")  # a finished adapter needs none of them
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


@reads_file
def read_adapter(folder: str | Path) -> Adapter:
    """Read an adapter folder; its updates stay in the file until they are asked for.

    Raises LoraloomError that tells at once all that is wrong or that low-rank updates cannot express: a missing or
    truncated file, an A without its B, values that are not finite, DoRA, biases, embeddings, inits that changed the
    base.
    """
    folder = Path(folder)
    config = _read_config(folder)
    problems = _unsupported(config)
    path = folder / WEIGHTS
    shapes: dict[str, Shape] = {}
    head: dict[str, Tensor] = {}
    dtype = torch.float32
    fault = _missing(folder)
    if fault:
        problems.append(fault)
    else:
        try:
            with safe_open(path, framework="pt") as file:
                shapes, head, dtype, wrong = _contents(file)
            problems += wrong
        except (SafetensorError, OSError) as error:
            problems.append(f"{WEIGHTS} cannot be read ({error}): half-written?")
    raise_problems(str(folder), problems, "train the adapter again or convert it with the tool that made it")
    fingerprint = str(read_provenance(folder).get("base_fingerprint") or "")
    return Adapter(StoredUpdates(path, config, shapes), config, head, dtype, folder, fingerprint, task_of(folder))


class AdapterWriter:
    """Writes an ordinary PEFT adapter update by update; see `adapter_writer`."""

    def __init__(self, folder: Path, config: Mapping[str, Any], dtype: torch.dtype, names: Iterable[str]) -> None:
        self.folder = folder
        self.config = config
        self.dtype = dtype
        self.ranks: dict[str, int] = {}
        self.overflowing: list[str] = []
        self.weights = TensorFile(folder / WEIGHTS, names)

    def add(self, module: str, update: Update) -> None:
        """Write one update; its scaling is 1 (alpha = r) because B holds it already."""
        self.ranks[module] = update.rank
        self._write(f"{module}.lora_A.weight", update.A)
        self._write(f"{module}.lora_B.weight", update.B)

    def add_head(self, head: Mapping[str, Tensor]) -> None:
        """Write tensors that PEFT saves whole, by parameter path, in their own dtype."""
        for name, tensor in head.items():
            self.weights.add(_PREFIX + name, tensor)

    def finish(
        self,
        provenance: Mapping[str, Any],
        files: Mapping[str, str] | None = None,
        extra: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Write config and loraloom.json, further text `files` and further safetensors files (`extra`) by name."""
        problems = [f"{name}: overflows {self.dtype}" for name in self.overflowing]
        raise_problems(str(self.folder), problems, "nothing was written; use a smaller scale")
        self.weights.close()
        write_json(self.folder / CONFIG, self._config(), sort_keys=True)
        _write_beside(self.folder, provenance, files, extra)

    def _write(self, name: str, tensor: Tensor) -> None:
        written = tensor.to(self.dtype)
        if not all_finite(written):
            self.overflowing.append(name)
        self.weights.add(_PREFIX + name, written)

    def _config(self) -> dict[str, Any]:
        ranks = list(self.ranks.values())
        common = max(sorted(set(ranks)), key=ranks.count)
        # "^": PEFT matches path endings, and one module's path can end another's
        odd = {f"^{module}": rank for module, rank in self.ranks.items() if rank != common}
        return {
            **{key: value for key, value in self.config.items() if key not in _INIT_ONLY},
            "r": common,
            "lora_alpha": common,
            "rank_pattern": odd,
            # a server that reads r and lora_alpha alone scales by 1 too
            "alpha_pattern": dict(odd),
            "use_rslora": False,
            "init_lora_weights": True,
            "inference_mode": True,
        }


@contextmanager
def adapter_writer(
    folder: str | Path, config: Mapping[str, Any], dtype: torch.dtype, modules: Iterable[str], head: Iterable[str] = ()
) -> Iterator[AdapterWriter]:
    """Yield a writer of the updates of `modules`, and of a head of those parameter paths, as a PEFT folder.

    The folder appears whole at the end, or not at all where something raises. Raises LoraloomError where a value does
    not fit `dtype`.
    """
    names = [f"{_PREFIX}{module}.lora_{factor}.weight" for module in modules for factor in "AB"]
    with staged_folder(Path(folder)) as staged:
        writer = AdapterWriter(staged, config, dtype, [*names, *(_PREFIX + name for name in head)])
        try:
            yield writer
        finally:
            writer.weights.close()


def write_adapter(
    adapter: Adapter,
    folder: str | Path,
    *,
    provenance: Mapping[str, Any],
    files: Mapping[str, str] | None = None,
    extra: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Path:
    """Write an adapter with its head as a PEFT folder and return the folder; see `adapter_writer` and its `finish`."""
    with adapter_writer(folder, adapter.config, adapter.dtype, adapter.updates, adapter.head) as out:
        out.add_head(adapter.head)
        for module, update in adapter.updates.items():
            out.add(module, update)
        out.finish(provenance, files, extra)
    return Path(folder)


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
        write_json(staged / CONFIG, config, sort_keys=True)
        save_tensors({_PREFIX + name: tensor for name, tensor in tensors.items()}, staged / WEIGHTS)
        _write_beside(staged, provenance, files, extra)
    return folder


@reads_file
def read_provenance(folder: str | Path) -> dict[str, Any]:
    """Return loraloom.json of an adapter folder, or an empty dict where there is none.

    Raises LoraloomError where it is not valid JSON.
    """
    path = Path(folder) / PROVENANCE
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except ValueError as error:
        raise LoraloomError(f"{path}: not valid JSON ({error})", "delete it or write the adapter again") from error


def task_of(folder: str | Path) -> str:
    """Return the task that an adapter was trained on, by its loraloom.json, or else the name of its folder."""
    task = read_provenance(folder).get("task")
    return str(task["name"]) if isinstance(task, dict) and "name" in task else Path(folder).resolve().name


class Input(NamedTuple):
    """One adapter that was merged: its name, after which the files kept of it are called, and its task."""

    name: str
    task: str


def inputs_by_task(folder: Path, names: Iterable[str] = ()) -> dict[str, Input]:
    """Return the adapters merged into `folder`, each by its task, or by its own name where several share a task.

    loraloom.json tells them. An input without a task there, and what else is in `names`, is named for its task.
    """
    recorded = read_provenance(folder).get("inputs", [])
    tasks = {one["name"]: one.get("task", one["name"]) for one in recorded}
    tasks |= {name: name for name in names if name not in tasks}
    count = Counter(tasks.values())
    shared = {name: Input(name, task) for name, task in tasks.items() if count[task] > 1}
    # where one input has the name of another's task, the task is meant
    return shared | {task: Input(name, task) for name, task in tasks.items() if count[task] == 1}


def files_by_task(folder: Path, place: str) -> dict[str, tuple[str, Path]]:
    """Return task and path of what a merged adapter keeps of its inputs in `place`; see `inputs_by_task`."""
    files = {path.stem: path for path in sorted((folder / place).glob("*.safetensors"))}
    inputs = inputs_by_task(folder, files)
    return {key: (one.task, files[one.name]) for key, one in inputs.items() if one.name in files}


def adapter_sha256(folder: str | Path) -> str:
    """Return the sha256 over config and weights of an adapter folder."""
    return file_sha256(Path(folder) / CONFIG, Path(folder) / WEIGHTS)


class StoredUpdates(Mapping[str, Update]):
    """The updates of an adapter file, read and scaled at each access: the file is mapped, nothing stays in memory."""

    def __init__(self, path: Path, config: Mapping[str, Any], shapes: dict[str, Shape]) -> None:
        self.path = path
        self.config = config
        self.shapes = shapes

    def __getitem__(self, module: str) -> Update:
        """Return B with alpha/r folded in, and A. Raises LoraloomError where the file has gone or changed."""
        scaling = module_scaling(self.config, module, self.shapes[module].r)
        try:
            # opened anew, so that the pages of one layer are given back before the next
            with safe_open(self.path, framework="pt") as file:
                A, B = (
                    # copied: what is mapped must not outlive the file
                    file.get_tensor(f"{_PREFIX}{module}.lora_{factor}.weight").to(torch.float32, copy=True)
                    for factor in "AB"
                )
        except (SafetensorError, OSError) as error:
            raise LoraloomError(f"{self.path}: cannot be read any more ({error})", "was it replaced?") from error
        return Update(B.mul_(scaling), A)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _write_beside(
    folder: Path,
    provenance: Mapping[str, Any],
    files: Mapping[str, str] | None,
    extra: Mapping[str, Mapping[str, Tensor]] | None,
) -> None:
    write_json(folder / PROVENANCE, provenance)
    write_files(folder, files or {}, extra or {})


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


def _missing(folder: Path) -> str:
    if (folder / WEIGHTS).is_file():
        return ""
    if (folder / "adapter_model.bin").is_file():
        return "adapter_model.bin is a pickle, which may run code: load it in PEFT and save it as safetensors"
    return f"{WEIGHTS} is missing: half-written?"


def _contents(file: Any) -> tuple[dict[str, Shape], dict[str, Tensor], torch.dtype, list[str]]:
    """Return shapes of the updates by module, the head, the updates' dtype, and what is wrong with the file."""
    pairs: dict[str, dict[str, Tensor]] = {}
    head: dict[str, Tensor] = {}
    problems = []
    for key in sorted(file.keys()):
        name = key.removeprefix(_PREFIX)
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if match:
            pairs.setdefault(match[1], {})[match[2]] = file.get_tensor(key)
        elif "lora_" in name:
            problems.append(f"{WEIGHTS}: tensor {key} is not the A or B of a linear layer")
        else:
            head[name] = file.get_tensor(key).clone()
    if not (pairs or problems):
        problems.append(f"{WEIGHTS}: holds no lora_A and lora_B tensors")
    faults = {module: _pair_fault(module, pair) for module, pair in pairs.items()}
    shapes = {
        module: Shape(pair["B"].shape[0], pair["A"].shape[1], pair["A"].shape[0])
        for module, pair in pairs.items()
        if not faults[module]
    }
    dtype = next((tensor.dtype for pair in pairs.values() for tensor in pair.values()), torch.float32)
    return shapes, head, dtype, problems + [fault for fault in faults.values() if fault]


def _pair_fault(module: str, pair: Mapping[str, Tensor]) -> str:
    if set(pair) != {"A", "B"}:
        return f"{WEIGHTS}: {module} has lora_{next(iter(pair))} alone: a half-written adapter?"
    A, B = pair["A"], pair["B"]
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        return f"{WEIGHTS}: {module}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} do not multiply"
    if not (all_finite(A) and all_finite(B)):
        return f"{WEIGHTS}: {module} holds values that are not finite"
    return ""
