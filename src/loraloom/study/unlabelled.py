"""Rule and scale chosen without a recipe: from a base model and files of texts, of which nothing else is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loraloom.adapters.update import Adapter
from loraloom.analysis.agreement import Candidates, agreement, chosen
from loraloom.analysis.single import FEWEST
from loraloom.errors import LoraloomError, collecting, raise_problems, raise_together
from loraloom.merging import MergeOptions
from loraloom.merging.folders import Planned
from loraloom.model.generator import Generator
from loraloom.model.load import base_folder
from loraloom.model.runner import Evaluator
from loraloom.progress import Reporter
from loraloom.statistics.texts import read_texts
from loraloom.tasks.prompts import as_prompts

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
    counted = f"{len(files)} files of texts for {len(members)} adapters: give one for each, in order"
    raise_problems("--unlabelled", [counted] if len(files) != len(members) else [], "nothing was merged or written")
    rows, errors = {}, list[LoraloomError]()
    for name, file in zip(members, files, strict=True):
        with collecting(errors):
            rows[name] = read_texts(file, columns, texts, FEWEST)
    raise_together(errors)
    folder = base_folder(base or next(iter(members.values())).base)
    model: Evaluator | Generator
    if any(member.head for member in members.values()):
        model = Evaluator(folder)
    else:
        model = Generator(folder)
        if getattr(model.tokenizer, "chat_template", None):
            rows = {name: as_prompts(one) for name, one in rows.items()}
    found = agreement(
        members, model, rows, candidates, options=options, plan=plan, answer_tokens=_WRITTEN, reporter=reporter
    )
    return chosen(options, found)
