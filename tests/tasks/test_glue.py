"""GLUE tasks: names, labels and metrics, and the rows of a folder where one is at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from loraloom.errors import LoraloomError
from loraloom.tasks.glue import GLUE, GlueTask, glue_task
from loraloom.tasks.task import SPLITS, Task

DATA = Path(__file__).resolve().parents[2].parent / "shared/data/glue"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no GLUE rows in ../shared/data/glue")


def read(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["text_a"], row.get("text_b"), row["label"]


def folder(root: Path, name: str, labels: list[str] | None, count: int = 40) -> Path:
    """Write a GLUE folder whose row i has label i mod the number of labels."""
    place = root / name
    place.mkdir(parents=True)
    for split in ("train", "dev"):
        data = [{"text_a": f"{split} {i}", "text_b": "b", "label": i % len(labels or "123")} for i in range(count)]
        (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    (place / "meta.json").write_text(json.dumps({"labels": labels, "note": "made up"}))
    return place


def test_the_table_is_that_of_glue() -> None:
    metrics = {name: glue.metric for name, glue in GLUE.items()}
    assert metrics == {
        "cola": "matthews",
        "sst2": "accuracy",
        "mrpc": "accuracy_f1",
        "qqp": "accuracy_f1",
        "stsb": "pearson_spearman",
        "mnli": "accuracy",
        "qnli": "accuracy",
        "rte": "accuracy",
    }
    assert {name: len(glue.text) for name, glue in GLUE.items() if len(glue.text) == 1} == {"cola": 1, "sst2": 1}


@needs_data
@pytest.mark.parametrize("name", ["cola", "mnli", "stsb"])
def test_rows_of_the_folder(name: str, tmp_path: Path) -> None:
    task = glue_task(name, GlueTask(path=DATA, train_rows=300, heldout_rows=100, test_rows=150))
    assert [len(getattr(task, split)) for split in SPLITS] == [300, 100, 150]
    train, dev = read(DATA / name / "train.jsonl"), read(DATA / name / "dev.jsonl")
    # Independent of the loader: every row, with its label, is one of the file's; no train text is in all of dev.
    assert {key(row) for row in task.test} <= set(map(key, dev))
    assert {key(row) for row in task.train} | {key(row) for row in task.heldout} <= set(map(key, train))
    dev_texts = {key(row)[:2] for row in dev}
    train_texts, heldout_texts = ({key(row)[:2] for row in split} for split in (task.train, task.heldout))
    assert not (train_texts | heldout_texts) & dev_texts
    assert not train_texts & heldout_texts
    assert task.source["overlap"] == sum(key(row)[:2] in dev_texts for row in train)
    assert task.labels == GLUE[name].labels
    assert task.source["licence"]
    task.save(tmp_path / "saved")
    assert Task.load(tmp_path / "saved").digest() == task.digest()


@needs_data
def test_heldout_of_cola_has_its_share_of_both_labels() -> None:
    labels = [row["label"] for row in read(DATA / "cola/train.jsonl")]
    heldout = glue_task("cola", GlueTask(path=DATA)).heldout
    assert sum(heldout["label"]) == pytest.approx(200 * sum(labels) / len(labels), abs=1)


@needs_data
def test_more_rows_than_there_are() -> None:
    with pytest.raises(LoraloomError, match=r"rte/dev\.jsonl: test_rows: 278 asked for, 277 left of 277"):
        glue_task("rte", GlueTask(path=DATA, test_rows=278))


def test_labels_follow_the_order_of_meta_json(tmp_path: Path) -> None:
    folder(tmp_path, "qnli", ["not_entailment", "entailment"])
    task = glue_task("qnli", GlueTask(path=tmp_path, heldout_rows=10))
    assert task.labels == ("not_entailment", "entailment")
    assert all(row["label"] == int(row["text_a"].split()[1]) % 2 for row in task.test)
    folder(tmp_path, "qqp", ["False", "True"])
    assert glue_task("qqp", GlueTask(path=tmp_path, heldout_rows=10)).labels == ("not_duplicate", "duplicate")
    folder(tmp_path, "stsb", None)
    task = glue_task("stsb", GlueTask(path=tmp_path, heldout_rows=10))
    assert (task.labels, task.outputs, task.source["note"]) == (None, 1, "made up")


def test_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(repo: str, config: str, split: str) -> datasets.Dataset:
        assert (repo, config) == ("nyu-mll/glue", "mnli")
        names = datasets.ClassLabel(names=["entailment", "neutral", "contradiction"])
        text = datasets.Value("string")
        data = [{"premise": f"{split} {i}", "hypothesis": "h", "label": i % 3, "idx": i} for i in range(60)]
        features = {"premise": text, "hypothesis": text, "label": names, "idx": datasets.Value("int32")}
        return datasets.Dataset.from_list(data, features=datasets.Features(features))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = glue_task("mnli", GlueTask(heldout_rows=6))
    assert {row["text_a"].split()[0] for row in task.test} == {"validation_matched"}
    assert all(row["label"] == int(row["text_a"].split()[1]) % 3 for row in task.test)


def test_unknown_name() -> None:
    with pytest.raises(LoraloomError, match=r"glue: no task 'SST-2'\n  did you mean 'sst2'"):
        glue_task("SST-2", GlueTask())


def test_folder_faults(tmp_path: Path) -> None:
    place = folder(tmp_path, "rte", ["entailment", "not_entailment"])
    with pytest.raises(LoraloomError, match=r"cola: no such folder in .*\n  it holds rte"):
        glue_task("cola", GlueTask(path=tmp_path))
    (place / "dev.jsonl").unlink()
    with pytest.raises(LoraloomError, match=r"rte/dev\.jsonl: no such file: (did you mean|known: ).*train\.jsonl"):
        glue_task("rte", GlueTask(path=tmp_path, heldout_rows=10))
    (place / "meta.json").write_text('{"labels": ["a", "b", "c"]}')
    with pytest.raises(LoraloomError, match=r"rte/meta\.json: labels: \['a', 'b', 'c'\], where GLUE has"):
        glue_task("rte", GlueTask(path=tmp_path))
    (place / "meta.json").write_text("{")
    with pytest.raises(LoraloomError, match=r"rte/meta\.json: cannot be read"):
        glue_task("rte", GlueTask(path=tmp_path))


@pytest.mark.parametrize(
    ("name", "labels", "metric", "words"),
    [
        ("qnli", ["entailment", "not_entailment"], "exact_match", ["yes", "no"]),
        ("rte", ["not_entailment", "entailment"], "exact_match", ["no", "yes"]),  # the folder's order
        ("mnli", ["entailment", "neutral", "contradiction"], "exact_match", ["yes", "maybe", "no"]),
        ("stsb", None, "pearson", ["0.0", "1.0", "2.0"]),
    ],
)
def test_asked_and_answered_in_words(
    name: str, labels: list[str] | None, metric: str, words: list[str], tmp_path: Path
) -> None:
    folder(tmp_path, name, labels)
    options = GlueTask(path=tmp_path, answers=True, system="Be brief.", train_rows=20, heldout_rows=10, test_rows=30)
    task = glue_task(name, options)
    assert task.train["history"] == [[{"role": "system", "content": "Be brief."}]] * 20
    assert task.kind.generates
    assert task.metric == metric
    assert [len(getattr(task, split)) for split in SPLITS] == [20, 10, 30]
    for split in SPLITS:
        for row in getattr(task, split):
            question, text, other = row["text_a"].split("\n")
            assert (question, other) == (GLUE[name].asked, "b")
            assert row["label"] == words[int(text.split()[1]) % len(words)]
            assert text.split()[0] == ("dev" if split == "test" else "train")
    prompts = [row["text_a"] for split in SPLITS for row in getattr(task, split)]
    assert len(set(prompts)) == len(prompts)
    assert task.digest() == glue_task(name, options).digest()


def test_a_score_in_words_is_the_nearest_fifth(tmp_path: Path) -> None:
    place = folder(tmp_path, "stsb", None)
    rows = [{"text_a": f"train {i}", "text_b": "b", "label": i / 8} for i in range(41)]
    (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = glue_task("stsb", GlueTask(path=tmp_path, answers=True, heldout_rows=5))
    for row in task.train:
        exact = int(row["text_a"].split("\n")[1].split()[1]) / 8
        assert abs(float(row["label"]) - exact) <= 0.1 + 1e-9
        assert round(float(row["label"]) * 5, 6).is_integer()


def test_long_texts_are_left_out_before_any_are_drawn(tmp_path: Path) -> None:
    folder(tmp_path, "qnli", ["entailment", "not_entailment"])  # texts of 8 characters up to row 9, of 9 above
    options = GlueTask(path=tmp_path, answers=True, characters=8, train_rows=4, heldout_rows=4, test_rows=10)
    task = glue_task("qnli", options)
    assert [len(getattr(task, split)) for split in SPLITS] == [4, 4, 10]
    assert task.dropped["with longer texts"] == 30
    with pytest.raises(LoraloomError, match="train_rows: 20 asked for, 6 left of 10") as told:
        glue_task("qnli", options.model_copy(update={"train_rows": 20}))
    assert "30 rows have more than 8 characters" in told.value.hint
    with pytest.raises(ValueError, match="characters and system: for `answers: true` alone"):
        GlueTask(characters=8, system="Answer.")
