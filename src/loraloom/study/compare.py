"""Every merging rule on the same finished adapters, in one table: rules x scales, a study without training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from loraloom.adapters.peft import read_adapter, task_of
from loraloom.adapters.together import compatibility_problems
from loraloom.analysis.agreement import Candidates
from loraloom.errors import LoraloomError, collecting, did_you_mean, raise_problems, raise_together
from loraloom.files.atomic import write_text
from loraloom.files.hashing import json_text
from loraloom.files.outputs import check_file
from loraloom.merging import MergeOptions, Plan, get_rule, make_plan, rule_names
from loraloom.merging.choice import AgreementFacts
from loraloom.merging.normalise import normalise_problems
from loraloom.merging.options import Normalise
from loraloom.progress import Reporter
from loraloom.results import StudyResult
from loraloom.settings import AGREEMENT_TEXTS
from loraloom.study.by_hand import ByRecipe
from loraloom.study.entries import MergeSettings
from loraloom.study.export import run_study
from loraloom.study.recipe import Recipe
from loraloom.study.tasks import measuring_problems

AGREEMENT_FORMAT = "loraloom-agreement-1"
AGREEMENT_MARK = AGREEMENT_FORMAT.encode()  # by which such a file is known
SCALES = (0.25, 0.5, 1.0, 2.0, 3.0)  # times the rule's own scale


def compare(
    adapters: Mapping[str, Path],
    tasks: Recipe,
    folder: str | Path,
    *,
    rules: Sequence[str] = (),
    scales: Sequence[float] | None = None,
    normalise: Normalise = "auto",
    command: str = "",
    reporter: Reporter | None = None,
) -> StudyResult:
    """Merge finished adapters, by task, by each of `rules` (all without) at each scale, and return what was measured.

    adapters: finished adapter folders by task, each with its task's head.
    tasks: a recipe that has these tasks, on their base model. Its inits do not count, of its rules only how many texts
      each may look at.
    folder: gets results.json, report.html and the merged adapters at their chosen scales; what an earlier run did in it
      is not done again.
    rules: names of merging rules; all without.
    scales: factors on each rule's result. Without them SCALES times the rule's own default, which is what its authors'
      figures go by. Held-out rows choose the scale, test rows report.
    normalise: how the adapters are made equally loud first; see `MergeOptions`.
    command, reporter: as in `run_study`.

    Raises LoraloomError that tells all problems at once.
    """
    _check(adapters, tasks, rules, scales, normalise)
    recipe = tasks.model_copy(
        update={
            "name": f"{tasks.name}: every rule",
            "tasks": {name: tasks.task(name) for name in adapters},
            "inits": {},
            "adapters": dict(adapters),
            "merging": [_settings(rule, scales, normalise, tasks) for rule in rules or _fitting(tasks)],
        }
    )
    return run_study(recipe, folder, command=command, reporter=reporter)


def compare_unlabelled(
    adapters: Mapping[str, Path],
    tasks: Recipe,
    folder: str | Path,
    *,
    rules: Sequence[str] = (),
    scales: Sequence[float] | None = None,
    normalise: Normalise = "auto",
    texts: int = AGREEMENT_TEXTS,
    reporter: Reporter | None = None,
) -> AgreementFacts:
    """Merge finished adapters by each of `rules` at each scale, and return how far each is from the single models.

    Labels are read by no rule and no measure, so rules that learn from them are left out where `rules` names none.

    adapters, tasks, rules, scales, normalise, reporter: as for `compare`.
    folder: gets agreement.json, with every candidate's distances.
    texts: training texts a task, by which distances are measured.

    Raises LoraloomError that tells all problems at once, and for a rule that needs labels.
    """
    place = Path(folder) / "agreement.json"
    check_file(place, mark=AGREEMENT_MARK, overwrite=True, inputs=adapters.values())
    _check(adapters, tasks, rules, scales, normalise)
    labelled = [f"rule {rule!r} learns from labels" for rule in rules if get_rule(rule).labelled]
    raise_problems("--no-labels", labelled, "choose others")
    tried = without_labels(tasks, rules)
    settings = [_settings(rule, scales, normalise, tasks) for rule in tried]
    with reporter or Reporter(quiet=True) as shown:
        read = ByRecipe(tasks, shown)
        members = {name: read_adapter(path) for name, path in adapters.items()}

        def plan(asked: MergeOptions) -> Plan:
            looked = next(one.texts for one in settings if one.rule == asked.rule)
            scratch = Path(folder) / f".{asked.rule}.checkpoints"
            seen, probe, by = read.look(looked, normalise, get_rule(asked.rule), members, (), scratch=scratch)
            return make_plan(members, asked, statistics=seen, probe=probe, distiller=by)

        candidates = [Candidates(one.rule, tuple(one.listed)) for one in settings]
        options = MergeOptions(normalise=normalise)
        found = read.agreement(texts, candidates, members, options=options, plan=plan)
    place.parent.mkdir(parents=True, exist_ok=True)
    write_text(place, json_text({"format": AGREEMENT_FORMAT, **asdict(found)}), mark=AGREEMENT_MARK, overwrite=True)
    return found


def without_labels(tasks: Recipe, rules: Sequence[str] = ()) -> list[str]:
    """Return those of `rules`, or of all that fit the tasks, that learn nothing from labels."""
    return [rule for rule in rules or _fitting(tasks) if not get_rule(rule).labelled]


def by_task(folders: Sequence[Path]) -> dict[str, Path]:
    """Return adapter folders by the task each was trained on, or is named for.

    folders: of the adapters.

    Raises LoraloomError for two of one task.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        task = task_of(folder)
        if task in found:
            raise LoraloomError(f"{found[task]} and {folder} are both of task {task!r}", "compare one adapter a task")
        found[task] = folder
    return found


