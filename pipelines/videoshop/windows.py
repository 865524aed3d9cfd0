"""Clips longer than the model in overlapping windows, which are averaged at every step.

Temporal co-denoising (Gen-L-Video, arXiv 2305.18264), as ComfyUI's Context Windows (Manual) has it with the schedule
"standard static" and the weights "pyramid": every window is told of the clip's first frame.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OVERLAP = 4  # frames: the host's own default

Denoiser = Callable[..., Tensor]


def check_context(length: int, overlap: int) -> None:
    """ValueError for windows that cannot be; a length of 0 is none."""
    if length < 0 or length == 1:
        raise ValueError(f"context_length is {length}; it must be at least 2, or 0 for the whole clip at once")
    if overlap < 0:
        raise ValueError(f"context_overlap is {overlap}; it must be at least 0")


def windows(frames: int, length: int, overlap: int = OVERLAP) -> list[tuple[int, int]]:
    """Windows of one length, of which the last ends with the clip; 0 gives one, of the whole clip.

    overlap: frames that two neighbours share, at most half of a window. Raises ValueError as `check_context`.
    """
    check_context(length, overlap)
    if not length or frames <= length:
        return [(0, frames)]
    starts = [*range(0, frames - length, length - min(overlap, length // 2)), frames - length]
    return [(start, start + length) for start in starts]


def pyramid(length: int) -> Tensor:
    """How much each frame of a window counts, [length]: most in its middle."""
    rising = torch.arange(1, length + 1)
    return torch.minimum(rising, rising.flip(0)).float()


def in_windows(denoiser: Denoiser, length: int, overlap: int = OVERLAP) -> Denoiser:
    """A denoiser of clips x [T, C, h, w] at sigma [T] that gives another one window after window, and averages them."""

    def averaged(x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        found = windows(len(x), length, overlap)
        if len(found) == 1:
            return denoiser(x, sigma, **extra_args)
        total, weight = torch.zeros_like(x), x.new_zeros(len(x), 1, 1, 1)
        for start, stop in found:
            share = pyramid(stop - start).to(x)[:, None, None, None]
            total[start:stop] += share * denoiser(x[start:stop], sigma[start:stop], **extra_args)
            weight[start:stop] += share
        return total / weight

    return averaged if length else denoiser
