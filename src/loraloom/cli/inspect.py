"""The command inspect: what adapter folders and statistics files foretell, as a page and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from loraloom.cli.common import AsJson, Quiet, command
from loraloom.cli.words import counted, listed, number, percent

if TYPE_CHECKING:
    from torch import Tensor

    from loraloom.analysis.inspection import Inspection
    from loraloom.analysis.interference import Responses
    from loraloom.analysis.outlook import Outlook
    from loraloom.analysis.overlap import Overlaps
    from loraloom.analysis.prediction import Prediction
    from loraloom.cli.terminal import Out

SCALES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5)  # at which the sum's error is told
LOST = 0.9  # predicted error from which a task is said to be lost


def inspect(
    paths: Annotated[list[Path], typer.Argument(help="Adapter folders and statistics files, in any order.")],
    rank: Annotated[
        int,
        typer.Option(min=1, help="Rank of the adapters to come, where only statistics are given."),
    ] = 8,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Foretell what adapters will do to each other: before training from statistics, before merging from adapters.

    Give statistics of two or more tasks, or two or more adapters, or both. docs/predict.md tells how well it foretells.
    """
    with command(quiet, as_json) as out:
        from loraloom.analysis.inspection import inspect_paths

        with out.progress() as shown:
            found = inspect_paths(paths, rank, shown)
        out.result(facts(found), "")
        for table in tables(found):
            out.table(*table)
        for sentence in sentences(found):
            out.say(sentence)
        for warning in warnings(found):
            out.warn(warning)
        _next(found, rank, out)


def facts(found: Inspection) -> dict[str, Any]:
    """Return everything that was found, for JSON; None where a figure does not exist."""
    shares = found.energy_shares()
    return {
        "adapters": [
            {"path": path, **asdict(one), "energy_share": shares[path]} for path, one in found.adapters.items()
        ],
        "statistics": [{"path": path, **one} for path, one in found.statistics.items()],
        "responses": _of_responses(found.responses, found.own) if found.responses else None,
        "overlaps": _of_overlaps(found.shared) if found.shared else None,
        "outlook": _of_outlook(found.outlook) if found.outlook else None,
        "prediction": _of_prediction(found.prediction) if found.prediction else None,
        "without_own": found.without_own(),
    }


def _of_responses(found: Responses, own: dict[str, str]) -> dict[str, Any]:
    against = [found.against(name, own[name]) if name in own else None for name in found.adapters]
    return {
        "adapters": found.adapters,
        "statistics": found.inputs,
        "own": [own.get(name) for name in found.adapters],
        "layers": found.layers,
        "overall": found.overall(),
        "by_layer": found.BA,
        "against_own": [None if one is None else one for one in against],
    }


def _of_overlaps(found: Overlaps) -> dict[str, Any]:
    return {
        "adapters": found.names,
        "rows_of_a": found.rows,
        "columns_of_b": found.columns,
        "chance": found.chance,
        "same_start": [{"one": one, "other": other, "overlap": value} for one, other, value in found.same_start()],
    }


def _of_outlook(found: Outlook) -> dict[str, Any]:
    return {
        "tasks": found.tasks,
        "inputs": found.inputs,
        "rank": found.rank,
        "shared": found.shared,
        "chance": found.chance,
        "starts": [
            {"rule": rule, **found.of_start(rule)._asdict(), "by_input": values}
            for rule, values in found.starts.items()
        ],
        "ranks": found.ranks,
        "attainable": found.attainable,
        "helped": found.helped(),
        "suggested_rank": found.suggested_rank(),
        "thin": found.thin(),
    }


def _of_prediction(found: Prediction) -> dict[str, Any]:
    return {
        "tasks": found.tasks,
        "own_head": found.own_head,
        "layers": found.layers,
        "scale": found.uniform(),
        "scale_by_layer": found.by_layer()[:, 0],
        "scale_by_layer_and_adapter": found.by_layer_and_adapter(),
        "errors": [
            {"chosen": choice.chosen, "scale": choice.single, "by_task": found.by_task(choice.scale)}
            for choice in _choices(found)
        ],
    }


class _Choice(NamedTuple):
    """Scales of a sum: how they were chosen, what to call them, the one number that they are, if one, and all."""

    chosen: str
    label: str
    single: float | None
    scale: float | Tensor


def _choices(found: Prediction) -> Iterator[_Choice]:
    yield from (_Choice("given", f"{scale:g}", scale, scale) for scale in SCALES)
    uniform, by_layer, both = found.uniform(), found.by_layer(), found.by_layer_and_adapter()
    yield _Choice("uniform", f"{uniform:.2f}, {'suggested' if _keeps(found) else 'the best'}", uniform, uniform)
    yield _Choice("by_layer", f"{_span(by_layer)}, a layer", None, by_layer)
    yield _Choice("by_layer_and_adapter", f"{_span(both)}, a layer and adapter", None, both)


