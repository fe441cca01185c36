"""What `training_arms.py` compares, before training: rows of GLUE, what the base reads of them, where A starts."""

from __future__ import annotations

import json
import math
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor, nn

from loraloom import (
    GLUE,
    STANDARD_LIBRARY,
    Encoded,
    Evaluator,
    LayerReader,
    Moment,
    Side,
    batches,
    docstrings_of,
    encode,
    loud_directions,
    metric_value,
    parts,
    project_out,
    response_scale,
    spectrum,
    target_layers,
)

BASE = "demo"
GENERIC = {"atlas": ("", 300), "few": ("", 30), "foreign": ("mnli", 100)}  # text in place of the others: whose, rows
Jitter = tuple[Literal["step", "layer"], float, float]


@dataclass(frozen=True)
class Settings:
    """What all arms of a comparison share."""

    tasks: tuple[str, ...]
    rows: int
    heldout: int
    statistics_texts: int
    alignment_texts: int
    max_length: int
    rank: int
    targets: str
    lr: float
    epochs: int
    batch: int

    def layers(self, model: nn.Module) -> dict[str, Any]:
        """Return the layers of a model that are trained."""
        return target_layers(model, self.targets if self.targets == "all-linear" else self.targets.split(","))


@dataclass(frozen=True)
class Arm:
    """One way of training. A frozen A gets twice the learning rate: B alone has to move.

    start: one of STARTS. response: scale the start so that its response to the own inputs is that of PEFT's default A.
    avoid: which loud directions (see `loud`) A starts off; off: of whose inputs, the `others`, `all` tasks or one in
    GENERIC; keep: what is done about them later.
    `projected`: taken out of A after every step; `gradient`: out of A's gradient, which Adam then rescales entry by
    entry; `tighten`: after every step, more of them until half of the training. special: whether [CLS] and [SEP] count
    in statistics. shared: one start and one order of batches for all tasks. penalty: its weight. jitter: (one factor
    a step for all layers or one a layer, from, to) on the update. noise: rms of a random update beside the own one,
    as a share of the own one's.
    """

    meaning: str
    start: str = "random"
    response: bool = True
    avoid: tuple[str, float] | None = None
    off: Literal["others", "all", "atlas", "few", "foreign"] = "others"
    keep: Literal["free", "projected", "frozen", "gradient", "tighten"] = "free"
    special: bool = True
    shared: bool = False
    penalty: float = 0.0
    jitter: Jitter | None = None
    noise: float = 0.0


@dataclass(frozen=True)
class Rows:
    """One task's rows: token ids, labels (k,) int64 or float32, and what its head gives."""

    regression: bool
    outputs: int
    metric: str
    train: Encoded
    train_labels: Tensor
    heldout: Encoded
    heldout_labels: Tensor

    def score(self, logits: Tensor) -> float:
        """Return the metric of `logits` on the held-out rows."""
        return metric_value(self.metric, logits, self.heldout_labels)


