"""A merge in words: its members as a table and its facts a line each, for the model card and for the terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from loraloom.adapters.dialects import DIALECTS, PEFT
from loraloom.adapters.servers import ServedFacts, get_server
from loraloom.merging.choice import AgreementFacts, CandidateFacts
from loraloom.merging.distillation import DistilledFacts
from loraloom.merging.facts import ForecastFacts, FusionFacts, MergedFacts, MergeFacts
from loraloom.merging.registry import get_rule, option_flag

Lines = list[tuple[str, str]]

_TRIED = 4  # candidates that lose a task, told by name
_COLUMNS = ("adapter", "rank", "alpha", "targets", "energy", "weight", "share")
_WORST = 3  # layers that are named
_NORMALISED = {
    "none": "no",
    "norm": "every adapter to the same |dW| in each layer, before the weights",
    "response": "every adapter to the same response to its own inputs in each layer, before the weights",
}
_NORMALISE_FROM = {  # who decided, where nobody asked
    "energies": ": their energies |dW|^2 differ {:.3g}-fold",
    "weights": ": the weights were given",
    "clip": ": their energy is clipped",
    "rule": ": the rule sees more than the updates",
}
_SCALE_FROM = {
    "asked": "as asked for",
    "agreement": "the nearest to the single models, without labels",
    "rule": "the rule's own",
    "single adapter": "a single adapter stays what it is",
    "stack": "a stack is summed whole",
}


def columns(facts: MergeFacts) -> tuple[str, ...]:
    """Return the heads of `member_rows`: a column for the factors where the inputs were normalised."""
    return _COLUMNS if _untouched(facts) else (*_COLUMNS[:5], "factor", *_COLUMNS[5:])


def member_rows(facts: MergeFacts, width: int = 18) -> list[tuple[str, ...]]:
    """Return the cells of each input; of its targets as many as `width` characters hold."""
    return [
        (
            one.name,
            str(one.rank),
            "?" if one.alpha is None else f"{one.alpha:g}",
            _some(one.targets, width),
            "-" if one.energy is None else _amount(one.energy),
            *([] if _untouched(facts) else [f"{one.factor:.3g}"]),
            f"{one.weight:.4g}",
            "-" if one.energy_share is None else percent(one.energy_share),
        )
        for one in facts.inputs
    ]


def merge_lines(facts: MergeFacts) -> Lines:
    """Return the facts of a merge, what and how it is: rule, scale, and what the kind of result has to tell."""
    lines = [("rule", _rule(facts)), ("scale", f"{facts.scale:.4g}, {_SCALE_FROM[facts.scale_from]}")]
    if facts.normalise != "none" or facts.normalise_from in _NORMALISE_FROM:
        why = _NORMALISE_FROM.get(facts.normalise_from, "").format(facts.loudness)
        lines.append(("normalised", _NORMALISED[facts.normalise] + why))
    lines += _mends(facts)
    from_hub = [f"{one.name} is {one.hub}" for one in facts.inputs if one.hub]
    lines += [("from the hub", ", ".join(from_hub))] if from_hub else []
    if isinstance(facts, MergedFacts):
        lines += _merged(facts)
    elif isinstance(facts, FusionFacts):
        lines += _fused(facts)
    elif isinstance(facts, ForecastFacts):
        lines += _forecast(facts)
    if facts.dialect != PEFT.name:
        lines.append(("written as", f"{DIALECTS[facts.dialect].title} has it: {DIALECTS[facts.dialect].weights}"))
    if facts.served:
        lines.append(("written for", served_line(facts.served)))
    lines += agreement_lines(facts.agreement) if facts.agreement else []
    lines += distilled_lines(facts.distilled) if facts.distilled else []
    if facts.stack is not None:
        lines.append(("stack", "; ".join([", then ".join(one.name for one in facts.inputs), *facts.stack])))
    lines += _layers(facts) + _heads(facts)
    if facts.carried:
        lines.append(("brought along", ", ".join(facts.carried)))
    if facts.left_out:
        lines.append(("left out", _grouped(facts.left_out)))
    return lines


def served_line(served: ServedFacts) -> str:
    """Return the server that an adapter is written for, and how."""
    return f"{get_server(served.server).title}: rank and alpha {served.rank} in every layer"


def _untouched(facts: MergeFacts) -> bool:
    """Tell whether the inputs are as loud as they came."""
    return facts.normalise == "none" and facts.clip is None


def _mends(facts: MergeFacts) -> Lines:
    """Return what a screening found and what was done about it."""
    lines = []
    if facts.screening:
        verdicts = facts.screening.verdicts
        names = {word: [name for name, one in verdicts.items() if one == word] for word in ("pass", "look", "refuse")}
        told = [f"{word} {', '.join(some)}" for word, some in names.items() if some]
        lines.append(("screened", f"{'; '.join(told)}; by weights alone, which is no protection"))
        if facts.screening.dropped:
            lines.append(("dropped", f"{', '.join(facts.screening.dropped)}: refused by the screening"))
    if facts.clip is not None:
        counts = [f"{len(one.factors)} layers of {one.name}" for one in facts.inputs if one.factors]
        which = ", ".join(counts) or "no layer was above that"
        lines.append(("clipped", f"|dW|^2 to {facts.clip:g} times the adapters' median in a layer: {which}"))
    return lines


def agreement_table(facts: AgreementFacts) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return columns and rows: every candidate with its distance from each single model, and their mean."""
    rows = [
        (
            _candidate(one),
            *("-" if distance is None else _distance(distance) for distance in one.distances.values()),
            _distance(one.mean),
        )
        for one in facts.candidates
    ]
    return ("candidate", *facts.texts, "mean"), rows


def agreement_lines(facts: AgreementFacts) -> Lines:
    """Return what the candidates' distances say: which is chosen, which lose a task, and what was looked at."""
    best, counts = facts.best, sorted({texts.count for texts in facts.texts.values()})
    far = f"farthest {best.worst} at {_distance(best.known[best.worst])}"
    lines = [("chosen", f"{_candidate(best)}: {_distance(best.mean)} from the single models on average, {far}")]
    losing = [f"at {_candidate(one)} {', '.join(one.lost)}" for one in facts.candidates if one.lost]
    if losing:
        more = f"; and at {len(losing) - _TRIED} more" if len(losing) > _TRIED else ""
        lines.append(("lost", "; ".join(losing[:_TRIED]) + more))
    scales = [one.scale for one in facts.candidates if (one.rule, one.options) == (best.rule, best.options)]
    if len(scales) > 1 and best.scale in (min(scales), max(scales)):
        end = "smallest" if best.scale == min(scales) else "largest"
        lines.append(("its scale", f"is the {end} that was tried: a {end.replace('est', 'er')} one may be nearer"))
    lines.append(("looked at", f"{' to '.join(map(str, counts[:: max(len(counts) - 1, 1)]))} texts a task, no labels"))
    return lines


def distilled_lines(facts: DistilledFacts) -> Lines:
    """Return what a distillation did: on which texts, and how far each task is from its single model."""
    total = sum(one.texts.count for one in facts.tasks.values())
    near = [
        f"{name} took no part"
        if one.before is None
        else f"{name} {_distance(one.before)} to {_distance(one.after or 0)}"
        for name, one in facts.tasks.items()
    ]
    other = [f"{name}: {one.source}" for name, one in facts.tasks.items() if one.source != "own texts"]
    hashes = ", ".join(f"{name} {one.texts.count} ({one.texts.sha256[:12]})" for name, one in facts.tasks.items())
    steps = f"step {facts.best_step} of {facts.steps} is kept, the nearest on texts held out"
    kept = steps if facts.best_step else f"the start is kept: no step of {facts.steps} came nearer on texts held out"
    start = [("started from", f"the merged adapter that was given (sha256 {facts.start[:12]})")] if facts.start else []
    return [
        ("distilled", f"without labels on {total} texts; {kept}"),
        *start,
        ("distances", f"from the single models on these, in each task's unit: {', '.join(near)}"),
        ("texts", "; ".join([f"{hashes}, with the start of their sha256", *other])),
    ]


