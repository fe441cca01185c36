"""The rule that trains: the factors of a merge, by the answers of each single adapter to unlabelled texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from loraloom.adapters.lowrank import Shared, svd_factors, truncate_dense
from loraloom.adapters.update import Update
from loraloom.errors import LoraloomError, raise_problems
from loraloom.files.hashing import layer_seed
from loraloom.merging.distillation import Distiller, Distilling, Loss
from loraloom.merging.registry import Result, get_rule, rule

Start = Annotated[str, Field(description="rule that merges first, of those that need the adapters alone")]
Steps = Annotated[
    int | None,
    Field(
        gt=0,
        description="steps at most; without it those that read 10,000 texts in all, 400 at most, "
        "or 60 where answers are written",
    ),
]
Lossed = Annotated[Loss, Field(description="outputs, features that a head reads, or both")]
Batch = Annotated[
    int | None, Field(gt=0, description="texts of a task a step; without it 8, and 4 where answers are written")
]
Rate = Annotated[
    float | None, Field(gt=0, description="learning rate; without it 2e-3, and 5e-4 where answers are written")
]


@rule(
    "distil",
    formula="min over A, B of Σ distance(task's own model, merged model)",
    paper="loraloom; after Hinton et al. 2015, arXiv 1503.02531",
    summary="merge by another rule, then train that to answer unlabelled texts as each single adapter does",
    cost="about that of training one more adapter",
    exact=True,
)
def distil(
    layers: Mapping[str, Sequence[Update]],
    *,
    distiller: Distiller,
    generator: torch.Generator,
    rank: int | None,
    start: Start = "tsv",
    start_scale: Annotated[float, Field(description="scale of that rule's result")] = 0.5,
    steps: Steps = None,
    loss: Lossed = "output",
    batch_size: Batch = None,
    learning_rate: Rate = None,
) -> dict[str, Result]:
    """Return the factors of a merge, trained on unlabelled texts by the outputs of the single adapters.

    The start is truncated to the asked rank, or to the sum of the ranks, and factored as U S^(1/2), S^(1/2) V^T. AdamW
    at a falling rate then takes steps down the mean over tasks of the distance to the task's own adapter, each in a
    unit of its own (model/distances.py), so that none is drowned: of the head's outputs, or of the features that the
    head reads, or both. Answers that are written have outputs alone: token by token, on the single adapter's own greedy
    answers. No label is read, and heads stay as they are. A slice of the texts is held out; the checkpoint that is
    nearest on it is kept, and a distance that stays flat ends the training. Raises LoraloomError for a start that needs
    more than the adapters.
    """
    seed = int(torch.randint(1 << 31, (1,), generator=generator))
    merged = _given(distiller.start, layers) if distiller.start else _merged(layers, start, start_scale, seed)
    whole = {module: rank or sum(update.rank for update in updates) for module, updates in layers.items()}
    balanced = {module: _balanced(result, whole[module]) for module, result in merged.items()}
    return dict(distiller.train(balanced, Distilling(steps, loss, batch_size, learning_rate), seed))


def _merged(layers: Mapping[str, Sequence[Update]], name: str, scale: float, seed: int) -> dict[str, Result]:
    """Return the layers merged by another rule."""
    found = get_rule(name)
    if found.name == "distil" or set(found.needs) - {"seed"}:
        what = ", ".join(found.needs)
        raise LoraloomError(
            f"distil cannot start from rule {name!r}, which needs {what}",
            "merge by it, then `loraloom distil` that",
        )
    options, _ = found.check({})
    if all(len(updates) == 1 for updates in layers.values()):
        scale = 1.0  # a single adapter is not merged down
    results: dict[str, Result] = {}
    for module, updates in layers.items():
        result = found.layer(updates, options, seed=layer_seed(seed, module))
        update = result.update() if isinstance(result, Shared) else result
        results[module] = scale * update if isinstance(update, Tensor) else Update(scale * update.B, update.A)
    return results


def _given(start: Mapping[str, Update], layers: Mapping[str, Sequence[Update]]) -> dict[str, Result]:
    """Return a merged adapter to start from. Raises LoraloomError where it is none of these adapters' layers."""
    problems = [f"{module}: none of the adapters has this layer" for module in start if module not in layers]
    problems += [f"{module}: the start lacks it" for module in layers if module not in start]
    problems += [
        f"{module}: the start is {tuple(start[module].shape[:2])}, the adapters are {tuple(updates[0].shape[:2])}"
        for module, updates in layers.items()
        if module in start and start[module].shape[:2] != updates[0].shape[:2]
    ]
    raise_problems("the merged adapter cannot be distilled", problems, "name the adapters that were merged")
    return dict(start)


def _balanced(result: Result, rank: int) -> Update:
    """Return dW in factors of equal size, U S^(1/2) and S^(1/2) V^T, of so many singular triples at most."""
    if isinstance(result, Tensor):
        result = truncate_dense(result, rank)[0]
    U, S, Vh = svd_factors(result.update() if isinstance(result, Shared) else result)
    root = S[:rank].sqrt()
    return Update((U[:, :rank] * root).float().contiguous(), (root[:, None] * Vh[:rank]).float().contiguous())
