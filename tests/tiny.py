"""Tiny random base models with a tokenizer of their own, as Hugging Face folders; and a tiny task they can learn."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
)

from loraloom.tasks.generate import Generate
from loraloom.tasks.task import Task

GOOD = ["good", "great", "fine", "warm", "bright"]
BAD = ["bad", "poor", "cold", "dark", "dull"]
NEUTRAL = ["a", "the", "one", "that", "tea", "day", "room", "film", "road", "song", "was", "very"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
WORDS = {word: index for index, word in enumerate(SPECIAL + GOOD + BAD + NEUTRAL)}

_COMMON = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_DISTILBERT = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "dropout": 0.0, "attention_dropout": 0.0}
_CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 40}
_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
CONFIGS: dict[str, Any] = {
    "bert": lambda: BertConfig(**_COMMON, **_BERT, **_CALM),
    "roberta": lambda: RobertaConfig(**_COMMON, **_BERT, **_CALM, type_vocab_size=1),
    "distilbert": lambda: DistilBertConfig(**_COMMON, **_DISTILBERT, max_position_embeddings=40),
    "llama": lambda: LlamaConfig(**_COMMON, **_BERT, num_key_value_heads=1, max_position_embeddings=40),
    "gpt2": lambda: GPT2Config(**_COMMON, **_GPT2, attn_pdrop=0.0),
    "t5": lambda: T5Config(**_COMMON, **_T5, decoder_start_token_id=0),
}
# what LoRA adapts in each
TARGETS = {
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "llama": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "t5": ["q", "v"],
}

CHAT = (
    "{% for turn in messages %}<s> {{ turn.role }} {{ turn.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


def tokenizer(kind: str, padding_side: str = "right") -> PreTrainedTokenizerFast:
    """A WordLevel tokenizer whose ids fit every config here; encoders and T5 close a text with </s>."""
    words = Tokenizer(WordLevel(WORDS, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    if kind not in ("llama", "gpt2"):
        words.post_processor = TemplateProcessing(
            single="$A </s>" if kind == "t5" else "<s> $A </s>",
            pair="$A $B </s>" if kind == "t5" else "<s> $A </s> $B </s>",
            special_tokens=[("<s>", 1), ("</s>", 2)],
        )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        padding_side=padding_side,
        model_input_names=["input_ids", "attention_mask"],
        **names,
    )


def base_folder(kind: str, folder: Path, *, padding_side: str = "right", seed: int = 0) -> Path:
    """Write a tiny random base model of `kind` (see CONFIGS) with its tokenizer; causal LMs for decoders."""
    torch.manual_seed(seed)
    of = AutoModelForCausalLM if kind in ("llama", "gpt2") else AutoModel
    model = of.from_config(CONFIGS[kind]())
    with torch.no_grad():
        for parameter in model.parameters():  # wider than the usual start, so that features differ between texts
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    tokenizer(kind, padding_side).save_pretrained(folder)
    return folder


def task(name: str = "mood", *, regression: bool = False, rows: int = 24, seed: int = 0) -> Task:
    """Texts of ragged length with good or bad words; the label is which of them are more, or by how much."""
    chance = random.Random(f"{name}{seed}")

    def split(count: int) -> Dataset:
        found = []
        for _ in range(count):
            words = chance.choices(NEUTRAL, k=chance.randint(1, 9))
            mood = [chance.choice((GOOD, BAD)) for _ in range(chance.choice((1, 3)))]
            words += [chance.choice(side) for side in mood]
            chance.shuffle(words)
            level = sum(1 if side is GOOD else -1 for side in mood)
            found.append({"text_a": " ".join(words), "label": float(level) if regression else int(level > 0)})
        return Dataset.from_list(found)

    labels = None if regression else ("bad", "good")
    metric = "pearson_spearman" if regression else "accuracy"
    return Task(name, labels, metric, split(rows), split(rows // 2), split(rows // 2 + 1))


def asked(name: str = "mood", *, rows: int = 24, chat: bool = True) -> Task:
    """The same texts as prompts; the answer is the text's first good or bad word, and which of both it is."""
    texts, moods = task(name, rows=rows), {**dict.fromkeys(GOOD, "good"), **dict.fromkeys(BAD, "bad")}

    def answered(split: Dataset) -> Dataset:
        found = []
        for text in split["text_a"]:
            word = next(word for word in text.split() if word in moods)
            row: dict[str, Any] = {"text_a": text, "label": f"{word} {moods[word]}"}
            found.append({**row, "history": None} if chat else row)
        return Dataset.from_list(found)

    splits = {split: answered(getattr(texts, split)) for split in ("train", "heldout", "test")}
    return Task(name, None, "exact_match", **splits, also=("token_f1",), answering=Generate(answer_tokens=4))