def merged_card(facts: MergedFacts) -> str:
    """Return the model card of a merged adapter: of what, how, what was lost, how to load it."""
    dialect = DIALECTS[facts.dialect]
    front = [f"library_name: {dialect.library}", "tags:", "- lora", "- merge", "- loraloom"]
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", facts.base) and not facts.base.startswith("."):
        front.insert(0, f"base_model: {facts.base}")  # a name on the Hub; the Hub refuses a folder here
    loading = [
        *(f"An ordinary adapter of {dialect.title}, with the scaling folded in:", ""),
        *("```python", dialect.loading, "```", ""),
        "Everything needed to make it again is in `loraloom.json`.",
    ]
    return _card(front, "Merged LoRA adapter", "", facts, loading)


def fused_card(facts: MergeFacts) -> str:
    """Return the model card of a checkpoint with a merge in its weights."""
    ending = ["`sha256sum -c SHA256SUMS` checks the files; `loraloom.json` holds what made them."]
    front, title = ["tags:", "- merge", "- loraloom"], "Checkpoint with merged LoRA adapters"
    return _card(front, title, ", in a base model's weights", facts, ending)


def percent(share: float) -> str:
    """Return a share with the digits that mean something: those of a tenth of a percent."""
    if 0 < share < 0.001:
        return "under 0.1 %"
    return f"{100 * share:.0f} %" if share in (0, 1) else f"{100 * share:.1f} %"


def _amount(value: float) -> str:
    """Return an energy with the three digits that mean something, or whole."""
    return f"{value:,.0f}" if 100 <= value < 1e7 else f"{value:.3g}"


def bytes_in_words(size: int) -> str:
    """Return a size with three digits at most before its unit."""
    for unit, bytes_each in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= bytes_each:
            return f"{size / bytes_each:.3g} {unit}" if size < 999.5 * bytes_each else f"{size / bytes_each:.0f} {unit}"
    return f"{size} bytes"


def _rule(facts: MergeFacts) -> str:
    """Return the rule's name with its options as they are typed, and the seed where it draws at random."""
    given = facts.distilled is not None and facts.distilled.start is not None  # in place of the rule's own start
    options = {name: one for name, one in facts.options.items() if not (given and name in ("start", "start_scale"))}
    told = dict(_typed(options))
    if "seed" in get_rule(facts.rule).needs:
        told["--seed"] = facts.seed
    if facts.as_it_is:
        return f"{facts.rule}, left out: there is nothing to merge"
    return " ".join([facts.rule, *(flag if value is True else f"{flag} {value}" for flag, value in told.items())])


def _candidate(one: CandidateFacts) -> str:
    told = [flag if value is True else f"{flag} {value}" for flag, value in _typed(one.options)]
    return " ".join([one.rule, *told, f"{one.scale:g}"])


def _distance(value: float) -> str:
    return f"{value:.2f}" if value < 99.5 else f"{value:.0e}"