def _span(scales: Tensor) -> str:
    return f"{float(scales.min()):.2f} to {float(scales.max()):.2f}"


Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]  # title, columns, rows


def tables(found: Inspection) -> Iterator[Table]:
    """Yield what is known as tables for people."""
    if found.adapters:
        yield _adapters_table(found)
    if found.statistics:
        yield _statistics_table(found)
    if found.responses:
        yield _responses_table(found.responses, found.own)
    if found.shared:
        names = _labels(found.shared.names)
        for what, values in (("rows of A", found.shared.rows), ("columns of B", found.shared.columns)):
            yield f"Overlap of the {what}, mean over layers", ("adapter", *names), _cells(names, values)
    if found.outlook:
        yield from _outlook_tables(found.outlook)
    if found.prediction:
        names = _labels(found.prediction.tasks)
        rows = [(choice.label, found.prediction.by_task(choice.scale)) for choice in _choices(found.prediction)]
        cells = [(name, *(f"{value:.2f}" for value in (*row, row.mean(), row.max()))) for name, row in rows]
        title = "Predicted error of the sum, by scale; 0: a task is as it is alone, 1: as without an adapter"
        yield title, ("scale", *names, "mean", "worst"), cells


def _adapters_table(found: Inspection) -> Table:
    bases = {one.base for one in found.adapters.values()}
    names = _labels(list(found.adapters))
    rows = [
        (
            name,
            str(one.rank),
            str(one.layers),
            number(one.energy),
            *([percent(share)] if len(names) > 1 else []),
            listed(one.heads, 3) or "none",
            one.made_by or "not known",
            *([one.base] if len(bases) > 1 else []),
        )
        for name, one, share in zip(names, found.adapters.values(), found.energy_shares().values(), strict=True)
    ]
    energy = ("|dW|^2", "share") if len(names) > 1 else ("|dW|^2",)
    columns = ("adapter", "rank", "layers", *energy, "heads", "made by")
    if len(bases) > 1:
        return "Adapters", (*columns, "base"), rows
    return f"Adapters on {bases.pop() or 'a base that is not named'}", columns, rows


def _statistics_table(found: Inspection) -> Table:
    bases = {one["base"] for one in found.statistics.values()}
    names = _labels(list(found.statistics))
    rows: list[tuple[str, ...]] = [
        (
            name,
            number(one["texts"]),
            f"{number(one['tokens'] if one['kind'] == 'token' else one['texts'])}, a {one['kind']} each",
            str(one["inputs"]),
            holding(one),
            number(one["privacy"]["epsilon"]) if one["privacy"] and "epsilon" in one["privacy"] else "none",
        )
        for name, one in zip(names, found.statistics.values(), strict=True)
    ]
    title = f"Statistics of {listed(sorted(bases))}; noise by its epsilon"
    return title, ("statistics", "texts", "rows", "inputs", "held as", "noise"), rows


def holding(contents: dict[str, Any]) -> str:
    """Return what statistics hold of their inputs, in short."""
    parts = {
        "rows": contents["inputs_with_rows"],
        f"{contents['directions']} directions": contents["inputs_with_directions"],
        "Gram matrix": contents["inputs_with_gram_matrix"],
    }
    return ", ".join(part for part, count in parts.items() if count)


def _responses_table(found: Responses, own: dict[str, str]) -> Table:
    title = "|B A h|, root mean square over rows and layers; others / own: mean over layers"
    columns = ("adapter", *_labels(found.inputs), "others / own", "worst layer")
    rows: list[tuple[str, ...]] = []
    for name, overall in zip(_labels(found.adapters), found.overall(), strict=True):
        path, mean, worst = found.adapters[len(rows)], "-", "-"
        if path in own and len(found.inputs) > 1:
            by_layer = found.against(path, own[path]).nanmean(dim=1)
            mean = f"{by_layer.nanmean():.2f}"
            top = int(by_layer.nan_to_num(-1).argmax())
            worst = f"{by_layer[top]:.2f} {_short(found.layers[top])}"
        rows.append((name, *map(number, overall.tolist()), mean, worst))
    return title, columns, rows


def _outlook_tables(found: Outlook) -> Iterator[Table]:
    names = _labels(found.tasks)
    chance = float(found.chance.mean())
    title = f"Share of a column's energy in the directions that hold half of a row's; by chance {chance:.2f}"
    yield title, ("task", *names), _cells(names, found.shared.mean(dim=0))
    columns = ("start", "own", "others", "own/others", "worst", "interference")
    rows = [
        (rule, *(f"{value:.2g}" if index < 2 else _times(value) for index, value in enumerate(found.of_start(rule))))
        for rule in found.starts
    ]
    yield f"Energy that A of rank {found.rank} sees before training; |A h| of others / own", columns, rows


