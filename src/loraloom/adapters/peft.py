"""Adapters' folders and files: read, check, write, in PEFT's format and those of other tools."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loraloom.adapters.alphas import METADATA, read_scaling
from loraloom.adapters.beside import Beside, carry, files_beside
from loraloom.adapters.config import CONFIG as CONFIG, unsupported
from loraloom.adapters.dialects import DIALECTS, MLX, PEFT, Dialect, read_factors
from loraloom.adapters.hub import folder_name
from loraloom.adapters.layout import Layers, find_layers, plain_layers
from loraloom.adapters.mlx import is_embedding
from loraloom.adapters.names import PREFIX, Names, read_names
from loraloom.adapters.source import Source, find_source
from loraloom.adapters.stored import (
    INDEX,
    WEIGHTS as WEIGHTS,
    Checked,
    StoredTensors,
    StoredUpdates,
    check_tensors,
    whole_problems,
)
from loraloom.adapters.update import Adapter, Form, Update
from loraloom.adapters.writer import UpdateFile
from loraloom.errors import LoraloomError, first_few, raise_problems, reads_file
from loraloom.files.atomic import staged_folder
from loraloom.files.hashing import Seen, file_sha256, write_json
from loraloom.files.outputs import RECORD
from loraloom.files.reading import read_json_object
from loraloom.files.tensors import StoredFile, save_tensors, write_files

PROVENANCE = "loraloom.json"
ADAPTER = "adapter"  # the kind of a folder of which no more is told


@reads_file
def read_adapter(folder: str | Path) -> Adapter:
    """Read an adapter; its updates stay in the file until they are asked for.

    folder: PEFT's or mlx-lm's, or one with a single LoRA of diffusers or kohya-ss; or such a safetensors file itself.

    Raises LoraloomError that tells at once all that is wrong or that low-rank updates cannot express: a missing or
    truncated file, an A without its B, values that are not finite or no floating-point numbers, names that tell no
    place in the base, DoRA, biases, inits that changed the base, trained weights in further files.
    """
    sources = _seen(Path(folder) / CONFIG)  # first: what is read later must be of these files
    source = find_source(Path(folder))
    place, files, dialect = source.place, source.files, source.dialect
    what = WEIGHTS if dialect is PEFT else files.paths[0].name if files.paths else dialect.weights
    sources = (sources if dialect in (PEFT, MLX) else ()) + _seen(*files.paths)
    beside, problems = _beside(source)
    problems += [files.fault] if files.fault else []
    try:
        checked, stored = check_tensors(files.paths, files.places)
    except ValueError as error:
        checked, stored = {}, {}
        problems.append(f"{what} cannot be read ({error}): half-written?")
    if dialect is PEFT:
        problems = unsupported(source.config) + problems
        names, layers = _of_peft(source.config, checked, problems)
    else:
        names, layers = _of_others(source, checked, stored)
    saved = {path: checked[key] for path, key in {**names.whole, **names.copies}.items()}
    told = [*names.problems, *layers.problems, *whole_problems(saved)]
    if not (names.factors or told or problems):
        told.append("holds no lora_A and lora_B tensors")
    problems += [f"{what}: {problem}" for problem in told]
    raise_problems(str(place), problems, "train the adapter again or convert it with the tool that made it")
    beside.left_out.update({f"{what}: {key}": why for key, why in names.unread.items()})
    return Adapter(
        StoredUpdates(stored, layers.places, layers.shapes),
        source.config,
        dict(StoredTensors(stored, names.whole)),
        layers.dtype,
        place,
        str(read_provenance(place).get("base_fingerprint") or ""),
        task_of(place),
        layers.forms,
        StoredTensors(stored, names.copies),
        beside,
        sources,
        dialect.name,
    )


def _of_peft(config: Mapping[str, Any], checked: Mapping[str, Checked], problems: list[str]) -> tuple[Names, Layers]:
    names = read_names(checked, config)
    try:
        return names, find_layers(names.factors, checked, config)
    except LoraloomError as error:
        problems.append(f"{CONFIG}: {error.message}: {error.hint}")
        return names, Layers()


def _of_others(
    source: Source, checked: Mapping[str, Checked], stored: Mapping[str, StoredFile]
) -> tuple[Names, Layers]:
    names = read_factors(checked, source.dialect)
    if source.dialect is MLX:
        layers = plain_layers(names.factors, checked, lambda module, rank: source.scale, transposed=True)
        layers.forms.update({module: Form("embedding") for module in layers.shapes if is_embedding(module)})
        return names, layers
    layers = plain_layers(names.factors, checked, read_scaling(names, stored, names.problems))
    names.unread.update({f"metadata: {entry}": "of the training" for entry in _trained_with(stored)})
    return names, layers


def _trained_with(stored: Mapping[str, StoredFile]) -> list[str]:
    """Return what is said beside the tensors and read by nobody: one line, of as many entries as it holds."""
    read = ("format", "ss_base_model_version", METADATA)
    entries = sorted({entry for file in stored.values() for entry in file.metadata} - set(read))
    return [first_few(entries)] if entries else []


def _beside(source: Source) -> tuple[Beside, list[str]]:
    """Return what lies in the adapter's folder beside what is read, and problems; a file stands alone."""
    if source.place.is_file():
        return Beside(), []
    indices = [path.name for path in source.place.glob(f"*{INDEX}")] if source.files.places else []
    read = {CONFIG, PROVENANCE, RECORD, *indices, *(path.name for path in source.files.paths)}
    beside, problems = files_beside(source.place, read)
    if source.unread:
        beside.left_out[f"{CONFIG}: {first_few(source.unread)}"] = "of the training"
    return beside, problems


