"""Three adapters of a decoder, one louder than the others, whose sum is dead: the real losses, and what was foretold.

One layer of the base reads rows far louder than those of all others, the first token's above all, as pretrained
decoders have it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from loraloom.adapters.lowrank import update_bases
from loraloom.adapters.update import Adapter, Update
from loraloom.analysis.interference import response
from loraloom.analysis.prediction import Prediction, has_own_head, predict
from loraloom.model.runner import switched_in
from loraloom.statistics.collect import collect_statistics
from loraloom.statistics.file import Statistics
from tiny import NEUTRAL, WORDS

TASKS = {  # the two answers, the targets, rank, learning rate and steps
    "support": (("good", "bad"), ("q_proj", "v_proj"), 4, 0.02, 40),
    "legal": (("great", "poor"), ("q_proj", "k_proj", "v_proj", "o_proj"), 8, 0.05, 80),
    "sales": (("warm", "cold"), ("proj",), 2, 0.02, 40),
}
SCALES = (0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
Rows = dict[str, Tensor]


class Trio:
    """The base, each task's rows and adapter, and the share of what it gained that a sum at a scale loses."""

    def __init__(self) -> None:
        self.model = base()
        self.rows = {name: rows(spec[0], seed) for seed, (name, spec) in enumerate(TASKS.items())}
        self.adapters = {name: self.trained(name, seed) for seed, name in enumerate(TASKS)}
        self.layers = list(dict.fromkeys(layer for one in self.adapters.values() for layer in one.updates))
        self.statistics = {name: self.seen(given) for name, given in self.rows.items()}
        self.alone = {name: self.loss(name, adapter.updates) for name, adapter in self.adapters.items()}
        self.before = {name: self.loss(name, {}) for name in TASKS}

    def trained(self, name: str, seed: int) -> Adapter:
        """Return an adapter trained by Adam on the task's answers."""
        _, targets, rank, rate, steps = TASKS[name]
        chance = torch.Generator().manual_seed(seed)
        updates = {
            path: Update(
                torch.zeros(layer.out_features, rank, requires_grad=True),
                (torch.randn(rank, layer.in_features, generator=chance) / layer.in_features**0.5).requires_grad_(),
            )
            for path, layer in self.model.named_modules()
            if isinstance(layer, nn.Linear) and path.endswith(targets)
        }
        steps_of = torch.optim.Adam([factor for update in updates.values() for factor in (update.A, update.B)], rate)
        for _ in range(steps):
            with switched_in(self.model, updates):
                loss = self.model(**self.rows[name]).loss
            steps_of.zero_grad()
            loss.backward()
            steps_of.step()
        done = {path: Update(update.B.detach(), update.A.detach()) for path, update in updates.items()}
        return Adapter(done, {"task_type": "CAUSAL_LM"})

    def seen(self, given: Rows) -> Statistics:
        return collect_statistics(self.model, [{"input_ids": given["input_ids"]}], "all-linear")

    def loss(self, name: str, updates: Mapping[str, Update]) -> float:
        """Return nats a token of the task's answers."""
        with torch.no_grad(), switched_in(self.model, updates):
            return float(self.model(**self.rows[name]).loss)

    def lost(self, scale: float) -> list[float]:
        """Return of each task the share of what its adapter gained that the sum at `scale` loses."""
        summed = {}
        for layer in self.layers:
            there = [one.updates[layer] for one in self.adapters.values() if layer in one.updates]
            B, A = torch.cat([scale * update.B for update in there], dim=1), torch.cat([update.A for update in there])
            summed[layer] = Update(B, A)
        return [(self.loss(name, summed) - self.alone[name]) / (self.before[name] - self.alone[name]) for name in TASKS]

    def foretold_formerly(self, scale: float) -> np.ndarray:
        """Return (T,): errors in own output directions, inputs less their mean, in units of the mean own response."""
        found = np.zeros((2, len(TASKS)))
        for layer in self.layers:
            dW = [
                one.updates[layer].dense().double() if layer in one.updates else None for one in self.adapters.values()
            ]
            for j, name in enumerate(TASKS):
                own = dW[j]
                if own is None:
                    continue
                gram = self.statistics[name].moment(layer)
                S = gram.as_gram() / gram.count - torch.outer(gram.mean(), gram.mean())
                Q = update_bases(self.adapters[name].updates[layer])[1]
                off = Q.T @ (scale * sum(one for one in dW if one is not None) - own)
                found[:, j] += [float((off @ S @ off.T).trace()), float((own @ S @ own.T).trace())]
        return np.asarray(found[0] / found[1].mean())


