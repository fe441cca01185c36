"""The commands that collect statistics: statistics, and atlas."""

from __future__ import annotations

import operator
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from loraloom.cli.common import AsJson, Overwrite, Quiet, command
from loraloom.cli.words import counted, listed, number, percent
from loraloom.errors import raise_problems
from loraloom.settings import Kind, Tokens

if TYPE_CHECKING:
    from loraloom.cli.terminal import Out
    from loraloom.statistics.file import Statistics


class CollectGroup(TyperGroup):
    """`loraloom statistics TEXTS` collects: where the first word is no command of the group, `collect` is meant."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `collect` before arguments that name no command; a lone --help is the group's own."""
        meant = args and args[0] not in (*self.commands, "--help")
        return super().parse_args(ctx, ["collect", *args] if meant else args)


statistics_app = typer.Typer(
    help="Collect what a base model's layers see of texts. `statistics TEXTS` is short for `statistics collect TEXTS`.",
    cls=CollectGroup,
    no_args_is_help=True,
)
StatisticsFile = Annotated[
    Path, typer.Option("--output", "-o", help="Statistics file to write (safetensors). It appears whole or not at all.")
]
Target = Annotated[
    list[str],
    typer.Option(
        "--target",
        help="Layers to watch, by the ending of their path, as in q_proj. Give it once for each, or all-linear alone.",
    ),
]
MaxLength = Annotated[int, typer.Option(min=2, help="Word pieces kept of a text; the rest is cut off.")]
Directions = Annotated[
    int | None,
    typer.Option(
        "--directions",
        min=1,
        help="Keep this many directions of each input, the loudest. That bounds memory, file and what is shared; 256 "
        "suits large models. Without it all are kept.",
    ),
]


WhichTokens = Annotated[
    Tokens | None,
    typer.Option(
        help="Of a file of prompts, which tokens count: without it those of the prompt, and no answer is read."
    ),
]


@statistics_app.command("collect")
def statistics(
    texts: Annotated[
        str,
        typer.Argument(help="Texts: a JSONL, CSV, TSV or Parquet file, or org/name on the hub. Labels are not read."),
    ],
    output: StatisticsFile,
    base: Annotated[str, typer.Option("--base", help="Base model: hub name or local folder.")],
    target: Target,
    column: Annotated[
        list[str] | None,
        typer.Option(
            "--column",
            help="Column that holds the text; give it twice for a pair of texts. Without it the file holds prompts: "
            "columns prompt and answer, or messages, read with the base's chat template.",
        ),
    ] = None,
    tokens: WhichTokens = None,
    count: Annotated[
        int, typer.Option("--texts", min=1, help="Texts to read, from the first on. More are better and cost time.")
    ] = 100,
    kind: Annotated[
        Kind,
        typer.Option(help="What a row is: each token, or for a sample the mean over its tokens, as --noise needs it."),
    ] = "token",
    rows: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Inputs with more rows than this hand on sums alone. 0 keeps every row back, for a file to share; "
            "without it few rows are handed on as they are.",
        ),
    ] = None,
    directions: Directions = None,
    noise: Annotated[
        float | None,
        typer.Option(
            help="Hide any one text by noise of this epsilon (differential privacy; 8 or less). It needs --kind "
            "sample, --clip and thousands of texts; docs/sharing.md."
        ),
    ] = None,
    delta: Annotated[float, typer.Option(help="Delta of that noise, far below 1 / texts.")] = 1e-6,
    clip: Annotated[
        float | None, typer.Option(help="Norm to which rows are cut for that noise; about their median is good.")
    ] = None,
    max_length: MaxLength = 128,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Collect what the base model's layers see of unlabelled texts: one file to share instead of data.

    Under `accelerate launch -m` or torchrun each process reads its part of the texts, and the first one writes.
    """
    with command(quiet, as_json) as out:
        from loraloom.model.processes import joined
        from loraloom.settings import StatisticsSettings
        from loraloom.statistics.texts import check_tokens, collect_from_file, shared_alone, wanted_noise

        check_tokens(texts, column or [], tokens)
        _check(output, overwrite, base, texts)
        reading = StatisticsSettings(texts=count, kind=kind, tokens=tokens or "prompt", max_length=max_length)
        private = wanted_noise(noise, delta, clip, kind)
        with joined() as (process, _), out.progress() as shown:
            found = collect_from_file(
                texts,
                column or [],
                base,
                target,
                reading,
                directions=directions,
                noise=private,
                reporter=shown,
            )
        if process == 0:
            _save(shared_alone(found, rows, directions, private), output, overwrite, out)
            out.next("start another task off it", "loraloom", "init", "--other", output, "-o", "start")


@statistics_app.command("add")
def add_statistics(
    files: Annotated[
        list[Path], typer.Argument(help="Statistics files of parts of a data set that share no text, on one base.")
    ],
    output: StatisticsFile,
    directions: Directions = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Add up statistics of a data set's parts, collected apart, as on several machines: as of all texts at once."""
    with command(quiet, as_json) as out:
        from loraloom.statistics.file import Statistics

        _check(output, overwrite, *map(str, files))
        twice = [str(file) for file in files if files.count(file) > 1]
        raise_problems("statistics to add", [f"{file}: is named twice" for file in dict.fromkeys(twice)])
        found = reduce(operator.add, map(Statistics.load, files))  # one file at a time beside the sum
        _save(found if directions is None else found.limit_directions(directions), output, overwrite, out)
        out.next("start another task off it", "loraloom", "init", "--other", output, "-o", "start")


