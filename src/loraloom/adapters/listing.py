"""The adapters below a folder, grouped by what can be merged: base model, layers and their shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loraloom.adapters.bases import public_name
from loraloom.adapters.config import CONFIG
from loraloom.adapters.dialects import dialect_of
from loraloom.adapters.layout import alphas_of
from loraloom.adapters.peft import read_adapter
from loraloom.adapters.together import one_base
from loraloom.adapters.update import Adapter
from loraloom.errors import LoraloomError, raise_problems
from loraloom.files.hashing import json_text, seen_sha256
from loraloom.files.reading import read_json_object
from loraloom.files.tensors import StoredFile
from loraloom.progress import Reporter

_Layers = dict[str, tuple[int, int]]  # (m, n) by module path

VERDICTS_MARK = b'"kind": "screening"'  # by which the file is known
VERDICTS = "screening.json"  # in the folder that is listed: what `screen --record` wrote


@dataclass(frozen=True)
class Listed:
    """One adapter of a list.

    name: its folder or file, from the listed folder on. rank, alpha: the least and the largest of any layer.
    energy: |dW|_F^2 of all layers, alpha/r folded in.
    verdict: of the last screening that saw these very files; None where none did.
    """

    name: str
    rank: tuple[int, int]
    alpha: tuple[float, float]
    energy: float
    verdict: str | None


@dataclass
class Group:
    """Adapters of one base that have the same layers.

    base: its name as the adapters give it, without the path to somebody's disk. targets: last names of the layers.
    shapes: how many layers there are of each (m, n).
    """

    base: str
    targets: list[str]
    shapes: dict[tuple[int, int], int]
    adapters: list[Listed] = field(default_factory=list)


@dataclass(frozen=True)
class Listing:
    """The groups, those of one base side by side, the largest first; and why the folders by name cannot be read."""

    groups: list[Group]
    unread: dict[str, str]


def list_adapters(folder: Path, *, reporter: Reporter | None = None) -> Listing:
    """List the adapters below `folder`, at any depth; VERDICTS in it tells which were screened.

    They are folders with a config, and safetensors files outside of these that hold a LoRA, as image tools write them.
    Every file is read once, and no more than a layer is in memory.

    Raises LoraloomError where there is none, or where the record of a screening cannot be read.
    """
    paths = _places(folder)
    raise_problems(str(folder), [] if paths else ["no adapter is below it"], "name a folder of adapters")
    verdicts = read_verdicts(folder / VERDICTS) if (folder / VERDICTS).is_file() else {}
    found: list[tuple[Adapter, _Layers, Group]] = []
    unread = {}
    for path in (reporter or Reporter(quiet=True)).each("adapters", paths):
        name = path.relative_to(folder).as_posix()
        try:
            one = read_adapter(path)
            listed = _listed(name, one, verdicts)
        except LoraloomError as error:
            unread[name] = error.message
            continue
        layers = _layers(one)
        group = next((group for other, same, group in found if same == layers and _one_base(other, one)), None)
        if group is None:
            group = _group(one)
            found.append((one, layers, group))
        group.adapters.append(listed)
    groups = sorted(
        (group for _, _, group in found), key=lambda group: (group.base, -len(group.adapters), group.targets)
    )
    return Listing(groups, unread)


def verdicts_text(verdicts: Iterable[tuple[str, str, str]]) -> str:
    """Return the record of a screening of adapters, each by name, `adapter_sha256` and verdict."""
    told = [{"name": name, "sha256": sha, "verdict": word} for name, sha, word in verdicts]
    return json_text({"kind": "screening", "adapters": told})


def read_verdicts(path: Path) -> dict[str, str]:
    """Return the verdicts in a record, by each adapter's `adapter_sha256`. Raises LoraloomError where it is none."""
    told = read_json_object(path, "write it again with `loraloom screen --record`").get("adapters")
    entries = [one for one in told if isinstance(one, dict)] if isinstance(told, list) else []
    return {str(one["sha256"]): str(one["verdict"]) for one in entries if "sha256" in one and "verdict" in one}


def _places(folder: Path) -> list[Path]:
    folders = {path.parent for path in folder.rglob(CONFIG)}
    files = [path for path in folder.rglob("*.safetensors") if not folders.intersection(path.parents)]
    return sorted([*folders, *(path for path in files if _may_be_adapter(path))])


def _may_be_adapter(file: Path) -> bool:
    """Tell whether the names of a file's tensors are those of an image LoRA; one that cannot be read is to be told."""
    try:
        dialect = dialect_of(list(StoredFile(file)))
    except ValueError:
        return True
    return dialect is not None and dialect.images


def _listed(name: str, one: Adapter, verdicts: Mapping[str, str]) -> Listed:
    ranks = [shape.r for shape in one.shapes.values()]
    alphas = alphas_of(list(one.shapes), one.config).values()
    verdict = verdicts.get(seen_sha256(one.sources)) if verdicts else None
    return Listed(name, (min(ranks), max(ranks)), (min(alphas), max(alphas)), sum(one.energies.values()), verdict)


def _layers(one: Adapter) -> _Layers:
    return {at: (shape.m, shape.n) for at, shape in one.shapes.items()}


def _one_base(one: Adapter, two: Adapter) -> bool:
    """Tell whether two are of one base; folders of unlike names may be, but nothing says so."""
    return one.base == two.base if (told := one_base(one, two)) is None else told


def _group(one: Adapter) -> Group:
    shapes: dict[tuple[int, int], int] = {}
    for shape in one.shapes.values():
        shapes[shape.m, shape.n] = shapes.get((shape.m, shape.n), 0) + 1
    return Group(public_name(one.base), sorted({_last(at) for at in one.shapes}), shapes)


def _last(at: str) -> str:
    """Return the last part of a module's path that is no number."""
    return next((part for part in reversed(at.split(".")) if not part.isdigit()), at)
