"""What the layers of a base model see of texts: sums over one forward pass, shared by input, of all processes."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.errors import LoraloomError, collecting, did_you_mean
from loraloom.model.layers import (
    LayerReader,
    base_model,
    base_running,
    layer_shape,
    linear_layers,
    model_name,
    shared_inputs,
    target_layers,
    unwrapped,
)
from loraloom.model.processes import gathered, raise_of_all, rank_and_size
from loraloom.model.tokens import batch_sides
from loraloom.model.wrappers import each_weight, whole
from loraloom.settings import Kind
from loraloom.statistics.file import Layer, Statistics
from loraloom.statistics.moments import Moment, pooled, sketched
from loraloom.statistics.privacy import clipped
from loraloom.statistics.sketch import FrequentDirections
from loraloom.statistics.stored import free_memory

_BLOCK = 2048  # rows of one float32 product, which is added up in float64: so many round to 2e-6 at most
_STRIPS = 4  # column strips of a Gram matrix: 5/8 of the products of the whole
_SAMPLED = 4096  # values of each weight that the fingerprint reads


class RowSum:
    """Sums rows (k, n) of one input: the rows themselves while they are fewer than n, their Gram matrix after that.

    With `directions` below n no more than so many rows are left: the rows themselves while they are no more, frequent
    directions after that (`FrequentDirections`). A Gram matrix G is a sum in float64 of float32 products of at most
    2048 rows, in about half the time of float64 ones: entry ij is off by 2e-6 sqrt(G_ii G_jj) at most, for the rounding
    of an entry goes with the sizes of its own two inputs, however loud others are. All is kept on the rows' device, and
    nothing is read from it while rows are added.
    """

    def __init__(self, width: int, directions: int | None = None) -> None:
        self.width = width
        self.count = 0
        self.total: Tensor | None = None
        self._bad: Tensor | None = None  # the first batch that was not finite
        self._sketch = FrequentDirections(width, directions) if directions is not None and directions < width else None
        self._gram: Tensor | None = None
        self._waiting: list[Tensor] = []
        self._held = 0

    def add(self, rows: Tensor, batch: int = 1) -> None:
        """Add `rows` (k, n) float32 of the batch of this number, from 1."""
        total = rows.sum(dim=0, dtype=torch.float64) if self._sketch is not None else _total(rows)
        bad = torch.where(total.isfinite().all(), 0, batch)
        self._bad = bad if self._bad is None else torch.where(self._bad == 0, bad, self._bad)
        self.total = total if self.total is None else self.total + total
        self.count += rows.shape[0]
        if self._sketch is not None:
            self._sketch.add(rows)
            return
        self._waiting.append(rows)
        self._held += rows.shape[0]
        if self._held >= (self.width if self._gram is None else _BLOCK):
            self._fold()

    def bad_batch(self) -> int:
        """Return the number of the first batch with rows that are not finite, or 0. Waits for the device."""
        return 0 if self._bad is None else int(self._bad)

    def moment(self) -> Moment:
        """Return the moment of all rows so far, on the CPU."""
        if self._sketch is not None and self.total is not None:
            factor, as_they_came = self._sketch.result()
            if as_they_came:
                return Moment.of_rows(factor)
            return Moment(self.count, self.total.cpu(), factor=factor.cpu(), lost=float(self._sketch.lost))
        if self._gram is None:
            return Moment.of_rows(torch.cat(self._waiting) if self._waiting else torch.zeros(0, self.width))
        if self._waiting:
            self._fold()
        assert self.total is not None
        half = self._gram.cpu().triu()
        return Moment(self.count, self.total.cpu(), gram=half + half.triu(1).T)

    def _fold(self) -> None:
        waiting = torch.cat(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
        self._waiting, self._held = [], 0
        if self._gram is None:
            self._gram = waiting.new_zeros(self.width, self.width, dtype=torch.float64)
        step = -(-self.width // _STRIPS)
        for block in _blocks(waiting):
            for start in range(0, self.width, step):  # on and above the diagonal alone: the rest is its mirror image
                end = min(start + step, self.width)
                self._gram[:end, start:end] += block[:, :end].T @ block[:, start:end]


def _total(rows: Tensor) -> Tensor:
    """Return the sum of rows (k, n), (n,) float64, rounded as their Gram matrix is: ten times as fast as exactly."""
    sums = [block.new_ones(len(block)) @ block for block in _blocks(rows)]
    return torch.stack(sums).sum(dim=0, dtype=torch.float64)


def _blocks(rows: Tensor) -> list[Tensor]:
    return [rows[start : start + _BLOCK] for start in range(0, max(len(rows), 1), _BLOCK)]


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    target_modules: str | Sequence[str],
    *,
    kind: Kind = "token",
    directions: int | None = None,
    clip: float | None = None,
    progress: Callable[[int], None] | None = None,
) -> Statistics:
    """Run `model` over `batches` and return the statistics of the inputs of the layers that `target_modules` names.

    model: a transformers model, or a PeftModel, which runs with its adapters off: the base is seen.
    batches: dicts of tensors as a Hugging Face collator makes them. Padding never counts, nor do tokens that a bool
        `counted` beside them leaves out, of the decoder or the only stack; the model is not given it.
    target_modules: PEFT's: a list of path endings, a regular expression, or "all-linear" (heads left out).
    kind: what a row is: a "token", or for a "sample" the mean over its tokens.
    directions: R, the directions kept of an input with more rows, by `FrequentDirections`, with the error told in
        `lost`; None keeps them all. Inputs with R rows or fewer are as without it.
    clip: the norm to which longer rows are scaled down, as `add_noise` needs them.
    progress: called after each batch with the number of texts so far.

    Sums are kept on the model's device, and nothing is read back from it but the places of a batch's tokens: a Gram
    matrix of 8 n^2 bytes an input n wide or, with `directions` R below n, 2R rows of 4 n bytes, of which R are left.

    In a torch.distributed process group every process has to call this, each with batches of its own: the statistics
    that all of them return are those of all batches. Equal batches on two processes count twice; a model under FSDP
    needs as many on each.

    Raises LoraloomError for targets that match nothing or are never called, a batch whose masks do not fit, values
    that are not finite (looked for at batches 1, 2, 4, 8, ... and the last), and where no row was seen.
    """
    collector = _Collector(model, target_modules, kind, directions, clip)
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
        directions: int | None,
        clip: float | None,
    ) -> None:
        self.clip = clip
        self.model, self.kind, self.directions = model, kind, directions
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
        counted = tensors.pop("counted", None)
        two_sided = self.reader.encoder is not None
        try:
            encoder, decoder = batch_sides(tensors, two_sided=two_sided, pad=self.pad, counted=counted)
        except ValueError as error:
            raise LoraloomError(f"{here}: {error}", "give batches as the tokenizer and collator make them") from error
        if not self.leaders:
            self.leaders = shared_inputs(self.reader, tensors)
            names = dict.fromkeys(self.leaders.values())
            self.sums = {name: RowSum(self._shape(name)[0], self.directions) for name in names}
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
        return (
            pooled(moments)
            if self.directions is None or self.directions >= width
            else sketched(moments, self.directions)
        )

    def _warn_of_memory(self) -> None:
        needed, free = sum(8 * total.width**2 for total in self.sums.values()), _free_memory(self.device)
        if self.directions is None and needed > free:
            warnings.warn(
                f"Gram matrices of {len(self.sums)} inputs take {needed / 1e9:.1f} GB once each has as many rows as it "
                f"is wide, and {free / 1e9:.1f} GB are free: keep the loudest by directions=256 (--directions 256)",
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


def _free_memory(device: torch.device) -> float:
    """Return the bytes that are free on `device`; infinity where the system does not tell."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return free_memory() if device.type == "cpu" else math.inf
