"""Statistics files of strangers, case by case: one message that names what is wrong, soon and in little memory.

tests/fuzz/test_statistics.py tries what nobody thought of.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor
from typer.testing import CliRunner

from loraloom.cli.main import app
from loraloom.errors import LoraloomError
from loraloom.statistics.file import Layer, Statistics
from loraloom.statistics.moments import Moment

Parts = tuple[dict[str, Tensor], dict[str, str]]
DEEP = "[" * 100_000 + "]" * 100_000


def parts() -> Parts:
    """Tensors and metadata of a file: 40 tokens of one input, 4 wide, that two layers read."""
    moment = Moment.of_rows(torch.randn(40, 4, generator=torch.Generator().manual_seed(0)))
    assert moment.gram is not None
    layers = {name: {"input": "query", "in_features": 4, "out_features": 5} for name in ("query", "value")}
    facts = {"format": "loraloom-statistics-1", "base": "org/base", "fingerprint": "f", "kind": "token"}
    numbers = {"texts": "8", "tokens": "40", "counts": '{"query": 40}', "layers": json.dumps(layers)}
    return {"query.total": moment.total, "query.gram": moment.gram}, {**facts, **numbers}


def changed(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], object]) -> Path:
    tensors, metadata = parts()
    change(tensors, metadata)
    path.write_bytes(save(tensors, metadata=metadata))
    return path


def layer(**fields: Any) -> str:
    return json.dumps({"query": {"input": "query", "in_features": 4, "out_features": 5, **fields}})


FACTS = [
    ("counts", '{"query": Infinity}', "counts: Infinity is no JSON"),
    ("counts", '{"query": NaN}', "counts: NaN is no JSON"),
    ("counts", '{"query": 1e400}', "counts: query: Input should be a valid integer"),
    ("counts", '{"query": -1}', "counts: query: Input should be greater than or equal to 0"),
    ("counts", '{"query": 2.5}', "counts: query: Input should be a valid integer"),
    ("counts", '{"query": true}', "counts: query: Input should be a valid integer"),
    ("counts", '{"query": "40"}', "counts: query: Input should be a valid integer"),
    ("counts", '{"query": 1' + "0" * 4000 + "}", "counts: query: Input should be less than or equal to"),
    ("counts", '{"query": ' + "9" * 5000 + "}", "counts: Exceeds the limit"),
    ("counts", '{"query": 1000000000}', "query: 1000000000 rows of 40 tokens"),
    ("counts", DEEP, "counts: nested too deeply"),
    ("counts", '{"query": ' + DEEP + "}", "counts: nested too deeply"),
    ("counts", "[]", "counts: no JSON object"),
    ("counts", '{"query": [40]}', "counts: query: Input should be a valid integer"),
    ("counts", '{"query": 40, "\\ud800": 1}', "counts: 'utf-8' codec can't encode"),
    ("texts", "9" * 5000, "texts: '9999"),
    ("texts", "-1", "texts: '-1' is no count"),
    ("texts", "1e3", "texts: '1e3' is no count"),
    ("texts", "inf", "texts: 'inf' is no count"),
    ("tokens", " 40", "tokens: ' 40' is no count"),
    ("tokens", "4_0", "tokens: '4_0' is no count"),
    ("tokens", "\N{ARABIC-INDIC DIGIT FOUR}", "is no count"),
    ("kind", "word", "kind: 'word' is neither 'token' nor 'sample'"),
    ("base", "x" * 100_000, "base: 100000 characters are no name"),
    ("lost", '{"query": 1e400}', "lost: query: Input should be a finite number"),
    ("lost", '{"query": 1e308}', "query: total and gram that lost 1e+308"),
    ("lost", '{"query": null}', "lost: query: Input should be a valid number"),
    ("privacy", '{"clip": -1}', "privacy: clip: Input should be greater than 0"),
    ("privacy", '{"clip": "1"}', "privacy: clip: Input should be a valid number"),
    ("privacy", '{"noise": 1}', "privacy: 'noise' is none of clip, epsilon and delta"),
    ("layers", "{}", "it covers no layer"),
    ("layers", '{"query": null}', "layers: query: Input should be a dictionary or an instance of Layer"),
    ("layers", layer(input=["query"]), "layers: query.input: Input should be a valid string"),
    ("layers", layer(in_features=4.0), "layers: query.in_features: Input should be a valid integer"),
    ("layers", layer(in_features=0), "layers: query.in_features: Input should be greater than or equal to 1"),
    ("layers", layer(in_features=10**12), "layers: query.in_features: Input should be less than or equal to 1048576"),
    ("layers", layer(out_features=10**9), "layers: query.out_features: Input should be less than or equal to 1048576"),
    ("layers", layer(in_features=5), "does not fit 40 rows of width 5"),
    ("layers", layer(input="other"), "input 'other' of a layer has no moment"),
    ("layers", DEEP, "layers: nested too deeply"),
]


@pytest.mark.parametrize(("key", "text", "told"), FACTS, ids=[f"{i}-{fact[0]}" for i, fact in enumerate(FACTS)])
def test_a_fact_that_is_none(key: str, text: str, told: str, tmp_path: Path) -> None:
    path = changed(tmp_path / "a.safetensors", lambda _, metadata: metadata.update({key: text}))
    with pytest.raises(LoraloomError) as error:
        Statistics.load(path)
    assert told in str(error.value)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("key", [key for key in parts()[1] if key != "format"])
def test_a_fact_that_is_missing(key: str, tmp_path: Path) -> None:
    path = changed(tmp_path / "a.safetensors", lambda _, metadata: metadata.pop(key))
    with pytest.raises(LoraloomError, match=f"its metadata is damaged: {key} is missing"):
        Statistics.load(path)


def test_another_format_and_names_of_no_file_are_told(tmp_path: Path) -> None:
    path = changed(tmp_path / "a.safetensors", lambda _, metadata: metadata.update(format="x" * 100_000))
    with pytest.raises(LoraloomError, match=f"its format is '{'x' * 40}', not"):
        Statistics.load(path)
    for name in (tmp_path, tmp_path / "none", tmp_path / ("x" * 300), tmp_path / "\0"):
        with pytest.raises(LoraloomError, match=r"no such file|is a folder"):
            Statistics.load(name)


def test_every_damaged_fact_is_told(tmp_path: Path) -> None:
    wrong = {"texts": "x", "kind": "x", "counts": "x", "layers": "[]"}
    path = changed(tmp_path / "a.safetensors", lambda _, metadata: metadata.update(wrong))
    with pytest.raises(LoraloomError) as error:
        Statistics.load(path)
    assert "its metadata is damaged: 4 problems" in str(error.value)
    assert all(f"- {key}: " in str(error.value) for key in wrong)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.update({"query.gram": t["query.gram"] * 1e101}), "larger than any layer's inputs give"),
        (lambda t: t.update({"query.total": t["query.total"] * torch.inf}), "not finite"),
        (lambda t: t.update({"query.gram": t["query.gram"].float()}), "query.gram: is F32, not F64"),
        (lambda t: t.update({"query.gram": t["query.gram"].long()}), "query.gram: is I64, not F64"),
        (lambda t: t.update({"query.gram": t["query.gram"].to(torch.complex64)}), "query.gram: is C64, not F64"),
        (lambda t: t.update({"query.gram": t["query.gram"][:, :0].contiguous()}), "does not fit 40 rows"),
        (lambda t: t.update({"query.gram": t["query.gram"].sum()}), "does not fit 40 rows"),
        (lambda t: t.update({"query.rows": torch.zeros(40, 4)}), "does not fit 40 rows"),
        (lambda t: (t.pop("query.gram"), t.update({"query.rows": torch.zeros(40, 4)})), "does not fit 40 rows"),
    ],
)
def test_tensors_that_do_not_fit(change: Any, told: str, tmp_path: Path) -> None:
    path = changed(tmp_path / "a.safetensors", lambda tensors, _: change(tensors))
    with pytest.raises(LoraloomError, match=told):
        Statistics.load(path)


def header(path: Path, entries: dict[str, Any], metadata: dict[str, str], data: int) -> Path:
    """Write a file of this header whose `data` bytes are a hole on the disk: they take no room."""
    text = json.dumps({"__metadata__": metadata, **entries}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with open(path, "r+b") as file:
        file.truncate(8 + len(text) + data)
    return path


def claims(path: Path, part: str, shape: tuple[int, int], count: int) -> Path:
    """Write a file with zeros of this shape, all of which is there for who reads it."""
    width, size = shape[1], {"rows": 4, "gram": 8}[part] * shape[0] * shape[1]
    entries = {
        "query.total": {"dtype": "F64", "shape": [width], "data_offsets": [0, 8 * width]},
        f"query.{part}": {
            "dtype": {"rows": "F32", "gram": "F64"}[part],
            "shape": list(shape),
            "data_offsets": [8 * width, 8 * width + size],
        },
    }
    facts = {"tokens": str(count), "counts": json.dumps({"query": count}), "layers": layer(in_features=width)}
    return header(path, entries, {**parts()[1], **facts}, 8 * width + size)


def many(count: int) -> str:
    return "{" + ",".join(f'"{i}":1' for i in range(count)) + "}"


LARGE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a thousand million rows": (lambda p: claims(p, "rows", (10**9, 4), 10**9), "does not fit 1000000000 rows"),
    "a Gram matrix of 1.3 TB": (
        lambda p: claims(p, "gram", (400_000, 400_000), 40),
        "its largest input takes|unable to mmap",
    ),
    "a million counts": (lambda p: changed(p, lambda _, m: m.update(counts=many(10**6))), "1000000 entries"),
    "many counts": (lambda p: changed(p, lambda _, m: m.update(counts=many(200_000))), "names 200000 inputs"),
    "a header of 20 MB": (lambda p: changed(p, lambda _, m: m.update(x="x" * 20_000_000)), "a header of 2"),
    "a header of no end": (lambda p: header(p, {}, {}, 0).write_bytes(b"\xff" * 100) and p, "a header of 18446744"),
}
LOAD = """
import re, sys, time
from pathlib import Path
from loraloom.errors import LoraloomError
from loraloom.statistics.file import Statistics

