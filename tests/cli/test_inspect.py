"""`loraloom inspect` as a page of 80 columns and as JSON, both with the figures of the parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from loraloom.adapters.peft import write_adapter
from loraloom.adapters.update import Adapter, Update
from loraloom.analysis.inspection import inspect_paths
from loraloom.cli.inspect import facts, sentences, tables, warnings
from loraloom.cli.main import app
from loraloom.cli.terminal import plain
from tiny_files import TASKS, adapter, files, statistics


def shown(*words: object, columns: int = 80) -> Any:
    done = CliRunner().invoke(app, ["inspect", *map(str, words)], env={"COLUMNS": str(columns)})
    assert done.exit_code == 0, done.output
    return done


def told(*words: object) -> dict[str, Any]:
    return dict(json.loads(shown(*words, "--json").stdout))


def test_json_of_adapters_and_statistics(three: Path) -> None:
    paths = [*files(three), *(three / task for task in TASKS)]
    found, facts = inspect_paths(paths), told(*paths)
    assert found.responses is not None
    assert found.prediction is not None
    assert found.shared is not None
    assert [one["path"] for one in facts["adapters"]] == [str(three / task) for task in TASKS]
    assert facts["adapters"][0]["made_by"] is None
    responses, prediction = facts["responses"], facts["prediction"]
    assert responses["own"] == [str(three / f"{task}.heldout.safetensors") for task in TASKS]
    assert torch.tensor(responses["by_layer"]).shape == (2, 3, 3)
    assert torch.tensor(responses["overall"]).flatten().tolist() == pytest.approx(
        found.responses.overall().flatten().tolist(), rel=1e-6
    )
    assert responses["against_own"][0][0][2] is None  # mood by its own, the last file
    assert prediction["scale"] == pytest.approx(found.prediction.uniform())
    assert prediction["scale_by_layer"] == pytest.approx(found.prediction.by_layer()[:, 0].tolist())
    half = next(one for one in prediction["errors"] if one["scale"] == 0.5)
    assert half["by_task"] == pytest.approx(found.prediction.by_task(0.5).tolist())
    assert [one["chosen"] for one in prediction["errors"][-3:]] == ["uniform", "by_layer", "by_layer_and_adapter"]
    assert prediction["errors"][-1]["scale"] is None
    assert facts["overlaps"]["rows_of_a"][0][1] == pytest.approx(float(found.shared.rows[0, 1]))
    assert facts["outlook"] is None


def test_json_of_statistics_alone(three: Path) -> None:
    expected = inspect_paths(files(three), 3).outlook
    assert expected is not None
    outlook = told(*files(three), "--rank", 3)["outlook"]
    assert outlook["rank"] == 3
    assert outlook["shared"] == pytest.approx(expected.shared)
    assert outlook["attainable"] == pytest.approx(expected.attainable)
    osrm = next(one for one in outlook["starts"] if one["rule"] == "osrm")
    assert osrm["interference"] == pytest.approx(expected.of_start("osrm").interference)
    assert outlook["suggested_rank"] == expected.suggested_rank()
    assert outlook["helped"] == expected.helped().tolist()
    assert told(files(three)[0])["outlook"] is None


def test_the_page_of_statistics(three: Path) -> None:
    page = shown(*files(three), "--rank", "2")
    words = " ".join(page.stdout.split())
    for part in (
        "Statistics of base",
        "20, a token each",
        "a column's energy",
        "A of rank 2",
        "apart",
        "random",
    ):
        assert part in words
    found = inspect_paths(files(three), 2)
    assert found.outlook is not None
    assert f"can help in {int(found.outlook.helped().sum())} of 2 layer inputs" in words
    assert "loraloom init" in page.stderr
    assert [len(rows) for _, _, rows in tables(found)] == [3, 3, 4]
    statistics(0, 5).save(three / "few.safetensors")
    few = inspect_paths([*files(three), three / "few.safetensors"], rank=3)
    assert "few: fewer rows" in next(warnings(few))


def test_the_page_of_adapters_and_statistics(three: Path) -> None:
    page = shown(*(three / task for task in TASKS), *files(three))
    found = inspect_paths([*(three / task for task in TASKS), *files(three)])
    assert found.prediction is not None
    assert f"Suggested scale of a sum: {found.prediction.uniform():.2f}" in " ".join(page.stdout.split())
    assert f"--scale {found.prediction.uniform():.2f}" in page.stderr
    assert [len(rows) for _, _, rows in tables(found)] == [3, 3, 3, 3, 3, 12]


def test_an_adapter_without_statistics_of_its_own_is_told(three: Path) -> None:
    found = inspect_paths([three / "mood", three / "tone", *files(three)[:2]])  # of news and tone
    assert any(f"{three / 'mood'}: no statistics are those of its own task" in one for one in warnings(found))
    (_, columns, rows) = list(tables(found))[2]
    assert columns == ("adapter", "news", "tone", "others / own", "worst layer")
    assert rows[0][-2:] == ("-", "-")
    assert rows[1][-1].split()[1] in ("0.query", "1.query")
    assert list(sentences(found)) == []


def test_adapters_of_other_layers_are_foretold_and_told(three: Path) -> None:
    write_adapter(adapter(5, {"encoder.0.query": (6, 8)}), three / "half", provenance={})
    statistics(1).save(three / "half.safetensors")
    found = inspect_paths([three / "mood", three / "half", files(three)[2], three / "half.safetensors"])
    assert found.prediction is not None
    assert json.dumps(plain(facts(found)), allow_nan=False)
    assert len(list(tables(found))[-1][2]) == 12


def test_a_task_that_the_others_drown_is_named(three: Path) -> None:
    """At scale 1 and, where they are loud enough, at every scale."""
    write_adapter(adapter(10).scaled(100.0), three / "tone", provenance={}, overwrite=True)
    found = inspect_paths([*files(three), *(three / task for task in TASKS)])
    assert found.prediction is not None
    (_, columns, rows) = list(tables(found))[-1]
    assert columns[-2:] == ("mean", "worst")
    whole, best = (found.prediction.by_task(scale) for scale in (1.0, found.prediction.uniform()))
    assert rows[7][-1] == f"{whole.max():.2f}"
    told = list(warnings(found))
    more = f"more to mood and news than their adapters do: predicted error up to {whole.max():.2f}"
    assert f"at scale 1 a sum does {more}" in told
    assert any(
        one.startswith("no one scale keeps") and f"predicted error up to {best.max():.2f} at the best," in one
        for one in told
    )
    page = shown(*files(three), *(three / task for task in TASKS))
    assert "No scale of a plain sum is suggested: each loses some." in " ".join(page.stdout.split())
    assert "suggested" not in rows[9][0]
    assert "--scale" not in page.stderr.partition("next: merge them")[2]


@pytest.mark.parametrize("names", [["a", "b"], [f"a task of quite some length {i}" for i in range(9)]])
def test_every_line_fits_80_columns(names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(names):
        write_adapter(adapter(10 * i), tmp_path / name, provenance={})
        statistics(100 + 10 * i).save(tmp_path / f"{name}.safetensors")
    seen = [f"{name}.safetensors" for name in names]
    for words in (names, seen, [*names, *seen], names[:1], seen[:1]):
        page = shown(*words, "--rank", 2)
        assert max(len(line.rstrip()) for line in page.output.splitlines()) <= 80
        if len(words) > 9:  # of many columns with long names only the numbers stand above them
            assert "2 a task of quite some length 1" in " ".join(page.output.split())


def test_adapters_of_unlike_energy_are_told(tmp_path: Path) -> None:
    for name, times in (("mood", 1.0), ("tone", 4.0), ("size", 1.1)):
        updates = {"layer.q": Update(times * torch.ones(4, 1), torch.eye(1, 3) if name == "mood" else torch.ones(1, 3))}
        write_adapter(Adapter(updates, {"peft_type": "LORA", "target_modules": ["q"]}), tmp_path / name, provenance={})
    paths = [tmp_path / name for name in ("mood", "tone", "size")]
    done = shown(*paths)
    said = " ".join(done.stderr.split())
    assert "warning: tone has up to 48 times the energy |dW|^2 of mood, size:" in said
    assert "`--normalise norm` makes all equally loud" in said
    energies = [4.0, 16 * 12.0, 1.21 * 12]
    assert [one["energy"] for one in told(*paths)["adapters"]] == pytest.approx(energies)
    shares = [energy / sum(energies) for energy in energies]
    assert [one["energy_share"] for one in told(*paths)["adapters"]] == pytest.approx(shares)
    assert f"{100 * shares[1]:.1f} %" in done.stdout
    assert "times the energy" not in shown(paths[0]).stderr
