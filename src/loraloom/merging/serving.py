"""An adapter that is there already, written anew as a server takes it: the same updates in another form."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from loraloom.adapters.config import headless_config, writes
from loraloom.adapters.dialects import PEFT, translated
from loraloom.adapters.peft import ADAPTER, adapter_sha256, read_adapter, read_provenance, write_adapter
from loraloom.adapters.servers import ServedFacts, fit_server, get_server
from loraloom.files.atomic import make_readable
from loraloom.merging.card import merged_card
from loraloom.merging.facts import MERGED, MergedFacts
from loraloom.merging.names import input_names, public_command

_CARD = "README.md"


@dataclass(frozen=True)
class ExportFacts:
    """An adapter that was written anew for a server.

    base: the base model's name, where the adapter tells it.
    sha256: of config and weights of the adapter that it was made from.
    ranks: that the adapter had, each once, ascending. layers: how many it has.
    heads: the name of the head that was in the adapter and lies beside it now, in heads/.
    left_out: what was not taken along, with why.
    """

    folder: str
    base: str | None
    sha256: str
    served: ServedFacts
    ranks: list[int]
    layers: int
    heads: list[str]
    left_out: dict[str, str]


def export_folder(
    folder: str | Path, server: str, output: str | Path, *, command: str | None = None, overwrite: bool = False
) -> ExportFacts:
    """Write the adapter in `folder` to `output` as a server takes it, and return what was written.

    folder: of any LoRA adapter that is read here; a head in it is laid beside the result.
    server: the name of one of `SERVERS`.
    output: the folder; it appears whole or not at all.
    command: as it was typed, for loraloom.json.
    overwrite: replace an earlier result.

    Raises LoraloomError with every reason why the server would not take it, and where `output` may not be written.
    """
    folder, output, wanted = Path(folder), Path(output), get_server(server)
    adapter, sha256 = translated(read_adapter(folder), PEFT), adapter_sha256(folder)
    ranks = {module: shape.r for module, shape in adapter.shapes.items()}
    turned = bool(adapter.config.get("fan_in_fan_out"))
    whole = adapter.head if writes(adapter.config) else ()  # no task's head, which lies beside it as well
    served = fit_server(wanted, str(folder), ranks, adapter.forms, turned=turned, head=whole)
    told = {"kind": ADAPTER, **read_provenance(folder), "served": asdict(served)}
    (name,) = input_names([folder])
    write_adapter(
        replace(adapter, head={}, config=headless_config(adapter.config)),
        output,
        provenance={**told, "exported": {"of": sha256, "command": public_command(command)}},
        files=_card(folder, told["kind"], served),
        extra={f"heads/{name}.safetensors": adapter.head} if adapter.head else None,
        rank=served.rank,
        overwrite=overwrite,
    )
    make_readable(output)
    left_out = {file: why for file, why in adapter.beside.left_out.items() if file != _CARD}
    heads = [name] if adapter.head else []
    return ExportFacts(
        str(output), adapter.base or None, sha256, served, sorted(set(ranks.values())), len(ranks), heads, left_out
    )


def _card(folder: Path, kind: object, served: ServedFacts) -> dict[str, str]:
    """Return the model card: of a merge anew, with the server in it; of others as it is, where there is one."""
    if kind == MERGED:
        return {_CARD: merged_card(replace(MergedFacts.read(folder), served=served))}
    card = folder / _CARD
    return {_CARD: card.read_text(encoding="utf-8", errors="replace")} if card.is_file() else {}
