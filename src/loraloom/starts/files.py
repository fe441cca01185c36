"""Adapter folders to start from, made of statistics files: what `loraloom init` does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from peft import LoraConfig

from loraloom.adapters.peft import read_adapter
from loraloom.adapters.update import Adapter
from loraloom.errors import LoraloomError, collecting, did_you_mean, raise_problems, raise_together
from loraloom.files.hashing import task_seed
from loraloom.files.outputs import check_folder
from loraloom.settings import LoraSettings
from loraloom.starts.initialise import START, Initialisation, initialise, initialise_all
from loraloom.starts.options import StartOptions
from loraloom.statistics.file import Statistics

_TASK_TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def initialise_from_files(
    output: Path,
    own: Path | None,
    others: Sequence[Path],
    lora: LoraSettings,
    options: StartOptions,
    *,
    seed: int | None = None,
    after: Sequence[Path] = (),
    task_type: str | None = None,
    overwrite: bool = False,
) -> Initialisation:
    """Write the adapter folder that one task starts from; see `initialise`.

    output: the folder.
    own: statistics file of the task, if there is one.
    others: statistics files to stay off, of the other tasks or an atlas; they go by their names.
    options: where A starts; see `StartOptions`.
    lora: the adapter's shape; target modules "all-linear" are all layers of the statistics.
    seed: None draws it from the folder's name: teams that share an atlas must not start at the same A.
    after: adapter folders that are there already; they go by their names.
    task_type: PEFT's, of a base without a head: "CAUSAL_LM" or "SEQ_2_SEQ_LM"; None writes none.
    overwrite: replace a folder that holds an earlier start.

    Raises LoraloomError that tells together every file that cannot be read.
    """
    read, earlier = _read([output], [*([own] if own else []), *others], after, overwrite)
    return initialise(
        output,
        read[own] if own else None,
        {name: read[path] for name, path in _named(others).items()},
        _config(lora, task_type),
        options,
        seed=task_seed(0, output.resolve().name) if seed is None else seed,
        after=earlier,
        overwrite=overwrite,
    )


def initialise_all_from_files(
    output: Path,
    files: Sequence[Path],
    lora: LoraSettings,
    options: StartOptions,
    *,
    seed: int = 0,
    after: Sequence[Path] = (),
    task_type: str | None = None,
    overwrite: bool = False,
) -> dict[Path, Initialisation]:
    """Write the adapter folders that all tasks start from, each off the others, and return what was written by folder.

    output: where the folders lie, each by the name of its task's file.
    files: statistics file of every task.
    lora, after, task_type, overwrite: as for `initialise_from_files`. options, seed: as for `initialise_all`.

    Raises LoraloomError that tells together every file that cannot be read.
    """
    names = [path.stem for path in files]
    twice = [f"two files are named {name}" for name in sorted(set(names)) if names.count(name) > 1]
    raise_problems("init", twice, "name each file after its task")
    read, earlier = _read([output / name for name in names], files, after, overwrite)
    tasks = {path.stem: read[path] for path in files}
    config = _config(lora, task_type)
    done = initialise_all(output, tasks, config, options, seed=seed, after=earlier, overwrite=overwrite)
    return {output / name: one for name, one in done.items()}


def _config(lora: LoraSettings, task_type: str | None) -> LoraConfig:
    """Return PEFT's config of a start. Raises LoraloomError for a task type that needs a head, or is none."""
    if task_type not in (None, *_TASK_TYPES):
        raise LoraloomError(f"task type {task_type!r}: no base without a head", did_you_mean(task_type, _TASK_TYPES))
    return LoraConfig(**lora.for_peft(), task_type=task_type)


def _read(
    folders: Iterable[Path], files: Sequence[Path], after: Sequence[Path], overwrite: bool
) -> tuple[dict[Path, Statistics], dict[str, Adapter]]:
    """Return what is in statistics files and in earlier adapters' folders, once `folders` are known to be writable."""
    errors: list[LoraloomError] = []
    read: dict[Path, Statistics] = {}
    earlier: dict[str, Adapter] = {}
    for folder in folders:
        with collecting(errors):
            check_folder(folder, kind=START, overwrite=overwrite, inputs=[*files, *after])
    for path in files:
        with collecting(errors):
            read[path] = Statistics.load(path)
    for name, path in _named(after).items():
        with collecting(errors):
            earlier[name] = read_adapter(path)
    raise_together(errors)
    return read, earlier


def _named(paths: Sequence[Path]) -> dict[str, Path]:
    """Return paths by names that may be published: as written, or of an absolute one the end that is its own."""
    found: dict[str, Path] = {}
    for path in dict.fromkeys(paths):
        ends = ("/".join(path.parts[-count:]) for count in range(1, len(path.parts)))
        found[next(end for end in ends if end not in found) if path.is_absolute() else str(path)] = path
    return found
