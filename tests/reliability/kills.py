"""How many kills at random moments a merge, a fusion and a study survive.

    python tests/reliability/kills.py --merge 10 --fuse 10 --study 10

Every trial runs a command in a process of its own and kills it (SIGKILL) at a moment drawn from the time that it takes
undisturbed, in half of them over an earlier result. It is survived where what is then in the output's place is whole,
and where the same command, run again, leaves just what an undisturbed run does and nothing beside it. All is imported
before the processes fork, so that a kill falls into the work.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import tiny
import tiny_study
from loraloom.adapters.peft import write_adapter
from loraloom.adapters.update import Adapter, Update
from loraloom.cli import main as cli
from loraloom.files.hashing import file_sha256
from loraloom.study import by_hand, compare, export  # noqa: F401 (imported before the fork)

LAYERS, WIDTH, RANK = 8, 256, 8
OUTPUT = "out"


@dataclass(frozen=True)
class Work:
    """A command: its words, those of an earlier one, and how to look at its output.

    parts: whether the output's folders are replaced one by one, so that some may be of the earlier command.
    """

    words: list[str]
    earlier: list[str]
    look: Callable[[Path], dict[str, str]]
    parts: bool = False

    def is_whole(self, there: dict[str, str], known: list[dict[str, str]]) -> bool:
        """Tell whether what is there is what one of the commands leaves, or parts of both where it has parts."""
        if not self.parts:
            return there in known
        return all(sha in [one.get(name) for one in known] for name, sha in there.items())


@dataclass
class Count:
    """What became of the trials of one command."""

    tried: int = 0
    killed: int = 0  # the others had ended before
    survived: int = 0


def every_file(output: Path) -> dict[str, str]:
    """Return the sha256 of every file, by name."""
    files = sorted(path for path in output.rglob("*") if path.is_file())
    return {path.relative_to(output).as_posix(): file_sha256(path) for path in files}


def study_results(output: Path) -> dict[str, str]:
    """Return the sha256 of every tensor file outside stages/, and the figures of results.json."""
    if not (output / "results.json").is_file():
        return {}
    found = {name: sha for name, sha in every_file(output).items() if name.endswith(".safetensors")}
    kept = {name: sha for name, sha in found.items() if not name.startswith("stages/")}
    return {**kept, "figures": json.dumps(tiny_study.figures(output / "results.json"), sort_keys=True)}


def merging(folder: Path) -> Work:
    """Write three adapters, and return their merge."""
    for index in range(3):
        generator = torch.Generator().manual_seed(index)
        names = [f"model.layers.{i}.self_attn.{part}" for i in range(LAYERS) for part in ("q_proj", "v_proj")]

        def update(generator: torch.Generator = generator) -> Update:
            B, A = (torch.randn(*shape, generator=generator) for shape in ((WIDTH, RANK), (RANK, WIDTH)))
            return Update(0.01 * B, A)

        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj", "v_proj"]}
        write_adapter(Adapter({name: update() for name in names}, config), folder / f"task{index}", provenance={})
    words = ["merge", *(f"task{index}" for index in range(3)), "-o", OUTPUT, "--overwrite", "--quiet", "--rule"]
    return Work([*words, "ties", "--density", "0.3"], [*words, "task_arithmetic"], every_file)


def fusing(folder: Path) -> Work:
    """Write a sharded checkpoint and three adapters, and return their fusion."""
    work = merging(folder)
    shape = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS}
    config = LlamaConfig(vocab_size=len(tiny.WORDS), num_attention_heads=4, **shape)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base", max_shard_size="2MB")
    tiny.tokenizer("llama").save_pretrained(folder / "base")
    more = ["--fuse-into", "base"]
    return Work([*work.words, *more], [*work.earlier, *more], every_file)


def studying(folder: Path) -> Work:
    """Write a tiny recipe with its data and base, and return a run of it; the earlier one has fewer rules."""
    tiny_study.write_study(folder)
    (folder / "recipe.yaml").rename(folder / "all.yaml")
    tiny_study.write_recipe(folder, merging=[{"rule": "tsv", "scales": [1.0]}]).rename(folder / "few.yaml")
    words, earlier = (["run", f"{name}.yaml", "-o", OUTPUT, "--quiet"] for name in ("all", "few"))
    return Work(words, earlier, study_results, parts=True)


def run(words: list[str], folder: Path, kill_after: float | None = None) -> int:
    """Run a command in a process of its own within `folder`, and return how it ended; what it said is in log."""
    child = os.fork()
    if not child:
        _be(words, folder)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _be(words: list[str], folder: Path) -> NoReturn:
    status = 1
    try:
        os.chdir(folder)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["loraloom", *words]
        cli.main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    finally:
        os._exit(status)


def leftovers(folder: Path) -> list[str]:
    """Return what is of no use once a command has ended."""
    return [str(path) for path in folder.rglob("*") if path.name.endswith((".part", ".checkpoints"))]


def trials(make: Callable[[Path], Work], count: int, folder: Path, seed: int = 0) -> Count:
    """Kill a command `count` times, and return what became of it. Raises AssertionError for the first not survived."""
    chance, found = random.Random(seed), Count()
    whole: list[dict[str, str]] = []
    spent: list[float] = []
    for index in range(count):
        over_earlier = bool(index % 2)
        place = folder / f"{make.__name__}{index}"
        place.mkdir()
        work = make(place)
        if not whole:
            for words in (work.earlier, work.words):
                started = time.monotonic()
                assert run(words, place) == 0, (place / "log").read_text()
                spent.append(time.monotonic() - started)
                whole.append(work.look(place / OUTPUT))
            place = folder / f"{make.__name__}{index}again"
            place.mkdir()
            work = make(place)
        if over_earlier:
            assert run(work.earlier, place) == 0, (place / "log").read_text()
        found.tried += 1
        found.killed += run(work.words, place, kill_after=chance.random() * spent[1]) != 0
        there = work.look(place / OUTPUT)
        known = whole if over_earlier else [*whole, {}]
        assert work.is_whole(there, known), f"{place}: neither whole nor absent: {sorted(there)}"
        assert run(work.words, place) == 0, (place / "log").read_text()
        assert work.look(place / OUTPUT) == whole[1], f"{place}: differs from an undisturbed run"
        assert not leftovers(place), leftovers(place)
        found.survived += 1
    return found


WORKS = {"merge": merging, "fuse": fusing, "study": studying}


def main() -> None:
    """Try as many kills as asked, and print what became of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in WORKS:
        parser.add_argument(f"--{name}", type=int, default=10, help="trials")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, make in WORKS.items():
            found = trials(make, getattr(given, name), Path(folder), given.seed)
            print(f"{name}: {found.tried} tried, {found.killed} killed at work, {found.survived} survived", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
