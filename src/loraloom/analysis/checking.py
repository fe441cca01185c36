"""What an adapter's folder tells of itself, and of what its members' merge it is. For the command `check`.

PEFT's `add_weighted_adapter` (0.21.2) merges A and B apart for `linear`, `ties`, `dare_*` and `magnitude_prune`, so
that factors of different members multiply; and it keeps use_rslora of the first member, so that sqrt(r) multiplies what
has every member's own scaling in it already.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from loraloom.adapters.lowrank import svd_factors
from loraloom.adapters.peft import files_by_task, read_adapter, read_provenance
from loraloom.adapters.together import compatibility_problems
from loraloom.adapters.update import Adapter, Update
from loraloom.errors import raise_problems

Kind = Literal["sum", "truncated sum", "crossed factors", "dropped entries", "other"]

_EXPLAINED = 1e-3  # share of |dW|^2 that may be left: bfloat16 files lose 1e-5
_HELD = 0.99  # share of a layer's energy whose directions are counted
_DROPPED = 0.02  # share of zeros in the factors from which they are no chance


@dataclass(frozen=True)
class FolderFacts:
    """What one adapter's folder tells.

    base, dtype, rslora, heads, made_by: as its files have them; None where nothing tells.
    layers: how many have an update; targets: the last parts of their paths. still: those whose dW is zero.
    ranks: the smallest and the largest. scalings: what B is multiplied by, alpha / r or alpha / sqrt(r), so too.
    energy: |dW|_F^2. held: how many directions hold 99 % of a layer's energy, the middle one of the layers.
    loudest: the layer of largest |dW|_F, and how many times the middle one's it is.
    zeros: the share of entries of A and B that are exactly 0, but for what widens a rank; still layers are left out.
    leftover: sqrt(r) where alpha is r beside use_rslora, as PEFT's merges of rsLoRA adapters leave it; else None.
    """

    path: str
    base: str | None
    dtype: str
    rslora: bool
    heads: list[str]
    made_by: str | None
    layers: int
    targets: list[str]
    still: list[str]
    ranks: tuple[int, int]
    scalings: tuple[float, float]
    energy: float
    held: int
    loudest: tuple[str, float]
    zeros: float
    leftover: float | None


@dataclass(frozen=True)
class MemberMerge:
    """What a folder holds of the members that it was merged from.

    kind: a "sum" of their updates, exact; a "truncated sum", the best of lower rank; "crossed factors", where A and B
      were summed apart; "dropped entries", where entries of A and B were dropped apart; or "other".
    weights: w_i of sum_i w_i dW_i, in the members' order, as loading applies them; None where it is no such sum.
    unexplained: the share of |dW|_F^2 that no sum of the members is.
    crossed: |sum over i != j of b_i a_j B_i A_j|_F^2 / |dW|_F^2, where the factors were crossed; else None.
    """

    kind: Kind
    weights: list[float] | None
    unexplained: float
    crossed: float | None


@dataclass(frozen=True)
class Check:
    """The folder that is checked, its members, and what it is of them; None without members.

    wrong: whether its cross terms or its scale are not those of the merge that was meant.
    """

    folder: FolderFacts
    members: list[FolderFacts]
    merge: MemberMerge | None

    @property
    def wrong(self) -> bool:
        """Tell whether the merge is not what its members and their weights say."""
        crossed = self.merge is not None and self.merge.kind in ("crossed factors", "dropped entries")
        return crossed or (self.merge is not None and self.folder.leftover is not None)


def check_folder_of(folder: str | Path, members: Sequence[str | Path] = ()) -> Check:
    """Return what an adapter's folder tells and, where the members it was merged from are given, what it is of them.

    Raises LoraloomError for folders that cannot be read, and for members that do not fit it.
    """
    merged = read_adapter(folder)
    inputs = {str(path): read_adapter(path) for path in members}
    problems = compatibility_problems([merged, *inputs.values()])
    raise_problems(f"cannot check {folder}", problems, "give the adapters that it was merged from")
    facts = folder_facts(merged)
    of = [folder_facts(one) for one in inputs.values()]
    return Check(facts, of, member_merge(merged, inputs, facts) if inputs else None)


def folder_facts(adapter: Adapter) -> FolderFacts:
    """Return what an adapter that was read from a folder tells."""
    spectra = {module: svd_factors(update)[1].square() for module, update in adapter.updates.items()}
    energies = {module: float(spectrum.sum()) for module, spectrum in spectra.items()}
    heard = [module for module, energy in energies.items() if energy > 0]
    norms = {module: math.sqrt(energies[module]) for module in heard} or dict.fromkeys(energies, 0.0)
    loudest = max(norms, key=lambda module: norms[module])
    middle = statistics.median(norms.values())
    ranks = [shape.r for shape in adapter.shapes.values()]
    scalings = [place.scaling for place in getattr(adapter.updates, "places", {}).values()] or [1.0]
    provenance = read_provenance(adapter.path) if adapter.path else {}
    heads = {*(files_by_task(adapter.path, "heads") if adapter.path else ()), *([adapter.task] if adapter.head else [])}
    return FolderFacts(
        path=adapter.name,
        base=adapter.base or None,
        dtype=str(adapter.dtype).removeprefix("torch."),
        rslora=bool(adapter.config.get("use_rslora")),
        heads=sorted(heads),
        made_by=provenance.get("made_by") or provenance.get("kind"),
        layers=len(energies),
        targets=sorted({module.rpartition(".")[2] for module in energies}),
        still=sorted(set(energies) - set(heard)),
        ranks=(min(ranks), max(ranks)),
        scalings=(min(scalings), max(scalings)),
        energy=sum(energies.values()),
        held=int(statistics.median_low([_holding(spectra[module]) for module in heard] or [0])),
        loudest=(loudest, norms[loudest] / middle if middle else 1.0),
        zeros=_zeros(adapter.updates[module] for module in heard),
        leftover=_leftover(adapter),
    )


def _holding(spectrum: Tensor) -> int:
    """Return how many of the largest squared singular values hold _HELD of their sum."""
    return int((spectrum.cumsum(0) < _HELD * spectrum.sum()).sum()) + 1


def _zeros(updates: Iterable[Update]) -> float:
    zeros, entries = 0, 0
    for update in updates:
        filled = update.A.any(dim=1) | update.B.any(dim=0)  # what widens a rank is 0 in both
        for factor in (update.A[filled], update.B[:, filled]):
            zeros += int((factor == 0).sum())
            entries += factor.numel()
    return zeros / max(entries, 1)


def _leftover(adapter: Adapter) -> float | None:
    config = adapter.config
    plain = not config.get("alpha_pattern") and not config.get("rank_pattern")
    if config.get("use_rslora") and plain and config.get("lora_alpha") == config.get("r") and adapter.rank > 1:
        return math.sqrt(adapter.rank)
    return None


def member_merge(merged: Adapter, members: Mapping[str, Adapter], facts: FolderFacts) -> MemberMerge:
    """Return what `merged` is of its members, layer by layer from the factors alone; see `MemberMerge`."""
    whole, projected, crossing = _Fit(len(members)), _Fit(len(members)), _Crossing(len(members))
    for module, update in merged.updates.items():
        layer = [one.updates[module] if module in one.shapes else None for one in members.values()]
        whole.add(_inner(update, update), [_products(update, layer), *[_products(one, layer) for one in layer]])
        U, S, Vh = svd_factors(update)
        own = [None if one is None else (U.T @ one.B.double()) @ (one.A.double() @ Vh.T) for one in layer]
        projected.add(
            float(S.square().sum()),
            [[0.0 if one is None else float((S * one.diagonal()).sum()) for one in own]]
            + [[0.0 if i is None or j is None else float((i * j).sum()) for j in own] for i in own],
        )
        crossing.add(update, layer)
    weights, left = whole.solve()
    if left <= _EXPLAINED:
        return MemberMerge("sum", weights, left, None)
    if crossing.fits:
        found = crossing.weights()
        return MemberMerge("crossed factors", found, left, whole.left(found))
    if facts.zeros > _DROPPED:
        return MemberMerge("dropped entries", None, left, None)
    below, rest = projected.solve()
    if rest <= _EXPLAINED:
        return MemberMerge("truncated sum", below, left, None)
    return MemberMerge("other", None, left, None)


class _Fit:
    """A least-squares fit of sum_i w_i dW_i to dW over all layers, from inner products alone."""

    def __init__(self, count: int) -> None:
        self.energy = 0.0
        self.gram = torch.zeros(count, count, dtype=torch.float64)
        self.right = torch.zeros(count, dtype=torch.float64)

    def add(self, energy: float, products: Sequence[Sequence[float]]) -> None:
        """Add a layer: |dW|^2; <dW, dW_i> in the first row of `products`, <dW_i, dW_j> in those below."""
        self.energy += energy
        self.right += torch.tensor(products[0], dtype=torch.float64)
        self.gram += torch.tensor(products[1:], dtype=torch.float64)

    def solve(self) -> tuple[list[float], float]:
        """Return the weights, and the share of the energy that they leave."""
        weights = (torch.linalg.pinv(self.gram, hermitian=True) @ self.right).tolist()
        return weights, self.left(weights)

    def left(self, weights: Sequence[float]) -> float:
        """Return |dW - sum_i w_i dW_i|^2 / |dW|^2."""
        w = torch.tensor(weights, dtype=torch.float64)
        rest = self.energy - 2 * float(w @ self.right) + float(w @ self.gram @ w)
        return max(0.0, rest) / self.energy if self.energy > 0 else 0.0


class _Crossing:
    """Whether A is sum_i a_i A_i and B is sum_i b_i B_i in every layer, as where PEFT sums the factors apart."""

    def __init__(self, count: int) -> None:
        self.left = [0.0, 0.0]  # of A and of B: what no sum of the members' is
        self.energy = [0.0, 0.0]
        self.products: list[list[float]] = [[] for _ in range(count)]  # b_i a_i by layer
        self.comparable = count > 1

    def add(self, update: Update, layer: Sequence[Update | None]) -> None:
        """Add a layer; members that lack it count nothing."""
        present = [i for i, one in enumerate(layer) if one is not None]
        alike = all(one.shape == update.shape for one in layer if one is not None)
        self.comparable &= bool(present) and alike
        if not self.comparable:
            return
        found = []
        for index, factor in enumerate((update.A, update.B)):
            columns = [one.A if index == 0 else one.B for one in layer if one is not None]
            X = torch.stack([column.double().flatten() for column in columns], dim=1)
            y = factor.double().flatten()
            solution = torch.linalg.lstsq(X, y[:, None]).solution[:, 0]
            self.left[index] += float((y - X @ solution).square().sum())
            self.energy[index] += float(y.square().sum())
            found.append(solution)
        for i, a, b in zip(present, *found, strict=True):
            self.products[i].append(float(a * b))

    @property
    def fits(self) -> bool:
        """Tell whether the factors are sums of the members'."""
        return self.comparable and all(
            left <= _EXPLAINED * energy for left, energy in zip(self.left, self.energy, strict=True)
        )

    def weights(self) -> list[float]:
        """Return w_i = b_i a_i, the middle one of the layers."""
        return [statistics.median(of) if of else 0.0 for of in self.products]


def _inner(one: Update, other: Update) -> float:
    """Return <dW, dW'> = tr(A'^T B'^T B A), without either."""
    return float(((one.B.double().T @ other.B.double()) * (one.A.double() @ other.A.double().T)).sum())


def _products(one: Update | None, layer: Sequence[Update | None]) -> list[float]:
    return [0.0 if one is None or other is None else _inner(one, other) for other in layer]
