"""Updates written one by one as PEFT or another tool has them, each in the form that its layer has there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraloom.adapters.config import INIT_ONLY
from loraloom.adapters.dialects import KOHYA, MLX, PEFT, Dialect
from loraloom.adapters.images import component_of
from loraloom.adapters.layout import parameters_of, without_wrappers
from loraloom.adapters.mlx import mlx_config
from loraloom.adapters.names import PREFIX
from loraloom.adapters.update import Form, Update
from loraloom.files.tensors import StoredFile, TensorFile, all_finite

_ALPHA = ".alpha"


class UpdateFile:
    """The weights of an adapter, written update by update with a scaling of 1 (alpha = r), for B holds it already.

    dialect: whose names and layout they are written in. base: the base model's name, for kohya-ss.

    `names` of further tensors must be told at the start; `forms` as in `Adapter`. Every update is widened to `rank` by
    zeros where it is given. `ranks` and `overflowing` tell what was written and what did not fit `dtype`.
    """

    def __init__(
        self,
        folder: Path,
        dialect: Dialect,
        dtype: torch.dtype,
        modules: Iterable[str],
        names: Iterable[str],
        forms: Mapping[str, Form],
        *,
        base: str | None = None,
        rank: int | None = None,
    ) -> None:
        self.dialect = dialect
        self.dtype = dtype
        self.forms = forms
        self.rank = rank
        self.ranks: dict[str, int] = {}
        self.overflowing: list[str] = []
        self._waiting: dict[str, dict[str, Update]] = {}  # experts of a module that is not whole yet
        self._prefix = PREFIX if dialect is PEFT else ""
        keys = {key for module in modules for key in self._keys(module)}
        self._path = folder / dialect.weights
        metadata = {"format": "pt", "ss_network_module": "networks.lora"} if dialect is KOHYA else None
        if metadata and base:
            metadata["ss_base_model_version"] = base
        self._file = TensorFile(self._path, [self._prefix + name for name in (*keys, *names)], metadata)

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
        if self.dialect.transposed:
            A, B = A.T, B.T
        for key, factor in zip(self._keys(module), (A, B), strict=False):
            self._write(key, factor)
        if self.dialect.alpha:  # in bfloat16 a rank above 256 would be rounded
            self._file.add(f"{module}{_ALPHA}", torch.tensor(float(update.rank)))

    def add_whole(self, name: str, tensor: Tensor) -> None:
        """Write a tensor in its own dtype, by its parameter's path."""
        self._file.add(self._prefix + name, tensor)

    def close(self) -> None:
        """Write the file's header and close it; calling it twice does no harm."""
        self._file.close()

    def finish(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """Close the file and return the config to write beside it, from PEFT's `config`; None where there is none."""
        self.close()
        if self.dialect.one_rank:
            self._widen()
        if self.dialect is PEFT:
            return self.config(config)
        if self.dialect is MLX:
            return mlx_config(self.ranks, max(self.ranks.values()), config.get("base_model_name_or_path"))
        return None

    def _widen(self) -> None:
        """Write the file again with zeros added to the factors, where the ranks of a model's layers differ."""
        parts = {module: component_of(module) if self.dialect.images else "" for module in self.ranks}
        largest: dict[str, int] = {}
        for module, part in parts.items():
            largest[part] = max(largest.get(part, 0), self.ranks[module])
        short = {module: largest[parts[module]] - rank for module, rank in self.ranks.items()}
        if not any(short.values()):
            return
        narrow = StoredFile(self._path)
        wide = TensorFile(self._path.with_suffix(".wide"), narrow, narrow.metadata)
        for module, more in short.items():
            keys = self._keys(module)
            for key, at in zip(keys[:2], (1, 0) if self.dialect.transposed else (0, 1), strict=True):
                tensor = narrow[key]
                zeros = tensor.new_zeros([more if axis == at else size for axis, size in enumerate(tensor.shape)])
                wide.add(key, torch.cat([tensor, zeros], dim=at))
            if self.dialect.alpha:
                wide.add(keys[2], narrow[keys[2]] + more)
        wide.close()
        os.replace(self._path.with_suffix(".wide"), self._path)

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

    def _keys(self, module: str) -> tuple[str, ...]:
        form, dialect = self.forms.get(module), self.dialect
        if dialect is PEFT and form and form.kind == "embedding":
            return f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
        stored = form.module if form and form.kind == "experts" else module
        factors = stored + dialect.A, stored + dialect.B
        return (*factors, f"{module}{_ALPHA}") if dialect.alpha else factors

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
        self._file.add(self._prefix + name, written)


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
