"""`loraloom chat`: a prompt line to try adapters of a language model, or prompts from a script."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraloom.cli.common import AsJson, Quiet, command
from loraloom.cli.words import listed
from loraloom.errors import LoraloomError, did_you_mean

if TYPE_CHECKING:
    from loraloom.cli.terminal import Out
    from loraloom.study.conversation import Conversation

_HELP = {
    "/adapter NAME": "have this adapter answer; without a name they are listed",
    "/base": "have the base model alone answer",
    "/system TEXT": "set the system prompt; without a text there is none",
    "/help": "this list",
    "/quit": "stop, as Ctrl-D does",
}


def chat(
    adapters: Annotated[list[Path], typer.Argument(help="Adapter folders. The first one answers until you switch.")],
    base: Annotated[
        str | None,
        typer.Option(help="Base model in place of the one that the adapter names: hub name or local folder."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Prompt to answer by every adapter named, in place of a prompt line. Give it once for each."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    no_chat: Annotated[
        bool, typer.Option("--no-chat", help="Give prompts as they stand, without the base's chat template.")
    ] = False,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that an answer has at most.")] = 128,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Try adapters of a language model: each prompt is answered alone, greedily, by the adapter you switch to.

    The adapters that were merged into the first one can be switched to as well where they lie beside it.
    """
    with command(quiet, as_json) as out:
        from loraloom.adapters.peft import read_adapter
        from loraloom.study.conversation import Conversation, members_of, read_speakers

        if as_json and not prompt:
            raise LoraloomError("--json is for prompts that are given", 'add --prompt "..."')
        members, absent = members_of(adapters[0])
        named = {folder.resolve() for folder in adapters}
        speakers = read_speakers([*adapters, *(one for one in members if one not in named and not prompt)])
        # a merge names its base without the folders before it, where it is no name on the hub; its members know them
        known = [one.base for one in (*speakers.values(), *map(read_adapter, members)) if one.base]
        bases = sorted(known, key=lambda name: not Path(name).is_dir())
        if not (base or bases):
            raise LoraloomError(f"{adapters[0]}: names no base model", "name it by --base BASE")
        talk = Conversation(base or bases[0], speakers, chat=not no_chat, system=system, tokens=tokens)
        if not (talk.has_template or no_chat):
            out.hint("the base has no chat template: prompts are given as they stand")
        if prompt:
            _answer_all(out, talk, list(speakers), prompt)
            return
        if absent:
            out.hint(f"not found beside it, or changed since: {listed(absent)}; name their folders to switch to them")
        _talk(out, talk)


def _answer_all(out: Out, talk: Conversation, names: list[str], prompts: list[str]) -> None:
    """Answer every prompt by every adapter."""
    answers = []
    for prompt in prompts:
        for name in names:
            talk.switch(name)
            answers.append({"prompt": prompt, "adapter": name, "answer": talk.ask(prompt)})
    out.result({"system": talk.system, "chat_template": talk.chat, "answers": answers}, "")
    for prompt in prompts:
        told = [f"{one['adapter']}: {one['answer']}" for one in answers if one["prompt"] == prompt]
        out.say("\n".join([f"> {prompt}", *told]))


def _talk(out: Out, talk: Conversation) -> None:
    """Answer line by line until there are no more."""
    from loraloom.cli.terminal import show_error

    if len(talk.adapters) > 2:
        out.hint(f"/adapter NAME switches between {listed(list(talk.adapters))}; /help tells the rest")
    for line in _lines(talk):
        try:
            if line.startswith("/"):
                if not _obey(out, talk, line):
                    return
            elif line:
                out.result({}, talk.ask(line) or "(an empty answer)")
        except LoraloomError as error:  # of one line; the next may be better
            show_error(error)


def _lines(talk: Conversation) -> Iterator[str]:
    """Yield the lines that are typed; of a file or a pipe without a sign before each."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (arrow keys, and the lines typed before)
    while True:
        try:
            yield input(f"{talk.speaker}> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return


def _obey(out: Out, talk: Conversation, line: str) -> bool:
    """Do what a line that starts with a slash says; return whether to go on."""
    word, _, rest = line.partition(" ")
    if word == "/quit":
        return False
    if word == "/help":
        out.facts("What a line may be, besides a prompt", _HELP.items())
    elif word == "/base":
        talk.switch("base")
    elif word == "/system":
        talk.instruct(rest.strip())
    elif word == "/adapter" and rest:
        talk.switch(rest.strip())
    elif word == "/adapter":
        out.facts("Adapters", [(name, "answers now" if name == talk.speaker else "") for name in talk.adapters])
    else:
        known = [one.split()[0] for one in _HELP]
        raise LoraloomError(f"{word} is no command", did_you_mean(word, known))
    return True
