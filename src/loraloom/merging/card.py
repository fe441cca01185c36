"""The model card of a merge: of what, how, what was lost, how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any


def merged_card(base: str, provenance: Mapping[str, Any]) -> str:
    """Return the model card that `provenance` (a merged adapter's loraloom.json) tells: of what, how, how to load it.

    `provenance["notes"]`, where present, is a list of further lines.
    """
    front = ["library_name: peft", "tags:", "- lora", "- merge", "- loraloom"]
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) and not base.startswith("."):
        front.insert(0, f"base_model: {base}")  # a name on the Hub; the Hub refuses a folder here
    layers = provenance["layers"].values()
    facts = [
        f"output rank {max(layer['rank'] for layer in layers)}",
        f"energy lost by truncation in the worst layer {max(layer['energy_lost'] for layer in layers):.3g}",
        f"task heads, kept apart and never merged {_heads_listed(provenance)}",
        *provenance.get("notes", ()),
    ]
    loading = [
        *("An ordinary PEFT adapter, with the scaling folded in:", ""),
        *("```python", "model = PeftModel.from_pretrained(base_model, folder)", "```", ""),
        "Everything needed to make it again is in `loraloom.json`.",
    ]
    return _card(front, "Merged LoRA adapter", "", provenance, facts, loading)


def fused_card(provenance: Mapping[str, Any]) -> str:
    """Return the model card of a checkpoint with a merge in its weights."""
    heads = f"task heads {_heads_listed(provenance)}"
    ending = ["`sha256sum -c SHA256SUMS` checks the files; `loraloom.json` holds what made them."]
    front, title = ["tags:", "- merge", "- loraloom"], "Checkpoint with merged LoRA adapters"
    return _card(front, title, ", in a base model's weights", provenance, [heads], ending)


def _card(
    front: Sequence[str],
    title: str,
    where: str,
    provenance: Mapping[str, Any],
    facts: Sequence[str],
    ending: Sequence[str],
) -> str:
    """Return a model card: front matter, the inputs as a table, how they were merged with further `facts`, an end."""
    options = ", ".join(f"{key} {value}" for key, value in provenance["options"].items()) or "none"
    rows = [f"| {one['name']} | {one['weight']:g} | {one['sha256'] or 'unknown'} |" for one in provenance["inputs"]]
    how = [f"space {provenance['space']}", f"options {options}", f"scale {provenance['scale']:g}", *facts]
    return "\n".join(
        [
            *("---", *front, "---", "", f"# {title}", ""),
            f"{len(rows)} adapters merged by the rule `{provenance['rule']}` of loraloom{where}.",
            *("", "| input | weight | sha256 |", "|---|---|---|", *rows, ""),
            *(f"- {fact}" for fact in how),
            *("", *ending, ""),
        ]
    )


def _heads_listed(provenance: Mapping[str, Any]) -> str:
    return "; ".join(f"`heads/{name}.safetensors`" for name in provenance["heads"]) or "none"
