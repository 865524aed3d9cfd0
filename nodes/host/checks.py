"""What a MODEL is, and whether a LATENT and a CONDITIONING are made for it: all that is refused before any sampling."""

from __future__ import annotations

from typing import Any

import comfy.model_base
import comfy.sample
import torch
from torch import Tensor


def latent_axes(model: Any) -> tuple[int, int]:
    """How many axes, and channels in the second one, the latents of a MODEL have."""
    latent_format = model.get_model_object("latent_format")
    return latent_format.latent_dimensions + 2, latent_format.latent_channels


def check_latent(model: Any, latent: dict[str, Any]) -> Tensor:
    """The samples of a LATENT in the shape that the model takes; ValueError for what cannot be a clip of this model."""
    samples = latent["samples"]
    if getattr(samples, "is_nested", False):
        raise ValueError(
            "this LATENT holds several latents (video with audio): only plain video latents can be inverted"
        )
    if samples.numel() == 0:
        raise ValueError(f"got a LATENT of shape {tuple(samples.shape)}: it holds no frames")
    samples = comfy.sample.fix_empty_latent_channels(model, samples)
    dimensions, channels = latent_axes(model)
    if samples.ndim != dimensions or samples.shape[1] != channels:
        raise ValueError(
            f"got a LATENT of shape {tuple(samples.shape)}; this model takes {channels} channels in {dimensions} axes: "
            "encode the clip with the VAE that belongs to the MODEL"
        )
    if not torch.isfinite(samples).all():
        raise ValueError("the LATENT holds NaN or infinite values: the VAE may need --fp32-vae, or the clip is damaged")
    if not torch.count_nonzero(samples):
        raise ValueError("the LATENT is empty (all zeros): connect the VAE-encoded clip")
    if is_svd(model) and samples.shape[0] < 2:
        raise ValueError(
            "got 1 frame; Stable Video Diffusion needs a clip of at least 2: connect all frames of the clip"
        )
    return samples


def check_conditioning(model: Any, conditioning: list, samples: Tensor, name: str) -> None:
    """ValueError where a condition is missing, not finite, of another size than the latent or model, or has no picture
    where the model needs one, or one where it takes none."""
    if not conditioning:
        raise ValueError(f"{name} is empty: connect a CONDITIONING")
    svd, with_frame = is_svd(model), takes_first_frame(model)
    width = model.model.model_config.unet_config.get("context_dim") if svd else None
    check_embeddings(conditioning, name, width, "CLIP_VISION" if with_frame else "CLIP")
    for _, extra in conditioning:
        image = extra.get("concat_latent_image")
        if with_frame and image is None:
            raise ValueError(f"{name} holds no first frame: connect Videoshop Conditioning or SVD_img2vid_Conditioning")
        if image is None and is_wan_image_to_video(model):
            raise ValueError(f"{name} holds no first frame: connect WanImageToVideo with a start_image")
        if svd and not with_frame and image is not None:
            raise ValueError(f"{name} holds a first frame, but a text alone tells this MODEL: connect CLIP Text Encode")
        if isinstance(image, Tensor) and not torch.isfinite(image).all():
            raise ValueError(f"{name} holds NaN or infinite values")
        if image is not None and samples.ndim == 4 and image.shape[-2:] != samples.shape[-2:]:
            (h, w), (height, width) = image.shape[-2:], samples.shape[-2:]
            raise ValueError(
                f"{name} was made for {8 * w} x {8 * h} pixels, the clip is {8 * width} x {8 * height}: "
                "use the same width and height for both"
            )
        if image is not None and is_wan_image_to_video(model) and image.shape[2:] != samples.shape[2:]:
            given, wanted = ((8 * w, 8 * h, 4 * t - 3) for t, h, w in (image.shape[2:], samples.shape[2:]))
            raise ValueError(
                "{} was made for {} x {} pixels and {} frames, the clip is {} x {} with {} frames: use the same width, "
                "height and length for both".format(name, *given, *wanted)
            )


def check_embeddings(conditioning: list, name: str, width: int | None, source: str) -> None:
    """ValueError for embeddings that are not finite or, where a width is given, not of it. source: what makes them."""
    for embedding, _ in conditioning:
        if width is not None and embedding.shape[-1] != width:
            raise ValueError(
                f"{name} holds an embedding of width {embedding.shape[-1]}, this MODEL takes {width}: connect the "
                f"{source} that came with the MODEL"
            )
        if isinstance(embedding, Tensor) and not torch.isfinite(embedding).all():
            raise ValueError(f"{name} holds NaN or infinite values")


def is_svd(model: Any) -> bool:
    """Whether a MODEL is Stable Video Diffusion or of its kind."""
    return isinstance(model.model, comfy.model_base.SVD_img2vid)


def is_wan_image_to_video(model: Any) -> bool:
    """Whether a MODEL is Wan's image-to-video: beside the clip's 16 channels it takes a mask's 4 and a picture's 16."""
    own = type(model.model) is comfy.model_base.WAN21
    return own and model.model.diffusion_model.patch_embedding.in_channels == 36


def takes_first_frame(model: Any) -> bool:
    """Whether a MODEL is told by a first frame what to show: Stable Video Diffusion, but not the embedded
    text-to-video model of its kind."""
    return is_svd(model) and not getattr(model.model.model_config, "rewind_by_text", False)
