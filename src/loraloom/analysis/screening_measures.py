"""What is measured of adapters before any detector looks: layer by layer, from Gram matrices of their factors alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraloom.adapters.lowrank import NOISE
from loraloom.adapters.patterns import pattern_values
from loraloom.adapters.update import Adapter, Update
from loraloom.cores import side_by_side
from loraloom.progress import Reporter

MEASURES = (
    *("energy", "sigma", "directions", "concentration", "rank"),
    *("square_a", "square_b", "kurtosis_a", "kurtosis_b", "distinct_a", "aligned_a", "aligned_b"),
)


@dataclass(frozen=True)
class Seen:
    """What was measured of T adapters in L layers; a table is (T, L) float64, NaN where an adapter lacks the layer.

    adapters: by name: the `members` that are judged, and others to compare them with.
    energy: |dW|_F^2. sigma: the largest singular value of dW. rank: singular values above rounding.
    directions: participation ratio of dW's spectrum, (sum s^2)^2 / sum s^4: how many directions it effectively has.
    concentration: s_1^2 / sum s^2.
    square_a, square_b: mean squared entry of the factors as the file has them, alpha/r not folded in.
    kurtosis_a, kurtosis_b: mean fourth power over squared mean square of the entries: 1.8 of uniform ones, 3 of normal.
    distinct_a: participation ratio of A's rows over r: 1 where all are orthogonal and as long.
    aligned_a, aligned_b: largest |cosine| of two rows of A, of two columns of B; NaN at rank 1.
    scaling: alpha/r, or alpha/sqrt(r); NaN where the config does not tell it.
    rows, columns: (T, T), overlap of row spaces of dW and of column spaces, mean over common layers; see `overlaps`.
    cosine: (T, T), <dW_i, dW_j> / |dW_i| |dW_j| over common layers.
    """

    adapters: Mapping[str, Adapter]
    members: Sequence[str]
    layers: Sequence[str]
    energy: Tensor
    sigma: Tensor
    directions: Tensor
    concentration: Tensor
    rank: Tensor
    square_a: Tensor
    square_b: Tensor
    kurtosis_a: Tensor
    kurtosis_b: Tensor
    distinct_a: Tensor
    aligned_a: Tensor
    aligned_b: Tensor
    scaling: Tensor
    rows: Tensor
    columns: Tensor
    cosine: Tensor

    @property
    def names(self) -> list[str]:
        """Return the names of all adapters, in the order of the tables."""
        return list(self.adapters)

    @property
    def ranks(self) -> Tensor:
        """Return the number of rows of A, (T, L)."""
        return _table(self.adapters, self.layers, lambda one, at: float(one.shapes[at].r))

    @property
    def widths(self) -> Tensor:
        """Return n, the width of a layer's input, (T, L)."""
        return _table(self.adapters, self.layers, lambda one, at: float(one.shapes[at].n))


def measure(members: Mapping[str, Adapter], others: Mapping[str, Adapter], reporter: Reporter | None = None) -> Seen:
    """Measure adapters of one base; of a few layers are all in memory at once.

    members, others: by name, none twice.
    """
    adapters = {**members, **others}
    layers = sorted({at for one in adapters.values() for at in one.shapes})
    count = len(adapters)
    tables = {name: torch.full((count, len(layers)), torch.nan, dtype=torch.float64) for name in MEASURES}
    sums = {name: torch.zeros(count, count, dtype=torch.float64) for name in ("rows", "columns", "common", "product")}
    shared = torch.zeros(count, count, dtype=torch.float64)  # the energy of i in the layers that j has too
    scaling = torch.full((count, len(layers)), torch.nan, dtype=torch.float64)
    for i, one in enumerate(adapters.values()):
        found = scalings(one)
        scaling[i] = torch.tensor([found.get(at, torch.nan) for at in layers], dtype=torch.float64)

    def look(column: int) -> tuple[Tensor, list[dict[str, float]], dict[str, Tensor]]:
        """Return which adapters have a layer, what each has there, and what every two have in common."""
        at = layers[column]
        having = [i for i, one in enumerate(adapters.values()) if at in one.shapes]
        updates = [one.updates[at] for one in adapters.values() if at in one.shapes]
        grams = [_Grams.of(update) for update in updates]
        each = zip(updates, grams, scaling[having, column].tolist(), strict=True)
        return torch.tensor(having), [_measured(*one) for one in each], _together(updates, grams)

    columns = (reporter or Reporter(quiet=True)).each("screening", range(len(layers)))
    for column, (place, measured, together) in enumerate(side_by_side(look, columns)):
        for i, found_there in zip(place, measured, strict=True):
            for name, value in found_there.items():
                tables[name][i, column] = value
        for name, values in together.items():
            sums[name][place[:, None], place] += values
        shared[place[:, None], place] += tables["energy"][place, column][:, None]
    norms = (shared * shared.T).sqrt()
    return Seen(
        adapters,
        list(members),
        layers,
        **tables,
        scaling=scaling,
        rows=sums["rows"] / sums["common"],
        columns=sums["columns"] / sums["common"],
        cosine=sums["product"] / norms,
    )


