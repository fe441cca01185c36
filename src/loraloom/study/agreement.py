"""The stages that measure, without labels, how far merges are from the single models: see analysis/single.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from loraloom.adapters.heads import Head
from loraloom.adapters.peft import read_adapter
from loraloom.analysis.single import OfAnswers, distance
from loraloom.files.hashing import write_json
from loraloom.model.generator import Generator
from loraloom.model.written import Written
from loraloom.study.engine import Context, Reading, stage
from loraloom.study.inputs import Base, Output, Texts
from loraloom.study.stages import ADAPTER, merged_adapters, read_aligned, read_heads

OWN, DISTANCES = "own.safetensors", "distances.json"


@stage("own", version=1)
def answer_alone(
    folder: Path,
    context: Context,
    *,
    adapter: Output,
    texts: Texts,
    base: Base,
    reading: Reading,
    answer_tokens: int,
) -> None:
    """Let a task's own adapter answer a few unlabelled texts, and keep what its head returns or it writes."""
    own = read_adapter(adapter.path / ADAPTER)
    if base.generates:
        generator = context.generator(base, reading)
        written = Written.by(generator, own.updates, generator.encode(texts.rows), answer_tokens)
        save_file(_tensors(written), folder / OWN)
        return
    evaluator, head = context.evaluator(base, reading), Head.of(own.head, own.name)
    features = evaluator.features(own.updates, head, evaluator.encode(texts.rows))
    save_file({"own": head.logits(features)}, folder / OWN)


@stage("agreement", version=1)
def measure_distances(
    folder: Path,
    context: Context,
    *,
    merged: Output,
    own: Mapping[str, Output],
    heads: Mapping[str, Output],
    aligned: Mapping[str, Output],
    texts: Mapping[str, Texts],
    base: Base,
    reading: Reading,
    scale: float,
) -> None:
    """Measure how far a merge is from each single model, in the task's own unit, with heads as trained and aligned.

    own: what `answer_alone` kept. heads, aligned: the adapters with their heads, and the held-out evaluation that
    aligned them; empty where answers are written.
    """
    model, found = context.model(base, reading), dict[str, dict[str, float | None]]()
    known = {"as_trained": read_heads(heads)}
    if aligned:
        known["aligned"] = read_aligned(aligned["heldout"], known["as_trained"])
    for name, adapter in merged_adapters(merged.path / ADAPTER, scale, texts).items():
        kept, rows = load_file(own[name].path / OWN), texts[name].rows
        if isinstance(model, Generator):
            answers = OfAnswers(model, _written(kept), rows)
            found.setdefault("as_trained", {})[name] = answers.distance(adapter.updates)
            continue
        features = model.features(adapter.updates, known["as_trained"][name], model.encode(rows))
        for kind, chosen in known.items():
            found.setdefault(kind, {})[name] = distance(kept["own"], chosen[name].logits(features))
    write_json(folder / DISTANCES, found)


def _tensors(written: Written) -> dict[str, Tensor]:
    own = {name: getattr(written, name) for name in ("answers", "lengths", "words", "own")}
    return {**own, "unit": written.base.mean()}


def _written(kept: Mapping[str, Tensor]) -> Written:
    own = {name: kept[name] for name in ("answers", "lengths", "words", "own")}
    return Written(**own, base=kept["unit"].reshape(1))


def read_distances(output: Output, aligned: bool) -> dict[str, float | None]:
    """Read the distances by task that `measure_distances` wrote; None of a task whose own answers are all alike."""
    found = json.loads((output.path / DISTANCES).read_text(encoding="utf-8"))
    return dict(found["aligned" if aligned else "as_trained"])
