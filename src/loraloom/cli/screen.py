"""The command screen: a verdict for each adapter of strangers, with reasons, as JSON and as a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from loraloom.cli.common import AsJson, Columns, Overwrite, Quiet, command, read_recipe
from loraloom.cli.completion import words
from loraloom.cli.words import counted, number
from loraloom.errors import LoraloomError, did_you_mean, raise_problems

if TYPE_CHECKING:
    from loraloom.analysis.screening import Screened, Screening
    from loraloom.analysis.screening_texts import ScreenTexts
    from loraloom.merging.mends import ScreenMode
    from loraloom.progress import Reporter

MODES = ("warn", "refuse", "off")
ScreenOption = Annotated[
    str,
    typer.Option(
        "--screen",
        autocompletion=words(*MODES),
        help="Look at every adapter's weights first: `warn` tells of what is odd, `refuse` refuses what is suspicious, "
        "`off` looks at nothing. A screen, no protection: docs/screening.md.",
    ),
]
DropRefused = Annotated[
    bool,
    typer.Option("--drop-refused", help="Leave out the adapters that the screening refuses, and merge the others."),
]
Clip = Annotated[
    float | None,
    typer.Option(
        metavar="FACTOR",
        help="Bring each adapter's energy |dW|^2 in a layer to at most the adapters' median there times a factor.",
    ),
]
REFUSED = 3  # exit status where an adapter is to be refused
BLIND = (
    "A screen, no protection: what was poisoned and not amplified leaves little in the weights, and who knows these "
    "checks can pass them (docs/screening.md)."
)


def screen(
    adapters: Annotated[list[Path], typer.Argument(help="Adapter folders of one base model.")],
    reference: Annotated[
        Path | None,
        typer.Option(help="Folder of folders of adapters known to be honest: to compare with, not to judge."),
    ] = None,
    starts: Annotated[
        Path | None,
        typer.Option(help="Folder of the adapters' starts, as `init` writes them, each by its adapter's name."),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe", "--tasks", help="YAML recipe that names the base model and the adapters' tasks: runs them too."
        ),
    ] = None,
    unlabelled: Annotated[
        list[str] | None,
        typer.Option(
            "--unlabelled",
            "--texts",
            help="Texts of an adapter's task, in place of a recipe: JSONL, CSV, TSV, Parquet or org/name on the hub. "
            "Give it once for each, in order. Labels are not read.",
        ),
    ] = None,
    column: Columns = None,
    probe_texts: Annotated[int, typer.Option(min=8, help="Texts a task at most, of --recipe or --unlabelled.")] = 32,
    word: Annotated[
        list[str] | None,
        typer.Option("--word", help="A word or phrase that may be a trigger, to be tried beside known ones."),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Base model in place of the recipe's, or of the one the adapters name.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML page to write, with the plot that shows it.")
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(help="JSON file to write the verdicts to; as screening.json in a folder, `list` shows them."),
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Look for adapters that are not what honest training leaves: pass, look or refuse, each with its reasons.

    Exits with 3 where one is to be refused. A screen, no protection: docs/screening.md tells what it cannot see.
    """
    with command(quiet, as_json) as out:
        from loraloom.adapters.listing import VERDICTS_MARK, verdicts_text
        from loraloom.adapters.peft import adapter_sha256
        from loraloom.analysis.screening_folders import screen_folders
        from loraloom.files.atomic import write_text
        from loraloom.files.outputs import check_file
        from loraloom.report.screening import check_screen_page, write_screen_page

        if output:
            check_screen_page(output, overwrite=overwrite, inputs=adapters)
        if record:
            check_file(record, mark=VERDICTS_MARK, overwrite=overwrite, inputs=adapters)
        # of the files before they are read: should one change meanwhile, no verdict is kept for what it is then
        hashes = list(map(adapter_sha256, adapters)) if record else []
        with out.progress() as shown:
            texts = _texts(recipe, unlabelled, column or ["text"], probe_texts, word or [], base, shown)
            found = screen_folders(adapters, reference=reference, starts=starts, texts=texts, reporter=shown)
        told = facts(found)
        if output:
            write_screen_page(told, output, overwrite=overwrite)
        if record:
            verdicts = [
                (name, sha, one.verdict) for sha, (name, one) in zip(hashes, found.adapters.items(), strict=True)
            ]
            write_text(record, verdicts_text(verdicts), mark=VERDICTS_MARK, overwrite=overwrite)
        out.result({**told, "page": output, "record": record}, "")
        out.table(f"Screened against {counted(found.compared, 'other adapter')}", *_table(found))
        for name, one in found.adapters.items():
            out.facts(f"{name}: {one.verdict}", _reasons(one))
        out.say(BLIND)
        if found.compared < 4:
            out.warn("fewer than five adapters: little can be compared; --reference names honest ones of the same base")
        if found.of("refuse"):
            raise typer.Exit(REFUSED)