def _typed(options: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return a rule's options that say anything, by how they are typed."""
    return [(option_flag(name), value) for name, value in options.items() if value not in (None, False)]


def _merged(facts: MergedFacts) -> Lines:
    layers = sorted(facts.layers, key=lambda name: -facts.layers[name].energy_lost)
    worst = [f"{name} {percent(facts.layers[name].energy_lost)}" for name in layers[:_WORST]]
    lost = f"{percent(facts.energy_lost)} in total, by truncation; most in {', '.join(worst)}"
    asked = f", {facts.rank} asked for" if facts.rank else ""
    return [
        ("output rank", f"{facts.output_rank}{asked}, in {len(facts.layers)} layers"),
        ("energy lost", lost if facts.energy_lost > 0 else "none"),
        *(("note", note) for note in facts.notes),
    ]


def _fused(facts: FusionFacts) -> Lines:
    made = facts.checkpoint
    heads = [*made.replaced, *made.added]
    lines = [
        ("checkpoint", f"{bytes_in_words(made.size)}, {len(made.tensors)} weights changed"),
        ("its head", ", ".join(heads) if heads else "the base's own"),
    ]
    if made.added and not made.classified:
        lines.append(("config.json", "says nothing of that head: load it with the class and labels of the training"))
    elif "architectures" in made.config:
        labels = len(made.config["id2label"])
        lines.append(("config.json", f"{made.config['architectures'][0]} with {labels} labels"))
    if made.untied:
        lines.append(("untied", "lm_head.weight is a tensor of its own now"))
    if made.left_out:
        lines.append(("not copied", f"of the base: {', '.join(made.left_out)}"))
    return lines


def _forecast(facts: ForecastFacts) -> Lines:
    spent = "not known: it depends on the texts" if facts.seconds is None else f"about {max(1, facts.seconds):.0f} s"
    return [
        ("output rank", f"at most {facts.output_rank}"),
        ("size", f"at most {bytes_in_words(facts.size)}, in {facts.dtype}"),
        ("time", spent),
        *([("energies", "not told: the adapters are too large to read now")] if facts.inputs[0].energy is None else []),
    ]


def _layers(facts: MergeFacts) -> Lines:
    """Return how many layers each input adapts, where any lacks some."""
    told = [f"{one.name} adapts {one.layers if one.lacks else 'all'} of them" for one in facts.inputs]
    total = facts.inputs[0].layers + facts.inputs[0].lacks
    return [("layers", f"{total}: {', '.join(told)}")] if any(one.lacks for one in facts.inputs) else []


def _heads(facts: MergeFacts) -> Lines:
    if facts.heads_averaged:
        return [("heads", "their weighted mean is in the result")]
    return [("heads", f"{', '.join(facts.heads)}: one a task, in heads/")] if facts.heads else []


def _some(names: Sequence[str], width: int) -> str:
    """Return as many of `names` as `width` characters hold, and how many more there are."""
    for count in range(len(names), 0, -1):
        text = ", ".join(names[:count]) + (f" +{len(names) - count}" if count < len(names) else "")
        if len(text) <= width or count == 1:
            return text
    return ""


def _grouped(reasons: Mapping[str, str]) -> str:
    """Return names with why, those of one reason together."""
    names: dict[str, list[str]] = {}
    for name, why in reasons.items():
        names.setdefault(why, []).append(name)
    return "; ".join(f"{', '.join(some)} ({why})" for why, some in names.items())


def _card(front: Sequence[str], title: str, where: str, facts: MergeFacts, ending: Sequence[str]) -> str:
    """Return a model card: front matter, the inputs as a table, how they were merged, warnings, an end."""
    hashes = [one.sha256 or "unknown" for one in facts.inputs]
    rows = [
        f"| {' | '.join([*cells, sha256])} |" for cells, sha256 in zip(member_rows(facts, 200), hashes, strict=True)
    ]
    heads = [*columns(facts), "sha256"]
    head = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join(
        [
            *("---", *front, "---", "", f"# {title}", ""),
            f"{len(rows)} adapters merged by the rule `{facts.rule}` of loraloom{where}.",
            *("", *head, *rows, ""),
            *(f"- {what}: {how}" for what, how in merge_lines(facts)),
            *(f"- warning: {warning}" for warning in facts.warnings),
            *(_agreement_section(facts.agreement) if facts.agreement else []),
            *("", *ending, ""),
        ]
    )


def _agreement_section(facts: AgreementFacts) -> list[str]:
    """Return the whole curve as a table, with the hashes of the texts."""
    columns, rows = agreement_table(facts)
    hashes = ", ".join(f"{name} {texts.count} ({texts.sha256[:12]})" for name, texts in facts.texts.items())
    return [
        *("", "## Distance from the single models", ""),
        "In each task's own unit: 0 is the single model itself, 1 a model that knows nothing of the task.",
        *("", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"),
        *(f"| {' | '.join(row)} |" for row in rows),
        *("", f"Texts, without labels, with the start of their sha256: {hashes}."),
    ]
