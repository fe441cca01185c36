"""What transformers makes of a config.json: the names it gives to tensors, and the classifiers it knows.

Nothing is loaded and no code of the model's own is run: a model is built from the configuration alone, without memory
for its weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils import logging as transformers_logging

_CLASSIFIERS = {
    "SEQ_CLS": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "TOKEN_CLS": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    "QUESTION_ANS": MODEL_FOR_QUESTION_ANSWERING_MAPPING,
}
_COUNTS = re.compile(r"(.+_)?(n_)?(layers?|depths?|experts)")
_LARGEST = 1000  # layers or experts of the largest models, doubled


class ModelNames(NamedTuple):
    """The names in a model of a checkpoint's tensors, by their names in the checkpoint.

    Transformers keeps the experts of a layer in one parameter, and most checkpoints have tensors for each: `joined`
    gives by the parameter's name the tensors of every expert whose rows follow one another in it.
    """

    names: dict[str, str]
    joined: dict[str, list[list[str]]]


def names_in_model(config: Mapping[str, Any], tensors: Iterable[str]) -> ModelNames:
    """Return the names that a checkpoint's `tensors` have in the model that transformers builds from its config.json.

    `config` is config.json as read. A name of the model's own stays as it is, so names of any version meet. Tensors
    that transformers splits, turns or joins in another way than experts are left out; all are where it does not know
    the architecture.
    """
    model = _built(config)
    if model is None:
        return ModelNames({}, {})
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    own = model.state_dict()
    names: dict[str, str] = {}
    sources: dict[tuple[str, str], list[str]] = {}
    for tensor in sorted(tensors, key=dot_natural_key):
        renamed, pattern = rename_source_key(tensor, renamings, converters, model.base_model_prefix, own)
        if not pattern or renamed == tensor:
            names[tensor] = renamed
        else:
            sources.setdefault((renamed, pattern), []).append(tensor)
    return ModelNames(names, _joined(sources, converters))


def modules_with_inputs_first(config: Mapping[str, Any]) -> set[str] | None:
    """Return the modules whose parameters, fused experts, have inputs before outputs; None where nothing tells."""
    model = _built(config)
    if model is None:
        return None
    return {name for name, module in model.named_modules() if getattr(module, "is_transposed", False)}


def _joined(sources: Mapping[tuple[str, str], list[str]], converters: Sequence[Any]) -> dict[str, list[list[str]]]:
    """Return the tensors of each expert by parameter, of `sources` by parameter and pattern, in the experts' order."""
    patterns: dict[str, list[str]] = {}
    for converter in converters:
        steps = [(type(step), getattr(step, "dim", None)) for step in converter.operations]
        if steps in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
            patterns |= dict.fromkeys(converter.source_patterns, converter.source_patterns)
    found = {}
    for parameter, pattern in sources:
        columns = [sources.get((parameter, one), []) for one in patterns.get(pattern, [])]
        if columns and len(set(map(len, columns))) == 1:
            found[parameter] = [list(expert) for expert in zip(*columns, strict=True)]
    return found


def classifier_config(
    config: Mapping[str, Any], head: Mapping[str, Sequence[int]], task_type: str | None, labels: Sequence[str] | None
) -> dict[str, Any] | None:
    """Return what config.json must say for `config`'s architecture with this head, or None where no class has it.

    `head` gives shapes by parameter path, as the class names them; nothing is to be said of what the architecture has
    anyway. The first class of transformers whose head it is is taken, of `task_type` (PEFT's) where that is known.
    `labels` name the outputs; without, or where there are more or less, they are LABEL_0, LABEL_1 ...
    """
    if _has(_built(config), head):
        return {}
    known = {task_type: _CLASSIFIERS[task_type]} if task_type in _CLASSIFIERS else _CLASSIFIERS
    for mapping in known.values():
        for count in sorted({shape[0] for shape in head.values() if len(shape) == 2}):
            names = list(labels) if labels and len(labels) == count else [f"LABEL_{index}" for index in range(count)]
            told = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
            model = _built({**config, **told}, mapping)
            if model and _has(model, head) and count in _outputs(model, head):
                return {"architectures": [type(model).__name__], **told}
    return None


def _has(model: PreTrainedModel | None, head: Mapping[str, Sequence[int]]) -> bool:
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} if model else {}
    return all(shapes.get(name) == tuple(shape) for name, shape in head.items())


def _outputs(model: PreTrainedModel, head: Mapping[str, Sequence[int]]) -> set[int]:
    """Return the outputs of the layers of `head` that are not of the backbone, as a pooler is."""
    return {shape[0] for name, shape in head.items() if not name.startswith(f"{model.base_model_prefix}.")}


def unlikely_sizes(config: Mapping[str, Any]) -> str:
    """Return the first count of layers or experts that no model has, as `key is number`; empty where there is none.

    Who builds such a model waits for ever, even without weights.
    """
    return next((f"{key} is {count}" for key, count in _counts(config) if count > _LARGEST), "")


def _counts(content: Any) -> Iterator[tuple[str, int]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _counts(value)
        elif _COUNTS.fullmatch(str(key)):
            yield from ((str(key), one) for one in (value if isinstance(value, list) else [value]) if type(one) is int)


def _built(config: Mapping[str, Any], mapping: Any = None) -> PreTrainedModel | None:
    """Return a model without memory for its weights, of the class that `mapping` has for it, or config.json names.

    None where transformers knows no such class, or cannot build it.
    """
    try:
        if unlikely_sizes(config):
            return None
        described = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        named = getattr(transformers, str((config.get("architectures") or [""])[0]), None)
        if mapping is None and isinstance(named, type) and issubclass(named, PreTrainedModel):
            of: Any = named
        else:
            of = (mapping or MODEL_MAPPING)[type(described)]
        with quietly(), torch.device("meta"):
            return cast(PreTrainedModel, of(described))
    except Exception:  # transformers raises of every kind for a config that is not as it should be
        return None


@contextmanager
def quietly() -> Iterator[None]:
    """Silence transformers: it warns of what is meant (a fresh head), and draws a bar at every load."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
