"""`--rule auto` and `--scale auto`: what was typed, and what is tried then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraloom.errors import LoraloomError, raise_problems
from loraloom.merging import get_rule, rule_names

if TYPE_CHECKING:
    from loraloom.analysis.agreement import Candidates

AUTO = "auto"


def given_scale(text: str | None) -> float | None:
    """Return the scale that was typed: None without one, and for `auto`. Raises LoraloomError for any other word."""
    if text in (None, AUTO):
        return None
    try:
        return float(str(text))
    except ValueError as error:
        raise LoraloomError(f"--scale {text!r}: neither a number nor `auto`", "write it as --scale 0.5") from error


def to_try(
    rule: str, scale: str | None, options: Mapping[str, Any], recipe: Path | None, unlabelled: Sequence[str] | None
) -> tuple[Candidates, ...]:
    """Return the candidates where rule or scale are `auto`, and none where both are settled.

    Raises LoraloomError where there are no texts to choose by, for options of a rule that is not named, and for
    options that the rule does not take.
    """
    if AUTO not in (rule, scale):
        read = rule in rule_names() and get_rule(rule).distils
        unread = ["is read by --rule auto, --scale auto and --rule distil alone"] if unlabelled and not read else []
        raise_problems("--unlabelled", unread)
        return ()
    texts = "it needs texts of each adapter's task: name a recipe by --recipe, or a file for each by --unlabelled"
    problems = [] if recipe or unlabelled else [texts]
    if rule == AUTO:
        problems += [f"{', '.join(options)}: options of a rule, which --rule auto leaves open"] if options else []
    else:
        problems += get_rule(rule).check(options)[1]
    raise_problems("cannot choose by agreement", problems, "nothing was merged or written")
    from loraloom.analysis.agreement import candidates_of

    return candidates_of(None if rule == AUTO else rule, options, given_scale(scale))