def sentences(found: Inspection) -> Iterator[str]:
    """Yield what follows from the tables, in words."""
    if found.outlook:
        yield from _verdict(found.outlook)
    if found.prediction and _keeps(found.prediction):
        yield (
            f"Suggested scale of a sum: {found.prediction.uniform():.2f}. There the predicted error is least, which is "
            "no promise of the best score: hold out rows to choose."
        )
    elif found.prediction:
        yield (
            "No scale of a plain sum is suggested: each loses some. `loraloom merge` by its defaults makes adapters of "
            "unlike energy equally loud first, and `--rule auto --scale auto` tries what is left of each task."
        )


def _verdict(found: Outlook) -> Iterator[str]:
    helped, best = int(found.helped().sum()), found.attainable[:, :, found.ranks.index(found.rank)]
    yield (
        f"A start of rank {found.rank} chosen by these statistics can help in {helped} of "
        f"{counted(len(found.inputs), 'layer input')}: the best A sees {best.min():.1f} to {best.max():.1f} times as "
        "much of its own inputs as of the others' (random: 1; helping: 2)."
    )
    rank = found.suggested_rank()
    yield (
        f"Suggested rank: {rank}, the largest up to 64 at which that still holds."
        if rank
        else "No rank keeps these tasks apart: their inputs are alike. Choose the rank for learning alone."
    )


def warnings(found: Inspection) -> Iterator[str]:
    """Yield what speaks against the figures, or against a merge."""
    from loraloom.merging.normalise import drowned, silent

    if found.outlook and found.outlook.thin():
        yield f"{listed(_labels(found.outlook.thin()))}: fewer rows than an input has features, so figures flatter"
    without = found.without_own()
    for name in without:
        yield f"{name}: no statistics are those of its own task: all count as others"
    if len(found.adapters) > 1 and without:
        yield "no sum was predicted: name statistics files like the adapter folders"
    if found.prediction:
        yield from _drowned(found.prediction)
    names = _labels(list(found.adapters))
    energies = {name: one.energy for name, one in zip(names, found.adapters.values(), strict=True)}
    yield from silent(energies) + drowned(energies)
    for one, other, value in found.shared.same_start() if found.shared else ():
        yield (
            f"{one} and {other} started from nearly the same A (overlap {value:.2f}) and merge worse than adapters of "
            "a seed each: train one again from `loraloom init` with another seed"
        )


def _keeps(found: Prediction) -> bool:
    """Tell whether a sum at the scale of least error loses no task."""
    return bool(found.by_task(found.uniform()).max() <= LOST)


def _drowned(found: Prediction) -> Iterator[str]:
    """Yield which tasks a sum at scale 1 loses, and which of them it loses at every scale."""
    whole, best = found.by_task(1.0), found.by_task(found.uniform())
    names = _labels(found.tasks)
    if whole.max() > 1:
        lost = listed([name for name, error in zip(names, whole, strict=True) if error > 1])
        yield f"at scale 1 a sum does more to {lost} than their adapters do: predicted error up to {whole.max():.2f}"
    if best.max() > LOST:
        lost = listed([name for name, error in zip(names, best, strict=True) if error > LOST])
        error = f"predicted error up to {best.max():.2f} at the best, {found.uniform():.2f}"
        yield f"no one scale keeps {lost} beside the others: {error}"


def _next(found: Inspection, rank: int, out: Out) -> None:
    if len(found.adapters) > 1:
        sums = found.prediction if found.prediction and _keeps(found.prediction) else None
        scale = ["--rule", "task_arithmetic", "--scale", f"{sums.uniform():.2f}"] if sums else []
        out.next("merge them", "loraloom", "merge", *found.adapters, *scale, "-o", "merged")
    elif found.outlook:
        out.next("start adapters", "loraloom", "init", *found.statistics, "--rank", rank, "-o", "starts")


def _times(ratio: float) -> str:
    """Return a ratio to show; where the others are left untouched it is as large as rounding makes it."""
    return f"{ratio:.2f}" if ratio < 1000 else "> 1000"


def _cells(names: Sequence[str], table: Tensor) -> list[tuple[str, ...]]:
    return [
        (name, *("-" if value != value else f"{value:.2f}" for value in row))
        for name, row in zip(names, table.tolist(), strict=True)
    ]


def _labels(paths: Sequence[str]) -> list[str]:
    """Return names for rows and columns: short ones where these keep the files apart, else the paths."""
    from loraloom.analysis.inspection import label

    names = [label(path) for path in paths]
    short = [name.split(".")[0] for name in names]
    return next((one for one in (short, names) if len(set(one)) == len(one)), list(paths))


def _short(layer: str) -> str:
    """Return number and last part of a module path: 3.query."""
    parts = layer.split(".")
    return ".".join([*[part for part in parts if part.isdigit()][:1], parts[-1]])
