"""Merges that look at texts without a recipe: at a base model and files of texts, of which nothing else is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import Dataset

from loraloom.adapters.update import Adapter
from loraloom.analysis.agreement import Candidates, agreement, chosen
from loraloom.analysis.screening_texts import ScreenTexts
from loraloom.analysis.searchlight import Reader
from loraloom.analysis.single import FEWEST
from loraloom.errors import LoraloomError, collecting, first_few, raise_problems, raise_together
from loraloom.merging import MergeOptions, Rule
from loraloom.merging.folders import Planned, Supplied
from loraloom.model.generator import Generator
from loraloom.model.load import base_folder
from loraloom.model.runner import Evaluator
from loraloom.model.vocabulary import has_task_head
from loraloom.progress import Reporter
from loraloom.statistics.file import Statistics
from loraloom.statistics.texts import read_texts
from loraloom.tasks.prompts import as_prompts
from loraloom.training.distil import FEWEST as FEWEST_TO_DISTIL, GENERIC, NEAR, ByTeachers, Texts

_WRITTEN = 32  # tokens of an answer, at most: the first ones tell as much as the later


def choose_by_files(
    base: str | None,
    files: Sequence[str],
    columns: Sequence[str],
    texts: int,
    candidates: Sequence[Candidates],
    reporter: Reporter,
    members: Mapping[str, Adapter],
    options: MergeOptions,
    plan: Planned,
) -> MergeOptions:
    """Return `options` with the rule and scale that agree best with the single models, and the whole curve.

    base: the base model; None takes the one that the first adapter names.
    files: of unlabelled texts, one for each adapter, in order. columns: of a text in them, or of a pair.
    texts: the most that are read of a file, from the first on.
    candidates, members, options, plan: as for `agreement`. Where no adapter has a head, answers are written.

    Raises LoraloomError that tells what is wrong with any file, and as `agreement` does.
    """
    model, rows = read_files(base, files, columns, texts, members, FEWEST)
    taken = _of_tasks(rows, "rule and scale are chosen by texts of each task")
    found = agreement(
        members, model, taken, candidates, options=options, plan=plan, answer_tokens=_WRITTEN, reporter=reporter
    )
    return chosen(options, found)


def screen_by_files(
    base: str | None,
    files: Sequence[str],
    columns: Sequence[str],
    texts: int,
    words: Sequence[str],
    members: Mapping[str, Adapter],
) -> ScreenTexts:
    """Return what a screening looks at beside the weights: the base model, and texts of each adapter's task.

    base, files, columns, texts, members: as for `choose_by_files`. words: that may be triggers.
    """
    model, rows = read_files(base, files, columns, texts, members, FEWEST)
    return ScreenTexts(Reader(model), _of_tasks(rows, "a screening looks at texts of each task"), tuple(words))


def _of_tasks(rows: Mapping[str, Texts], why: str) -> dict[str, Dataset]:
    taken = {name: one for name, one in rows.items() if not isinstance(one, str)}
    raise_problems("--unlabelled", [why] if len(taken) < len(rows) else [])
    return taken


def distil_by_files(
    base: str | None,
    files: Sequence[str],
    columns: Sequence[str],
    texts: int,
    scratch: Path,
    start: Adapter | None,
    reporter: Reporter,
    rule: Rule,
    members: Mapping[str, Adapter],
    known: Sequence[Statistics],
) -> Supplied:
    """Return what distils the adapters by files of unlabelled texts; see `ByTeachers`.

    files: one for each adapter, in order, or `generic` or `none` in place of one. base, columns, texts, members: as for
    `choose_by_files`. scratch: where unfinished work lies. start: a merged adapter to start from.
    """
    model, rows = read_files(base, files, columns, texts, members, FEWEST_TO_DISTIL)
    by = ByTeachers(model, members, rows, scratch, start=start, answer_tokens=_WRITTEN, reporter=reporter)
    return known, None, by


def read_files(
    base: str | None,
    files: Sequence[str],
    columns: Sequence[str],
    texts: int,
    members: Mapping[str, Adapter],
    fewest: int,
) -> tuple[Evaluator | Generator, dict[str, Texts]]:
    """Return the base model and the texts of each adapter: one that writes where no adapter has a task's head.

    Raises LoraloomError that tells what is wrong with any file, before the base is loaded.
    """
    counted = f"{len(files)} files of texts for {len(members)} adapters: give one for each, in order"
    raise_problems("--unlabelled", [counted] if len(files) != len(members) else [], "nothing was merged or written")
    rows, errors = dict[str, Texts](), list[LoraloomError]()
    for name, file in zip(members, files, strict=True):
        with collecting(errors):
            rows[name] = file if file in (GENERIC, NEAR) else read_texts(file, columns, texts, fewest)
    raise_together(errors)
    folder = base_folder(base or next(iter(members.values())).base)
    headed = [member.name for member in members.values() if has_task_head(member)]
    if headed and len(headed) < len(members):
        rest = first_few([member.name for member in members.values() if not has_task_head(member)])
        raise LoraloomError(
            f"{first_few(headed)}: with a head, for classes or numbers; {rest}: without, for answers that are written",
            "merge adapters of one kind; one of classes needs its classifier in modules_to_save",
        )
    if headed:
        return Evaluator(folder), rows
    model = Generator(folder)
    if getattr(model.tokenizer, "chat_template", None):
        rows = {name: one if isinstance(one, str) else as_prompts(one) for name, one in rows.items()}
    return model, rows