def base() -> nn.Module:
    """Return a random Llama whose first layer has a neuron that the first token sets off."""
    torch.manual_seed(0)
    width = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=len(WORDS), num_hidden_layers=2, max_position_embeddings=40, **width)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=0.3)
    mlp, read = model.model.layers[0].mlp, []
    handle = mlp.register_forward_hook(lambda _, inputs, output: read.append(inputs[0][0, 0]))
    model(input_ids=torch.tensor([[1, 5]]))
    handle.remove()
    for layer in (mlp.up_proj, mlp.gate_proj):
        layer.weight[0] = 20 * read[0] / read[0].norm()
    mlp.down_proj.weight[:, 0] *= 1e-3
    return model


def rows(answers: tuple[str, str], seed: int) -> Rows:
    """Return 64 prompts of five words, each answered by one of two: which, one of the words tells."""
    chance, found = random.Random(seed), []
    for _ in range(64):
        words = [WORDS[word] for word in chance.choices(NEUTRAL, k=5)]
        found.append([1, *words, WORDS[answers[words[seed] % 2]], 2])
    ids = torch.tensor(found)
    labels = ids.clone()
    labels[:, :6] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.fixture(scope="module")
def trio() -> Trio:
    return Trio()


@pytest.fixture(scope="module")
def foretold(trio: Trio) -> Prediction:
    return predict(trio.adapters, trio.statistics)


def test_a_sum_that_is_dead_is_not_promised(trio: Trio, foretold: Prediction) -> None:
    """At scale 1 the quiet tasks are worse off than without an adapter, which no error of 0.00 may hide."""
    support, legal, sales = trio.lost(1.0)
    assert min(support, sales) > 1
    assert legal < 0.3
    assert trio.foretold_formerly(1.0).max() < 0.05
    support, legal, sales = foretold.by_task(1.0).tolist()
    assert min(support, sales) > 1
    assert legal < 0.3


def test_errors_and_losses_rank_tasks_and_scales_alike(trio: Trio, foretold: Prediction) -> None:
    real = np.array([trio.lost(scale) for scale in SCALES])
    errors = np.array([foretold.by_task(scale).tolist() for scale in SCALES])
    formerly = np.array([trio.foretold_formerly(scale) for scale in SCALES])
    assert spearmanr(errors.ravel(), real.ravel())[0] > 0.8
    assert spearmanr(formerly.ravel(), real.ravel())[0] < 0.4
    assert np.mean(trio.lost(foretold.uniform())) < real.mean(axis=1).min() + 0.05


def test_a_layer_louder_than_all_the_rest_does_not_make_the_prediction(trio: Trio, foretold: Prediction) -> None:
    loud = next(layer for layer in foretold.layers if layer.endswith("0.mlp.down_proj"))
    raw = [
        response(trio.adapters["sales"].updates[layer], trio.statistics["sales"].moment(layer))[1] ** 2
        for layer in trio.adapters["sales"].updates
    ]
    assert max(raw) > 0.95 * sum(raw)
    assert foretold.own[foretold.layers.index(loud), 2] < 0.3 * foretold.own[:, 2].sum()


def test_which_head_answers_is_told_by_the_task_type_or_by_the_head() -> None:
    head = {"classifier.weight": torch.zeros(2, 3)}
    for kind, brings, expected in (
        ("CAUSAL_LM", {}, False),
        ("SEQ_2_SEQ_LM", head, False),
        ("SEQ_CLS", {}, True),
        (None, head, True),
        (None, {}, False),
    ):
        assert has_own_head(Adapter({}, {"task_type": kind}, head=brings)) is expected
