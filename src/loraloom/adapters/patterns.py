"""PEFT's patterns over module paths, matched as PEFT does but never for longer than a moment.

A pattern out of a stranger's file can take for ever (`(.*)*x`) or all memory. What may repeat or choose is therefore
matched by Python's own `re` in a process of its own with limits: the same answers as in PEFT, and a pattern that
passes will not hang there later.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loraloom.errors import LoraloomError

_SECONDS = 1  # of the processor, for all patterns of a call; honest ones take milliseconds
_PATIENCE = 60  # seconds on the clock, for machines that are busy or count no processor time
_LONGEST = 2000  # characters of a pattern
_HINT = "write it with fewer repeats, or name the modules"
# without these a pattern takes time that grows with its length alone
_BRANCHING = re.compile(r"[*+?{(|]")
_CHILD = """
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
except (ImportError, ValueError, OSError):
    pass
patterns, names, whole = json.load(sys.stdin)
for pattern in patterns:
    try:
        found = re.compile(pattern)
        told = [(found.fullmatch if whole else found.match)(name) is not None for name in names]
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        told = str(error) or type(error).__name__
    print(json.dumps(told), flush=True)
"""


def targeted(modules: Iterable[str], targets: str | Iterable[str]) -> list[str]:
    """Return those of `modules` that PEFT would adapt: a regular expression over whole paths, or path endings.

    Raises LoraloomError for an expression that is none or cannot be matched in time.
    """
    if isinstance(targets, str):
        modules = list(modules)
        (found,) = _matches(((targets, targets),), tuple(modules), "target_modules", whole=True)
        return [module for module, fits in zip(modules, found, strict=True) if fits]
    endings = tuple(f".{target}" for target in targets)
    return [module for module in modules if f".{module}".endswith(endings)]


def pattern_values(
    patterns: Mapping[str, Any], modules: Sequence[str], default: Any, what: str = "rank_pattern"
) -> dict[str, Any]:
    """Return, for each of `modules`, the value of the first key of a rank_pattern or alpha_pattern that matches it.

    A key matches the end of a path, from a dot on, as in PEFT. Raises LoraloomError, which names `what`, for a key
    that is no regular expression or cannot be matched in time.
    """
    pairs = tuple((key, rf"(.*\.)?({key})$") for key in patterns)
    found = _matches(pairs, tuple(modules), what)
    values = dict.fromkeys(modules, default)
    for key, fits in reversed(list(zip(patterns, found, strict=True))):
        values.update({module: patterns[key] for module, fit in zip(modules, fits, strict=True) if fit})
    return values


def check_patterns(config: Mapping[str, Any], modules: Sequence[str]) -> None:
    """Raise LoraloomError for a pattern by which PEFT finds layers, and that it could not match to `modules` in time.

    `config` is adapter_config.json. Ranks and alphas are not among them: `pattern_values` matches those.
    """
    for field in ("target_modules", "exclude_modules"):
        value = config.get(field)
        if isinstance(value, str) and value:
            _matches(((value, value),), tuple(modules), field, whole=True)
    for field, form in (
        ("modules_to_save", r"(^|.*\.){}($|\..*)"),
        ("layers_pattern", r"(?:^|.*?\.){}\.(?P<idx>\d+)\."),
    ):
        value = config.get(field)
        names = [value] if isinstance(value, str) else value or []
        _matches(tuple((name, form.replace("{}", name)) for name in names), tuple(modules), field)


@functools.lru_cache(maxsize=64)
def _matches(
    patterns: tuple[tuple[str, str], ...], names: tuple[str, ...], what: str, whole: bool = False
) -> list[list[bool]]:
    """Return for each pattern (as written, as matched) whether it matches each of `names`: from its start, or whole."""
    found: dict[str, list[bool]] = {}
    for key, pattern in patterns:
        if len(key) > _LONGEST:
            raise LoraloomError(f"{what}: {key[:60]!r}...: a pattern of {len(key)} characters", _HINT)
        if not _BRANCHING.search(key):
            try:
                one = re.compile(pattern)
            except re.error as error:
                raise _no_pattern(what, key, str(error)) from error
            match = one.fullmatch if whole else one.match
            found[key] = [match(name) is not None for name in names]
    rest = {key: pattern for key, pattern in patterns if key not in found}
    if rest:
        found.update(zip(rest, _in_child(rest, names, what, whole), strict=True))
    return [found[key] for key, _ in patterns]


def _in_child(patterns: Mapping[str, str], names: Sequence[str], what: str, whole: bool) -> list[list[bool]]:
    code = _CHILD.replace("SECONDS", str(_SECONDS))
    given = json.dumps([list(patterns.values()), list(names), whole])
    # -I -S: nothing of the environment, and started in 30 ms
    command = [sys.executable, "-I", "-S", "-c", code]
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=_PATIENCE)
        lines = done.stdout.splitlines()
    except subprocess.TimeoutExpired as error:
        lines = (error.stdout or b"").decode().splitlines()
    told = [json.loads(line) for line in lines]
    for key, one in zip(patterns, told, strict=False):
        if isinstance(one, str):
            raise _no_pattern(what, key, one)
    if len(told) < len(patterns):
        slow = list(patterns)[len(told)]
        raise LoraloomError(f"{what}: {slow!r} cannot be matched in {_SECONDS} s", _HINT)
    return told


def _no_pattern(what: str, key: str, reason: str) -> LoraloomError:
    return LoraloomError(f"{what}: {key!r} is no regular expression ({reason})", "write it as in PEFT")
