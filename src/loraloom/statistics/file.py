"""The statistics of a task, and their file: written whole, checked one input at a time, read at each access.

A file may come from anyone.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_args

from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor

from loraloom.errors import LoraloomError, did_you_mean, raise_problems, reads_file
from loraloom.files.atomic import staged_file
from loraloom.files.reading import parse_json
from loraloom.files.tensors import MOST_TENSORS, StoredFile, TensorFile
from loraloom.notebook import facts
from loraloom.settings import Kind, explained
from loraloom.statistics.moments import Moment
from loraloom.statistics.stored import PARTS, StoredMoments

FORMAT = "loraloom-statistics-1"
_AGAIN = "collect the statistics again"
_CALLS = 1000  # of one layer in a forward pass, each of which adds a row a token: far more than any model makes
_LONGEST = 1000  # characters of a base model's name or path
_Width = Annotated[int, Field(strict=True, ge=1, le=1 << 20)]  # far wider than any layer, with a vocabulary's outputs


@dataclass(frozen=True)
class Layer:
    """One target linear layer, W (out_features, in_features).

    input: path of the first target layer that reads the same tensor.
    """

    input: str
    in_features: _Width
    out_features: _Width


@dataclass(frozen=True)
class Statistics:
    """Second moments of what each target layer of a base model reads, uncentred, over the texts of one task.

    base: hub name of the base model, or its folder's.
    fingerprint: sha256 over a sample of the base model's weights; see `fingerprint` of `loraloom.statistics.collect`.
    moments: by the `input` of a layer; those of a file are read from it at each access.
    layers: by module path in the base model.
    texts: samples seen.
    tokens: those of their tokens that count, of both sides of an encoder-decoder.
    kind: what a row is: a "token", or for a "sample" the mean over its tokens.
    privacy: what was done for the texts' sake: the norm `clip` to which rows were clipped, and `epsilon` and `delta` of
        the noise added (`loraloom.statistics.privacy`); None where nothing was.
    """

    base: str
    fingerprint: str
    moments: Mapping[str, Moment]
    layers: dict[str, Layer]
    texts: int
    tokens: int
    kind: Kind
    privacy: dict[str, float] | None = None

    def moment(self, module: str) -> Moment:
        """Return the moment of the input of `module`. Raises LoraloomError for a module that is not a target."""
        if module not in self.layers:
            raise LoraloomError(f"{module}: the statistics do not cover it", did_you_mean(module, self.layers))
        return self.moments[self.layers[module].input]

    def __add__(self, other: Statistics) -> Statistics:
        """Return the statistics of both sets of texts. Raises LoraloomError where they are not of one kind."""
        self._check_fit(other)
        moments = {name: moment + other.moments[name] for name, moment in self.moments.items()}
        return replace(self, moments=moments, texts=self.texts + other.texts, tokens=self.tokens + other.tokens)

    def __sub__(self, other: Statistics) -> Statistics:
        """Return the statistics of the texts that are not in `other`, a part of these.

        Raises LoraloomError where they are not of one kind, `other` has more rows, or noise was added.
        """
        self._check_fit(other)
        if self.privacy and "epsilon" in self.privacy:
            raise LoraloomError(f"{self._name}: noise was added, which no difference takes off", "subtract before it")
        more = [name for name, moment in self.moments.items() if other.moments[name].count > moment.count]
        if more or other.texts > self.texts or other.tokens > self.tokens:
            raise LoraloomError(f"{other._name} is no part of {self._name}: it has more rows", "swap the two")
        moments = {name: moment - other.moments[name] for name, moment in self.moments.items()}
        return replace(self, moments=moments, texts=self.texts - other.texts, tokens=self.tokens - other.tokens)

    def limit_rows(self, most: int) -> Statistics:
        """Return these statistics without the rows of any input that has more than `most`; 0 leaves sums alone.

        The sums are then a root of the Gram matrix: singular values times right vectors, which say the same.
        """
        moments = {name: moment if moment.count <= most else moment.turned() for name, moment in self.moments.items()}
        return replace(self, moments=moments)

    def limit_directions(self, most: int) -> Statistics:
        """Return these statistics with the `most` loudest directions of each input; see `Moment.limit_rank`."""
        return replace(self, moments={name: moment.limit_rank(most) for name, moment in self.moments.items()})

    def inputs_with_rows(self) -> int:
        """Return the number of inputs whose rows are held as the layer read them."""
        return sum(moment.rows is not None for moment in self.moments.values())

    def contents(self) -> dict[str, Any]:
        """Tell what a file of these statistics holds, and so hands to whoever reads it: numbers, lists, None.

        Of each input the rows, or directions, or a Gram matrix are held. rows: rows held as the layers read them, over
        all inputs. directions: the most of any input. left_out: of any input, the largest share of its largest
        eigenvalue that a bound on the directions took off. widths: every width of an input.
        """
        raw = [moment.count for moment in self.moments.values() if moment.rows is not None]
        thin = [len(moment.factor) for moment in self.moments.values() if moment.factor is not None]
        shares = [moment.lost / max(moment.largest(), 1e-300) for moment in self.moments.values() if moment.lost]
        return {
            "base": self.base,
            "fingerprint": self.fingerprint,
            "texts": self.texts,
            "tokens": self.tokens,
            "kind": self.kind,
            "layers": len(self.layers),
            "inputs": len(self.moments),
            "inputs_with_rows": len(raw),
            "rows": sum(raw),
            "inputs_with_directions": len(thin),
            "directions": max(thin, default=0),
            "inputs_with_gram_matrix": len(self.moments) - len(raw) - len(thin),
            "left_out": max(shares, default=0.0),
            "widths": sorted({moment.width for moment in self.moments.values()}),
            "privacy": self.privacy,
        }

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write one safetensors file, whole or not at all; with `overwrite` it replaces an earlier one."""
        metadata = {
            "format": FORMAT,
            "base": self.base,
            "fingerprint": self.fingerprint,
            "texts": str(self.texts),
            "tokens": str(self.tokens),
            "kind": self.kind,
            "layers": json.dumps({name: asdict(layer) for name, layer in self.layers.items()}),
            **({"privacy": json.dumps(self.privacy)} if self.privacy else {}),
        }
        save_moments(self.moments, Path(path), metadata, overwrite=overwrite)

    @classmethod
    @reads_file
    def load(cls, path: str | Path) -> Statistics:
        """Read a file that `save` wrote.

        Raises LoraloomError telling what is wrong with it: absent, half-written, of another format, damaged metadata,
        shapes that do not fit, values that are not finite or that no rows could have given: it may come from anyone.
        """
        path = Path(path)
        if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
            what = "is a folder" if os.path.isdir(path) else "no such file"
            raise LoraloomError(f"{path}: {what}", "name a file that was saved as statistics")
        try:
            file = StoredFile(path)
        except ValueError as error:
            raise LoraloomError(f"{path}: cannot be read ({error}): half-written?", _AGAIN) from error
        found = file.metadata.get("format")
        if found != FORMAT:
            told = found and found[:40]
            raise LoraloomError(f"{path}: not a statistics file: its format is {told!r}, not {FORMAT!r}", _AGAIN)
        facts = _read_facts(path, {"lost": "{}", "privacy": "{}", **file.metadata})
        moments = StoredMoments(file, facts.pop("counts"), facts.pop("lost"))
        widths: dict[str, set[int]] = {}
        for layer in facts["layers"].values():
            widths.setdefault(layer.input, set()).add(layer.in_features)
        moments.check(widths)
        return cls(moments=moments, **facts)

    @property
    def _name(self) -> str:
        return f"{self.base} ({self.texts} texts)"

    def _repr_html_(self) -> str:
        told = {
            "base": self.base,
            "texts": f"{self.texts:,}",
            "tokens": f"{self.tokens:,}",
            "a row is": f"a {self.kind}",
            "layers": len(self.layers),
            "inputs": len(self.moments),
            "widths": ", ".join(map(str, sorted({layer.in_features for layer in self.layers.values()}))),
            "privacy": ", ".join(f"{name} {value:g}" for name, value in (self.privacy or {}).items()) or "none",
        }
        return facts("Statistics of a task's inputs", told)

    def _check_fit(self, other: Statistics) -> None:
        problems = []
        for what in ("fingerprint", "kind", "privacy"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if mine != theirs:
                problems.append(f"{what}: {self._name} has {mine}, {other._name} has {theirs}")
        for name in sorted(self.layers.keys() | other.layers.keys()):
            mine, theirs = self.layers.get(name), other.layers.get(name)
            if mine != theirs:
                problems.append(f"layer {name}: {self._name} has {mine}, {other._name} has {theirs}")
        raise_problems(
            "these statistics do not fit together",
            problems,
            "collect both on one base, target_modules and kind of rows",
        )


def save_moments(
    moments: Mapping[str, Moment], path: Path, metadata: Mapping[str, str], *, overwrite: bool = False
) -> None:
    """Write `moments` and `metadata` as one file, whole or not at all; equal ones give equal bytes."""
    tensors: dict[str, Tensor] = {}
    counts, lost = {}, {}
    for name, moment in moments.items():
        tensors |= {
            f"{name}.{part}": value.contiguous() for part in PARTS if (value := getattr(moment, part)) is not None
        }
        counts[name] = moment.count
        if moment.lost:
            lost[name] = moment.lost
    own = {"counts": json.dumps(counts), **({"lost": json.dumps(lost)} if lost else {})}
    # widest first, so that every tensor is aligned
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    with staged_file(path, mark=FORMAT.encode(), overwrite=overwrite) as temporary:
        file = TensorFile(temporary, names, {**metadata, **own})
        for name in names:
            file.add(name, tensors[name])
        file.close()


T = TypeVar("T")
_LAYER, _COUNT = TypeAdapter(Layer), TypeAdapter(Annotated[int, Field(strict=True, ge=0, le=2**53)])
_LOST = TypeAdapter(Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)])
_PRIVACY = TypeAdapter(Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)])


