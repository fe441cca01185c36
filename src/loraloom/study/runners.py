"""Where the stages of a study run: in this process, in several beside it, or on the machines of a Ray cluster."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal

from pydantic import Field, model_validator

from loraloom.errors import LoraloomError
from loraloom.progress import Reporter
from loraloom.settings import Settings
from loraloom.study.engine import Here, Runner, Worker
from loraloom.study.inputs import Base
from loraloom.study.local import Processes, check_memory
from loraloom.study.store import Store
from loraloom.training.runs import check_reports

_OF = {"workers": "local", "address": "ray", "cpus": "ray", "gpus": "ray", "memory": "ray"}  # options by engine


class Where(Settings):
    """Where stages run. None of it changes what they compute, but for the rounding of sums on several threads."""

    engine: Literal["local", "ray"] = Field("local", description="on this machine, or on a cluster of Ray")
    workers: int = Field(1, ge=1, description="processes of this machine, which share out its threads and GPUs")
    address: str = Field("auto", description="of the cluster: auto, host:port or ray://host:port")
    cpus: int = Field(1, ge=1, description="threads that a stage has on the cluster")
    gpus: float = Field(0.0, ge=0, description="GPUs that the cluster keeps free for a stage")
    memory: float = Field(0.0, ge=0, description="memory in GB that the cluster keeps free for a stage")

    @model_validator(mode="after")
    def _of_one_engine(self) -> Where:
        strange = [name for name, engine in _OF.items() if name in self.model_fields_set and engine != self.engine]
        if strange:
            told = " and ".join(f"{name} (of engine {_OF[name]})" for name in strange)
            raise ValueError(f"engine {self.engine} takes no {told}")
        return self


def runner_of(where: Where, base: Base, report_to: Sequence[str], store: Store, reporter: Reporter) -> Runner:
    """Return what runs a study's stages over `store` as asked.

    Raises LoraloomError where the machine has no room for so many workers, no cluster answers, or the curves cannot be
    reported so.
    """
    check_reports(report_to)
    if where.engine == "ray":
        if find_spec("ray") is None:
            raise LoraloomError("engine ray: Ray is not installed", "pip install 'loraloom[ray]'")
        from loraloom.study.cluster import Cluster

        return Cluster(store, where.address, where.cpus, where.gpus, where.memory, report_to)
    if where.workers > 1:
        check_memory(base.folder, where.workers)
        return Processes(store.place, where.workers, report_to)
    return Here(Worker(store, report_to), reporter)
