"""Stages on a Ray cluster of two machines, both on loopback: a worker is killed, then a machine; nothing is lost."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import loraloom
import tiny_study
from loraloom.errors import LoraloomError
from loraloom.progress import Reporter
from loraloom.study import stages
from loraloom.study.engine import Call
from loraloom.study.export import run_study
from loraloom.study.inputs import Local
from loraloom.study.recipe import Recipe
from loraloom.study.runners import Where
from loraloom.study.store import Store

ray = pytest.importorskip("ray")


def machine() -> dict[str, Any]:
    """Return what a machine of one CPU is started with: little memory, and ports that nobody waits to be told."""
    ports: dict[str, Any] = {}
    with ExitStack() as held:
        for name in ("metrics_agent", "metrics_export", "dashboard_agent_listen", "runtime_env_agent"):
            one = held.enter_context(socket.socket())
            one.bind(("127.0.0.1", 0))
            ports[f"{name}_port"] = one.getsockname()[1]
    return {
        "num_cpus": 1,
        "object_store_memory": 80 * 2**20,
        "include_dashboard": False,
        "include_log_monitor": False,
        **ports,
    }


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Yield a cluster with a machine of one CPU beside its head, which has one too."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_agent_register_timeout_ms", "120000")
        found = Cluster()
        try:
            for _ in range(2):
                add_machine(found)
            yield found
        finally:
            ray.shutdown()
            found.shutdown()


def add_machine(cluster: Any) -> None:
    """Start a machine; where this one is busy, its agents may miss the quarter of a minute that Ray waits for each."""
    for _ in range(3):
        try:
            cluster.add_node(**machine())
            return
        except Exception as error:
            told = error
    pytest.skip(f"Ray does not start here, tried three times: {told}")


class Stopped(Reporter):
    """Ctrl-C at the first training that is told."""

    def enter(self, kind: str, name: str) -> None:
        if kind == "train":
            raise KeyboardInterrupt


def kill_both(store: Store, cluster: Any, killed: list[str]) -> None:
    """Kill a worker in the middle of its training and, when the first adapter is trained, a machine."""
    other = next(node for node in cluster.list_all_nodes() if not node.is_head())

    def first(found: Callable[[], list[Any]]) -> Any:
        while not (seen := found()):
            time.sleep(0.01)
        return seen[0]

    training = first(lambda: [note for note in store.notes() if note["name"].startswith("train/")])
    os.kill(training["process"], signal.SIGKILL)
    killed.append("worker")
    first(lambda: list(store.root.glob("train/[!.]*/stage.json")))
    cluster.remove_node(other, allow_graceful=False)
    killed.append("machine")


def test_ctrl_c_and_a_worker_and_a_machine_that_die_do_not_lose_the_study(
    finished: Path, tmp_path: Path, cluster: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The study gives every output and figure that one process gives, and tells every stage once."""
    recipe, where = Recipe.load(finished / "recipe.yaml"), Where(engine="ray", address=cluster.address)
    store, killed = Store(tmp_path / "study" / "stages"), list[str]()
    with pytest.raises(KeyboardInterrupt):
        run_study(recipe, tmp_path / "study", where=where, reporter=Stopped(quiet=True))
    assert not ray.is_initialized()
    assert len(list(store.root.glob("train/[!.]*/stage.json"))) < 4  # of the four adapters
    while store.notes():  # until those who were stopped are gone
        store.tidy()
        time.sleep(0.1)
    killer = threading.Thread(target=kill_both, args=(store, cluster, killed), daemon=True)
    killer.start()
    run_study(recipe, tmp_path / "study", where=where, reporter=Reporter())
    assert killed == ["worker", "machine"]
    assert tiny_study.contents(tmp_path / "study") == tiny_study.contents(finished / "study")
    figures = [tiny_study.figures(study / "results.json") for study in (tmp_path / "study", finished / "study")]
    assert figures[0] == figures[1]
    lines = capsys.readouterr().err.splitlines()
    assert sum("  train 4 of 4: " in line for line in lines) == 1


def test_stages_that_no_machine_has_room_for_wait_and_it_is_told(tmp_path: Path, cluster: Any) -> None:
    from loraloom.study.cluster import Cluster

    with pytest.warns(UserWarning, match="no machine of the cluster has 64 CPUs, 1 GPUs and 0 GB: stages wait"):
        Cluster(Store(tmp_path), cluster.address, cpus=64, gpus=1, memory=0).close()


def test_machines_that_lack_what_a_stage_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loraloom.study.cluster import _answer

    (tmp_path / "adapter_config.json").write_text("{}")
    given = {"given": Local.folder(tmp_path, "adapter_config.json")}
    call = Call(stages.copy_adapter.stage("mood", **given), stages.copy_adapter, given)
    monkeypatch.chdir(tmp_path)
    told = _answer("0.0.1", str(tmp_path), str(tmp_path), (), 1, call)
    assert f"has loraloom {loraloom.__version__}, where the study has 0.0.1" in str(told)
    told = _answer(loraloom.__version__, str(tmp_path), str(tmp_path / "stages"), (), 1, call)
    assert f"has no {tmp_path / 'stages'}" in str(told)


def test_no_cluster_answers(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(LoraloomError, match=r"no Ray cluster at '127.0.0.1:9'") as told:
        run_study(Recipe.load(finished / "recipe.yaml"), tmp_path, where=Where(engine="ray", address="127.0.0.1:9"))
    assert "ray start --head" in told.value.hint
