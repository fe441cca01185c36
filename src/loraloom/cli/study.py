"""The commands that measure: run and demo for whole studies, evaluate, report, and study for a look into the folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from loraloom.cli.common import AsJson, Base, Overwrite, Quiet, command, read_recipe
from loraloom.cli.harness import LmEval, LmEvalChat, LmEvalOutput, LmEvalPath, run_lm_eval
from loraloom.cli.words import counted, listed, number
from loraloom.errors import LoraloomError

if TYPE_CHECKING:
    from loraloom.report import SummaryRow
    from loraloom.report.aggregate import Merged
    from loraloom.results import Score

_SHARES = {"probability kept": "kept", "recovered loss": "recovered"}  # of the single adapters, in a narrow table
StudyFolder = Annotated[Path, typer.Argument(help="Folder of a study, as `loraloom run` writes it.")]

study_app = typer.Typer(
    help="Look into a study's folder: what is done, why, and how to have it done again.", no_args_is_help=True
)


def evaluate(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder, of a single task or merged.")],
    recipe: Annotated[Path | None, typer.Option(help="Recipe in YAML that names the base model and the tasks.")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", help="Task to measure. Give it once for each; without it all that have a head are."),
    ] = None,
    split: Annotated[
        Literal["test", "heldout"],
        typer.Option(help="Rows to measure on. Choose on heldout, and report test."),
    ] = "test",
    answers: Annotated[
        Path | None,
        typer.Option("--answers", help="Folder for what is written, as JSONL, where the tasks are of answers."),
    ] = None,
    base: Base = None,
    lm_eval: LmEval = None,
    lm_eval_path: LmEvalPath = None,
    lm_eval_chat: LmEvalChat = False,
    lm_eval_output: LmEvalOutput = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure an adapter on tasks of a recipe, by its heads or its answers, or on tasks of lm-evaluation-harness."""
    with command(quiet, as_json) as out:
        if lm_eval is not None:
            on = read_recipe(recipe, base).base if recipe else base
            options = {"chat": lm_eval_chat, "overwrite": overwrite}
            run_lm_eval(out, adapter, on, lm_eval, lm_eval_path, lm_eval_output, **options)
            return
        if recipe is None:
            raise LoraloomError("no tasks are named", "add --recipe RECIPE, or --lm-eval TASK,TASK")
        from loraloom.adapters.peft import adapter_sha256, read_provenance
        from loraloom.results import average
        from loraloom.study.by_hand import evaluate_folder

        chosen = read_recipe(recipe, base)
        with out.progress() as shown:
            scores = evaluate_folder(chosen, adapter, task or [], split, shown, answers=answers)
        mean = average(score for _, score in scores.values())
        tasks = [{"task": name, "metric": metric, **score.model_dump()} for name, (metric, score) in scores.items()]
        told = {"adapter": adapter, "sha256": adapter_sha256(adapter), "split": split, "tasks": tasks}
        out.result({**told, "average": mean.model_dump()}, "")
        rows = [row for name, (metric, score) in scores.items() for row in _metrics(name, metric, score)]
        rows += [("average", "", *_with_error(mean))] if len(scores) > 1 else []
        out.table(f"{adapter} on {split} rows, in points", ("task", "metric", "value", "standard error"), rows)
        known = read_provenance(adapter)
        aligned = any(str(note).startswith("heads: aligned") for note in known.get("notes") or ())
        if not known.get("inputs"):
            out.next("merge it with others", "loraloom", "merge", adapter, "ADAPTER", "-o", "merged")
        elif not (chosen.generates or aligned):
            out.next("fit its heads to it", "loraloom", "align", adapter, "ADAPTERS", "--recipe", recipe)


