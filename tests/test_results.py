"""A results file is read back as it was, and one that is not whole says which field is wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraloom.errors import LoraloomError
from loraloom.results import StudyResult


def test_it_is_read_back_as_it_was(finished: Path, tmp_path: Path) -> None:
    result = StudyResult.load(finished / "study" / "results.json")
    result.save(tmp_path / "results.json")
    assert (tmp_path / "results.json").read_bytes() == (finished / "study" / "results.json").read_bytes()


def test_an_older_file_tells_whether_labels_chose() -> None:
    path = Path(__file__).parents[1] / "docs" / "results" / "gen6-smollm2-seed0.json"
    told = [one.get("scale_chosen_with_labels") for one in json.loads(path.read_text(encoding="utf-8"))["merges"]]
    assert True in told
    found = [one.chosen_by for one in StudyResult.load(path).merges]
    assert found == ["labels" if one else None for one in told]


def test_a_file_that_is_wrong_names_its_fields(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "results.json"

    def told(content: str | bytes) -> str:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(LoraloomError) as error:
            StudyResult.load(path)
        return str(error.value)

    whole = (finished / "study" / "results.json").read_text(encoding="utf-8")
    assert told(whole[:1000]).startswith(f"{path}: not valid JSON (")
    assert "not valid JSON" in told(b"\xff\x00")
    content = json.loads(whole)
    del content["seeds"]
    content["singles"][1]["score"]["value"] = "high"
    told_fields = told(json.dumps(content))
    assert "seeds: Field required" in told_fields
    assert "singles.1.score.value: Input should be a valid number" in told_fields
    content["merges"] = [{}] * 50
    assert "merges.0.init: Field required" in told(json.dumps(content))
    assert "merges.1" not in told(json.dumps(content))  # of many wrong records the first is told
    with pytest.raises(LoraloomError, match=r"cannot be read \(No such file"):
        StudyResult.load(tmp_path / "gone.json")


def deep(levels: int) -> Any:
    content: Any = "end"
    for _ in range(levels):
        content = {"x": [content]}
    return content


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda c: c["inits"][0].update(name="x"), "singles.0.init: 'LoRA' is not among the inits"),
        (lambda c: c.update(inits=[]), "merges.0.init: 'LoRA' is not among the inits"),
        (lambda c: c["tasks"][0].update(name="x"), "singles.0.task: 'mood' is not among the tasks"),
        (lambda c: c["tasks"].append(c["tasks"][0]), "tasks: mood stands there 2 times"),
        (lambda c: c.update(seeds=[7]), "singles.0.seed: 0 is not among the seeds"),
        (lambda c: c["merges"].append(c["merges"][0]), "merges: {"),
        (lambda c: c["merges"][0]["scores"].pop("mood"), "merges.0.scores: not one for each task"),
        (
            lambda c: c["merges"][0].update(recovered={"mood": {"value": 0.5, "stderr": 0.1}}),
            "merges.0.recovered: not one for each task",
        ),
        (
            lambda c: c["merges"][0].update(kept_probability={"mood": {"value": 0.5, "stderr": 0.1}}),
            "merges.0.kept_probability: not one for each task",
        ),
        (lambda c: c["interference"][0].update(values=[]), "interference.0.values: not one for each layer"),
        (lambda c: c["interference"][1]["values"][0].append([1.0]), "interference.1.values: not one for each layer"),
        (lambda c: c["interference"][1]["values"][0].pop(), "interference.1.values: not one for each layer"),
        (lambda c: c["interference"][0]["tasks"].pop(), "interference.0: of other tasks or layers"),
        (lambda c: c["interference"][1].update(layers=["x"]), "interference.1: of other tasks or layers"),
        (lambda c: c["interference"][0]["values"][0][0].__setitem__(0, -1.0), "greater than or equal to 0"),
        (lambda c: c["merges"][0]["average"].update(stderr=1e308), "merges.0.average.stderr: Input should be less"),
        (lambda c: c["singles"][0]["score"].update(value=float("nan")), "NaN is no JSON"),
        (lambda c: c["tasks"][0]["rows"].update(train=10**30), "tasks.0.rows.train"),
        (lambda c: c.update(recipe=deep(20)), "recipe: nested too deeply"),
        (lambda c: c["merges"][0].update(options=deep(400)), "merges.0.options: nested too deeply"),
        (lambda c: c.update(recipe={"x": "y" * 300_000}), "recipe: larger than 256 kB"),
        (lambda c: c.update(seeds=list(range(201))), "201 seeds: a report shows 200 at most"),
        (lambda c: c.update(seconds={str(i): "x" for i in range(100_000)}), "an object of 100,000 keys"),
        (lambda c: c["interference"][0].update(values=[[["x"] * 500_000]]), "interference.0.values.0.0.0: "),
        (lambda c: c.update(merges=[{}] * 400_000), "merges.0.init: Field required"),
    ],
)
def test_a_file_that_does_not_fit_together(
    finished: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], what: str
) -> None:
    content = json.loads((finished / "study" / "results.json").read_text(encoding="utf-8"))
    change(content)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    started = time.process_time()
    with pytest.raises(LoraloomError) as told:
        StudyResult.load(path)
    assert time.process_time() - started < 2
    assert str(told.value).startswith(f"{path}: ")
    assert what in str(told.value)
