"""How `training_arms.py` merges and scores the adapters of an arm, and what it does to adapters after training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from arms_lib import Ground
from arms_train import Trained
from torch import Tensor

from loraloom import (
    Head,
    Moment,
    TaskProbe,
    Update,
    align_head,
    concatenate,
    get_rule,
    ratio,
    reading_groups,
    response,
    rows_read,
)

SCALES = {
    "task arithmetic": (0.3, 0.5, 0.7, 1.0),
    "tsv": (0.5, 0.75, 1.0),
    "regmean": (1.0,),
    "iteris": (1.0,),
}


def by_rule(name: str, updates: Sequence[Update], **given: Any) -> Update:
    """Return one layer merged by a rule with its default options."""
    rule = get_rule(name)
    merged = rule.layer(updates, rule.check({})[0], **given)
    assert isinstance(merged, Update)
    return merged


PLAIN: dict[str, Callable[[Sequence[Update]], Update]] = {
    "task arithmetic": concatenate,
    "tsv": lambda updates: by_rule("tsv", updates),
}
ROWS, RIDGES = (0, 10, 25, 50, 100, 200, 400), (0.01, 0.1, 1.0, 10.0)
RIDGE = 0.1  # of the aligned heads in all scores, as the figures were taken; the package's default is 1 by now
Updates = dict[str, dict[str, Update]]  # by task and layer
Pair = tuple[float, float]  # a score with the heads as trained and with the heads aligned


class Adapters:
    """The adapters of one arm and seed, one a task, with their heads, scored before merging."""

    def __init__(self, ground: Ground, trained: Mapping[str, Trained]) -> None:
        self.ground = ground
        self.updates: Updates = {task: updates for task, (updates, _) in trained.items()}
        self.heads = {task: head for task, (_, head) in trained.items()}
        self.layers = list(next(iter(self.updates.values())))
        self.features: dict[str, Tensor] = {}
        self.single: dict[str, float] = {}
        for task, rows in ground.tasks.items():
            self.features[task], heldout = self._features(task, self.updates[task])
            self.single[task] = rows.score(self.heads[task].logits(heldout))

    def single_of(self, task: str, updates: Mapping[str, Update]) -> float:
        """Return the score of a task's head on `updates`."""
        return self.ground.tasks[task].score(self.heads[task].logits(self._features(task, updates)[1]))

    def _features(self, task: str, updates: Mapping[str, Update]) -> tuple[Tensor, Tensor]:
        """Return what the head reads of the alignment texts and of the held-out rows with `updates` in the base."""
        rows = self.ground.tasks[task]
        texts = rows.train[: self.ground.settings.alignment_texts]
        found = self.ground.evaluator.features(updates, self.heads[task], texts + rows.heldout)
        return found[: len(texts)], found[len(texts) :]

    def at_scales(self, merged: Mapping[str, Update], scales: Sequence[float]) -> dict[float, Pair]:
        """Return by scale the mean score over tasks of `merged` times the scale."""
        found = {}
        for scale in scales:
            updates = scaled(merged, scale)
            pairs = [self._pair(task, updates) for task in self.ground.tasks]
            found[scale] = (sum(pair[0] for pair in pairs) / len(pairs), sum(pair[1] for pair in pairs) / len(pairs))
        return found

    def _pair(self, task: str, updates: Mapping[str, Update]) -> Pair:
        head, rows = self.heads[task], self.ground.tasks[task]
        texts, heldout = self._features(task, updates)
        aligned = align_head(head, self.features[task], texts, ridge=RIDGE)
        return rows.score(head.logits(heldout)), rows.score(aligned.logits(heldout))

    def moments(self, layer: str) -> dict[str, Moment]:
        """Return by task the moment of what the base's layer reads."""
        return {task: Moment.of_rows(self.ground.seen(task)[layer]) for task in self.updates}

    def ratio(self) -> float:
        """Return the response of the adapters to the other tasks' inputs over that to their own."""
        found = []
        for layer in self.layers:
            moments = self.moments(layer)
            pairs = [[response(one[layer], moment)[1] for moment in moments.values()] for one in self.updates.values()]
            found.append(torch.tensor(pairs, dtype=torch.float64))
        return ratio(torch.stack(found))

    def merged(self, rule: str) -> dict[str, Update]:
        """Return the merged update of every layer by one of the rules in SCALES, at scale 1."""
        layers = by_layer(self.updates)
        if rule in PLAIN:
            return {layer: PLAIN[rule](updates) for layer, updates in layers.items()}
        if rule == "regmean":
            return {
                layer: by_rule("regmean", updates, moments=list(self.moments(layer).values()))
                for layer, updates in layers.items()
            }
        iteris = get_rule("iteris")
        found = iteris.model(layers, iteris.check({})[0], probe=self.probe())
        return {layer: update for layer, update in found.items() if isinstance(update, Update)}

    def probe(self) -> TaskProbe:
        """Return the base with every task's texts, as rules that go up the model look at it."""
        rows, count = list(self.ground.tasks.values()), self.ground.settings.statistics_texts
        texts, regression = [one.train[:count] for one in rows], [one.regression for one in rows]
        return TaskProbe(self.ground.evaluator, list(self.heads.values()), texts, None, regression)


