"""Dreamix's corruption: a clip degraded in space and time, then noised up to a diffusion time s.

From the paper (arXiv 2302.01329), by its project page and reviews: first downsample, then add noise; the model starts
at s and restores what the degrading took away, by the prompt. Its base model sees 16 frames of 24 x 40 pixels. That s
is the time of a cosine schedule is Imagen Video's habit; the paper's own words on it were not to be had. A latent model
has no cascade to invent 32 times the detail, so how far to degrade is the user's choice (ours: 4 times a side).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..denoiser import NoisePath
from ..video import check_frames

TEMPORAL = ("hold", "linear")


# --- in space and time ------------------------------------------------------------------------------------------------


def coarse_size(height: int, width: int, factor: float = 4.0, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """The size that a clip is taken down to: height and width over the factor, or the size itself where one is given.

    Raises ValueError for a factor below 1, or a size below 1 x 1 or above the clip's own.
    """
    if size is None:
        if not factor >= 1:
            raise ValueError(f"the clip is to be downsampled by {factor}; it must be 1 (not at all) or more")
        return max(1, round(height / factor)), max(1, round(width / factor))
    if not (1 <= size[0] <= height and 1 <= size[1] <= width):
        raise ValueError(f"cannot downsample {height}x{width} to {size[0]}x{size[1]}: give a size from 1x1 to its own")
    return size


def degrade_space(frames: Tensor, factor: float = 4.0, size: tuple[int, int] | None = None) -> Tensor:
    """Lose the detail: an area filter (antialiased) down, a bicubic one up again to the clip's own size.

    frames: [T, C, H, W] in 0..1, and so is the result. factor, size (height, width): see `coarse_size`. A size that is
    the clip's own returns the frames themselves, bit for bit.
    """
    own = (frames.shape[-2], frames.shape[-1])
    small = coarse_size(*own, factor, size)
    if small == own:
        return frames
    from kornia.geometry.transform import resize

    coarse = resize(frames, small, interpolation="area", antialias=True)
    return resize(coarse, own, interpolation="bicubic", align_corners=False).clamp(0, 1)


def degrade_time(frames: Tensor, stride: int = 1, temporal: str = "hold") -> Tensor:
    """Lose the motion between every `stride`-th frame: those are kept, the others filled in.

    frames: [T, C, H, W]. temporal: "hold" repeats the last kept frame (jerks that the model smooths), "linear" fades to
    the next kept one; after the last kept frame both hold it. Raises ValueError for a stride below 1 or another word.
    """
    if stride < 1:
        raise ValueError(f"the stride in time is {stride}; it must be 1 (keep every frame) or more")
    if temporal not in TEMPORAL:
        raise ValueError(f'frames are filled in by "{temporal}"; it must be one of {", ".join(TEMPORAL)}')
    if stride == 1:
        return frames
    time = torch.arange(len(frames), device=frames.device)
    kept = time // stride * stride
    if temporal == "hold":
        return frames[kept]
    following = torch.where(kept + stride < len(frames), kept + stride, kept)
    share = ((time - kept) / stride).to(frames.dtype)[:, None, None, None]
    return torch.lerp(frames[kept], frames[following], share)


def degrade(
    frames: Tensor,
    factor: float = 4.0,
    size: tuple[int, int] | None = None,
    stride: int = 1,
    temporal: str = "hold",
) -> Tensor:
    """Both: the clip that is encoded and noised. frames: [T, 3, H, W] in 0..1; the result has the same shape."""
    check_frames(frames, multiple=1)
    return degrade_space(degrade_time(frames, stride, temporal), factor, size)


# --- noise ------------------------------------------------------------------------------------------------------------


def noise_to_signal(s: float) -> float:
    """sigma_s / alpha_s of the cosine schedule, alpha_s = cos(pi s / 2): tan(pi s / 2). 0 at s = 0, infinite at s = 1.

    Raises ValueError unless 0 <= s <= 1.
    """
    if not 0 <= s <= 1:
        raise ValueError(f"the noise is {s}; it must be 0 (none) to 1 (nothing of the clip is left)")
    return math.tan(math.pi * s / 2) if s < 1 else math.inf


def log_snr(s: float) -> float:
    """ln(alpha_s^2 / sigma_s^2) of the cosine schedule: 0 at s = 0.5."""
    ratio = noise_to_signal(s)
    return math.inf if ratio == 0 else -2 * math.log(ratio)


def sigma_at(s: float, path: NoisePath) -> float:
    """The noise level of a model at which signal and noise stand to each other as at time s of the paper's schedule.

    So one s means the same for EPS, V and EDM (sigma = tan(pi s / 2), without an upper end) and for flows
    (sigma = ratio / (1 + ratio), 1 at s = 1). By equal log-SNR; the paper knows one model only.
    """
    ratio = noise_to_signal(s)
    if path.kind == "flow":
        return ratio / (1 + ratio) if ratio < math.inf else 1.0
    return ratio


def sigmas_from(sigmas: Tensor, s: float, path: NoisePath) -> Tensor:
    """A descending schedule cut at time s: it begins at sigma(s) exactly and goes on with the levels below.

    sigmas: [n + 1], descending to 0. s = 0 gives [0]: no noise, no step. s = 1 gives the whole schedule, from its top.
    A level that is sigma(s) but for rounding is not stepped to twice.
    """
    start = sigma_at(s, path)
    if start >= float(sigmas[0]):
        return sigmas
    below = sigmas[sigmas < start * (1 - 1e-4)]
    return torch.cat([sigmas.new_tensor([start]), below]) if start > 0 else sigmas.new_zeros(1)


def add_noise(x0: Tensor, noise: Tensor, sigma: float, path: NoisePath) -> Tensor:
    """z = alpha x0 + sigma noise on the model's own path: x0 itself at sigma 0, the noise alone at a flow's 1."""
    return path.signal(sigma) * x0 + sigma * noise if sigma > 0 else x0
