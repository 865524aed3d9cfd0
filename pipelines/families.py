"""A diffusion model of diffusers' modules behind one face: what the wings' own families begin from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .denoiser import EPS, DiscreteTimes, NoisePath, V, karras_sigmas
from .text import encode_prompts


class Family:
    """What families of models have in common: the modules, and frames that a 2D VAE takes `chunk` at a time.

    Latents are in model space. What the network takes as a clip, each family says.
    """

    path: NoisePath = V
    sigma_range: tuple[float, float] = (0.002, 700.0)
    stride = 1  # frames that a latent frame stands for, but for the first

    def __init__(self, network: Any, vae: Any, text_encoder: Any, tokenizer: Any, chunk: int = 16):
        self.network, self.vae, self.text_encoder, self.tokenizer = network, vae, text_encoder, tokenizer
        self.chunk = chunk

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def multiple(self) -> int:
        """Both sides of a frame are multiples of it: the VAE's factor times the network's."""
        return 8 * 2 ** (len(self.network.config.block_out_channels) - 1)

    @torch.no_grad()
    def embed(self, prompts: list[str]) -> Tensor:
        """The cross-attention context [n, length, width] of prompts."""
        return encode_prompts(self.tokenizer, self.text_encoder, prompts)

    @torch.no_grad()
    def encode_pictures(self, frames: Tensor) -> Tensor:
        """One-frame clips of frames [M, 3, H, W] in 0..1: the posterior's mode, so it is deterministic."""
        pieces = (2 * frames - 1).to(self.device, self.vae.dtype).split(self.chunk)
        latents = torch.cat([self.vae.encode(piece).latent_dist.mode() for piece in pieces])
        return latents.float() * self.vae.config.scaling_factor

    def encode_clip(self, frames: Tensor) -> Tensor:
        """The clip of frames [T, 3, H, W] in 0..1."""
        return self.encode_pictures(frames)

    def decode(self, clip: Tensor) -> Tensor:
        """Frames [T, 3, H, W] in 0..1, on the CPU, of a clip."""
        raise NotImplementedError

    def denoise(self, x: Tensor, sigma: Tensor, context: Tensor, as_pictures: bool = False) -> Tensor:
        """The denoised estimate of a clip, or of pictures, each a clip of its own. context: [1, length, width]."""
        raise NotImplementedError

    def schedule(self, steps: int) -> Tensor:
        """Noise levels [steps + 1] from the model's highest to 0."""
        return karras_sigmas(steps, *self.sigma_range).float()


class DiscreteFamily(Family):
    """Models of a discrete schedule. alphas: its cumulative products [n]; predicts_v: what they were taught."""

    def __init__(
        self, network, vae, text_encoder, tokenizer, alphas: Tensor, predicts_v: bool = False, chunk: int = 16
    ):
        super().__init__(network, vae, text_encoder, tokenizer, chunk)
        self.times = DiscreteTimes(alphas)
        self.path = V if predicts_v else EPS
        self.sigma_range = self.times.sigma_range
