"""A door to lm-evaluation-harness: its tasks on a base model with an adapter in it, and a record of what it found."""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import io
import json
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loraloom.adapters.bases import public_name
from loraloom.adapters.peft import adapter_sha256, read_adapter
from loraloom.errors import LoraloomError, did_you_mean, first_line, raise_problems
from loraloom.files.atomic import write_text
from loraloom.merging.names import public_command
from loraloom.model.generator import Generator
from loraloom.model.load import base_folder, base_sha256, load_tokenizer
from loraloom.model.vocabulary import writing_problems

FORMAT = "loraloom-lm-eval-1"
MARK = f'"{FORMAT}"'.encode()  # by which such a file is known
_VERSIONS_OF = ("loraloom", "lm-eval", "torch", "transformers")


@dataclass(frozen=True)
class HarnessScore:
    """One figure of lm-evaluation-harness, in its own words.

    task: a task's name, or a group's. version: of the task. filter: what picked the answer out of what was written,
    or None. value, stderr: as the harness gives them, stderr None where it has none. rows: how many were asked.
    """

    task: str
    version: str
    metric: str
    filter: str | None
    value: float
    stderr: float | None
    rows: int | None
    higher_is_better: bool | None


@dataclass(frozen=True)
class HarnessResult:
    """What lm-evaluation-harness measured of an adapter, with all that it takes to repeat it."""

    adapter: str
    adapter_sha256: str
    base: str
    base_sha256: str
    chat_template: bool
    scores: list[HarnessScore]
    tasks: dict[str, Any] = field(repr=False)  # the definition of each, as the harness tells it
    created: str = ""
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path, *, overwrite: bool = False) -> None:
        """Write the result as JSON; with `overwrite` it replaces an earlier one."""
        content = {"format": FORMAT, **asdict(self)}
        text = json.dumps(content, indent=1, ensure_ascii=False, default=str)
        write_text(path, text + "\n", mark=MARK, overwrite=overwrite)


def run_harness(
    base: str,
    adapter: Path,
    tasks: Sequence[str],
    folder: Path | None = None,
    *,
    chat: bool = False,
    batch_size: int = 16,
    command: str = "",
    quiet: bool = True,
) -> HarnessResult:
    """Run tasks of lm-evaluation-harness on `base` with the updates of an adapter in it.

    tasks: names of its tasks or groups.
    folder: with tasks of one's own, in YAML. The harness runs Python code that they name: trust it.
    chat: apply the base's chat template.
    batch_size: rows at a time.
    command: the line that was typed, for the record; absolute paths in it are cut to their last part.
    quiet: whether the harness's own progress is kept from standard error.

    Raises LoraloomError where lm-eval is not installed, for unknown tasks, for an adapter that is none of a language
    model, and with what the harness says where it fails.
    """
    check_harness()
    read = read_adapter(adapter)
    problems = writing_problems([read], load_tokenizer(base))
    raise_problems("it cannot answer the tasks' prompts", problems, "name an adapter of this base model")
    with _said_by(tasks, quiet):
        manager = _manager(tasks, folder)
    generator = Generator(base_folder(base), batch_size=batch_size, precision="auto")
    if chat and not generator.tokenizer.chat_template:
        raise LoraloomError(f"{base}: the base has no chat template", "leave --lm-eval-chat out")
    with _said_by(tasks, quiet), generator.running(read.updates):
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        model = HFLM(pretrained=generator.model, tokenizer=generator.tokenizer, batch_size=batch_size)
        found = simple_evaluate(
            model, tasks=list(tasks), task_manager=manager, apply_chat_template=chat, log_samples=False
        )
    return HarnessResult(
        adapter=public_name(str(adapter)),
        adapter_sha256=adapter_sha256(adapter),
        base=public_name(base),
        base_sha256=base_sha256(base),
        chat_template=chat,
        scores=list(_scores(found)),
        tasks=dict(found["configs"]),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=public_command(command) or "",
        versions={"python": platform.python_version(), **{name: version(name) for name in _VERSIONS_OF}},
    )


def check_harness() -> None:
    """Raise LoraloomError where lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise LoraloomError("lm-evaluation-harness is not installed", "run: pip install 'loraloom[lm-eval]'")


def _manager(tasks: Sequence[str], folder: Path | None) -> Any:
    """Return what finds these tasks. The harness's own are read only where `folder` has not all: it takes a while."""
    from lm_eval.tasks import TaskManager

    if folder is not None:
        if not folder.is_dir():
            raise LoraloomError(f"{folder}: no folder of tasks", "name the folder that holds their YAML files")
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if set(tasks) <= set(own.all_subtasks):
            return own
    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    raise_problems(
        "lm-evaluation-harness",
        [f"has no task {task!r}; {_near(task, manager.all_tasks)}" for task in unknown],
        "`lm-eval ls tasks` lists its own; --lm-eval-path FOLDER has it look into a folder too",
    )
    return manager


def _near(task: str, known: Sequence[str]) -> str:
    hint = did_you_mean(task, known)
    return hint if hint.startswith("did") else f"{len(known)} are known"


@contextlib.contextmanager
def _said_by(tasks: Sequence[str], quiet: bool) -> Iterator[None]:
    """Keep what the harness prints off standard output, and tell as LoraloomError what it raises."""
    shown = io.StringIO() if quiet else sys.stderr
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            yield
    except LoraloomError:
        raise
    except Exception as error:  # of its data sets, templates, and tasks' own code: of every class
        raise LoraloomError(
            f"lm-evaluation-harness could not run {', '.join(tasks)}: {first_line(error)}",
            "look at the task's YAML file, and whether its data set can be reached",
        ) from error


def _scores(found: Mapping[str, Any]) -> Iterator[HarnessScore]:
    """Yield the figures of the harness's results, whose keys are `metric,filter` and `metric_stderr,filter`."""
    for task, figures in found["results"].items():
        for key, value in figures.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = figures.get(f"{metric}_stderr,{chosen}")
            rows = found["n-samples"].get(task, {}).get("effective")
            yield HarnessScore(
                task=task,
                version=str(found["versions"].get(task, "")),
                metric=metric,
                filter=None if chosen == "none" else chosen,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
                rows=rows,
                higher_is_better=found["higher_is_better"].get(task, {}).get(metric),
            )