class AdapterWriter:
    """Writes an adapter update by update, as PEFT or another tool has it; see `adapter_writer`."""

    def __init__(self, folder: Path, staged: Path, config: Mapping[str, Any], weights: UpdateFile) -> None:
        self.folder = folder
        self.staged = staged
        self.config = config
        self.weights = weights

    def add(self, module: str, update: Update) -> None:
        """Write one update; its scaling is 1 (alpha = r) because B holds it already."""
        self.weights.add(module, update)

    def add_head(self, head: Mapping[str, Tensor]) -> None:
        """Write tensors that PEFT saves whole, by parameter path, in their own dtype."""
        for name in head:
            self.weights.add_whole(name, head[name])

    def finish(
        self,
        provenance: Mapping[str, Any],
        files: Mapping[str, str] | None = None,
        extra: Mapping[str, Mapping[str, Tensor]] | None = None,
        carried: Mapping[str, bytes] | None = None,
    ) -> None:
        """Write config and loraloom.json, further text `files` and safetensors files (`extra`), and what is `carried`.

        All go by name.
        """
        problems = [f"{name}: overflows {self.weights.dtype}" for name in self.weights.overflowing]
        raise_problems(str(self.folder), problems, "nothing was written; use a smaller scale")
        config = self.weights.finish(self.config)
        if config:
            write_json(self.staged / CONFIG, config, sort_keys=True)
        for name, content in (carried or {}).items():
            (self.staged / name).write_bytes(content)
        _write_beside(self.staged, provenance, files, extra)


@contextmanager
def adapter_writer(
    folder: str | Path,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    modules: Iterable[str],
    head: Iterable[str] = (),
    forms: Mapping[str, Form] | None = None,
    *,
    dialect: Dialect = PEFT,
    rank: int | None = None,
    kind: str = ADAPTER,
    overwrite: bool = False,
    inputs: Iterable[Path] = (),
) -> Iterator[AdapterWriter]:
    """Yield a writer of the updates of `modules`, and of a head of those parameter paths, as an adapter's folder.

    folder: appears whole at the end, or not at all where something raises.
    config: PEFT's adapter_config.json; rank and alpha are filled in.
    dtype: of the weights; where it is float16, A and B are balanced.
    modules: paths of the layers whose updates will come.
    head: paths of the head's parameters that will come.
    forms: of the modules that are not linear layers.
    dialect: whose files are written. Others than PEFT's have no heads.
    rank: in which every layer is written, widened by zeros; None writes each in its own.
    kind, overwrite, inputs: see `staged_folder`.

    Raises LoraloomError where a value does not fit `dtype`.
    """
    with staged_folder(Path(folder), kind=kind, overwrite=overwrite, inputs=inputs) as staged:
        base = config.get("base_model_name_or_path")
        weights = UpdateFile(staged, dialect, dtype, modules, head, forms or {}, base=base, rank=rank)
        try:
            yield AdapterWriter(Path(folder), staged, config, weights)
        finally:
            weights.close()