def by_layer(updates: Updates) -> dict[str, list[Update]]:
    """Return by layer the updates of all tasks."""
    return {layer: [one[layer] for one in updates.values()] for layer in next(iter(updates.values()))}


def scaled(updates: Mapping[str, Update], scale: float) -> dict[str, Update]:
    """Return the updates times `scale`."""
    return {layer: Update(scale * update.B, update.A) for layer, update in updates.items()}


def mean(scores: Mapping[str, float]) -> float:
    """Return the mean over tasks."""
    return sum(scores.values()) / len(scores)


def best(curve: Mapping[float, Pair]) -> str:
    """Return the best score in points @ its scale, with the heads as trained / aligned."""
    tops = [max(curve, key=lambda scale: curve[scale][head]) for head in (0, 1)]
    return " / ".join(f"{100 * curve[scale][head]:.1f} @ {scale:g}" for head, scale in enumerate(tops))


def equalised(adapters: Adapters) -> None:
    """Print scores after every task's update of a layer is given the geometric mean of the norms, or responses."""
    print("| updates of equal | task arithmetic | tsv |\n|---|---|---|")
    for kind in ("norm", "response"):
        found: Updates = {task: {} for task in adapters.updates}
        for layer in adapters.layers:
            sizes = {
                task: math.sqrt(one[layer].energy())
                if kind == "norm"
                else response(one[layer], adapters.moments(layer)[task])[1]
                for task, one in adapters.updates.items()
            }
            middle = math.exp(sum(math.log(size) for size in sizes.values()) / len(sizes))
            for task, one in adapters.updates.items():
                found[task][layer] = Update(one[layer].B * (middle / sizes[task]), one[layer].A)
        print(f"| {kind} | {_merged(adapters, found, (0.3, 0.5, 1.0), (0.5, 0.75, 1.0))} |", flush=True)


def retrofitted(adapters: Adapters) -> None:
    """Print scores after A <- A K (K + mu O)^-1, by mu: near the trained one on own inputs, quiet on the others'.

    K = G_own + e I, O = the sum of the others' G, G the mean over rows, e 0.01 of the mean diagonal of all G.
    """
    print("\n| mu | single | task arithmetic | tsv |\n|---|---|---|---|")
    for mu in (0.1, 0.3, 1.0):
        found: Updates = {task: {} for task in adapters.updates}
        for layer in adapters.layers:
            grams = {task: moment.as_gram() / moment.count for task, moment in adapters.moments(layer).items()}
            every = torch.stack(list(grams.values()))
            e = 0.01 * every.diagonal(dim1=1, dim2=2).mean() * torch.eye(every.shape[1], dtype=torch.float64)
            for task, one in adapters.updates.items():
                K, others = grams[task] + e, every.sum(dim=0) - grams[task]
                A = torch.linalg.solve(K + mu * others, (one[layer].A.double() @ K).T).T
                found[task][layer] = Update(one[layer].B, A.float())
        single = 100 * mean({task: adapters.single_of(task, one) for task, one in found.items()})
        print(f"| {mu:g} | {single:.1f} | {_merged(adapters, found, (0.5, 1.0, 1.5), (0.5, 1.0, 1.5))} |", flush=True)