@dataclass
class Ground:
    """The base model, the tasks' rows, and what the base reads of them, which is read once."""

    settings: Settings
    evaluator: Evaluator
    tasks: dict[str, Rows]
    data: Path
    _seen: dict[tuple[str, bool], dict[str, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: Settings, data: Path) -> Ground:
        """Load the base, and `rows` + `heldout` training rows a task, shuffled by the task's name."""
        evaluator = Evaluator(BASE, max_length=settings.max_length)
        tasks = {name: read_task(data / name / "train.jsonl", name, settings, evaluator) for name in settings.tasks}
        return cls(settings, evaluator, tasks, data)

    def seen(self, name: str, special: bool = True) -> dict[str, Tensor]:
        """Return by layer the token rows (k, n) float32 that the base reads of a task's texts, or of one in GENERIC."""
        if (name, special) not in self._seen:
            texts = self._generic(name) if name in GENERIC else self.tasks[name].train[: self.settings.statistics_texts]
            self._seen[name, special] = self._read(texts, special)
        return self._seen[name, special]

    def _generic(self, name: str) -> Encoded:
        task, count = GENERIC[name]
        if task:
            return read_task(self.data / task / "train.jsonl", task, self.settings, self.evaluator).train[:count]
        rows = Dataset.from_dict({"text_a": atlas_texts(count)})
        return encode(rows, self.evaluator.tokenizer, self.settings.max_length)

    @torch.no_grad()
    def _read(self, encoded: Encoded, special: bool) -> dict[str, Tensor]:
        tokenizer, device = self.evaluator.tokenizer, next(self.evaluator.model.parameters()).device
        reader = LayerReader(self.evaluator.model, self.settings.layers(self.evaluator.model))
        found: dict[str, list[Tensor]] = {name: [] for name in reader.layers}
        for _, batch in batches(encoded, tokenizer, 32):
            counted = batch["attention_mask"] != 0
            if not special:
                counted &= ~torch.isin(batch["input_ids"], torch.tensor(tokenizer.all_special_ids))
            side = Side.of(counted)

            def see(name: str, x: Tensor, side: Side = side) -> None:
                found[name].append(side.rows(x.cpu(), "token"))

            reader.run({key: x.to(device) for key, x in batch.items()}, see, list(reader.layers))
        return {name: torch.cat(rows) for name, rows in found.items()}


def read_task(path: Path, name: str, settings: Settings, evaluator: Evaluator) -> Rows:
    """Return the rows of one task, of a file of objects with text_a, perhaps text_b, and label."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    random.Random(name).shuffle(rows)
    labels = GLUE[name].labels
    number: Callable[[Any], float | int] = float if labels is None else int

    def part(chosen: Sequence[Mapping[str, Any]]) -> tuple[Encoded, Tensor]:
        texts = {column: [str(row[column]) for row in chosen] for column in ("text_a", "text_b") if column in rows[0]}
        encoded = encode(Dataset.from_dict(texts), evaluator.tokenizer, evaluator.max_length)
        return encoded, torch.tensor([number(row["label"]) for row in chosen])

    train, heldout = rows[: settings.rows], rows[settings.rows : settings.rows + settings.heldout]
    return Rows(labels is None, 1 if labels is None else len(labels), GLUE[name].metric, *part(train), *part(heldout))


def atlas_texts(count: int) -> list[str]:
    """Return `count` paragraphs of Python's own docstrings, descriptions of parameters and repeats included.

    `loraloom.tasks.builtin_text.generic_texts`, which the package takes, leaves both out.
    """
    found = [
        " ".join(part.text.split())
        for docstring in docstrings_of(STANDARD_LIBRARY)
        for part in parts(docstring.text)
        if len(part.text.split()) >= 8
    ]
    random.Random(0).shuffle(found)
    return found[:count]


def loud(rows: Sequence[Tensor], avoid: tuple[str, float] | None, own: Tensor) -> Tensor:
    """Return (n, p) float64 with orthonormal columns: the directions of `rows`, one (k, n) a task, that `avoid` names.

    ("share", s): the fewest that hold s of the energy; ("centred", s): the same of the rows less each task's mean;
    ("top", p): the p loudest; ("gap", 0): as many as make the share of the rows' energy that they hold exceed that of
    the energy of the task's own rows `own` (k, n) the most; ("mean", 0): the mean rows.
    """
    if avoid is None:
        return rows[0].new_zeros(rows[0].shape[1], 0)
    kind, value = avoid
    if kind == "share":
        return loud_directions([Moment.of_rows(h) for h in rows], value)
    if kind == "mean":
        return orthonormal(torch.stack([h.mean(dim=0) for h in rows])).T
    moved = [h - h.mean(dim=0) for h in rows] if kind == "centred" else rows
    gram = torch.stack([x.T @ x / h.square().sum() for x, h in zip(moved, rows, strict=True)]).sum(dim=0)
    values, vectors = spectrum(Moment(0, gram.new_zeros(len(gram)), gram=gram))
    held = torch.cumsum(values, 0) / values.sum()
    if kind == "gap":
        held_own = torch.cumsum((own @ vectors).square().sum(dim=0), 0) / own.square().sum()
        return vectors[:, : int((held - held_own).argmax()) + 1]
    return vectors[:, : int(value) if kind == "top" else int((held < value).sum()) + 1]


def orthonormal(A: Tensor) -> Tensor:
    """Return rows (r, n) float64 that are orthonormal and span the same space."""
    Q: Tensor = torch.linalg.qr(A.T.double()).Q
    return Q.T


@dataclass(frozen=True)
class Layer:
    """What a start may look at, float64: rows (k, n) of the task and of those to stay off, loud directions (n, p).

    `draw` is the task's own source of random numbers in this layer, `common` one that all tasks share; the task is
    number `task` of `tasks`.
    """

    own: Tensor
    off: Sequence[Tensor]
    avoid: Tensor
    rank: int
    draw: torch.Generator
    common: torch.Generator
    task: int
    tasks: int

    @property
    def width(self) -> int:
        """Return n."""
        return self.own.shape[1]


def _default(layer: Layer) -> Tensor:
    bound = 1 / math.sqrt(layer.width)
    return torch.empty(layer.rank, layer.width).uniform_(-bound, bound, generator=layer.draw).double()


def _gaussian(layer: Layer) -> Tensor:
    return torch.randn(layer.rank, layer.width, generator=layer.draw).double() / layer.rank


def _random(layer: Layer) -> Tensor:
    gaussian = torch.randn(layer.rank, layer.width, generator=layer.draw).double()
    return orthonormal(project_out(gaussian, layer.avoid))


def _block(layer: Layer) -> Tensor:
    gaussian = torch.randn(layer.rank * layer.tasks, layer.width, generator=layer.common).double()
    return orthonormal(project_out(gaussian, layer.avoid))[layer.task * layer.rank :][: layer.rank]


def _own(layer: Layer) -> Tensor:
    Vh: Tensor = torch.linalg.svd(project_out(layer.own, layer.avoid), full_matrices=False).Vh
    return Vh[: layer.rank]


def _quiet(layer: Layer) -> Tensor:
    gram = torch.stack([h.T @ h / len(h) for h in layer.off]).sum(dim=0)
    vectors: Tensor = torch.linalg.eigh(gram)[1]
    return vectors[:, : layer.rank].T


def _mean(layer: Layer) -> Tensor:
    means = torch.stack([h.mean(dim=0) for h in layer.off])
    Vh: Tensor = torch.linalg.svd(means, full_matrices=True).Vh
    return Vh[-layer.rank :]


def _contrast(layer: Layer) -> Tensor:
    """Generalised eigenvectors: most own energy against that of the others, a tenth of whose mean is added to all."""
    others = torch.stack([h.T @ h / h.square().sum() for h in layer.off]).mean(dim=0)
    own = layer.own.T @ layer.own / layer.own.square().sum()
    ridge = 0.1 * others.diagonal().mean() * torch.eye(layer.width, dtype=torch.float64)
    whiten = torch.linalg.inv(torch.linalg.cholesky(others + ridge))
    vectors: Tensor = torch.linalg.eigh(whiten @ own @ whiten.T)[1].flip(1)[:, : layer.rank]
    return orthonormal((whiten.T @ vectors).T)


STARTS: dict[str, Callable[[Layer], Tensor]] = {
    "default": _default,  # PEFT's
    "gaussian": _gaussian,  # entries N(0, 1/r^2), as PEFT's option of that name
    "random": _random,
    "block": _block,  # rows of one random orthonormal basis, shared out among the tasks
    "own": _own,  # the most own energy
    "quiet": _quiet,  # the paper
    "mean": _mean,  # the authors' code
    "contrast": _contrast,
}


def generator(*key: object) -> torch.Generator:
    """Return a source of random numbers that hangs on `key` alone."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def rows_off(ground: Ground, arm: Arm, task: str) -> dict[str, list[Tensor]]:
    """Return by layer the rows (k, n) float32 to stay off, one tensor a task."""
    names = [arm.off] if arm.off in GENERIC else [other for other in ground.tasks if other != task or arm.off == "all"]
    seen = [ground.seen(name, arm.special) for name in names]
    return {layer: [rows[layer] for rows in seen] for layer in seen[0]}


def starts_of(
    ground: Ground, arm: Arm, task: str, off: Mapping[str, Sequence[Tensor]], seed: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return by layer where A (r, n) starts and the directions (n, p) it stays off, both float32."""
    found = {}
    drawn = "x" if arm.shared else task
    for name, own in ground.seen(task, arm.special).items():
        rows = [h.double() for h in off[name]]
        exact = own.double()
        avoid = loud(rows, arm.avoid, exact)
        draw, common = generator(seed, drawn, name), generator(seed, name)
        position, count = list(ground.tasks).index(task), len(ground.tasks)
        A = STARTS[arm.start](Layer(exact, rows, avoid, ground.settings.rank, draw, common, position, count))
        A = project_out(A, avoid)
        if arm.response:
            A = A * response_scale(Moment.of_rows(own), A)
        found[name] = (A.float(), avoid.float())
    return found
