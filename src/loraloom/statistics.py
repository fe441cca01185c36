"""What the layers of the base model see on a task's texts: one forward pass, shared by input, additive, one file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from loraloom.atomic import staged_file
from loraloom.errors import LoraloomError, did_you_mean, raise_problems
from loraloom.hooks import (
    Kind,
    LayerReader,
    RowSum,
    base_model,
    base_running,
    batch_sides,
    layer_shape,
    linear_layers,
    model_name,
    shared_inputs,
    target_layers,
    unwrapped,
)
from loraloom.moments import Moment

FORMAT = "loraloom-statistics-1"
_SAMPLED = 4096  # values of each weight that the fingerprint reads


@dataclass(frozen=True)
class Layer:
    """One target linear layer: `input` is the path of the first target layer that reads the same tensor."""

    input: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class Statistics:
    """Second moments of what each target layer of a base model reads, uncentred, over the texts of one task.

    `moments` go by the `input` of a layer, `layers` by module path in the base model; `texts` are the samples seen,
    `tokens` those of their tokens that count (of both sides of an encoder-decoder). A row is a token or, for `kind`
    "sample", the mean over a sample's tokens. `fingerprint` is that of the base weights.
    """

    base: str
    fingerprint: str
    moments: dict[str, Moment]
    layers: dict[str, Layer]
    texts: int
    tokens: int
    kind: Kind

    def moment(self, module: str) -> Moment:
        """Return the moment of the input of `module`. Raises LoraloomError for a module that is not a target."""
        if module not in self.layers:
            raise LoraloomError(f"{module}: the statistics do not cover it", did_you_mean(module, self.layers))
        return self.moments[self.layers[module].input]

    def __add__(self, other: Statistics) -> Statistics:
        """Return the statistics of both sets of texts. Raises LoraloomError where they are not of one kind."""
        self._check_fit(other)
        moments = {name: moment + other.moments[name] for name, moment in self.moments.items()}
        return replace(self, moments=moments, texts=self.texts + other.texts, tokens=self.tokens + other.tokens)

    def __sub__(self, other: Statistics) -> Statistics:
        """Return the statistics of the texts that are not in `other`, a part of these.

        Raises LoraloomError where they are not of one kind or `other` has more rows.
        """
        self._check_fit(other)
        more = [name for name, moment in self.moments.items() if other.moments[name].count > moment.count]
        if more or other.texts > self.texts or other.tokens > self.tokens:
            raise LoraloomError(f"{other._name} is no part of {self._name}: it has more rows", "swap the two")
        moments = {name: moment - other.moments[name] for name, moment in self.moments.items()}
        return replace(self, moments=moments, texts=self.texts - other.texts, tokens=self.tokens - other.tokens)

    def limit_rows(self, most: int) -> Statistics:
        """Return these statistics without the rows of any input that has more than `most`; 0 leaves sums alone."""
        moments = {
            name: moment if moment.count <= most else moment.gram_only() for name, moment in self.moments.items()
        }
        return replace(self, moments=moments)

    def contents(self) -> dict[str, Any]:
        """Tell what a file of these statistics holds, and so hands to whoever reads it."""
        raw = [moment.count for moment in self.moments.values() if moment.rows is not None]
        return {
            "base": self.base,
            "fingerprint": self.fingerprint,
            "texts": self.texts,
            "tokens": self.tokens,
            "kind": self.kind,
            "layers": len(self.layers),
            "inputs": len(self.moments),
            "inputs with their rows": len(raw),
            "rows": sum(raw),
            "widths": sorted({moment.width for moment in self.moments.values()}),
        }

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all."""
        tensors: dict[str, Tensor] = {}
        for name, moment in self.moments.items():
            parts = {"total": moment.total, "rows": moment.rows, "gram": moment.gram}
            tensors |= {f"{name}.{part}": value.contiguous() for part, value in parts.items() if value is not None}
        metadata = {
            "format": FORMAT,
            "base": self.base,
            "fingerprint": self.fingerprint,
            "texts": str(self.texts),
            "tokens": str(self.tokens),
            "kind": self.kind,
            "layers": json.dumps({name: asdict(layer) for name, layer in self.layers.items()}),
            "counts": json.dumps({name: moment.count for name, moment in self.moments.items()}),
        }
        with staged_file(Path(path)) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read a file that `save` wrote.

        Raises LoraloomError telling what is wrong with it: absent, half-written, of another format, shapes that do
        not fit, values that are not finite or that no rows could have given: it may come from anyone.
        """
        path, again = Path(path), "collect the statistics again"
        if not path.is_file():
            raise LoraloomError(f"{path}: no such file", "name a file that was saved as statistics")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except SafetensorError as error:
            raise LoraloomError(f"{path}: cannot be read ({error}): half-written?", again) from error
        if metadata.get("format") != FORMAT:
            found = metadata.get("format")
            raise LoraloomError(f"{path}: not a statistics file: its format is {found!r}, not {FORMAT!r}", again)
        try:
            layers = {name: Layer(**fields) for name, fields in json.loads(metadata["layers"]).items()}
            counts = {str(name): int(count) for name, count in json.loads(metadata["counts"]).items()}
            texts, tokens = int(metadata["texts"]), int(metadata["tokens"])
            base, fingerprint, kind = metadata["base"], metadata["fingerprint"], _kind(metadata["kind"])
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise LoraloomError(f"{path}: its metadata is damaged ({error!r})", again) from error
        raise_problems(str(path), _faults(layers, counts, tensors), again)
        moments = {
            name: Moment(count, tensors[f"{name}.total"], tensors.get(f"{name}.rows"), tensors.get(f"{name}.gram"))
            for name, count in counts.items()
        }
        faults = [f"{name}: {fault}" for name, moment in moments.items() for fault in moment.faults()]
        raise_problems(str(path), faults, "do not use this file: no layer inputs give it; ask for it again")
        return cls(base, fingerprint, moments, layers, texts, tokens, kind)

    @property
    def _name(self) -> str:
        return f"{self.base} ({self.texts} texts)"

    def _check_fit(self, other: Statistics) -> None:
        problems = []
        for what in ("fingerprint", "kind"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if mine != theirs:
                problems.append(f"{what}: {self._name} has {mine}, {other._name} has {theirs}")
        for name in sorted(self.layers.keys() | other.layers.keys()):
            mine, theirs = self.layers.get(name), other.layers.get(name)
            if mine != theirs:
                problems.append(f"layer {name}: {self._name} has {mine}, {other._name} has {theirs}")
        raise_problems(
            "these statistics do not fit together",
            problems,
            "collect both on one base, target_modules and kind of rows",
        )


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    target_modules: str | Sequence[str],
    *,
    rows: Kind = "token",
    labelled_only: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Statistics:
    """Run `model` over `batches` and return the statistics of the inputs of the layers that `target_modules` names.

    `batches` are dicts of tensors as a Hugging Face collator makes them. `target_modules` is PEFT's: a list of path
    endings, a regular expression, or "all-linear" (heads left out). A PeftModel runs with its adapters off: the base
    is seen. Padding never counts; with `labelled_only`, neither do tokens (of the decoder, or the only stack) whose
    label is -100. `rows` is what a row is: a token, or the mean over a sample's tokens. `progress` is called after
    each batch with the number of texts so far. Gram sums are kept on the model's device: 8 n^2 bytes an input.

    Raises LoraloomError for targets that match nothing or are never called, a batch whose masks do not fit, values
    that are not finite, and where no row was seen.
    """
    collector = _Collector(base_model(model), target_modules, rows, labelled_only)
    with base_running(model):
        for batch in batches:
            collector.add(batch)
            if progress is not None:
                progress(collector.texts)
    return collector.statistics()


class _Collector:
    """Takes batches one by one; the first one shows which layers read the same tensor."""

    def __init__(self, base: nn.Module, target_modules: str | Sequence[str], kind: Kind, labelled_only: bool) -> None:
        self.base, self.kind, self.labelled_only = base, kind, labelled_only
        self.reader = LayerReader(base, target_layers(base, target_modules))
        self.device = next(base.parameters()).device
        self.pad = getattr(getattr(base, "config", None), "pad_token_id", None)
        self.leaders: dict[str, str] = {}
        self.sums: dict[str, RowSum] = {}
        self.batches = self.texts = self.tokens = 0

    def add(self, batch: Mapping[str, Any]) -> None:
        self.batches += 1
        here = f"batch {self.batches}"
        tensors = {key: value.to(self.device) for key, value in batch.items() if isinstance(value, Tensor)}
        two_sided = self.reader.encoder is not None
        try:
            encoder, decoder = batch_sides(tensors, two_sided=two_sided, pad=self.pad, labelled_only=self.labelled_only)
        except ValueError as error:
            raise LoraloomError(f"{here}: {error}", "give batches as the tokenizer and collator make them") from error
        if not self.leaders:
            self.leaders = shared_inputs(self.reader, tensors)
            self.sums = {name: RowSum(self._shape(name)[0]) for name in dict.fromkeys(self.leaders.values())}

        def see(name: str, x: Tensor) -> None:
            side = encoder if self.reader.in_encoder(name, x) else decoder
            try:
                self.sums[name].add(side.rows(x, self.kind))
            except ValueError as error:
                raise LoraloomError(f"{here}: {name} reads {error}", "look at this batch and at the model") from error

        self.reader.run(tensors, see, list(self.sums))
        self.texts += encoder.mask.shape[0]
        self.tokens += encoder.tokens.shape[0] + (decoder.tokens.shape[0] if two_sided else 0)

    def statistics(self) -> Statistics:
        empty = [name for name, total in self.sums.items() if total.count == 0]
        if empty or not self.batches:
            what = f"{', '.join(empty)}: no token counts" if empty else "there is no batch"
            raise LoraloomError(f"no statistics: {what}", "give texts with at least one token that counts")
        moments = {name: total.moment() for name, total in self.sums.items()}
        layers = {name: Layer(self.leaders[name], *self._shape(name)) for name in self.reader.layers}
        print_of_base = fingerprint(self.base, layers)
        return Statistics(model_name(self.base), print_of_base, moments, layers, self.texts, self.tokens, self.kind)

    def _shape(self, name: str) -> tuple[int, int]:
        return layer_shape(self.reader.layers[name])


def fingerprint(model: nn.Module, layers: Iterable[str]) -> str:
    """Return a sha256 over paths, shapes and a sample of the weights of `layers` (module paths) of the base model.

    Values are rounded to bfloat16, so a float32 and a bfloat16 load of one base agree; a float16 load may not.
    Quantised weights are known by their packed bytes, and so differ from the unquantised ones. Heads, other layers
    and PEFT's wrapping do not matter. Raises LoraloomError where a layer is not there.
    """
    present = linear_layers(unwrapped(model))
    sha = hashlib.sha256()
    for name in sorted(layers):
        if name not in present:
            raise LoraloomError(f"{name}: no linear layer of {model_name(model)}", did_you_mean(name, present))
        weight = present[name].weight
        assert isinstance(weight, Tensor)
        # an odd stride, so that the sample runs over all columns of a weight whose width is a power of two
        sample = weight.detach().flatten()[:: weight.numel() // _SAMPLED | 1].cpu()
        if sample.is_floating_point():
            sample = sample.to(torch.bfloat16)
        sha.update(f"{name} {layer_shape(present[name])}\n".encode())
        sha.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _kind(text: str) -> Kind:
    for kind in get_args(Kind):
        if text == kind:
            return cast(Kind, kind)
    raise ValueError(f"kind {text!r} is neither 'token' nor 'sample'")


def _faults(layers: Mapping[str, Layer], counts: Mapping[str, int], tensors: Mapping[str, Tensor]) -> list[str]:
    """Tell what in a statistics file does not fit together."""
    problems = [
        f"layer {name}: input {layer.input!r} has no moment"
        for name, layer in layers.items()
        if layer.input not in counts
    ]
    known = set()
    for name, count in counts.items():
        if count < 0:
            problems.append(f"{name}: {count} rows")
        widths = {layer.in_features for layer in layers.values() if layer.input == name}
        parts = {part: tensors.get(f"{name}.{part}") for part in ("total", "rows", "gram")}
        known |= {f"{name}.{part}" for part in parts}
        if len(widths) != 1:
            problems.append(f"{name}: read by layers of widths {sorted(widths)}, not of one")
            continue
        n = widths.pop()
        shapes = {part: None if value is None else tuple(value.shape) for part, value in parts.items()}
        if shapes not in (
            {"total": (n,), "rows": (count, n), "gram": None},
            {"total": (n,), "rows": None, "gram": (n, n)},
        ):
            problems.append(f"{name}: {shapes} does not fit {count} rows of width {n}")
        for part, value in parts.items():
            dtype = torch.float32 if part == "rows" else torch.float64
            if value is not None and value.dtype != dtype:
                problems.append(f"{name}.{part}: is {value.dtype}, not {dtype}")
            if value is not None and not torch.isfinite(value).all():
                problems.append(f"{name}.{part}: holds values that are not finite")
    return problems + [f"tensor {name} belongs to no input" for name in sorted(tensors.keys() - known)]
