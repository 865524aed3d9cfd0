"""The way back: deterministic Euler on the levels of the inversion, and guidance that may differ by frame."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import trange

from .latents import check_clip


@torch.no_grad()
def sample_euler(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    *,
    put_back: Callable[[Tensor, float], Tensor] | None = None,
) -> Tensor:
    """Deterministic Euler (EDM, arXiv 2206.00364, algorithm 1 without its correction; Videoshop, equation 3).

    The sampler that `sample_edm_inversion` inverts: x_l = x_h + (s_l - s_h) (x_h - D(x_h)) / s_h.
    x: the clip at sigmas[0]; sigmas: descending to 0, where the network is not called. put_back: applied to the clip at
    each level above 0, with that level, before the network sees it there (see `masks.StoredSource`; ours). Returns the
    clip at sigmas[-1].
    Raises ValueError for a schedule that does not fall, or ends below 0.
    """
    check_clip(x)
    levels = sigmas.tolist()
    if len(levels) < 2 or levels[-1] < 0 or not all(math.inf > a > b for a, b in zip(levels, levels[1:])):
        raise ValueError(f"the noise levels of the way back must fall to 0, got {levels[:1]} to {levels[-1:]}")
    dtype, working = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x = x.to(working)
    ones = x.new_ones(x.shape[0])
    for i in trange(len(levels) - 1, disable=disable):
        high, low = levels[i], levels[i + 1]
        if put_back is not None:
            x = put_back(x, high)
        denoised = model(x.to(dtype), high * ones, **(extra_args or {})).to(working)
        x = x + (low / high - 1) * (x - denoised)
        if callback is not None:
            callback({"i": i, "x": x, "sigma": low, "sigma_high": high, "denoised": denoised, "evaluations": i + 1})
    return x.to(dtype)


def frame_guidance(first: float, last: float, frames: int) -> Tensor:
    """Guidance weights [frames], linear from the first frame to the last (SVD's own default is 1 to 3)."""
    return torch.linspace(first, last, frames)


def guided(denoised: Tensor, unconditional: Tensor, weights: Tensor) -> Tensor:
    """Classifier-free guidance with a weight a frame: unconditional + w (denoised - unconditional).

    denoised, unconditional: [T, C, h, w] or [B, C, T, h, w]; weights: [T].
    """
    frames = denoised.shape[0] if denoised.ndim == 4 else denoised.shape[2]
    if weights.shape != (frames,):
        raise ValueError(f"got {tuple(weights.shape)} guidance weights for {frames} frames; one a frame is needed")
    w = weights.to(denoised)
    w = w[:, None, None, None] if denoised.ndim == 4 else w[:, None, None]
    return unconditional + w * (denoised - unconditional)


class GuidedDenoiser:
    """A denoiser with guidance, linear over the frames, inside an interval of noise levels (arXiv 2404.07724).

    Where the weights are all 1, or sigma lies outside `interval`, the unconditional model is not called.
    conditional, unconditional: denoisers; first, last: the weights of the first and last frame.
    """

    def __init__(
        self,
        conditional: Callable[..., Tensor],
        unconditional: Callable[..., Tensor] | None,
        first: float = 1.0,
        last: float = 1.0,
        interval: tuple[float, float] = (0.0, math.inf),
    ):
        if unconditional is None and not first == last == 1.0:
            raise ValueError(f"guidance {first} to {last} needs an unconditional model")
        self.conditional, self.unconditional = conditional, unconditional
        self.first, self.last, self.interval = first, last, interval
        self.evaluations = 0  # network calls so far; the two sides count one each

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        denoised = self.conditional(x, sigma, **extra_args)
        self.evaluations += 1
        low, high = self.interval
        if self.first == self.last == 1.0 or not low <= float(sigma.max()) <= high:
            return denoised
        self.evaluations += 1
        frames = x.shape[0] if x.ndim == 4 else x.shape[2]
        return guided(
            denoised, self.unconditional(x, sigma, **extra_args), frame_guidance(self.first, self.last, frames)
        )
