"""Masks to test with, and what they leave alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def hard_mask(frames: int, height: int = 64, width: int = 64) -> Tensor:
    """A square that moves an eighth of the width a frame, and so touches other latents in each."""
    mask, step = torch.zeros(frames, height, width), width // 8
    rows = slice(3 * height // 10, 11 * height // 20)
    for frame in range(frames):
        start = 3 + step * frame % width
        mask[frame, rows, start : start + step + 1] = 1
    return mask


def outside(host: Any, mask: Tensor, shape: torch.Size) -> Tensor:
    """Where no masked pixel lies, as booleans of a latent's shape."""
    latent_mask = host.module("pipelines.videoshop.masks").latent_mask
    found = (latent_mask(mask, shape) == 0).expand(shape)
    assert 0.3 < found.float().mean() < 0.95
    return found
