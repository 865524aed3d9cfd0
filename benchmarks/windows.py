"""ComfyUI's Context Windows (Manual) without ComfyUI, as far as `rewind benchmark long` needs them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pipelines.videoshop.pipeline import VideoshopPipeline
from ..pipelines.videoshop.svd import SVDDenoiser

OVERLAP = 4  # frames: the host's own default; at most half of a window


def windows(frames: int, length: int) -> list[tuple[int, int]]:
    """The host's schedule "standard static": windows of one length, of which the last ends with the clip."""
    if frames <= length:
        return [(0, frames)]
    starts = [*range(0, frames - length, length - min(OVERLAP, length // 2)), frames - length]
    return [(start, start + length) for start in starts]


def pyramid(length: int) -> Tensor:
    """The host's weights "pyramid", [length]: a window counts most in its middle."""
    rising = torch.arange(1, length + 1)
    return torch.minimum(rising, rising.flip(0)).float()


class WindowedDenoiser(SVDDenoiser):
    """Stable Video Diffusion over overlapping windows of a long clip, whose results are averaged at every step.

    length: frames of a window. own_frame: later windows are told of their own first frame, as it looked at the step
    before, instead of the clip's (which is what the host does).
    """

    def __init__(self, made: SVDDenoiser, length: int, scaling_factor: float, own_frame: bool = False):
        super().__init__(made.unet, made.image_latents, made.embedding, made.added_ids)
        self.length, self.scaling_factor, self.own_frame = length, scaling_factor, own_frame
        self.first, self.last_step = made.image_latents, None

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        total, weight = torch.zeros_like(x), x.new_zeros(len(x), 1, 1, 1)
        for start, stop in windows(len(x), self.length):
            known = start and self.own_frame and self.last_step is not None
            self.image_latents = self.last_step[start : start + 1] if known else self.first
            share = pyramid(stop - start).to(x)[:, None, None, None]
            total[start:stop] += share * super().__call__(x[start:stop], sigma[start:stop])
            weight[start:stop] += share
        denoised = total / weight
        self.last_step = denoised / self.scaling_factor
        return denoised


class WindowedPipeline(VideoshopPipeline):
    """The pipeline with a denoiser over windows of `length` frames."""

    def __init__(self, made: VideoshopPipeline, length: int, own_frame: bool = False):
        super().__init__(made.unet, made.vae, made.image_encoder, made.scaling_factor, made.chunk)
        self.length, self.own_frame = length, own_frame

    def condition(self, *arguments, **options) -> SVDDenoiser:
        """See `VideoshopPipeline.condition`."""
        made = super().condition(*arguments, **options)
        return WindowedDenoiser(made, self.length, self.scaling_factor, self.own_frame)

    def unconditional(self, condition: SVDDenoiser) -> SVDDenoiser:
        """See `VideoshopPipeline.unconditional`."""
        return WindowedDenoiser(super().unconditional(condition), self.length, self.scaling_factor)