def write_adapter(
    adapter: Adapter,
    folder: str | Path,
    *,
    provenance: Mapping[str, Any],
    files: Mapping[str, str] | None = None,
    extra: Mapping[str, Mapping[str, Tensor]] | None = None,
    rank: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an adapter as a folder, with its head and what comes along with it, and return the folder.

    adapter: written as the tool has it by which its layers are named, PEFT or another. Its updates may lie in a file;
      they are written one by one, in the adapter's own dtype.
    provenance: the content of loraloom.json.
    files: further text files by name.
    extra: further safetensors files by name, as tensors by name.
    rank: in which every layer is written, widened by zeros; None writes each in its own.
    overwrite: replace an earlier result of the same `provenance["kind"]`.

    Raises LoraloomError where a value does not fit the dtype or the folder may not be written; it is then as it was.
    """
    whole = [*adapter.head, *adapter.copies]
    place: dict[str, Any] = {"kind": str(provenance.get("kind", ADAPTER)), "overwrite": overwrite, "rank": rank}
    place["inputs"] = [adapter.path] if adapter.path else []
    place["dialect"] = DIALECTS[adapter.dialect]
    with adapter_writer(folder, adapter.config, adapter.dtype, adapter.updates, whole, adapter.forms, **place) as out:
        out.add_head(adapter.head)
        out.add_head(adapter.copies)
        for module, update in adapter.updates.items():
            out.add(module, update)
        out.finish(provenance, files, extra, carry({adapter.name: adapter.beside})[0])
    return Path(folder)


def write_folder(
    folder: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    provenance: Mapping[str, Any],
    files: Mapping[str, str] | None = None,
    extra: Mapping[str, Mapping[str, Tensor]] | None = None,
    kind: str = ADAPTER,
    overwrite: bool = False,
) -> Path:
    """Write config, tensors (by path in the base model) and loraloom.json as a PEFT folder, whole or not at all.

    `files` are further text files by name, `extra` further safetensors files by name; for `kind` and `overwrite` see
    `staged_folder`.
    """
    folder = Path(folder)
    with staged_folder(folder, kind=kind, overwrite=overwrite) as staged:
        write_json(staged / CONFIG, config, sort_keys=True)
        save_tensors({PREFIX + name: tensor for name, tensor in tensors.items()}, staged / WEIGHTS)
        _write_beside(staged, provenance, files, extra)
    return folder


@reads_file
def read_provenance(folder: str | Path) -> dict[str, Any]:
    """Return loraloom.json of an adapter folder, or an empty dict where there is none.

    Raises LoraloomError where it is no JSON object.
    """
    path = Path(folder) / PROVENANCE
    return read_json_object(path, "delete it or write the adapter again") if path.is_file() else {}


def task_of(folder: str | Path) -> str:
    """Return the task that an adapter was trained on, by its loraloom.json, or else the name of its folder or file."""
    task = read_provenance(folder).get("task")
    return str(task["name"]) if isinstance(task, dict) and "name" in task else folder_name(Path(folder))


class Input(NamedTuple):
    """One adapter that was merged: its name, after which the files kept of it are called, and its task."""

    name: str
    task: str


def inputs_by_task(folder: Path, names: Iterable[str] = ()) -> dict[str, Input]:
    """Return the adapters merged into `folder`, each by its task, or by its own name where several share a task.

    loraloom.json tells them. An input without a task there, and what else is in `names`, is named for its task.
    """
    recorded = read_provenance(folder).get("inputs")
    told = [one for one in recorded if isinstance(one, dict) and "name" in one] if isinstance(recorded, list) else []
    tasks = {str(one["name"]): str(one.get("task", one["name"])) for one in told}
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
    """Return the sha256 over config and weights of an adapter folder. Raises LoraloomError where it has none."""
    source = find_source(Path(folder))
    raise_problems(str(folder), [source.files.fault] if source.files.fault else [], "save the adapter again")
    return file_sha256(*source.described)


def _seen(*paths: Path) -> tuple[Seen, ...]:
    return tuple(Seen.of(path) for path in paths if path.is_file())


def _write_beside(
    folder: Path,
    provenance: Mapping[str, Any],
    files: Mapping[str, str] | None,
    extra: Mapping[str, Mapping[str, Tensor]] | None,
) -> None:
    write_json(folder / PROVENANCE, provenance)
    write_files(folder, files or {}, extra or {})