def scalings(adapter: Adapter) -> dict[str, float]:
    """Return what every layer's B was multiplied by; none where the config does not tell alpha."""
    config = adapter.config
    if config.get("lora_alpha") is None:
        return {}
    alphas = pattern_values(
        config.get("alpha_pattern") or {}, list(adapter.shapes), config["lora_alpha"], "alpha_pattern"
    )
    power = 0.5 if config.get("use_rslora") else 1.0
    return {at: float(alphas[at]) / shape.r**power for at, shape in adapter.shapes.items()}


@dataclass(frozen=True)
class _Grams:
    """A A^T, B^T B, the falling singular values of dW, and W (r, k): W_A^T A and B W_B have orthonormal rows, columns.

    k is the rank of dW. All float64.
    """

    A: Tensor
    B: Tensor
    singular: Tensor
    W_A: Tensor
    W_B: Tensor

    @classmethod
    def of(cls, update: Update) -> _Grams:
        A, B = update.A.double(), update.B.double()
        KA, KB = A @ A.T, B.T @ B
        half = _root(KA)
        values, vectors = torch.linalg.eigh(half @ KB @ half)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        S = values.sqrt()
        kept = NOISE * S[:1] < S
        V = vectors[:, kept]
        # half = K_A^(1/2): the rows of pinv(half) A are orthonormal, and B half V / s the left singular vectors
        return cls(KA, KB, S, torch.linalg.pinv(half, hermitian=True) @ V, half @ V / S[kept])


def _root(K: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(K)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root


def _measured(update: Update, grams: _Grams, scaling: float) -> dict[str, float]:
    squares = grams.singular.square()
    total = float(squares.sum())
    if not total:
        return {"energy": 0.0, "sigma": 0.0, "rank": 0.0}
    across = torch.linalg.eigvalsh(grams.A)
    return {
        "energy": total,
        "sigma": float(grams.singular[0]),
        "directions": total**2 / float(squares.square().sum()),
        "concentration": float(squares[0]) / total,
        "rank": float(grams.W_A.shape[1]),
        "square_a": float(grams.A.trace()) / update.A.numel(),
        "square_b": float(grams.B.trace()) / update.B.numel() / scaling**2 if scaling else torch.nan,
        "kurtosis_a": _kurtosis(update.A),
        "kurtosis_b": _kurtosis(update.B),
        "distinct_a": float(across.sum() ** 2 / across.square().sum()) / update.rank,
        "aligned_a": _aligned(grams.A),
        "aligned_b": _aligned(grams.B),
    }


def _kurtosis(X: Tensor) -> float:
    squares = (X / X.abs().max()).square()
    return float(squares.square().mean() / squares.mean() ** 2)


def _aligned(K: Tensor) -> float:
    """Return the largest |cosine| of two different vectors with the Gram matrix K."""
    length = K.diagonal().sqrt()
    if len(K) < 2 or not bool((length > 0).all()):
        return torch.nan
    return float((K / torch.outer(length, length)).fill_diagonal_(0).abs().max())


def _together(updates: Sequence[Update], grams: Sequence[_Grams]) -> dict[str, Tensor]:
    """Return what every two of one layer's updates have in common, each (p, p) float64; zero updates have nothing."""
    pairs = list(zip(updates, grams, strict=True))
    # singular vectors of all, from which <dW_i, dW_j> is the sum of S_i S_j (V_i^T V_j) (U_i^T U_j)
    right = torch.cat([gram.W_A.T.float() @ update.A for update, gram in pairs])
    left = torch.cat([update.B @ gram.W_B.float() for update, gram in pairs], dim=1)
    singular = torch.cat([gram.singular[: gram.W_A.shape[1]] for gram in grams])
    across, along = (right @ right.T).double(), (left.T @ left).double()
    kept = torch.tensor([gram.W_A.shape[1] for gram in grams])
    least = torch.minimum(kept[:, None], kept).double()
    member = torch.repeat_interleave(torch.arange(len(grams)), kept)
    return {
        "rows": _blocks(across.square(), member, len(grams)) / least.clamp_min(1),
        "columns": _blocks(along.square(), member, len(grams)) / least.clamp_min(1),
        "common": (least > 0).double(),
        "product": _blocks(across * along * torch.outer(singular, singular), member, len(grams)),
    }


def _blocks(values: Tensor, member: Tensor, count: int) -> Tensor:
    """Return the sums of the blocks of a square matrix whose rows and columns belong to members, (count, count)."""
    sums = torch.zeros(count, len(member), dtype=torch.float64).index_add_(0, member, values)
    found: Tensor = torch.zeros(count, count, dtype=torch.float64).index_add_(1, member, sums)
    return found


def _table(adapters: Mapping[str, Adapter], layers: Sequence[str], value: Callable[[Adapter, str], float]) -> Tensor:
    return torch.tensor(
        [[value(one, at) if at in one.shapes else torch.nan for at in layers] for one in adapters.values()],
        dtype=torch.float64,
    )
