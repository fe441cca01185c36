"""Three adapters of different ranks become one adapter of rank 16, written as vLLM takes it.

    python examples/one_adapter_for_serving.py team-a/ team-b/ team-c/ merged/

No base model is loaded. The energy that rank 16 loses is printed, in total and for the worst layer.
"""

from __future__ import annotations

import argparse

from loraloom import MergeOptions, make_plan, read_adapter, read_provenance, write_merged

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("adapters", nargs="+", help="adapter folders, of any ranks")
parser.add_argument("output", help="folder to write")
parser.add_argument("--rank", type=int, default=16, help="rank of the result: a server's max_lora_rank")
parser.add_argument("--rule", default="tsv")
given = parser.parse_args()

# a plan is checked at once and computed layer by layer while it is written
options = MergeOptions(given.rule, rank=given.rank, server="vllm")
plan = make_plan([read_adapter(folder) for folder in given.adapters], options)
folder = write_merged(plan, given.output)
told = read_provenance(folder)
layers = told["layers"]
worst = max(layers, key=lambda module: layers[module]["energy_lost"])
print(f"{folder}: rank {told['output_rank']}, {len(layers)} layers")
print(f"energy lost: {told['energy_lost']:.2%} in total, {layers[worst]['energy_lost']:.2%} in {worst}")
