"""Tiny adapters of language models, as PEFT saves them, with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import tiny

# turns as `<user> words </s>`, in words that the tiny tokenizer knows
CHAT = (
    "{% for turn in messages %}{% if turn['role'] == 'assistant' %}the {{ turn['content'] }} </s> "
    "{% else %}a {{ turn['content'] }} {% endif %}{% endfor %}{% if add_generation_prompt %}the {% endif %}"
)


def writer_base(folder: Path, kind: str = "llama", *, chat: bool = False) -> Path:
    """Write a tiny random causal base (llama, gpt2), with a chat template where asked."""
    tiny.base_folder(kind, folder)
    if chat:
        tokenizer = tiny.tokenizer(kind)
        tokenizer.chat_template = CHAT
        tokenizer.save_pretrained(folder)
    return folder


def writer_adapter(
    base: Path, folder: Path, *, kind: str = "llama", rank: int = 2, seed: int = 0, loud: float = 0.3
) -> Path:
    """Write an adapter of a language model whose A and B are drawn from `seed`."""
    of = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    task_type = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=tiny.TARGETS[kind], task_type=task_type)
    model = get_peft_model(of.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(loud * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder
