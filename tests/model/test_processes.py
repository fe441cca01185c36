"""Statistics over several processes are those of one process with all texts, on every process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from typer.testing import CliRunner

import tiny_study
from loraloom.cli.main import app
from loraloom.errors import LoraloomError
from loraloom.model.processes import joined, rank_and_size
from loraloom.statistics.collect import collect_statistics
from loraloom.statistics.file import Statistics
from loraloom.statistics.moments import Moment
from tiny_launch import free_port, launched, start_loraloom, two_processes


def test_the_command_in_two_processes(tmp_path: Path) -> None:
    """As a launcher starts them, gloo: one file, written and told of once, equal to that of one process."""
    tiny_study.write_study(tmp_path)
    words = ["statistics", "mood.train.jsonl", "--base", str(tmp_path / "base"), "--column", "text"]
    words += ["--target", "query", "--target", "dense", "--texts", "13", "--max-length", "16"]
    port = free_port()
    said = [tmp_path / "first.txt", tmp_path / "second.txt"]
    runs = [
        start_loraloom(
            [*words, "-o", "two.safetensors"], tmp_path, noise, {**launched(rank, 2, port), "CUDA_VISIBLE_DEVICES": ""}
        )
        for rank, noise in enumerate(said)
    ]
    for run, noise in zip(runs, said, strict=True):
        run.join(300)
        assert run.exitcode == 0, noise.read_text()
    assert said[0].read_text().count("next: start another task") == 1
    assert said[1].read_text() == ""
    words[1] = str(tmp_path / words[1])
    CliRunner().invoke(app, [*words, "-o", str(tmp_path / "one.safetensors")], catch_exceptions=False)
    one, two = (Statistics.load(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert (one.texts, one.fingerprint, one.layers) == (two.texts, two.fingerprint, two.layers)
    same([two], one)


class Plain(nn.Module):
    """Two layers that read unequal inputs, of weights that every process draws alike."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.first, self.second = nn.Embedding(50, 12), nn.Linear(12, 6), nn.Linear(6, 12)

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(self.embed(input_ids))))
        return out


def ids(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(50, (2, 3), generator=generator)} for _ in range(count)]


def collect(batches: Sequence[dict[str, Tensor]], bound: int | None = None) -> Statistics:
    return collect_statistics(Plain(), batches, ["first", "second"], directions=bound)


CASES = [(1, None), (2, None), (3, None), (9, None), (9, 3), (9, 12), (1, 3)]  # batches, bound


def _collect_parts(rank: int, folder: Path) -> None:
    for batches, bound in CASES:
        collect(ids(batches)[rank::2], bound).save(folder / f"{batches}-{bound}-{rank}.safetensors")


def _meet_a_fault(rank: int) -> None:
    mask = torch.ones(2, 4 if rank else 3)
    with pytest.raises(LoraloomError, match=r"^batch 1 of process 1: attention_mask is \(2, 4\)"):
        collect([{**ids(1)[0], "attention_mask": mask}])


def same(found: Sequence[Statistics], whole: Statistics, within: float = 1e-6) -> None:
    for one in found:
        assert (one.texts, one.tokens, one.fingerprint) == (whole.texts, whole.tokens, whole.fingerprint)
        assert one.moments.keys() == whole.moments.keys()
        for name, moment in whole.moments.items():
            mine, gram = one.moments[name], moment.as_gram()
            assert mine.count == moment.count
            assert (mine.as_gram() - gram).norm() <= within * gram.norm()
            assert (mine.total - moment.total).norm() <= within * moment.total.norm()


def test_two_processes_see_what_one_sees(tmp_path: Path) -> None:
    """Rows, or rows here and Gram matrices there, within a bound or not; with one batch the second process has none."""
    two_processes(_collect_parts, tmp_path / "meet", tmp_path)
    for batches, bound in CASES:
        found = [Statistics.load(tmp_path / f"{batches}-{bound}-{rank}.safetensors") for rank in range(2)]
        whole = collect(ids(batches))
        for name, moment in found[0].moments.items():
            assert torch.equal(moment.as_gram(), found[1].moments[name].as_gram())
            assert torch.equal(moment.total, found[1].moments[name].total)
        if bound == 3:
            for name, moment in whole.moments.items():
                check_bound(found[0].moments[name], moment, bound)
        else:
            same(found, whole)


def check_bound(mine: Moment, exact: Moment, most: int) -> None:
    slack = 1e-6 * exact.trace()
    error = torch.linalg.eigvalsh(exact.as_gram() - mine.as_gram())
    assert mine.count == exact.count
    assert mine.thin is not None
    assert len(mine.thin) == most
    assert float(error[0]) >= -slack
    assert float(error[-1]) <= mine.lost + slack
    assert mine.lost * (most + 1) <= exact.trace()


def test_a_fault_of_one_process_is_told_by_all(tmp_path: Path) -> None:
    two_processes(_meet_a_fault, tmp_path / "meet")


def test_a_process_alone_is_no_group() -> None:
    with joined() as found:
        assert found == rank_and_size() == (0, 1)
        assert not dist.is_initialized()
