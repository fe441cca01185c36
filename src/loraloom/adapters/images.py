"""Image LoRAs: how diffusers and kohya-ss' sd-scripts name the layers of a pipeline, and what one calls the other's.

diffusers names a part of the pipeline and the module's path in it, `unet.mid_block.attentions.0.proj_in`. kohya-ss has
`lora_unet_mid_block_attentions_0_proj_in`: dots and underscores in one, so the path is found again from the words that
diffusers' models are made of. For SDXL it trains the UNet under the names of the original, `input_blocks_4_1`.
"""

from __future__ import annotations

import re

from loraloom.adapters.names import DDP, WRAPPERS, Factor

_PARTS = {"A": "A", "down": "A", "B": "B", "up": "B", "alpha": "alpha"}
_ADAPTER = r"(?:\.(?P<adapter>[^.]+))?"
# PEFT's names inside a part; diffusers' of 2023; of its text encoders; of its attention processors
_DIFFUSERS = (
    re.compile(rf"(?P<path>.+)\.lora_(?P<part>[AB]){_ADAPTER}\.weight"),
    re.compile(r"(?P<path>.+)\.(?:lora\.|lora_linear_layer\.|lora_)(?P<part>down|up)\.weight"),
    re.compile(r"(?P<path>.+)\.to_(?P<leaf>q|k|v|out)_lora\.(?P<part>down|up)\.weight"),
    re.compile(r"(?P<path>.+?)(?:\.to_(?P<leaf>q|k|v|out)_lora)?\.(?P<part>alpha)"),
)
_COMPONENT = re.compile(
    r"(unet|transformer(_\d|_ref)?|text_encoder(_\d)?|diffusion_model|prior|controlnet|connectors|text_conditioner)\."
)
# what a UNet or a transformer is saved with alone, without the name of its part
_ALONE = {
    "unet.": ("down_blocks.", "mid_block.", "up_blocks.", "conv_in.", "conv_out.", "time_embedding.", "add_embedding."),
    "transformer.": ("transformer_blocks.", "single_transformer_blocks."),
}
_KOHYA = re.compile(
    rf"(?P<module>lora_[a-z0-9]+_[^.]+)\.(?:lora_(?P<part>down|up|[AB]){_ADAPTER}\.weight|(?P<alpha>alpha))"
)
_ORIGINAL = re.compile(r"lora_unet_(input_blocks|middle_block|output_blocks|time_embed_|label_emb|out_\d)")
# parts of a pipeline, of which a LoRA has one at most: two names of them are two ways to name one
DENOISERS = ("unet", "transformer", "diffusion_model", "prior")
_TO_KOHYA = {
    "unet": "lora_unet",
    "transformer": "lora_transformer",
    "text_encoder": "lora_te",
    "text_encoder_2": "lora_te2",
    "text_encoder_3": "lora_te3",
}
_FROM_KOHYA = {**{stem: part for part, stem in _TO_KOHYA.items()}, "lora_te1": "text_encoder"}


def diffusers_factor(key: str) -> Factor | None:
    """Return what a tensor's name says in one of diffusers' styles, or None where it is in none of them."""
    written = ".".join(part for part in key.removeprefix(DDP).split(".") if part not in WRAPPERS)
    match = next(
        (found for style in _DIFFUSERS if (found := style.fullmatch(written.replace(".processor.", ".")))), None
    )
    if match is None:
        return None
    said = match.groupdict()
    path = said["path"]
    alone = "" if _COMPONENT.match(path) else next((of for of, starts in _ALONE.items() if path.startswith(starts)), "")
    if path.startswith("transformer.h.") or not (alone or _COMPONENT.match(path)):  # the first are GPT-2's and Falcon's
        return None
    component, _, inner = (alone + path).partition(".")
    encoder = component.startswith("text_encoder")
    if said.get("leaf"):
        heads = {"out": "out_proj" if encoder else "to_out.0"}
        inner += "." + heads.get(said["leaf"], f"{said['leaf']}_proj" if encoder else f"to_{said['leaf']}")
    if encoder and inner.startswith("encoder.layers."):  # CLIP's, whose outer name transformers 5 left out
        inner = f"text_model.{inner}"
    return Factor(f"{component}.{inner}", _PARTS[said["part"]], path, said.get("adapter") or "")


def kohya_factor(key: str) -> Factor | None:
    """Return what a tensor's name says in kohya-ss' style, or None where it is in another."""
    plain = ".".join(part for part in key.removeprefix(DDP).split(".") if part not in WRAPPERS)
    match = _KOHYA.fullmatch(plain)
    if match is None:
        return None
    module = match["module"].replace("__orig_mod_", "_")  # torch.compile's mark, flattened too
    return Factor(module, _PARTS[match["part"] or "alpha"], module, match["adapter"] or "")


