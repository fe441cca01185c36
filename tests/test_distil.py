"""Distilling on tiny models: the distance, what trains, what is recovered, kills, and what is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from typer.testing import CliRunner

import tiny
import tiny_launch
import tiny_writers
from commands import refused, said
from loraloom.adapters.heads import Head
from loraloom.adapters.peft import read_adapter, write_adapter
from loraloom.adapters.update import Adapter, Update
from loraloom.cli.main import app
from loraloom.errors import LoraloomError
from loraloom.merging import Merged, merge
from loraloom.model.distances import log_chances, words_apart
from loraloom.model.generator import Generator
from loraloom.model.runner import Evaluator
from loraloom.model.tokens import batches
from loraloom.progress import Reporter
from loraloom.settings import TrainingSettings
from loraloom.training.distil import Factors, distil
from loraloom.training.lessons import HeadLesson, WrittenLesson
from loraloom.training.teachers import PART, Teacher

LAYERS = [f"bert.encoder.layer.{layer}.attention.self.{name}" for layer in (0, 1) for name in ("query", "value")]
NAMES = ("mood", "tone")


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


class KilledAt(Reporter):
    def __init__(self, step: int) -> None:
        super().__init__(quiet=True)
        self.step = step

    def reach(self, kind: str, count: int) -> None:
        if count == self.step:
            raise Killed


def drawn(seed: int, base: Path, outputs: int) -> Adapter:
    """An adapter and its head, drawn at random; weak enough that the base is still to be seen."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return 0.25 * torch.randn(*shape, generator=generator)

    updates = {module: Update(normal(16, 2), normal(2, 16)) for module in LAYERS}
    head = {"classifier.weight": 8 * normal(outputs, 16), "classifier.bias": normal(outputs)}
    config = {"peft_type": "LORA", "target_modules": ["query", "value"], "base_model_name_or_path": str(base)}
    return Adapter(updates, config, head)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base_folder("bert", tmp_path_factory.mktemp("distil") / "base")


@pytest.fixture(scope="module")
def model(base: Path) -> Evaluator:
    return Evaluator(str(base), max_length=16)


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Adapter]:
    """One of classes, one of a number."""
    return {"mood": drawn(1, base, 3), "tone": drawn(2, base, 1)}


@pytest.fixture
def run(model: Evaluator, adapters: dict[str, Adapter], tmp_path: Path) -> Callable[..., Merged]:
    def made(**changes: Any) -> Merged:
        texts = {name: tiny.task(name, rows=48).train for name in adapters}
        options: dict[str, Any] = {"steps": 100, "batch_size": 8, "learning_rate": 0.02, "loss": "both"}
        options["teachers"] = tmp_path / "t"
        given = {"adapters": adapters, "model": model, "texts": texts, "scratch": tmp_path / "s", **options, **changes}
        return distil(**given)

    return made


