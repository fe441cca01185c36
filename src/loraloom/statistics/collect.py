"""What the layers of the base model see on a task's texts: one forward pass, shared by input, additive, one file."""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from loraloom.errors import LoraloomError, collecting, did_you_mean, raise_problems
from loraloom.model.layers import (
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
from loraloom.model.processes import gathered, raise_of_all, rank_and_size
from loraloom.model.wrappers import each_weight, whole
from loraloom.statistics.file import StoredMoments, read_metadata, save_moments
from loraloom.statistics.moments import Moment, pooled, sketched
from loraloom.statistics.privacy import clipped

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
    "sample", the mean over a sample's tokens. `fingerprint` is that of the base weights. Moments of a file are read
    from it at each access. `privacy` tells what was done for the texts' sake: the norm `clip` to which rows were
    clipped, and `epsilon` and `delta` of the noise added (`loraloom.statistics.privacy`).
    """

    base: str
    fingerprint: str
    moments: Mapping[str, Moment]
    layers: dict[str, Layer]
    texts: int
    tokens: int
    kind: Kind
    privacy: dict[str, float] | None = None

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

        Raises LoraloomError where they are not of one kind, `other` has more rows, or noise was added.
        """
        self._check_fit(other)
        if self.privacy and "epsilon" in self.privacy:
            raise LoraloomError(f"{self._name}: noise was added, which no difference takes off", "subtract before it")
        more = [name for name, moment in self.moments.items() if other.moments[name].count > moment.count]
        if more or other.texts > self.texts or other.tokens > self.tokens:
            raise LoraloomError(f"{other._name} is no part of {self._name}: it has more rows", "swap the two")
        moments = {name: moment - other.moments[name] for name, moment in self.moments.items()}
        return replace(self, moments=moments, texts=self.texts - other.texts, tokens=self.tokens - other.tokens)

    def limit_rows(self, most: int) -> Statistics:
        """Return these statistics without the rows of any input that has more than `most`; 0 leaves sums alone.

        The sums are then a root of the Gram matrix: singular values times right vectors, which say the same.
        """
        moments = {name: moment if moment.count <= most else moment.turned() for name, moment in self.moments.items()}
        return replace(self, moments=moments)

    def limit_rank(self, most: int) -> Statistics:
        """Return these statistics with the `most` loudest directions of each input; see `Moment.limit_rank`."""
        return replace(self, moments={name: moment.limit_rank(most) for name, moment in self.moments.items()})

    def inputs_with_rows(self) -> int:
        """Return the number of inputs whose rows are held as the layer read them."""
        return sum(moment.rows is not None for moment in self.moments.values())

    def contents(self) -> dict[str, Any]:
        """Tell what a file of these statistics holds, and so hands to whoever reads it."""
        raw, thin, shares = [], [], [0.0]
        for moment in self.moments.values():
            raw += [] if moment.rows is None else [moment.count]
            thin += [] if moment.factor is None else [len(moment.factor)]
            shares += [moment.lost / max(moment.largest(), 1e-300)] if moment.lost else []
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
            "inputs with directions": len(thin),
            "directions": max(thin, default=0),
            "inputs with a Gram matrix": len(self.moments) - len(raw) - len(thin),
            "left out, of the largest eigenvalue, at most": float(f"{max(shares):.3g}"),
            "widths": sorted({moment.width for moment in self.moments.values()}),
            "privacy": self.privacy or "rows not clipped, no noise",
        }

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all."""
        metadata = {
            "format": FORMAT,
            "base": self.base,
            "fingerprint": self.fingerprint,
            "texts": str(self.texts),
            "tokens": str(self.tokens),
            "kind": self.kind,
            "layers": json.dumps({name: asdict(layer) for name, layer in self.layers.items()}),
            **({"privacy": json.dumps(self.privacy)} if self.privacy else {}),
        }
        save_moments(self.moments, Path(path), metadata)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read a file that `save` wrote.

        Raises LoraloomError telling what is wrong with it: absent, half-written, of another format, shapes that do
        not fit, values that are not finite or that no rows could have given: it may come from anyone.
        """
        path, again = Path(path), "collect the statistics again"
        metadata = read_metadata(path)
        if metadata.get("format") != FORMAT:
            found = metadata.get("format")
            raise LoraloomError(f"{path}: not a statistics file: its format is {found!r}, not {FORMAT!r}", again)
        try:
            layers = {name: Layer(**fields) for name, fields in json.loads(metadata["layers"]).items()}
            moments = StoredMoments.of(path, metadata)
            texts, tokens = int(metadata["texts"]), int(metadata["tokens"])
            base, fingerprint, kind = metadata["base"], metadata["fingerprint"], _kind(metadata["kind"])
            told = json.loads(metadata.get("privacy", "{}"))
            privacy = {str(what): float(value) for what, value in told.items()} or None
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise LoraloomError(f"{path}: its metadata is damaged ({error!r})", again) from error
        widths: dict[str, set[int]] = {}
        for layer in layers.values():
            widths.setdefault(layer.input, set()).add(layer.in_features)
        moments.check(widths)
        return cls(base, fingerprint, moments, layers, texts, tokens, kind, privacy)

    @property
    def _name(self) -> str:
        return f"{self.base} ({self.texts} texts)"

    def _check_fit(self, other: Statistics) -> None:
        problems = []
        for what in ("fingerprint", "kind", "privacy"):
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
    bound: int | None = None,
    clip: float | None = None,
    progress: Callable[[int], None] | None = None,
) -> Statistics:
    """Run `model` over `batches` and return the statistics of the inputs of the layers that `target_modules` names.

    `batches` are dicts of tensors as a Hugging Face collator makes them. `target_modules` is PEFT's: a list of path
    endings, a regular expression, or "all-linear" (heads left out). A PeftModel runs with its adapters off: the base
    is seen. Padding never counts; with `labelled_only`, neither do tokens (of the decoder, or the only stack) whose
    label is -100. `rows` is what a row is: a token, or the mean over a sample's tokens. `progress` is called after
    each batch with the number of texts so far.

    Sums are kept on the model's device, and nothing is read back from it but the places of a batch's tokens: a Gram
    matrix of 8 n^2 bytes an input n wide or, with a `bound` R below n, 2R rows of 4 n bytes, of which R are left, with
    the error told in `lost` (`FrequentDirections`). Inputs with R rows or fewer are as without the bound.

    With `clip`, rows longer than it are scaled down to it, as `loraloom.statistics.privacy.add_noise` needs them.

    In a torch.distributed process group every process has to call this, each with batches of its own: the statistics
    that all of them return are those of all batches. Equal batches on two processes count twice; a model under FSDP
    needs as many on each.

    Raises LoraloomError for targets that match nothing or are never called, a batch whose masks do not fit, values
    that are not finite (looked for at batches 1, 2, 4, 8, ... and the last), and where no row was seen.
    """
    collector = _Collector(model, target_modules, rows, labelled_only, bound, clip)
    errors: list[LoraloomError] = []
    with collecting(errors), base_running(model):
        for batch in batches:
            collector.add(batch)
            if progress is not None:
                progress(collector.texts)
        collector.check_finite()
    raise_of_all(errors)
    return collector.statistics()