def peak():  # of this program: what getrusage tells may be that of the one which started it
    return int(re.search("VmHWM:[^0-9]*(\\d+) kB", Path("/proc/self/status").read_text())[1])

for path in sys.argv[1:]:
    before, start = peak(), time.process_time()
    try:
        Statistics.load(path)
    except LoraloomError as error:
        print(" ".join(error.message[:2000].split()))
    print(peak() - before, time.process_time() - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of its memory so")
def test_large_claims_cost_little(tmp_path: Path) -> None:
    """In one process, one after another: its peak may not grow by more than 300 MB with any of them."""
    paths = [make(tmp_path / f"{i}.safetensors") for i, (make, _) in enumerate(LARGE.values())]
    command = [sys.executable, "-c", LOAD, *map(str, paths)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.splitlines()
    for (name, (_, told)), message, cost in zip(LARGE.items(), done[::2], done[1::2], strict=True):
        kilobytes, seconds = map(float, cost.split())
        print(f"{name}: {kilobytes / 1000:.0f} MB, {seconds:.2f} s")
        assert re.search(told, message), name
        assert kilobytes < 300_000, name
        assert seconds < 2, name


def test_the_command_ends_in_one_message(tmp_path: Path) -> None:
    path = str(changed(tmp_path / "a.safetensors", lambda _, metadata: metadata.update(counts=DEEP)))
    for words in (["statistics", "show", path], ["init", "--other", path, "-o", str(tmp_path / "start")]):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 2
        assert "its metadata is damaged: counts: nested too deeply" in " ".join(done.output.split())
        assert "Traceback" not in done.output
    assert not (tmp_path / "start").exists()


def test_the_file_that_is_changed_here_is_whole(tmp_path: Path) -> None:
    found = Statistics.load(changed(tmp_path / "a.safetensors", lambda *_: None))
    assert found.layers == dict.fromkeys(("query", "value"), Layer("query", 4, 5))
    assert found.moment("value").count == 40
