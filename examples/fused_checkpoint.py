"""Adapters merged into the weights of their base model: a whole checkpoint that needs no PEFT.

    python examples/fused_checkpoint.py team-a/ team-b/ --base base-model/ --output fused/

The checkpoint is written shard by shard, with the base's dtype, index, tokenizer and config, and a list of sha256 sums.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from loraloom import MergeOptions, Reporter, fuse_folders, plan_folders

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("adapters", nargs="+", type=Path)
parser.add_argument("--base", type=Path, required=True, help="folder of the base model's checkpoint")
parser.add_argument("--output", type=Path, required=True)
parser.add_argument("--scale", type=float, default=0.3)
given = parser.parse_args()

plan = plan_folders(given.adapters, MergeOptions("task_arithmetic", scale=given.scale), given.output)
with Reporter() as shown:
    facts = fuse_folders(plan, given.base, given.output, "examples/fused_checkpoint.py", shown)
print(f"rule: {facts.rule} at scale {facts.scale:g}")
print(f"{given.output}: {facts.checkpoint.size / 1e9:.2f} GB, {len(facts.checkpoint.tensors)} weights changed")
print(f"heads beside it: {', '.join(facts.heads) or 'none'}")
