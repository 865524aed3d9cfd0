"""What may keep an edit alive to the last frame: the candidates of `stronger.py`, and how each edits a clip.

x is a clip [T, C, h, w] in model space; levels fall from sigmas[0] to 0. "Source" is the model under the condition of
the clip's own first frame, "edited" the same model under the edited one's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..demo.clip import Example
from ..pipelines.videoshop.inversion import Denoiser, Inversion
from ..pipelines.videoshop.masks import latent_mask
from ..pipelines.videoshop.pipeline import VideoshopPipeline
from ..pipelines.videoshop.settings import DEFAULT, VideoshopSettings
from .local import mask_of

Way = Literal[
    "plain",
    "difference",
    "difference, drawn noise",
    "residuals",
    "put back",
    "renormalised by channel",
    "renormalised by frame",
]

DRAWS = "difference, drawn noise"  # the way that inverts nothing
DRAWN = 50_000_000  # added to a clip's seed for noise that is drawn on the way, apart from its other draws


@dataclass(frozen=True)
class Candidate:
    """A row of the table: a way to edit, with its settings. family: the best of one goes on to the test seeds."""

    name: str
    family: str
    way: Way = "plain"
    settings: VideoshopSettings = DEFAULT


# --- the difference of two branches -----------------------------------------------------------------------------------


def _step(x: Tensor, denoised: Tensor, high: float, low: float) -> Tensor:
    """How far an Euler step moves x from a level to the lower one."""
    return (low / high - 1) * (x - denoised)


def stored(trajectory: Tensor, like: Tensor) -> Callable[[int], Tensor]:
    """The source at the i-th level of the way back, as its inversion passed there; trajectory: from level 0 up."""
    return lambda i: trajectory[len(trajectory) - 1 - i].to(like)


def noised(clean: Tensor, sigmas: Tensor, draw: Callable[[], Tensor]) -> Callable[[int], Tensor]:
    """The source at the i-th level of the way back: noise drawn afresh for each, and no inversion (FlowEdit's way)."""
    return lambda i: clean + float(sigmas[i]) * draw()


@torch.no_grad()
def sample_difference(
    edited: Denoiser, source: Denoiser, states: Callable[[int], Tensor], clean: Tensor, sigmas: Tensor
) -> Tensor:
    """FlowEdit (arXiv 2412.08629) in EDM form: a clip moves by the difference of what two conditions would do.

    At each level the source branch stands on the source's own state x_s, the edited one on x_s + (x - clean):
        x <- x + (s_l / s_h - 1) [(x_e - D_edited(x_e)) - (x_s - D_source(x_s))]
    From the clean clip on, which one condition twice therefore gives back to the bit. Two evaluations a level. states:
    the source at the i-th level, `stored` or `noised`. With the stored trajectory's own move in the place of the source
    branch's, which costs nothing, it is plain Euler from the inverted clip, and no other method.
    """
    x, levels = clean, sigmas.tolist()
    for i, (high, low) in enumerate(zip(levels, levels[1:])):
        x_source = states(i)
        x_edited, level = x_source + (x - clean), high * x.new_ones(len(x))
        x = x + (
            _step(x_edited, edited(x_edited, level), high, low) - _step(x_source, source(x_source, level), high, low)
        )
    return x


@torch.no_grad()
def sample_with_residuals(
    edited: Denoiser, source: Denoiser, states: Callable[[int], Tensor], sigmas: Tensor, keep: Tensor
) -> Tensor:
    """Euler, with what the source's own way back loses a step put back where `keep` is 1 (ours).

    The residual of a step is x_l - (x_h + Euler's move under the source condition), on the stored trajectory. Put back
    everywhere, the result is that of `sample_difference`; nowhere, plain Euler's. Two evaluations a level. keep:
    broadcasts over the clip.
    """
    x, levels = states(0), sigmas.tolist()
    for i, (high, low) in enumerate(zip(levels, levels[1:])):
        x_high, level = states(i), high * x.new_ones(len(x))
        residual = states(i + 1) - x_high - _step(x_high, source(x_high, level), high, low)
        x = x + _step(x, edited(x, level), high, low) + keep * residual
    return x


# --- the inverted noise -----------------------------------------------------------------------------------------------


def renormalised(inversion: Inversion, clean: Tensor, over: Literal["channel", "frame"]) -> Inversion:
    """An inversion whose noise has mean 0 and deviation 1: in each channel, or in each channel of each frame.

    The noise is z = (x - clean) / sigma, of the inverted clip x. K-RNR brings it to drawn noise's moments after a
    recursion of its own, which is not reproduced here.
    """
    sigma, axes = float(inversion.sigmas[0]), (0, 2, 3) if over == "channel" else (2, 3)
    z = (inversion.latent - clean) / sigma
    z = (z - z.mean(axes, keepdim=True)) / z.std(axes, keepdim=True).clamp_min(1e-6)
    return replace(inversion, latent=clean + sigma * z)


# --- one edit ---------------------------------------------------------------------------------------------------------


def not_inverted(pipeline: VideoshopPipeline, source: Tensor, settings: VideoshopSettings, seed: int) -> Inversion:
    """What a way needs that draws its noise: the clip's latents, the levels, and the first frames' noise."""
    latents, generator = pipeline.encode(source), torch.Generator().manual_seed(seed)
    noise = torch.randn(source.shape[1:], generator=generator)
    return Inversion(latents, settings.sigmas(), trajectory=latents[None].cpu(), augmentation_noise=noise)


def edit(pipeline: VideoshopPipeline, inversion: Inversion, chosen: Example, candidate: Candidate, seed: int) -> Tensor:
    """The latents of an example's edit by a candidate.

    inversion: of its source, with the trajectory, or `not_inverted`; seed: of noise that is drawn on the way.
    """
    settings, way, picture = candidate.settings, candidate.way, chosen.edited_frame
    if way == "plain":
        return pipeline.denoise(inversion, picture, settings)
    if way == "put back":
        return pipeline.denoise(inversion, picture, settings, mask=mask_of(chosen))
    clean, sigmas = inversion.trajectory[0].to(inversion.latent), inversion.sigmas
    if way.startswith("renormalised by "):
        return pipeline.denoise(renormalised(inversion, clean, way.removeprefix("renormalised by ")), picture, settings)
    edited, source = (
        pipeline.condition(frame, settings, inversion.augmentation_noise) for frame in (picture, chosen.source[0])
    )
    states = stored(inversion.trajectory, clean)
    if way == "residuals":
        region = latent_mask(mask_of(chosen), clean.shape).to(clean)
        return sample_with_residuals(edited, source, states, sigmas, 1 - region)
    if way == DRAWS:
        generator = torch.Generator().manual_seed(DRAWN + seed)
        states = noised(clean, sigmas, lambda: torch.randn(clean.shape, generator=generator).to(clean))
    return sample_difference(edited, source, states, clean, sigmas)
