"""Adapter folders in, one folder out: what `loraloom merge` does, with all problems told before work begins."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from loraloom.adapters.bases import public_name
from loraloom.adapters.dialects import common_dialect
from loraloom.adapters.hub import adapter_folder
from loraloom.adapters.lowrank import Shared
from loraloom.adapters.peft import PROVENANCE, read_adapter, read_provenance
from loraloom.adapters.update import Adapter, Update
from loraloom.cores import side_by_side
from loraloom.errors import LoraloomError, collecting, raise_problems, raise_together
from loraloom.files.hashing import json_text
from loraloom.files.outputs import check_folder
from loraloom.merging.card import fused_card
from loraloom.merging.distillation import Distiller
from loraloom.merging.facts import MERGED, ForecastFacts, FusionFacts, MergedFacts, MergeFacts, hashing
from loraloom.merging.fuse import FUSED, fuse, prepare
from loraloom.merging.merger import write_merged
from loraloom.merging.names import input_names
from loraloom.merging.options import MergeOptions
from loraloom.merging.placement import Changes
from loraloom.merging.plan import Plan
from loraloom.merging.planning import make_plan
from loraloom.merging.problems import for_server, leaves_as_it_is, number_problems, together_problems
from loraloom.merging.registry import Probe, Rule, get_rule, rule_names
from loraloom.model.processes import by_first
from loraloom.progress import Reporter
from loraloom.statistics.file import Statistics

Supplied = tuple[Mapping[str, Statistics] | Sequence[Statistics], Probe | None, Distiller | None]
Planned = Callable[[MergeOptions], Plan]
# chooses rule and scale of named adapters, given the options that stand and what makes a plan: see `agreement`
Choose = Callable[[Mapping[str, Adapter], MergeOptions, Planned], MergeOptions]
# looks at named adapters before anything else, and returns those that stay and the options, with what was found
Screen = Callable[[Mapping[str, Adapter], MergeOptions], tuple[Mapping[str, Adapter], MergeOptions]]
# makes what a rule needs of named adapters, beside the statistics that were given: see `needs.supply`
Look = Callable[[Rule, Mapping[str, Adapter], Sequence[Statistics]], Supplied]

_QUICK = 1 << 28  # numbers: a few seconds
_CROP = 512  # rows and columns of the layer that the estimate runs on


def plan_folders(
    folders: Sequence[Path],
    options: MergeOptions,
    output: Path,
    *,
    kind: str = MERGED,
    overwrite: bool = False,
    statistics: Sequence[Path] = (),
    look: Look | None = None,
    choose: Choose | None = None,
    screen: Screen | None = None,
) -> Plan:
    """Read adapter folders, and return the plan of their merge into `output`.

    folders: of the adapters, or their names on the hub; see `adapter_folder`.
    options: how they are merged; see `MergeOptions`.
    kind: of the result, MERGED or FUSED.
    overwrite: whether an earlier result of its kind is replaced.
    statistics: a file of each adapter's inputs, in the adapters' order.
    look: gets what the rule needs of base model and texts.
    choose: chooses rule and scale in place of those in `options`.
    screen: looks at the adapters first, and may drop some.

    Raises LoraloomError that tells what is wrong with the output, the rule, its options and any folder.
    """
    errors: list[LoraloomError] = []
    members: list[Adapter] = []
    seen: list[Statistics] = []
    with collecting(errors):
        check_folder(output, kind=kind, overwrite=overwrite, inputs=[*folders, *statistics])
    places: list[Path] = []
    for folder in folders:
        with collecting(errors):
            places.append(adapter_folder(folder))
    for read in side_by_side(_read, places):
        if isinstance(read, LoraloomError):
            errors.append(read)
        else:
            members.append(read)
    for path in statistics:
        with collecting(errors):
            seen.append(Statistics.load(path))
    if errors:
        with collecting(errors):  # where all can be read, `make_plan` tells what is wrong with the rest
            raise_problems("the rule", get_rule(options.rule).check(options.options)[1])
    raise_together(errors)
    names = input_names([one.path or Path() for one in members])
    members = common_dialect(members, options.to)[1]
    named: Mapping[str, Adapter] = dict(zip(names, members, strict=True))
    problems = together_problems(members, options)
    if screen is not None and not problems:
        every = list(named)
        named, options = screen(named, options)
        kept = [index for index, name in enumerate(every) if name in named]
        members, seen = [members[index] for index in kept], [seen[index] for index in kept if index < len(seen)]

    fit = options.rule in rule_names() and not problems  # of fewer adapters there are none either
    if options.server and fit and not number_problems(len(members), options):
        # before texts are read or a base is loaded
        weighed = zip(members, options.weights or [1.0] * len(members), strict=True)
        for_server(options.server, [one for one, weight in weighed if weight], get_rule(options.rule), options)

    def planned(asked: MergeOptions) -> Plan:
        supplied: Supplied = (seen, None, None)
        if look is not None and not leaves_as_it_is(get_rule(asked.rule), asked, len(members)):
            rule = get_rule(asked.rule)
            wrong = problems + rule.check(asked.options)[1]
            # before a base is loaded
            raise_problems(f"cannot merge by {rule.name}", wrong, "nothing was merged or written")
            supplied = look(rule, named, seen)
        return make_plan(named, asked, statistics=supplied[0], probe=supplied[1], distiller=supplied[2])

    return planned(choose(named, options, planned) if choose else options)


def _read(place: Path) -> Adapter | LoraloomError:
    try:
        return read_adapter(place)
    except LoraloomError as error:
        return error


def merge_folders(
    plan: Plan, output: Path, command: str, reporter: Reporter, *, overwrite: bool = False
) -> MergedFacts:
    """Merge into the adapter folder `output`, and return what was written.

    plan: of the merge, as `plan_folders` returns it.
    output: the folder; it appears whole or not at all.
    command: as it was typed, for loraloom.json.
    reporter: is told how far the work is.
    overwrite: replace a folder that holds an earlier merged adapter.

    Under a launcher every process calls this: a rule that distils trains in all of them, and the first one writes.
    """
    if plan.rule.distils:
        plan.result(plan.modules[0])  # all train together, before one writes alone
    reporter.begin("merging", len(plan.modules))

    def write() -> MergedFacts:
        show = reporter.advance
        write_merged(plan, output, command=command, overwrite=overwrite, progress=lambda done, total: show("merging"))
        return MergedFacts.read(output)

    return by_first(write)


def fuse_folders(
    plan: Plan, base: Path, output: Path, command: str, reporter: Reporter, *, overwrite: bool = False
) -> FusionFacts:
    """Write the checkpoint `base` with the merge in its weights to `output`, and return what was written.

    plan: of the merge, as `plan_folders` returns it.
    base: the checkpoint's folder; see `fuse`, also for what is refused.
    output: the folder; it appears whole or not at all.
    command: as it was typed, for loraloom.json.
    reporter: is told how far the work is.
    overwrite: replace a folder that holds an earlier fused checkpoint.

    Dense results go in as they are, nothing is truncated unless a rank was asked for. Heads are written beside the
    weights, one a task; an averaged head, or that of a single adapter, goes into them.
    """
    single = _single_head(plan)
    with hashing(plan) as hashes:
        facts = MergeFacts.of(plan, FUSED, command, hashes=hashes())
    left_out = {**facts.left_out, **dict.fromkeys(plan.copies, "the checkpoint's own is taken")}
    facts = replace(facts, heads=[] if single else facts.heads, left_out=left_out)
    fused_into = public_name(str(base.resolve()))
    provenance = {**asdict(facts), "fused_into": fused_into}
    reporter.begin("fusing", 100)

    def show(done: int, total: int) -> None:
        reporter.reach("fusing", 100 * done // max(total, 1))

    def delta(module: str) -> Update | torch.Tensor:
        result = plan.layer(module).update if plan.rank else plan.result(module)
        return result.update() if isinstance(result, Shared) else result

    fused = fuse(
        base,
        output,
        _changes(plan),
        delta,
        files={PROVENANCE: json_text(provenance), "README.md": fused_card(facts)},
        carried=plan.carried,
        extra={} if single else {f"heads/{name}.safetensors": head for name, head in plan.task_heads.items()},
        overwrite=overwrite,
        inputs=plan.folders,
        progress=show,
    )
    return FusionFacts(**vars(facts), fused_into=fused_into, checkpoint=fused)


def _changes(plan: Plan) -> Changes:
    return Changes(
        {module: (shape.m, shape.n) for module, shape in plan.shapes.items()},
        transposed=bool(plan.config.get("fan_in_fan_out")),
        forms=plan.forms,
        head=plan.head or _single_head(plan),
        task_type=plan.config.get("task_type"),
        labels=_labels(plan),
    )


def _single_head(plan: Plan) -> dict[str, torch.Tensor]:
    """Return the head of an adapter that is alone: it goes into the weights."""
    return next(iter(plan.members.values())).head if len(plan.members) == 1 else {}


def _labels(plan: Plan) -> list[str] | None:
    """Return the names of the labels that all members were trained on, where their loraloom.json tells them."""
    tasks = [read_provenance(member.path).get("task") if member.path else None for member in plan.members.values()]
    labels = [task.get("labels") if isinstance(task, dict) else None for task in tasks]
    known = labels[0] if all(one == labels[0] for one in labels) else None
    return [str(label) for label in known] if isinstance(known, list) else None


def dry_run(plan: Plan, output: Path, fuse_into: Path | None, *, overwrite: bool = False) -> ForecastFacts:
    """Return what a merge would do: sizes, ranks and the time to expect, from headers and one small trial.

    Raises LoraloomError where the checkpoint `fuse_into` could not take it.
    """
    shapes = plan.shapes
    ranks = {module: min(plan.bound(module), plan.rank or plan.bound(module)) for module in plan.modules}
    written = dict.fromkeys(ranks, plan.served.rank) if plan.served else ranks
    numbers = sum(r * (shapes[module].m + shapes[module].n) for module, r in written.items())
    size = numbers * plan.dtype.itemsize
    if fuse_into is not None:
        size = prepare(fuse_into, output, _changes(plan), overwrite=overwrite)[1].size
    return ForecastFacts(
        **vars(MergeFacts.of(plan, "dry run", energies=quickly_read(plan))),
        output_rank=max(ranks.values()),
        size=size,
        dtype=str(plan.dtype).removeprefix("torch."),
        seconds=estimate(plan),
    )


def quickly_read(plan: Plan) -> bool:
    """Tell whether a dry run reads all inputs too, to tell their energies: where they are small, or read already."""
    shapes = [shape for member in plan.members.values() for shape in member.shapes.values()]
    return (
        sum(shape.r * (shape.m + shape.n) for shape in shapes) <= _QUICK
        or plan.normalised.loudness is not None
        or bool(plan.factors)
    )


def estimate(plan: Plan) -> float | None:
    """Return the seconds that the rule will take, from a run on a corner of the largest layer; None where unknown.

    Work in factors grows with m + n, work on dense updates with m n.
    """
    if plan.as_it_is:
        return 0.0
    if plan.rule.whole or "moments" in plan.rule.supplied:
        return None
    shapes = plan.shapes
    largest = max(plan.modules, key=lambda module: shapes[module].m * shapes[module].n)
    corner = [Update(update.B[:_CROP], update.A[:, :_CROP]) for update in plan.updates(largest)]
    m, n = corner[0].B.shape[0], corner[0].A.shape[1]
    for _ in range(2):  # the first run warms up
        start = time.perf_counter()
        result = plan.rule.layer(corner, plan.options, rank=plan.rank)
        spent = time.perf_counter() - start
    if isinstance(result, torch.Tensor):
        return spent * sum(shape.m * shape.n for shape in shapes.values()) / (m * n)
    return spent * sum(shape.m + shape.n for shape in shapes.values()) / (m + n)
