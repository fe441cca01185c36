"""A prompt answered by a base model with one of several adapters in it, to see what each has learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from loraloom.adapters.bases import same_base
from loraloom.adapters.peft import adapter_sha256, files_by_task, read_adapter, read_provenance
from loraloom.adapters.update import Adapter, Update
from loraloom.errors import LoraloomError, collecting, did_you_mean, raise_problems, raise_together
from loraloom.merging.names import input_names
from loraloom.merging.readout import READOUTS, read_readout
from loraloom.model.generator import Generator
from loraloom.model.load import base_folder, load_tokenizer
from loraloom.model.prompts import encode_prompts
from loraloom.model.vocabulary import writing_problems

BASE = "base"  # the name of the base model alone
_UNCUT = 1 << 30  # tokens of a prompt: what is too long is refused here, not cut


class Conversation:
    """One base model in memory, and adapters by name that are switched in and out.

    Every prompt is answered alone, as the rows of a task are: what was asked before is not seen.

    chat: whether prompts go through the base's chat template. system: the system prompt, or None. tokens: of an
    answer, at most. speaker: the name of the adapter that answers, or `base`.
    """

    def __init__(
        self,
        base: str,
        adapters: Mapping[str, Adapter],
        *,
        chat: bool = True,
        system: str | None = None,
        tokens: int = 128,
    ) -> None:
        problems = writing_problems(adapters.values(), load_tokenizer(base))
        raise_problems("no prompt can be answered", problems, f"name adapters of {base}")
        self.generator = Generator(base_folder(base), batch_size=1, precision="auto")
        self.adapters: dict[str, Mapping[str, Update]] = {BASE: {}}
        errors: list[LoraloomError] = []
        for name, adapter in adapters.items():
            with collecting(errors), self.generator.running(adapter.updates):
                self.adapters[name] = dict(adapter.updates)  # read from the file once
        raise_together(errors)
        self.has_template = bool(self.generator.tokenizer.chat_template)
        self.chat = chat and self.has_template
        self.tokens = tokens
        self.speaker = next(iter(adapters), BASE)
        self.system: str | None = None
        self.instruct(system)

    def instruct(self, system: str | None) -> None:
        """Set the system prompt; None for none. Raises LoraloomError where there is no place for one."""
        if system and not self.chat:
            why = "the template is off" if self.has_template else "the base has none"
            raise LoraloomError(f"a system prompt needs a chat template, and {why}", "write it before the prompt")
        self.system = system or None

    def switch(self, name: str) -> None:
        """Have `name` answer from now on. Raises LoraloomError for an unknown one."""
        if name not in self.adapters:
            raise LoraloomError(f"no adapter is called {name!r}", did_you_mean(name, self.adapters))
        self.speaker = name

    def ask(self, prompt: str) -> str:
        """Return the speaker's greedy answer.

        Raises LoraloomError for a prompt that leaves no room for an answer, and with what the chat template refuses.
        """
        row: dict[str, Any] = {"text_a": prompt}
        if self.chat:
            row["history"] = [{"role": "system", "content": self.system}] if self.system else None
        generator = self.generator
        encoded = encode_prompts(
            datasets.Dataset.from_list([row]), generator.tokenizer, _UNCUT, two_sided=generator.two_sided
        )
        taken = len(encoded[0].prompt) + (0 if generator.two_sided else self.tokens)
        if generator.context is not None and taken > generator.context:
            raise LoraloomError(
                f"prompt and answer have {taken} tokens together; the base takes {generator.context}",
                "shorten the prompt, or ask for fewer --tokens",
            )
        (answer,) = generator.answers(self.adapters[self.speaker], encoded, self.tokens)
        return answer


def read_speakers(folders: Sequence[Path]) -> dict[str, Adapter]:
    """Return the adapters of these folders by name, and what each task reads of a merge that tells tasks apart.

    Raises LoraloomError that tells of every folder that is no adapter of a language model, and of other bases.
    """
    found: dict[str, Adapter] = {}
    errors: list[LoraloomError] = []
    for name, folder in zip(input_names(folders), folders, strict=True):
        with collecting(errors):
            adapter = read_adapter(folder)
            found[name] = adapter
            tasks = files_by_task(folder, f"{READOUTS}/tasks")
            found |= {f"{name}/{task}": read_readout(folder, task) for task in tasks}
            if name == BASE:
                raise LoraloomError(f"{folder}: `{BASE}` is the name of the base model alone", "rename the folder")
    raise_together(errors)
    first = next(iter(found.values()))
    others = {name: one.base for name, one in found.items() if same_base(one.base, first.base) is False}
    problems = [f"{name} is of {base}, not {first.base}" for name, base in others.items()]
    raise_problems("these adapters are of several base models", problems, "name adapters of one base")
    return found


def members_of(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the folders of the adapters that were merged into `folder`, as far as they are found; and who is not.

    loraloom.json tells their folders' names and sha256; they are looked for beside `folder`, and where one works.
    """
    recorded = read_provenance(folder).get("inputs")
    found, absent = [], []
    for one in recorded if isinstance(recorded, list) else []:
        if not isinstance(one, dict) or not isinstance(one.get("folder"), str):
            continue
        name = Path(one["folder"]).name
        places = [folder.resolve().parent / name, Path(name).resolve()]
        place = next((place for place in places if _is_member(place, one.get("sha256"))), None)
        if place is None:
            absent.append(name)
        else:
            found.append(place)
    return found, absent


def _is_member(folder: Path, sha256: Any) -> bool:
    try:
        return folder.is_dir() and adapter_sha256(folder) == sha256
    except (LoraloomError, OSError):
        return False
