"""Files that anybody may have written: one message with the line, and no more memory or time than the file is worth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from loraloom.tasks.sources import read_table


def told(path: Path, content: str | bytes | None = None, wanted: tuple[str, ...] = ("s", "y")) -> str:
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    started = time.process_time()
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read_table(str(path), "train", wanted)
    assert time.process_time() - started < 2
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500
    return str(caught.value)


GOOD = '{"s": "x", "y": 1}\n'


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("[" * 200_000, "nested too deeply"),
        ('{"s": ' * 200_000, "nested too deeply"),
        ('{"s": "x", "y": ' + "9" * 5000 + "}", "a number of thousands of digits"),
        ('{"s": "x", "s": "y", "y": 1}', "'s' is given twice"),
        ('{"s": "x", "y": {"a": 1, "a": 2}}', "'a' is given twice"),
        ("{" + ", ".join(f'"{i}": 1' for i in range(50_000)) + ', "7": 1}', "'7' is given twice"),
    ],
)
def test_json_that_no_parser_should_hold(tmp_path: Path, line: str, what: str) -> None:
    assert f"line 2 is not JSON ({what})" in told(tmp_path / "rows.jsonl", f"{GOOD}{line}\n{GOOD}")
    assert f"not JSON ({what})" in told(tmp_path / "rows.json", f"[{line}]")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".json"])
def test_text_of_another_encoding(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    good = {".jsonl": GOOD + '{"s": "né", "y": 1}\n', ".csv": "s,y\nné,1\n", ".tsv": "s\ty\nné\t1\n"}
    text = good.get(suffix, '[{"s": "né", "y": 1}]')
    where = "the file" if suffix == ".json" else "line 2"
    assert f"{where} is not UTF-8 (byte 0xe9): save the file as UTF-8" in told(path, text.encode("latin-1"))
    assert "NUL character: save the file as UTF-8" in told(path, text.replace("é", "e").encode("utf-16-le"))
    assert "save the file as UTF-8" in told(path, text.encode("utf-16"))
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())  # a mark that editors on Windows leave
    assert read_table(str(path), "train", ["s"]).rows[-1] == {"s": "né"}


def test_lines_and_fields_without_end(tmp_path: Path) -> None:
    long = "a" * 11_000_000
    assert "line 1 is longer than 10,000,000 characters" in told(tmp_path / "rows.jsonl", f'{{"s": "{long}"}}')
    assert "line 2 is longer than" in told(tmp_path / "rows.csv", f"s,y\n{long},1\n")
    lines = "b\n" * 200_000
    message = told(tmp_path / "rows.csv", f's,y\nfine,1\n"{lines}')
    assert "field larger than field limit" in message
    assert "is a quote not closed?" in message
    assert "header names a column twice" in told(tmp_path / "rows.csv", "," * 100_000 + "\n")


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    assert "is no regular file" in told(tmp_path / "rows.jsonl")
    (tmp_path / "zeros.csv").symlink_to("/dev/zero")
    assert "is no regular file" in told(tmp_path / "zeros.csv")
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    assert "no such file" in told(tmp_path / "loop.csv")
    assert "cannot be read: " in told(tmp_path / ("n" * 300 + ".jsonl"))
    assert "cannot be read: " in told(Path("~nobody-of-this-name/rows.jsonl"))
    assert "no such file" in told(tmp_path / "nul\0.jsonl")
    with pytest.raises(ValueError, match="File name too long"):
        read_table(f"{'o' * 300}/name", "train", ["s"])


def parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, compression="zstd", **options)
    assert path.stat().st_size < 200_000
    return path


def repeated(text: str, times: int) -> Any:
    """Return a column in which one text stands many times; the file holds it once."""
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * times, pyarrow.int32()), [text])


def test_parquet_whose_few_bytes_unfold_to_gigabytes(tmp_path: Path) -> None:
    path = parquet(tmp_path / "texts.parquet", {"s": repeated("a" * 22_000, 100_000), "y": [0] * 100_000})
    assert "unfold to 2,200," in told(path)
    path = parquet(tmp_path / "pages.parquet", {"s": ["x" * 70_000_000], "y": [1]}, use_dictionary=False)
    assert "unfold to 70,0" in told(path)
    path = parquet(tmp_path / "rows.parquet", {"s": [None] * 3_000_000, "y": [None] * 3_000_000})
    assert "3,000,000 rows in" in told(path)


def test_parquet_of_other_things_than_texts(tmp_path: Path) -> None:
    nested = parquet(tmp_path / "nested.parquet", {"s": [[["deep"]]], "y": [{"a": 1}]})
    assert "column 's' holds list<" in told(nested)
    whole = parquet(tmp_path / "whole.parquet", {"s": ["one", "two"], "y": [0, 1]}).read_bytes()
    for broken in (b"PAR1", whole[:-1], whole[:-8] + b"\xff\xff\xff\x7fPAR1", whole[:4] + b"\0" * 60 + whole[64:]):
        assert told(tmp_path / "broken.parquet", broken)
    odd = pyarrow.table({"s": ["one"], "y": [0]}).replace_schema_metadata({"huggingface": '{"info": {"features": 7}}'})
    pyarrow.parquet.write_table(odd, tmp_path / "odd.parquet")
    assert "not a Parquet file with rows" in told(tmp_path / "odd.parquet")


@pytest.mark.parametrize("distinct", [7, 5000])
def test_parquet_of_ordinary_texts_arrives_as_written(tmp_path: Path, distinct: int) -> None:
    texts = [None if i == 3 else f"text {i % distinct}" for i in range(5000)]
    features = datasets.Features({"s": datasets.Value("string"), "y": datasets.ClassLabel(names=["no", "yes"])})
    rows = [{"s": text, "y": i % 3 - 1} for i, text in enumerate(texts)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "rows.parquet"), batch_size=999)
    names = {-1: None, 0: "no", 1: "yes"}
    assert read_table(str(tmp_path / "rows.parquet"), "train", ["s", "y"]).rows == [
        {"s": row["s"], "y": names[row["y"]]} for row in rows
    ]


_PROGRAM = """
import json, resource, sys, time
from loraloom.tasks.sources import read_table
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
try:
    read_table(sys.argv[1], "train", ["s", "y"])
    told = ""
except ValueError as error:
    told = str(error)
print(json.dumps([told, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, time.process_time() - started]))
"""


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_memory_stays_small(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        parquet(path, {"s": repeated("a" * 22_000, 100_000), "y": [0] * 100_000})
    else:
        path.write_text("s,y\n" + "a" * 100_000_000)
    ran = subprocess.run([sys.executable, "-c", _PROGRAM, str(path)], capture_output=True, text=True, check=True)
    message, kilobytes, seconds = json.loads(ran.stdout)
    assert "unfold" in message or "longer than" in message
    assert kilobytes < 300_000
    assert seconds < 2
