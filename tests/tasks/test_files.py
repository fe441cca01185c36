"""Tasks from files: exact rows, splits without leaks, and faults told with file, column and row."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from pydantic import ValidationError

from loraloom.errors import LoraloomError
from loraloom.tasks.files import FileTask, file_task
from loraloom.tasks.sources import hub_name
from loraloom.tasks.task import SPLITS, Task

ODD = [
    "2020-01-01",
    "007",
    "NA",
    "null",
    "a, b",
    'he said "hi"',
    "tab\there",
    "two\nlines",
    "1e3",
    "line\u2028sep",
    "é",
]


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Return rows of which a quarter are positive."""
    return [{"s": f"text {i}", "y": "pos" if i % 4 == 0 else "neg"} for i in range(start, start + count)]


def write(path: Path, data: list[dict[str, Any]]) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in data), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(data), encoding="utf-8")
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(data).to_parquet(str(path))
    else:
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(data[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(data)
    return str(path)


def make(folder: Path, train: list[dict[str, Any]] | str | None = None, **options: Any) -> Task:
    """Return a task from 80 training and 20 test rows, but for `train` (rows or a source) and `options`."""
    defaults = {"text": ["s"], "label": "y", "heldout_rows": 20}
    options["train"] = train if isinstance(train, str) else write(folder / "train.jsonl", train or rows(80))
    if "test" not in options:
        options["test"] = write(folder / "test.jsonl", rows(20, start=1000))
    seed = options.pop("seed", 0)
    return file_task("t", FileTask(**{**defaults, **options}), seed=seed)


def told(folder: Path, *args: Any, **options: Any) -> str:
    with pytest.raises(LoraloomError) as caught:
        make(folder, *args, **options)
    return str(caught.value)


def texts(split: datasets.Dataset) -> set[tuple[str, ...]]:
    return {tuple(row[c] for c in ("text_a", "text_b") if c in row) for row in split}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize("regression", [False, True])
def test_every_format_gives_the_same_task_and_the_texts_as_written(
    tmp_path: Path, suffix: str, regression: bool
) -> None:
    data = [
        {"s": text, "y": 0.1 * i if regression else i % 2, "z": "unused"}
        for i, text in enumerate(ODD + [f"t{i}" for i in range(19)])
    ]
    train = write(tmp_path / f"a{suffix}", data)
    test = write(tmp_path / f"b{suffix}", [{"s": "unseen", "y": 1, "z": "unused"}])
    task = make(tmp_path, train=train, test=test, heldout_rows=5, regression=regression)
    # The reference is the rows themselves.
    found = {(row["text_a"], row["label"]) for split in (task.train, task.heldout) for row in split}
    assert found == {(row["s"], row["y"]) for row in data}
    assert task.test[:] == {"text_a": ["unseen"], "label": [1.0 if regression else 1]}
    assert task.labels == (None if regression else ("0", "1"))
    assert task.metric == ("pearson_spearman" if regression else "accuracy")
    assert task.train.features["label"].dtype == ("float64" if regression else "int64")


def test_formats_have_one_digest(tmp_path: Path) -> None:
    suffixes = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
    digests = {make(tmp_path, train=write(tmp_path / f"train{suffix}", rows(80))).digest() for suffix in suffixes}
    assert len(digests) == 1


def test_class_labels_of_parquet_arrive_by_name(tmp_path: Path) -> None:
    features = datasets.Features({"s": datasets.Value("string"), "y": datasets.ClassLabel(names=["no", "yes"])})
    data = [{"s": f"t{i}", "y": i % 2} for i in range(10)]
    datasets.Dataset.from_list(data, features=features).to_parquet(str(tmp_path / "train.parquet"))
    task = make(
        tmp_path,
        train=str(tmp_path / "train.parquet"),
        test=write(tmp_path / "test.csv", [{"s": "u", "y": "yes"}]),
        heldout_rows=2,
    )
    assert task.labels == ("no", "yes")
    assert task.test[0]["label"] == 1


def test_labels_in_natural_order_or_as_given(tmp_path: Path) -> None:
    data = [{"s": f"t{i}", "y": [10, 2, -1][i % 3]} for i in range(30)]
    test = write(tmp_path / "test.jsonl", [{"s": "u", "y": 10}])
    assert make(tmp_path, data, test=test, heldout_rows=3).labels == ("-1", "2", "10")
    given = make(tmp_path, data, test=test, heldout_rows=3, labels=["10", "-1", "2"])
    assert given.labels == ("10", "-1", "2")
    assert given.test[0]["label"] == 0
    words = [{"s": f"t{i}", "y": ["c10", "c9"][i % 2]} for i in range(30)]
    test = write(tmp_path / "test.jsonl", [{"s": "u", "y": "c10"}])
    assert make(tmp_path, words, test=test, heldout_rows=3).labels == ("c9", "c10")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_integers_are_places_in_named_labels(tmp_path: Path, suffix: str) -> None:
    train = write(tmp_path / f"train{suffix}", [{"s": f"t{i}", "y": i % 2} for i in range(20)])
    test = write(tmp_path / f"test{suffix}", [{"s": "u", "y": 1}])
    task = make(tmp_path, train=train, test=test, labels=["no", "yes"], heldout_rows=2)
    assert task.labels == ("no", "yes")
    assert all(row["label"] == int(row["text_a"][1:]) % 2 for row in task.train)


def test_pairs(tmp_path: Path) -> None:
    data = [{"s": "same", "r": f"other {i}", "y": i % 2} for i in range(20)]
    test = write(tmp_path / "test.jsonl", [{"s": "same", "r": "other 3", "y": 0}, {"s": "same", "r": "new", "y": 1}])
    task = make(tmp_path, data, test=test, text=["s", "r"], heldout_rows=4)
    assert task.text_columns == ("text_a", "text_b")
    assert task.source["overlap"] == 1  # the pair, not the first text alone
    assert len(task.train) == 15


def test_heldout_keeps_the_share_of_each_label(tmp_path: Path) -> None:
    for seed in range(5):
        task = make(tmp_path, rows(400), heldout_rows=100, seed=seed)
        assert Counter(task.heldout["label"]) == {0: 75, 1: 25}
        assert Counter(task.train["label"]) == {0: 225, 1: 75}


def test_splits_share_no_text(tmp_path: Path) -> None:
    train = rows(80) + rows(80) + rows(7, start=1000)  # every training row twice, and 7 rows of test
    task = make(tmp_path, train)
    parts = {split: texts(getattr(task, split)) for split in SPLITS}
    assert not parts["train"] & parts["heldout"]
    assert not parts["train"] & parts["test"]
    assert not parts["heldout"] & parts["test"]
    assert len(task.test) == 20
    assert task.source["overlap"] == 7
    assert task.source["repeats"] == 160 - 20 - len(task.train) > 0


def test_given_heldout_shares_no_text_with_the_others(tmp_path: Path) -> None:
    heldout = write(tmp_path / "heldout.jsonl", rows(30, start=70) + rows(2, start=1000))
    task = make(tmp_path, heldout=heldout, heldout_rows=30)
    assert texts(task.heldout) == {(f"text {i}",) for i in range(70, 100)}
    assert texts(task.train) == {(f"text {i}",) for i in range(70)}
    assert (task.source["overlap"], task.source["repeats"]) == (2, 10)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_rows_without_text_are_refused_or_left_out_and_counted(tmp_path: Path, suffix: str) -> None:
    gaps = [{"s": gap, "y": "odd"} for gap in ("", " ", None if suffix != ".csv" else "\t")]
    train = write(tmp_path / f"train{suffix}", [*rows(40), *gaps, *rows(40, start=40)])
    test = write(tmp_path / f"test{suffix}", [*rows(20, start=1000), {"s": "", "y": "pos"}])
    message = told(tmp_path, train, test=test)
    assert f"train{suffix}: s: empty text: row 41" in message
    assert "`empty: drop` in the recipe leaves rows without text out" in message
    assert f"test{suffix}: s: empty text" in message
    task = make(tmp_path, train, test=test, empty="drop", labels=["neg", "pos"])
    assert task.source["empty"] == 4
    assert task.dropped == {"without text": 4}
    assert task.digest() == make(tmp_path, labels=["neg", "pos"]).digest()


def test_a_pair_without_one_of_its_texts_is_left_out(tmp_path: Path) -> None:
    data = [{"s": f"text {i}", "r": "" if i < 3 else "x", "y": i % 2} for i in range(30)]
    test = write(tmp_path / "test.jsonl", [{"s": "u", "r": "v", "y": 0}])
    task = make(tmp_path, data, test=test, text=["s", "r"], heldout_rows=4, empty="drop")
    assert (task.source["empty"], len(task.train)) == (3, 23)


def test_samples_follow_the_seed_and_grow_from_their_start(tmp_path: Path) -> None:
    task = make(tmp_path, train_rows=30, test_rows=10)
    assert make(tmp_path, train_rows=30, test_rows=10).digest() == task.digest()
    assert make(tmp_path, train_rows=30, test_rows=10, seed=1).digest() != task.digest()
    larger = make(tmp_path)
    assert larger.train[:30] == task.train[:]
    assert larger.test[:10] == task.test[:]
    assert larger.heldout[:] == task.heldout[:]
    assert len(larger.train) == 60


def test_a_saved_task_is_the_task_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    train = [{"s": f"{ODD[i % len(ODD)]} {i}", "y": i % 2} for i in range(80)]
    task = make(tmp_path, train, test=write(tmp_path / "u.jsonl", [{"s": "unseen", "y": 1}]), description="odd texts")
    task.save(tmp_path / "saved")
    loaded = Task.load(tmp_path / "saved")
    assert loaded.digest() == task.digest()
    assert all(getattr(loaded, split)[:] == getattr(task, split)[:] for split in SPLITS)
    assert (loaded.labels, loaded.metric, loaded.source) == (task.labels, task.metric, task.source)
    meta_path, heldout = tmp_path / "saved/meta.json", tmp_path / "saved/heldout.jsonl"
    heldout.write_text(heldout.read_text().replace('"label": 1', '"label": 0', 1))
    with pytest.raises(LoraloomError, match=r"saved: rows differ from the sha256"):
        Task.load(tmp_path / "saved")
    meta_path.write_text("{}")
    with pytest.raises(LoraloomError, match=r"saved: not a task folder"):
        Task.load(tmp_path / "saved")


# Faults: each is told with its file and field.


def test_missing_file(tmp_path: Path) -> None:
    write(tmp_path / "reviews.csv", rows(3))
    message = told(tmp_path, train=str(tmp_path / "review.csv"))
    assert f"{tmp_path}/review.csv: no such file: did you mean 'reviews.csv'" in message
    assert "there is no folder" in told(tmp_path, train=str(tmp_path / "none/train.csv"))
    assert f"{tmp_path}: is a folder" in told(tmp_path, train=str(tmp_path))


def test_unknown_suffix(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("x")
    message = told(tmp_path, train=str(tmp_path / "train.txt"))
    assert "train.txt: unknown suffix '.txt': known: .jsonl, .json, .csv, .tsv, .parquet" in message


def test_missing_columns(tmp_path: Path) -> None:
    train = [{"sentence": f"t{i}", "lable": i % 2} for i in range(30)]
    message = told(tmp_path, train, text=["sentance"], label="label")
    assert "train.jsonl: no column 'sentance': did you mean 'sentence'?" in message
    assert "train.jsonl: no column 'label': did you mean 'lable'?" in message
    assert "test.jsonl: no column 'sentance': known: s, y" in message


def test_one_class(tmp_path: Path) -> None:
    train = [{"s": f"t{i}", "y": "neg"} for i in range(30)]
    assert "train.jsonl: y: one class alone (neg)" in told(tmp_path, train)
    skewed = [*rows(1), *({"s": f"t{i}", "y": "neg"} for i in range(60))]
    assert "train.jsonl: y: all training rows left have one label" in told(tmp_path, skewed, train_rows=2)


@pytest.mark.parametrize("value", [None, float("nan"), "", " "])
@pytest.mark.parametrize("regression", [False, True])
def test_null_labels(tmp_path: Path, value: Any, regression: bool) -> None:
    train = [{"s": f"t{i}", "y": value if i in (2, 4, 6, 8, 9) else i % 2} for i in range(30)]
    test = write(tmp_path / "test.jsonl", [{"s": "u", "y": 1}])
    message = told(tmp_path, train, test=test, regression=regression)
    shown = repr(value)
    assert f"train.jsonl: y: null label: row 3 ({shown}), row 5 ({shown}), row 7 ({shown}) and 2 more" in message


@pytest.mark.parametrize(
    ("value", "kind"), [(None, "null text"), (" ", "empty text"), (5, "not a text"), ("\ud800", "half a surrogate")]
)
def test_unusable_texts(tmp_path: Path, value: Any, kind: str) -> None:
    test = tmp_path / "test.jsonl"
    test.write_text("".join(json.dumps({"s": s, "y": "pos"}) + "\n" for s in ("fine", value)))
    message = told(tmp_path, test=str(test))
    assert f"test.jsonl: s: {kind}" in message
    assert "row 2 (" in message


def test_regression_labels_that_are_no_numbers(tmp_path: Path) -> None:
    train = [{"s": f"t{i}", "y": "high" if i == 6 else "inf" if i == 7 else i / 2} for i in range(30)]
    test = write(tmp_path / "test.jsonl", [{"s": "u", "y": True}])
    message = told(tmp_path, train, test=test, regression=True)
    assert "train.jsonl: y: not a finite number: row 7 ('high'), row 8 ('inf')" in message
    assert "test.jsonl: y: not a finite number: row 1 (True)" in message


def test_scores_taken_for_classes(tmp_path: Path) -> None:
    train = [{"s": f"t{i}", "y": i / 2} for i in range(30)]
    test = write(tmp_path / "test.jsonl", [{"s": "u", "y": 1.5}])
    assert "train.jsonl: y: 0.5, 1.5, 2.5 and 12 more are scores, not classes" in told(tmp_path, train, test=test)


def test_label_unknown_in_training(tmp_path: Path) -> None:
    test = write(tmp_path / "test.jsonl", [*rows(2, start=1000), {"s": "u", "y": "0"}])
    assert "test.jsonl: y: unknown label (known: neg, pos): row 3 ('0')" in told(tmp_path, test=test)
    message = told(tmp_path, labels=["neg", "positive"])
    assert "train.jsonl: y: no training row has the label positive" in message
    assert "train.jsonl: y: unknown label (known: neg, positive): row 1 ('pos')" in message
    listed = write(tmp_path / "listed.jsonl", [{"s": "u", "y": ["pos"]}])
    assert "listed.jsonl: y: neither a string nor a number: row 1" in told(tmp_path, test=listed)


def test_too_few_rows(tmp_path: Path) -> None:
    train = rows(80) + rows(5, start=1000)
    message = told(tmp_path, train, train_rows=70, test_rows=21)
    assert "train.jsonl: train_rows: 70 asked for, 60 left of 85 (5 are in test, 20 cut for heldout" in message
    assert "test.jsonl: test_rows: 21 asked for, 20 left of 20" in message
    message = told(tmp_path, heldout_rows=200)
    assert "train.jsonl: heldout_rows: 200 asked for, 80 left of 80" in message
    heldout = write(tmp_path / "heldout.jsonl", rows(10, start=500))
    message = told(tmp_path, heldout=heldout, heldout_rows=11)
    assert "heldout.jsonl: heldout_rows: 11 asked for, 10 left of 10" in message
    same = told(tmp_path, train=str(tmp_path / "test.jsonl"))
    assert "test.jsonl: train_rows: at least 1 asked for, 0 left of 20 (20 are in test" in same


def test_broken_files(tmp_path: Path) -> None:
    def broken(name: str, text: str | bytes) -> str:
        (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
        return told(tmp_path, train=str(tmp_path / name))

    good = '{"s": "x", "y": 1}\n'
    message = broken("lines.jsonl", good + "\n" + '{"s": "x"\n' + good + "[1]\n")
    assert "lines.jsonl: line 3 is not JSON (" in message
    assert "line 5 is not an object" in message
    assert "lines.json: not JSON (" in broken("lines.json", good * 2)
    assert "object.json: must hold a list of objects" in broken("object.json", good)
    assert "quote.tsv: line 3: " in broken("quote.tsv", 's\ty\nfine\t1\n"a" b\t0\n')
    assert "fields.csv: more or fewer fields than the header's 2 in row 2, row 3" in broken(
        "fields.csv", "s,y\na,1\na,b,1\na\n"
    )
    assert "twice.csv: header names a column twice" in broken("twice.csv", "s,y,y\na,1,1\n")
    assert "latin.csv: line 2 is not UTF-8 (byte 0xe9)" in broken("latin.csv", "s,y\né,1\n".encode("latin-1"))
    assert "bad.parquet: not a Parquet file with rows (" in broken("bad.parquet", "PAR1 no")
    for name in ("empty.jsonl", "empty.csv"):
        assert f"{name}: no rows" in broken(name, "")
    assert "header.csv: no rows" in broken("header.csv", "s,y\n")


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    message = told(
        tmp_path,
        [*rows(20), {"s": "", "y": "pos"}, {"s": "x", "y": None}],
        heldout=str(tmp_path / "heldout.jsonl"),
        test=write(tmp_path / "test.csv", [{"s": "u", "y": "maybe"}]),
        labels=["neg", "pos", "other"],
        metric="accuracy_f1",
    )
    assert message.startswith("task 't': 6 problems")
    for part in (
        "train.jsonl: y: no training row has the label other",
        "metric: accuracy_f1 is for two labels, not 3",
        "heldout.jsonl: no such file",
        "train.jsonl: s: empty text: row 21",
        "train.jsonl: y: null label: row 22",
        "test.csv: y: unknown label",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"text": "s"}, "text\n  Input should be a valid list"),
        ({"text": []}, "text\n  List should have at least 1 item"),
        ({"text": ["s", "y"]}, "must be different columns"),
        ({"labels": ["a", "b", "a"]}, "labels: the same name twice"),
        ({"labels": ["a", "b"], "regression": True}, "labels: regression has none"),
        ({"metric": "accuracy", "regression": True}, "metric: accuracy does not fit regression"),
        ({"heldout_rows": 1}, "heldout_rows\n  Input should be greater than or equal to 2"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: dict[str, Any], part: str) -> None:
    with pytest.raises(ValidationError) as caught:  # a recipe tells them with its other faults
        make(tmp_path, **options)
    assert part in str(caught.value)


def test_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert hub_name("nyu-mll/glue:sst2#train", "test") == ("nyu-mll/glue", "sst2", "train")
    assert hub_name("stanfordnlp/imdb", "train") == ("stanfordnlp/imdb", None, "train")
    assert hub_name("stanfordnlp/imdb", "heldout") == ("stanfordnlp/imdb", None, "validation")
    assert hub_name("org/v1.5#dev_matched", "test") == ("org/v1.5", None, "dev_matched")
    for file in ("data/train.csv", "absent/train.csv", "data/train", "train", "./a/b", "/a/b", "a/b/c", "../a"):
        assert hub_name(file, "train") is None


def test_offline_hub_is_an_error_with_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = told(tmp_path, train="loraloom-tests/absent:x#train")
    assert "loraloom-tests/absent:x#train: not a file here, and split 'train' cannot be had from the Hub (" in message
    assert "save the rows as .jsonl" in message


def test_hub_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features({"s": datasets.Value("string"), "y": datasets.ClassLabel(names=["no", "yes"])})
    asked = []

    def load_dataset(repo: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((repo, config, split))
        label = -1 if split == "test" else 0
        data = [{"s": f"{split} {i}", "y": max(label, i % 2) if label == 0 else -1} for i in range(30)]
        return datasets.Dataset.from_list(data, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = make(tmp_path, train="org/name:c", test="org/name:c#dev")
    assert asked == [("org/name", "c", "train"), ("org/name", "c", "dev")]
    assert task.labels == ("no", "yes")
    assert texts(task.test) == {(f"dev {i}",) for i in range(30)}
    # A benchmark's secret test labels (-1) are told, not trained on.
    assert "org/name:c: y: null label: row 1 (None)" in told(tmp_path, train="org/name:c#train", test="org/name:c")
