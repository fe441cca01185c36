"""`loraloom evaluate --lm-eval`: tasks of lm-evaluation-harness in place of a recipe's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraloom.cli.common import typed
from loraloom.cli.words import number

if TYPE_CHECKING:
    from loraloom.cli.terminal import Out

LmEval = Annotated[
    str | None,
    typer.Option(metavar="TASK,TASK", help="Tasks of lm-evaluation-harness to run in place of a recipe's."),
]
LmEvalPath = Annotated[
    Path | None,
    typer.Option(help="Folder with tasks of your own in YAML, for --lm-eval. Python code that they name is run."),
]
LmEvalChat = Annotated[bool, typer.Option("--lm-eval-chat", help="Apply the base's chat template, for --lm-eval.")]
LmEvalOutput = Annotated[
    Path | None,
    typer.Option(help="JSON file for what --lm-eval finds. Without it ADAPTER.lm-eval.json beside the adapter."),
]


def run_lm_eval(
    out: Out,
    adapter: Path,
    base: str | None,
    tasks: str,
    folder: Path | None,
    output: Path | None,
    *,
    chat: bool,
    overwrite: bool,
) -> None:
    """Run tasks of lm-evaluation-harness on an adapter; without `base` on the one that the adapter names."""
    from loraloom.files.outputs import check_file
    from loraloom.model.load import base_of
    from loraloom.study.harness import MARK, check_harness, run_harness

    check_harness()
    place = output or adapter.resolve().with_name(f"{adapter.resolve().name}.lm-eval.json")
    check_file(place, mark=MARK, overwrite=overwrite, inputs=[adapter])
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    quiet = out.as_json or out.quiet
    found = run_harness(base or base_of(adapter), adapter, names, folder, chat=chat, command=typed(), quiet=quiet)
    found.save(place, overwrite=overwrite)
    scores = [{**vars(score), "version": f"version {score.version}"} for score in found.scores]
    out.result({"adapter": adapter, "results": place, "chat_template": chat, "scores": scores}, "")
    rows = [
        (
            score.task,
            score.metric,
            score.filter or "",
            f"{score.value:.4f}",
            number(score.stderr),
            str(score.rows or ""),
        )
        for score in found.scores
    ]
    columns = ("task", "metric", "filter", "value", "standard error", "rows")
    out.table(f"{adapter} by lm-evaluation-harness {found.versions['lm-eval']}", columns, rows)
    out.facts("Written", [("results", str(place))])
