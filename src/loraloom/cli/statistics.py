"""The commands that collect statistics: statistics, and atlas."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from loraloom.cli.common import AsJson, Output, Overwrite, Quiet, command

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
    help="Collect what a base model's layers see: `loraloom statistics TEXTS` is short for `statistics collect TEXTS`.",
    cls=CollectGroup,
    no_args_is_help=True,
)
Directions = Annotated[
    int | None,
    typer.Option(
        "--directions",
        min=1,
        help="Keep this many directions of each input, the loudest. This bounds memory, file and what is shared; "
        "256 suits large models. Without it all are kept.",
    ),
]


@statistics_app.command("collect")
def statistics(
    texts: Annotated[
        str, typer.Argument(help="JSONL, CSV, TSV, Parquet, or org/name on the hub. Labels are not read.")
    ],
    output: Output,
    base: Annotated[str, typer.Option("--base", help="Hub name or folder of the base model.")],
    column: Annotated[list[str], typer.Option("--column", help="Text column; twice for a pair of texts.")],
    target: Annotated[list[str], typer.Option("--target", help="Path ending of the layers to watch; several times.")],
    count: Annotated[int, typer.Option("--texts", min=1, help="Texts to read.")] = 100,
    kind: Annotated[
        Literal["token", "sample"],
        typer.Option(help="What a row is: a token, or the mean over a sample's tokens, which tells less of a text."),
    ] = "token",
    rows: Annotated[
        int | None, typer.Option(min=0, help="Rows an input may hand on as they are; 0: sums over rows alone.")
    ] = None,
    directions: Directions = None,
    noise: Annotated[
        float | None,
        typer.Option(help="Epsilon of noise that hides any one text; needs --kind sample, --clip, many texts."),
    ] = None,
    delta: Annotated[float, typer.Option(help="Delta of the noise, far below 1 / texts.")] = 1e-6,
    clip: Annotated[float | None, typer.Option(help="Norm to which rows are cut for the noise.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Word pieces kept of a text.")] = 128,
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
        from loraloom.statistics.texts import collect_from_file, shared_alone, wanted_noise

        _check(output, overwrite, base, texts)
        reading = StatisticsSettings(texts=count, kind=kind, max_length=max_length)
        private = wanted_noise(noise, delta, clip, kind)
        with joined() as (process, _):
            found = collect_from_file(texts, column, base, target, reading, directions=directions, noise=private)
        if process == 0:
            _save(shared_alone(found, rows, directions, private), output, overwrite, out)


@statistics_app.command("show")
def show_statistics(
    file: Annotated[Path, typer.Argument(help="What `loraloom statistics` or `loraloom atlas` wrote.")],
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Tell what a statistics file holds, and so what whoever has it can read."""
    with command(quiet, as_json) as out:
        from loraloom.statistics.file import Statistics

        found = Statistics.load(file)
        out.result(found.contents())
        _warn_of_rows(found, out)


def atlas(
    base: Annotated[str, typer.Argument(help="Hub name or folder of the base model.")],
    output: Output,
    target: Annotated[list[str], typer.Option("--target", help="Path ending of the layers to watch; several times.")],
    texts: Annotated[
        str | None, typer.Option("--text-file", help="Texts of your own; English that every Python has without.")
    ] = None,
    column: Annotated[list[str] | None, typer.Option("--column", help="Text column of that file.")] = None,
    count: Annotated[int, typer.Option("--texts", min=1, help="Texts to read.")] = 300,
    directions: Directions = None,
    max_length: Annotated[int, typer.Option(min=2, help="Word pieces kept of a text.")] = 128,
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
        with joined() as (process, _):
            found = make_atlas(base, target, reading, texts=texts, columns=column or [], directions=directions)
        if process == 0:
            _save(found, output, overwrite, out)


def _check(output: Path, overwrite: bool, *inputs: str | None) -> None:
    """Raise LoraloomError where the file must not be written, before texts are read."""
    from loraloom.files.outputs import check_file
    from loraloom.statistics.file import FORMAT

    given = [Path(path) for path in inputs if path]
    check_file(output, mark=FORMAT.encode(), overwrite=overwrite, inputs=given)


def _save(found: Statistics, output: Path, overwrite: bool, out: Out) -> None:
    found.save(output, overwrite=overwrite)
    out.result({"file": str(output), "texts": found.texts, "tokens": found.tokens, "layers": len(found.layers)})
    _warn_of_rows(found, out)


def _warn_of_rows(found: Statistics, out: Out) -> None:
    """Say it where a file holds what layers read of single tokens or texts."""
    raw = found.inputs_with_rows()
    if raw:
        out.hint(
            f"{raw} inputs hold every row that the layer read: from these the texts can "
            "be read back. Before sharing, write sums alone with --rows 0 (docs/sharing.md)"
        )
