"""One clip edited in many ways: what the demonstration, the tables and the sweep share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor

from ..demo.clip import Example, example
from ..pipelines.denoiser import karras_sigmas, truncate_sigmas
from ..pipelines.evaluation.metrics import colour_transfer, flow_error, psnr, ssim
from ..pipelines.videoshop.inversion import Inversion, sample_naive_inversion
from ..pipelines.videoshop.latents import normalise, rescale
from ..pipelines.videoshop.pipeline import VideoshopPipeline
from ..pipelines.videoshop.settings import VideoshopSettings

# What an inversion does not depend on.
WAY_BACK = (
    "denormalise",
    "rescale",
    "first_guidance",
    "last_guidance",
    "guidance_interval",
)


@dataclass(frozen=True)
class Variant:
    """One way to edit a clip, a row of a table."""

    name: str
    settings: VideoshopSettings
    start: Literal["inversion", "host", "noise"] = "inversion"  # Rewind's, the host's naive one, random noise instead

    @property
    def shared(self) -> tuple[str, VideoshopSettings]:
        """Variants in which this is equal share one inversion."""
        unset = VideoshopSettings()
        return self.start, replace(self.settings, **{name: getattr(unset, name) for name in WAY_BACK})


@contextmanager
def counted(unet: torch.nn.Module) -> Iterator[list[int]]:
    """Within it, the list grows by one entry a call of the network."""
    calls: list[int] = []
    hook = unet.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        hook.remove()


class ClipEditor:
    """One clip on one pipeline with the random draws of one seed: `VideoshopPipeline.__call__` in reusable steps."""

    def __init__(self, pipeline: VideoshopPipeline, source: Tensor, seed: int):
        """source: [T, 3, H, W] in 0..1."""
        self.pipeline, self.source, self.seed = pipeline, source, seed

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def invert(self, settings: VideoshopSettings, start: str = "inversion") -> Inversion:
        """Rewind the clip; start "host": Euler on flipped sigmas, as the host's own nodes do it."""
        if start == "inversion":
            return self.pipeline.invert(self.source, settings, self._generator())
        latents = self.pipeline.encode(self.source)
        noise = torch.randn(self.source.shape[1:], generator=self._generator())
        condition = self.pipeline.condition(self.source[0], settings, noise)
        x, applied = normalise(latents, settings.normalise)
        schedule = karras_sigmas(settings.steps, settings.sigma_min, settings.sigma_max, settings.rho)
        sigmas = truncate_sigmas(schedule, settings.strength)
        x = sample_naive_inversion(condition, x, sigmas.flip(0), disable=True)
        return Inversion(
            x, sigmas, applied, evaluations=condition.evaluations, source=latents, augmentation_noise=noise
        )

    def play(self, inversion: Inversion, picture: Tensor, settings: VideoshopSettings) -> tuple[Tensor, int]:
        """Play from a first frame [3, H, W]: latents that are not yet rescaled, and the network calls it took."""
        with counted(self.pipeline.unet) as calls:
            return self.pipeline.denoise(inversion, picture, replace(settings, rescale=0.0)), len(calls)

    def animate(self, picture: Tensor, settings: VideoshopSettings) -> tuple[Tensor, int]:
        """Plain image-to-video from random noise, which knows nothing of the clip: latents, and the network calls."""
        with counted(self.pipeline.unet) as calls:
            latents = self.pipeline.image_to_video(picture, settings, self._generator(), len(self.source))
            return latents, len(calls)

    def finish(self, latents: Tensor, picture: Tensor, settings: VideoshopSettings) -> Tensor:
        """Rescale to the first frame where the settings say so, and decode: [T, 3, H, W]."""
        if settings.rescale:
            latents = rescale(latents, self.pipeline.encode(picture[None]), settings.rescale)
        return self.pipeline.decode(latents)


def measure(result: Tensor, chosen: Example, with_flow: bool = True) -> dict[str, Any]:
    """All measures of a result [T, 3, H, W] against an example's truth; PSNR in dB, flow error in pixels.

    The flow error counts where the source or the true edit has its object.
    """
    moving = (torch.maximum(chosen.source_mask, chosen.target_mask) > 0.5).float()
    transfer = None
    if chosen.kind == "recolour":
        transfer = colour_transfer(result, chosen.source, chosen.target, chosen.target_mask).tolist()
    return {
        "psnr_edit": psnr(result, chosen.target, chosen.region),
        "psnr_source": psnr(result, chosen.source, chosen.region),
        "psnr_unedited": psnr(result, chosen.source, 1 - chosen.region),
        "colour_transfer": transfer,
        "ssim": ssim(result, chosen.target),
        "flow_error": flow_error(result, chosen.flow, moving) if with_flow else float("nan"),
    }


@dataclass(frozen=True)
class Job:
    """Variants that share one inversion, on one clip, for several kinds of edit. No variants: the reference rows."""

    seed: int
    kinds: tuple[str, ...]
    variants: tuple[Variant, ...]
    with_flow: bool = True


def jobs(
    seeds: list[int], kinds: tuple[str, ...], variants: list[Variant], with_flow: bool = True, in_turn: bool = False
) -> list[Job]:
    """All work, clip by clip, in pieces that share nothing. in_turn: one kind of edit a clip instead of all of them."""
    ordered = sorted(variants, key=lambda variant: repr(variant.shared))
    groups = [tuple(group) for _, group in groupby(ordered, key=lambda variant: variant.shared)]
    of_clip = [(kinds[i % len(kinds)],) if in_turn else kinds for i in range(len(seeds))]
    return [Job(seed, of, group, with_flow) for seed, of in zip(seeds, of_clip) for group in ((), *groups)]


@torch.no_grad()
def work(pipeline: VideoshopPipeline, job: Job) -> list[dict[str, Any]]:
    """Do one job: a record for each of its variants and kinds of edit."""
    examples = [example(job.seed, kind) for kind in job.kinds]
    editor = ClipEditor(pipeline, examples[0].source, job.seed)
    if not job.variants:
        return [record for chosen in examples for record in _references(editor, chosen, job)]
    start = job.variants[0].start
    inversion = None if start == "noise" else editor.invert(job.variants[0].settings, start)
    records = []
    for chosen in examples:
        picture, played = chosen.edited_frame, {}
        for variant in job.variants:
            key = replace(variant.settings, rescale=0.0)
            if key not in played:
                animate = inversion is None
                played[key] = editor.animate(picture, key) if animate else editor.play(inversion, picture, key)
            latents, back = played[key]
            frames = editor.finish(latents, picture, variant.settings)
            there = inversion.evaluations if inversion is not None else 0
            records.append(_record(job, chosen, variant.name, frames, there, back))
    return records


def _record(job: Job, chosen: Example, name: str, frames: Tensor, there: int = 0, back: int = 0) -> dict[str, Any]:
    return {
        "seed": job.seed,
        "kind": chosen.kind,
        "variant": name,
        "evaluations_inversion": there,
        "evaluations_denoising": back,
    } | measure(frames, chosen, job.with_flow)


REFERENCES = ("true edit", "true edit through the VAE", "static edited frame", "unedited source")


def _references(editor: ClipEditor, chosen: Example, job: Job) -> list[dict[str, Any]]:
    """What any variant is to be compared with: the best that can be, and what takes no model."""
    through = editor.pipeline.decode(editor.pipeline.encode(chosen.target))
    still = chosen.target[:1].expand_as(chosen.target)
    clips = dict(zip(REFERENCES, (chosen.target, through, still, chosen.source), strict=True))
    return [_record(job, chosen, name, clip) for name, clip in clips.items()]
