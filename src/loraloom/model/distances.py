"""How far one model's outputs are from another's, text by text, and the unit of a task in which that is told.

`own` are the outputs of a task's single model, which is the teacher; `merged` those of another for the same texts:

    classes:  KL(p_own || p_merged), against the mean KL(p_own || mean p_own)
    numbers:  |own - merged|^2, against the variance of own; the features that a head reads are numbers too
    answers:  KL(p_own || p_merged) a token, against that of the base model, KL(p_own || p_base)

All is differentiable in `merged`, in the dtype that is given.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LIKELIEST = 64  # words of a vocabulary that are told apart; the others count together
SILENT = 1e-6  # nats a token by which an adapter changes its base, below which it changes nothing
_ROUNDING = 1e-12  # outputs that vary by less, squared and relative, are alike
_FLOOR = math.log(1e-12)  # of a chance below which float32 logits tell nothing


def squares(own: Tensor, merged: Tensor) -> Tensor:
    """Return (k,): the squared distances of rows (k, d)."""
    return (own - merged).square().sum(dim=1)


def divergences(own: Tensor, merged: Tensor) -> Tensor:
    """Return (k,): KL(p_own || p_merged) in nats, of logits (k, classes)."""
    own = own.log_softmax(dim=1)
    return (own.exp() * (own - merged.log_softmax(dim=1))).sum(dim=1)


def outputs_apart(own: Tensor, merged: Tensor) -> Tensor:
    """Return (k,): how far a head's outputs are apart, text by text; (k, 1) are numbers, (k, classes) logits."""
    return squares(own, merged) if own.shape[1] == 1 else divergences(own, merged)


def variance(own: Tensor) -> float | None:
    """Return the mean of |row - mean row|^2 of (k, d), float64; None where all rows are alike."""
    own = own.double()
    found = float(squares(own, own.mean(dim=0, keepdim=True)).mean())
    return found if found > _ROUNDING * float(own.square().sum(dim=1).mean()) else None


def output_unit(own: Tensor) -> float | None:
    """Return how far a head's outputs (k, 1 or classes) are from their mean, on average; None where they are alike."""
    if own.shape[1] == 1:
        return variance(own)
    p = own.double().softmax(dim=1)
    mean = p.mean(dim=0, keepdim=True).clamp_min(1e-300).log()
    found = float(divergences(own.double(), mean.expand_as(p)).mean())
    return found if found > _ROUNDING else None


def likeliest(logits: Tensor) -> Tensor:
    """Return (tokens, words) int64: the words of a vocabulary that (tokens, vocabulary) logits find likeliest."""
    return logits.topk(min(LIKELIEST, logits.shape[-1]), dim=-1).indices


def log_chances(logits: Tensor, words: Tensor) -> Tensor:
    """Return (tokens, words + 1): the log of each word's chance, and of that of all the rest together.

    logits: (tokens, vocabulary). words: (tokens, words). No divergence grows by putting the rest together, and what it
    loses is bounded by the rest's share, which is small where a model is sure.
    """
    total = logits.logsumexp(dim=-1, keepdim=True)
    others = logits.scatter(-1, words, torch.finfo(logits.dtype).min / 2).logsumexp(dim=-1, keepdim=True)
    return (torch.cat([logits.gather(-1, words), others], dim=-1) - total).clamp_min(_FLOOR)


def words_apart(own: Tensor, merged: Tensor) -> Tensor:
    """Return (tokens,): KL(p_own || p_merged) in nats of what `log_chances` returns."""
    return (own.exp() * (own - merged)).sum(dim=1)
