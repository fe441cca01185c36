"""Where the stages of a study run: in this process, or in several beside it."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from loraloom.progress import Reporter
from loraloom.settings import Settings
from loraloom.study.engine import Here, Runner, Worker
from loraloom.study.inputs import Base
from loraloom.study.local import Processes, check_memory
from loraloom.study.store import Store
from loraloom.training.runs import check_reports


class Where(Settings):
    """Where stages run. None of it changes what they compute, but for the rounding of sums on several threads."""

    workers: int = Field(1, ge=1, description="processes of this machine, which share out its threads and GPUs")


def runner_of(where: Where, base: Base, report_to: Sequence[str], store: Store, reporter: Reporter) -> Runner:
    """Return what runs a study's stages over `store` as asked.

    Raises LoraloomError where the machine has no room for so many workers, or the curves cannot be reported so.
    """
    check_reports(report_to)
    if where.workers > 1:
        check_memory(base.folder, where.workers)
        return Processes(store.root, where.workers, report_to)
    return Here(Worker(store, report_to), reporter)
