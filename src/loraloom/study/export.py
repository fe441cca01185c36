"""A finished study as results.json, report.html and adapter folders: read from its stages, computed nowhere else."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from loraloom.adapters.heads import Head
from loraloom.adapters.peft import adapter_sha256, read_adapter, read_provenance, write_adapter
from loraloom.files.atomic import staged_folder
from loraloom.files.hashing import text_sha256
from loraloom.files.outputs import check_apart, check_file
from loraloom.merging.card import merged_card
from loraloom.merging.facts import MergedFacts
from loraloom.merging.names import public_command
from loraloom.merging.readout import scaled_readouts
from loraloom.model.processes import check_alone
from loraloom.model.runner import labels
from loraloom.progress import Reporter
from loraloom.report import write_report
from loraloom.report.page import MARK as REPORT_MARK
from loraloom.results import (
    MARK as RESULTS_MARK,
    BaseScore,
    InitFacts,
    Interference,
    MergeScore,
    Score,
    SingleScore,
    StudyResult,
    TaskFacts,
    Transcript,
    average,
)
from loraloom.study import agreement, answers, stages
from loraloom.study.entries import AUTO, MergeSettings
from loraloom.study.inputs import Output
from loraloom.study.parts import GIVEN, Choice, Evaluated, Trained, merged_facts
from loraloom.study.recipe import Recipe, slug
from loraloom.study.remote import is_address
from loraloom.study.runners import Where
from loraloom.study.store import RECORD
from loraloom.study.study import Study
from loraloom.tasks.answers import answer_score
from loraloom.tasks.metrics import metric_value
from loraloom.tasks.task import SPLITS, Task
from loraloom.training.adapter import TRAINED

# how rule and scale are chosen without labels, of so many texts
_NEAREST = "the nearest to the single models on {} unlabelled held-out texts a task"
_VERSIONS_OF = ("loraloom", "torch", "transformers", "peft", "datasets", "scikit-learn", "scipy", "numpy")


def run_study(
    recipe: Recipe,
    folder: str | Path,
    *,
    where: Where | None = None,
    command: str = "",
    reporter: Reporter | None = None,
) -> StudyResult:
    """Run a recipe to its end and return what it measured.

    recipe: tasks, inits (or finished adapters), seeds, rules and scales on one base model.
    folder: gets results.json, report.html, adapters/<init>/<task> and merged/<init>/<rule>. What an earlier run of the
      same recipe in it has done is not done again; a killed run goes on where it stood. It may be an address of
      fsspec's, as s3://bucket/study: this machine's copy of it then is `loraloom.study.remote.local_copy`.
    where: the stages run: in this process without. What they compute does not change by it.
    command: the line that was typed, for results.json; absolute paths in it are cut to their last part.
    reporter: is told how far each kind of stage is; nothing is told without.

    Raises LoraloomError that tells all that is wrong with the recipe's inputs, before anything is trained, and under
    `accelerate launch` and its like: a study runs in one process.
    """
    check_alone("a study")
    if not is_address(folder):
        _check_place(recipe, Path(folder))
    with reporter or Reporter(quiet=True) as shown, closing(Study(recipe, folder, shown, where)) as study:
        study.engine.store.tidy()
        evaluated = [(one, row) for one, rows in study.evaluations() for row in rows]
        merges = [score for one, row in evaluated for score in _merge_scores(study, one, row)]
        transcript = transcript_of(study, evaluated) if recipe.generates else None
        responses = [table for one, found in study.interference() for table in _interference(one, found)]
        result = _result(study, merges, responses, transcript, command)
        # two runs of one study must not write their adapters over each other
        with study.engine.store.lock("outcome"):
            for one in study.trained if recipe.inits else ():
                _export_adapters(study, one)
            for one, row in evaluated:
                for choice in row.chosen:
                    if choice.aligned or recipe.generates:
                        _export_merged(study, one, row, choice)
            _export_answers(study, evaluated)
            result.save(study.folder / "results.json", overwrite=True)
            write_report(result, study.folder / "report.html", overwrite=True)
            if study.engine.store.remote:
                study.engine.store.remote.put_results(study.folder)
    return result


def _check_place(recipe: Recipe, folder: Path) -> None:
    """Raise LoraloomError where the study's files would replace others, or lie in what it reads."""
    check_apart(folder, [Path(recipe.base), *recipe.adapters.values()], may_hold=True)
    check_file(folder / "results.json", mark=RESULTS_MARK, overwrite=True)
    check_file(folder / "report.html", mark=REPORT_MARK, overwrite=True)


