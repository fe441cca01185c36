"""Statistics of the texts in a file, of a task's rows, and of generic English: the atlas."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence

from loraloom.errors import LoraloomError, did_you_mean, raise_problems
from loraloom.model.generator import Generator
from loraloom.model.load import base_folder
from loraloom.model.processes import rank_and_size
from loraloom.model.runner import Evaluator
from loraloom.model.tokens import Batch, batches, encode
from loraloom.progress import Reporter
from loraloom.settings import StatisticsSettings, Tokens
from loraloom.statistics.collect import collect_statistics
from loraloom.statistics.file import Statistics
from loraloom.statistics.privacy import Noise, add_noise, noise_scale
from loraloom.tasks.builtin_text import generic_texts
from loraloom.tasks.prompts import read_prompts
from loraloom.tasks.sources import read_table, too_few


def collect(
    model: Evaluator | Generator,
    rows: Dataset,
    targets: list[str] | str,
    reading: StatisticsSettings,
    *,
    directions: int | None = None,
    clip: float | None = None,
    progress: Callable[[int], None] | None = None,
) -> Statistics:
    """Return the statistics of all texts in `rows`, as the base model reads them.

    model: holds the base model and its tokenizer.
    rows: columns text_a, and text_b for pairs; or, for a base that writes, what stands before a prompt as `history`.
    reading: what a row is, the length of a text, the size of a batch, and of a base that writes which tokens count.
      Those of a prompt are as they are without an answer; of an answer, those that are read, its end token too. An
      encoder reads the prompt, its decoder the start token and the answer, so "answer" alone is refused.
    targets, directions, clip, progress: as for `collect_statistics`, which raises what is raised here.
    """
    if isinstance(model, Generator):
        fed = _written(model, rows, reading)
    else:
        encoded = encode(rows, model.tokenizer, reading.max_length)
        fed = (batch for _, batch in batches(encoded, model.tokenizer, reading.batch_size))
    return collect_statistics(
        model.model, fed, targets, kind=reading.kind, directions=directions, clip=clip, progress=progress
    )


def _written(model: Generator, rows: Dataset, reading: StatisticsSettings) -> Iterator[Batch]:
    """Yield batches of prompts and, but for "prompt", their answers."""
    if model.two_sided and reading.tokens == "answer":
        raise LoraloomError(
            f"{model.base}: its encoder reads no answers, so that they alone have no statistics", "count both"
        )
    unread = ["label"] if reading.tokens == "prompt" else []
    asked = model.encode(rows.select_columns([n for n in rows.column_names if n not in unread]), reading.max_length)
    whole = [one.prompt if model.two_sided else one.prompt + one.answer for one in asked]
    encoded = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in whole]
    for chosen, batch in batches(encoded, model.tokenizer, reading.batch_size):
        if model.two_sided:
            start = model.model.config.decoder_start_token_id
            read = [torch.tensor([start, *asked[row].answer[:-1]]) for row in chosen]
            batch["decoder_input_ids"] = pad_sequence(
                read, batch_first=True, padding_value=model.tokenizer.pad_token_id
            )
            ones = [torch.ones_like(ids) for ids in read]
            batch["decoder_attention_mask"] = pad_sequence(ones, batch_first=True)
        elif reading.tokens == "answer":
            place = batch["attention_mask"].cumsum(dim=1) - 1
            prompt = torch.tensor([len(asked[row].prompt) for row in chosen])
            batch["counted"] = place >= prompt[:, None]  # of padding, the attention mask says that it never counts
        yield batch


def generic_rows(count: int) -> Dataset:
    """Return `count` rows of generic text, which depends on the version of Python."""
    return Dataset.from_dict({"text_a": generic_texts(count)})


def collect_from_file(
    texts: str,
    columns: Sequence[str],
    base: str,
    targets: Sequence[str],
    reading: StatisticsSettings,
    *,
    directions: int | None = None,
    noise: Noise | None = None,
    reporter: Reporter | None = None,
) -> Statistics:
    """Return the statistics of the first `reading.texts` texts of a file; labels are not read.

    texts: JSONL, CSV, TSV or Parquet, or org/name on the hub.
    columns: of a text, or of a pair of texts. None: rows of prompts, with the base's chat template; see `read_prompts`.
    base: hub name or folder of the base model.
    targets: path endings of the layers to watch, or "all-linear" alone.
    reading: how many texts, of what length, what a row is, and which tokens of prompts and answers count; see
      `collect`. Only for "prompt" no answers are read.
    directions: the most that are kept of an input; None keeps them all.
    noise: that `shared_alone` adds later: rows are clipped for it, and the bound on directions is left to come after.
    reporter: is told how far the work is.

    Each process of a group reads its part of the texts, and all return the statistics of all. Raises LoraloomError for
    a file or column that is not there, fewer texts than asked for, and what `collect_statistics` raises.
    """
    rows = read_texts(texts, columns, reading.texts) if columns else _prompts(texts, reading.texts, reading.tokens)
    written = not columns
    if noise:
        return _collected(base, rows, targets, reading, None, reporter, noise.clip, written=written)
    return _collected(base, rows, targets, reading, directions, reporter, written=written)


def _prompts(texts: str, count: int, tokens: Tokens) -> Dataset:
    return read_prompts(texts, count, answers=tokens != "prompt")


def read_texts(texts: str, columns: Sequence[str], count: int, fewest: int | None = None) -> Dataset:
    """Return the first `count` rows of a file as text_a, and text_b for a pair; labels are not read.

    texts: JSONL, CSV, TSV or Parquet, or org/name on the hub.
    columns: of a text, or of a pair of texts.
    fewest: rows that are enough, where there are no more; `count` without.

    Raises LoraloomError for a file or column that is not there, and for rows without a text.
    """
    try:
        table = read_table(texts, "train", columns)
    except ValueError as error:
        raise LoraloomError(f"{texts}: {error}", "name a JSONL, CSV, TSV or Parquet file, or org/name") from error
    problems = [] if len(columns) <= 2 else [f"{len(columns)} columns were named, a text or a pair is read"]
    problems += [
        f"no column {column!r}: {did_you_mean(column, table.columns)}; name it by --column"
        for column in columns
        if table.rows and column not in table.columns
    ]
    if not table.rows:
        problems.append("it holds no rows")
    elif fewest is None:
        problems += too_few(len(table.rows), count)
    elif len(table.rows) < fewest:
        problems.append(f"it holds {len(table.rows)} texts, {fewest} are the fewest")
    if not problems:
        faulty = [
            str(number)
            for number, row in enumerate(table.rows[:count], start=1)
            if not all(isinstance(row.get(column), str) and row[column].strip() for column in columns)
        ]
        problems += [f"no text in row {', '.join(faulty[:5])}"] if faulty else []
    raise_problems(texts, problems)
    names = ("text_a", "text_b")[: len(columns)]
    return Dataset.from_list(
        [{name: row[column] for name, column in zip(names, columns, strict=True)} for row in table.rows[:count]]
    )


def wanted_noise(epsilon: float | None, delta: float, clip: float | None, kind: str) -> Noise | None:
    """Return the noise that was asked for. Raises LoraloomError for options that do not go together or fit."""
    if epsilon is None:
        raise_problems("--clip", [] if clip is None else ["it is for --noise, which is not given"])
        return None
    problems = [] if kind == "sample" else ["it needs --kind sample: a text's tokens are too many rows to hide"]
    if clip is None:
        raise_problems("--noise", [*problems, "it needs --clip"], "docs/sharing.md tells how to choose it")
        return None
    raise_problems("--noise", problems)
    noise_scale(epsilon, delta, 1.0)  # for its checks, before anything is collected
    return Noise(epsilon, delta, clip)


def shared_alone(found: Statistics, rows: int | None, directions: int | None, noise: Noise | None) -> Statistics:
    """Return what may be handed on: with noise, of so many directions and rows at most; None for no such limit."""
    if noise:
        found = add_noise(found, *noise)
        found = found.limit_directions(directions) if directions else found
    return found if rows is None else found.limit_rows(rows)


def make_atlas(
    base: str,
    targets: Sequence[str],
    reading: StatisticsSettings,
    *,
    texts: str | None = None,
    columns: Sequence[str] = (),
    tokens: Tokens | None = None,
    directions: int | None = None,
    reporter: Reporter | None = None,
) -> Statistics:
    """Return the statistics of `reading.atlas_texts` generic texts, a row a token.

    texts: a file or hub data set of them; None takes the English that every installation has.
    columns: of a text in that file; `text` where none is named.
    tokens: the file holds prompts, with no column named; which count, whatever `reading` says. See `collect`.
    base, targets, directions, reporter: as for `collect_from_file`, which raises what is raised here.
    """
    raise_problems("atlas", ["--column names a column of no file"] if columns and not texts else [], "give a file too")
    count = reading.atlas_texts
    check_tokens(texts, columns, tokens)
    if texts and tokens:
        rows = _prompts(texts, count, tokens)
    else:
        rows = read_texts(texts, columns or ["text"], count) if texts else generic_rows(count)
    reading = reading.model_copy(update={"kind": "token", "tokens": tokens or "prompt"})
    return _collected(base, rows, targets, reading, directions, reporter, written=bool(tokens))


def check_tokens(texts: str | None, columns: Sequence[str], tokens: Tokens | None) -> None:
    """Raise LoraloomError where `tokens` are named that no rows of prompts have."""
    without = [] if tokens is None or (texts and not columns) else ["it is for a file of prompts, without --column"]
    raise_problems("--tokens", without)


def _targets(targets: Sequence[str]) -> list[str] | str:
    """Return targets as PEFT takes them, for whom "all-linear" is no list."""
    if "all-linear" not in targets:
        return list(targets)
    raise_problems("all-linear", ["it stands alone"] if len(targets) > 1 else [], "leave the other targets out")
    return "all-linear"


def _collected(
    base: str,
    rows: Dataset,
    targets: Sequence[str],
    reading: StatisticsSettings,
    directions: int | None,
    reporter: Reporter | None,
    clip: float | None = None,
    *,
    written: bool,
) -> Statistics:
    """Return the statistics of the texts in `rows`, of which every process reads each size-th one."""
    shown = reporter or Reporter(quiet=True)
    process, size = rank_and_size()
    part = rows.select(range(process, len(rows), size))
    shown.begin("loading the base model", 1)
    model = Generator(base_folder(base)) if written else Evaluator(base_folder(base))
    shown.advance("loading the base model")
    shown.begin("texts", len(part))

    def reach(texts: int) -> None:
        shown.reach("texts", texts)

    return collect(
        model,
        part,
        _targets(targets),
        reading,
        directions=directions,
        clip=clip,
        progress=reach,
    )