def corrected(adapters: Adapters) -> None:
    """Print scores of `iteris` and of the same with the base's own term, W0 (X_i - Y_i), which corrects drift.

    dW = (sum_i l_i (dW_i (X_i^T Y_i + e I) + c W0 (X_i - Y_i)^T Y_i)) (sum_i l_i (Y_i^T Y_i + e I))^-1, c the share of
    the base's term; at c = 0 it is the package's rule. Otherwise dW has full rank.
    """
    layers, probe = by_layer(adapters.updates), adapters.probe()
    modules = adapters.ground.settings.layers(adapters.ground.evaluator.model)
    merged: dict[float, dict[str, Update]] = {share: {} for share in (0.0, 0.5, 1.0)}
    for group in reading_groups(layers, probe):
        own = [_read(probe, task, updates, group[0]) for task, updates in enumerate(adapters.updates.values())]
        for share, done in merged.items():
            inside = [{**updates, **done} for updates in adapters.updates.values()]
            pairs = [(X, _read(probe, task, inside[task], group[0])) for task, X in enumerate(own)]
            for one in group:
                done[one] = _with_base(layers[one], pairs, share * modules[one].weight.double().cpu())
    print("\n| base's term | merged |\n|---|---|")
    for share, done in merged.items():
        print(f"| {share:g} | {best(adapters.at_scales(done, (1.0,)))} |", flush=True)


def _with_base(updates: Sequence[Update], pairs: Sequence[tuple[Tensor, Tensor]], W: Tensor) -> Update:
    """Return the dense solution of `corrected` for one layer; `pairs` holds each task's X, Y (k, n), W (m, n)."""
    n = W.shape[1]
    e = 0.01 * sum(float(Y.square().mean()) for _, Y in pairs) / len(pairs) * torch.eye(n, dtype=torch.float64)
    target, gram = torch.zeros_like(W), torch.zeros(n, n, dtype=torch.float64)
    for update, (X, Y) in zip(updates, pairs, strict=True):
        own = update.B.double() @ update.A.double()
        weight = update.energy() / float((X @ own.T).square().sum() / len(X))
        target += weight * (own @ (X.T @ Y / len(X) + e) + W @ (X - Y).T @ Y / len(X))
        gram += weight * (Y.T @ Y / len(Y) + e)
    return Update(torch.linalg.solve(gram, target.T).T.float(), torch.eye(n))


def _read(probe: TaskProbe, task: int, inside: Mapping[str, Update], wanted: str) -> Tensor:
    """Return the rows (k, n) float64 that a layer reads of a task's texts with the updates `inside`."""
    return torch.cat([rows_read(probe, task, batch, inside, wanted) for batch in probe.batches[task]]).double()


def _merged(adapters: Adapters, updates: Updates, *scales: Sequence[float]) -> str:
    """Return the cells of the rules in PLAIN on `updates`."""
    layers = by_layer(updates)
    curves = [
        adapters.at_scales({layer: merge(every) for layer, every in layers.items()}, chosen)
        for merge, chosen in zip(PLAIN.values(), scales, strict=True)
    ]
    return " | ".join(best(curve) for curve in curves)


def heads_by_rows(adapters: Adapters) -> None:
    """Print scores of `tsv` by how many texts heads are aligned on and with what ridge; `mean` moves the mean alone."""
    tasks, merged = adapters.ground.tasks, adapters.merged("tsv")
    for scale in (0.5, 1.0):
        print(f"\n| tsv @ {scale:g}, texts | mean | {' | '.join(map(str, RIDGES))} |\n|{'---|' * (2 + len(RIDGES))}")
        updates, read = scaled(merged, scale), {}
        for task, rows in tasks.items():
            head, texts = adapters.heads[task], rows.train[: max(ROWS)]
            features = adapters.ground.evaluator.features
            own = features(adapters.updates[task], head, texts)
            read[task] = (own, features(updates, head, texts), features(updates, head, rows.heldout))
        for count in ROWS:
            cells = [
                100 * mean({t: tasks[t].score(_logits(adapters.heads[t], *read[t], count, ridge)) for t in tasks})
                for ridge in (None, *RIDGES)
            ]
            print(f"| {count} | {' | '.join(f'{cell:.1f}' for cell in cells)} |", flush=True)


def _logits(head: Head, own: Tensor, merged: Tensor, heldout: Tensor, count: int, ridge: float | None) -> Tensor:
    """Return the logits on `heldout`, aligned on `count` texts with `ridge`, or by the mean alone where it is None."""
    if not count:
        return head.logits(heldout)
    own, merged = own[:count], merged[:count]
    if ridge is None:
        return head.logits(heldout - merged.mean(dim=0) + own.mean(dim=0))
    return align_head(head, own, merged, ridge=ridge).logits(heldout)
