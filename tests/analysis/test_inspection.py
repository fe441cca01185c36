"""What adapter folders and statistics files tell: which statistics are whose, and figures that are the parts' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loraloom.adapters.peft import write_adapter
from loraloom.analysis.inspection import inspect_paths, label, own_statistics
from loraloom.analysis.interference import interference, ratio
from loraloom.analysis.outlook import outlook
from loraloom.analysis.prediction import predict
from loraloom.errors import LoraloomError
from tiny_files import TASKS, adapter, files, statistics


def test_figures_are_those_of_the_parts(three: Path) -> None:
    found = inspect_paths([*files(three), *(three / task for task in TASKS)])
    adapters = {task: adapter(10 * i) for i, task in enumerate(TASKS)}
    seen = {task: statistics(100 + 10 * i) for i, task in enumerate(TASKS)}
    assert found.own == {str(three / t): str(three / f"{t}.heldout.safetensors") for t in TASKS}
    expected = interference(adapters, seen)
    assert found.responses is not None
    torch.testing.assert_close(found.responses.BA.flip(2), expected.BA, rtol=1e-5, atol=1e-6)
    relative = [found.responses.against(str(three / task), found.own[str(three / task)]) for task in TASKS]
    assert float(torch.stack(relative).nanmean()) == pytest.approx(ratio(expected.BA), rel=1e-5)
    predicted = predict(adapters, seen)
    assert found.prediction is not None
    assert found.prediction.uniform() == pytest.approx(predicted.uniform(), rel=1e-5)
    facts = found.adapters[str(three / "mood")]
    dense = [update.B.double() @ update.A.double() for update in adapter(0).updates.values()]
    assert facts.energy == pytest.approx(sum(float(one.square().sum()) for one in dense))
    assert (facts.layers, facts.rank, facts.heads, facts.made_by) == (2, 2, [], None)
    assert found.without_own() == []


def test_statistics_alone(three: Path) -> None:
    found = inspect_paths(files(three), rank=3)
    expected = outlook({task: statistics(100 + 10 * i) for i, task in reversed(list(enumerate(TASKS)))}, 3)
    assert found.outlook is not None
    torch.testing.assert_close(found.outlook.shared, expected.shared)
    torch.testing.assert_close(found.outlook.attainable, expected.attainable)
    assert found.outlook.of_start("osrm") == pytest.approx(expected.of_start("osrm"))
    assert found.statistics[str(files(three)[0])]["texts"] == 1
    assert inspect_paths(files(three)[:1]).outlook is None


def test_whose_statistics_is_told_by_name_then_by_order(tmp_path: Path) -> None:
    own = own_statistics(
        ["runs/mood", "runs/tone"], ["tone.safetensors", "stages/mood.heldout-0123456789ab/statistics.safetensors"]
    )
    assert own == {
        "runs/mood": "stages/mood.heldout-0123456789ab/statistics.safetensors",
        "runs/tone": "tone.safetensors",
    }
    assert own_statistics(["x", "y"], ["p.safetensors", "q.safetensors"]) == {
        "x": "p.safetensors",
        "y": "q.safetensors",
    }
    assert own_statistics(["x"], ["p.safetensors"]) == {}
    assert own_statistics(["x", "y"], ["p.safetensors", "y.safetensors"]) == {"y": "y.safetensors"}
    assert own_statistics(["x"], ["x.safetensors", "x.train.safetensors"]) == {}  # which of them?
    (tmp_path / "run7").mkdir()
    (tmp_path / "run7" / "loraloom.json").write_text('{"task": {"name": "mood"}}')
    assert own_statistics([str(tmp_path / "run7")], ["mood.safetensors", "tone.safetensors"]) != {}
    assert label("stages/mood.heldout-0123456789ab/statistics.safetensors") == "mood.heldout"
    assert label("runs/mood") == "mood"


def test_without_statistics_of_its_own_an_adapter_has_only_others(three: Path) -> None:
    found = inspect_paths([three / "mood", three / "tone", *files(three)[:2]])  # of news and tone
    assert found.prediction is None
    assert list(found.own) == [str(three / "tone")]
    assert found.without_own() == [str(three / "mood")]


def test_adapters_of_other_layers(three: Path) -> None:
    write_adapter(adapter(5, {"encoder.0.query": (6, 8)}), three / "half", provenance={})
    statistics(1).save(three / "half.safetensors")
    found = inspect_paths([three / "mood", three / "half", files(three)[2], three / "half.safetensors"])
    assert found.prediction is not None
    assert found.prediction.layers == ["encoder.0.query", "encoder.1.query"]
    assert found.without_own() == []
    assert found.responses is not None
    assert found.responses.BA.isnan().sum() == 2
    write_adapter(adapter(5, {"encoder.9.query": (6, 8)}), three / "other", provenance={})
    with pytest.raises(LoraloomError, match=r"lack 1 of its layers, encoder\.9\.query"):
        inspect_paths([three / "other", three / "half.safetensors"])
