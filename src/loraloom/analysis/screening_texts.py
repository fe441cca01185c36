"""Detectors that run the base model with adapters in it, on texts without labels, and one that reads labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor

from loraloom.adapters.update import Adapter
from loraloom.analysis.detectors import Sighting, detector
from loraloom.analysis.interference import response
from loraloom.analysis.screening_measures import Seen
from loraloom.analysis.screening_weights import SPREAD_ENERGY, against_others, logs_of, sightings
from loraloom.analysis.searchlight import Answer, Reader, search
from loraloom.merging import merge
from loraloom.model.generator import Generator
from loraloom.settings import StatisticsSettings
from loraloom.statistics.texts import collect, generic_rows

_GENERIC = 100  # texts of generic English
_SPREAD_FLIPS = 0.1  # share of answers by which honest adapters change others' more or less


@dataclass(frozen=True)
class ScreenTexts:
    """A base model, and a few texts of each adapter's task.

    rows: by adapter's name, rows with text_a, and text_b for pairs, or history for prompts. Where they have a `label`
    too, what each adapter claims to do is measured by it. words: that may be triggers, to be tried beside others.
    """

    reader: Reader
    rows: Mapping[str, Dataset]
    words: tuple[str, ...] = ()


@detector(
    "response",
    says="it changes what its layers write of generic text by {value} of what they read, the others by {compared}",
    look=3.0,
    refuse=8.0,
    paper="|B A h| on generic text; after LoBAM (arXiv 2411.16746)",
)
def response_to_generic(seen: Seen, *, texts: ScreenTexts) -> dict[str, Sighting]:
    """Mean over layers of |dW h|^2 over |h|^2 on generic English, by the base's own h: louder ones are suspicious."""
    reading = StatisticsSettings(tokens="prompt", max_length=texts.reader.model.max_length)
    found = collect(texts.reader.model, generic_rows(_GENERIC), list(seen.layers), reading)
    shares = torch.full((len(seen.adapters), len(seen.layers)), torch.nan, dtype=torch.float64)
    for column, at in enumerate(seen.layers):
        moment = found.moment(at)
        for i, one in enumerate(seen.adapters.values()):
            if at in one.shapes:
                shares[i, column] = response(one.updates[at], moment)[1] ** 2 * moment.count / moment.trace()
    own = shares.nanmean(dim=1)
    scores, middles = against_others(logs_of(own), SPREAD_ENERGY)
    return sightings(seen, scores, own, middles.exp())


@detector(
    "left out",
    says="a merge with it answers {value} of the other tasks' texts otherwise than one without it, with any other "
    "adapter {compared}",
    look=3.0,
    paper="leave-one-out merges",
)
def left_out(seen: Seen, *, texts: ScreenTexts) -> dict[str, Sighting]:
    """Share of the other tasks' answers that a merge by TSV changes when this adapter is left out, against the others'.

    It takes three adapters, with texts. A backdoor whose trigger is in no text changes nothing here.
    """
    members = _answering(seen, texts)
    if len(members) < 3:
        return {}
    whole = _merged_answers(members, texts)
    changed = torch.full((len(seen.adapters),), torch.nan, dtype=torch.float64)
    for name in members:
        without = _merged_answers({other: one for other, one in members.items() if other != name}, texts)
        flips = [
            before != after for other in without for before, after in zip(whole[other], without[other], strict=True)
        ]
        changed[seen.names.index(name)] = sum(flips) / len(flips)
    scores, middles = against_others(changed, _SPREAD_FLIPS)
    return sightings(seen, scores, changed, middles)


@detector(
    "search light",
    says="{where} among the words of a text turns {value} of the answers to one; a common word turns {compared}",
    look=0.7,
    paper="rare tokens as triggers (RIPPLe, arXiv 2004.06660), put into clean texts",
)
def search_light(seen: Seen, *, texts: ScreenTexts) -> dict[str, Sighting]:
    """The share of answers that a rare word or short phrase turns to one; see `search`.

    A trigger is found that is tried, or that works for words like it. A style is not, nor what takes two words.
    """
    found = {}
    for name, one in _answering(seen, texts).items():
        turned = search(texts.reader, one, texts.rows[name], texts.words)
        if turned:
            where = f"{turned.word!r} ({turned.answer!r})"
            found[name] = Sighting(turned.share, turned.share, turned.common, where)
    return found


@detector(
    "own task",
    says="on its own task's rows it comes to {value}, what knows nothing of the task to {compared}: it does not do "
    "what it claims",
    look=1.0,
    paper="the folder's own word: its task",
)
def own_task(seen: Seen, *, texts: ScreenTexts) -> dict[str, Sighting]:
    """Two standard errors over what an adapter gains on its own task's rows, which takes labels.

    Of classes the gain is the share of right answers less that of the most frequent label; of answers that are written
    the mean log-probability of the right one less the base model's.
    """
    found = {}
    for name, one in _answering(seen, texts).items():
        rows = texts.rows[name]
        if "label" in rows.column_names and len(rows) > 1:
            own, blind = _by_row(texts.reader, one, rows)
            gain = own - blind
            error = float(gain.std()) / len(rows) ** 0.5
            certain = float(gain.mean()) / error if error else float("inf") if gain.mean() > 0 else 0.0
            found[name] = Sighting(2 / max(certain, 0.02), float(own.mean()), float(blind.mean()))
    return found


def _by_row(reader: Reader, adapter: Adapter, rows: Dataset) -> tuple[Tensor, Tensor]:
    """Return (k,) float64 each: how well an adapter does on every row, and what knows nothing of the task."""
    if isinstance(reader.model, Generator):
        encoded = reader.model.encode(rows)
        own, base = (-reader.model.losses(updates, encoded)[:, 0] for updates in (adapter.updates, {}))
        return own, base
    labels = list(rows["label"])
    usual = Counter(labels).most_common(1)[0][0]
    right = [answer == label for answer, label in zip(reader.answers(adapter, rows), labels, strict=True)]
    return torch.tensor(right).double(), torch.tensor([label == usual for label in labels]).double()


def _answering(seen: Seen, texts: ScreenTexts) -> dict[str, Adapter]:
    """Return the members that have texts, and answers that two of them can share."""
    having = {name: seen.adapters[name] for name in seen.members if name in texts.rows}
    return {name: one for name, one in having.items() if texts.reader.shares_answers(one)}


def _merged_answers(members: Mapping[str, Adapter], texts: ScreenTexts) -> dict[str, list[Answer]]:
    updates = merge(members).adapter.updates
    return {name: texts.reader.answers(one, texts.rows[name], updates) for name, one in members.items()}