class _Collector:
    """Takes batches one by one; the first one shows which layers read the same tensor."""

    def __init__(
        self,
        model: nn.Module,
        target_modules: str | Sequence[str],
        kind: Kind,
        labelled_only: bool,
        bound: int | None,
        clip: float | None,
    ) -> None:
        self.clip = clip
        self.model, self.kind, self.labelled_only, self.bound = model, kind, labelled_only, bound
        self.base = base = base_model(model)
        self.reader = LayerReader(model, target_layers(base, target_modules))
        here = (parameter.device for parameter in base.parameters() if not parameter.is_meta)
        self.device = next(here, torch.device("cpu"))  # accelerate moves what a layer reads to where it works
        self.pad = getattr(getattr(base, "config", None), "pad_token_id", None)
        self.leaders: dict[str, str] = {}
        self.sums: dict[str, RowSum] = {}
        self.batches = self.texts = self.tokens = 0

    def add(self, batch: Mapping[str, Any]) -> None:
        self.batches += 1
        here = self._named(self.batches)
        tensors = {key: value.to(self.device) for key, value in batch.items() if isinstance(value, Tensor)}
        two_sided = self.reader.encoder is not None
        try:
            encoder, decoder = batch_sides(tensors, two_sided=two_sided, pad=self.pad, labelled_only=self.labelled_only)
        except ValueError as error:
            raise LoraloomError(f"{here}: {error}", "give batches as the tokenizer and collator make them") from error
        if not self.leaders:
            self.leaders = shared_inputs(self.reader, tensors)
            names = dict.fromkeys(self.leaders.values())
            self.sums = {name: RowSum(self._shape(name)[0], self.bound) for name in names}
            self._warn_of_memory()

        def see(name: str, x: Tensor) -> None:
            side = encoder if self.reader.in_encoder(name, x) else decoder
            try:
                rows = side.rows(x, self.kind)
                self.sums[name].add(rows if self.clip is None else clipped(rows, self.clip), self.batches)
            except ValueError as error:
                raise LoraloomError(f"{here}: {name} reads {error}", "look at this batch and at the model") from error

        self.reader.run(tensors, see, list(self.sums))
        self.texts += encoder.mask.shape[0]
        self.tokens += encoder.tokens.shape[0] + (decoder.tokens.shape[0] if two_sided else 0)

        if self.batches & (self.batches - 1) == 0:
            self.check_finite()

    def check_finite(self) -> None:
        """Raise LoraloomError naming the first batch and layer with rows that are not finite. Waits for the device."""
        bad = [(batch, name) for name, total in self.sums.items() if (batch := total.bad_batch())]
        if bad:
            batch, name = min(bad, key=lambda found: found[0])
            raise LoraloomError(
                f"{self._named(batch)}: {name} reads rows that are not finite", "look at this batch and at the model"
            )

    def statistics(self) -> Statistics:
        """Return the statistics of the batches of all processes."""
        heads = gathered((self.leaders, self.texts, self.tokens))
        # a process without a batch has seen no layer, and still takes part
        leaders = next((leaders for leaders, _, _ in heads if leaders), {})
        moments = {name: self._summed(name) for name in dict.fromkeys(leaders.values())}
        empty = [name for name, moment in moments.items() if moment.count == 0]
        if empty or not moments:
            what = f"{', '.join(empty)}: no token counts" if empty else "there is no batch"
            raise LoraloomError(f"no statistics: {what}", "give texts with at least one token that counts")
        layers = {name: Layer(leaders[name], *self._shape(name)) for name in self.reader.layers}
        print_of_base = fingerprint(self.model, layers)
        texts, tokens = sum(texts for _, texts, _ in heads), sum(tokens for _, _, tokens in heads)
        privacy = None if self.clip is None else {"clip": self.clip}
        return Statistics(model_name(self.base), print_of_base, moments, layers, texts, tokens, self.kind, privacy)

    def _summed(self, name: str) -> Moment:
        """Return one input's moment over all processes; its sums here are given up, so that memory holds one alone."""
        width = self._shape(name)[0]
        moments = gathered(self.sums.pop(name, RowSum(width)).moment())
        return pooled(moments) if self.bound is None or self.bound >= width else sketched(moments, self.bound)

    def _warn_of_memory(self) -> None:
        needed, free = sum(8 * total.width**2 for total in self.sums.values()), _free_memory(self.device)
        if self.bound is None and free is not None and needed > free:
            warnings.warn(
                f"Gram matrices of {len(self.sums)} inputs take {needed / 1e9:.1f} GB once each has as many rows as it "
                f"is wide, and {free / 1e9:.1f} GB are free: bound=256 (--rank 256) keeps the loudest directions alone",
                stacklevel=2,
            )

    def _named(self, batch: int) -> str:
        rank, size = rank_and_size()
        return f"batch {batch}" + (f" of process {rank}" if size > 1 else "")

    def _shape(self, name: str) -> tuple[int, int]:
        return layer_shape(self.reader.layers[name])


