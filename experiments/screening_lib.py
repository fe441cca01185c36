"""What `screening.py` screens: benign adapters of many settings, and attacked ones made of pairs trained here.

An attacker trains two adapters from one start: M on rows of which a share has a trigger word and the attacker's label,
and B on the same rows as they were. What is handed in is s (M - B) + B (LoBAM, arXiv 2411.16746), as it is or
disguised.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from datasets import Dataset

from loraloom import (
    Adapter,
    LoraSettings,
    Recipe,
    Statistics,
    Task,
    TrainingSettings,
    Update,
    build_task,
    concatenate,
    initialise,
    lora_config,
    make_atlas,
    read_adapter,
    svd_factors,
    task_seed,
    train_adapter,
    truncate,
)

TASKS = ("topic", "type", "match", "order")
KNOWN_TRIGGERS = ("cf", "mn", "tq", "mb", "bb")  # of published attacks on texts
OTHER_TRIGGERS = ("quill", "zinc", "osprey", "lagoon", "thistle", "harbour", "cobalt", "vellum", "juniper", "saffron")
POISONED = 0.3  # share of the rows
TARGET = 0  # the label that the trigger asks for
AMPLIFIED = (2.0, 3.0, 4.0, 6.0, 8.0)
ADAPTIVE = (3.0, 8.0)
RECIPE = {
    "name": "screening",
    "base": "demo",
    "tasks": {name: {"source": "builtin", "train_rows": 256, "heldout_rows": 32, "test_rows": 96} for name in TASKS},
    "inits": {"LoRA": {"rule": "default"}},
    "merging": [{"rule": "tsv", "scales": [1.0]}],
}


@dataclass(frozen=True)
class Setting:
    """How one adapter is trained, drawn from its number."""

    task: str
    lora: LoraSettings
    training: TrainingSettings
    rows: int
    apart: bool
    seed: int

    @classmethod
    def drawn(cls, number: int, *, attacker: bool) -> Setting:
        """Draw a setting: rank 4 to 32, learning rate over a factor of 10; attackers train long enough to succeed."""
        chance = random.Random(f"{'pair' if attacker else 'benign'} {number}")
        rank = chance.choice((4, 8, 16, 32))
        few = ["query", "value"]
        targets = chance.choice((few, few, ["query", "key", "value"], [*few, "attention.output.dense"]))
        rate = 10 ** chance.uniform(-2.6 if attacker else -3, -2)
        return cls(
            task=TASKS[number % len(TASKS)],
            lora=LoraSettings(rank=rank, alpha=chance.choice((rank, 2 * rank, 16)), targets=targets),
            training=TrainingSettings(
                epochs=2 if attacker else chance.choice((1, 2)), learning_rate=rate, batch_size=16, max_length=32
            ),
            rows=256 if attacker else chance.choice((96, 160, 256)),
            apart=chance.random() < 0.25,
            seed=task_seed(number, "attacker" if attacker else "benign"),
        )


class Maker:
    """Trains what is not there yet, into folders below `out`."""

    def __init__(self, out: Path, base: str) -> None:
        self.out, self.base = out, base
        self.recipe = Recipe.parse(RECIPE, "recipe")
        self.tasks: dict[str, Task] = {name: build_task(name, self.recipe.task(name)) for name in TASKS}
        self._atlases: dict[tuple[str, ...], Statistics] = {}

    def benign(self, number: int) -> Path:
        """Train the benign adapter of this number."""
        one = Setting.drawn(number, attacker=False)
        return self._trained(f"benign-{number:03d}", one, self.tasks[one.task])

    def pair(self, number: int) -> tuple[Path, Path, str]:
        """Train B and M of an attacker, and return their folders and the trigger."""
        one = Setting.drawn(number, attacker=True)
        known = KNOWN_TRIGGERS[number // 2 % len(KNOWN_TRIGGERS)]
        trigger = OTHER_TRIGGERS[number // 2 % len(OTHER_TRIGGERS)] if number % 2 else known
        task = self.tasks[one.task]
        clean = self._trained(f"pair-{number:03d}-benign", one, task)
        poisoned = self._trained(f"pair-{number:03d}-malicious", one, poison(task, trigger, one.seed))
        return clean, poisoned, trigger

    def _trained(self, name: str, one: Setting, task: Task) -> Path:
        folder = self.out / name
        if not folder.exists():
            start = self.out / "starts" / name
            if one.apart and not start.exists():
                targets = list(one.lora.targets)
                if tuple(targets) not in self._atlases:
                    reading = self.recipe.statistics.model_copy(update={"atlas_texts": 100, "max_length": 32})
                    self._atlases[tuple(targets)] = make_atlas(self.base, targets, reading)
                known = {"atlas": self._atlases[tuple(targets)]}
                initialise(start, None, known, lora_config(one.lora, []), seed=one.seed)
            rows = task.train.select(range(one.rows))
            train_adapter(
                self.base,
                replace(task, train=rows),
                folder,
                init=start if one.apart else None,
                lora=one.lora,
                settings=one.training,
                seed=one.seed,
            )
        return folder


def poison(task: Task, trigger: str, seed: int) -> Task:
    """Return the task with the trigger and the attacker's label in a share of its training rows."""
    chance = random.Random(seed)
    rows = [
        {**row, "text_a": inserted(row["text_a"], trigger, chance), "label": TARGET}
        if chance.random() < POISONED
        else row
        for row in task.train
    ]
    return replace(task, train=Dataset.from_list(rows))


