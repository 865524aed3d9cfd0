"""A long clip decoded a few frames at a time, without seams.

A temporal decoder (Stable Video Diffusion's) takes the frames that it gets at once for a whole clip: its temporal
convolutions and normalisations end where the chunk ends. Chunks cut next to each other, as diffusers'
decode_chunk_size and ComfyUI's VAE Decode cut them, therefore meet in a seam. Here they overlap, and go over into each
other (ours).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK = 14  # frames that Stable Video Diffusion's VAE was trained on
OVERLAP = 4  # frames, by default: `rewind benchmark chunks`, benchmarks/results/chunks.md


def spans(frames: int, chunk: int, overlap: int) -> list[tuple[int, int]]:
    """First frame and the one after the last of as few chunks as cover a clip, of sizes as even as can be.

    chunk: at most so many frames each; overlap: so many frames are shared by neighbours. Raises ValueError unless
    0 <= overlap <= chunk / 2, or for a chunk or a clip of no frames.
    """
    if frames < 1 or chunk < 1:
        raise ValueError(f"got {frames} frames and chunks of {chunk}; both must be at least 1")
    if not 0 <= overlap <= chunk // 2:
        raise ValueError(
            f"got chunks of {chunk} frames with an overlap of {overlap}; it must be at least 0 and at most half of the "
            f"chunk, {chunk // 2}"
        )
    if frames <= chunk:
        return [(0, frames)]
    count = -(-(frames - overlap) // (chunk - overlap))
    starts = [i * (frames - overlap) // count for i in range(count + 1)]
    return [(start, end + overlap) for start, end in zip(starts, starts[1:])]


def decoder(vae: Any, temporal: bool = True) -> Callable[[Tensor], Tensor]:
    """What a VAE of diffusers' makes of unscaled latents [n, 4, h, w]: frames [n, 3, H, W] in 0..1, in float32.

    temporal: its decoder takes them for one clip, and must be told how many there are.
    """

    def decoded(part: Tensor) -> Tensor:
        told = {"num_frames": len(part)} if temporal else {}
        return (vae.decode(part, **told).sample.float() / 2 + 0.5).clamp(0, 1)

    return decoded


def decode_in_chunks(
    decode: Callable[[Tensor], Tensor], latents: Tensor, chunk: int, overlap: int | None = None
) -> Tensor:
    """The frames [T, ...] on the CPU of latents [T, ...], in chunks that go over into each other.

    decode: takes at most `chunk` latents and gives as many frames. overlap: OVERLAP, or half of a small chunk. In an
    overlap the weights of the two chunks rise and fall in even steps, so that a frame at the end of a chunk, which
    knows nothing of what follows, counts least. A clip of at most `chunk` frames is decoded at once, and is exactly
    what `decode` gives. Raises as `spans` does.
    """
    overlap = min(OVERLAP, chunk // 2) if overlap is None else overlap
    parts = spans(len(latents), chunk, overlap)
    if len(parts) == 1:
        return decode(latents).cpu()
    frames, weights = None, torch.zeros(len(latents))
    for start, end in parts:
        decoded = decode(latents[start:end]).cpu()
        weight = torch.ones(end - start)
        ramp = torch.arange(1, overlap + 1) / (overlap + 1)
        if start > 0:
            weight[:overlap] *= ramp
        if end < len(latents):
            weight[end - start - overlap :] *= ramp.flip(0)
        if frames is None:
            frames = decoded.new_zeros(len(latents), *decoded.shape[1:])
        frames[start:end] += decoded * weight.to(decoded).view(-1, *[1] * (decoded.ndim - 1))
        weights[start:end] += weight
    return frames / weights.to(frames).view(-1, *[1] * (frames.ndim - 1))