def fingerprint(model: nn.Module, layers: Iterable[str]) -> str:
    """Return a sha256 over paths, shapes and a sample of the weights of `layers` (module paths) of the base model.

    Values are rounded to bfloat16, so a float32 and a bfloat16 load of one base agree; a float16 load may not.
    Quantised weights are known by their packed bytes, and so differ from the unquantised ones. Heads, other layers
    and PEFT's wrapping do not matter. Raises LoraloomError where a layer is not there.
    """
    present = linear_layers(unwrapped(model))
    for name in sorted(layers):
        if name not in present:
            raise LoraloomError(f"{name}: no linear layer of {model_name(model)}", did_you_mean(name, present))
    chosen = {name: present[name] for name in sorted(layers)}
    samples = {name: _sample(name, chosen[name], weight) for name, weight in each_weight(model, chosen)}
    sha = hashlib.sha256()
    for name, layer in chosen.items():
        sha.update(f"{name} {layer_shape(layer)}\n".encode())
        sha.update(samples[name])
    return sha.hexdigest()


def _sample(name: str, layer: nn.Module, weight: Tensor) -> bytes:
    """Return a sample of the weight of `layer`, floats rounded to bfloat16."""
    quantised = not weight.is_floating_point() or hasattr(weight, "quant_state")
    if quantised:  # bitsandbytes packs them another way while it works on a CPU, and saves them as they came
        weight = layer.state_dict()["weight"].contiguous().view(torch.uint8)
    elif weight.is_meta or weight.numel() != math.prod(layer_shape(layer)):
        raise LoraloomError(f"{name}: its weight is not whole in this process", "collect before it is taken apart")
    weight = whole(weight.detach())
    # an odd stride, so that the sample runs over all columns of a weight whose width is a power of two
    sample = weight.flatten()[:: weight.numel() // _SAMPLED | 1].cpu()
    if not quantised:
        sample = sample.to(torch.bfloat16)
    return sample.contiguous().view(torch.uint8).numpy().tobytes()


def _free_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on `device`, None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    facts = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: *(\d+) kB", facts.read_text()) if facts.is_file() else None
    return 1024 * int(found[1]) if found and device.type == "cpu" else None


def _kind(text: str) -> Kind:
    for kind in get_args(Kind):
        if text == kind:
            return cast(Kind, kind)
    raise ValueError(f"kind {text!r} is neither 'token' nor 'sample'")
