"""The base model: found by hub name or folder, loaded as what it is to be, with or without a head; its tokenizer.

No code that comes with a model is ever run, nor is the person at the terminal asked whether it may.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from loraloom.adapters.bases import PACKAGED
from loraloom.adapters.config import read_config
from loraloom.errors import LoraloomError, first_line, reads_file
from loraloom.files.hashing import sampled_sha256
from loraloom.files.reading import check_fetched, read_json_object
from loraloom.model.architecture import quietly, unlikely_sizes
from loraloom.model.packaged import packaged_base

_NOT_ONE_MODEL = "config.json and the weights are not of one model; copy both from the same place"
_UNSTORED = 1 << 24  # values of a model that no file holds, where the file is small
_MODEL_HINT = "name a model on the hub, or a local folder with config.json and safetensors"


@reads_file
def load_tokenizer(base: str) -> Any:
    """Return the tokenizer of `base`, with a padding token. Raises LoraloomError where it has none."""
    folder, hint = base_folder(base), "put tokenizer.json and tokenizer_config.json of the base into its folder"
    with _told(base, "the base model has no tokenizer that can be loaded", hint):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            # transformers makes an empty tokenizer from config.json alone
            raise LoraloomError(f"{base}: the base model's tokenizer has no words", hint)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token_id is None:
            raise LoraloomError(
                f"{base}: its tokenizer has neither a padding token nor an end token",
                "name one as pad_token in tokenizer_config.json",
            )
    return tokenizer


@reads_file
def load_classifier(base: str, outputs: int, *, regression: bool = False, seed: int = 0) -> PreTrainedModel:
    """Return `base` as a sequence classifier with a fresh head, float32.

    base: hub name or folder.
    outputs: logits of the head.
    regression: whether the one output is a number, which transformers' loss must know.
    seed: from which the head is drawn.

    Modules of the backbone that the weights lack (a pooler) are drawn too; `head_modules` counts them to the head.

    Raises LoraloomError where `base` is not a model that transformers can classify with.
    """
    torch.manual_seed(seed)
    with _told(base, "cannot be loaded as a sequence classifier", _MODEL_HINT):
        config = AutoConfig.from_pretrained(base_folder(base), trust_remote_code=False)
        config.num_labels = outputs
        config.problem_type = "regression" if regression else "single_label_classification"
        return _loaded(base, AutoModelForSequenceClassification, config)


@reads_file
def load_generator(base: str) -> PreTrainedModel:
    """Return `base` as a language model, decoder alone or encoder-decoder, float32.

    Raises LoraloomError where `base` is not a model that transformers can write with.
    """
    with _told(base, "cannot be loaded as a language model", _MODEL_HINT):
        config = AutoConfig.from_pretrained(base_folder(base), trust_remote_code=False)
        return _loaded(base, AutoModelForSeq2SeqLM if is_two_sided(base) else AutoModelForCausalLM, config)


@reads_file
def is_two_sided(base: str) -> bool:
    """Tell whether `base` writes with an encoder beside its decoder. Raises LoraloomError where it writes no text."""
    with _told(base, "cannot be loaded as a language model", _MODEL_HINT):
        config = AutoConfig.from_pretrained(base_folder(base), trust_remote_code=False)
    two_sided = type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING and config.is_encoder_decoder
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if not two_sided and (masked or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING):
        raise LoraloomError(
            f"{base}: a {config.model_type} model writes no text",
            "name a causal or sequence-to-sequence base, or make the task one of classes",
        )
    return bool(two_sided)


@reads_file
def read_context(base: str) -> int | None:
    """Return the most tokens that `base` takes, without its weights; None where it says of no bound."""
    with _told(base, "cannot be loaded as a language model", _MODEL_HINT):
        return context_of(AutoConfig.from_pretrained(base_folder(base), trust_remote_code=False))


def context_of(config: Any) -> int | None:
    """Return the most tokens that a model with this config takes; None where it says of no bound."""
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


@reads_file
def load_backbone(base: str) -> nn.Module:
    """Return `base` to run texts through, float32: its layers have the paths that adapters of a model with a head use.

    That is a sequence classifier where transformers has one for this architecture, because the adapters of such bases
    are trained in it; its head of two labels is fresh and of no use. Every other architecture comes without a head,
    under the name that its models with a head give it.

    Raises LoraloomError where `base` is not a model that transformers can load.
    """
    torch.manual_seed(0)
    with _told(base, "cannot be loaded", _MODEL_HINT):
        config = AutoConfig.from_pretrained(base_folder(base), trust_remote_code=False)
        if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            return load_classifier(base, outputs=2)
        model = _loaded(base, AutoModel, config)
        return Headless(model) if model.base_model_prefix else model


class Headless(nn.Module):
    """A model without a head, as the child that it is in a model with one: `model.layers.0` of Granite, say.

    Transformers names that child in `base_model_prefix`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.base_model_prefix, self.config = model.base_model_prefix, model.config
        self.name_or_path = model.name_or_path
        self.add_module(model.base_model_prefix, model)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> Any:
        """Run the model; a decoder beside an encoder reads the texts shifted right, as in a sequence classifier."""
        more = {"decoder_input_ids": decoder_input_ids, "decoder_attention_mask": decoder_attention_mask}
        if getattr(self.config, "is_encoder_decoder", False) and decoder_input_ids is None:
            start = torch.full_like(input_ids[:, :1], self.config.decoder_start_token_id)
            more["decoder_input_ids"] = torch.cat([start, input_ids[:, :-1]], dim=1)
        given = {name: tensor for name, tensor in more.items() if tensor is not None}
        return self._model(input_ids=input_ids, attention_mask=attention_mask, **given)

    def get_encoder(self) -> Any:
        """Return the encoder of an encoder-decoder."""
        return self._model.get_encoder()

    def get_decoder(self) -> Any:
        """Return the decoder of an encoder-decoder."""
        return self._model.get_decoder()

    @property
    def _model(self) -> Any:
        return getattr(self, self.base_model_prefix)


