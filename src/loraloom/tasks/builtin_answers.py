"""Three short tasks of writing without a download: name a function, fill in a booking, write a date in digits.

No prompt stands in two splits, nor does what it is made of: source files and names of functions, cities, dates.
Bookings and dates are worded in `test` as in no other split, so what is tested is the task and not its templates.
"""

from __future__ import annotations

import datetime
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from loraloom.tasks.answers import AnswerMetric
from loraloom.tasks.builtin_text import docstrings, first_sentence, parts, place, split_of

Row = tuple[str, str]  # prompt and answer
T = TypeVar("T")
ANSWER_TOKENS = 16  # that the longest answer has, its end token included


@dataclass(frozen=True)
class AnswerPlan:
    """What makes a task: metrics, a sentence for the report, and (split, seed) -> all its rows, in drawn order."""

    metrics: tuple[AnswerMetric, ...]
    description: str
    rows: Callable[[str, int], Iterator[Row]]


_MOST_WORDS = 20  # of a sentence, so that a prompt has at most 64 tokens


def _name_rows(split: str, seed: int) -> Iterator[Row]:
    """Ask for the name of a function of two words or more that stand, perhaps inflected, in its own summary."""
    found: dict[str, tuple[str, str]] = {}
    for docstring in docstrings():
        summary = next(iter(parts(docstring.text)), None)
        sentence = first_sentence(summary.text) if summary and summary.role == "summary" else ""
        if len(sentence.split()) <= _MOST_WORDS and _named_in(docstring.name, sentence):
            found.setdefault(docstring.name, (docstring.file, sentence))
    sentences: set[str] = set()
    for name in sorted(found, key=lambda name: place(f"{seed}/{name}")):
        file, sentence = found[name]
        if sentence not in sentences:
            sentences.add(sentence)
            if split_of(file) == split:
                yield f"Name a Python function for this: {sentence}", name


def _named_in(name: str, sentence: str) -> bool:
    words = name.split("_")
    heard = re.findall(r"[a-z]+", sentence.lower())
    return (
        2 <= len(words) <= 5
        and len(name) <= 30
        and re.fullmatch(r"[a-z]+(_[a-z]+)+", name) is not None
        and name not in sentence
        and all(any(other.startswith(word) and len(other) <= len(word) + 3 for other in heard) for word in words)
    )


def _words(text: str) -> list[str]:
    return text.split()


# Bookings.

_CITIES = _words(
    "Amsterdam Athens Barcelona Bath Belfast Bergen Berlin Boston Bristol Brussels Budapest Cairo Cambridge "
    "Cardiff Chicago Dallas Delhi Denver Dublin Edinburgh Florence Geneva Genoa Glasgow Hamburg Hanoi Havana "
    "Helsinki Houston Jakarta Kyoto Leeds Lima Lisbon London Lyon Madrid Manila Melbourne Miami Milan Montreal "
    "Moscow Munich Nairobi Naples Nice Oslo Oxford Paris Perth Porto Prague Riga Rome Seattle Seoul Seville "
    "Shanghai Stockholm Sydney Tallinn Tokyo Toronto Turin Valencia Venice Vienna Warsaw York Zurich"
)
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_PEOPLE = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
_BOOKINGS = (
    "I would like a table for {people} in {city} on {day}.",
    "Please book a hotel in {city} for {people} people from {day} on.",
    "On {day} there will be {people} of us in {city}, and we need a table.",
    "We are {people} and come to {city} on {day}.",
    "{people} seats on the train to {city} this {day}, please.",
    "Can we have a room in {city} on {day}? There are {people} of us.",
    "This {day} I travel to {city} with a party of {people}.",
    "A boat trip in {city} for {people}, if possible on {day}.",
)
_TEST_BOOKINGS = (
    "Do you have anything free in {city} next {day}? We would be {people}.",
    "Our group of {people} arrives in {city} on {day} evening.",
    "{city}, {day}, dinner for {people}.",
    "Could you reserve {people} tickets for the museum in {city}? {day} would suit us.",
)


