"""What a statistics file gives away: attacks on rows, Gram matrices, bounded ranks and noised Gram matrices.

    python experiments/sharing_attack.py [--threads 1] [--seeds 5] [--parts rows mean rebuild members utility]

The attacker has the file, the base model, public text of the same kind, and candidate texts, half of them in the
sample. Base: the demo's MiniLM-L6-H384, query and value (6 inputs of width 384). Text: paragraphs of the documentation
of Python's own library, which depend on the version of Python. Prints Markdown tables; docs/sharing.md explains them.
"""

from __future__ import annotations

import argparse
import math
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import transformers
from scipy.special import ndtr
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from loraloom import (
    ONE_ROW,
    Evaluator,
    Kind,
    Layer,
    LayerReader,
    Moment,
    Statistics,
    add_noise,
    base_running,
    batch_sides,
    batches,
    clipped,
    encode,
    generic_rows,
    loud_directions,
    noise_scale,
    osrm_subspace,
)

INPUTS = [f"bert.encoder.layer.{i}.attention.self.query" for i in range(6)]
LENGTH, TEXTS = 32, 7000  # word pieces a text; texts in all
PUBLIC, OUTSIDE = 700, 700  # the attacker's own texts, and candidates that are not in any sample
WITH_TOKENS = 2000  # texts whose token rows are kept
DELTA = 1e-5
CHANCE = "Gram matrices of other texts (what picking the best score gives)"
RIDGES = (1e-9, 1e-6, 1e-3, 1e-1, 1.0, 10.0, 100.0)  # of the mean eigenvalue
PARTS = ("rows", "mean", "rebuild", "members", "utility")


class Texts:
    """The base model, the texts' word pieces, and what the model's layers read of them."""

    def __init__(self) -> None:
        self.evaluator = Evaluator("demo", max_length=LENGTH)
        self.model: nn.Module = self.evaluator.model
        self.tokens = encode(generic_rows(TEXTS), self.evaluator.tokenizer, LENGTH)

    def read(self, kind: Kind, count: int) -> Tensor | list[Tensor]:
        """Return what the inputs see of the first texts: (6, count, n) means, or (6, length, n) for each text."""
        means = torch.zeros(len(INPUTS), count, 384)
        rows = [torch.zeros(len(INPUTS), len(text["input_ids"]), 384) for text in self.tokens[:count]]
        reader = LayerReader(self.model, {name: self.model.get_submodule(name) for name in INPUTS})
        with base_running(self.model):
            for chosen, batch in batches(self.tokens[:count], self.evaluator.tokenizer, 64):
                side, _ = batch_sides(batch, two_sided=False, pad=0)

                def see(name: str, x: Tensor, side: object = side, chosen: Sequence[int] = chosen) -> None:
                    found, layer = side.rows(x, kind), INPUTS.index(name)  # type: ignore[attr-defined]
                    if kind == "sample":
                        means[layer, list(chosen)] = found
                        return
                    for index, part in zip(chosen, found.split([rows[i].shape[1] for i in chosen]), strict=True):
                        rows[index][layer] = part

                reader.run(batch, see, INPUTS)
        return means if kind == "sample" else rows

    def ids(self, text: int) -> Tensor:
        """Return the word pieces of a text, (length,) int64."""
        return torch.tensor(self.tokens[text]["input_ids"])

    def embedded(self, position: int) -> Tensor:
        """Return what layer 0 reads of every word piece at this position, (vocabulary, n)."""
        embeddings = self.model.get_submodule("bert.embeddings")
        ids = torch.arange(len(self.evaluator.tokenizer))[:, None]
        with torch.no_grad():
            found: Tensor = embeddings(input_ids=ids, position_ids=torch.full_like(ids, position))[:, 0]
        return found


