"""Images of the host checked and turned about; clips into latents by any of its VAEs, and back in chunks."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy.ldm.modules.temporal_ae import VideoDecoder
from torch import Tensor

from ...pipelines.chunks import decode_in_chunks

SHARE = 0.8  # of a device's memory, the most that is asked for beside the VAE's weights (as in the host's own decode)


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


def encoding_bytes(vae: Any, frames: Tensor) -> int:
    """What ComfyUI reckons that encoding one of some frames [T, H, W, 3] takes beside the weights."""
    count, height, width, channels = frames.shape
    return int(vae.memory_used_encode((count, channels, height, width), vae.vae_dtype))


def sees_clips(vae: Any) -> bool:
    """Whether a VAE takes the latents that it decodes at once for one clip (Stable Video Diffusion's)."""
    return isinstance(getattr(vae.first_stage_model, "decoder", None), VideoDecoder)


def frame_bytes(vae: Any, samples: Tensor) -> int:
    """What ComfyUI reckons that decoding one frame of latents [T, c, h, w] takes beside the weights."""
    return int(vae.memory_used_decode(samples.shape, vae.vae_dtype))


def frames_that_fit(vae: Any, samples: Tensor, wanted: int) -> int:
    """How many frames, up to those wanted, a VAE can decode at once; the host makes room for them.

    The host's own decode makes room for one frame, and cuts the rest by what happens to be free.
    """
    size, management = frame_bytes(vae, samples), comfy.model_management
    room = min(wanted * size, SHARE * management.get_total_memory(vae.device))
    management.load_models_gpu([vae.patcher], memory_required=room)
    # Newer hosts tell apart what they could still free.
    free = getattr(vae.patcher, "get_free_memory", management.get_free_memory)(vae.device)
    return max(1, min(wanted, int(free / size)))


def decode_clip(vae: Any, samples: Tensor, chunk: int, overlap: int | None = None) -> Tensor:
    """Frames [T, H, W, 3] in 0..1 of latents [T, c, h, w], chunk by chunk (`decode_in_chunks`).

    Tells its progress; Cancel ends it.
    """
    bar = comfy.utils.ProgressBar(len(samples))

    def decode(part: Tensor) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        frames = vae.decode(part)
        bar.update(len(part))
        return frames

    return decode_in_chunks(decode, samples, chunk, overlap)
