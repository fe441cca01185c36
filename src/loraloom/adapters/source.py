"""What lies where an adapter is to be read: in which dialect, its config, and the files of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from loraloom.adapters.config import CONFIG, check_config, read_config
from loraloom.adapters.dialects import DIFFUSERS, MLX, PEFT, Dialect, dialect_of
from loraloom.adapters.mlx import is_mlx, read_mlx_config
from loraloom.adapters.stored import INDEX, WeightFiles, shard_of, weight_files
from loraloom.errors import LoraloomError, first_few
from loraloom.files.outputs import read_record
from loraloom.files.reading import read_json_object
from loraloom.files.tensors import StoredFile

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz")
_SAFE = ".safetensors"


class Source(NamedTuple):
    """Where an adapter lies and what tells how to read it.

    place: its folder, or its one file. config: PEFT's adapter_config.json, or what another dialect tells of its fields.
    scale: what every update is multiplied by, where the config of MLX tells it. unread: fields of that config.
    """

    place: Path
    dialect: Dialect
    config: dict[str, Any]
    files: WeightFiles
    scale: float = 1.0
    unread: tuple[str, ...] = ()

    @property
    def described(self) -> list[Path]:
        """Return config and weights, as they are hashed."""
        return [*([self.place / CONFIG] if self.dialect in (PEFT, MLX) else []), *self.files.paths]


def find_source(path: Path) -> Source:
    """Return what lies at `path`: an adapter's folder, or one safetensors file, its shards' index or one of them.

    Raises LoraloomError that says what is there instead, or which of several files is to be named.
    """
    if path.is_file():
        path = _folder_of(path)
    if path.is_file():
        return _in_file(path)
    if (path / CONFIG).is_file():
        config = read_json_object(path / CONFIG, "save the adapter again")
        if not is_mlx(config):
            check_config(path / CONFIG, config)
            return Source(path, PEFT, config, weight_files(path))
        scale, base = read_mlx_config(config, path / CONFIG)
        read = ("fine_tune_type", "lora_parameters", "model", "num_layers", "adapter_path")
        unread = tuple(sorted(key for key, value in config.items() if key not in read and value not in (None, False)))
        fields = {"base_model_name_or_path": base}
        return Source(path, MLX, fields, weight_files(path, MLX.weights), scale, unread)
    if not path.is_dir():
        if not path.exists() and path.suffix == _SAFE:
            raise LoraloomError(f"{path}: there is no such file", "name an adapter's folder or its safetensors file")
        read_config(path)
    return _without_config(path)


def _folder_of(path: Path) -> Path:
    """Return the folder that a file stands for: where its config lies beside it, or that was written here."""
    folder = path.parent
    whole = _whole(path.name)
    record = read_record(folder)
    if record and path.name in record.files:
        return folder
    return folder if whole in (PEFT.weights, MLX.weights) and (folder / CONFIG).is_file() else path


def _in_file(path: Path) -> Source:
    if path.suffix in _PICKLES:
        raise LoraloomError(
            f"{path}: a pickle, which may run code", "save it as safetensors with the tool that made it"
        )
    name = _whole(path.name)
    if not name.endswith(_SAFE):
        raise LoraloomError(f"{path}: no safetensors file", "name an adapter's folder or its safetensors file")
    return _told_by_names(path, WeightFiles([path]) if name == path.name else weight_files(path.parent, name))


def _whole(name: str) -> str:
    """Return the name of the whole file that a shard, or an index of shards, is of; any other's own."""
    shard = shard_of(name)
    return f"{shard['stem']}{_SAFE}" if shard else name.removesuffix(INDEX)


def _without_config(folder: Path) -> Source:
    """Return the one safetensors file of a folder, whole or in shards, as a source."""
    files = sorted(path for path in folder.iterdir() if path.name.endswith(_SAFE) and path.is_file())
    names = sorted({_whole(path.name) for path in files})
    if any(name == PEFT.weights for name in names) or not names:
        read_config(folder)  # PEFT's, which say nothing without it
    if DIFFUSERS.weights in names:
        names = [DIFFUSERS.weights]
    if len(names) > 1:
        raise LoraloomError(f"{folder}: holds several safetensors files: {first_few(names)}", "name one of the files")
    return _told_by_names(folder, weight_files(folder, names[0]))


def _told_by_names(place: Path, files: WeightFiles) -> Source:
    """Return a source whose dialect the names of its tensors tell. Raises LoraloomError where they tell none."""
    try:
        keys = {key: file for file in map(StoredFile, files.paths) for key in file}
    except ValueError as error:
        kind = next((f", of {one.title}" for one in (DIFFUSERS, MLX) if one.weights == files.paths[0].name), "")
        what = f"{files.paths[0].name}{kind}, cannot be read ({error}): half-written?"
        raise LoraloomError(f"{place}: {what}", "save the adapter again") from error
    if files.fault:
        raise LoraloomError(f"{place}: {files.fault}", "save the adapter again")
    dialect = dialect_of(keys)
    if dialect is None:
        shown = f"its tensors are called {first_few(sorted(keys))}" if keys else "it has no tensors"
        what = "not an adapter folder: adapter_config.json is missing, and" if place.is_dir() else "holds no LoRA:"
        if (place / "config.json").is_file():
            what = "a whole model, not an adapter:"
        raise LoraloomError(f"{place}: {what} {shown}", "name the folder or file that a trainer saved")
    if dialect in (PEFT, MLX):
        raise LoraloomError(
            f"{place}: tensors of {dialect.title}, which say nothing of their scale: {CONFIG} is missing",
            "name the adapter's folder, with its config",
        )
    metadata = next(iter(keys.values())).metadata
    return Source(place, dialect, {"base_model_name_or_path": metadata.get("ss_base_model_version")}, files)
