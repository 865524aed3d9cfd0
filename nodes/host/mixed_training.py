"""Dreamix's mixed fine-tuning inside the host: what is trained on, its memory, and the LoRA that comes out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sd
import torch
from torch import Tensor

from ...pipelines.dreamix.finetuning import FineTuning, Subject, Tuned, fine_tune
from ...pipelines.dreamix.lora import to_host
from ...pipelines.dreamix.temporal import architecture
from .checks import check_conditioning, check_embeddings
from .encoding import check_images, encode_clip
from .sampling import noise_path
from .training import (
    CORNER,
    CORNER_FRAMES,
    Kept,
    check_copyable,
    check_latents,
    checkpoint_folder,
    denoiser,
    in_seat,
    own_latents,
    tell_training,
    training_copy,
    training_mode,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Material:
    """What is trained on: latents in the VAE's space, [T, 4, h, w] or [1, C, T, h, w], and one-frame clips of frames.

    clip is None where alpha is 0, frames where it is 1.
    """

    clip: Tensor | None
    frames: Tensor | None
    token: list  # CONDITIONING


def check_model(model: Any) -> None:
    """ValueError for a MODEL that cannot be tuned: its kind is not known, or no copy can be made to train on."""
    network = model.model.diffusion_model
    kind = architecture(network)
    noise_path(model.get_model_object("model_sampling"))
    if (
        kind == "joint"
        and network.patch_embedding.in_channels != model.get_model_object("latent_format").latent_channels
    ):
        raise ValueError("this MODEL is told by a picture what to show: use the text-to-video model of its family")
    check_copyable(model, "Dreamix Mixed Fine-Tune")


def check_token(model: Any, token: list) -> None:
    """ValueError unless there is a CONDITIONING for this MODEL."""
    if not token:
        raise ValueError("token is empty: connect the token output of Dreamix Prompt")
    network = model.model.diffusion_model
    width = getattr(network, "text_dim", None) or model.model.model_config.unet_config.get("context_dim")
    check_embeddings(token, "token", width, "CLIP")


def encode(model: Any, vae: Any, images: Tensor, token: list, alpha: float) -> Material:
    """Encode what alpha needs of images [T, H, W, 3 or more] in 0..1, alpha channels dropped.

    Raises ValueError for images or a VAE that cannot be, or a token that was made for another size.
    """
    check_images(images, "images")
    if alpha > 0 and len(images) < 2:
        raise ValueError(
            f"got 1 image, and alpha is {alpha:g}, which learns a motion too: connect a clip of at least 2 frames, or "
            "set alpha to 0"
        )
    pixels = images[..., :3].float().clamp(0, 1).contiguous()  # some ways to resize go a little beyond
    if model.get_model_object("latent_format").latent_dimensions == 2:  # frames are the batch
        clip = frames = encode_clip(vae, pixels)
    else:
        clip = encode_clip(vae, pixels) if alpha > 0 else None
        frames = _one_by_one(vae, pixels) if alpha < 1 else None
    for latents in (clip, frames):
        if latents is not None:
            check_latents(model, latents)
            check_conditioning(model, token, latents, "token")
    return Material(clip if alpha > 0 else None, frames if alpha < 1 else None, token)


def _one_by_one(vae: Any, pixels: Tensor) -> Tensor:
    """Each picture as a clip of one frame, [M, C, 1, h, w]."""
    latents = []
    for picture in pixels:
        comfy.model_management.throw_exception_if_processing_interrupted()
        latents.append(vae.encode(picture[None]))
    return torch.cat(latents)


def _one_frame_each(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """A wrapper around a network: one whose batch is a clip's frames takes every frame for a clip of its own.

    Transformers, whose batch holds clips, are not told a number of frames.
    """
    if "num_video_frames" in kwargs:
        kwargs["num_video_frames"] = 1
    return executor(*args, **kwargs)


def _in_seat(
    copy: Any,
    material: Material,
    settings: FineTuning,
    on_step: Callable[[dict[str, Any]], None],
    checkpoints: Path | None = None,
    every: int = 1,
) -> Tuned:
    """Run `fine_tune` in the seat of a sampler. on_step, checkpoints, every: of `fine_tune`."""

    def run(model_wrap: Any, extra_args: dict[str, Any], device: torch.device) -> Tuned:
        model, options = model_wrap.inner_model, extra_args["model_options"]
        one_by_one = comfy.model_patcher.create_model_options_clone(options)
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        comfy.patcher_extension.add_wrapper_with_key(kind, "rewind", _one_frame_each, one_by_one, is_model_options=True)
        clip, frames = (
            None if latents is None else own_latents(model, latents, device)
            for latents in (material.clip, material.frames)
        )
        sampling = model.model_sampling
        subject = Subject(
            network=model.diffusion_model,
            video=denoiser(model_wrap, extra_args, options),
            pictures=denoiser(model_wrap, extra_args, one_by_one),
            clip=clip,
            frames=frames,
            path=noise_path(sampling),
            sigma_range=(float(sampling.sigma_min), float(sampling.sigma_max)),
        )
        return fine_tune(subject, settings, on_step, checkpoints, every)

    seat = material.frames if material.clip is None else material.clip
    return in_seat(copy, material.token, seat if seat.ndim == 4 else seat[:1], settings.seed, run)


def _kept(copy: Any, material: Material, settings: FineTuning) -> float:
    """Bytes that the larger of both losses keeps for the way back.

    Counted in one step on a corner of the latents and carried over by size: attention too needs memory in proportion.
    """
    most = 0.0
    for name, alpha in (("clip", 1.0), ("frames", 0.0)):
        latents = getattr(material, name)
        if latents is None:
            continue
        corner = latents[..., :CORNER, :CORNER]
        if name == "frames":
            corner, count = corner[:CORNER_FRAMES], min(settings.pictures, len(latents))
            size = latents[:count].numel()
        else:
            corner = corner[:CORNER_FRAMES] if corner.ndim == 4 else corner[:, :, :CORNER_FRAMES]
            size = latents.numel()
        part = replace(material, **{"clip": None, "frames": None, name: corner})
        once = replace(settings, steps=1, alpha=alpha, checkpointing=False)
        with Kept(copy.model.diffusion_model) as kept:
            _in_seat(copy, part, once, lambda step: None)
        most = max(most, kept.bytes * size / corner.numel())
    return most


def train(
    model: Any,
    material: Material,
    settings: FineTuning,
    on_step: Callable[[dict[str, Any]], None],
    every: int = 25,
    memory_check: bool = True,
    say: Callable[[str], None] = logger.info,
) -> Tuned:
    """Fine-tune a copy of a MODEL; the adapters in the host's names. The MODEL itself is not changed.

    on_step, every: of `fine_tune`. memory_check: refuse what would not fit. say: gets what it costs, before it starts.
    Raises ValueError for bad input; on Cancel
    what was trained stays in `checkpoint_folder`.
    """
    check_model(model)
    with training_mode():
        copy = training_copy(model, settings.precision)
        kept = _kept(copy, material, settings) if memory_check else None
        passes = settings.steps * sum(part is not None for part in (material.clip, material.frames))
        tell_training(say, copy, passes, kept, settings.checkpointing)
        tuned = _in_seat(copy, material, settings, on_step, checkpoint_folder(), every)
    return replace(tuned, lora=to_host(tuned.lora))


def with_lora(model: Any, lora: dict[str, Tensor], strength: float = 1.0) -> Any:
    """The MODEL with a LoRA as weight patches, by the host's own function (as LoraLoaderModelOnly does)."""
    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0)[0]
