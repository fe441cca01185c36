"""MLX's adapters (mlx-lm): adapters.safetensors with A and B transposed, and a config with one rank and one scale."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loraloom.adapters.names import DDP, WRAPPERS, Factor
from loraloom.errors import raise_problems

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<part>[ab])")
# no name of a tensor tells that a layer is an embedding; these are what models call theirs
_EMBEDDINGS = ("embed_tokens", "wte", "tok_embeddings", "word_embeddings", "embed_in", "embeddings")


class _Parameters(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    rank: int | None = Field(None, ge=1, le=1 << 20)
    scale: float = Field(allow_inf_nan=False)


class _Fields(BaseModel):
    """The fields of mlx-lm's adapter_config.json that say what its tensors mean."""

    model_config = ConfigDict(strict=True, extra="ignore")

    fine_tune_type: str = "lora"
    lora_parameters: _Parameters
    model: str | None = None


def is_mlx(config: Mapping[str, Any]) -> bool:
    """Tell whether an adapter_config.json is mlx-lm's."""
    return "peft_type" not in config and ("lora_parameters" in config or "fine_tune_type" in config)


def read_mlx_config(config: Mapping[str, Any], path: Path) -> tuple[float, str | None]:
    """Return the scale of every update, and the base model's name.

    Raises LoraloomError that names what is no number, what is missing, and an adapter that is no LoRA.
    """
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        told = [f"fine_tune_type: {kind!r:.80}: no low-rank update of a layer"]
        raise_problems(f"{path}: of MLX (mlx-lm)", told, "only LoRA adapters can be merged here")
    try:
        fields = _Fields.model_validate(dict(config))
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, one['loc']))}: {one['msg']}"
            + ("" if one["type"] == "missing" else f", not {one['input']!r:.80}")
            for one in error.errors()
        ]
        raise_problems(f"{path}: of MLX (mlx-lm)", problems, "mend the field, or train the adapter again")
    return fields.lora_parameters.scale, fields.model


def mlx_factor(key: str) -> Factor | None:
    """Return what a tensor's name says in mlx-lm's style, or None where it is in another."""
    written = ".".join(part for part in key.removeprefix(DDP).split(".") if part not in WRAPPERS)
    match = _FACTOR.fullmatch(written)
    return Factor(match["module"], match["part"].upper(), match["module"]) if match else None


def is_embedding(module: str) -> bool:
    """Tell whether a layer is an embedding, by what models call theirs."""
    return module.rpartition(".")[2] in _EMBEDDINGS


def mlx_config(modules: Iterable[str], rank: int, base: str | None) -> dict[str, Any]:
    """Return mlx-lm's adapter_config.json for an adapter of these layers, all of one rank, at a scale of 1.

    It adapts the layers of all blocks by their names inside one; those that the file has no tensors for stay as they
    are, as mlx-lm's B starts at 0.
    """
    keys = {re.sub(r"^.*?\.\d+\.", "", f".{module}").lstrip(".") for module in modules}
    return {
        "fine_tune_type": "lora",
        "model": base,
        "num_layers": -1,
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)},
    }
