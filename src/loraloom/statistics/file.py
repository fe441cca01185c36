"""The statistics of a task, and their file: written whole, checked one input at a time, read at each access.

A file may come from anyone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loraloom.errors import LoraloomError, did_you_mean, raise_problems, reads_file
from loraloom.files.atomic import staged_file
from loraloom.files.tensors import all_finite
from loraloom.settings import Kind
from loraloom.statistics.moments import Moment

FORMAT = "loraloom-statistics-1"
_DTYPES = {"total": torch.float64, "rows": torch.float32, "gram": torch.float64, "factor": torch.float32}
_AGAIN = "collect the statistics again"


@dataclass(frozen=True)
class Layer:
    """One target linear layer: `input` is the path of the first target layer that reads the same tensor."""

    input: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class Statistics:
    """Second moments of what each target layer of a base model reads, uncentred, over the texts of one task.

    `moments` go by the `input` of a layer, `layers` by module path in the base model; `texts` are the samples seen,
    `tokens` those of their tokens that count (of both sides of an encoder-decoder). A row is a token or, for `kind`
    "sample", the mean over a sample's tokens. `fingerprint` is that of the base weights. Moments of a file are read
    from it at each access. `privacy` tells what was done for the texts' sake: the norm `clip` to which rows were
    clipped, and `epsilon` and `delta` of the noise added (`loraloom.statistics.privacy`).
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

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all."""
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
        save_moments(self.moments, Path(path), metadata)

    @classmethod
    @reads_file
    def load(cls, path: str | Path) -> Statistics:
        """Read a file that `save` wrote.

        Raises LoraloomError telling what is wrong with it: absent, half-written, of another format, shapes that do
        not fit, values that are not finite or that no rows could have given: it may come from anyone.
        """
        path, again = Path(path), "collect the statistics again"
        metadata = read_metadata(path)
        if metadata.get("format") != FORMAT:
            found = metadata.get("format")
            raise LoraloomError(f"{path}: not a statistics file: its format is {found!r}, not {FORMAT!r}", again)
        try:
            layers = {name: Layer(**fields) for name, fields in json.loads(metadata["layers"]).items()}
            moments = StoredMoments.of(path, metadata)
            texts, tokens = int(metadata["texts"]), int(metadata["tokens"])
            base, fingerprint, kind = metadata["base"], metadata["fingerprint"], _kind(metadata["kind"])
            told = json.loads(metadata.get("privacy", "{}"))
            privacy = {str(what): float(value) for what, value in told.items()} or None
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise LoraloomError(f"{path}: its metadata is damaged ({error!r})", again) from error
        widths: dict[str, set[int]] = {}
        for layer in layers.values():
            widths.setdefault(layer.input, set()).add(layer.in_features)
        moments.check(widths)
        return cls(base, fingerprint, moments, layers, texts, tokens, kind, privacy)

    @property
    def _name(self) -> str:
        return f"{self.base} ({self.texts} texts)"

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


def save_moments(moments: Mapping[str, Moment], path: Path, metadata: Mapping[str, str]) -> None:
    """Write `moments` and `metadata` as one file, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    counts, lost = {}, {}
    for name, moment in moments.items():
        tensors |= {
            f"{name}.{part}": value.contiguous() for part in _DTYPES if (value := getattr(moment, part)) is not None
        }
        counts[name] = moment.count
        if moment.lost:
            lost[name] = moment.lost
    own = {"counts": json.dumps(counts), **({"lost": json.dumps(lost)} if lost else {})}
    with staged_file(path) as temporary:
        save_file(tensors, temporary, metadata={**metadata, **own})


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a file. Raises LoraloomError where it is absent or half-written."""
    if not path.is_file():
        raise LoraloomError(f"{path}: no such file", "name a file that was saved as statistics")
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise LoraloomError(f"{path}: cannot be read ({error}): half-written?", _AGAIN) from error


class StoredMoments(Mapping[str, Moment]):
    """The moments of a file by input, read at each access; the last one stays, for layers that share an input."""

    def __init__(self, path: Path, counts: Mapping[str, int], lost: Mapping[str, float]) -> None:
        self.path = path
        self.counts = counts
        self.lost = lost
        self._last: tuple[str, Moment] | None = None

    @classmethod
    def of(cls, path: Path, metadata: Mapping[str, str]) -> StoredMoments:
        """Return the moments that `metadata` tells of. Raises KeyError, ValueError, ... where it is damaged."""
        counts = {str(name): int(count) for name, count in json.loads(metadata["counts"]).items()}
        lost = {str(name): float(value) for name, value in json.loads(metadata.get("lost", "{}")).items()}
        return cls(path, counts, lost)

    def __getitem__(self, name: str) -> Moment:
        """Return one moment. Raises LoraloomError where the file has gone or changed."""
        if self._last is None or self._last[0] != name:
            count = self.counts[name]
            try:
                # opened anew, so that the pages of one input are given back before the next
                with safe_open(self.path, framework="pt") as file:
                    there = set(file.keys())
                    # copied: what is mapped must not outlive the file
                    parts = {
                        part: file.get_tensor(f"{name}.{part}").clone() for part in _DTYPES if f"{name}.{part}" in there
                    }
            except (SafetensorError, OSError) as error:
                raise LoraloomError(f"{self.path}: cannot be read any more ({error})", "was it replaced?") from error
            self._last = name, Moment(count, lost=self.lost.get(name, 0.0), **parts)
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self.counts)

    def __len__(self) -> int:
        return len(self.counts)

    def check(self, widths: Mapping[str, set[int]]) -> None:
        """Raise LoraloomError telling all that does not fit; `widths` are those that the layers of an input read.

        Names and shapes first, then values, input by input, so that no more than one is in memory.
        """
        with safe_open(self.path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        problems = [f"input {name!r} of a layer has no moment" for name in sorted(widths.keys() - self.counts.keys())]
        problems += [
            f"lost names {name!r}, which has no moment" for name in sorted(self.lost.keys() - self.counts.keys())
        ]
        for name in self.counts:
            problems += self._shape_faults(name, widths.get(name, set()), shapes)
        known = {f"{name}.{part}" for name in self.counts for part in _DTYPES}
        problems += [f"tensor {name} belongs to no input" for name in sorted(shapes.keys() - known)]
        raise_problems(str(self.path), problems, _AGAIN)
        impossible = []
        for name in self.counts:
            wrong = self._value_faults(name)
            problems += wrong
            impossible += [] if wrong else [f"{name}: {fault}" for fault in self[name].faults()]
        raise_problems(str(self.path), problems, _AGAIN)
        raise_problems(str(self.path), impossible, "do not use this file: no layer inputs give it; ask for it again")

    def _shape_faults(self, name: str, widths: set[int], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        count, lost = self.counts[name], self.lost.get(name, 0.0)
        problems = [f"{name}: {count} rows"] if count < 0 else []
        if not (math.isfinite(lost) and lost >= 0):
            problems.append(f"{name}: lost is {lost}")
        if len(widths) != 1:
            return [*problems, f"{name}: read by layers of widths {sorted(widths)}, not of one"]
        (n,) = widths
        found = {part: shape for part in _DTYPES if (shape := shapes.get(f"{name}.{part}")) is not None}
        factor: Any = found.get("factor", ())
        fits: list[dict[str, tuple[int, ...]]] = [{"total": (n,), "rows": (count, n)}, {"total": (n,), "gram": (n, n)}]
        if len(factor) == 2 and factor[0] <= n:
            fits.append({"total": (n,), "factor": (factor[0], n)})
        if found not in fits:
            problems.append(f"{name}: {found} does not fit {count} rows of width {n}")
        if "rows" in found and lost:
            problems.append(f"{name}: rows that lost {lost}")
        return problems

    def _value_faults(self, name: str) -> list[str]:
        parts = {part: value for part in _DTYPES if (value := getattr(self[name], part)) is not None}
        problems = []
        for part, value in parts.items():
            if value.dtype != _DTYPES[part]:
                problems.append(f"{name}.{part}: is {value.dtype}, not {_DTYPES[part]}")
            elif not all_finite(value):
                problems.append(f"{name}.{part}: holds values that are not finite")
        return problems


def _kind(text: str) -> Kind:
    for kind in get_args(Kind):
        if text == kind:
            return cast(Kind, kind)
    raise ValueError(f"kind {text!r} is neither 'token' nor 'sample'")
