"""How `training_arms.py` trains an arm: a loop by hand, for most of what was tried is in no trainer.

A penalty, projected gradients, a scale that jumps while training, noise in place of the other adapters: none of it
earned a place in the package, so it lives here alone.
"""

from __future__ import annotations

import itertools
import random
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from arms_lib import BASE, Arm, Ground, rows_off, starts_of
from torch import Tensor, nn
from torch.nn import functional

from loraloom import Head, Update, load_classifier, project_out, task_seed

ALPHA, WARMUP = 16, 0.06
Trained = tuple[dict[str, Update], Head]


def train_arm(ground: Ground, name: str, arm: Arm, seed: int) -> dict[str, Trained]:
    """Train every task's adapter and head, and tell of each on the error stream."""
    done = {}
    for task in ground.tasks:
        began = time.time()
        off = rows_off(ground, arm, task)
        starts = starts_of(ground, arm, task, off, seed)
        done[task] = Run(ground, arm, task, starts, off, seed).train()
        avoided = sum(avoid.shape[1] for _, avoid in starts.values()) / len(starts)
        told = f"{name}, seed {seed}, {task}: {avoided:.1f} directions avoided a layer, {time.time() - began:.0f} s"
        print(told, file=sys.stderr, flush=True)
    return done


class Run:
    """The training of one adapter and its head: AdamW without decay, warm-up, linear decline, rows of like length."""

    def __init__(
        self,
        ground: Ground,
        arm: Arm,
        task: str,
        starts: Mapping[str, tuple[Tensor, Tensor]],
        off: Mapping[str, Sequence[Tensor]],
        seed: int,
    ) -> None:
        self.arm, self.settings, self.rows = arm, ground.settings, ground.tasks[task]
        self.tokenizer = ground.evaluator.tokenizer
        self.seed = task_seed(0, "x") if arm.shared else task_seed(seed, task)
        self.noise_seeds = itertools.count(zlib.crc32(f"{seed}{task}".encode()) + 1)
        self.model: Any = load_classifier(BASE, self.rows.outputs, regression=self.rows.regression, seed=self.seed)
        self.model.train().requires_grad_(False)
        self.model.classifier.requires_grad_(True)
        layers = self.settings.layers(self.model)
        self.scaling = ALPHA / self.settings.rank
        self.avoid = {name: avoid for name, (_, avoid) in starts.items()}
        self.A = {name: nn.Parameter(starts[name][0].clone(), arm.keep != "frozen") for name in layers}
        self.B = {name: nn.Parameter(torch.zeros(m.out_features, self.settings.rank)) for name, m in layers.items()}
        self.factor = dict.fromkeys(layers, 1.0)
        self.penalised = _penalised(layers, off) if arm.penalty else {}
        for name, layer in layers.items():
            layer.register_forward_hook(self._hook(name))

    def train(self) -> Trained:
        """Return the update of every layer and the head."""
        head = self.model.classifier
        if self.rows.regression:
            nn.init.constant_(head.bias, float(self.rows.train_labels.mean()))
        rate = self.settings.lr * (2 if self.arm.keep == "frozen" else 1)
        trained = [*self.A.values(), *self.B.values(), *head.parameters()]
        optimiser = torch.optim.AdamW([p for p in trained if p.requires_grad], lr=rate, weight_decay=0.0)
        order = list(self._batches())
        for step, chosen in enumerate(order):
            warm = len(order) * WARMUP
            decline = (len(order) - step) / max(len(order) - warm, 1)
            for group in optimiser.param_groups:
                group["lr"] = rate * min((step + 1) / max(warm, 1), decline)
            torch.manual_seed(self.seed * 100003 + step)  # dropout
            self._shake(step)
            self._loss(chosen).backward()  # type: ignore[no-untyped-call]
            if self.arm.keep == "gradient":
                for name, A in self.A.items():
                    assert A.grad is not None
                    A.grad = project_out(A.grad, self.avoid[name])
            optimiser.step()
            optimiser.zero_grad()
            self._keep((step + 1) / len(order))
        updates = {name: Update(self.scaling * self.B[name].detach(), A.detach().clone()) for name, A in self.A.items()}
        tensors = {"classifier.weight": head.weight.detach().clone(), "classifier.bias": head.bias.detach().clone()}
        return updates, Head(tensors, "classifier")

    def _batches(self) -> Iterator[list[int]]:
        """Yield the rows of every step: an epoch is shuffled, sorted by length within 50 batches, shuffled again."""
        size, draw = self.settings.batch, torch.Generator().manual_seed(self.seed)
        for _ in range(self.settings.epochs):
            rows = torch.randperm(len(self.rows.train), generator=draw).tolist()
            cut = []
            for start in range(0, len(rows), size * 50):
                block = sorted(rows[start : start + size * 50], key=lambda i: -len(self.rows.train[i]["input_ids"]))
                cut += [block[i : i + size] for i in range(0, len(block), size)]
            yield from (cut[i] for i in torch.randperm(len(cut), generator=draw).tolist())

    def _loss(self, chosen: list[int]) -> Tensor:
        batch = self.tokenizer.pad([self.rows.train[i] for i in chosen], return_tensors="pt")
        logits, labels = self.model(**batch).logits, self.rows.train_labels[chosen]
        if self.rows.regression:
            loss = functional.mse_loss(logits.squeeze(-1), labels)
        else:
            loss = functional.cross_entropy(logits, labels)
        if self.arm.penalty:
            loss = loss + self.arm.penalty * self._response_to_others()
        return loss

    def _response_to_others(self) -> Tensor:
        """Return the sum over layers of |s B A h|^2 / |W|^2, mean over rows h of unit energy an entry."""
        total = torch.zeros(())
        for name, (gram, weight) in self.penalised.items():
            A, B = self.A[name], self.B[name]
            total = total + self.scaling**2 * ((B.T @ B) * (A @ gram @ A.T)).sum() / weight
        return total

    def _shake(self, step: int) -> None:
        """Draw the factors on the update for one step."""
        if self.arm.jitter:
            kind, low, high = self.arm.jitter
            draw = random.Random(self.seed * 7 + step)
            one = draw.uniform(low, high)
            self.factor = {name: one if kind == "step" else draw.uniform(low, high) for name in self.factor}

    @torch.no_grad()
    def _keep(self, progress: float) -> None:
        """Take the directions to stay off out of A, as far as the arm wants it at this share of the training."""
        if self.arm.keep in ("projected", "tighten"):
            share = min(1.0, progress / 0.5) if self.arm.keep == "tighten" else 1.0
            for name, A in self.A.items():
                avoid = self.avoid[name]
                A.copy_(project_out(A, avoid[:, : round(avoid.shape[1] * share)]))

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        A, B = self.A[name], self.B[name]

        def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = inputs[0]
            output = output + (self.scaling * self.factor[name]) * ((x @ A.T) @ B.T)
            return output + self._noise(x, A, B) if self.arm.noise else output

        return add

    @torch.no_grad()
    def _noise(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Return what a random update of the same rank adds, at `noise` times the rms of the own one."""
        draw = torch.Generator().manual_seed(next(self.noise_seeds))
        own = (self.scaling * ((x @ A.T) @ B.T)).square().mean().sqrt()
        rank = A.shape[0]
        z = (x @ torch.randn(x.shape[-1], rank, generator=draw)) @ torch.randn(rank, B.shape[0], generator=draw)
        return z * (self.arm.noise * own / z.square().mean().sqrt())


def _penalised(layers: Mapping[str, Any], off: Mapping[str, Sequence[Tensor]]) -> dict[str, tuple[Tensor, float]]:
    """Return by layer the others' Gram matrix (n, n) float32 with a mean diagonal of 1, and |W|^2 of the base."""
    found = {}
    for name, layer in layers.items():
        gram = torch.stack([h.double().T @ h.double() / len(h) for h in off[name]]).mean(dim=0)
        found[name] = ((gram / gram.diagonal().mean()).float(), float(layer.weight.square().sum()))
    return found
