"""Context windows that are told of their own first frame, which `rewind benchmark long` compares the host's with."""

from __future__ import annotations

from torch import Tensor

from ..pipelines.videoshop.pipeline import VideoshopPipeline
from ..pipelines.videoshop.svd import SVDDenoiser
from ..pipelines.videoshop.windows import in_windows, windows


class OwnFrameDenoiser(SVDDenoiser):
    """Stable Video Diffusion over windows of `length` frames.

    Later ones are told of their own first frame, as it looked at the step before.
    """

    def __init__(self, made: SVDDenoiser, length: int, scaling_factor: float):
        super().__init__(made.unet, made.image_latents, made.embedding, made.added_ids)
        self.length, self.scaling_factor = length, scaling_factor
        self.first, self.last_step = made.image_latents, None

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        starts = iter([start for start, _ in windows(len(x), self.length)])

        def one(part: Tensor, level: Tensor) -> Tensor:
            start = next(starts)
            known = start and self.last_step is not None
            self.image_latents = self.last_step[start : start + 1] if known else self.first
            return super(OwnFrameDenoiser, self).__call__(part, level)

        denoised = in_windows(one, self.length)(x, sigma)
        self.last_step = denoised / self.scaling_factor
        return denoised


class OwnFramePipeline(VideoshopPipeline):
    """The pipeline with such a denoiser; a negative side, which is told of no frame, takes the clip at once."""

    def __init__(self, made: VideoshopPipeline, length: int):
        super().__init__(made.unet, made.vae, made.image_encoder, made.scaling_factor, made.chunk)
        self.length = length

    def condition(self, *arguments, **options) -> SVDDenoiser:
        """See `VideoshopPipeline.condition`."""
        return OwnFrameDenoiser(super().condition(*arguments, **options), self.length, self.scaling_factor)