@statistics_app.command("show")
def show_statistics(
    file: Annotated[Path, typer.Argument(help="Statistics file, as `loraloom statistics` or `atlas` writes it.")],
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Tell what a statistics file holds, and so what whoever has it can read."""
    with command(quiet, as_json) as out:
        from loraloom.statistics.file import Statistics

        _tell(file, Statistics.load(file), out)
        out.next("start a task off it", "loraloom", "init", "--other", file, "-o", "start")


def atlas(
    base: Annotated[str, typer.Argument(help="Base model: hub name or local folder.")],
    output: StatisticsFile,
    target: Target,
    texts: Annotated[
        str | None,
        typer.Option(
            "--text-file", help="Texts of your own, as for `statistics`. Without it English that every Python has."
        ),
    ] = None,
    column: Annotated[
        list[str] | None, typer.Option("--column", help="Column of that file that holds the text; `text` without it.")
    ] = None,
    tokens: Annotated[
        Tokens | None, typer.Option(help="That file holds prompts, as for `statistics`; which tokens count.")
    ] = None,
    count: Annotated[int, typer.Option("--texts", min=1, help="Texts to read, from the first on.")] = 300,
    directions: Directions = None,
    max_length: MaxLength = 128,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Map what a base model's layers see of generic text, once for all teams: one file, no task's data in it."""
    with command(quiet, as_json) as out:
        from loraloom.model.processes import joined
        from loraloom.settings import StatisticsSettings
        from loraloom.statistics.texts import make_atlas

        _check(output, overwrite, base, texts)
        reading = StatisticsSettings(atlas_texts=count, max_length=max_length)
        with joined() as (process, _), out.progress() as shown:
            found = make_atlas(
                base,
                target,
                reading,
                texts=texts,
                columns=column or [],
                tokens=tokens,
                directions=directions,
                reporter=shown,
            )
        if process == 0:
            _save(found, output, overwrite, out)
            out.next("start a task off it", "loraloom", "init", "--atlas", output, "-o", "start")


def _check(output: Path, overwrite: bool, *inputs: str | None) -> None:
    """Raise LoraloomError where the file must not be written, before texts are read."""
    from loraloom.files.outputs import check_file
    from loraloom.statistics.file import FORMAT

    given = [Path(path) for path in inputs if path]
    check_file(output, mark=FORMAT.encode(), overwrite=overwrite, inputs=given)


def _save(found: Statistics, output: Path, overwrite: bool, out: Out) -> None:
    found.save(output, overwrite=overwrite)
    _tell(output, found, out)


def _tell(file: Path, found: Statistics, out: Out) -> None:
    """Say what a file holds, and warn where that is what layers read of single tokens or texts."""
    told = found.contents()
    out.result({"file": file, **told}, "")
    rows = told["tokens"] if told["kind"] == "token" else told["texts"]
    widths = listed([str(width) for width in told["widths"]])
    facts = [
        ("base model", told["base"]),
        ("texts", number(told["texts"])),
        ("rows", f"{number(rows)}, one a {told['kind']}" if rows else "not told"),
        ("inputs", f"{counted(told['inputs'], 'input')} of width {widths}, read by {counted(told['layers'], 'layer')}"),
        ("held", "; ".join(_held(told))),
        ("privacy", _privacy(told["privacy"])),
    ]
    out.facts(str(file), facts)
    raw = told["inputs_with_rows"]
    if raw:
        out.warn(
            f"{counted(raw, 'input')} of it {'hold' if raw > 1 else 'holds'} every row that the layer read: from these "
            "the texts can be read back. Before sharing, write sums alone with --rows 0 (docs/sharing.md)"
        )


def _held(told: dict[str, Any]) -> list[str]:
    """Return what is held of the inputs, each way with its count."""
    lost = f", which leave out up to {percent(told['left_out'])} of the largest eigenvalue" if told["left_out"] else ""
    ways = {
        f"all {number(told['rows'])} rows of": told["inputs_with_rows"],
        f"up to {number(told['directions'])} directions{lost}, of": told["inputs_with_directions"],
        "the Gram matrix of": told["inputs_with_gram_matrix"],
    }
    return [f"{way} {counted(count, 'input')}" for way, count in ways.items() if count]


def _privacy(told: dict[str, float] | None) -> str:
    if told is None:
        return "rows not clipped, no noise"
    clipped = f"rows clipped to norm {number(told['clip'])}"
    if "epsilon" not in told:
        return f"{clipped}, no noise"
    return f"{clipped}, noise of epsilon {number(told['epsilon'])} and delta {told['delta']:.0e}"
