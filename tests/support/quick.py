"""The embedded image-to-video model's architecture, smaller still and without a VAE, for what is quick to measure."""

from __future__ import annotations

import torch

from rewind.demo.models import ImageToVideoConfig, build_image_encoder, build_unet
from rewind.pipelines.videoshop.pipeline import VideoshopPipeline


class QuickPipeline(VideoshopPipeline):
    """In place of a VAE: the picture eight times smaller, and enlarged again."""

    def _encode(self, pixels):
        small = torch.nn.functional.avg_pool2d(pixels, 8)
        return torch.cat([small, small.mean(1, keepdim=True)], 1) / 0.05

    def decode(self, latents):
        small = latents[:, :3] / self.scaling_factor * 0.05
        return torch.nn.functional.interpolate(small / 2 + 0.5, scale_factor=8).clamp(0, 1)


def quick_pipeline() -> QuickPipeline:
    """One with fresh weights."""
    torch.manual_seed(0)
    config = ImageToVideoConfig(unet_channels=(32, 64), context=32, clip_hidden=32, clip_layers=1)
    parts = build_unet(config), build_image_encoder(config)
    unet, image_encoder = (part.eval().requires_grad_(False) for part in parts)
    return QuickPipeline(unet, None, image_encoder)
