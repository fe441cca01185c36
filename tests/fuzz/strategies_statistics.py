"""Statistics files: whole ones of every form, and what a stranger makes of them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from harness import NUMBERS, WORDS, as_json, spoiled, torn, weird
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from loraloom.statistics.file import FORMAT, Layer, Statistics
from loraloom.statistics.moments import Moment

Parts = tuple[dict[str, Tensor], dict[str, str]]  # tensors and metadata
FORMS = ("rows", "gram", "factor", "bounded", "private")
JSON_FACTS = ("layers", "counts", "lost", "privacy")
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "", "x")


def statistics(form: str, seed: int = 0) -> Statistics:
    """Return statistics of two inputs, 4 and 6 wide, that three layers read, their moments in one form."""
    generator = torch.Generator().manual_seed(seed)
    moments = {}
    for name, width in (("encoder.0.query", 4), ("encoder.0.dense", 6)):
        count = 3 if form == "rows" else 40
        moment = Moment.of_rows(torch.randn(count, width, generator=generator))
        if form in ("factor", "bounded"):
            moment = moment.limit_rank(width if form == "factor" else 2)
            moment = moment if moment.factor is not None else Moment.of_rows(torch.ones(2, width)).turned()
        moments[name] = moment
    layers = {
        "encoder.0.query": Layer("encoder.0.query", 4, 5),
        "encoder.0.value": Layer("encoder.0.query", 4, 3),
        "encoder.0.dense": Layer("encoder.0.dense", 6, 4),
    }
    privacy = {"clip": 1.0, "epsilon": 8.0, "delta": 1e-6} if form == "private" else None
    kind: Any = "sample" if privacy else "token"
    return Statistics("org/base", "f" * 64, moments, layers, 40, 0 if privacy else 40, kind, privacy)


def parts(found: Statistics) -> Parts:
    """Return the tensors and the metadata of a file of these statistics."""
    tensors = {
        f"{name}.{part}": getattr(moment, part).contiguous()
        for name, moment in found.moments.items()
        for part in ("total", "rows", "gram", "factor")
        if getattr(moment, part) is not None
    }
    layers = {name: vars(layer) for name, layer in found.layers.items()}
    metadata = {
        "format": FORMAT,
        "base": found.base,
        "fingerprint": found.fingerprint,
        "texts": str(found.texts),
        "tokens": str(found.tokens),
        "kind": found.kind,
        "layers": json.dumps(layers),
        "counts": json.dumps({name: moment.count for name, moment in found.moments.items()}),
        "lost": json.dumps({name: moment.lost for name, moment in found.moments.items() if moment.lost}),
        "privacy": json.dumps(found.privacy or {}),
    }
    return tensors, metadata


def as_file(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Return the bytes of a safetensors file; texts with half a surrogate pair become what UTF-8 can hold."""
    plain = {name: text.encode(errors="replace").decode() for name, text in metadata.items()}
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=plain)


def with_header(content: bytes, change: Any) -> bytes:
    """Return the file `content` with what `change` makes of its header, a dict: bytes, or what becomes JSON."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    new = change(header)
    text = new if isinstance(new, bytes) else as_json(new)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


@st.composite
def metadata_spoiled(draw: st.DrawFn, valid: Parts) -> bytes:
    """A file whose metadata is wrong: inside the JSON of one fact, or a fact that is another text."""
    tensors, metadata = valid[0], dict(valid[1])
    for key in draw(st.lists(st.sampled_from(sorted(metadata)), min_size=1, max_size=2)):
        how = draw(st.sampled_from(["inside", "inside", "text", "number", "gone"]))
        if how == "inside" and key in JSON_FACTS:
            metadata[key] = as_json(draw(spoiled(json.loads(valid[1][key])))).decode()
        elif how == "gone":
            metadata.pop(key, None)
        elif how == "number":
            metadata[key] = str(draw(st.sampled_from(NUMBERS) | st.integers() | st.sampled_from(["9" * 5000, "1e3"])))
        else:
            metadata[key] = draw(st.sampled_from(WORDS) | st.text(max_size=20) | st.builds(str, weird()))
    return as_file(tensors, metadata)


@st.composite
def tensors_spoiled(draw: st.DrawFn, valid: Parts) -> bytes:
    """A file whose tensors are wrong: values, shapes, dtypes, names, one too many or too few."""
    tensors = {name: tensor.clone() for name, tensor in valid[0].items()}
    for name in draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=2, unique=True)):
        if name not in tensors:
            continue
        tensor = tensors[name]
        how = draw(st.sampled_from(["value", "value", "scale", "shape", "dtype", "gone", "renamed", "added"]))
        if how == "value" and tensor.numel():
            place = draw(st.integers(0, tensor.numel() - 1))
            value = draw(st.sampled_from([0.0, -1.0, 1e30, 1e38, -1e308, torch.nan, torch.inf]))
            tensor.view(-1)[place] = torch.tensor(value, dtype=torch.float64).to(tensor.dtype)
        elif how == "scale":
            factor = draw(st.sampled_from([0.0, -1.0, 9.0, 1e-320, 1e-30, 1e30, 1e200]))
            tensors[name] = (factor * tensor.double()).to(tensor.dtype)
        elif how == "shape":
            tensors[name] = draw(
                st.sampled_from([tensor[..., :-1], tensor[:0], tensor.reshape(-1), tensor[None], tensor.sum()])
            )
        elif how == "dtype":
            tensors[name] = tensor.to(draw(st.sampled_from([torch.float16, torch.bfloat16, torch.int64, torch.bool])))
        elif how == "added":
            tensors[draw(st.sampled_from(WORDS[:5]) | st.text(max_size=8))] = torch.ones(2)
        else:
            del tensors[name]
            if how == "renamed":
                tensors[name.rpartition(".")[0] + draw(st.sampled_from([".rows", ".gram", ".factor", ".x"]))] = tensor
    return as_file({name.encode(errors="replace").decode(): one for name, one in tensors.items()}, valid[1])


@st.composite
def header_spoiled(draw: st.DrawFn, valid: Parts) -> bytes:
    """A file whose header is wrong: shapes, offsets, dtypes that the bytes do not have, or no header at all."""
    content = as_file(*valid)

    def change(header: dict[str, Any]) -> Any:
        name = draw(st.sampled_from(sorted(header)))
        how = draw(st.sampled_from(["anything", "dtype", "shape", "length"]))
        if how == "anything" or name == "__metadata__":
            return draw(spoiled(header))
        if how == "dtype":
            header[name]["dtype"] = draw(st.sampled_from(DTYPES))
        elif how == "shape":
            header[name]["shape"] = draw(st.lists(st.sampled_from([0, 1, 2, -1, 10**9, 2**63, 2.5, None]), max_size=3))
        else:
            return as_json(header) + draw(st.binary(max_size=9))
        return header

    return with_header(content, change)


@st.composite
def malformed(draw: st.DrawFn) -> bytes:
    """A statistics file of any form as a stranger may hand it over; a few of them are still right."""
    valid = parts(statistics(draw(st.sampled_from(FORMS)), draw(st.integers(0, 3))))
    how = draw(st.sampled_from([metadata_spoiled, metadata_spoiled, tensors_spoiled, header_spoiled, None]))
    return draw(torn(as_file(*valid)) if how is None else how(valid))


def written(content: bytes, path: Path) -> Path:
    """Write a file and return its path."""
    path.write_bytes(content)
    return path