def _check(
    adapters: Mapping[str, Path],
    tasks: Recipe,
    rules: Sequence[str],
    scales: Sequence[float] | None,
    normalise: Normalise,
) -> None:
    """Raise LoraloomError that tells everything for which these adapters cannot be compared by these rules."""
    errors: list[LoraloomError] = []
    members = []
    for name, path in adapters.items():
        with collecting(errors):
            tasks.task(name)
        with collecting(errors):
            members.append(read_adapter(path))
    problems = [
        f"no merging rule is called {r!r}; {did_you_mean(r, rule_names())}" for r in rules if r not in rule_names()
    ]
    problems += [
        f"rule {rule!r} needs heads, and the recipe's answers are written"
        for rule in rules
        if tasks.generates and rule not in _fitting(tasks) and rule in rule_names()
    ]
    problems += [f"rule {rule!r} is given twice" for rule in sorted({rule for rule in rules if rules.count(rule) > 1})]
    problems += normalise_problems(normalise)
    problems += [f"scale {scale} is not finite" for scale in scales or () if not math.isfinite(scale)]
    if len(adapters) < 2:
        problems.append(f"{len(adapters)} adapters: there is nothing to merge")
    problems += compatibility_problems(members)
    with collecting(errors):
        problems += measuring_problems(members, tasks)
    with collecting(errors):
        raise_problems("these adapters cannot be compared", problems, "see `loraloom rules`, and the recipe's tasks")
    raise_together(errors)


def _fitting(tasks: Recipe) -> list[str]:
    """Return the rules that can merge for these tasks: where answers are written there are no heads."""
    return [name for name in rule_names() if not (tasks.generates and get_rule(name).heads)]


def _settings(rule: str, scales: Sequence[float] | None, normalise: Normalise, tasks: Recipe) -> MergeSettings:
    own, distils = get_rule(rule).default_scale, get_rule(rule).distils
    factors = (1.0,) if distils else SCALES  # what was trained to answer at its own scale is none at another
    chosen = list(scales) if scales else [round(own * factor, 6) for factor in factors]
    return MergeSettings(rule=rule, scales=chosen, normalise=normalise, texts=tasks.probe_texts(rule, {}))