def main() -> None:
    """Attack, and print what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=5, help="splits into sample, candidates and public texts")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    texts = Texts()
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{options.threads} threads, seeds 0 to {options.seeds - 1}; {TEXTS} texts of up to {LENGTH} word pieces"
    )
    rows, means = texts.read("token", WITH_TOKENS), texts.read("sample", TEXTS)
    assert isinstance(rows, list)
    assert isinstance(means, Tensor)
    clip = float(means.norm(dim=2).median())
    print(f"median norm of the mean rows: {clip:.2f}, by input {means.norm(dim=2).median(dim=1).values.tolist()}")
    seeds = range(options.seeds)
    todo: dict[str, Callable[[], None]] = {
        "rows": lambda: read_rows(texts, rows, seeds),
        "mean": lambda: read_means(texts, means, seeds),
        "rebuild": lambda: rebuild(means, seeds),
        "members": lambda: members(means, rows, clip, seeds),
        "utility": lambda: utility(means, clip, seeds),
    }
    for part in options.parts:
        todo[part]()


def heading(title: str, columns: Iterable[object]) -> None:
    """Print a title and the head of a table."""
    names = list(map(str, columns))
    print(f"\n{title}\n\n| {' | '.join(names)} |\n|{'---|' * len(names)}", flush=True)


def line(*cells: object) -> None:
    """Print one row of a table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Return the mean and its standard error."""
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{np.mean(values):.{digits}f} ±{error:.{digits}f}"


def shuffled(seed: int, count: int) -> list[int]:
    """Return the numbers below `count` in the order of a seed."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def read_rows(texts: Texts, rows: list[Tensor], seeds: Sequence[int]) -> None:
    """Read the texts back from token rows: at layer 0 from the vocabulary, deeper from public rows alone."""
    heading("Word pieces read back from token rows, 16 texts a file", ("input", "read back", "[CLS], [SEP] left out"))
    samples = [shuffled(seed, WITH_TOKENS)[:16] for seed in seeds]
    truth = [torch.cat([texts.ids(i) for i in sample]) for sample in samples]
    inner = [(ids != 101) & (ids != 102) for ids in truth]  # BERT's [CLS] and [SEP]
    nearest = [torch.full((len(ids),), math.inf) for ids in truth]
    guesses = [torch.zeros_like(ids) for ids in truth]
    for position in range(LENGTH):
        known = texts.embedded(position)
        for index, sample in enumerate(samples):
            distance, token = closest(torch.cat([rows[i][0] for i in sample]), known)
            better = distance < nearest[index]
            nearest[index] = torch.where(better, distance, nearest[index])
            guesses[index] = torch.where(better, token, guesses[index])
    hits = [guess == ids for guess, ids in zip(guesses, truth, strict=True)]
    line("layer 0", *shares(hits, inner))
    for layer in range(1, 6):
        hits = []
        for seed, sample, ids in zip(seeds, samples, truth, strict=True):
            public = shuffled(seed, WITH_TOKENS)[-PUBLIC:]
            _, which = closest(torch.cat([rows[i][layer] for i in sample]), torch.cat([rows[i][layer] for i in public]))
            hits.append(torch.cat([texts.ids(i) for i in public])[which] == ids)
        line(f"layer {layer}, by the nearest of {PUBLIC} public texts' rows", *shares(hits, inner))


def shares(hits: Sequence[Tensor], inner: Sequence[Tensor]) -> tuple[str, str]:
    """Return the share of hits, of all and of the inner word pieces."""
    inside = [float(hit[keep].double().mean()) for hit, keep in zip(hits, inner, strict=True)]
    return spread([float(hit.double().mean()) for hit in hits]), spread(inside)