def test_distance_and_loss_equal_a_dense_computation(
    model: Evaluator, adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    """In float64, with dW whole in the weights of the model."""
    rows = tiny.task("mood", rows=20).train
    merged = merge(list(adapters.values()), "task_arithmetic", scale=0.5).adapter.updates
    for name, adapter in adapters.items():
        head = Head.of(adapter.head)
        lesson = HeadLesson(model, head, rows, [3, 1], "both", adapter.updates, tmp_path / name)
        features = {}
        for which, updates in (("own", adapter.updates), ("merged", merged)):
            dense = {f"{path}.weight": model.model.get_parameter(f"{path}.weight") for path in updates}
            old = {path: weight.clone() for path, weight in dense.items()}
            for path, update in updates.items():
                dense[f"{path}.weight"].data += update.dense()
            features[which] = model.features({}, head, model.encode(rows)).double()
            for path, weight in old.items():
                dense[path].data.copy_(weight)
        own, other = (found @ head.weight.double().T + head.bias.double() for found in features.values())
        if name == "mood":
            p, q = own.softmax(1), other.softmax(1)
            far = (p * (p / q).log()).sum(1)
            unit = (p * (p / p.mean(0)).log()).sum(1).mean()
        else:
            far, unit = (own - other).square()[:, 0], own.var(correction=0)
        assert lesson.distance(merged) == pytest.approx(float(far[[3, 1]].mean() / unit), rel=1e-4)
        spread = (features["own"] - features["own"].mean(0)).square().sum(1).mean()
        both = far / unit + (features["own"] - features["merged"]).square().sum(1) / spread
        batch, given = lesson.batch([5, 0, 7])
        loss = lesson.loss(lesson.run(merged, batch), batch, given)
        times = 1 if name == "mood" else 2  # numbers count more
        assert float(loss) == pytest.approx(times * float(both[[5, 0, 7]].mean()), rel=1e-4)


def test_teachers_and_measures_read_little_padding(
    model: Evaluator, adapters: dict[str, Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts of one length and of another, in turn, over several parts: each part has one length."""
    short, long = "good", " ".join(["good"] * 12)
    rows = Dataset.from_dict({"text_a": [short, long, short] * PART})
    read, told = list[Tensor](), Evaluator.features

    def seen(self: Evaluator, updates: Any, head: Head, encoded: Any, **more: Any) -> Tensor:
        read.extend(
            batch["attention_mask"] for _, batch in batches(encoded, self.tokenizer, more.get("batch_size", 64))
        )
        return told(self, updates, head, encoded, **more)

    monkeypatch.setattr(Evaluator, "features", seen)
    heldout, adapter = [*range(0, 24, 3), *range(1, 24, 3)], adapters["mood"]
    lesson = HeadLesson(model, Head.of(adapter.head), rows, heldout, "output", adapter.updates, tmp_path)
    assert lesson.distance(adapter.updates) == pytest.approx(0, abs=1e-9)
    assert all(mask.all() for mask in read)


def test_the_gradient_reaches_only_the_factors(model: Evaluator, adapters: dict[str, Adapter], tmp_path: Path) -> None:
    rows, adapter = tiny.task("mood", rows=12).train, adapters["mood"]
    lesson = HeadLesson(model, Head.of(adapter.head), rows, [0, 1], "both", adapter.updates, tmp_path)
    factors = Factors({module: Update(2 * one.B, one.A) for module, one in adapter.updates.items()}, [lesson])
    batch, given = lesson.batch([2, 3])
    lesson.loss(factors(0, batch), batch, given).backward()
    assert len(list(factors.parameters())) == 2 * len(LAYERS)
    assert all(one.grad is not None and one.grad.any() for one in factors.parameters())
    assert all(one.grad is None for one in model.model.parameters())


def test_it_recovers_what_the_merge_lost_and_goes_on_after_a_kill(
    run: Callable[..., Merged], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = run()
    facts = whole.plan.distiller.facts if whole.plan.distiller else None
    assert facts
    for one in facts.tasks.values():
        assert (one.texts.count, one.heldout, one.source) == (48, 6, "own texts")
    before, after = (sum(getattr(one, when) or 0 for one in facts.tasks.values()) for when in ("before", "after"))
    assert after < 0.5 * before  # both read the same texts by one model, so that neither distance can vanish
    with pytest.raises(Killed):
        run(scratch=tmp_path / "again", reporter=KilledAt(23))
    assert (tmp_path / "again" / "checkpoint-20").is_dir()
    again = run(scratch=tmp_path / "again")
    for module in LAYERS:
        assert torch.equal(again.merged[module].update.A, whole.merged[module].update.A)
        assert torch.equal(again.merged[module].update.B, whole.merged[module].update.B)
        assert whole.merged[module].update.rank == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t"]
    assert len(list((tmp_path / "t").iterdir())) == 2  # teachers of the first call served the others
    assert capfd.readouterr() == ("", "")


def test_teachers_that_were_killed_go_on(tmp_path: Path) -> None:
    """A kill costs the part at work, and what a full disk or a kill cut short is made anew."""
    made = list[range]()

    def make(part: range) -> dict[str, Tensor]:
        if len(made) == 2:
            raise Killed
        made.append(part)
        return {"outputs": torch.arange(part.start, part.stop)}

    with pytest.raises(Killed):
        Teacher(tmp_path, 3 * PART + 5, make)
    assert made == [range(PART), range(PART, 2 * PART)]
    first = tmp_path / "part-00000.safetensors"
    first.write_bytes(first.read_bytes()[:-8])
    made.clear()
    with pytest.raises(Killed):
        Teacher(tmp_path, 3 * PART + 5, make)
    assert made == [range(PART), range(2 * PART, 3 * PART)]
    made.clear()
    assert Teacher(tmp_path, 3 * PART + 5, make).whole("outputs").tolist() == list(range(3 * PART + 5))
    assert made == [range(3 * PART, 3 * PART + 5)]


def test_a_rank_below_the_sum(run: Callable[..., Merged]) -> None:
    found = run(rank=2, steps=10)
    assert {layer.update.rank for layer in found.merged.values()} == {2}
    facts = found.plan.distiller.facts if found.plan.distiller else None
    assert facts
    assert all(one.after is not None and one.before is not None for one in facts.tasks.values())


def test_generic_text_and_a_task_kept_near_its_start(run: Callable[..., Merged]) -> None:
    found = run(texts={"mood": "generic", "tone": "none"}, steps=4)
    facts = found.plan.distiller.facts if found.plan.distiller else None
    assert facts
    assert [one.source for one in facts.tasks.values()] == ["generic text", "kept near its start"]
    assert facts.tasks["tone"].before == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"texts": {"mood": "generic"}}, "no texts for 'tone'"),
        ({"texts": {"mood": "none", "tone": "none"}}, "nothing to learn"),
        ({"texts": {"mood": "generic", "tone": tiny.task(rows=4).train}}, "tone: 4 texts, 8 are the fewest"),
        ({"texts": {"mood": "generic", "tone": "genric"}}, "texts 'genric' of 'tone'"),
        ({"start": "regmean"}, "cannot start from rule 'regmean', which needs statistics"),
        ({"start": "distil"}, "cannot start from rule 'distil'"),
        ({"start": "tzv"}, "no merging rule is called 'tzv'"),
        ({"loss": "feature"}, "option 'loss'"),
    ],
)
def test_what_cannot_be_distilled(run: Callable[..., Merged], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(LoraloomError, match=said):
        run(**changes)


def test_an_adapter_without_a_head(run: Callable[..., Merged], adapters: dict[str, Adapter]) -> None:
    bare = Adapter(adapters["tone"].updates, adapters["tone"].config)
    with pytest.raises(LoraloomError, match="tone: has no head"):
        run(adapters={**adapters, "tone": bare})


def test_chances_equal_a_dense_computation() -> None:
    logits, other = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    words = logits.topk(3).indices
    p, q = (
        torch.cat([kept, 1 - kept.sum(1, keepdim=True)], 1)
        for kept in (one.softmax(1).gather(1, words) for one in (logits, other))
    )
    found = words_apart(log_chances(logits, words), log_chances(other, words))
    torch.testing.assert_close(found, (p * (p / q).log()).sum(1))
    every = logits.topk(9).indices
    torch.testing.assert_close(
        words_apart(log_chances(logits, every), log_chances(other, every)),
        (logits.softmax(1) * (logits.log_softmax(1) - other.log_softmax(1))).sum(1),
    )


def test_answers_that_are_written(tmp_path: Path) -> None:
    folder = tiny_writers.writer_base(tmp_path / "base")
    paths = [tiny_writers.writer_adapter(folder, tmp_path / name, seed=seed) for seed, name in enumerate(NAMES)]
    members = dict(zip(NAMES, map(read_adapter, paths), strict=True))
    texts = {name: tiny.asked(name, rows=16, chat=False).train for name in NAMES}
    generator = Generator(str(folder), max_length=24)
    lesson = WrittenLesson(generator, texts["mood"], [0, 1], members["mood"].updates, tmp_path / "one", 4)
    assert lesson.distance(members["mood"].updates) == pytest.approx(0, abs=1e-3)
    assert lesson.distance({}) == pytest.approx(1, rel=0.8)  # the unit is of all texts
    options: dict[str, Any] = {"steps": 20, "learning_rate": 0.01, "answer_tokens": 4, "teachers": tmp_path / "t"}
    found = distil(members, generator, texts, tmp_path / "s", **options)
    facts = found.plan.distiller.facts if found.plan.distiller else None
    assert facts
    assert (facts.loss, facts.batch_size) == ("output", 4)
    pairs = [(one.before or 0, one.after or 0) for one in facts.tasks.values()]
    assert sum(after for _, after in pairs) < 0.9 * sum(before for before, _ in pairs)
    with pytest.raises(LoraloomError, match="read by no head"):
        distil(members, generator, texts, tmp_path / "s", loss="features", **options)


def test_commands(base: Path, adapters: dict[str, Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = list[Any]()
    for name, adapter in adapters.items():
        write_adapter(adapter, tmp_path / name, provenance={})
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny.task(name, rows=16).train["text_a"]))
        words += ["--unlabelled", path]
    folders = [tmp_path / name for name in adapters]
    words += ["--base", base, "--steps", 4, "--batch-size", 4]
    done = said("merge", *folders, "--rule", "distil", *words, "-o", tmp_path / "out")
    assert {name: one["texts"]["count"] for name, one in done["distilled"]["tasks"].items()} == dict.fromkeys(NAMES, 16)
    assert "distilled: without labels on 32 texts" in (tmp_path / "out" / "README.md").read_text()
    assert sorted(path.name for path in (tmp_path / "out" / "heads").iterdir()) == [f"{n}.safetensors" for n in NAMES]
    merge_words = ("merge", *folders, "--scale", "0.5", "--base", base, "-o", tmp_path / "plain")
    said(*merge_words)
    again = said("distil", tmp_path / "plain", *folders, *words, "-o", tmp_path / "polished")
    for task in NAMES:  # a merge by the rule's own start is polished alike
        one, two = (found["distilled"]["tasks"][task] for found in (done, again))
        assert two["before"] == pytest.approx(one["before"], rel=1e-3)
        assert two["after"] == pytest.approx(one["after"], rel=1e-2)
    assert "one of the two" in refused("distil", tmp_path / "plain", *folders, "-o", tmp_path / "no")
    card = (tmp_path / "polished" / "README.md").read_text()
    assert "--start tsv" not in card  # another start was given
    assert "rule: distil --steps 4 --loss output" in card
    short = said("distil", tmp_path / "plain", folders[0], *words[:2], *words[4:], "-o", tmp_path / "short")
    assert "merged from tone too" in short["warnings"][0]


def test_a_merge_without_texts_says_what_they_would_bring(adapters: dict[str, Adapter], tmp_path: Path) -> None:
    """Not of a stack, which is summed whole."""
    folders = [str(tmp_path / name) for name in adapters]
    for folder, adapter in zip(folders, adapters.values(), strict=True):
        write_adapter(adapter, Path(folder), provenance={})
    plain = CliRunner().invoke(app, ["merge", *folders, "-o", str(tmp_path / "plain")])
    assert "--rule distil --unlabelled FILE" in " ".join(plain.output.split())
    stacked = CliRunner().invoke(app, ["merge", *folders, "--stack", "-o", str(tmp_path / "stack")])
    assert stacked.exit_code == 0
    assert "distil" not in stacked.output


def test_files_of_texts_that_will_not_do(
    adapters: dict[str, Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is wrong with any file, at once."""
    for name, adapter in adapters.items():
        write_adapter(adapter, tmp_path / name, provenance={})
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text("")
    Path("other.jsonl").write_text('{"sentence": "good"}\n' * 9)
    words = ["--rule", "distil", "--unlabelled", "empty.jsonl", "--unlabelled", "other.jsonl", "-o", "no"]
    found = refused("merge", "mood", "tone", *words)
    assert "empty.jsonl: it holds no rows" in found
    assert "no column 'text': known: sentence; name it by --column" in found
    Path("empty.jsonl").write_text('{"text": "good"}\n' * 3)
    assert "it holds 3 texts, 8 are the fewest" in refused("merge", "mood", "tone", *words)
    assert not Path("no").exists()


def test_a_single_adapter_is_started_from_whole(run: Callable[..., Merged], adapters: dict[str, Adapter]) -> None:
    """Of a smaller rank, say; half of it would be no start."""
    texts = {"mood": tiny.task("mood", rows=48).train}
    found = run(adapters={"mood": adapters["mood"]}, texts=texts, steps=5, learning_rate=1e-9)
    facts = found.plan.distiller.facts if found.plan.distiller else None
    assert facts
    assert facts.tasks["mood"].before == pytest.approx(0, abs=1e-6)
    halved = run(steps=1, batch_size=2, scale=0.5)
    assert "scale 0.5 undoes what distil trains" in halved.plan.warnings[0]


def planted(seed: str, words: Sequence[str], rows: int = 400) -> tuple[Dataset, Tensor]:
    """Texts of words that say nothing, and one of two that is the label."""
    chance, texts, labels = random.Random(seed), list[str](), list[int]()
    for _ in range(rows):
        text, label = chance.choices(tiny.NEUTRAL, k=chance.randint(2, 7)), chance.randrange(2)
        text.insert(chance.randrange(len(text)), words[label])
        texts.append(" ".join(text))
        labels.append(label)
    return Dataset.from_dict({"text_a": texts}), torch.tensor(labels)


def taught(model: Evaluator, base: Path, rows: Dataset, labels: Tensor, seed: int) -> Adapter:
    """An adapter and its head that have learnt these rows."""
    generator = torch.Generator().manual_seed(seed)
    A = {module: 0.5 * torch.randn(2, 16, generator=generator) for module in LAYERS}
    updates = {module: Update(torch.zeros(16, 2).requires_grad_(), A[module].requires_grad_()) for module in LAYERS}
    weight, bias = torch.randn(2, 16, generator=generator).requires_grad_(), torch.zeros(2, requires_grad=True)
    head = {"classifier.weight": weight.detach(), "classifier.bias": bias.detach()}  # they share memory
    trained = [weight, bias, *(one for update in updates.values() for one in (update.A, update.B))]
    optimiser = torch.optim.AdamW(trained, lr=0.03, weight_decay=0.0)
    order, batch = next(batches(model.encode(rows), model.tokenizer, len(rows)))
    for _ in range(100):
        with model.running(updates, Head.of(head)) as run:
            loss = torch.nn.functional.cross_entropy(run(batch) @ weight.T + bias, labels[list(order)])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    config = {"peft_type": "LORA", "target_modules": ["query", "value"], "base_model_name_or_path": str(base)}
    return Adapter({name: Update(one.B.detach(), one.A.detach()) for name, one in updates.items()}, config, head)


def test_a_task_that_the_sum_loses_is_regained(model: Evaluator, base: Path, tmp_path: Path) -> None:
    """Trained adapters of planted tasks, scored by labels on texts that nobody has seen."""
    learnt, asked, adapters = dict[str, Dataset](), dict[str, tuple[Dataset, Tensor]](), dict[str, Adapter]()
    for seed, (name, words) in enumerate({"mood": ("good", "bad"), "tone": ("warm", "cold")}.items()):
        rows, labels = planted(name, words)
        learnt[name], asked[name] = rows.select(range(300)), (rows.select(range(300, 400)), labels[300:])
        adapters[name] = taught(model, base, learnt[name], labels[:300], seed)

    def right(name: str, updates: Mapping[str, Update]) -> float:
        (rows, labels), head = asked[name], Head.of(adapters[name].head)
        return float(
            (head.logits(model.features(updates, head, model.encode(rows))).argmax(1) == labels).float().mean()
        )

    assert min(right(name, one.updates) for name, one in adapters.items()) > 0.95
    for scale in (0.3, 0.5, 1.0):
        assert right("tone", merge(adapters, "task_arithmetic", scale=scale).adapter.updates) < 0.65
    usual: dict[str, Any] = {"steps": 100, "batch_size": 16, "learning_rate": 0.01, "teachers": tmp_path / "t"}
    found = distil(adapters, model, learnt, tmp_path / "s", start="task_arithmetic", **usual)
    assert min(right(name, found.adapter.updates) for name in adapters) > 0.9


def test_bfloat16_and_several_batches_a_step(run: Callable[..., Merged]) -> None:
    found = run(batch_size=4, settings=TrainingSettings(precision="bfloat16", accumulate=2))
    facts = found.plan.distiller.facts if found.plan.distiller else None
    assert facts
    pairs = [(one.before or 0, one.after or 0) for one in facts.tasks.values()]
    assert sum(after for _, after in pairs) < 0.6 * sum(before for before, _ in pairs)


def test_two_processes_write_once_what_one_would(base: Path, adapters: dict[str, Adapter], tmp_path: Path) -> None:
    words: list[Any] = ["merge"]
    for name, adapter in adapters.items():
        write_adapter(adapter, tmp_path / name, provenance={})
        words.append(tmp_path / name)
    for name in adapters:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny.task(name, rows=16).train["text_a"]))
        words += ["--unlabelled", path]
    words += ["--rule", "distil", "--base", base, "--steps", 4, "--batch-size", 4, "--json", "-o"]
    port = tiny_launch.free_port()
    noises = [tmp_path / f"said{rank}" for rank in range(2)]
    environments = [{**tiny_launch.launched(rank, 2, port), "XDG_CACHE_HOME": str(tmp_path / "c")} for rank in range(2)]
    runs = [
        tiny_launch.start_loraloom([*words, tmp_path / "two"], tmp_path, noise, environment)
        for noise, environment in zip(noises, environments, strict=True)
    ]
    for run, noise in zip(runs, noises, strict=True):
        run.join(300)
        assert run.exitcode == 0, noise.read_text()
    assert json.loads(noises[0].read_text())["distilled"]["steps"] == 4
    assert noises[1].read_text() == ""
    assert CliRunner().invoke(app, [str(word) for word in [*words, tmp_path / "one"]]).exit_code == 0
    one, two = (read_adapter(tmp_path / name).updates for name in ("one", "two"))
    for module in LAYERS:
        torch.testing.assert_close(two[module].dense(), one[module].dense(), rtol=1e-3, atol=1e-4)
