"""The text-to-image models that EI² runs on headless: Stable Diffusion 1.x and 2.x in diffusers' classes.

Frames are the batch: latents are [T, 4, h, w] in model space, a clip that the UNet takes for T pictures.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..chunks import decode_in_chunks, decoder
from ..denoiser import discrete_denoised
from ..families import DiscreteFamily

KINDS = ("StableDiffusionPipeline",)  # of diffusers' pipelines


class TextToImage(DiscreteFamily):
    """UNet2DConditionModel.

    The VAE may have a temporal decoder, as the embedded model's: it takes the frames that it decodes for one clip.
    """

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Frames [T, 3, H, W] in 0..1, on the CPU, of a clip."""
        temporal = "num_frames" in inspect.signature(self.vae.decode).parameters
        z = (latents / self.vae.config.scaling_factor).to(self.device, self.vae.dtype)
        return decode_in_chunks(decoder(self.vae, temporal), z, self.chunk, None if temporal else 0)

    def denoise(self, x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        """The denoised estimate of x [T, 4, h, w] at levels [T]. context: [1 or T, length, width]."""
        dtype = self.network.dtype

        def network(scaled: Tensor, time: Tensor) -> Tensor:
            return self.network(scaled.to(dtype), time, context.to(dtype).expand(len(x), -1, -1), return_dict=False)[0]

        return discrete_denoised(network, x, sigma, self.times, self.path)


def model_kind(path: str | Path) -> str:
    """Which of KINDS a model in diffusers' layout is, by its index alone.

    Raises ValueError for another kind; OSError where there is no such model.
    """
    from diffusers import DiffusionPipeline

    name = DiffusionPipeline.load_config(str(path)).get("_class_name")
    if name not in KINDS:
        raise ValueError(f"{path} holds a {name}; EI² takes Stable Diffusion 1.x and 2.x: {', '.join(KINDS)}")
    return name


def load_family(
    path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> TextToImage:
    """A StableDiffusionPipeline in diffusers' layout, a local folder or a hub's id. ValueError for another kind."""
    from diffusers import StableDiffusionPipeline

    model_kind(path)
    pipe: Any = StableDiffusionPipeline.from_pretrained(
        str(path), torch_dtype=dtype, safety_checker=None, requires_safety_checker=False
    ).to(device)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.eval().requires_grad_(False)
    predicts_v = pipe.scheduler.config.get("prediction_type") == "v_prediction"
    alphas = pipe.scheduler.alphas_cumprod
    return TextToImage(pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer, alphas, predicts_v)
