"""Images of the host checked and turned about, and clips into latents by any of its VAEs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_images(images: Tensor, name: str, wanted: str = "at least one RGB image") -> None:
    """ValueError for what is not a batch of finite images [n, H, W, 3 or more]."""
    if images.ndim != 4 or images.shape[0] == 0 or images.shape[-1] < 3:
        raise ValueError(f"{name} has shape {tuple(images.shape)}: connect {wanted}")
    if not torch.isfinite(images).all():
        raise ValueError(f"{name} holds NaN or infinite values")


def as_images(frames: Tensor) -> Tensor:
    """Frames [n, 3, H, W] as the host's IMAGE [n, H, W, 3]."""
    return frames.movedim(1, -1).contiguous()


def is_video_vae(vae: Any) -> bool:
    """Whether a VAE takes a clip as a whole and shortens it (Wan's); others take it frame by frame."""
    return getattr(vae, "latent_dim", 2) == 3 and not getattr(vae, "not_video", False)


def check_length(vae: Any, frames: int) -> None:
    """ValueError where the VAE would drop the last frames, as Wan's does unless there are 4 n + 1."""
    if not is_video_vae(vae) or not isinstance(vae.downscale_ratio, tuple):
        return
    down, up = vae.downscale_ratio[0], vae.upscale_ratio[0]
    kept = up(down(frames))
    if kept == frames:
        return
    longer = up(down(frames) + 1)
    shorter = kept if kept < frames else up(down(frames) - 1)
    raise ValueError(
        f"the clip has {frames} frames; this VAE takes {shorter} or {longer}, and would drop the rest: trim the clip "
        "with ImageFromBatch"
    )


def encode_clip(vae: Any, frames: Tensor) -> Tensor:
    """The latents of a clip [T, H, W, 3] in 0..1, in the VAE's space: [T, c, h, w], or of a video VAE [1, c, t, h, w].

    Sides that the VAE cannot take are cropped around the centre by the host. Raises ValueError as `check_length` does.
    """
    check_length(vae, len(frames))
    return vae.encode(frames)
