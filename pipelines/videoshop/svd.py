"""diffusers' Stable Video Diffusion as a denoiser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..denoiser import edm_scalings


class SVDDenoiser:
    """diffusers' UNetSpatioTemporalConditionModel as a denoiser over one clip, x [T, 4, h, w].

    image_latents: [1 or T, 4, h, w], the first frame's UNSCALED latents, concatenated to every frame; embedding: [1,
    1, D] of the image encoder; added_ids: [1, 3], (fps - 1, motion bucket, augmentation level). `evaluations` counts
    calls.
    """

    def __init__(self, unet: torch.nn.Module, image_latents: Tensor, embedding: Tensor, added_ids: Tensor):
        self.unet, self.image_latents, self.embedding, self.added_ids = unet, image_latents, embedding, added_ids
        self.evaluations = 0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (paper, section on EDM; Karras et al., equation 7)."""
        self.evaluations += 1
        c_skip, c_out, c_in, c_noise = edm_scalings(sigma[:1].to(x.device, torch.float32))
        dtype = self.unet.dtype
        scaled = (c_in[:, None, None, None] * x.float()).to(dtype)
        condition = self.image_latents.to(dtype).expand(len(x), -1, -1, -1)
        output = self.unet(
            torch.cat([scaled, condition], 1)[None],
            c_noise,  # float32: the UNet embeds it before it goes on in its own dtype
            self.embedding.to(dtype),
            self.added_ids.to(dtype),
            return_dict=False,
        )[0][0]
        return (c_skip[:, None, None, None] * x.float() + c_out[:, None, None, None] * output.float()).to(x.dtype)

    def told_of(self, frame: Tensor) -> SVDDenoiser:
        """The same model with another first frame, unscaled latents [1, 4, h, w]; its embedding stays."""
        return SVDDenoiser(self.unet, frame, self.embedding, self.added_ids)


def unet_config(path: str | Path) -> dict[str, Any]:
    """The UNet's configuration of a model in diffusers' layout, a folder or a hub's id; no weights are read.

    Raises ValueError for a model of another kind, OSError where there is none.
    """
    from diffusers import UNetSpatioTemporalConditionModel

    config = UNetSpatioTemporalConditionModel.load_config(str(path), subfolder="unet")
    found = config.get("_class_name")
    if found != UNetSpatioTemporalConditionModel.__name__:
        raise ValueError(f"{path} holds a {found}; Videoshop takes image-to-video models like SVD")
    return config