def report(
    results: Annotated[Path, typer.Argument(help="Folder of a study, or its results.json.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write. It appears whole or not at all.")],
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Draw the report of a study's results again: one HTML page that needs no other file."""
    with command(quiet, as_json) as out:
        from loraloom.report import write_report
        from loraloom.results import StudyResult

        results = results / "results.json" if results.is_dir() else results
        written = write_report(StudyResult.load(results), output, overwrite=overwrite)
        out.result({"report": written}, f"report: {written}")
        out.hint("open it in a browser")


@study_app.command("status")
def study_status(folder: StudyFolder, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """List the stage outputs of a study and what each took, and the stages that failed."""
    with command(quiet, as_json) as out:
        from loraloom.study.store import study_store

        store = study_store(folder)
        outputs, failures = store.outputs(), store.failures()
        kept = ("kind", "label", "key", "seconds")
        told = [{"name": name, **{key: record[key] for key in kept}} for name, record in outputs.items()]
        failed = [{"name": name, "message": message} for name, message in failures.items()]
        out.result({"folder": folder, "outputs": told, "failures": failed}, "")
        rows = [(name, f"{record['seconds']:.1f}") for name, record in outputs.items()]
        out.table(f"{counted(len(rows), 'stage output')} in {folder}", ("output", "seconds"), rows)
        for name, message in failures.items():
            out.warn(f"failed: {name}: {message}")
        out.say(f"{sum(record['seconds'] for record in outputs.values()):.0f} s in all" if outputs else "nothing yet")
        if outputs:
            out.next("see what one hangs on", "loraloom", "study", "explain", folder, next(reversed(outputs)))


@study_app.command("explain")
def study_explain(
    folder: StudyFolder,
    output: Annotated[str, typer.Argument(help="Stage output, as `loraloom study status` names it.")],
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Tell what a stage output depends on, and what of that is missing."""
    with command(quiet, as_json) as out:
        from loraloom.study.store import study_store

        found = study_store(folder).explain(output)
        out.result(_explained(found), "")
        hashes = [(name, f"sha256 {sha256[:12]}") for name, sha256 in found.get("content", {}).items()]
        options = [(name, _plain(value)) for name, value in found["options"].items()]
        out.facts(str(found["output"]), options + hashes)
        out.facts("made of", _inputs(found["inputs"], 0) or [("nothing", "it is a first stage")])
        out.next("have it made again", "loraloom", "study", "rm", folder, output)


@study_app.command("rm")
def study_rm(
    folder: StudyFolder,
    outputs: Annotated[list[str], typer.Argument(help="Stage outputs, as `loraloom study status` names them.")],
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Remove stage outputs; the next run makes them again."""
    with command(quiet, as_json) as out:
        from loraloom.study.store import study_store

        store = study_store(folder)
        for name in outputs:
            store.remove(name)
        out.result({"removed": outputs}, "\n".join(f"removed {name}" for name in outputs))
        out.next("make them again", "loraloom", "run", "RECIPE", "-o", folder)


def _explained(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `Store.explain` found with its inputs as a list, each with its own."""
    listed = {"inputs": [{"name": name, **_explained(one)} for name, one in found.get("inputs", {}).items()]}
    if "content" in found:
        listed["content"] = [{"name": name, "sha256": sha256} for name, sha256 in found["content"].items()]
    return {**found, **listed}


def _inputs(inputs: Mapping[str, Any], depth: int) -> list[tuple[str, str]]:
    lines = []
    for name, one in inputs.items():
        lines.append((f"{'  ' * depth}{name}", one["output"] + ("" if one["present"] else "  MISSING")))
        lines += _inputs(one.get("inputs", {}), depth + 1)
    return lines


def _plain(value: Any) -> str:
    """Return an option's value in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(one)}" for name, one in value.items()) or "none"
    if isinstance(value, list):
        return listed([_plain(one) for one in value], most=12) or "none"
    if value is None or isinstance(value, bool):
        return "yes" if value else "none" if value is None else "no"
    return number(value) if isinstance(value, float) else str(value)


def study_table(
    rows: Sequence[SummaryRow], base: Score | None = None
) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """Return title, columns and rows of a study's summary, short enough for 80 characters.

    base: what the base model alone scores on tasks of answers; it gets a row, and what is kept its columns.
    """
    from loraloom.cli.terminal import base_cells, share_cells

    rules = {merged.rule for row in rows for merged in (row.as_trained, row.aligned) if merged}
    legend = "".join(f", {_short(rule)}: {rule}" for rule in sorted(rules) if _short(rule) != rule)
    best = [row.as_trained for row in rows if row.as_trained]
    shares = [name for name in _SHARES if any(name in merged.shares for merged in best)] or list(_SHARES)[-1:]
    kept = (*(_SHARES[name] for name in shares), "worst task") if base else ("kept", "+ aligned", "kept")
    columns = ("init", "single", "merged", *kept, "interference")
    shown: list[tuple[str, ...]] = [
        (
            row.init,
            _points(row.single),
            _merged(row.as_trained)[0],
            *(share_cells(row.as_trained, shares) if base else (_merged(row.as_trained)[1], *_merged(row.aligned))),
            f"{_decimals(row.interference_before)} → {_decimals(row.interference_after)}",
        )
        for row in rows
    ]
    if base:
        shown.insert(0, ("base model alone", "", _points(base), *base_cells(shares), "", ""))
    return f"Averages over tasks with rule and scale{legend}", columns, shown


def summary(row: SummaryRow) -> dict[str, Any]:
    """Return one init's row of the summary as numbers."""
    return {
        "init": row.init,
        "single": row.single.model_dump() if row.single else None,
        "as_trained": _merged_facts(row.as_trained),
        "aligned": _merged_facts(row.aligned),
        "interference_before": row.interference_before,
        "interference_after": row.interference_after,
    }


def _merged_facts(merged: Merged | None) -> dict[str, Any] | None:
    if merged is None:
        return None
    from loraloom.report.aggregate import SHARES

    shares = {
        SHARES[name]: {
            "average": one.average.model_dump(),
            "tasks": {task: score.model_dump() for task, score in one.tasks.items()},
        }
        for name, one in merged.shares.items()
    }
    return {
        "rule": merged.rule,
        "space": merged.space,
        "output_ranks": merged.output_ranks,
        "scales": merged.scales,
        "chosen_by": merged.chosen_by,
        "average": merged.average.model_dump(),
        "kept": merged.kept,
        **shares,
    }


def _merged(merged: Merged | None) -> tuple[str, str]:
    """Return score with rule and scale, and share kept."""
    if merged is None:
        return "-", "-"
    low, high = min(merged.scales), max(merged.scales)
    scale = f"{low:.2g}" if low == high else f"{low:.2g}-{high:.2g}"
    return f"{_points(merged.average)} {_short(merged.rule)} {scale}", f"{100 * merged.kept:.0f}%"


def _short(rule: str) -> str:
    """Return the initials of a rule of several words."""
    words = rule.split("_")
    return rule if len(words) == 1 else "".join(word[:1] for word in words)


def _points(score: Score | None) -> str:
    return "-" if score is None else f"{100 * score.value:.1f}"


def _metrics(task: str, metric: str, score: Score) -> list[tuple[str, str, str, str]]:
    """Return a row for the task's metric, and one for each further one; a loss is in nats, all else in points."""
    rows = [(task, metric, *_with_error(score))]
    for name, one in score.more.items():
        figures = (f"{one.value:.3f}", f"{one.stderr:.3f}") if name == "loss" else _with_error(one)
        rows.append(("", "loss (nats a token)" if name == "loss" else name, *figures))
    return rows


def _with_error(score: Score) -> tuple[str, str]:
    return f"{100 * score.value:.1f}", f"{100 * score.stderr:.1f}"


def _decimals(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