def closest(rows: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each row the squared distance to the nearest of `known`, and which that is."""
    found = (known.square().sum(1) - 2 * rows @ known.T).min(dim=1)
    return found.values + rows.square().sum(1), found.indices


def read_means(texts: Texts, means: Tensor, seeds: Sequence[int]) -> None:
    """Read single texts back from their one mean row at layer 0, as a Gram matrix of one text gives it."""
    heading(
        "Texts read back from one mean row of layer 0 (a Gram matrix of one text), 4 texts a seed",
        ("word pieces", "texts", "share of word pieces, in any order", "all of them", "share at its place"),
    )
    for longest in (16, 24):
        known = [texts.embedded(position) for position in range(longest)]
        fitting = [i for i in range(TEXTS) if longest - 8 < len(texts.ids(i)) <= longest]
        found, placed = [], []
        for seed in seeds:
            for choice in shuffled(seed, len(fitting))[:4]:
                ids = texts.ids(fitting[choice])
                guess = decoded(means[0, fitting[choice]] * len(ids), known[: len(ids)])
                placed.append(float((guess == ids[1:-1]).double().mean()))
                common = Counter(guess.tolist()) & Counter(ids[1:-1].tolist())
                found.append(common.total() / len(guess))
        whole = spread([float(share == 1) for share in found])
        line(f"{longest - 7} to {longest}", len(found), spread(found), whole, spread(placed))


def decoded(target: Tensor, known: Sequence[Tensor]) -> Tensor:
    """Return the word pieces between [CLS] and [SEP] whose rows sum to `target`: greedy, then one place at a time."""
    centres, energy = [part.mean(0) for part in known], [part.square().sum(1) for part in known]
    places = range(1, len(known) - 1)
    chosen: dict[int, int] = {}
    rest = target - known[0][101] - known[-1][102] - sum(centres[place] for place in places)

    def best(place: int) -> tuple[float, int]:
        now = known[place][chosen[place]] if place in chosen else centres[place]
        gain = energy[place] - 2 * known[place] @ (rest + now)
        return float(gain.min() - now.square().sum() + 2 * now @ (rest + now)), int(gain.argmin())

    def put(place: int, token: int) -> None:
        nonlocal rest
        rest = rest + (known[place][chosen[place]] if place in chosen else centres[place]) - known[place][token]
        chosen[place] = token

    while len(chosen) < len(places):
        options = {place: best(place) for place in places if place not in chosen}
        place = min(options, key=lambda place: options[place][0])
        put(place, options[place][1])
    for _ in range(20):
        before = dict(chosen)
        for place in places:
            put(place, best(place)[1])
        if chosen == before:
            break
    return torch.tensor([chosen[place] for place in places])


def rebuild(means: Tensor, seeds: Sequence[int]) -> None:
    """Look for single rows in a Gram matrix of few: by its eigenvectors, its span, and with the sum."""
    whats = "nearest eigenvector, cosine with a", "off the span, share of a"
    heading(
        "Rows rebuilt from a Gram matrix of mean rows, mean over the 6 inputs",
        ("texts", *(f"{what} {whose}" for what in whats for whose in ("row", "stranger")), "rebuilt with the sum"),
    )
    for count in (1, 2, 5, 20, 100, 300):
        found: list[list[float]] = [[], [], [], [], []]
        for seed in seeds:
            order = shuffled(seed, TEXTS)
            for layer in means.double():
                inside, outside = layer[order[:count]], layer[order[-OUTSIDE:]]
                values, vectors = torch.linalg.eigh(inside.T @ inside)
                factor = values[-count:].sqrt()[:, None] * vectors[:, -count:].T
                for index, rows in enumerate((inside, outside)):
                    along = rows @ vectors[:, -count:] / rows.norm(dim=1, keepdim=True)
                    found[index].append(float(along.abs().max(dim=1).values.mean()))
                    found[2 + index].append(float((1 - along.square().sum(1)).clamp_min(0).sqrt().mean()))
                found[4].append(rebuilt(factor, inside) if count <= 2 else math.nan)
        line(count, *(f"{np.mean(column):.2g}" if index in (2, 3) else f"{np.mean(column):.3f}"
                      for index, column in enumerate(found)))  # fmt: skip


def rebuilt(factor: Tensor, rows: Tensor) -> float:
    """Return how near the rows of one or two texts are that a factor of their Gram matrix and their sum give.

    Rows H = U F with U orthogonal and U^T 1 = a known from the sum; of two rows U is then known but for their order.
    """
    a = torch.linalg.solve(factor @ factor.T, factor @ rows.sum(0))
    U = a[None] if len(a) == 1 else torch.stack([a + a.flip(0) * a.new([1, -1]), a - a.flip(0) * a.new([1, -1])]) / 2
    cosine = torch.nn.functional.normalize(U @ factor) @ torch.nn.functional.normalize(rows).T
    return float(cosine.max(dim=0).values.mean())


def statistics_of(rows: Tensor, clip: float | None = None) -> Statistics:
    """Return the statistics of mean rows (6, k, n) as Gram matrices alone."""
    moments = {}
    for name, layer in zip(INPUTS, rows.double(), strict=True):
        moments[name] = Moment(len(layer), layer.sum(0), gram=layer.T @ layer)
    layers = {name: Layer(name, 384, 384) for name in INPUTS}
    privacy = None if clip is None else {"clip": clip}
    return Statistics("demo", "", moments, layers, rows.shape[1], 0, "sample", privacy)


def bounded(rank: int, rows: Tensor, _: int) -> Statistics:
    """Return statistics of rows (6, k, n) with the `rank` loudest eigenvectors an input, as by `--directions`."""
    statistics, moments = statistics_of(rows), {}
    for name, moment in statistics.moments.items():
        values, vectors = torch.linalg.eigh(moment.as_gram())
        loud = vectors[:, -rank:]
        moments[name] = replace(moment, gram=(loud * values[-rank:]) @ loud.T)
    return replace(statistics, moments=moments)


def members(means: Tensor, rows: list[Tensor], clip: float, seeds: Sequence[int]) -> None:
    """Tell candidates that are in the sample from others: area under the ROC curve, 0.5 is chance."""

    def noised(epsilon: float, rows: Tensor, seed: int) -> Statistics:
        short = torch.stack([clipped(layer, clip) for layer in rows])
        return add_noise(statistics_of(short, clip), epsilon, DELTA, clip, seed)

    files: dict[str, Callable[[Tensor, int], Statistics]] = {
        "Gram matrices": lambda rows, _: statistics_of(rows),
        CHANCE: lambda rows, _: statistics_of(rows),
        **{f"rank {rank}": partial(bounded, rank) for rank in (128, 32, 8)},
        **{f"noise, epsilon {epsilon}": partial(noised, epsilon) for epsilon in (32, 8, 1)},
    }
    counts = (20, 100, 300, 1000, 5000)
    heading("Membership from mean rows: AUC by number of texts", ("file", *counts))
    for name, make in files.items():
        found: list[str] = []
        for count in counts:
            aucs = []
            for seed in seeds:
                order = shuffled(seed, TEXTS)
                inside, outside, public = order[:count], order[-OUTSIDE:], order[-OUTSIDE - PUBLIC : -OUTSIDE]
                strangers = order[max(counts) : -OUTSIDE - PUBLIC][:count]
                sums = make(means[:, strangers if name == CHANCE else inside], seed)
                candidates = means[:, inside[:OUTSIDE] + outside].double()
                aucs.append(best_auc(sums, statistics_of(means[:, public]), candidates, min(count, OUTSIDE)))
            found.append(spread(aucs))
        line(name, *found)
    token_members(rows, seeds)
    informed(means, clip, seeds)


def best_auc(file: Statistics, public: Statistics, candidates: Tensor, inside: int) -> float:
    """Return the AUC of the best of all scores of candidates (6, c, n), of which the first `inside` are members.

    Scores: minus log x^T (G + ridge)^-1 x, the same less its value on public text, and x^T (mean - public mean), added
    over the inputs. The best is picked by the truth, which favours the attacker.
    """
    truth = [1] * inside + [0] * (candidates.shape[1] - inside)
    scores: dict[tuple[str, float], Tensor] = {}
    for rows, (name, moment) in zip(candidates, file.moments.items(), strict=True):
        other = public.moments[name]
        toward = rows @ (moment.mean() - other.mean()) / rows.norm(dim=1).square()
        scores["sum", 0] = scores.get(("sum", 0), torch.zeros(len(rows))) + toward
        for ridge, mine, theirs in zip(RIDGES, *(leverages(rows, m) for m in (moment, other)), strict=True):
            scores["plain", ridge] = scores.get(("plain", ridge), torch.zeros(len(rows))) - mine
            scores["less", ridge] = scores.get(("less", ridge), torch.zeros(len(rows))) - mine + theirs
    return max(float(roc_auc_score(truth, score)) for score in scores.values())


def leverages(rows: Tensor, moment: Moment) -> list[Tensor]:
    """Return log x^T (G + ridge)^-1 x of each row for each of RIDGES, G scaled to a mean eigenvalue of 1."""
    values, vectors = torch.linalg.eigh(moment.as_gram())
    values = values.clamp_min(0) / values.clamp_min(0).mean().clamp_min(1e-300)
    along = (rows @ vectors).square()
    return [(along / (values + ridge)).sum(1).log() for ridge in RIDGES]


def token_members(rows: list[Tensor], seeds: Sequence[int]) -> None:
    """The same from Gram matrices of token rows: a candidate's score is the mean over its tokens."""
    counts = (20, 100, 300, 1000)
    heading("Membership from Gram matrices of token rows: AUC by number of texts", counts)
    found = []
    for count in counts:
        aucs = []
        for seed in seeds:
            order = shuffled(seed, WITH_TOKENS)
            inside, outside = order[:count], order[-300:]
            candidates = inside[:300] + outside
            truth = [1] * min(count, 300) + [0] * 300
            owner = torch.cat([torch.full((rows[i].shape[1],), at) for at, i in enumerate(candidates)])
            scores = torch.zeros(len(RIDGES), len(candidates), dtype=torch.float64)
            for layer in range(len(INPUTS)):
                sample = torch.cat([rows[i][layer] for i in inside]).double()
                moment = Moment(len(sample), sample.sum(0), gram=sample.T @ sample)
                tokens = leverages(torch.cat([rows[i][layer] for i in candidates]).double(), moment)
                for score, values in zip(scores, tokens, strict=True):
                    score.index_add_(0, owner, -values)
            scores /= torch.bincount(owner)
            aucs.append(max(float(roc_auc_score(truth, score)) for score in scores))
        found.append(spread(aucs))
    line(*found)


def informed(means: Tensor, clip: float, seeds: Sequence[int]) -> None:
    """The strongest attacker: all texts but one known, which of two candidates is the last? From the released values.

    Two Gaussians a distance d apart: AUC Phi(d / (s sqrt(2))), with d in units of the clip; without noise it is 1.
    """
    heading(
        f"An attacker who knows all other texts: AUC for one of two candidates, noise for 6 inputs, clip {clip:.2f}",
        ("epsilon", "noise s / clip", "real pairs", "the pair told best", "the worst pair there can be"),
    )
    short = torch.stack([clipped(layer, clip) for layer in means]).double() / clip
    pairs = [(a, b) for seed in seeds for a, b in zip(*torch.tensor(shuffled(seed, TEXTS)).chunk(2), strict=True)]
    x, y = (short[:, torch.stack(side)] for side in zip(*pairs, strict=True))
    a, b, c = x.square().sum(2), y.square().sum(2), (x * y).sum(2)
    distance = (a**2 + b**2 - 2 * c**2 + a + b - 2 * c).sum(0).sqrt().numpy()
    for epsilon in (1, 4, 8, 32):
        scale = noise_scale(epsilon, DELTA, math.sqrt(ONE_ROW * len(INPUTS)))
        aucs = ndtr(distance / (scale * math.sqrt(2)))
        worst = float(ndtr(math.sqrt(ONE_ROW * len(INPUTS)) / (scale * math.sqrt(2))))
        line(epsilon, f"{scale:.2f}", f"{aucs.mean():.3f}", f"{aucs.max():.3f}", f"{worst:.3f}")


def utility(means: Tensor, clip: float, seeds: Sequence[int]) -> None:
    """What noise does to what statistics are for: the loud directions, and A off the others' energy."""
    columns = "texts", "epsilon", "loud directions: true", "found", "energy they hold: true", "found"
    seen = "A by apart sees: true", "noised", "A by osrm sees: true", "noised", "random A sees"
    heading("What is left of the use, mean over the 6 inputs (shares of the true energy)", columns + seen)
    for count in (100, 1000, 5000):
        for epsilon in (1, 4, 8, 32):
            found = []
            for seed in seeds:
                rows = torch.stack([clipped(layer, clip) for layer in means[:, shuffled(seed, TEXTS)[:count]]])
                truth = statistics_of(rows, clip)
                noised = add_noise(truth, epsilon, DELTA, clip, seed)
                found += [
                    use(truth.moments[name], moment, INPUTS.index(name)) for name, moment in noised.moments.items()
                ]
            values = np.mean(found, axis=0)
            line(count, epsilon, *(f"{value:.1f}" for value in values[:2]), *(f"{value:.4f}" for value in values[2:]))


def use(true: Moment, noised: Moment, seed: int) -> list[float]:
    """Return the columns of `utility` for one input."""
    loud = [loud_directions([moment], 0.5) for moment in (true, noised)]
    seen = {
        rule: [osrm_subspace([moment], None, 8, rule=rule, seed=seed).A for moment in (true, noised)]
        for rule in ("apart", "osrm")
    }
    drawn = osrm_subspace([true], None, 8, rule="random", seed=seed).A
    shown = [V.T for V in loud] + seen["apart"] + seen["osrm"] + [drawn]
    return [float(V.shape[1]) for V in loud] + [true.energy(A) / true.trace() for A in shown]


if __name__ == "__main__":
    main()