def component_of(module: str) -> str:
    """Return the part of a pipeline that a module named by diffusers or kohya-ss is of, as diffusers calls it."""
    if module.startswith("lora_"):
        stem = "_".join(module.split("_", 2)[:2])
        return _FROM_KOHYA.get(stem, stem)
    return module.partition(".")[0]


def is_original(module: str) -> bool:
    """Tell whether kohya-ss' name of a layer is that of the original UNet, not of diffusers'."""
    return (
        re.match(r"lora_unet_(input_blocks|middle_block|output_blocks|time_embed_|label_emb|out_\d)", module)
        is not None
    )


def kohya_module(module: str, *, numbered: bool) -> str | None:
    """Return what kohya-ss calls a module that diffusers calls `module`, or None where it has no such part.

    numbered: whether the first text encoder has a number.
    """
    component, _, path = module.partition(".")
    stem = "lora_te1" if numbered and component == "text_encoder" else _TO_KOHYA.get(component)
    return f"{stem}_{path.replace('.', '_')}" if stem and path else None


def diffusers_module(module: str) -> str | None:
    """Return what diffusers calls a module that kohya-ss calls `module`; None where that cannot be told."""
    first, second, flat = module.split("_", 2)
    component = _FROM_KOHYA.get(f"{first}_{second}")
    path = _original(flat) if is_original(module) else _dotted(flat)
    return f"{component}.{path}" if component and path else None


# names of modules with an underscore inside, and those without; of diffusers' UNets and transformers, CLIP and T5
_COMPOUND = """
down_blocks up_blocks mid_block transformer_blocks single_transformer_blocks to_q to_k to_v to_out add_q_proj add_k_proj
add_v_proj to_add_out proj_in proj_out proj_mlp conv_in conv_out conv_shortcut time_emb_proj time_embedding
add_embedding time_text_embed timestep_embedder text_embedder guidance_embedder context_embedder x_embedder pos_embed
norm_out norm1_context ff_context linear_1 linear_2 linear_3 cond_proj encoder_hid_proj text_model self_attn q_proj
k_proj v_proj out_proj text_projection wi_0 wi_1 caption_projection adaln_single
"""
_SIMPLE = """
attentions resnets downsamplers upsamplers attn attn1 attn2 ff net proj conv conv1 conv2 norm norm1 norm2 linear encoder
layers mlp fc1 fc2 block layer SelfAttention DenseReluDense EncDecAttention q k v o wi wo shared emb
"""
_WORDS = re.compile(rf"({'|'.join(sorted((_COMPOUND + _SIMPLE).split(), key=len, reverse=True))}|\d+)(?=_|$)")


def _dotted(flat: str) -> str | None:
    """Return the path whose dots kohya-ss wrote as underscores, from the words that it is made of; None for others."""
    words, at = [], 0
    while at < len(flat):
        match = _WORDS.match(flat, at)
        if match is None:
            return None
        words.append(match[0])
        at = match.end() + 1
    return ".".join(words) if words and not flat.endswith("_") else None


# the original SDXL UNet's names of what diffusers calls so, after make_unet_conversion_map of sd-scripts
_OF_RESNET = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_OUTSIDE = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
}
_MIDDLE = {0: "resnets.0", 1: "attentions.0", 2: "resnets.1"}


def _original(flat: str) -> str | None:
    """Return diffusers' path of a layer of the original UNet, three layers a block as all of Stable Diffusion have."""
    if flat in _OUTSIDE:
        return _OUTSIDE[flat]
    if middle := re.fullmatch(r"middle_block_([012])_(.+)", flat):
        return _inside(f"mid_block.{_MIDDLE[int(middle[1])]}", middle[2])
    match = re.fullmatch(r"(input|output)_blocks_(\d+)_([012])_(.+)", flat)
    if match is None:
        return None
    down, number, kind, rest = match[1] == "input", int(match[2]), int(match[3]), match[4]
    block, layer = divmod(number - 1 if down else number, 3)
    if block < 0:
        return None
    place = f"{'down' if down else 'up'}_blocks.{block}"
    if down and (kind, rest, layer) == (0, "op", 2):
        return f"{place}.downsamplers.0.conv"
    if not down and kind and (rest, layer) == ("conv", 2):
        return f"{place}.upsamplers.0.conv"
    if kind == 2 or (down and layer == 2):
        return None
    return _inside(f"{place}.{('resnets', 'attentions')[kind]}.{layer}", rest)


def _inside(place: str, rest: str) -> str | None:
    inner = _OF_RESNET.get(rest) if ".resnets." in place else _dotted(rest)
    return f"{place}.{inner}" if inner else None
