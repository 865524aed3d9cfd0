"""EI²'s one-shot tuning and its covariate-shift probe inside the host."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from torch import Tensor

from ...pipelines.ei2.covariate_shift import Probe, Reading
from ...pipelines.ei2.inflation import NO_TEMPORAL, Inflation, InflationSettings, architecture
from ...pipelines.ei2.tuning import OneShot, Subject, one_shot_tune
from ...pipelines.ei2.weights import EI2Weights
from .checks import check_embeddings, check_latent
from .encoding import check_images, encode_clip, is_video_vae
from .patches import inflate, network_blocks, put_on, take_off
from .sampling import Before, DirectSampler, guider, noise_path, sample
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


def check_model(model: Any) -> None:
    """ValueError for a MODEL that EI² does not take."""
    network_blocks(model)
    path = noise_path(model.get_model_object("model_sampling"))
    if path.kind == "flow" or path.rectified:
        raise ValueError("this MODEL samples as a flow; EI² takes Stable Diffusion 1.x, 2.x and SDXL")


def check_tunable(model: Any, inflation: InflationSettings) -> None:
    """ValueError for a MODEL that cannot be tuned: `check_model`'s, one of which no copy can be made, taken blocks."""
    check_model(model)
    check_copyable(model, "EI² One-Shot Tune")
    inflate(model, inflation)  # raises where another pack has the self-attention of a block


def check_text(model: Any, conditioning: list, name: str) -> None:
    """ValueError unless there is a CONDITIONING for this MODEL."""
    if not conditioning:
        raise ValueError(f"{name} is empty: connect CLIP Text Encode")
    width = model.model.model_config.unet_config.get("context_dim")
    check_embeddings(conditioning, name, width if isinstance(width, int) else None, "CLIP")


def encode(model: Any, vae: Any, images: Tensor) -> Tensor:
    """Latents [T, 4, h, w] in the VAE's space of a clip [T, H, W, 3 or more] in 0..1; ValueError for what is none."""
    check_images(images, "images", "the frames of a clip")
    if len(images) < 2:
        raise ValueError("got 1 frame; a clip has at least 2: connect all frames of the clip")
    if is_video_vae(vae):
        raise ValueError(
            "this VAE shortens clips, as no text-to-image model's: connect the VAE that belongs to the MODEL"
        )
    latents = encode_clip(vae, images[..., :3].float().clamp(0, 1).contiguous())
    check_latents(model, latents)
    return latents


def check_clip(model: Any, latent: dict[str, Any]) -> Tensor:
    """The samples of a LATENT that is a clip for this MODEL; ValueError for what is none."""
    samples = check_latent(model, latent)
    if len(samples) < 2:
        raise ValueError("got 1 frame; a clip has at least 2: encode all frames of the clip")
    return samples


def _in_seat(
    copy: Any,
    latents: Tensor,
    caption: list,
    settings: OneShot,
    inflation: InflationSettings,
    on_step: Callable[[dict[str, Any]], None],
    keep: bool = False,
    every: int = 1,
) -> tuple[EI2Weights, list[float]]:
    """Run `one_shot_tune` in the seat of a sampler. keep: whether the run keeps itself on disk."""

    def run(model_wrap: Any, extra_args: dict[str, Any], device: torch.device) -> tuple[EI2Weights, list[float]]:
        model, options = (
            model_wrap.inner_model,
            comfy.model_patcher.create_model_options_clone(extra_args["model_options"]),
        )

        @contextmanager
        def inflated(tuned: Inflation) -> Iterator[None]:
            put_on(options["transformer_options"], tuned)
            try:
                yield
            finally:
                take_off(options["transformer_options"])

        subject = Subject(
            network=model.diffusion_model,
            denoise=denoiser(model_wrap, extra_args, options),
            clip=own_latents(model, latents, device),
            sigmas=model.model_sampling.sigmas.detach().float().cpu(),
            inflate=inflated,
            path=noise_path(model.model_sampling),
            caption=_told(caption),
        )
        folder = checkpoint_folder() if keep else None
        weights, losses = one_shot_tune(subject, settings, inflation, on_step, folder, every)
        return replace(weights, caption=""), losses  # a CONDITIONING does not tell its text

    return in_seat(copy, caption, latents, settings.seed, run)


def _told(caption: list) -> str:
    """What makes one CONDITIONING another than others, for the file of a run."""
    return " ".join(f"{float(embedding.double().sum()):.6f}" for embedding, _ in caption)


def _kept(copy: Any, latents: Tensor, caption: list, settings: OneShot, inflation: InflationSettings) -> float:
    """Bytes that a loss on the clip keeps for the way back: counted on a corner of it, carried over by size."""
    corner = latents[:CORNER_FRAMES, :, :CORNER, :CORNER]
    once = OneShot(steps=1, precision=settings.precision, seed=settings.seed)
    with Kept(copy.model.diffusion_model) as kept:
        _in_seat(copy, corner, caption, once, inflation, lambda step: None)
    return kept.bytes * latents.numel() / corner.numel()


def tune(
    model: Any,
    latents: Tensor,
    caption: list,
    settings: OneShot,
    inflation: InflationSettings,
    on_step: Callable[[dict[str, Any]], None],
    every: int = 25,
    memory_check: bool = True,
    say: Callable[[str], None] = logger.info,
) -> tuple[EI2Weights, list[float]]:
    """Tune a copy of a MODEL on a clip under its caption; the weights and the losses. The MODEL is not changed.

    on_step, every: of `one_shot_tune`. memory_check: refuse what would not fit. say: gets what it costs, before it
    starts. Raises ValueError for bad input; on Cancel what was trained stays in `checkpoint_folder`.
    """
    check_tunable(model, inflation)
    plain = inflate(model, inflation, strength=0.0)  # what an EI² patch on the MODEL did is not tuned upon
    with training_mode():
        copy = training_copy(plain, settings.precision)
        kept = _kept(copy, latents, caption, settings, inflation) if memory_check else None
        tell_training(say, copy, settings.steps, kept, settings.checkpointing)
        return _in_seat(copy, latents, caption, settings, inflation, on_step, keep=True, every=every)


def untuned(model: Any, inflation: InflationSettings) -> EI2Weights:
    """Weights of no step at all: the attention of an inflation alone."""
    settings = replace(inflation, temporal=NO_TEMPORAL)
    return EI2Weights({}, settings, architecture(model.model.diffusion_model), about={"steps": 0})


def probe_shift(
    model: Any,
    latents: Tensor,
    conditioning: list,
    weights: EI2Weights,
    times: Sequence[float],
    seed: int,
    place: str = "all",
    before: Before | None = None,
) -> list[Reading]:
    """The shift of every temporal module on a clip with noise of a seed, at shares 0..1 of the training times.

    latents: in the VAE's space. before: see `DirectSampler`. Raises ValueError for weights without temporal modules, or
    of another model.
    """
    check_model(model)
    probe = Probe()
    probed = inflate(model, weights.settings, weights, 1.0, place, probe.observer)
    sigmas = model.get_model_object("model_sampling").sigmas
    levels = [float(sigmas[round(time * (len(sigmas) - 1))]) for time in sorted(times, reverse=True)]

    def look(denoise, x, _, *, noise, path, extra_args, callback):
        for probe.sigma in levels:
            denoise(x + probe.sigma * noise, x.new_full((len(x),), probe.sigma), **extra_args)
        return x

    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    # The levels as a schedule, in which context windows look up where they are.
    schedule, looking = torch.tensor([*levels, 0.0]), DirectSampler(look, before=before)
    sample(guider(probed, conditioning), looking, schedule, latents, noise, seed)
    return probe.readings