def _slot_rows(split: str, seed: int) -> Iterator[Row]:
    """Ask for the city, the day and the number of people of a booking as JSON; each split has cities of its own."""
    cities = [city for city in _CITIES if split_of(city) == split]
    templates = _TEST_BOOKINGS if split == "test" else _BOOKINGS
    for slots in _mixed(itertools.product(cities, _DAYS, range(len(_PEOPLE)), templates), seed):
        city, day, at, template = slots
        asked = template.format(city=city, day=day, people=_PEOPLE[at])
        answer = json.dumps({"city": city, "day": day, "people": at + 2}, separators=(",", ":"))
        yield f"Give city, day and people as JSON: {asked[0].upper()}{asked[1:]}", answer


# Dates.

_MONTHS = _words(
    "January February March April May June July August September October November December"
)  # strftime would write them in the language of the machine
_UNITS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
_TENS = _words("_ _ twenty thirty forty fifty sixty seventy eighty ninety")
_ORDINALS = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth"}
_DATES = (
    "the {nth} of {month}, {year}",
    "{month} the {nth}, {year}",
    "{nth} {month} {year}",
    "on the {nth} of {month} in the year {year}",
)
_TEST_DATES = (
    "in {year}, on {month} {nth}",
    "{year}, the {nth} day of {month}",
    "{month} {nth} of {year}",
)
_FIRST, _LAST = datetime.date(1940, 1, 1), datetime.date(2039, 12, 31)


def _date_rows(split: str, seed: int) -> Iterator[Row]:
    """Ask for a date of a hundred years in digits, each day once."""
    templates = _TEST_DATES if split == "test" else _DATES
    days = (_FIRST + datetime.timedelta(at) for at in range((_LAST - _FIRST).days + 1))
    for day in _mixed((day for day in days if split_of(day.isoformat()) == split), seed):
        template = templates[int(place(f"{seed}/template/{day}") * len(templates))]
        words = template.format(nth=_ordinal(day.day), month=_MONTHS[day.month - 1], year=_year(day.year))
        yield f"Write this date as YYYY-MM-DD: {words}", day.isoformat()


def _cardinal(number: int) -> str:
    """Return a number below 100 in words."""
    tens, unit = divmod(number, 10)
    if number < len(_UNITS):
        return _UNITS[number]
    return _TENS[tens] + (f"-{_UNITS[unit]}" if unit else "")


def _ordinal(number: int) -> str:
    head, dash, last = _cardinal(number).rpartition("-")
    regular = f"{last[:-1]}ieth" if last.endswith("y") else "twelfth" if last == "twelve" else f"{last}th"
    return head + dash + _ORDINALS.get(last, regular)


def _year(year: int) -> str:
    """Return a year as it is spoken: nineteen ninety-five, two thousand and seven, twenty thirty-one."""
    century, rest = divmod(year, 100)
    if 2000 <= year < 2010:
        return "two thousand" + (f" and {_cardinal(rest)}" if rest else "")
    return f"{_cardinal(century)} {'hundred' if not rest else _cardinal(rest) if rest > 9 else 'oh ' + _cardinal(rest)}"


def _mixed(values: Iterable[T], seed: int) -> list[T]:
    """Return values in an order drawn by the seed."""
    return sorted(values, key=lambda value: place(f"{seed}/{value}"))


ANSWER_PLANS = {
    "name": AnswerPlan(
        ("exact_match", "token_f1"),
        "How would its author name this function? Summaries of functions of Python's library and of loraloom's "
        "dependencies whose names are made of words of the summary.",
        _name_rows,
    ),
    "slots": AnswerPlan(
        ("exact_match", "json_f1", "parse_rate"),
        "Which city, day and number of people does this booking name? Made from templates, those of the test rows "
        "other ones than those of the training rows; the answer is JSON.",
        _slot_rows,
    ),
    "date": AnswerPlan(
        ("exact_match",),
        "Which date is this, in digits? Dates in words from templates, those of the test rows other ones than those "
        "of the training rows.",
        _date_rows,
    ),
}


def answer_rows(name: str, split: str, count: int, *, seed: int = 0) -> list[dict[str, str]]:
    """Return the first `count` rows of a split, or all there are: `text_a` is the prompt, `label` the answer."""
    rows = itertools.islice(ANSWER_PLANS[name].rows(split, seed), count)
    return [{"text_a": prompt, "label": answer} for prompt, answer in rows]
