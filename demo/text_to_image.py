"""The embedded text-to-image model: Stable Diffusion 1.5's UNet and noise schedule, only small.

Its text encoder is the text-to-video model's and its VAE the image-to-video model's, each read from that model's file;
its own file holds the UNet alone. It knows the captions of the world with and without their words of motion: "a red
circle moves right on a blue background" and "a red circle on a blue background" are the same to a picture. diffusers is
imported when a model is built, not before.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..pipelines.ei2.pipeline import EI2Settings
from ..pipelines.ei2.tuning import OneShot
from . import captions
from .models import IMAGE_WEIGHTS, read_weights
from .text import load_text_components

BETAS = (0.00085, 0.012)  # of the noise schedule: the first and the last, their roots evenly spaced between
TIMES = 1000  # of the training: 0..999
MOTION = ("moves", *captions.DIRECTIONS, *captions.SPEEDS)  # the words of a caption that a picture does not show
# How EI² tunes it and edits with it: so small a model learns faster than Stable Diffusion, whose numbers are EI²'s own
# defaults.
EI2_TUNING = OneShot(steps=60, learning_rate=1e-3)
EI2_SETTINGS = EI2Settings(steps=25, guidance=3.0, strength=0.7)
EI2_WEIGHTS = Path(__file__).parent / "ei2" / "rewind_demo_ei2.safetensors"  # tuned on one clip (train_one_shot.py)


@dataclass(frozen=True)
class TextToImageConfig:
    """Sizes of the tiny SD 1.5. Every width is a multiple of the first (the host names them so), of 32, and at least
    64. At three levels the latents are 12, 6 and 3 pixels wide, an odd grid at last."""

    size: int = 96
    unet_channels: tuple[int, ...] = (64, 128, 128)
    heads: int = 4  # of every attention, whatever its width
    context: int = 64  # width of the text encoder


def build_image_unet(config: TextToImageConfig = TextToImageConfig()):
    """diffusers' UNet2DConditionModel with fresh weights: one ResNet a level, the last level without attention."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor

    attending = len(config.unet_channels) - 1
    unet = UNet2DConditionModel(
        sample_size=config.size // 8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * attending + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * attending,
        block_out_channels=config.unet_channels,
        layers_per_block=1,
        cross_attention_dim=config.context,
        attention_head_dim=config.heads,  # diffusers' name for their number, kept for SD 1.5's configuration
    )
    unet.set_attn_processor(AttnProcessor())  # for 9, 36 and 144 tokens plain products beat fused attention on a CPU
    return unet


def alphas_cumprod() -> Tensor:
    """SD 1.5's noise schedule as cumulative products [1000] in float64: noise levels from 0.0292 to 14.61."""
    roots = torch.linspace(BETAS[0] ** 0.5, BETAS[1] ** 0.5, TIMES, dtype=torch.float64)
    return (1 - roots**2).cumprod(0)


def without_motion(caption: str) -> str:
    """A caption without its words of motion: what a picture shows of it.

    "a red circle moves right quickly on a blue background, at night" -> "a red circle on a blue background, at night"
    """
    return re.sub(rf" (?:{'|'.join(MOTION)})\b", "", caption)


def load_image_components(path: Path = IMAGE_WEIGHTS, config: TextToImageConfig = TextToImageConfig()):
    """The embedded text-to-image model as (unet, vae, text_encoder, tokenizer): diffusers' and transformers' modules in
    float32, in eval mode.

    Raises FileNotFoundError where weights are missing: its own, or those of the other two models' files.
    """
    from .keys import image_from_checkpoint

    unet = build_image_unet(config)
    unet.load_state_dict(image_from_checkpoint(read_weights(path), config))
    _, vae, text_encoder, tokenizer = load_text_components()
    return unet.eval().requires_grad_(False), vae, text_encoder, tokenizer
