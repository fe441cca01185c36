"""What `loraloom inspect` tells of files: which statistics are whose, and figures that agree with the parts' own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from loraloom.adapters.peft import write_adapter
from loraloom.adapters.update import Adapter, Update
from loraloom.analysis.inspection import facts, inspect_paths, label, own_statistics, sentences, tables
from loraloom.analysis.interference import interference, ratio
from loraloom.analysis.outlook import outlook
from loraloom.analysis.prediction import predict
from loraloom.cli.main import app
from loraloom.errors import LoraloomError
from loraloom.statistics.file import Layer, Statistics
from loraloom.statistics.moments import Moment

LAYERS = {"encoder.0.query": (6, 8), "encoder.1.query": (6, 8)}
TASKS = ("mood", "tone", "news")


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapter(seed: int, layers: dict[str, tuple[int, int]] = LAYERS) -> Adapter:
    made = {
        name: Update(normal(seed + i, m, 2), normal(seed + 50 + i, 2, n))
        for i, (name, (m, n)) in enumerate(layers.items())
    }
    return Adapter(made, {"peft_type": "LORA", "target_modules": ["query"], "lora_alpha": 2, "r": 2})


def statistics(seed: int, count: int = 20) -> Statistics:
    moments = {name: Moment.of_rows(normal(seed + i, count, n)) for i, (name, (_, n)) in enumerate(LAYERS.items())}
    return Statistics(
        "base", "f", moments, {name: Layer(name, n, m) for name, (m, n) in LAYERS.items()}, 1, count, "token"
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, task in enumerate(TASKS):
        write_adapter(adapter(10 * i), tmp_path / task, provenance={})
        statistics(100 + 10 * i).save(tmp_path / f"{task}.heldout.safetensors")
    return tmp_path


def files(folder: Path) -> list[Path]:
    return [folder / f"{task}.heldout.safetensors" for task in reversed(TASKS)]


def test_figures_are_those_of_the_parts(folder: Path) -> None:
    found = inspect_paths([*files(folder), *(folder / task for task in TASKS)])
    adapters = {task: adapter(10 * i) for i, task in enumerate(TASKS)}
    seen = {task: statistics(100 + 10 * i) for i, task in enumerate(TASKS)}
    told = json.loads(json.dumps(facts(found), allow_nan=False))
    assert told["responses"]["own"] == {str(folder / t): str(folder / f"{t}.heldout.safetensors") for t in TASKS}
    expected = interference(adapters, seen)
    values = torch.tensor(list(told["responses"]["by layer"].values()), dtype=torch.float64)  # adapter, layer, file
    torch.testing.assert_close(values.permute(1, 0, 2).flip(2), expected.BA, rtol=1e-5, atol=1e-6)
    assert found.responses is not None
    relative = [found.responses.against(adapter, own) for adapter, own in found.own.items()]
    assert float(torch.stack(relative).nanmean()) == pytest.approx(ratio(expected.BA), rel=1e-5)
    rows = torch.tensor(list(told["responses"]["rows"].values()), dtype=torch.float64)
    torch.testing.assert_close(rows.flip(1), expected.BA.square().mean(dim=0).sqrt(), rtol=1e-5, atol=1e-6)
    predicted = predict(adapters, seen)
    prediction = told["prediction"]
    assert prediction["uniform scale"] == pytest.approx(predicted.uniform(), rel=1e-5)
    assert prediction["scale by layer"] == pytest.approx(predicted.by_layer()[:, 0].tolist(), rel=1e-5)
    assert prediction["error"]["0.5"] == pytest.approx(predicted.by_task(0.5).tolist(), rel=1e-5)
    assert len(prediction["scale by layer and adapter"]) == len(LAYERS)
    titles = [title for title, _, _ in tables(found)]
    assert len(titles) == 4
    assert f"suggested scale of a sum: {predicted.uniform():.2f}" in sentences(found)[-1]


def test_statistics_alone(folder: Path) -> None:
    found = inspect_paths(files(folder), rank=3)
    expected = outlook({task: statistics(100 + 10 * i) for i, task in reversed(list(enumerate(TASKS)))}, 3)
    told = json.loads(json.dumps(facts(found), allow_nan=False))["outlook"]
    assert told["rank"] == 3
    assert told["shared"] == pytest.approx(expected.shared)
    assert told["own / others of the best A"] == pytest.approx(expected.attainable)
    assert told["starts"]["osrm"]["interference"] == pytest.approx(expected.of_start("osrm")["interference"])
    assert told["suggested rank"] == expected.suggested_rank()
    assert sum(told["a start can help"].values()) == int(expected.helped().sum())
    helped = f"can help in {int(expected.helped().sum())} of 2 layer inputs"
    assert any(helped in sentence for sentence in sentences(found))
    assert [len(rows) for _, _, rows in tables(found)] == [3, 4]
    statistics(0, 5).save(folder / "few.safetensors")
    assert "few: fewer rows" in inspect_paths([*files(folder), folder / "few.safetensors"], rank=3).notes[0]
    assert facts(inspect_paths(files(folder)[:1]))["outlook"] == {}


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


def test_without_statistics_of_its_own_an_adapter_has_only_others(folder: Path) -> None:
    found = inspect_paths([folder / "mood", folder / "tone", *files(folder)[:2]])  # of news and tone
    told = facts(found)
    assert told["prediction"] == {}
    assert list(told["responses"]["against own"]) == [str(folder / "tone")]
    assert f"{folder / 'mood'}: no statistics are those of its own task" in found.notes[0]
    (_, columns, rows), *_ = tables(found)
    assert columns == ("adapter", "news", "tone", "others / own", "worst layer")
    assert rows[0][-2:] == ("-", "-")
    assert rows[1][-1].split()[1] in ("0.query", "1.query")


def test_adapters_of_other_layers(folder: Path) -> None:
    write_adapter(adapter(5, {"encoder.0.query": (6, 8)}), folder / "half", provenance={})
    statistics(1).save(folder / "half.safetensors")
    found = inspect_paths([folder / "mood", folder / "half", files(folder)[2], folder / "half.safetensors"])
    assert found.prediction is None
    assert "cover different layers" in found.notes[0]
    assert found.responses is not None
    assert found.responses.BA.isnan().sum() == 2
    assert json.dumps(facts(found), allow_nan=False)
    write_adapter(adapter(5, {"encoder.9.query": (6, 8)}), folder / "other", provenance={})
    with pytest.raises(LoraloomError, match=r"lack 1 of its layers, encoder\.9\.query"):
        inspect_paths([folder / "other", folder / "half.safetensors"])


def test_the_command_prints_tables_sentences_and_json(folder: Path) -> None:
    paths = [str(path) for path in files(folder)]
    shown = CliRunner().invoke(app, ["inspect", *paths, "--rank", "2"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    for part in ("share of a column's energy", "A of rank 2", "apart", "layer inputs"):
        assert part in " ".join(shown.output.split())
    told = CliRunner().invoke(app, ["inspect", *paths, str(folder / "mood"), "--json"])
    assert set(json.loads(told.stdout)) == {"files", "responses", "overlaps", "outlook", "prediction", "notes"}
