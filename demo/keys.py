"""The tables between diffusers' names and the ComfyUI/SGM checkpoint layout, both ways: Stable Video Diffusion's and
Stable Diffusion 1.5's.

A table is built from the architecture's sizes, name by name, and is a bijection (held by a test): every tensor of
diffusers' UNet and VAE has exactly one place in the checkpoint, and none is left over. Two remarks:

- attention in the VAE is a linear layer in diffusers and a 1x1 convolution in the checkpoint: the same numbers with two
  axes more;
- diffusers' VAE has a `quant_conv` that SVD's checkpoint does not: it is the identity and is never stored.

The image encoder keeps transformers' names under SGM's prefix, and the text encoder under Stable Diffusion's, because
both faces use them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .models import ImageToVideoConfig
from .text_to_image import TextToImageConfig

UNET_PREFIX, VAE_PREFIX, CLIP_PREFIX = "model.diffusion_model.", "first_stage_model.", "conditioner.embedders.0."
TEXT_PREFIX, TEXT_MODEL = "cond_stage_model.transformer.", "text_model."
QUANT_CONV = ("quant_conv.weight", "quant_conv.bias")

Table = dict[str, str]  # diffusers' name -> the checkpoint's name

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
}
_BLOCK = [  # one transformer block: the same names in both faces
    *(f"norm{i}.{p}" for i in (1, 2, 3) for p in ("weight", "bias")),
    *(f"attn{i}.to_{x}.weight" for i in (1, 2) for x in "qkv"),
    *(f"attn{i}.to_out.0.{p}" for i in (1, 2) for p in ("weight", "bias")),
    *(f"ff.net.{x}.{p}" for x in ("0.proj", "2") for p in ("weight", "bias")),
]
_TEMPORAL_BLOCK = _BLOCK + [
    *(f"norm_in.{p}" for p in ("weight", "bias")),
    *(f"ff_in.net.{x}.{p}" for x in ("0.proj", "2") for p in ("weight", "bias")),
]


def _both(table: Table, theirs: str, ours: str) -> None:
    """A layer with a weight and a bias."""
    table[f"{theirs}.weight"], table[f"{theirs}.bias"] = f"{ours}.weight", f"{ours}.bias"


def _image_resnet(table: Table, theirs: str, ours: str, widens: bool) -> None:
    for a, b in _RESNET.items():
        _both(table, f"{theirs}.{a}", f"{ours}.{b}")
    if widens:
        _both(table, f"{theirs}.conv_shortcut", f"{ours}.skip_connection")


def _resnet(table: Table, theirs: str, ours: str, widens: bool) -> None:
    _image_resnet(table, f"{theirs}.spatial_res_block", ours, widens)
    for a, b in _RESNET.items():
        _both(table, f"{theirs}.temporal_res_block.{a}", f"{ours}.time_stack.{b}")
    table[f"{theirs}.time_mixer.mix_factor"] = f"{ours}.time_mixer.mix_factor"


def _image_attention(table: Table, theirs: str, ours: str) -> None:
    for layer in ("norm", "proj_in", "proj_out"):
        _both(table, f"{theirs}.{layer}", f"{ours}.{layer}")
    for name in _BLOCK:
        table[f"{theirs}.transformer_blocks.0.{name}"] = f"{ours}.transformer_blocks.0.{name}"


def _attention(table: Table, theirs: str, ours: str) -> None:
    _image_attention(table, theirs, ours)
    for name in _TEMPORAL_BLOCK:
        table[f"{theirs}.temporal_transformer_blocks.0.{name}"] = f"{ours}.time_stack.0.{name}"
    for a, b in (("linear_1", "0"), ("linear_2", "2")):
        _both(table, f"{theirs}.time_pos_embed.{a}", f"{ours}.time_pos_embed.{b}")
    table[f"{theirs}.time_mixer.mix_factor"] = f"{ours}.time_mixer.mix_factor"


def unet_table(config: ImageToVideoConfig = ImageToVideoConfig()) -> Table:
    """Names of diffusers' UNet -> names under `model.diffusion_model.`; one ResNet and attention a level."""
    table: Table = {}
    _both(table, "conv_in", "input_blocks.0.0")
    for a, b in (("linear_1", "0"), ("linear_2", "2")):
        _both(table, f"time_embedding.{a}", f"time_embed.{b}")
        _both(table, f"add_embedding.{a}", f"label_emb.0.{b}")
    widths = config.unet_channels
    levels = len(widths)
    for i in range(levels):
        _resnet(
            table, f"down_blocks.{i}.resnets.0", f"input_blocks.{1 + 2 * i}.0", i > 0 and widths[i] != widths[i - 1]
        )
        _attention(table, f"down_blocks.{i}.attentions.0", f"input_blocks.{1 + 2 * i}.1")
        if i < levels - 1:
            _both(table, f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{2 + 2 * i}.0.op")
    for i in range(2):
        _resnet(table, f"mid_block.resnets.{i}", f"middle_block.{2 * i}", False)
    _attention(table, "mid_block.attentions.0", "middle_block.1")
    for i in range(levels):
        for j in range(2):
            _resnet(table, f"up_blocks.{i}.resnets.{j}", f"output_blocks.{2 * i + j}.0", True)  # a skip is concatenated
            _attention(table, f"up_blocks.{i}.attentions.{j}", f"output_blocks.{2 * i + j}.1")
        if i < levels - 1:
            _both(table, f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{2 * i + 1}.2.conv")
    _both(table, "conv_norm_out", "out.0")
    _both(table, "conv_out", "out.2")
    return table


def image_unet_table(config: TextToImageConfig = TextToImageConfig()) -> Table:
    """Names of the text-to-image UNet -> names under `model.diffusion_model.`; one ResNet a level, the last level
    without attention."""
    table: Table = {}
    _both(table, "conv_in", "input_blocks.0.0")
    for a, b in (("linear_1", "0"), ("linear_2", "2")):
        _both(table, f"time_embedding.{a}", f"time_embed.{b}")
    widths = config.unet_channels
    last = len(widths) - 1
    for i in range(last + 1):
        theirs, ours = f"down_blocks.{i}", f"input_blocks.{1 + 2 * i}"
        _image_resnet(table, f"{theirs}.resnets.0", f"{ours}.0", i > 0 and widths[i] != widths[i - 1])
        if i < last:
            _image_attention(table, f"{theirs}.attentions.0", f"{ours}.1")
            _both(table, f"{theirs}.downsamplers.0.conv", f"input_blocks.{2 + 2 * i}.0.op")
    for i in range(2):
        _image_resnet(table, f"mid_block.resnets.{i}", f"middle_block.{2 * i}", False)
    _image_attention(table, "mid_block.attentions.0", "middle_block.1")
    for i in range(last + 1):
        theirs = f"up_blocks.{i}"
        for j in range(2):
            ours = f"output_blocks.{2 * i + j}"
            _image_resnet(table, f"{theirs}.resnets.{j}", f"{ours}.0", True)  # a skip is concatenated
            if i > 0:
                _image_attention(table, f"{theirs}.attentions.{j}", f"{ours}.1")
        if i < last:
            place = 2 if i > 0 else 1  # behind the attention, where there is one
            _both(table, f"{theirs}.upsamplers.0.conv", f"output_blocks.{2 * i + 1}.{place}.conv")
    _both(table, "conv_norm_out", "out.0")
    _both(table, "conv_out", "out.2")
    return table


def _vae_resnet(table: Table, theirs: str, ours: str, changes: bool) -> None:
    for layer in ("norm1", "conv1", "norm2", "conv2"):
        _both(table, f"{theirs}.{layer}", f"{ours}.{layer}")
    if changes:
        _both(table, f"{theirs}.conv_shortcut", f"{ours}.nin_shortcut")


def _vae_temporal_resnet(table: Table, theirs: str, ours: str, changes: bool) -> None:
    _vae_resnet(table, f"{theirs}.spatial_res_block", ours, changes)
    for a, b in _RESNET.items():
        if a != "time_emb_proj":
            _both(table, f"{theirs}.temporal_res_block.{a}", f"{ours}.time_stack.{b}")
    table[f"{theirs}.time_mixer.mix_factor"] = f"{ours}.mix_factor"


def _vae_attention(table: Table, theirs: str, ours: str) -> None:
    for a, b in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        _both(table, f"{theirs}.{a}", f"{ours}.{b}")


def vae_table(config: ImageToVideoConfig = ImageToVideoConfig()) -> Table:
    """Names of AutoencoderKLTemporalDecoder -> names under `first_stage_model.`; one ResNet a level, no quant_conv."""
    table: Table = {}
    widths = config.vae_channels
    levels = len(widths)
    for half, resnet in (("encoder", _vae_resnet), ("decoder", _vae_temporal_resnet)):
        for layer, name in (("conv_in", "conv_in"), ("conv_norm_out", "norm_out"), ("conv_out", "conv_out")):
            _both(table, f"{half}.{layer}", f"{half}.{name}")
        _vae_attention(table, f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1")
        for i in range(2):
            resnet(table, f"{half}.mid_block.resnets.{i}", f"{half}.mid.block_{i + 1}", False)
    _both(table, "decoder.time_conv_out", "decoder.conv_out.time_mix_conv")
    for i in range(levels):
        changes = i > 0 and widths[i] != widths[i - 1]
        _vae_resnet(table, f"encoder.down_blocks.{i}.resnets.0", f"encoder.down.{i}.block.0", changes)
        if i < levels - 1:
            _both(table, f"encoder.down_blocks.{i}.downsamplers.0.conv", f"encoder.down.{i}.downsample.conv")
        level = levels - 1 - i  # the checkpoint counts the decoder's levels from the finest
        changes = i > 0 and widths[level] != widths[level + 1]
        for j in range(2):
            theirs, ours = f"decoder.up_blocks.{i}.resnets.{j}", f"decoder.up.{level}.block.{j}"
            _vae_temporal_resnet(table, theirs, ours, changes and j == 0)
        if i < levels - 1:
            _both(table, f"decoder.up_blocks.{i}.upsamplers.0.conv", f"decoder.up.{level}.upsample.conv")
    return table


def _rename(weights: dict[str, Tensor], table: Table, kind: str) -> dict[str, Tensor]:
    missing, extra = sorted(table.keys() - weights.keys()), sorted(weights.keys() - table.keys())
    if missing or extra:
        raise ValueError(f"the {kind}'s weights do not fit the table: missing {missing[:3]}, unknown {extra[:3]}")
    return {table[name]: tensor for name, tensor in weights.items()}


def _is_convolution(name: str) -> bool:
    """The VAE's attention projections, 1x1 convolutions in the checkpoint."""
    return ".attn_1." in name and name.endswith((".q.weight", ".k.weight", ".v.weight", ".proj_out.weight"))


def to_checkpoint(
    parts: dict[str, dict[str, Tensor]], config: ImageToVideoConfig = ImageToVideoConfig()
) -> dict[str, Tensor]:
    """One checkpoint from the state dicts "unet", "vae" and "image_encoder"; ValueError for other weights."""
    vae = {name: tensor for name, tensor in parts["vae"].items() if name not in QUANT_CONV}
    unet = _rename(parts["unet"], unet_table(config), "UNet")
    vae = _rename(vae, vae_table(config), "VAE")
    vae = {name: t[:, :, None, None] if _is_convolution(name) else t for name, t in vae.items()}
    return {
        **{UNET_PREFIX + name: tensor for name, tensor in unet.items()},
        **{VAE_PREFIX + name: tensor for name, tensor in vae.items()},
        **{CLIP_PREFIX + name: tensor for name, tensor in parts["image_encoder"].items()},
    }


def split_checkpoint(checkpoint: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The parts "unet", "vae", "image_encoder" and "text_encoder" under the checkpoint's own names, without prefixes.

    A part that the checkpoint does not have is empty.
    """
    prefixes = {"unet": UNET_PREFIX, "vae": VAE_PREFIX, "image_encoder": CLIP_PREFIX, "text_encoder": TEXT_PREFIX}
    return {
        part: {name.removeprefix(prefix): t for name, t in checkpoint.items() if name.startswith(prefix)}
        for part, prefix in prefixes.items()
    }


def from_checkpoint(
    checkpoint: dict[str, Tensor], config: ImageToVideoConfig = ImageToVideoConfig()
) -> dict[str, dict[str, Tensor]]:
    """The state dicts for diffusers and transformers; the inverse of `to_checkpoint`."""
    parts = split_checkpoint(checkpoint)
    vae = {name: t[:, :, 0, 0] if _is_convolution(name) else t for name, t in parts["vae"].items()}
    unet_names = {ours: theirs for theirs, ours in unet_table(config).items()}
    vae_names = {ours: theirs for theirs, ours in vae_table(config).items()}
    vae = _rename(vae, vae_names, "VAE")
    identity = torch.eye(8, dtype=vae["encoder.conv_in.weight"].dtype)[:, :, None, None]
    vae |= dict(zip(QUANT_CONV, (identity, torch.zeros(8, dtype=identity.dtype))))
    return {"unet": _rename(parts["unet"], unet_names, "UNet"), "vae": vae, "image_encoder": parts["image_encoder"]}


def text_to_checkpoint(
    parts: dict[str, dict[str, Tensor]], config: ImageToVideoConfig = ImageToVideoConfig()
) -> dict[str, Tensor]:
    """One checkpoint from the state dicts "unet" and "text_encoder"; ValueError for the weights of another UNet.

    transformers before 5 has the text encoder's names under "text_model.", as the checkpoint has; later ones do not.
    """
    unet = _rename(parts["unet"], unet_table(config), "UNet")
    text = {TEXT_MODEL + name.removeprefix(TEXT_MODEL): tensor for name, tensor in parts["text_encoder"].items()}
    return {
        **{UNET_PREFIX + name: tensor for name, tensor in unet.items()},
        **{TEXT_PREFIX + name: tensor for name, tensor in text.items()},
    }


def text_from_checkpoint(
    checkpoint: dict[str, Tensor], config: ImageToVideoConfig = ImageToVideoConfig()
) -> dict[str, dict[str, Tensor]]:
    """The inverse of `text_to_checkpoint`: the state dicts for diffusers and for transformers 5."""
    parts = split_checkpoint(checkpoint)
    unet_names = {ours: theirs for theirs, ours in unet_table(config).items()}
    text = {name.removeprefix(TEXT_MODEL): tensor for name, tensor in parts["text_encoder"].items()}
    return {"unet": _rename(parts["unet"], unet_names, "UNet"), "text_encoder": text}


def image_to_checkpoint(unet: dict[str, Tensor], config: TextToImageConfig = TextToImageConfig()) -> dict[str, Tensor]:
    """A checkpoint of the text-to-image UNet's state dict alone; ValueError for another UNet's."""
    return {UNET_PREFIX + name: tensor for name, tensor in _rename(unet, image_unet_table(config), "UNet").items()}


def image_from_checkpoint(
    checkpoint: dict[str, Tensor], config: TextToImageConfig = TextToImageConfig()
) -> dict[str, Tensor]:
    """The state dict for diffusers; the inverse of `image_to_checkpoint`."""
    names = {ours: theirs for theirs, ours in image_unet_table(config).items()}
    return _rename(split_checkpoint(checkpoint)["unet"], names, "UNet")
