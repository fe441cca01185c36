"""Which tensors of a checkpoint the names of an adapter mean: the same, those of its model, or with a prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from loraloom.errors import did_you_mean
from loraloom.merging.checkpoint import Checkpoint, each

OUTPUT = "lm_head"


@dataclass(frozen=True)
class Names:
    """How the adapter's names lead to the checkpoint's: `stored` has these by a tensor's name in the adapter's model.

    `renamed` has the model's name for those of the adapter that come of another version of transformers. A prefix is
    taken `off` or put `on` where the adapter was made on the model with a head, or on the backbone alone. `joined` are
    fused experts of which the checkpoint has tensors apart (`ModelNames`); `modules` holds the names of both by module.
    """

    stored: Mapping[str, str]
    modules: Mapping[str, list[str]]
    renamed: Mapping[str, str] = field(default_factory=dict)
    joined: Mapping[str, list[list[str]]] = field(default_factory=dict)
    off: str = ""
    on: str = ""

    def tensor(self, name: str) -> str:
        """Return the name that a tensor has in the checkpoint, or is to get."""
        return self.stored.get(self.seen(name), self.renamed.get(name, name).removeprefix(self.off))

    def has(self, module: str) -> bool:
        """Tell whether the checkpoint has tensors of `module`."""
        return self.module(module) in self.modules

    def module(self, module: str) -> str:
        """Return the name of a module among `modules`."""
        return _module(self.seen(f"{module}.weight"))

    def seen(self, name: str) -> str:
        """Return the name of a tensor among those of `stored`."""
        return self.on + self.renamed.get(name, name).removeprefix(self.off)


def find_names(modules: Sequence[str], heads: Sequence[str], base: Checkpoint) -> tuple[Names, list[str]]:
    """Return how names lead to the checkpoint, and a problem where not all `modules` are found, or in several places.

    They may be the checkpoint's own, or those of the model that transformers builds from it.
    """
    own = Names({name: name for name in base.parts}, _by_module(base.parts))

    @cache
    def in_model() -> Names:
        from loraloom.model.architecture import names_in_model  # takes seconds to import

        found = names_in_model(base.config, base.parts)
        stored = {name: tensor for tensor, name in found.names.items()}
        renamed = names_in_model(base.config, [*(f"{module}.weight" for module in modules), *heads]).names
        return Names(stored, _by_module([*stored, *found.joined]), renamed, found.joined)

    spaces: tuple[Callable[[], Names], ...] = (lambda: own, in_model)
    places: set[str] = set()
    # a tied output has no tensor, and transformers looks for it under its own name
    for wanted in (modules, [module for module in modules if module != OUTPUT]):
        for space in spaces:
            fitting = list(_fitting(space(), wanted))
            if len(fitting) == 1:
                return fitting[0], []
            places |= {one.tensor(f"{modules[0]}.weight").removesuffix(".weight") for one in fitting}
    if places:
        told = f"could be {' or '.join(sorted(places))}: name the modules as the checkpoint does"
        return own, [f"{modules[0]}: {told}"]
    missing = [module for module in sorted(modules) if not own.has(module) and module != OUTPUT]
    return own, each(missing, lambda m: f"no module {m} in the checkpoint: {_nearest(m, own.modules)}")


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _by_module(tensors: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for tensor in tensors:
        found.setdefault(_module(tensor), []).append(tensor)
    return found


def _fitting(names: Names, wanted: Sequence[str]) -> Iterator[Names]:
    """Yield `names`, or else all ways to take a prefix off or put one on, by which every module is found."""
    if all(map(names.has, wanted)):
        yield names
    else:
        first = names.module(wanted[0])
        parts = first.split(".")
        ways = [replace(names, off=".".join(parts[:count]) + ".") for count in range(1, len(parts))]
        ways += [replace(names, on=name.removesuffix(first)) for name in names.modules if name.endswith(f".{first}")]
        yield from (way for way in ways if all(map(way.has, wanted)))


def _nearest(module: str, known: Iterable[str]) -> str:
    """Return a hint that stays short: paths that end in the same word, or else words that are like it."""
    ends = {name.rpartition(".")[2] for name in known}
    end = module.rpartition(".")[2]
    alike = {name for name in known if name.rpartition(".")[2] == end}
    return did_you_mean(module, alike) if alike else did_you_mean(end, ends)
