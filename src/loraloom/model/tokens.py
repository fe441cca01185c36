"""Texts as token batches: cut, sorted by length, padded a batch at a time; and which of their tokens count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loraloom.settings import Kind

if TYPE_CHECKING:
    import datasets

IGNORED = -100  # the label of a token that no loss sees
Encoded = list[dict[str, list[int]]]
Batch = Mapping[str, Tensor]  # model inputs by name


def encode(rows: datasets.Dataset, tokenizer: Any, max_length: int) -> Encoded:
    """Return the token ids of every row, without padding.

    rows: with a column `text_a`, and `text_b` for pairs.
    tokenizer: of transformers, with a padding token.
    max_length: tokens kept of a text, special ones included; never more than the tokenizer says the model takes.
    """
    texts = [list(rows[column]) for column in ("text_a", "text_b") if column in rows.column_names]
    if not len(rows):
        return []
    coded = tokenizer(*texts, truncation=True, max_length=min(max_length, tokenizer.model_max_length))
    return [{key: coded[key][index] for key in coded} for index in range(len(rows))]


def batches(encoded: Encoded, tokenizer: Any, batch_size: int) -> Iterator[tuple[Sequence[int], dict[str, Tensor]]]:
    """Yield (row indices, padded tensors), longest rows first, so that padding is short and memory peaks at once.

    encoded: of `encode`.
    batch_size: rows of a batch, at most.
    """
    order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]["input_ids"]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        padded = tokenizer.pad([encoded[index] for index in chosen], return_tensors="pt")
        yield chosen, dict(padded)


@dataclass(frozen=True)
class Side:
    """The counted tokens of one side of a batch: `mask` (samples, length) bool, with the indices that follow from it.

    `tokens` are the true places of the flattened mask, `samples` their rows in it, `counts` the true places a sample,
    `present` the samples that have any. To find them waits for the device, twice a batch; `rows` does not.
    """

    mask: Tensor
    tokens: Tensor
    samples: Tensor
    counts: Tensor
    present: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Side:
        """Return the side with this bool mask (samples, length)."""
        tokens, counts = mask.flatten().nonzero().squeeze(1), mask.sum(dim=1)
        return cls(mask, tokens, tokens // mask.shape[1], counts, counts.nonzero().squeeze(1))

    def rows(self, x: Tensor, kind: Kind) -> Tensor:
        """Return the counted rows of a layer's input `x` (..., n), float32: one a token, or its mean one a sample.

        An input (samples, n), as of a pooler, has one row a sample in both kinds. Raises ValueError where `x` does
        not fit the mask.
        """
        shape, flat = tuple(x.shape[:-1]), x.reshape(-1, x.shape[-1])
        samples, length = self.mask.shape
        if shape == (samples,):
            return _picked(flat, self.present).float()
        if shape not in ((samples, length), (samples * length,)):
            raise ValueError(f"an input of shape {tuple(x.shape)}, which does not fit a mask {tuple(self.mask.shape)}")
        picked = _picked(flat, self.tokens)
        if kind == "token":
            return picked.float()
        owner, counts = self.samples.to(picked.device), self.counts.to(picked.device)
        sums = torch.zeros(samples, x.shape[-1], dtype=torch.float64, device=picked.device)
        sums.index_add_(0, owner, picked.double())
        return (sums / counts[:, None]).index_select(0, self.present.to(sums.device)).float()


def _picked(flat: Tensor, index: Tensor) -> Tensor:
    rows = flat.index_select(0, index.to(flat.device))
    return rows.cpu() if rows.device.type == "mps" else rows  # mps has no float64


def batch_sides(
    batch: Mapping[str, Tensor], *, two_sided: bool, pad: int | None, counted: Tensor | None = None
) -> tuple[Side, Side]:
    """Return which tokens of `batch` count on the encoder's and on the decoder's side: the same for a single stack.

    batch: model inputs by name.
    two_sided: whether the model has an encoder beside its decoder.
    pad: the padding token of decoder_input_ids; None where there is none.
    counted: (samples, length) bool, leaves tokens out, of the decoder or the only stack; None where none is.

    Raises ValueError telling what is missing or does not fit.
    """
    inputs = batch.get("input_ids", batch.get("inputs_embeds"))
    if inputs is None:
        raise ValueError("neither input_ids nor inputs_embeds is given")
    mask = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
    if "attention_mask" in batch:
        if batch["attention_mask"].shape != mask.shape:
            shape = tuple(batch["attention_mask"].shape)
            raise ValueError(f"attention_mask is {shape}, not (samples, length) = {tuple(mask.shape)}")
        mask = batch["attention_mask"] != 0
    decoder = _decoder_mask(batch, mask, pad) if two_sided else mask
    side = Side.of(decoder if counted is None else decoder & counted)
    return (Side.of(mask) if two_sided else side), side


def token_labels(batch: Mapping[str, Tensor]) -> Tensor | None:
    """Return labels (samples, length) of whole numbers, or None: labels of a class, a score or several classes."""
    labels = batch.get("labels")
    return labels if labels is not None and labels.ndim == 2 and not labels.is_floating_point() else None


def _decoder_mask(batch: Mapping[str, Tensor], mask: Tensor, pad: int | None) -> Tensor:
    if "decoder_attention_mask" in batch:
        return batch["decoder_attention_mask"] != 0
    labels = token_labels(batch)
    if labels is not None:
        return labels != IGNORED
    if "decoder_input_ids" in batch:
        ids = batch["decoder_input_ids"]
        given = torch.ones_like(ids, dtype=torch.bool) if pad is None else ids != pad
        given[:, 0] = True  # T5 starts its decoder with the padding token
        return given
    # T5 and BART as classifiers read the input shifted right: the start, then every token but the last one, whose
    # successor no head reads (with padding it stands there, without it does not)
    start = torch.ones_like(mask[:, :1])
    still_to_come = mask.flip(1).cumsum(1).flip(1) > 0
    return torch.cat([start, mask[:, :-1]], dim=1) & still_to_come