def _read_facts(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return what the metadata of a file tells, by key. Raises LoraloomError telling every key that is damaged."""
    facts: dict[str, Any] = {}
    problems = []
    for key, read in _FACTS.items():
        try:
            facts[key] = read(metadata[key])
        except KeyError:
            problems.append(f"{key} is missing")
        except ValueError as error:
            problems.append(f"{key}: {error}")
    raise_problems(f"{path}: its metadata is damaged", problems, _AGAIN)
    seen, kind = facts["texts" if facts["kind"] == "sample" else "tokens"], facts["kind"]
    impossible = [
        f"{name}: {count} rows of {seen} {kind}s" for name, count in facts["counts"].items() if count > _CALLS * seen
    ]
    raise_problems(str(path), impossible or ([] if facts["layers"] else ["it covers no layer"]), _AGAIN)
    return facts


def _name(text: str) -> str:
    if len(text) > _LONGEST:
        raise ValueError(f"{len(text)} characters are no name")
    return text


def _kind(text: str) -> Kind:
    if text not in get_args(Kind):
        raise ValueError(f"{text[:40]!r} is neither 'token' nor 'sample'")
    return cast(Kind, text)


def _count(text: str) -> int:
    if not re.fullmatch("[0-9]{1,15}", text):
        raise ValueError(f"{text[:40]!r} is no count")
    return int(text)


def _entries(schema: TypeAdapter[T], text: str) -> dict[str, T]:
    """Return a JSON object, each value as `schema` has it. Raises ValueError telling the first that is not."""
    content = parse_json(text)
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    if len(content) > MOST_TENSORS:
        raise ValueError(f"{len(content)} entries are more than any model has")
    found = {}
    for name, value in content.items():
        try:
            found[name] = schema.validate_python(value)
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join([name[:_LONGEST], *map(str, fault["loc"])])
            raise ValueError(f"{where}: {explained(dict(fault))}") from error
    return found


def _privacy(text: str) -> dict[str, float] | None:
    found = _entries(_PRIVACY, text)
    strange = sorted(found.keys() - {"clip", "epsilon", "delta"})
    if strange:
        raise ValueError(f"{strange[0][:40]!r} is none of clip, epsilon and delta")
    return found or None


_FACTS: dict[str, Callable[[str], Any]] = {
    "base": _name,
    "fingerprint": _name,
    "kind": _kind,
    "texts": _count,
    "tokens": _count,
    "layers": partial(_entries, _LAYER),
    "counts": partial(_entries, _COUNT),
    "lost": partial(_entries, _LOST),
    "privacy": _privacy,
}