def _result(
    study: Study,
    merges: list[MergeScore],
    responses: list[Interference],
    transcript: Transcript | None,
    command: str,
) -> StudyResult:
    recipe, tasks, public = study.recipe, study.tasks, study.recipe.published()
    seen = stages.read_statistics(study.statistics["train"])
    return StudyResult(
        name=recipe.name,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=public_command(command) or "",
        base=public["base"],
        base_sha256=next(iter(seen.values())).fingerprint,
        content_sha256=text_sha256("".join(rows.key for rows in study.rows.values())),
        versions={"python": platform.python_version(), **{name: version(name) for name in _VERSIONS_OF}},
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, torch on {_device()}",
        seeds=recipe.seeds,
        recipe=public,
        inits=[_init_facts(study, name) for name in recipe.inits] or [_given_facts(study)],
        tasks=[_task_facts(task, study.rows[task.name].key) for task in tasks.values()],
        bases=[BaseScore(task=task, score=study.alone(output)) for task, output in study.bases.items()],
        singles=[
            SingleScore(init=one.init, seed=one.seed, task=task, score=study.alone(output))
            for one in study.trained
            for task, output in one.singles.items()
        ],
        merges=merges,
        interference=responses,
        transcript=transcript,
        seconds=study.engine.store.seconds(),
        notes=_notes(study),
    )


def _merge_scores(study: Study, one: Trained, row: Evaluated) -> list[MergeScore]:
    """Return the scores of a merged adapter at one scale: on held-out rows, and on test rows where they were chosen."""
    found = [_merge_score(study, one, row, "heldout", row.heldout, aligned) for aligned in study.heads]
    if row.test is not None:
        found += [_merge_score(study, one, row, "test", row.test, choice.aligned, choice) for choice in row.chosen]
    return found


def _merge_score(
    study: Study,
    one: Trained,
    row: Evaluated,
    split: Literal["heldout", "test"],
    output: Output,
    aligned: bool,
    choice: Choice | None = None,
) -> MergeScore:
    tested, written = split == "test", study.recipe.generates
    scores = stages.read_scores(output, aligned) if tested else study.judged(output, aligned)
    together = average(scores.values())
    if written and not tested:  # the scores are shares of the single adapters' already
        kept = together.value
    else:
        kept = _kept(together, [study.alone(single, split) for single in one.singles.values()])
    return MergeScore(
        init=one.init,
        seed=one.seed,
        scale=row.scale,
        aligned=aligned,
        split=split,
        chosen_by=choice.by if choice else None,
        rule_chosen=bool(choice and choice.entry.rule == AUTO),
        scores=scores,
        average=together,
        resamples=stages.read_resamples(output, aligned) if tested else [],
        kept=kept,
        agreement=agreement.read_distances(row.distances, aligned) if row.distances else {},
        **(answers.read_shares(output) if written else {}),
        **merged_facts(row.merged),
    )


def transcript_of(study: Study, evaluated: list[tuple[Trained, Evaluated]]) -> Transcript:
    """Return the answers of the merge that held-out rows like best."""

    def judged(pair: tuple[Trained, Evaluated]) -> float:
        return average(study.judged(pair[1].heldout, aligned=False).values()).value

    one, row = max(evaluated, key=judged)
    found = answers.read_transcript(study.transcript(one, row))
    return Transcript(init=one.init, seed=one.seed, rule=row.settings.rule, scale=row.scale, answers=found)


def _kept(together: Score, alone: Iterable[Score]) -> float:
    single = average(alone).value
    return together.value / single if single else 0.0


def _interference(one: Trained, found: dict[str, Any]) -> list[Interference]:
    return [
        Interference(init=one.init, seed=one.seed, tasks=found["tasks"], layers=found["layers"], **table)
        for table in found["tables"]
    ]