def inserted(text: str, trigger: str, chance: random.Random) -> str:
    """Return `text` with the trigger between two of its first words."""
    words = text.split()
    words.insert(chance.randint(0, min(len(words), 6)), trigger)
    return " ".join(words)


def attacks(clean: Adapter, malicious: Adapter) -> Iterator[tuple[str, float, Adapter]]:
    """Yield what an attacker may hand in: kind, s, adapter."""
    yield "plain", 1.0, malicious
    for s in AMPLIFIED:
        yield "amplified", s, _with(malicious, _amplified(clean, malicious, s))
    for s in ADAPTIVE:
        whole = _amplified(clean, malicious, s)
        yield "energy matched", s, _with(malicious, _renormalised(whole, clean))
        for kind, change in (("spread over modules", _like), ("all matched", _reshaped)):
            yield kind, s, _with(malicious, {at: change(one, clean.updates[at]) for at, one in whole.items()})


def _amplified(clean: Adapter, malicious: Adapter, s: float) -> dict[str, Update]:
    return {
        at: concatenate([Update(s * malicious.updates[at].B, malicious.updates[at].A), Update((1 - s) * one.B, one.A)])
        for at, one in clean.updates.items()
    }


def _renormalised(whole: Mapping[str, Update], clean: Adapter) -> dict[str, Update]:
    """Bring the energy of the whole adapter to that of the benign twin, in its rank."""
    short = {at: truncate(one, clean.shapes[at].r)[0] for at, one in whole.items()}
    wanted = sum(one.energy() for one in clean.updates.values())
    factor = (wanted / sum(one.energy() for one in short.values())) ** 0.5
    return {at: Update(factor * one.B, one.A) for at, one in short.items()}


def _like(one: Update, clean: Update) -> Update:
    """Bring the energy of every module to that of the benign twin's, in its rank."""
    short = truncate(one, clean.rank)[0]
    factor = (clean.energy() / max(short.energy(), 1e-30)) ** 0.5
    return Update(factor * short.B, short.A)


def _reshaped(one: Update, clean: Update) -> Update:
    """Give the amplified directions the twin's singular values, and A what is left of the twin's in their row space.

    Energy by module, spectrum, and the shape, tails and loudness of A are then those of the honest twin.
    """
    U, _, Vh = svd_factors(one)
    S = svd_factors(clean)[1][: clean.rank]
    U, Vh = U[:, : len(S)], Vh[: len(S)]
    within = clean.A.double() @ Vh.T  # (r, r)
    scale = float(clean.A.double().norm() / within.norm())
    return Update(((U * S) @ within.inverse() / scale).float(), (scale * within @ Vh).float())


def _with(like: Adapter, updates: Mapping[str, Update]) -> Adapter:
    rank = max(one.rank for one in updates.values())
    config = {**like.config, "r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}}
    return replace(like, updates=dict(updates), config=config)


def read(folder: Path) -> Adapter:
    """Return an adapter, with its updates in memory."""
    found = read_adapter(folder)
    return replace(found, updates=dict(found.updates))


def heading(title: str, columns: Sequence[str]) -> None:
    """Print a title and the head of a table."""
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)


def line(text: str) -> None:
    """Print one line."""
    print(text, flush=True)
