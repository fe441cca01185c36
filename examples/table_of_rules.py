"""Every merging rule on the same adapters, in one Markdown table: held-out rows choose the scale, test rows report.

    python examples/table_of_rules.py support/ legal/ sales/ --recipe tasks.yaml --output comparison/

`tasks.yaml` is a recipe with `name`, `base` and `tasks`; an adapter's task is the one it was trained on, or its
folder's name. `comparison/` gets report.html, results.json and each merged adapter at its chosen scale.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from loraloom import Recipe, Reporter, by_task, compare, markdown_tables

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("adapters", nargs="+", type=Path)
parser.add_argument("--recipe", type=Path, required=True)
parser.add_argument("--output", type=Path, required=True)
parser.add_argument("--rule", action="append", default=[], help="give it once for each; without it all are tried")
given = parser.parse_args()

result = compare(
    by_task(given.adapters), Recipe.load(given.recipe), given.output, rules=given.rule, reporter=Reporter()
)
print(markdown_tables(result))
