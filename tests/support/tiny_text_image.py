"""diffusers' text-to-image classes with tiny random weights, and Stable Diffusion's structures without any weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from rewind.demo.text import build_text_encoder, load_tokenizer
from rewind.pipelines.ei2.family import TextToImage
from rewind.pipelines.ei2.inflation import InflationSettings, fresh_temporal
from rewind.pipelines.ei2.stam import TemporalAttention

FRAMES, HEIGHT, WIDTH, TEXT = 3, 32, 48, 64  # TEXT is the width of the embedded text encoder's context
# Every attention of the tiny UNet, by the host's names, in the order in which they are passed.
BLOCKS = [
    f"{place}.1.transformer_blocks.0"
    for place in ("input_blocks.1", "middle_block", "output_blocks.2", "output_blocks.3")
]

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
STRUCTURES = {
    "SD 1.5": {
        "down_block_types": (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", CROSS_UP, CROSS_UP, CROSS_UP),
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
    "SDXL": {
        "down_block_types": ("DownBlock2D", CROSS_DOWN, CROSS_DOWN),
        "up_block_types": (CROSS_UP, CROSS_UP, "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


def structure(name: str) -> torch.nn.Module:
    """The UNet of one of STRUCTURES, in full size, without weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(layers_per_block=2, **STRUCTURES[name])


def unet(seed: int = 0, **changes: Any) -> torch.nn.Module:
    """UNet2DConditionModel in SD 1.5's form: two levels, the lower one without attention. changes: of its config."""
    from diffusers import UNet2DConditionModel

    config = {
        "down_block_types": (CROSS_DOWN, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", CROSS_UP),
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 2,  # the number of heads, as in SD 1.5
        "cross_attention_dim": TEXT,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet2DConditionModel(**config | changes)
        for p in network.parameters():
            if not p.any():
                p.data = 0.05 * torch.randn_like(p)
    return network.eval().requires_grad_(False)


def vae(seed: int = 0) -> torch.nn.Module:
    """AutoencoderKL with the factor 8 of Stable Diffusion's."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            norm_num_groups=4,
            latent_channels=4,
            layers_per_block=1,
        )
    return model.eval().requires_grad_(False)


def alphas() -> torch.Tensor:
    """SD 1.x's schedule, [1000]."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


def family(seed: int = 0, predicts_v: bool = False) -> TextToImage:
    """A whole model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = build_text_encoder().eval().requires_grad_(False)
    return TextToImage(unet(seed), vae(seed), encoder, load_tokenizer(), alphas(), predicts_v)


def save(folder: Path, prediction: str = "epsilon") -> TextToImage:
    """A StableDiffusionPipeline in diffusers' layout, of the family that comes back. prediction: of its scheduler."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    made = family()
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDIMScheduler(**betas, prediction_type=prediction, clip_sample=False, steps_offset=1)
    StableDiffusionPipeline(
        vae=made.vae,
        text_encoder=made.text_encoder,
        tokenizer=made.tokenizer,
        unet=made.network,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return made


def video(seed: int = 3, frames: int = FRAMES) -> torch.Tensor:
    """A random clip [frames, 3, HEIGHT, WIDTH] in 0..1."""
    return torch.rand(frames, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))


def shake(modules: dict[str, TemporalAttention], scale: float = 1.0) -> None:
    """Give every weight of temporal modules random values, as a long tuning would; their norms are about 2 scale."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for module in modules.values():
            for p in module.parameters():
                p.copy_(scale * torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[0]))


def temporal(
    network: torch.nn.Module, settings: InflationSettings = InflationSettings(), scale: float = 1.0
) -> dict[str, TemporalAttention]:
    """Temporal modules that do something, by block."""
    modules = fresh_temporal(network, settings, 0)
    shake(modules, scale)
    return modules


def untouched(network: torch.nn.Module) -> bool:
    """Whether nothing hangs on a network: no hook, no replaced forward, its attentions' own processors."""
    processors = {type(p).__module__ for p in network.attn_processors.values()}
    return processors == {"diffusers.models.attention_processor"} and not any(
        m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in network.modules()
    )