def _loaded(base: str, of: Any, config: Any) -> PreTrainedModel:
    folder = base_folder(base)
    _check_index(base, Path(folder))
    with quietly():
        _check_size(base, Path(folder), of, config)
        model, info = of.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    model.fresh = _fresh_modules(model, info["missing_keys"], base)
    # decoders find the last token by it, so it must be the one that the batches are padded with
    model.config.pad_token_id = load_tokenizer(base).pad_token_id
    return cast(PreTrainedModel, model)


def _check_index(base: str, folder: Path) -> None:
    """Raise where the index of the weights names what is no file of the folder: transformers would read it."""
    path = folder / "model.safetensors.index.json"
    home = read_json_object(path, "download it again").get("weight_map") if path.is_file() else {}
    names = home.values() if isinstance(home, dict) else [home]
    foreign = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if foreign:
        raise LoraloomError(f"{base}: {path.name} names {foreign[0]!r}, which is no file of the folder", _MODEL_HINT)


def _check_size(base: str, folder: Path, of: Any, config: Any) -> None:
    """Raise where config.json describes a model far larger than its weights, whose rest would be drawn at random.

    Weights in 4 bits have two values a byte; masks, and tables of positions, are in no file.
    """
    fault = unlikely_sizes(config.to_dict())
    if fault:
        raise LoraloomError(f"{base}: config.json says that {fault}, which no model has", _NOT_ONE_MODEL)
    with torch.device("meta"):
        model = of.from_config(config, trust_remote_code=False)
    values = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    stored = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    if values > 4 * stored + _UNSTORED:
        raise LoraloomError(
            f"{base}: config.json describes a model of {values:.2g} values, its weights have {stored:.2g} bytes",
            _NOT_ONE_MODEL,
        )


@contextmanager
def _told(base: str, what: str, hint: str) -> Iterator[None]:
    """Tell as LoraloomError what transformers raises for a base that is not as it should be: errors of every kind."""
    try:
        yield
    except LoraloomError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise LoraloomError(
                f"{base}: needs code of its own (auto_map in config.json), which loraloom does not run",
                "use a base whose architecture is part of transformers",
            ) from error
        for path in sorted(Path(base).glob("*")):
            if path.is_file():
                check_fetched(path)
        raise LoraloomError(f"{base}: {what}: {first_line(error)}", hint) from error


def _fresh_modules(model: torch.nn.Module, missing: set[str], base: str) -> list[str]:
    """Return the modules of the backbone that were not in the base's weights; raise where that is most of it."""
    names = [name for name, _ in model.named_parameters()]
    backbone = [name for name in names if name.startswith(f"{model.base_model_prefix}.")] or names  # has no head itself
    fresh = sorted(set(missing) & set(backbone))
    if len(fresh) > len(backbone) / 2:
        raise LoraloomError(
            f"{base}: its weights lack {len(fresh)} of the backbone's {len(backbone)} tensors, {fresh[0]} first",
            _NOT_ONE_MODEL,
        )
    return sorted({name.rpartition(".")[0] for name in fresh})


def head_modules(model: torch.nn.Module) -> list[str]:
    """Return the modules of a `load_classifier` model that are the task's own: the head, and what the base lacks."""
    prefix = str(model.base_model_prefix)
    beside = [
        name for name, child in model.named_children() if name != prefix and any(True for _ in child.parameters())
    ]
    return [*beside, *getattr(model, "fresh", [])]


def base_folder(base: str) -> str:
    """Return the local folder of `base`: a folder as given, a packaged model's (`demo`, `smollm2`), or a hub snapshot.

    Raises LoraloomError where it is neither a folder nor on the hub, or is an adapter's folder.
    """
    if base in PACKAGED:
        return str(packaged_base(base))
    if Path(base).is_dir():
        return _without_adapter(base, base)
    if base.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
        raise LoraloomError(f"{base}: the base model's folder does not exist", "name its folder, or a model on the hub")
    try:
        folder = str(snapshot_download(base, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise LoraloomError(
            f"{base}: not a local folder, and the hub could not give it: {first_line(error)}",
            "name a local folder that holds it (--base FOLDER)",
        ) from error
    return _without_adapter(base, folder)


def _without_adapter(base: str, folder: str) -> str:
    """Return `folder`; raise where transformers would load the adapter in it, on the base that the adapter names."""
    if (Path(folder) / "adapter_config.json").exists():
        raise LoraloomError(
            f"{base}: holds adapter_config.json, so it is an adapter and not a base model",
            "name the base that the adapter was trained on",
        )
    return folder


def base_of(adapter: str | Path) -> str:
    """Return the base model that an adapter's folder names. Raises LoraloomError where it names none."""
    base = read_config(Path(adapter)).get("base_model_name_or_path")
    if not base:
        raise LoraloomError(f"{adapter}: names no base model", "name it by --base BASE")
    return str(base)


@reads_file
def base_sha256(base: str) -> str:
    """Return a sha256 over config and weights of `base`: whole small files, and evenly spaced blocks of large ones."""
    folder = Path(base_folder(base))
    paths = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), folder / "config.json"])
    for path in paths:
        if not path.is_file():
            raise LoraloomError(f"{path}: missing", "name a folder that transformers can load")
    return sampled_sha256(paths)