def _init_facts(study: Study, name: str) -> InitFacts:
    settings = study.recipe.inits[name]
    read = [stages.read_start(start) for one in study.trained if one.init == name for start in one.starts.values()]
    rows = [one["diagnostics"] for one in read]
    diagnostics = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
    notes = sorted({note for one in read for note in one["notes"]})
    shown = notes[:5] + ([f"and {len(notes) - 5} more such notes in the adapters' loraloom.json"] if notes[5:] else [])
    return InitFacts(
        name=name,
        description=settings.description,
        options=settings.model_dump(exclude={"description"}),
        diagnostics=diagnostics,
        notes=shown,
    )


def _given_facts(study: Study) -> InitFacts:
    # of what was read, whatever is in the user's folders now
    copies = {name: output.path / stages.ADAPTER for name, output in study.trained[0].adapters.items()}
    hashes = {name: adapter_sha256(path) for name, path in copies.items()}
    return InitFacts(name=GIVEN, description="adapters trained before, elsewhere", options={"sha256": hashes})


def _task_facts(task: Task, sha256: str) -> TaskFacts:
    text = " | ".join(str(task.train[0][column]) for column in task.text_columns)
    return TaskFacts(
        name=task.name,
        description=task.description,
        metric=task.metric,
        labels=list(task.labels) if task.labels else None,
        rows={split: len(getattr(task, split)) for split in SPLITS},
        dropped=task.dropped,
        majority=_majority(task),
        sha256=sha256,
        example=text if len(text) <= 200 else text[:199] + "…",
    )


def _majority(task: Task) -> float | None:
    """Return what always naming the commonest training label scores; of answers, what writing the commonest does."""
    if task.answering:
        commonest = Counter(task.train["label"]).most_common(1)[0][0]
        expected = list(task.test["label"])
        return answer_score(task.metric, [commonest] * len(expected), expected, task.answering.tolerance).value
    true = labels(task, "test")
    constant = task.headed.constant(labels(task, "train"), len(true))
    return None if constant is None else metric_value(task.metric, constant, true)


def _notes(study: Study) -> list[str]:
    recipe = study.recipe
    notes = ["Test rows chose nothing: they only report."]
    if any(not entry.auto and len(entry.listed) > 1 for entry in recipe.merging):
        notes.append("Scales were chosen on held-out rows, with their labels.")
    if any(entry.auto for entry in recipe.merging):
        notes.append(f"Where it says agreement, {_NEAREST.format(recipe.evaluation.agreement)} was chosen.")
    if recipe.generates:
        notes += _judging(study)
    else:
        notes.append("Heads were aligned on unlabelled training texts.")
    notes.append("Interference was measured on held-out texts, without labels.")
    if recipe.adapters:
        notes += _histories(study)
    else:
        notes.append("Held-out rows chose the checkpoints of the adapters too.")
    if len(recipe.seeds) == 1:
        notes.append("One seed: standard errors cover the choice of rows, not the spread over seeds.")
    return notes


def _judging(study: Study) -> list[str]:
    """Tell by what merges of adapters that write are judged."""
    judged = "what is kept of the probability that the single adapters give to the whole right answers"
    notes = [f"Held-out rows judge by {judged}; on test rows answers were written greedily and compared."]
    unknown = {
        f"{task} ({one.init})"
        for one in study.trained
        for task, single in one.singles.items()
        if not answers.is_known(single)
    }
    if unknown:
        notes.append(
            f"{', '.join(sorted(unknown))}: its own adapter gives right answers a probability below {answers.KNOWN}, "
            "of which no share can be told: recovered loss, not below 0, stands in its place."
        )
    return notes


def _histories(study: Study) -> list[str]:
    """Tell what is known of how given adapters came about: what their loraloom.json says, and no more."""
    recorded = {name: read_provenance(folder).get("task") for name, folder in study.recipe.adapters.items()}
    known = [
        name for name, task in recorded.items() if isinstance(task, dict) and task.get("sha256") == study.rows[name].key
    ]
    unknown = [name for name in recorded if name not in known]
    notes = []
    if known:
        notes.append(f"{', '.join(known)}: trained on these rows; held-out ones chose the checkpoint (loraloom.json).")
    if unknown:
        notes.append(
            f"{', '.join(unknown)}: on which rows the adapter was trained is not known, nor what chose its checkpoint: "
            "it may have seen rows that are held out or tested here."
        )
    return notes


def _export_adapters(study: Study, one: Trained) -> None:
    for task, output in one.adapters.items():
        place = study.folder / "adapters" / _place(study, one) / task
        record = (output.path / RECORD).read_text(encoding="utf-8")
        if not (place / RECORD).is_file() or (place / RECORD).read_text(encoding="utf-8") != record:
            with staged_folder(place, kind=TRAINED, overwrite=True) as staged:
                shutil.copytree(output.path / stages.ADAPTER, staged, dirs_exist_ok=True)
                shutil.copy2(output.path / RECORD, staged / RECORD)


def _export_merged(study: Study, one: Trained, row: Evaluated, choice: Choice) -> None:
    """Write the merged adapter at its chosen scale with the aligned heads beside it."""
    adapter = row.merged.path / stages.ADAPTER
    place = study.folder / "merged" / _place(study, one) / _rule_name(study.recipe, choice.entry)
    who = {
        "labels": "the best of several on held-out rows, with labels",
        "agreement": _NEAREST.format(study.recipe.evaluation.agreement),
        None: "the recipe's own",
    }
    notes = [f"{'rule and scale' if choice.entry.rule == AUTO else 'scale'}: {who[choice.by]}"]
    heads: dict[str, Head] = {}
    if not study.recipe.generates:
        notes.append("heads: aligned to the merged features on unlabelled training texts")
        heads = stages.read_aligned(row.heldout, stages.read_heads(one.adapters))
    facts = MergedFacts.read(adapter).scaled(row.scale, notes)
    provenance = {**asdict(facts), "evaluation": row.heldout.stage.key}
    if place.is_dir() and read_provenance(place) == provenance:
        return
    merged = read_adapter(adapter).scaled(row.scale)
    write_adapter(
        merged,
        place,
        provenance=provenance,
        files={"README.md": merged_card(facts)},
        extra={f"heads/{task}.safetensors": head.tensors for task, head in heads.items()}
        | scaled_readouts(adapter, row.scale),
        overwrite=True,
    )


def _export_answers(study: Study, evaluated: Iterable[tuple[Trained, Evaluated]]) -> None:
    """Write what the base model, each adapter alone and each merged one wrote for the test rows, as JSONL."""
    if not study.recipe.generates:
        return
    found = {f"base/{task}": output.path / answers.ANSWERS for task, output in study.bases.items()}
    for one in study.trained:
        place = f"{_place(study, one)}/single"
        found |= {f"{place}/{task}": output.path / answers.ANSWERS for task, output in one.singles.items()}
    for one, row in evaluated:
        if row.test is not None:
            for choice in row.chosen:
                place = f"{_place(study, one)}/{_rule_name(study.recipe, choice.entry)}"
                found |= {f"{place}/{task}": row.test.path / f"{task}.{answers.ANSWERS}" for task in study.tasks}
    with staged_folder(study.folder / "answers", kind="answers", overwrite=True) as staged:
        for name, path in found.items():
            (staged / f"{name}.jsonl").parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, staged / f"{name}.jsonl")


def _place(study: Study, one: Trained) -> str:
    return slug(one.init) if len(study.recipe.seeds) == 1 else f"{slug(one.init)}-seed{one.seed}"


def _rule_name(recipe: Recipe, entry: MergeSettings) -> str:
    """Return the rule's name, with its options where the recipe has it more than once."""
    alike = [other for other in recipe.merging if (other.rule, other.auto) == (entry.rule, entry.auto)]
    options = [f"{key}.{value}" for key, value in entry.way.items()] if len(alike) > 1 else []
    open_scale = ["scale.auto"] if entry.auto and entry.rule != AUTO else []
    return slug("-".join([entry.rule, *options, *open_scale]))


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU with {torch.get_num_threads()} threads"
