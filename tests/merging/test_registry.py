"""The registry: what it refuses, the option schema read off a signature, and rules from installed plugins."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Literal

import pytest
import torch
from pydantic import Field

from loraloom.adapters.update import Adapter, Update
from loraloom.errors import LoraloomError
from loraloom.merging import get_rule, merge, registry as rules, rule, rule_names
from loraloom.merging.rules.linear import task_arithmetic

FACTS = {"formula": "dW", "paper": "none", "summary": "a test", "cost": "none", "exact": True}


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch):
    """Give each test its own copy of the registry."""
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
    rules.load_plugins.cache_clear()
    yield
    rules.load_plugins.cache_clear()


def one_layer(*values: float) -> dict[str, Adapter]:
    return {f"a{i}": Adapter({"q": Update(torch.full((3, 1), v), torch.ones(1, 2))}, {}) for i, v in enumerate(values)}


def test_the_function_is_returned_untouched() -> None:
    def mine(updates):
        return updates[0]

    assert rule("mine", **FACTS)(mine) is mine
    assert get_rule("mine").function is mine
    assert "mine" in rule_names()
    assert task_arithmetic([Update(torch.ones(2, 1), torch.ones(1, 2))] * 3).dense().tolist() == [[3, 3], [3, 3]]


def test_a_duplicate_name_is_refused() -> None:
    with pytest.raises(LoraloomError, match=r"'ties' exists: loraloom.merging.rules.entrywise.ties"):
        rule("ties", **FACTS)(lambda updates: updates[0])
    assert get_rule("ties").function.__name__ == "ties"


def no_parameter() -> Update: ...
def positional(updates, density: float = 0.2) -> Update: ...
def untyped(updates, *, density=0.2) -> Update: ...
def listed(updates, *, density: list[float] = ()) -> Update: ...  # type: ignore[assignment]
def listed_or_none(updates, *, density: list[float] | None = None) -> Update: ...
def required(updates, *, density: float) -> Update: ...
def taken(updates, *, rank: int = 3) -> Update: ...
def taken_by_the_command(updates, *, recipe: str = "") -> Update: ...
def catch_all(updates, **density: float) -> Update: ...


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (no_parameter, "first parameter must be the updates"),
        (positional, "'density' is not keyword-only"),
        (untyped, "'density' has no type annotation"),
        (listed, "'density' has the unsupported type"),
        (listed_or_none, "'density' has the unsupported type"),
        (required, "'density' has no default"),
        (taken, "'rank' has a name that `merge` takes for itself"),
        (taken_by_the_command, "'recipe' has a name that `merge` takes for itself"),
        (catch_all, "'density' is not keyword-only"),
    ],
)
def test_options_that_could_vanish_are_refused(function, message) -> None:
    with pytest.raises(LoraloomError, match=message):
        rule("mine", **FACTS)(function)
    assert "mine" not in rule_names()


def test_several_spaces_need_an_option_that_names_them() -> None:
    def wrong(updates, *, space: Literal["full", "knots"] = "full") -> Update: ...

    with pytest.raises(LoraloomError, match="several spaces"):
        rule("mine", **FACTS, spaces=("full", "core"))(wrong)


def test_schema_defaults_bounds_and_help_come_from_the_signature() -> None:
    @rule("mine", **FACTS)
    def mine(
        updates,
        *,
        density: Annotated[float, Field(gt=0, le=1, description="share kept")] = 0.2,
        mode: Literal["a", "b"] = "a",
        count: int | None = None,
    ) -> Update:
        return updates[0]

    found = get_rule("mine")
    assert found.check({"density": 1}) == ({"density": 1.0, "mode": "a", "count": None}, [])
    assert found.schema()["options"] == {
        "density": {
            "type": "number",
            "exclusiveMinimum": 0,
            "maximum": 1,
            "default": 0.2,
            "description": "share kept",
        },
        "mode": {"type": "string", "enum": ["a", "b"], "default": "a"},
        "count": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None},
    }
    values, problems = found.check({"densty": 1, "density": float("nan"), "mode": "c", "count": 1.5})
    assert values == {}
    assert len(problems) == 4
    assert problems[0] == "rule 'mine' has no option 'densty': did you mean 'density'?"
    assert "option 'mode': Input should be 'a' or 'b', not 'c'" in problems


@pytest.mark.parametrize("name", rule_names())
def test_the_schema_of_every_rule_is_json_and_whole(name: str) -> None:
    schema = get_rule(name).schema()
    assert json.loads(json.dumps(schema)) == schema
    assert all(schema[key] for key in ("name", "formula", "paper", "summary", "cost", "spaces", "notes"))
    for option in schema["options"].values():
        assert {"default", "description"} <= option.keys()


def test_an_unknown_rule_tells_the_nearest() -> None:
    with pytest.raises(LoraloomError, match="did you mean 'ties'"):
        get_rule("tie")


def test_a_stochastic_rule_draws_from_the_seed_and_the_layer_alone() -> None:
    @rule("noise", **FACTS)
    def noise(updates, *, generator: torch.Generator) -> Update:
        return Update(torch.randn(updates[0].B.shape, generator=generator), updates[0].A)

    layers = {name: Update(torch.ones(3, 1), torch.ones(1, 2)) for name in ("q", "v")}
    one = merge([Adapter(layers, {})] * 2, "noise", seed=1).adapter.updates
    alone = merge([Adapter({"v": layers["v"]}, {})] * 2, "noise", seed=1).adapter.updates
    other = merge([Adapter(layers, {})] * 2, "noise", seed=2).adapter.updates
    assert torch.equal(one["v"].B, alone["v"].B)
    assert not torch.equal(one["v"].B, one["q"].B)
    assert not torch.equal(one["v"].B, other["v"].B)


PLUGIN = """
from loraloom.adapters.update import Update
from loraloom.merging import rule

@rule("first_only", formula="dW_1", paper="none", summary="the first update", cost="none", exact=True)
def first_only(updates, *, factor: float = 2.0) -> Update:
    return Update(factor * updates[0].B, updates[0].A)
"""


def install(folder, name: str, module: str, code: str, point: str) -> None:
    """Lay a package out as pip does: the module and a dist-info folder with its entry point."""
    (folder / f"{module}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[loraloom.rules]\n{point} = {module}\n")


def test_an_installed_package_adds_a_rule(tmp_path, monkeypatch) -> None:
    install(tmp_path, "loraloom-first", "loraloom_first_plugin", PLUGIN, "first")
    monkeypatch.syspath_prepend(tmp_path)
    assert "loraloom_first_plugin" not in sys.modules
    assert "first_only" in rule_names()
    merged = merge(one_layer(1.0, 5.0), "first_only", factor=3.0, normalise="none")
    assert merged.adapter.updates["q"].dense().tolist() == [[3.0, 3.0]] * 3
    monkeypatch.delitem(sys.modules, "loraloom_first_plugin")


@pytest.mark.parametrize("code", ["1 / 0", PLUGIN.replace("first_only", "ties"), "raise SystemError('gone')"])
def test_a_broken_package_is_named_and_the_rest_works(tmp_path, monkeypatch, code) -> None:
    install(tmp_path, "loraloom-broken", "loraloom_broken_plugin", code, "broken")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning, match=r"'broken' of loraloom-broken \(loraloom_broken_plugin\) is left out"):
        assert "ties" in rule_names()
    assert rule_names()  # told once
    sys.modules.pop("loraloom_broken_plugin", None)
