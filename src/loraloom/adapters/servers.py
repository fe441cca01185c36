"""What each server takes of a LoRA adapter, as its own loading code has it, and what of an adapter it would not take.

All of them scale by alpha / r. Only vLLM looks at the ranks and alphas of single layers (`rank_pattern`); SGLang reads
`r` and `lora_alpha` alone, and llama.cpp `lora_alpha` and each tensor's rank: a layer of another rank would be scaled
wrongly there, without a word. One rank everywhere and alpha = r are right in all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from loraloom.adapters.update import Form
from loraloom.errors import LoraloomError, did_you_mean, first_few, raise_problems

_FORMS = {
    "embedding": "embeddings of this name",
    "convolution": "convolutions",
    "experts": "experts whose weights are one tensor (target_parameters)",
}


@dataclass(frozen=True)
class Server:
    """What one server takes.

    name: as it is typed. title: as it calls itself.
    ranks: an adapter is written in the smallest of these that holds it, ascending; empty where any rank is taken.
    layers: last parts of the paths of the linear layers that it adapts; None for all.
    words: those of embeddings.
    needs: what else must be adapted in the same block for a layer, because it stacks them into one.
    turned: whether linear layers whose weight stands transposed (GPT-2's Conv1D) are adapted rightly.
    """

    name: str
    title: str
    ranks: tuple[int, ...] = ()
    layers: frozenset[str] | None = None
    words: frozenset[str] = frozenset({"embed_tokens"})
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    turned: bool = True


# vLLM 0.33.0. config/lora.py: MaxLoRARanks, which buffers are made for. lora/peft_helper.py: no DoRA, bias, or other
# modules_to_save than a classifier's. lora/utils.py, lora/lora_model.py: the names of tensors; every LinearBase, and
# embed_tokens and lm_head where the model's class lists them. lora/model_manager.py: a stacked layer (qkv_proj,
# gate_up_proj) takes what of its parts is there.
VLLM = Server("vllm", "vLLM", ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512))

# SGLang 0.5.23. srt/lora/lora_config.py: r, lora_alpha, target_modules. srt/lora/utils.py: the names that have buffers.
# srt/lora/lora.py: normalize_qkv_proj makes zeros for k_proj alone, normalize_gate_up_proj for up_proj alone,
# normalize_fused_qkv_a_proj for nothing; what has another name is left out without a word.
SGLANG = Server(
    "sglang",
    "SGLang",
    layers=frozenset(
        {
            *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "out_proj", "in_proj"),
            *("gate_proj", "up_proj", "gate_up_proj", "down_proj", "w1", "w2", "w3", "lm_head"),
            *("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj"),
        }
    ),
    needs={
        "q_proj": ("v_proj",),
        "k_proj": ("q_proj", "v_proj"),
        "v_proj": ("q_proj",),
        "up_proj": ("gate_proj",),
        "q_a_proj": ("kv_a_proj_with_mqa",),
        "kv_a_proj_with_mqa": ("q_a_proj",),
    },
)

# llama.cpp b11434. convert_lora_to_gguf.py: lora_A, lora_B, lora_embedding_A and _B, nothing else; conversion/gpt2.py
# transposes Conv1D's weight, and with it updates, which PEFT does not keep transposed. src/llama-adapter.h: get_scale.
LLAMACPP = Server("llamacpp", "llama.cpp", turned=False)

# Ollama at fb30760. llm/llama_server.go: it hands adapters in GGUF to llama.cpp's server. Its own converter
# (convert/convert_llama_adapter.go) permutes the rows of q_proj's and k_proj's A, where llama.cpp permutes B's.
OLLAMA = replace(LLAMACPP, name="ollama", title="Ollama")


@dataclass(frozen=True)
class ServedFacts:
    """The server that an adapter is written for, by name, and the rank and alpha of its every layer."""

    server: str
    rank: int


SERVERS: dict[str, Server] = {one.name: one for one in (VLLM, SGLANG, LLAMACPP, OLLAMA)}


def get_server(name: str) -> Server:
    """Return the server of this name. Raises LoraloomError for an unknown one."""
    if name not in SERVERS:
        raise LoraloomError(f"no server is called {name!r}", did_you_mean(name, SERVERS))
    return SERVERS[name]


def fit_server(
    server: Server,
    what: str,
    ranks: Mapping[str, int],
    forms: Mapping[str, Form],
    *,
    turned: bool = False,
    head: Collection[str] = (),
) -> ServedFacts:
    """Return how an adapter is written for a server; see `serving_problems`. `what` names it in messages.

    Raises LoraloomError with every reason why the server would not take it as it is meant.
    """
    problems = serving_problems(server, ranks, forms, turned=turned, head=head)
    hint = "nothing was written; what a server does not adapt can go into the base's weights: merge by --fuse-into BASE"
    raise_problems(f"{what} cannot be an adapter of {server.title}", problems, hint)
    largest = max(ranks.values())
    return ServedFacts(server.name, next((rank for rank in server.ranks if rank >= largest), largest))


def serving_problems(
    server: Server,
    ranks: Mapping[str, int],
    forms: Mapping[str, Form],
    *,
    turned: bool = False,
    head: Collection[str] = (),
) -> list[str]:
    """Return all that keeps a server from taking an adapter as it is meant.

    ranks: by module path, of every layer, at most.
    forms: of the layers that are not linear.
    turned: whether its linear layers are Conv1D's (`fan_in_fan_out`).
    head: parameters that the adapter would hold whole.
    """
    problems = []
    most = server.ranks[-1] if server.ranks else max(ranks.values())
    large = [module for module, rank in ranks.items() if rank > most]
    if large:
        rank = max(ranks.values())
        problems.append(f"rank {rank} in {first_few(large)}: {server.title} takes {most} at most; use --rank {most}")
    for what, modules in _untaken(server, ranks, forms).items():
        problems.append(f"{first_few(modules)}: {server.title} adapts no {what}")
    problems += _unstacked(server, ranks)
    if turned and not server.turned:
        problems.append(f"fan_in_fan_out: {server.title}'s converter transposes the updates of GPT-2's Conv1D")
    if head:
        problems.append(
            f"{first_few(sorted(head))}: {server.title} takes no weights that are saved whole, a head or others"
        )
    return problems


def _untaken(server: Server, ranks: Mapping[str, int], forms: Mapping[str, Form]) -> dict[str, list[str]]:
    """Return the layers that a server does not adapt, by what they are."""
    found: dict[str, list[str]] = {}
    for module in ranks:
        last, form = module.rpartition(".")[2], forms.get(module)
        if form is None and (server.layers is None or last in server.layers):
            continue
        if form is not None and form.kind == "embedding" and last in server.words:
            continue
        what = _FORMS[form.kind] if form else f"layer called {last}"
        found.setdefault(what, []).append(form.module if form and form.module else module)
    return {what: list(dict.fromkeys(modules)) for what, modules in found.items()}


def _unstacked(server: Server, ranks: Mapping[str, int]) -> list[str]:
    """Tell the layers that a server would stack with others that are not adapted."""
    found: dict[tuple[str, str], list[str]] = {}
    for module in ranks:
        block, _, last = module.rpartition(".")
        lacking = [other for other in server.needs.get(last, ()) if f"{block}.{other}" not in ranks]
        if lacking:
            found.setdefault((last, " and ".join(lacking)), []).append(module)
    return [
        f"{first_few(modules)}: {server.title} stacks {last} with {others}, which the adapter lacks there"
        for (last, others), modules in found.items()
    ]
