"""The names of base models: one base has many, and none of them may lead into somebody's home."""

from __future__ import annotations

import re
from collections.abc import Iterable

PACKAGED = ("demo", "smollm2")  # bases that come as Python packages, by the name they are asked for: model/packaged.py

_SNAPSHOT = re.compile(r"(?:^|/)models--(?P<org>[^/]+?)--(?P<name>[^/]+)(?:/snapshots/[^/]+)?/?$")
_HUB = re.compile(r"(?:(?P<org>[A-Za-z0-9][\w.-]*)/)?(?P<name>[A-Za-z0-9][\w.-]*)")
_ABSOLUTE = re.compile(r"/|~|[A-Za-z]:/")
# copies of a model in few bits, which an adapter of the whole model fits: Unsloth names them in the config
_QUANTISED = re.compile(r"(-unsloth)?(-bnb)?-(4|8)bit$|-(awq|gptq)(-int\d)?$", re.IGNORECASE)
_MIRRORS = ("unsloth",)  # organisations that publish others' models under their names
_PLACES = ("models", "model", "checkpoints", "weights", "pretrained", "base_models", "hf", "ckpts")  # folders' names


def hub_name(name: str) -> str:
    """Return `name` with plain slashes and no slash at its end; of a snapshot in the hub's cache, the model's name."""
    plain = name.strip().replace("\\", "/").rstrip("/")
    snapshot = _SNAPSHOT.search(plain)
    return f"{snapshot['org']}/{snapshot['name']}" if snapshot else plain


def same_base(one: str, two: str) -> bool | None:
    """Tell whether two names mean one base model; None where they cannot tell, as a folder may hold any.

    A slash at the end, case, Windows' slashes, the hub's cache, a copy in 4 bits and a folder that is called as the
    model make no difference.
    """
    names = [hub_name(one), hub_name(two)]
    if not all(names):
        return None
    last = [_QUANTISED.sub("", name.rpartition("/")[2]).casefold() for name in names]
    if last[0] != last[1]:
        return None if any(map(_is_folder, names)) else False
    orgs = {name.rpartition("/")[0].casefold() for name in names if not _is_folder(name)} - {*_MIRRORS, ""}
    return len(orgs) < 2


def best_name(names: Iterable[str]) -> str:
    """Return the name to publish of those that mean one base, in any order: a name on the Hub before a folder's.

    Of a folder that is not relative the last part is left: the rest tells of somebody's disk. PEFT loads an adapter
    onto a base model that it is given, whatever name is here.
    """

    def rank(name: str) -> tuple[bool, bool, bool, int, str]:
        org, _, last = name.rpartition("/")
        quantised = _QUANTISED.search(last) is not None
        return _is_folder(name), quantised, org.casefold() in _MIRRORS, len(name), name

    found = sorted({hub_name(name) for name in names} - {""}, key=rank)
    return public_name(found[0]) if found else ""


def public_name(name: str) -> str:
    """Return `name` where it is one on the Hub or a relative folder, else the last part of it."""
    plain = hub_name(name)
    return plain.rpartition("/")[2] if _ABSOLUTE.match(plain) else plain


def _is_folder(name: str) -> bool:
    """Tell whether a name as `hub_name` gives it is a folder's: it is no `org/model`, or says so."""
    match = _HUB.fullmatch(name)
    return match is None or name.startswith(".") or (match["org"] or "").casefold() in _PLACES
