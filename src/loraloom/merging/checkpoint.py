"""A base model's checkpoint folder, which may come from anyone: what it holds, by its headers, and what goes along.

Nothing outside the folder is read: a link that leads out of it is refused or left out, but for the links of which the
hub's cache is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from loraloom.adapters.beside import CARRIED
from loraloom.errors import LoraloomError
from loraloom.files.reading import is_own, read_json_object
from loraloom.files.tensors import MOST_TENSORS
from loraloom.merging.shards import Part, Shard, read_shard

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_AGAIN = "download it again"
_TEMPLATES = "additional_chat_templates"
# what a model is run with beside its weights; adapters, other formats and what a training run left are none of it
_NEEDED = (
    *(*CARRIED, CONFIG, "generation_config.json", "*preprocessor_config.json", "audio_tokenizer_config.json"),
    *("chat_template*.jinja", f"{_TEMPLATES}/*.jinja", "vocab*.json", "*_vocab.json", "vocab*.txt"),
    *("sentencepiece*.model", "spm*.model", "*.spm", "*.tiktoken", "tekken.json", "bpe.codes", "dict.txt"),
    *("normalizer.json", "emoji.json", "byte_maps.json", "word_shape.json", "word_pronunciation.json"),
    *("prophetnet.tokenizer", "LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*"),
)
_CODED = (CONFIG, "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class Checkpoint:
    """A base model's folder: its config, shards by file name, every tensor by name, and the index where it has one."""

    folder: Path
    config: dict[str, Any]
    shards: dict[str, Shard]
    parts: dict[str, Part]
    index: dict[str, Any] | None

    def owns(self, part: Part) -> bool:
        """Tell whether `part` is the one that its name stands for: another shard may hold a stale copy."""
        return self.parts.get(part.name) is part


def read_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return what the checkpoint holds, or None with all that is wrong with it."""
    config, problems = _read_object(folder / CONFIG)
    home: dict[str, str] = {}
    index = None
    if (folder / SINGLE).exists():  # as transformers does: one file goes before an index
        names = [SINGLE]
    elif (folder / INDEX).exists():
        index, wrong = _read_object(folder / INDEX)
        home, unfit = _homes(index)
        problems += wrong or unfit
        names = sorted(set(home.values()))
    else:
        return None, [*problems, _no_safetensors(folder)]
    shards, broken = _read_shards(folder, names)
    own = [part for file, shard in shards.items() for part in shard.parts if home.get(part.name, file) == file]
    parts = {part.name: part for part in own}
    problems += broken + _misplaced(own, parts, home, shards)
    return (None if problems else Checkpoint(folder, config, shards, parts, index)), problems


def files_beside(base: Checkpoint) -> tuple[list[str], list[str]]:
    """Return the names of the files that go along with the weights, and those of everything else in the folder.

    Code (`*.py`) goes along where the configuration names it; it is copied and never run.
    """
    patterns = [*_NEEDED, *(["*.py"] if _names_code(base.folder) else [])]
    paths = [path for path in sorted(base.folder.iterdir()) if path.name not in (*base.shards, INDEX)]
    templates = base.folder / _TEMPLATES
    if templates in paths and templates.is_dir() and not templates.is_symlink():
        paths += sorted(templates.iterdir())
        paths.remove(templates)
    names = [path.relative_to(base.folder).as_posix() for path in paths]
    needed = [name for name in names if any(fnmatchcase(name, one) for one in patterns) and is_own(base.folder / name)]
    return needed, [name for name in names if name not in needed]


def each(names: Sequence[str], tell: Callable[[str], str]) -> list[str]:
    """Tell of the first three, and how many more there are."""
    return [tell(name) for name in names[:3]] + ([f"and {len(names) - 3} more like it"] if names[3:] else [])


def _read_object(path: Path) -> tuple[dict[str, Any], list[str]]:
    fault = _reading_fault(path)
    if fault:
        return {}, [fault]
    try:
        return read_json_object(path, _AGAIN), []
    except LoraloomError as error:
        return {}, [f"{error.message.removeprefix(f'{path.parent}/')}: {error.hint}"]


def _reading_fault(path: Path) -> str:
    """Return why `path` is not to be read, or an empty string."""
    if not (path.exists() or path.is_symlink()):
        return f"{path.name}: missing: name a folder that transformers can load"
    if not is_own(path):
        return f"{path.name}: no file of this folder, or a link that leads out of it: copy here what it stands for"
    return ""


def _homes(index: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Return each tensor's file by the index, and what is wrong with the index."""
    home, metadata = index.get("weight_map"), index.get("metadata") or {}
    if not isinstance(home, dict) or not all(isinstance(file, str) for file in home.values()):
        return {}, [f"{INDEX}: weight_map does not map tensors to files: {_AGAIN}"]
    problems = [] if isinstance(metadata, dict) else [f"{INDEX}: metadata is no JSON object: {_AGAIN}"]
    problems += [] if home else [f"{INDEX}: names no shards: {_AGAIN}"]
    return home, problems


def _read_shards(folder: Path, names: Sequence[str]) -> tuple[dict[str, Shard], list[str]]:
    """Return the shards of these names that can be read, and what is wrong with the others."""
    shards: dict[str, Shard] = {}
    foreign = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    problems = each(foreign, lambda name: f"{INDEX}: names {name!r}, which is no safetensors file of this folder")
    absent, broken = [], {}
    for name in names:
        if name in foreign:
            continue
        path = folder / name
        try:
            if not (path.exists() or path.is_symlink()):
                absent.append(name)
            elif not is_own(path):
                broken[name] = _reading_fault(path)
            else:
                shards[name] = read_shard(path)
        except (OSError, ValueError) as error:
            broken[name] = f"{name}: cannot be read ({error}): {_AGAIN}"
        if sum(len(shard.parts) for shard in shards.values()) > MOST_TENSORS:
            return {}, [f"{name}: with it the shards hold more tensors than any model has: {_AGAIN}"]
    problems += each(absent, lambda name: f"{name}: missing, though {INDEX} names it: {_AGAIN}")
    return shards, problems + each(sorted(broken), broken.__getitem__)


def _misplaced(
    own: Sequence[Part], parts: Mapping[str, Part], home: Mapping[str, str], shards: Mapping[str, Shard]
) -> list[str]:
    """Return what is wrong with the places of tensors: `own` are those that the index places there or does not name."""
    astray = [name for name, file in home.items() if file in shards and name not in parts]
    twice = [part.name for part in own if parts[part.name] is not part]
    return [
        *each(astray, lambda name: f"{home[name]}: lacks tensor {name}, which {INDEX} places there"),
        *each(twice, lambda name: f"{name}: in several shards, of which {INDEX} names none: {_AGAIN}"),
    ]


def _names_code(folder: Path) -> bool:
    return any("auto_map" in _read_object(folder / name)[0] for name in _CODED)


def _no_safetensors(folder: Path) -> str:
    others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".safetensors", ".pt", ".gguf"))
    pickle = next((name for name in others if name.endswith(".bin")), None)
    if pickle:
        convert = "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        return f"{pickle} is a pickle, which may run code: convert it, with the model's own class: `{convert}`"
    beside = f"; it holds {', '.join(others[:3])}" if others else ""
    return f"holds neither {SINGLE} nor {INDEX}{beside}: name the folder of a whole model in safetensors"
