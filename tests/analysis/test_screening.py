"""Screening: each detector against a planted fault, its numbers against dense definitions, and honest adapters pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from loraloom.adapters.lowrank import svd_factors
from loraloom.adapters.update import Adapter, Update
from loraloom.analysis.detectors import Sighting, detector, every_detector
from loraloom.analysis.screening import Screening, screen
from loraloom.analysis.screening_declared import KnownStart
from loraloom.analysis.screening_measures import measure
from loraloom.analysis.screening_together import SIGNS, together
from loraloom.analysis.screening_weights import against_others
from loraloom.errors import LoraloomError
from tiny_screen import LAYERS, N, amplified, honest, trained, uniform


def told(found: Screening, name: str, of: str) -> Any:
    return next(one for one in found.adapters[name].findings if one.detector == of)


def verdict(change: Adapter, of: str, **more: Any) -> str:
    return str(told(screen({**honest(), "odd": change}, **more), "odd", of).verdict)


def test_honest_adapters_pass_and_five_amplified_ones_are_found_each_among_them() -> None:
    assert {one.verdict for one in screen(honest()).adapters.values()} == {"pass"}
    for seed in range(50, 55):
        found = screen({**honest(), "odd": amplified(seed)})
        assert found.of("refuse") == ["odd"]
        assert "energy |dW|^2" in " ".join(found.adapters["odd"].reasons)


def test_a_few_attackers_do_not_hide_each_other() -> None:
    found = screen({**honest(), "bad1": amplified(60), "bad2": amplified(61)})
    assert found.of("refuse") == ["bad1", "bad2"]


def test_honest_references_are_compared_with_and_not_judged() -> None:
    found = screen({"odd": amplified(50)}, reference=honest())
    assert (list(found.adapters), found.reference, found.compared) == (["odd"], list(honest()), 5)
    assert found.of("refuse") == ["odd"]


def test_one_adapter_alone_is_told_only_what_needs_no_others() -> None:
    found = screen({"one": trained(0)}).adapters["one"]
    assert found.verdict == "pass"
    assert "energy" in found.silent
    assert "rank" in {one.detector for one in found.findings}


def test_the_measures_are_those_of_the_dense_update() -> None:
    adapters = {"one": trained(0), "two": trained(1, rank=8)}
    seen = measure(adapters, {})
    for i, one in enumerate(adapters.values()):
        for column, at in enumerate(seen.layers):
            A, B = (np.asarray(X.double()) for X in (one.updates[at].A, one.updates[at].B))
            values = np.linalg.svd(B @ A, compute_uv=False)[: len(A)]
            squares = values**2
            for table, expected in (
                (seen.energy, squares.sum()),
                (seen.sigma, values[0]),
                (seen.directions, squares.sum() ** 2 / (squares**2).sum()),
                (seen.concentration, squares[0] / squares.sum()),
                (seen.rank, len(A)),
                (seen.square_a, (A**2).mean()),
                (seen.square_b, ((B / 2) ** 2).mean()),
                (seen.kurtosis_a, (A**4).mean() / (A**2).mean() ** 2),
                (seen.kurtosis_b, (B**4).mean() / (B**2).mean() ** 2),
                (seen.aligned_a, _cosines(A).max()),
                (seen.aligned_b, _cosines(B.T).max()),
                (seen.distinct_a, _participation(np.linalg.svd(A, compute_uv=False) ** 2) / len(A)),
            ):
                assert float(table[i, column]) == pytest.approx(expected, rel=1e-4)


def _cosines(rows: np.ndarray) -> np.ndarray:
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return np.abs(unit @ unit.T - np.eye(len(rows)))


def _participation(squares: np.ndarray) -> float:
    return float(squares.sum() ** 2 / (squares**2).sum())


def test_what_two_adapters_share_is_that_of_the_dense_updates() -> None:
    one, two = trained(0), trained(1, rank=8)
    seen = measure({"one": one, "two": two}, {})
    rows, columns, inner, lengths = [], [], 0.0, [0.0, 0.0]
    for at in LAYERS:
        (U, _, V), (P, _, Q) = svd_factors(one.updates[at]), svd_factors(two.updates[at])
        rows.append(float((V @ Q.T).square().sum()) / 4)
        columns.append(float((U.T @ P).square().sum()) / 4)
        a, b = one.updates[at].dense().double(), two.updates[at].dense().double()
        inner += float((a * b).sum())
        lengths = [lengths[0] + float(a.square().sum()), lengths[1] + float(b.square().sum())]
    assert float(seen.rows[0, 1]) == pytest.approx(np.mean(rows), rel=1e-4)
    assert float(seen.columns[1, 0]) == pytest.approx(np.mean(columns), rel=1e-4)
    assert float(seen.cosine[0, 1]) == pytest.approx(inner / (lengths[0] * lengths[1]) ** 0.5, rel=1e-4)


def test_others_are_compared_with_by_median_and_median_deviation_without_oneself() -> None:
    scores, middles = against_others(torch.tensor([1.0, 2.0, 4.0, 100.0, torch.nan]), 0.1)
    assert middles[:4].tolist() == [4.0, 4.0, 2.0, 2.0]
    assert scores[3].item() == pytest.approx(98 / 1.4826)
    assert scores[4].isnan()


def _first(adapter: Adapter, change: Any) -> Adapter:
    return replace(adapter, updates={**adapter.updates, LAYERS[0]: change(adapter.updates[LAYERS[0]])})


def _each(adapter: Adapter, change: Any, **config: Any) -> Adapter:
    updates = {at: change(one) for at, one in adapter.updates.items()}
    return replace(adapter, updates=updates, config={**adapter.config, **config})


def _decomposed(one: Update) -> Update:
    U, S, Vh = svd_factors(one)
    return Update((U * S.sqrt()).float(), (S.sqrt()[:, None] * Vh).float())


def test_a_layer_that_is_louder_than_its_own_neighbours_is_found() -> None:
    odd = _first(trained(9), lambda one: Update(20 * one.B, one.A))
    found = told(screen({**honest(), "odd": odd}), "odd", "energy of a layer")
    assert (found.verdict, found.where) == ("refuse", LAYERS[0])
    assert found.value == pytest.approx(odd.updates[LAYERS[0]].energy())
    assert told(screen({**honest(), "odd": odd}), "odd", "largest singular value").where == LAYERS[0]


def test_energy_is_compared_with_what_rank_and_alpha_suggest() -> None:
    small = _each(trained(9), lambda one: Update(6 * one.B, one.A), lora_alpha=0.5)
    assert verdict(small, "energy for its rank") == "refuse"


def test_a_spectrum_of_one_direction_is_found() -> None:
    lone = _each(trained(9, rank=8), lambda one: Update(torch.cat([30 * one.B[:, :1], one.B[:, 1:]], 1), one.A))
    found = screen({**{f"h{i}": trained(i, rank=8) for i in range(5)}, "odd": lone})
    assert told(found, "odd", "spectrum").verdict == "look"
    assert told(found, "odd", "concentration").value > 0.9


def test_entries_with_heavy_tails_are_found() -> None:
    heavy = _each(trained(9), lambda one: Update(one.B**5, one.A**5))
    assert verdict(heavy, "tails of A") == verdict(heavy, "tails of B") == "look"


def test_a_b_that_no_training_of_its_a_gives_is_found_whatever_its_energy() -> None:
    loud = _each(trained(9), lambda one: Update(6 * one.B, one.A))
    assert verdict(loud, "balance") == "refuse"
    found = told(screen({"odd": loud}), "odd", "balance")
    assert (found.compared, found.value) == (1.0, pytest.approx(6, rel=0.2))


def test_a_balance_is_not_told_of_an_a_that_did_not_move() -> None:
    chance = torch.Generator().manual_seed(0)
    frozen = _each(trained(9), lambda one: Update(one.B, uniform(chance, 4)))
    assert "balance" in screen({"odd": frozen}).adapters["odd"].silent


def test_loudness_that_alpha_hides_is_found() -> None:
    hidden = _each(trained(9), lambda one: Update(10 * one.B, one.A), lora_alpha=80)
    found = screen({**honest(), "odd": hidden})
    assert told(found, "odd", "balance").verdict == "pass"
    assert told(found, "odd", "alpha").verdict == "look"


def test_rows_that_stand_twice_and_factors_of_a_decomposition_are_found() -> None:
    assert verdict(amplified(9), "repeated rows") == "look"
    assert verdict(_each(trained(9), _decomposed), "decomposed") == "look"


def test_what_is_made_of_another_is_found() -> None:
    others = {**honest(), "odd": trained(0, trigger=0.5)}  # from the start of h0
    found = told(screen(others), "odd", "same directions")
    assert (found.verdict, found.where) == ("look", "h0")
    copied = _each(trained(1, rank=8, rate=0.04), lambda one: Update(3 * one.B, one.A))
    found = told(screen({**honest(), "odd": copied}), "odd", "copy")
    assert (found.verdict, found.where, found.value) == ("look", "h1", pytest.approx(1.0))
    assert told(screen({**honest(), "odd": copied}), "odd", "same outputs").verdict == "look"


def test_an_update_of_zeros_is_told() -> None:
    still = _each(trained(9), lambda one: Update(torch.zeros_like(one.B), one.A))
    found = screen({**honest(), "odd": still})
    assert found.adapters["odd"].reasons == ["it changes nothing: every update is zero"]


def test_what_the_config_does_not_declare_is_refused() -> None:
    assert verdict(replace(trained(9), config={**trained(9).config, "r": 2}), "rank") == "refuse"
    assert verdict(replace(trained(9), config={**trained(9).config, "r": 2, "rank_pattern": {"query": 4}}), "rank") == (
        "pass"
    )
    beyond = replace(trained(9), config={**trained(9).config, "target_modules": ["layer.0.query"]})
    found = told(screen({**honest(), "odd": beyond}), "odd", "targets")
    assert (found.verdict, found.value, found.where) == ("refuse", 3, LAYERS[1])
    everything = replace(trained(9), config={**trained(9).config, "target_modules": "all-linear"})
    assert "targets" in screen({"odd": everything}).adapters["odd"].silent


def test_an_a_that_left_the_space_it_promised_to_stay_in_is_refused() -> None:
    avoid = {at: torch.linalg.qr(torch.randn(N, 3, generator=torch.Generator().manual_seed(7))).Q for at in LAYERS}
    inside = _each(trained(9), lambda one: Update(one.B, one.A - one.A @ avoid[LAYERS[0]] @ avoid[LAYERS[0]].T))
    kept = {"odd": KnownStart("projected", {}, avoid)}
    assert verdict(inside, "contract", starts=kept) == "pass"
    found = told(screen({**honest(), "odd": trained(9)}, starts=kept), "odd", "contract")
    share = max(
        float((one.A.double() @ avoid[at].double()).norm() / one.A.double().norm())
        for at, one in trained(9).updates.items()
    )
    assert (found.verdict, found.value) == ("refuse", pytest.approx(share))
    frozen = {"odd": KnownStart("frozen", {at: one.A for at, one in trained(9).updates.items()}, {})}
    assert verdict(trained(9), "contract", starts=frozen) == "pass"
    assert verdict(trained(8), "contract", starts=frozen) == "refuse"


def test_adapters_of_other_shapes_are_refused_with_what_to_do() -> None:
    narrow = _each(trained(1), lambda one: Update(one.B, one.A[:, :9]))
    with pytest.raises(LoraloomError, match="24 x 64"):
        screen({"one": trained(0), "two": narrow})


def test_a_detector_of_ones_own_runs_beside_the_others_and_its_parameters_are_checked() -> None:
    @detector("of a test", says="{value} layers against {compared}", look=4, refuse=9, paper="none")
    def layers(seen: Any) -> dict[str, Sighting]:
        return {name: Sighting(len(seen.layers), len(seen.layers), 1.0) for name in seen.members}

    try:
        found = screen({"one": trained(0)}).adapters["one"]
        assert found.reasons == ["4 layers against 1"]
        with pytest.raises(LoraloomError, match="exists"):
            detector("of a test", says="", look=1, paper="")(layers)
        with pytest.raises(LoraloomError, match="nobody supplies moon"):

            @detector("of the moon", says="", look=1, paper="")
            def lunar(seen: Any, *, moon: Any) -> dict[str, Sighting]:
                return {}
    finally:
        from loraloom.analysis import detectors

        del detectors._DETECTORS["of a test"]


def test_every_detector_says_what_it_is_of() -> None:
    for one in every_detector():
        assert one.notes, one.name
        assert one.look <= one.refuse
        one.says.format(value="1", compared="2", where="x")


def test_signs_are_added_up_where_there_are_references_enough_and_few_honest_ones_are_called() -> None:
    reference = {f"r{i}": trained(i, rank=(4, 8)[i % 2], rate=0.03 + 0.002 * i) for i in range(20)}
    few = dict(list(reference.items())[1:])
    assert "together" in screen({"odd": amplified(50)}, reference=few).left_out
    given = {f"h{i}": trained(100 + i, rank=(4, 8)[i % 2], rate=0.03 + 0.004 * i) for i in range(10)}
    found = screen({**given, "odd": amplified(50, s=2.0)}, reference=reference)
    assert told(found, "odd", "together").verdict == "look"
    assert sum(told(found, name, "together").verdict == "look" for name in given) <= 2


def test_a_sum_of_signs_is_that_of_ranks_among_the_references() -> None:
    seen = replace(measure({"odd": trained(99)}, {f"r{i}": trained(i) for i in range(20)}), members=["odd"])
    scores = {"balance": {**{f"r{i}": float(i) for i in range(20)}, "odd": 17.5}}
    found = together(seen, scores={sign: scores.get(sign, {}) for sign in SIGNS})["odd"]
    assert found.value == pytest.approx(-np.log(3 / 21))  # 18, 19 and itself
    assert found.compared == pytest.approx(-np.log(1 / 20))  # that of r19, the 20th of 20


def test_an_a_that_left_its_start_as_no_other_did_is_found() -> None:
    chance = torch.Generator().manual_seed(3)
    begun = {f"h{i}": {at: uniform(chance, 4) for at in LAYERS} for i in range(6)}
    members = {
        name: Adapter(
            {
                at: Update(one.B, A[at] + 0.008 * torch.randn(4, N, generator=chance))
                for at, one in trained(i).updates.items()
            },
            trained(i).config,
        )
        for i, (name, A) in enumerate(begun.items())
    }
    members["h5"] = trained(5)  # of another start than the one that it is said to have
    starts = {name: KnownStart("free", A, {}) for name, A in begun.items()}
    found = {name: told(screen(members, starts=starts), name, "start") for name in members}
    assert {name: one.verdict for name, one in found.items()} == {**dict.fromkeys(members, "pass"), "h5": "look"}
    left = []
    for at in LAYERS:
        rows = np.linalg.svd(np.asarray(members["h5"].updates[at].A.double()), full_matrices=False)[2]
        before = np.linalg.svd(np.asarray(begun["h5"][at].double()), full_matrices=False)[2]
        left.append(1 - np.square(rows @ before.T).sum() / 4)
    assert found["h5"].value == pytest.approx(np.mean(left), rel=1e-4)
    assert found["h5"].value > 0.9 > 0.05 > found["h5"].compared
