"""Alignment of heads against least squares, and the properties that its formula promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loraloom.adapters.heads import Head, align_head, align_heads
from loraloom.errors import LoraloomError

D, K, OUT = 12, 80, 3


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head(seed: int = 0, *, bias: bool = True, width: int = D) -> Head:
    tensors = {"score.weight": normal(seed, OUT, width).float()}
    if bias:
        tensors["score.bias"] = normal(seed + 1, OUT).float()
    return Head.of(tensors)


def test_against_the_augmented_least_squares() -> None:
    """(C + eI)^-1 (Fm'Fo + eI) minimises |Fm W - Fo|^2 + e |W - I|^2: lstsq on the stacked system finds the same."""
    own, merged = normal(0, K, D) + 2, normal(1, K, D) - 1
    Fo, Fm = own - own.mean(0), merged - merged.mean(0)
    e = 0.3 * float(Fm.square().sum()) / D
    stacked = torch.cat([Fm, e**0.5 * torch.eye(D, dtype=torch.float64)])
    wanted = torch.cat([Fo, e**0.5 * torch.eye(D, dtype=torch.float64)])
    W = torch.linalg.lstsq(stacked, wanted).solution
    kept = head()
    mapped = (merged - merged.mean(0)) @ W + own.mean(0)
    expected = mapped @ kept.weight.double().T + kept.bias.double()
    found = align_head(kept, own.float(), merged.float(), ridge=0.3).logits(merged.float())
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("rows", [5, K])
@pytest.mark.parametrize("ridge", [1e-6, 0.1, 100.0])
def test_identical_features_give_the_identical_head(rows: int, ridge: float) -> None:
    features, kept = normal(0, rows, D).float(), head()
    found = align_head(kept, features, features, ridge=ridge)
    assert (found.weight - kept.weight).norm() < 1e-5 * kept.weight.norm()
    assert (found.bias - kept.bias).norm() < 1e-5 * kept.bias.norm()


@pytest.mark.parametrize("bias", [True, False])
def test_an_affine_distortion_is_undone_as_the_ridge_vanishes(bias: bool) -> None:
    own, kept = normal(0, K, D), head(bias=bias)
    merged = own @ (torch.eye(D, dtype=torch.float64) + 0.3 * normal(1, D, D)) + normal(2, D)
    errors = []
    for ridge in (1e-1, 1e-3, 1e-5, 1e-9):
        found = align_head(kept, own.float(), merged.float(), ridge=ridge).logits(merged.float())
        reference = kept.logits(own.float())
        errors.append(float((found - reference).norm() / reference.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4


def test_an_infinite_ridge_leaves_the_shift_of_the_mean() -> None:
    own, merged, kept = normal(0, K, D), normal(1, K, D) + 3, head()
    found = align_head(kept, own, merged, ridge=1e12)
    assert (found.weight - kept.weight).norm() < 1e-5
    shift = kept.weight.double() @ (own.mean(0) - merged.mean(0))
    assert (found.bias - kept.bias - shift).norm() < 1e-5


def test_more_features_than_rows_and_constant_features() -> None:
    own, merged, kept = normal(0, 4, 50), normal(1, 4, 50), head(width=50)
    found = align_head(kept, own, merged, ridge=1e-8)
    reference = kept.logits(own.float())
    assert (found.logits(merged.float()) - reference).norm() < 1e-3 * reference.norm()
    constant = torch.ones(K, D)
    moved = align_head(head(), 2 * constant, constant)
    assert (moved.logits(constant) - head().logits(2 * constant)).abs().max() < 1e-5


LAYERS: dict[str, tuple[dict[str, Tensor], str]] = {
    "roberta": (
        {
            "classifier.dense.weight": normal(0, D, D),
            "classifier.dense.bias": normal(1, D),
            "classifier.out_proj.weight": normal(2, OUT, D),
            "classifier.out_proj.bias": normal(3, OUT),
        },
        "classifier.out_proj",
    ),
    "t5": (
        {
            "classification_head.dense.weight": normal(0, D, D),
            "classification_head.out_proj.weight": normal(2, D, D),  # as many labels as features
            "classification_head.out_proj.bias": normal(3, D),
        },
        "classification_head.out_proj",
    ),
    "distilbert": (
        {"pre_classifier.weight": normal(0, D, D), "classifier.weight": normal(1, OUT, D)},
        "classifier",
    ),
    "fresh pooler": (
        {"bert.pooler.dense.weight": normal(0, D, D), "classifier.weight": normal(1, OUT, D)},
        "classifier",
    ),
    "llama": ({"score.weight": normal(0, OUT, D)}, "score"),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_last_layer_alone_changes(kind: str) -> None:
    tensors, last = LAYERS[kind]
    kept = Head.of(tensors)
    assert kept.last == last
    own, merged = normal(4, K, D), normal(5, K, D)
    found = align_head(kept, own, merged)
    assert found.tensors.keys() == kept.tensors.keys() | {f"{last}.bias"}
    for path, tensor in kept.tensors.items():
        assert torch.equal(found.tensors[path], tensor) != path.startswith(f"{last}.")
        assert tensor.dtype == torch.float32


def test_align_heads_by_task() -> None:
    heads = {"a": head(0), "b": head(7)}
    own = {"a": normal(0, K, D), "b": normal(1, K, D)}
    merged = {"a": normal(2, K, D), "b": normal(3, K, D)}
    found = align_heads(heads, own, merged, ridge=0.2)
    for task in heads:
        alone = align_head(heads[task], own[task], merged[task], ridge=0.2)
        assert torch.equal(found[task].weight, alone.weight)


def test_refusals() -> None:
    with pytest.raises(LoraloomError, match="brings no head"):
        Head.of({})
    with pytest.raises(LoraloomError, match="not of the same rows"):
        align_head(head(), normal(0, 5, D), normal(0, 6, D))
    with pytest.raises(LoraloomError, match="reads 12 features"):
        align_head(head(), normal(0, 5, D + 1), normal(0, 5, D + 1))
