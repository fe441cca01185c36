"""What `arrivals.py` and `clusters.py` share: a recipe, its base and atlas, and adapters that are trained once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loraloom import (
    Adapter,
    Evaluator,
    Recipe,
    Statistics,
    Task,
    base_folder,
    initialise,
    lora_config,
    make_atlas,
    read_adapter,
    task_seed,
    train_adapter,
)


@dataclass
class Ground:
    """The recipe, its base model in memory, its atlas, the folder where adapters are kept, and the seed."""

    recipe: Recipe
    evaluator: Evaluator
    atlas: Statistics
    out: Path
    seed: int

    @classmethod
    def of(cls, given: argparse.Namespace) -> Ground:
        """Load what the options of `arguments` name; adapters of a seed have a folder of their own."""
        recipe = Recipe.load(given.recipe)
        recipe = recipe.model_copy(update={"base": given.base}) if given.base else recipe
        atlas = make_atlas(recipe.base, list(recipe.lora.targets), recipe.statistics)
        evaluator = Evaluator(base_folder(recipe.base), max_length=recipe.training.max_length)
        return cls(recipe, evaluator, atlas, given.out / f"s{given.seed}", given.seed)

    def trained(
        self, folder: Path, task: Task, name: str, *, apart: bool, after: Mapping[str, Adapter] | None = None
    ) -> Adapter:
        """Return the adapter in `folder`, trained where it is not there yet, with the seed that `name` draws.

        apart: start off the atlas, and off the rows of `after`; else at PEFT's default.
        """
        if not folder.exists():
            print(f"training {folder} on {len(task.train)} rows", file=sys.stderr, flush=True)
            seed, start, lora = task_seed(self.seed, name), folder.with_name(f"{folder.name}.start"), self.recipe.lora
            if apart and not start.exists():
                known = {"atlas": self.atlas}
                initialise(start, None, known, lora_config(lora, []), seed=seed, after=after)
            train_adapter(
                self.recipe.base,
                task,
                folder,
                init=start if apart else None,
                lora=lora,
                settings=self.recipe.training_of(task.name),
                seed=seed,
            )
        return read_adapter(folder)


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that both scripts take."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", help="another base model, a folder or a name")
    parser.add_argument("--seed", type=int, default=0)
    return parser
