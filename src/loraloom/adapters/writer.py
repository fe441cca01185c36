"""Updates written one by one as an ordinary PEFT adapter, each in the form that its layer has there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraloom.adapters.config import INIT_ONLY
from loraloom.adapters.dialects import PREFIX
from loraloom.adapters.layout import parameters_of, without_wrappers
from loraloom.adapters.stored import WEIGHTS
from loraloom.adapters.update import Form, Update
from loraloom.files.tensors import TensorFile, all_finite


class UpdateFile:
    """The weights of an adapter, written update by update with a scaling of 1 (alpha = r), for B holds it already.

    `names` of further tensors must be told at the start; `forms` as in `Adapter`. Every update is widened to `rank` by
    zeros where it is given. `ranks` and `overflowing` tell what was written and what did not fit `dtype`.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        modules: Iterable[str],
        names: Iterable[str],
        forms: Mapping[str, Form],
        rank: int | None = None,
    ) -> None:
        self.dtype = dtype
        self.forms = forms
        self.rank = rank
        self.ranks: dict[str, int] = {}
        self.overflowing: list[str] = []
        self._waiting: dict[str, dict[str, Update]] = {}  # experts of a module that is not whole yet
        keys = {key for module in modules for key in self._keys(module)}
        self._file = TensorFile(folder / WEIGHTS, [PREFIX + name for name in (*keys, *names)])

    def add(self, module: str, update: Update) -> None:
        """Write one update. Raises ValueError for one that was not announced or was added before."""
        form = self.forms.get(module)
        if self.dtype == torch.float16:
            update = balanced(update)
        if self.rank:
            update = widened(update, self.rank)
        if form and form.kind == "experts":
            self._add_expert(module, form, update)
            return
        self.ranks[module] = update.rank
        A, B = update.A, update.B
        if form and form.kind == "convolution":
            A, B = A.reshape(-1, *form.kernel), B.reshape(*B.shape, *(1 for _ in form.kernel[1:]))
        for key, factor in zip(self._keys(module), (A, B), strict=True):
            self._write(key, factor)

    def add_whole(self, name: str, tensor: Tensor) -> None:
        """Write a tensor in its own dtype, by its parameter's path."""
        self._file.add(PREFIX + name, tensor)

    def close(self) -> None:
        """Write the file's header and close it; calling it twice does no harm."""
        self._file.close()

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return `config` with the ranks that were written, as PEFT needs it to load them."""
        ranks = {name: rank for module, rank in self.ranks.items() for name in self._named(module, config)}
        counts = list(ranks.values())
        common = max(sorted(set(counts)), key=counts.count)
        # "^": PEFT matches path endings, and one module's path can end another's
        odd = {f"^{name}": rank for name, rank in ranks.items() if rank != common}
        return {
            **{key: value for key, value in config.items() if key not in INIT_ONLY},
            "r": common,
            "lora_alpha": common,
            "rank_pattern": odd,
            # a server that reads r and lora_alpha alone scales by 1 too
            "alpha_pattern": dict(odd),
            "use_rslora": False,
            "init_lora_weights": True,
            "inference_mode": True,
        }

    def _named(self, module: str, config: Mapping[str, Any]) -> list[str]:
        """Return what PEFT matches rank_pattern against: the module's path, or those of its adapted parameters."""
        return parameters_of(module, config) or [module]

    def _keys(self, module: str) -> tuple[str, str]:
        form = self.forms.get(module)
        if form and form.kind == "embedding":
            return f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
        stored = form.module if form and form.kind == "experts" else module
        return f"{stored}.lora_A.weight", f"{stored}.lora_B.weight"

    def _add_expert(self, module: str, form: Form, update: Update) -> None:
        """Keep an expert's update until all of its module's parameters are there: they are written in one rank."""
        outer = without_wrappers(form.module)
        waiting = self._waiting.setdefault(outer, {})
        if module in waiting or outer in self.ranks:
            raise ValueError(f"{module} was added before")
        waiting[module] = update
        stored = {one.module: one.count for one in self.forms.values() if _outer(one) == outer}
        if len(waiting) < sum(stored.values()):
            return
        rank = self.ranks[outer] = max(one.rank for one in waiting.values())
        for name, count in stored.items():
            parts = [widened(waiting[f"{name}.{index}"], rank) for index in range(count)]
            self._write(f"{name}.lora_A.weight", torch.cat([part.A for part in parts]))
            self._write(f"{name}.lora_B.weight", torch.stack([part.B for part in parts], dim=2).flatten(1))
        del self._waiting[outer]

    def _write(self, name: str, tensor: Tensor) -> None:
        written = tensor.to(self.dtype)
        if not all_finite(written):
            self.overflowing.append(name)
        self._file.add(PREFIX + name, written)


def balanced(update: Update) -> Update:
    """Return the same dW with each row of A as long as its column of B, to within sqrt(2), by powers of two.

    float16 loses what is below 6e-8 and half the digits below 6e-5, where alpha/r, weight and scale in B alone lead.
    """
    a, b = update.A.double().norm(dim=1), update.B.double().norm(dim=0)
    exponent = torch.where((a > 0) & (b > 0), 0.5 * (a.log2() - b.log2()), 0.0).round()
    factor = exponent.exp2()
    return Update((update.B * factor).float(), (update.A / factor[:, None]).float())


def _outer(form: Form) -> str:
    return without_wrappers(form.module) if form.kind == "experts" else ""


def widened(update: Update, rank: int) -> Update:
    """Return the same dW in rank `rank`, by rows of A and columns of B of 0. Raises ValueError where it is larger."""
    more = rank - update.rank
    if more < 0:
        raise ValueError(f"an update of rank {update.rank} does not fit rank {rank}")
    pad = torch.nn.functional.pad
    return Update(pad(update.B, (0, more)), pad(update.A, (0, 0, 0, more)))
