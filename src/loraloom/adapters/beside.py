"""What lies in an adapter's folder beside its config and weights, and what becomes of it: nothing is lost untold."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loraloom.files.reading import is_own

# each tokenizer is in one of the first; the others go with it
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
_WITH_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
# what the texts, images and sounds of the training were read with
CARRIED = (
    *(*_TOKENIZERS, *_WITH_TOKENIZER, "chat_template.jinja", "chat_template.json"),
    *("preprocessor_config.json", "processor_config.json"),
    *("image_preprocessor_config.json", "video_preprocessor_config.json"),
)
# trained weights outside the adapter's own file, with what they are
_TRAINED = {
    r"non_lora_(trainables|state_dict)\.\w+": "weights that were trained outside LoRA (LLaVA)",
    r"new_embeddings\.\w+": "rows of new tokens (vLLM's and SGLang's extra vocabulary)",
    r"mm_projector\.\w+": "a trained projector",
    r"value_head\.\w+|v_head\.\w+": "a trained value head",
    r"(embed_tokens|lm_head|embeddings?|trained_embeddings)\.(safetensors|bin|pt)": "trained embeddings",
}
_KNOWN = {
    r"adapter_model\.(bin|safetensors)|adapter_model-.*": "another copy of the weights",
    r"README\.md": "its model card: the result has its own",
    r".*\.(log|txt|csv|png|md)": "a text or picture",
    r"heads|readouts": "of an earlier merge: the tasks' own",
    r"avoid\.safetensors": "of the start that it was trained from",
    r"training_args\.(bin|json)|trainer_state\.json|all_results\.json|train_results\.json|eval_results\.json": (
        "of the training"
    ),
    r"(optimizer|scheduler|scaler|rng_state.*|random_states.*|pytorch_model_fsdp.*)\.\w+|global_step\d+|latest": (
        "of the training's state"
    ),
    r"checkpoint-\d+|runs|logs|wandb": "a folder of the training",
    r"config\.json|generation_config\.json": "the base model's",
}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".gguf", ".pkl")
_LARGEST = 64 << 20  # bytes; the largest tokenizers have some 40 MB
_NO_AGREEMENT = "tokenizer or processor, in which the adapters do not agree"


@dataclass(frozen=True)
class Beside:
    """Files beside an adapter's own: those to `carry` along, by name, and why others are `left_out`."""

    carried: dict[str, Path] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def files_beside(folder: Path, read: set[str]) -> tuple[Beside, list[str]]:
    """Return what lies in `folder` beside the files `read`, and a problem for each that holds trained weights."""
    carried, left_out, problems = {}, {}, []
    for path in sorted(folder.iterdir()):
        name = path.name
        trained = next((what for pattern, what in _TRAINED.items() if re.fullmatch(pattern, name)), "")
        if name in read:
            continue
        if trained:
            problems.append(f"{name}: {trained}, which cannot be merged: the result would lack them")
        elif name in CARRIED and (why := _not_carried(path)):
            left_out[name] = why
        elif name in CARRIED:
            carried[name] = path
        else:
            known = (what for pattern, what in _KNOWN.items() if re.fullmatch(pattern, name))
            other = "weights of a kind that is not known" if name.endswith(_WEIGHTS) else "not of the adapter"
            left_out[name] = next(known, "a folder" if path.is_dir() else other)
    return Beside(carried, left_out), problems


def carry(members: Mapping[str, Beside]) -> tuple[dict[str, bytes], dict[str, str]]:
    """Return the files that all `members`, by name, agree on, with their content; and what is left out, with why.

    Tokenizer and processor go together: where one of their files differs or a member has none, none is carried.
    """
    left_out = {}
    for file in sorted({file for one in members.values() for file in one.left_out}):
        owners = [name for name, one in members.items() if file in one.left_out]
        why = members[owners[0]].left_out[file]
        left_out[file] = why if len(owners) == len(members) else f"{why} (of {', '.join(owners)})"
    contents = [{file: _content(path) for file, path in one.carried.items()} for one in members.values()]
    if contents and all(one == contents[0] for one in contents):
        return contents[0], left_out
    left_out.update({file: _NO_AGREEMENT for one in contents for file in one})
    return {}, left_out


def displaced(carried: Iterable[str]) -> set[str]:
    """Return the files of a base that must not stay beside those `carried`: its tokenizer's, where they are one."""
    names = set(carried)
    return {*_TOKENIZERS, *_WITH_TOKENIZER} - names if names & set(_TOKENIZERS) else set()


def _not_carried(path: Path) -> str:
    """Return why a tokenizer's file is not taken along: it leads out of the folder, or is no such file."""
    if not is_own(path):
        return "a link to a file elsewhere" if path.is_symlink() else "no file"
    return f"larger than {_LARGEST >> 20} MB" if path.stat().st_size > _LARGEST else ""


def _content(path: Path) -> bytes:
    """Return the bytes of a file, without the places on the trainer's disk that tokenizer_config.json may tell."""
    content = path.read_bytes()
    if path.name != "tokenizer_config.json":
        return content
    try:
        config = json.loads(content)
    except (ValueError, RecursionError):
        return content
    if not isinstance(config, dict):
        return content
    told = ("name_or_path", "tokenizer_file", "special_tokens_map_file")
    kept = {key: value for key, value in config.items() if key not in told}
    return content if kept == config else json.dumps(kept, indent=2).encode()
