"""A merged adapter trained to answer unlabelled texts as each single adapter does: what the rule `distil` asks for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import EarlyStoppingCallback, Trainer

from loraloom.adapters.heads import Head
from loraloom.adapters.update import Adapter, Update
from loraloom.errors import LoraloomError, first_few, raise_problems
from loraloom.files.hashing import json_sha256, seen_sha256, task_seed
from loraloom.files.tensors import tensors_sha256
from loraloom.merging.choice import TextsFacts
from loraloom.merging.distillation import DistilledFacts, Distilling, LessonFacts, Source
from loraloom.merging.facts import MergedFacts
from loraloom.merging.merger import Merged, merge
from loraloom.model.generator import Generator
from loraloom.model.load import base_sha256
from loraloom.model.packaged import cache_folder
from loraloom.model.processes import by_first, check_training, gathered, on_cpu, rank_and_size, started
from loraloom.model.runner import Evaluator, device
from loraloom.model.vocabulary import writing_problems
from loraloom.progress import Reporter
from loraloom.settings import TrainingSettings
from loraloom.statistics.texts import generic_rows
from loraloom.tasks.generate import ANSWER_TOKENS
from loraloom.tasks.prompts import as_prompts
from loraloom.training.lessons import HeadLesson, Lesson, WrittenLesson
from loraloom.training.order import Order, parted, used
from loraloom.training.runs import (
    NOT_FINITE,
    Progress,
    Watch,
    arguments,
    clear,
    full_disk_told,
    has_stopped,
    resumable,
    state_of,
)
from loraloom.training.teachers import LAYOUT

GENERIC, NEAR = "generic", "none"  # in place of a task's texts
GENERIC_TEXTS = 300  # of a task without texts of its own
FEWEST = 8  # texts: a slice of them is held out
_READ, _STEPS = 10_000, 400  # texts of all tasks that are trained on where heads answer, and the most steps
_CHECKS = 5  # measurements on held-out texts
# units, beyond which a distance counts by its logarithm: that of a task whose teacher hardly tells texts apart is
# told in a unit so small that it would drown all others
_FAR = 2.0
_FLAT, _PATIENCE = 1e-3, 3  # less of a distance is no gain; so many checks without one end it

Texts: TypeAlias = Dataset | str  # rows; GENERIC or NEAR where a task has none


class ByTeachers:
    """Distils by the single adapters' own answers to unlabelled texts: a `merging.distillation.Distiller`.

    model: the base model: an Evaluator where heads answer, a Generator where answers are written.
    adapters: by name; where heads answer, each with its task's as trained.
    texts: by the adapters' names, rows with text_a, and text_b for pairs, or history for prompts; labels are not read.
      "generic" in place of rows lets the adapter answer generic English; "none" keeps the task near the start there.
    scratch: where unfinished work lies; the same call after a kill goes on from the last whole checkpoint there.
    start: a merged adapter to start from, in place of a rule's merge.
    teachers: where answers are kept for the next call, by hashes of all they hang on; in the cache folder without.
    settings: precision, batches an optimiser step, warmup and weight decay.
    answer_tokens: the most that a single model writes.
    reporter: is told of teachers, steps and distances.
    progress: is told of steps, as by any stage that trains.

    Under `accelerate launch` or torchrun every process calls this, and they train together. Raises LoraloomError that
    tells all that is wrong: an adapter without texts or head, or with a head where answers are written, too few texts.
    """

    def __init__(
        self,
        model: Evaluator | Generator,
        adapters: Mapping[str, Adapter],
        texts: Mapping[str, Texts],
        scratch: Path,
        *,
        start: Adapter | None = None,
        teachers: Path | None = None,
        settings: TrainingSettings | None = None,
        answer_tokens: int = ANSWER_TOKENS,
        reporter: Reporter | None = None,
        progress: Progress | None = None,
    ) -> None:
        _check(model, adapters, texts)
        self._model, self._adapters, self._scratch = model, adapters, scratch
        self._start, self._place = start, teachers or cache_folder() / "teachers"
        self._settings, self._answer_tokens = settings or TrainingSettings(), answer_tokens
        self._reporter, self._progress = reporter or Reporter(quiet=True), progress
        self.facts: DistilledFacts | None = None
        self._sources: dict[str, Source] = {name: _source(texts[name]) for name in adapters}
        self._rows = {name: self._rows_of(texts[name]) for name in adapters}

    @property
    def start(self) -> Mapping[str, Update] | None:
        """Return the merged adapter to start from; None leaves it to the rule."""
        return self._start.updates if self._start else None

    @property
    def warnings(self) -> list[str]:
        """Tell of adapters that a merged one was made of, by its own record, and that teach nothing here."""
        if not (self._start and self._start.path):
            return []
        try:
            inputs = MergedFacts.read(self._start.path).inputs
        except LoraloomError:
            return []  # made elsewhere: nothing is known of it
        taught = {seen_sha256(one.sources) for one in self._adapters.values()}
        lost = [one.name for one in inputs if one.sha256 not in (None, *taught)]
        said = f"{self._start.name} was merged from {first_few(lost)} too, of which nothing is taught here: that may be"
        return [f"{said} lost; name it too, with --unlabelled none for want of texts"] if lost else []

    def train(self, start: Mapping[str, Update], asked: Distilling, seed: int) -> dict[str, Update]:
        """Return `start` trained; see `Distiller`. Raises LoraloomError where nothing can be learnt, or it diverges."""
        writes, settings = isinstance(self._model, Generator), self._settings
        if writes and asked.loss == "features":
            raise LoraloomError(
                "loss 'features': answers that are written are read by no head", "choose output or both"
            )
        batch_size, rate = asked.batch_size or (4 if writes else 8), asked.learning_rate or (5e-4 if writes else 2e-3)
        steps = asked.steps or (60 if writes else min(_STEPS, -(-_READ // (batch_size * len(self._rows)))))
        asked = Distilling(steps, "output" if writes else asked.loss, batch_size, rate)
        PartialState(cpu=on_cpu())  # joins the processes that a launcher started
        check_training(batch_size)
        drawn = steps * settings.accumulate * batch_size
        self._rows = {name: used(rows, drawn, task_seed(seed, name)) for name, rows in self._rows.items()}
        parts = {name: parted(len(rows), task_seed(seed, name)) for name, rows in self._rows.items()}
        keys = {name: self._key(name, start) for name in self._rows}
        begun = self._reporter.each("teachers", self._rows.items())
        lessons = {name: self._lesson(name, rows, parts[name][1], asked, start, keys[name]) for name, rows in begun}
        taught = {name: one for name, one in lessons.items() if not one.alike}
        if not taught:
            raise LoraloomError("every adapter answers all its texts alike", "give more texts, and others")
        factors = Factors(start, list(taught.values()))
        call = json.dumps([keys, tensors_sha256(factors.state_dict()), asdict(asked), settings.model_dump(), seed])
        checkpoint = by_first(lambda: resumable(self._scratch, f"{call} {transformers.__version__} {started()}"))
        before = _distances(taught, start)
        learnt = {name: parts[name][0] for name in taught}
        trainer = self._trainer(factors, taught, learnt, asked, seed, checkpoint)
        with full_disk_told(self._scratch):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        best, found = trainer.state.best_metric, factors.updates()
        if best is None or not all(torch.isfinite(one).all() for one in factors.state_dict().values()):
            raise LoraloomError("distil: the trained weights are not finite", NOT_FINITE)
        if best >= _mean(before):
            found, best_step = dict(start), 0
        else:
            best_step = int(trainer.state.best_global_step or 0)
        after = _distances(taught, found)
        by_first(lambda: clear(self._scratch))
        self.facts = DistilledFacts(
            steps=steps,
            best_step=best_step,
            loss=asked.loss,
            batch_size=batch_size,
            learning_rate=rate,
            start=_sha256(self._start.updates) if self._start else None,
            tasks={
                name: LessonFacts(
                    self._sources[name], TextsFacts.of(rows), len(parts[name][1]), before.get(name), after.get(name)
                )
                for name, rows in self._rows.items()
            },
        )
        return found

    def _rows_of(self, texts: Texts) -> Dataset:
        if not isinstance(texts, str):
            return texts
        rows = generic_rows(GENERIC_TEXTS)
        tokenizer: Any = self._model.tokenizer
        return as_prompts(rows) if isinstance(self._model, Generator) and tokenizer.chat_template else rows

    def _teaching(self, name: str, start: Mapping[str, Update]) -> Mapping[str, Update]:
        """Return the updates whose answers are the task's: its own adapter's, or the start's where it is kept near."""
        return start if self._sources[name] == "kept near its start" else self._adapters[name].updates

    def _key(self, name: str, start: Mapping[str, Update]) -> str:
        """Return a hash of all that the answers of a task's teacher hang on."""
        head, model = self._adapters[name].head, self._model
        content = [base_sha256(model.base), _sha256(self._teaching(name, start)), tensors_sha256(head)]
        content += [TextsFacts.of(self._rows[name]).sha256, type(model).__name__, transformers.__version__]
        return json_sha256([*content, model.max_length, self._answer_tokens, LAYOUT])

    def _lesson(
        self,
        name: str,
        rows: Dataset,
        heldout: Sequence[int],
        asked: Distilling,
        start: Mapping[str, Update],
        key: str,
    ) -> Lesson:
        own, place = self._teaching(name, start), self._place / key[:32]
        if isinstance(self._model, Generator):
            return WrittenLesson(self._model, rows, heldout, own, place, self._answer_tokens)
        head = Head.of(self._adapters[name].head, self._adapters[name].name)
        return HeadLesson(self._model, head, rows, heldout, asked.loss, own, place)

    def _trainer(
        self,
        factors: Factors,
        lessons: Mapping[str, Lesson],
        rows: Mapping[str, Sequence[int]],
        asked: Distilling,
        seed: int,
        checkpoint: Path | None,
    ) -> Distillation:
        assert asked.steps is not None
        assert asked.batch_size is not None
        state, settings = state_of(checkpoint), self._settings
        steps = int(state["global_step"]) if has_stopped(state) else asked.steps
        order = Order(lessons, rows, asked.steps, settings.accumulate, asked.batch_size, seed)
        each = max(1, asked.steps // _CHECKS)
        args = arguments(
            settings.model_copy(update={"learning_rate": asked.learning_rate, "gradient_checkpointing": False}),
            seed,
            self._scratch,
            max_steps=steps,
            per_device_train_batch_size=1,  # an item is a batch of one task
            gradient_accumulation_steps=len(lessons) * settings.accumulate,
            **dict.fromkeys(("eval_strategy", "save_strategy", "logging_strategy"), "steps"),
            **dict.fromkeys(("eval_steps", "save_steps", "logging_steps"), each),
            metric_for_best_model="distance",
            greater_is_better=False,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        self._reporter.begin("distilling", asked.steps)
        reporter, progress = (self._reporter, self._progress) if rank_and_size()[0] == 0 else (None, None)
        return Distillation(lessons, reporter, progress, factors, args, order)


class Factors(nn.Module):
    """The A and B of every layer, which are all that trains; the base model that they run in is no part of it."""

    def __init__(self, start: Mapping[str, Update], lessons: Sequence[Lesson]) -> None:
        super().__init__()
        self._modules_named, self._lessons = list(start), list(lessons)
        self.A = nn.ParameterList(nn.Parameter(update.A.clone()) for update in start.values())
        self.B = nn.ParameterList(nn.Parameter(update.B.clone()) for update in start.values())
        self.to(device())

    def forward(self, task: int, batch: Mapping[str, Tensor]) -> Tensor:
        """Return what the model makes of a batch of one task; see `Lesson.run`."""
        live = {name: Update(B, A) for name, B, A in zip(self._modules_named, self.B, self.A, strict=True)}
        return self._lessons[task].run(live, batch)

    def updates(self) -> dict[str, Update]:
        """Return a copy of the updates, on the CPU."""
        pairs = zip(self._modules_named, self.B, self.A, strict=True)
        return {name: Update(B.detach().cpu().clone(), A.detach().cpu().clone()) for name, B, A in pairs}


class Distillation(Trainer):  # type: ignore[misc, unused-ignore]
    """The Trainer, whose loss is the distance to the batch's teacher, and who measures that on held-out texts."""

    def __init__(
        self,
        lessons: Mapping[str, Lesson],
        reporter: Reporter | None,
        progress: Progress | None,
        factors: Factors,
        args: transformers.TrainingArguments,
        order: Order,
    ) -> None:
        self._lessons, self._factors, self._order, self._told = lessons, factors, order, ""
        self._reporter, self._progress = reporter, progress
        stop = EarlyStoppingCallback(_PATIENCE, _FLAT)
        watch = Watch("distil", self._show)
        # evaluate is our own, and looks at no eval_dataset; the Trainer asks for one that is there
        super().__init__(factors, args, _item, order, order, callbacks=[watch, stop])
        self.remove_callback(transformers.PrinterCallback)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self._order)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return how far the model is from the teacher of this batch's task."""
        name = list(self._lessons)[inputs["task"]]
        far = self._lessons[name].loss(model(inputs["task"], inputs["batch"]), inputs["batch"], inputs["given"])
        shares = gathered(float(far.detach()))  # one factor for all processes: they have parts of one batch
        return far / max(1.0, sum(shares) / len(shares) / _FAR)

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """Measure and log the mean distance to the teachers on held-out texts."""
        # one measure for all processes: they must stop together
        found = gathered(_distances(self._lessons, self._factors.updates()))[0]
        self._told = ", ".join(f"{name} {distance:.3f}" for name, distance in found.items())
        metrics = {"eval_distance": _mean(found)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _show(self, done: int, total: int, loss: float | None = None) -> None:
        if self._progress is not None:
            self._progress(done, total, loss)
        if self._reporter is not None:
            self._reporter.reach("distilling", done)
            self._reporter.detail("distilling", self._told)


def distil(
    adapters: Mapping[str, Adapter],
    model: Evaluator | Generator,
    texts: Mapping[str, Texts],
    scratch: str | Path,
    *,
    merged: Adapter | None = None,
    rank: int | None = None,
    seed: int = 0,
    teachers: str | Path | None = None,
    settings: TrainingSettings | None = None,
    answer_tokens: int = ANSWER_TOKENS,
    reporter: Reporter | None = None,
    **options: Any,
) -> Merged:
    """Merge adapters and train the result, without labels, to answer as each of them does on its own task's texts.

    adapters, model, texts, scratch, teachers, settings, answer_tokens, reporter: see `ByTeachers`.
    merged: a merged adapter to start from, in place of `start`.
    rank: the largest rank of the result; the sum of the adapters' without.
    seed: of the order of texts, and of which are held out.
    options: the rule's: start, start_scale, steps, loss, batch_size, learning_rate; `loraloom rules distil` tells them.

    Raises LoraloomError as `merge` and `ByTeachers` do.
    """
    by = ByTeachers(
        model,
        adapters,
        texts,
        Path(scratch),
        start=merged,
        teachers=Path(teachers) if teachers else None,
        settings=settings,
        answer_tokens=answer_tokens,
        reporter=reporter,
    )
    return merge(adapters, "distil", rank=rank, seed=seed, distiller=by, **options)


def _item(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    (item,) = items
    return item


def _distances(lessons: Mapping[str, Lesson], updates: Mapping[str, Update]) -> dict[str, float]:
    return {name: one.distance(updates) for name, one in lessons.items()}


def _mean(distances: Mapping[str, float]) -> float:
    """Return the mean over tasks, of a far one as `_FAR` says."""
    return sum(min(far, _FAR * (1 + math.log(max(far / _FAR, 1)))) for far in distances.values()) / len(distances)


def _sha256(updates: Mapping[str, Update]) -> str:
    return tensors_sha256({f"{name}/{key}": one for name in updates for key, one in vars(updates[name]).items()})


def _source(texts: Texts) -> Source:
    if not isinstance(texts, str):
        return "own texts"
    return "generic text" if texts == GENERIC else "kept near its start"


def _check(model: Evaluator | Generator, adapters: Mapping[str, Adapter], texts: Mapping[str, Texts]) -> None:
    """Raise LoraloomError that tells all for which these adapters cannot be distilled by these texts."""
    problems = [f"no texts for {name!r}" for name in adapters if name not in texts]
    problems += [f"texts for {name!r}, which is no adapter" for name in texts if name not in adapters]
    for name, rows in texts.items():
        if isinstance(rows, str):
            problems += [] if rows in (GENERIC, NEAR) else [f"texts {rows!r} of {name!r}: rows, 'generic' or 'none'"]
        elif len(rows) < FEWEST:
            problems.append(f"{name}: {len(rows)} texts, {FEWEST} are the fewest: some are held out")
    if texts and all(isinstance(rows, str) and rows == NEAR for rows in texts.values()):
        problems.append("every task is kept near its start: there is nothing to learn")
    for name, adapter in adapters.items():
        odd = [module for module in adapter.forms if module in adapter.shapes]
        problems += [f"{name}: {odd[0]} is no linear layer, and only these are distilled"] if odd else []
        problems += [] if adapter.head or isinstance(model, Generator) else [f"{name}: has no head"]
    problems += writing_problems(adapters.values(), model.tokenizer) if isinstance(model, Generator) else []
    raise_problems("cannot distil", problems, "give each adapter unlabelled texts of its task")