def _texts(
    recipe: Path | None,
    files: list[str] | None,
    columns: list[str],
    count: int,
    triggers: list[str],
    base: str | None,
    reporter: Reporter,
) -> Callable[..., ScreenTexts] | None:
    """Return what reads the base model and texts, by a recipe or by files; None where neither is named.

    Raises LoraloomError for both, and for words without texts to put them into.
    """
    problems = ["name texts by --recipe or by --unlabelled, one of the two"] if recipe and files else []
    if triggers and not (recipe or files):
        problems.append("--word is put into texts: name some by --recipe or --unlabelled")
    raise_problems("screen", problems)
    if recipe:
        from loraloom.study.by_hand import ByRecipe

        look = partial(ByRecipe(read_recipe(recipe, base), reporter).screen_texts, count, triggers)
    elif files:
        from loraloom.study.unlabelled import screen_by_files

        look = partial(screen_by_files, base, files, columns, count, triggers)
    else:
        return None
    return look


def screen_option(mode: str, drop: bool, reporter: Reporter) -> Callable[..., Any] | None:
    """Return what screens the adapters of a merge; None where it is off.

    Raises LoraloomError for a word that is none of its modes.
    """
    if mode not in MODES:
        raise LoraloomError(f"screen {mode!r} is unknown", did_you_mean(mode, MODES))
    if mode == "off":
        if drop:
            raise LoraloomError(
                "--drop-refused leaves out what the screening refuses, which is off", "leave out --screen off"
            )
        return None
    from loraloom.analysis.screening_folders import screen_members

    return partial(screen_members, cast("ScreenMode", mode), drop, reporter)


def facts(found: Screening) -> dict[str, Any]:
    """Return everything that was found, for JSON."""
    return {
        "adapters": [
            {
                "name": name,
                "verdict": one.verdict,
                "reasons": one.reasons,
                "findings": [{**vars(finding), "where": finding.where or None} for finding in one.findings],
                "silent": one.silent,
            }
            for name, one in found.adapters.items()
        ],
        "compared": found.compared,
        "reference": found.reference,
        "left_out": [{"detector": name, "needs": needs} for name, needs in found.left_out.items()],
    }


def _table(found: Screening) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return columns and rows: the verdict of each adapter, and its most telling numbers."""
    shown = ("energy", "balance", "spectrum")
    rows = []
    for name, one in found.adapters.items():
        values = {finding.detector: finding for finding in one.findings}
        cells = [_against(values[key].value, values[key].compared) if key in values else "-" for key in shown]
        rows.append((name, one.verdict, str(len(one.reasons)), *cells))
    return ("adapter", "verdict", "reasons", "energy a layer / others", "balance / others", "directions / others"), rows


def _against(value: float, compared: float) -> str:
    return f"{number(value)} / {number(compared)}"


def _reasons(one: Screened) -> Iterator[tuple[str, str]]:
    for finding in one.findings:
        if finding.verdict != "pass":
            limit = finding.refuse if finding.verdict == "refuse" and finding.refuse else finding.look
            yield finding.detector, f"{finding.reason} (score {number(finding.score)}, from {number(limit)} on)"
    if not one.reasons:
        yield "nothing", "is out of the ordinary"
