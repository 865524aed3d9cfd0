"""The noise of an inversion: its random direction, and what starts the host's own samplers on the way back."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from ...pipelines.videoshop.inversion import Inversion
from ...pipelines.videoshop.parts import parts_of
from .sampling import noise_path

logger = logging.getLogger(__name__)

IN_PARTS = (
    "this inversion was made in {} parts, which SVD Denoise alone plays again: connect it there, or invert with "
    "frames_at_once at 0"
)


def random_direction(samples: Tensor, seed: int) -> Tensor:
    """Gaussian noise like the latent, from a generator of its own: the host's would seed everything else too."""
    return torch.randn(samples.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


class InvertedNoise:
    """A NOISE with which the host's own samplers start exactly at an inverted latent, whatever the model's family.

    From an empty latent the host makes x = k noise, where k depends on the family and the first sigma; so the noise is
    x / k. CogVideoX alone comes back by the host's VOIDSampler, which keeps to VP coordinates and takes the noise as x.
    An inversion in parts is refused when it is asked: the host's samplers know nothing of them.
    """

    def __init__(self, inversion: Inversion, model_sampling: torch.nn.Module):
        self.seed, self.parts = inversion.settings.get("seed", 0), len(parts_of(inversion))
        state, sigmas, path = inversion.latent.float().cpu(), inversion.sigmas, noise_path(model_sampling)
        first = sigmas[:1].float().cpu()
        if path.preserving:
            logger.warning(
                "this MODEL samples in coordinates of its own, which the host's euler does not keep to: connect the "
                "NOISE to SamplerCustomAdvanced with VOIDSampler, or the LATENT with Masked Sampler"
            )
            self.noise = path.shown(state, first)
            return
        wrap = SimpleNamespace(inner_model=SimpleNamespace(model_sampling=model_sampling))
        full = comfy.samplers.Sampler().max_denoise(wrap, sigmas)
        one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
        self.noise = state / float(model_sampling.noise_scaling(first, one, zero, full))

    def generate_noise(self, latent: dict[str, Any]) -> Tensor:
        if self.parts > 1:
            raise ValueError(IN_PARTS.format(self.parts))
        given, wanted = tuple(latent["samples"].shape), tuple(self.noise.shape)
        if given != wanted:
            raise ValueError(
                f"the latent has shape {given}, the inverted clip {wanted}: connect an empty latent of that size"
            )
        if torch.count_nonzero(latent["samples"]):
            raise ValueError(
                "this NOISE already holds the whole inverted clip: connect an empty latent (EmptyLatentImage with one "
                "image a frame, or the empty video latent of the model's family)"
            )
        return self.noise.clone()
