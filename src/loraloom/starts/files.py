"""Adapter folders to start from, made of statistics files: what `loraloom init` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig

from loraloom.adapters.peft import read_adapter
from loraloom.errors import LoraloomError, collecting, raise_problems, raise_together
from loraloom.files.atomic import check_folder
from loraloom.files.hashing import task_seed
from loraloom.starts.initialise import Initialisation, initialise, initialise_all
from loraloom.statistics.file import Statistics


def initialise_from_files(
    output: Path,
    tasks: Sequence[Path],
    own: Path | None,
    others: Sequence[Path],
    after: Sequence[Path],
    lora: Mapping[str, Any],
    options: Mapping[str, Any],
) -> dict[Path, Initialisation]:
    """Write adapter folders from statistics files, and return by folder what was written.

    Of `tasks`, one folder each in `output`, by the file's name: see `initialise_all`. Without them the folder `output`,
    of the task `own` off `others`: see `initialise`. Others and earlier adapters go by path. Without a seed it is drawn
    from the folder's name: teams that share an atlas must not start at the same A.
    """
    mixed = [f"{path} is given with the files of all tasks" for path in [*([own] if own else []), *others] if tasks]
    raise_problems("init", mixed, "give the files of all tasks, or --own, --other and --atlas for one of them")
    names = [path.stem for path in tasks]
    twice = [f"two files are named {name}" for name in sorted(set(names)) if names.count(name) > 1]
    raise_problems("init", twice, "name each file after its task")
    config = LoraConfig(
        r=lora["rank"], lora_alpha=lora["alpha"], target_modules=lora["targets"], use_rslora=lora["rslora"]
    )
    errors: list[LoraloomError] = []
    read: dict[Path, Statistics] = {}
    for folder in [output / name for name in names] or [output]:
        with collecting(errors):
            check_folder(folder)
    for path in [*tasks, *([own] if own else []), *others]:
        with collecting(errors):
            read[path] = Statistics.load(path)
    raise_together(errors)
    earlier = {str(path): read_adapter(path) for path in after}
    if tasks:
        every = {name: read[path] for name, path in zip(names, tasks, strict=True)}
        done = initialise_all(output, every, config, after=earlier, **{**options, "seed": options["seed"] or 0})
        return {output / name: one for name, one in done.items()}
    if options["seed"] is None:
        options = {**options, "seed": task_seed(0, output.resolve().name)}
    known = {str(path): read[path] for path in others}
    return {output: initialise(output, read[own] if own else None, known, config, after=earlier, **options)}
